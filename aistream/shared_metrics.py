"""The folder in which the workers of one gunicorn share their metrics.

prometheus_client looks for PROMETHEUS_MULTIPROC_DIR when it is imported. So the master makes the folder before it starts a
worker, and nothing here imports that library.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
_PREFIX = "aistream-metrics-"


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


def _alive(pid: int) -> bool:
    with suppress(ProcessLookupError):
        with suppress(PermissionError):
            os.kill(pid, 0)
        return True
    return False
