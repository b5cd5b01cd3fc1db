"""docker-compose.yml as Docker Compose reads it, and the commands of its containers as processes of this machine.

There is no container engine where the tests run. `read` fills the variables in as Compose does; a `Container` gives a command
what its container would give it: its environment, its user, no capabilities, a root file system that is read-only but for its
volumes and tmpfs (by bubblewrap). What is not the container's own is the network, so that ports and the names of other containers
are replaced, and the image, for which this machine's programs stand in.
"""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import yaml
from dotenv import dotenv_values

from aistream.environment import fresh_env
from tests.service import ROOT

FILE = ROOT / "docker-compose.yml"
#: `$$`, `${NAME}`, `${NAME:-default}`, `${NAME:?what is wrong}`; anything else with a dollar is a mistake.
_VARIABLE = re.compile(r"\$(?:(?P<dollar>\$)|\{(?P<name>\w+)(?::(?P<kind>[-?])(?P<word>[^${}]*))?\}|(?P<wrong>.|$))")
#: What every image has of its own.
_SYSTEM = ("/usr", "/etc", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")


class Missing(Exception):
    """A variable that must be set is not; the message is what Compose would say."""


def sample_env() -> dict[str, str]:
    """What `make env` writes, as Compose reads it."""
    return {name: value or "" for name, value in dotenv_values(stream=io.StringIO(fresh_env()), interpolate=False).items()}


def variables() -> set[str]:
    """Every variable that docker-compose.yml asks for."""
    return {match["name"] for match in _VARIABLE.finditer(FILE.read_text()) if match["name"]}


def interpolate(text: str, environ: Mapping[str, str]) -> str:
    """Fills the variables in. Raises Missing."""

    def value(match: re.Match[str]) -> str:
        assert match["wrong"] is None, f"a $ that is neither $$ nor a variable: {text!r}"
        if match["dollar"]:
            return "$"
        found = environ.get(match["name"], "")
        if not found and match["kind"] == "?":
            raise Missing(f"{match['name']} {match['word']}")
        return found or match["word"] or ""

    return _VARIABLE.sub(value, text)


def read(environ: Mapping[str, str]) -> dict[str, Any]:
    """The compose file with these variables filled in."""

    def fill(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: fill(value) for key, value in node.items()}
        if isinstance(node, list):
            return [fill(value) for value in node]
        return interpolate(node, environ) if isinstance(node, str) else node

    return dict(fill(yaml.safe_load(FILE.read_text())))


def environment(service: Mapping[str, Any], env: Mapping[str, str]) -> dict[str, str]:
    """What a container finds in its environment: of `.env` if it reads that, and its own, which wins."""
    inherited = env if service.get("env_file") == [".env"] else {}
    return {**inherited, **{name: str(value) for name, value in service.get("environment", {}).items()}}


def seconds(duration: str) -> float:
    """`150s` as a number."""
    assert duration.endswith("s")
    return float(duration[:-1])


def can_contain() -> bool:
    """Whether this machine has what a Container is made with."""
    return shutil.which("bwrap") is not None and shutil.which("setpriv") is not None


class Container:
    """A command in the surroundings of its container. `mounts` maps paths inside to paths here, read-only; `volumes` too, and
    they can be written to.

    with Container(["redis-server"], {…}, uid=10_001, folder=tmp_path, volumes={"/data": tmp_path / "data"}) as redis:
        redis.run(["redis-cli", "ping"])
    """

    def __init__(
        self,
        command: Sequence[str],
        environ: Mapping[str, str],
        *,
        uid: int,
        folder: Path,
        mounts: Mapping[str, Path] | None = None,
        volumes: Mapping[str, Path] | None = None,
        tmpfs: Sequence[str] = (),
        workdir: str = "/",
    ) -> None:
        self._command = list(command)
        self._environ = {
            "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}",
            **{name: text for name, text in environ.items() if text},
        }
        self._uid = uid
        self._log = folder / "container.log"
        self._sandbox = [*_sandbox(uid, mounts or {}, volumes or {}, tmpfs), "--chdir", workdir]
        for volume in (volumes or {}).values():
            volume.mkdir(parents=True, exist_ok=True)
            _own(volume, uid)
        self._process: subprocess.Popen[bytes] | None = None
        self.pid = 0

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def log(self) -> str:
        """Everything it has printed."""
        return self._log.read_text(errors="replace")

    def start(self) -> None:
        """Starts it."""
        told, tell = os.pipe()
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                ["bwrap", "--info-fd", str(tell), *self._sandbox, *self._as_user(), *self._command],
                env=self._environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[tell],
                start_new_session=True,
            )
        os.close(tell)
        said = b""
        while b"}" not in said:  # no end of file: the command has the other end too
            more = os.read(told, 4096)
            assert more, self.log
            said += more
        os.close(told)
        first = int(json.loads(said)["child-pid"])
        children = Path(f"/proc/{first}/task/{first}/children")
        self.wait_until(lambda: children.read_text().strip())
        self.pid = int(children.read_text())

    def run(self, command: Sequence[str], timeout: float = 20.0) -> "subprocess.CompletedProcess[str]":
        """Runs this too, in the same surroundings, as `docker exec` and a health check do."""
        return subprocess.run(
            [*self.surroundings, *command],
            env=self._environ,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    @property
    def surroundings(self) -> list[str]:
        """What a command is put behind to run as in this container."""
        return ["bwrap", *self._sandbox, *self._as_user()]

    def wait_until(self, holds: Callable[[], object], timeout: float = 30.0) -> None:
        """A bounded poll; AssertionError with what it has printed, at once when it has ended."""
        assert self._process is not None
        until = time.monotonic() + timeout
        while not holds():
            assert self._process.poll() is None and time.monotonic() < until, self.log
            time.sleep(0.05)

    def stop(self, sig: signal.Signals, timeout: float = 30.0) -> int:
        """Sends the signal that its container is stopped with; gives the exit status."""
        assert self._process is not None
        os.kill(self.pid, sig)
        return self._process.wait(timeout)

    def kill(self) -> None:
        """Kills it, with all that it has started."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _as_user(self) -> list[str]:
        if os.geteuid() != 0:
            return []  # the sandbox has made it that user
        user = ["--reuid", str(self._uid), "--regid", str(self._uid), "--clear-groups"]
        return ["setpriv", *user, "--inh-caps=-all", "--bounding-set=-all", "--no-new-privs", "--"]


def _sandbox(uid: int, mounts: Mapping[str, Path], volumes: Mapping[str, Path], tmpfs: Sequence[str]) -> list[str]:
    # Its first process dies with the tests, and with that one all others, whoever they run as.
    options = ["--die-with-parent", "--unshare-pid"]
    if os.geteuid() != 0:
        options += ["--unshare-user", "--uid", str(uid), "--gid", str(uid)]
    for path in _SYSTEM:
        if Path(path).is_symlink():
            options += ["--symlink", os.readlink(path), path]
        elif Path(path).exists():
            options += ["--ro-bind", path, path]
    options += ["--proc", "/proc", "--dev", "/dev", "--perms", "1777", "--tmpfs", "/dev/shm"]
    for entry in tmpfs:
        options += ["--perms", "1777", "--tmpfs", entry.partition(":")[0]]
    # Python itself, wherever this machine has it.
    python = {folder: Path(folder).resolve() for folder in (sys.base_prefix, sys.prefix, str(Path(sys.prefix).resolve()))}
    for kind, targets in (("--ro-bind", {**python, **mounts}), ("--bind", volumes)):
        for inside, source in targets.items():
            for parent in reversed(Path(inside).parents[:-1]):
                options += ["--perms", "0755", "--dir", str(parent)]
            options += [kind, str(source), inside]
    return [*options, "--remount-ro", "/"]


def _own(path: Path, uid: int) -> None:
    if os.geteuid() == 0:
        for one in (path, *path.rglob("*")):
            os.chown(one, uid, uid, follow_symlinks=False)
