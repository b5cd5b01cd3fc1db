"""A stand-in for `docker compose`, for scripts that run in containers: their commands run as processes of this machine.

`exec` and `run` run the command in what the service's entry in the plan says; `stop` ends the service's process; `up` is only
noted. As a program: the first thing on PATH called `docker`, with DOCKER_PLAN in its environment.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.service import ROOT


@dataclass
class Service:
    """What stands in for a container: what a command is put behind, its environment, what is replaced in it, and its process."""

    before: list[str] = field(default_factory=list)
    environ: dict[str, str] = field(default_factory=dict)
    replace: dict[str, str] = field(default_factory=dict)
    pid: int = 0


def stand_in(folder: Path, services: Mapping[str, Service]) -> dict[str, str]:
    """Makes the program; gives the environment that finds it."""
    folder.mkdir(exist_ok=True)
    plan = folder / "plan.json"
    plan.write_text(json.dumps({name: asdict(service) for name, service in services.items()}))
    program = folder / "docker"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m tests.neighbours.docker "$@"\n')
    program.chmod(0o755)
    path = f"{folder}:{os.environ['PATH']}"
    return {"PATH": path, "PYTHONPATH": str(ROOT), "DOCKER_PLAN": str(plan)}


def noted(folder: Path) -> list[str]:
    """What it was asked, a line each."""
    return (folder / "plan.log").read_text().splitlines()


def main(arguments: Sequence[str]) -> None:
    """`compose exec|run|stop|up`, with the options that our scripts use."""
    path = Path(os.environ["DOCKER_PLAN"])
    plan = {name: Service(**entry) for name, entry in json.loads(path.read_text()).items()}
    assert arguments[0] == "compose"
    words = [word for word in arguments[1:] if word not in ("--profile", "scale")]
    with path.with_suffix(".log").open("a") as log:
        log.write(" ".join(words[: 2 if words[0] in ("exec", "run") else None]) + "\n")
    match words:
        case ["exec", "-T", name, *command]:
            _become(plan[name], command)
        case ["run", "--rm", "-T", "--no-deps", "--entrypoint", entrypoint, name, *command]:
            assert not _alive(plan[name].pid), f"{name} is still running"
            _become(plan[name], [entrypoint, *command])
        case ["stop", *names]:
            for name in names:
                _end(plan[name].pid)
        case ["up", "--detach", *_]:
            pass
        case _:
            raise SystemExit(f"unknown to the stand-in: {words}")


def _become(service: Service, command: list[str]) -> None:
    for old, new in service.replace.items():
        command = [part.replace(old, new) for part in command]
    line = [*service.before, *command]
    os.execvpe(line[0], line, {"PATH": os.environ["PATH"], **service.environ})


def _end(pid: int) -> None:
    if _alive(pid):
        os.kill(pid, signal.SIGTERM)
    until = time.monotonic() + 20
    while _alive(pid):
        assert time.monotonic() < until, f"{pid} did not end"
        time.sleep(0.02)


def _alive(pid: int) -> bool:
    try:
        return pid > 0 and "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


if __name__ == "__main__":
    main(sys.argv[1:])
