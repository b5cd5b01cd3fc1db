"""The folder in which the workers of one gunicorn share their metrics.

prometheus_client looks for PROMETHEUS_MULTIPROC_DIR when it is imported. So the master makes the folder before it starts a
worker, and nothing here imports that library, but for the one file of it that knows its files.

A worker has a file for its counters, one for its histograms and one for each kind of gauge. When it has died its gauges go, and
its counts are added to those of the dead before it: however often workers crash, there are no more files than workers and two.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
_PREFIX = "aistream-metrics-"
#: What is locked while counts are moved from one file to another, and while they are read.
_LOCK = "lock"
#: Seconds that the master waits for those who read. Then it leaves the files to the next time.
PATIENCE = 0.5


def make() -> None:
    """Makes this master's folder, unless the operator has named one; removes those whose masters were killed."""
    named = os.environ.get(VARIABLE, "")
    if named and not Path(named).name.startswith(_PREFIX):
        return
    # In memory where that is to be had: the files are mapped, and written to at each count.
    parent = Path("/dev/shm" if os.path.isdir("/dev/shm") else tempfile.gettempdir())  # nosec B108  # mkdtemp
    for folder in parent.glob(f"{_PREFIX}*-*"):
        master = folder.name.removeprefix(_PREFIX).partition("-")[0]
        if master.isdigit() and not _alive(int(master)):
            shutil.rmtree(folder, ignore_errors=True)  # of another user: left as it is
    os.environ[VARIABLE] = tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=parent)


def remove() -> None:
    """Removes this master's folder; one that the operator has named, or a successor's (SIGUSR2), stays."""
    folder = Path(os.environ.get(VARIABLE, ""))
    if folder.name.startswith(f"{_PREFIX}{os.getpid()}-"):
        shutil.rmtree(folder, ignore_errors=True)


def bury(pid: int) -> None:
    """Takes a dead worker's gauges away, and keeps its counts with those of all the dead. Called by the master; never raises.

    What was left by workers that died earlier goes the same way.
    """
    with suppress(Exception):  # a master must not end for a figure
        folder = Path(os.environ[VARIABLE])
        with _locked(folder, fcntl.LOCK_EX, PATIENCE) as locked:
            if not locked:
                return
            dead = [path for path in folder.glob("*_*.db") if _is_of_the_dead(path, pid)]
            for path in dead:
                if path.name.startswith("gauge_"):
                    path.unlink()
            for kind in ("counter", "histogram"):
                files = [path for path in dead if path.name.startswith(f"{kind}_")]
                if files:
                    _merge(files, folder / f"{kind}_dead.db")


@contextmanager
def undisturbed() -> Iterator[None]:
    """While this lasts no counts are moved: whoever read them in that moment would miss some, or see them twice."""
    with _locked(Path(os.environ[VARIABLE]), fcntl.LOCK_SH, PATIENCE):
        yield


@contextmanager
def _locked(folder: Path, how: int, patience: float) -> Iterator[bool]:
    """Holds the folder's lock, if it can be had in time."""
    with (folder / _LOCK).open("a") as file:
        until = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(file, how | fcntl.LOCK_NB)
                held = True
                break
            except BlockingIOError:
                held = False
                if time.monotonic() > until:
                    break
            time.sleep(0.005)
        yield held  # closing the file lets the lock go


def _is_of_the_dead(path: Path, pid: int) -> bool:
    owner = path.stem.rpartition("_")[2]
    return owner.isdigit() and (int(owner) == pid or not _alive(int(owner)))


def _merge(files: list[Path], into: Path) -> None:
    files_of = _class_of_files()
    counts: dict[str, float] = {}
    for path in [*files, *([into] if into.exists() else [])]:
        # A worker that was killed while it made its file has counted nothing.
        with suppress(Exception):
            for key, value, _, _ in files_of.read_all_values_from_file(path):
                counts[key] = counts.get(key, 0.0) + value
    merged = into.with_suffix(".new")
    merged.unlink(missing_ok=True)
    written = files_of(str(merged))
    for key, value in counts.items():
        written.write_value(key, value, 0.0)
    written.close()
    merged.replace(into)
    for path in files:
        path.unlink()


def _class_of_files() -> Any:
    """prometheus_client's MmapedDict, without the package around it.

    That would import ssl and threading in the master, so that the workers which it starts from then on had them before gevent
    patches them.
    """
    package = importlib.util.find_spec("prometheus_client")
    assert package is not None and package.submodule_search_locations  # nosec B101  # for mypy
    path = Path(package.submodule_search_locations[0], "mmap_dict.py")
    spec = importlib.util.spec_from_file_location("prometheus_client_mmap_dict", path)
    assert spec is not None and spec.loader is not None  # nosec B101  # for mypy
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.MmapedDict


def _alive(pid: int) -> bool:
    with suppress(ProcessLookupError):
        with suppress(PermissionError):
            os.kill(pid, 0)
        return True
    return False
