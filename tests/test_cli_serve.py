"""`aistream serve` and `aistream token`: what a wheel has without a checkout around it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from aistream.tokens import Caller, Tokens
from tests.conftest import make_config
from tests.leaks import leaks
from tests.service import ROOT, SECRET, wait_until

Start = Callable[..., "Served"]


class Served:
    """`python -m aistream serve` in a folder of its own."""

    def __init__(self, folder: Path, port: int, args: tuple[str, ...], environ: dict[str, str]) -> None:
        self._log = folder.with_suffix(".log")
        self.url = f"http://127.0.0.1:{port}"
        environ = {"PATH": os.environ["PATH"], "HOME": str(folder), "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **environ}
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "aistream", "serve", *args],
                cwd=folder,
                env=environ,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def log(self) -> str:
        """Everything it has printed."""
        return self._log.read_text()

    def health(self) -> int:
        """The status of GET /health; 0 without an answer."""
        try:
            return httpx.get(f"{self.url}/health", timeout=5).status_code
        except httpx.TransportError:
            return 0

    def wait(self) -> None:
        """Waits until it answers."""
        wait_until(lambda: self.health() == 200 or self.process.poll() is not None, 30)
        assert self.process.poll() is None, self.log

    def end(self) -> None:
        """Kills what is left."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        assert leaks(self.log, [SECRET]) == []


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder, without wsgi.py and gunicorn.conf.py; no checkout's .env counts in it."""
    made = tmp_path / "empty"
    made.mkdir()
    return made


@pytest.fixture
def serve(folder: Path, free_port: int) -> Iterator[Start]:
    """Starts `aistream serve` there; each ends with the test."""
    started: list[Served] = []

    def start(*args: str, **environ: str) -> Served:
        environ = {"PYTHON_DOTENV_DISABLED": "true", "JWT_SECRET": SECRET, "DRAIN_SECONDS": "1", **environ}
        started.append(Served(folder, free_port, args, environ))
        return started[-1]

    yield start
    for one in started:
        one.end()


def test_the_service_starts_in_an_empty_folder_with_its_own_settings(serve: Start, free_port: int, folder: Path) -> None:
    served = serve("--dev", "--host", "127.0.0.1", "--port", str(free_port))
    served.wait()

    # gunicorn's own limit of a header is half of that
    answer = httpx.get(f"{served.url}/health", headers={"X-Long": "x" * 12_000})
    page = httpx.get(f"{served.url}/")

    assert (answer.status_code, page.status_code) == (200, 200)
    assert f"aistream is ready: {served.url}/" in served.log and "embedded store" in served.log
    assert list(folder.iterdir()) == []


def test_signals_and_exit_codes_are_gunicorns(serve: Start, free_port: int) -> None:
    served = serve("--dev", "--port", str(free_port))
    served.wait()

    served.process.send_signal(signal.SIGTERM)

    assert served.process.wait(20) == 0
    assert "worker.drained" in served.log


def test_what_follows_two_dashes_is_gunicorns(serve: Start, free_port: int) -> None:
    served = serve("--dev", "--port", "1", "--", "--bind", f"127.0.0.1:{free_port}", "--check-config")

    assert served.process.wait(30) == 0
    assert "aistream is ready" not in served.log


def test_a_sighup_reads_the_configuration_anew(serve: Start, free_port: int, folder: Path) -> None:
    env = folder / ".env"
    env.write_text("DEV_MODE=true\n")
    # Without the checkout's wsgi.py beside the package .env is that of the current folder.
    site = folder.parent / "site"
    shutil.copytree(ROOT / "aistream", site / "aistream", ignore=shutil.ignore_patterns("__pycache__"))
    served = serve("--port", str(free_port), PYTHONPATH=str(site), PYTHON_DOTENV_DISABLED="", DRAIN_SECONDS="")
    served.wait()

    env.write_text("DEV_MODE=true\nMETRICS_TOKEN=another-token-of-the-tests\n")
    served.process.send_signal(signal.SIGHUP)

    asked = {"Authorization": "Bearer no"}
    wait_until(lambda: httpx.get(f"{served.url}/metrics", headers=asked, timeout=5).status_code == 401, 30)


@pytest.mark.parametrize(
    ("args", "environ", "said"),
    [
        ((), {"JWT_SECRET": ""}, "aistream cannot start with this configuration:\n  - JWT_SECRET is not set"),
        (("--dev", "--host", "0.0.0.0"), {}, "  - HOST is '0.0.0.0': expected 127.0.0.1"),
        (("--dev", "--workers", "2"), {}, "  - WEB_CONCURRENCY is 2: expected 1, or REDIS_URL"),
    ],
    ids=["no secret", "open to others", "two workers"],
)
def test_a_bad_configuration_is_refused_with_a_line_for_each_fault(
    serve: Start, args: tuple[str, ...], environ: dict[str, str], said: str
) -> None:
    served = serve(*args, **environ)

    assert served.process.wait(30) == 1
    assert said in served.log and "Traceback" not in served.log


def test_a_port_that_there_is_not_is_a_matter_of_usage(serve: Start) -> None:
    served = serve("--port", "70000")

    assert served.process.wait(30) == 2
    assert "70000" in served.log and "Traceback" not in served.log


# ---- aistream, and aistream token ----


def shell(*args: str, **environ: str) -> "subprocess.CompletedProcess[str]":
    """Runs `aistream …`."""
    environ = {
        "PATH": os.environ["PATH"],
        "PYTHON_DOTENV_DISABLED": "true",
        "DEV_MODE": "true",
        "JWT_SECRET": SECRET,
        **environ,
    }
    command = [sys.executable, "-m", "aistream", *args]
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60)


def test_a_token_is_printed_bare_and_as_json() -> None:
    bare = shell("token", "--sub", "me", "--ttl", "60")
    told = json.loads(shell("token", "--sub", "me", "--json", "--curl").stdout)

    tokens = Tokens(make_config(), time.time)
    assert tokens.verify_caller(bare.stdout.strip()) == tokens.verify_caller(told["token"]) == Caller("me")
    assert (
        told["sub"] == "me" and told["exp"] > time.time() and told["curl"].startswith("curl -sS -X POST http://127.0.0.1:8000/")
    )
    assert (bare.returncode, bare.stderr) == (0, "")


def test_beside_a_service_of_serve_dev_the_other_commands_find_its_secret(serve: Start, free_port: int, folder: Path) -> None:
    site = folder.parent / "site"
    shutil.copytree(ROOT / "aistream", site / "aistream", ignore=shutil.ignore_patterns("__pycache__"))
    environ = {"PYTHONPATH": str(site), "JWT_SECRET": "", "PYTHON_DOTENV_DISABLED": ""}
    served = serve("--dev", "--port", str(free_port), **environ)
    served.wait()

    command = [sys.executable, "-m", "aistream", "stream", "Hello"]
    environ |= {"PATH": os.environ["PATH"], "PORT": str(free_port)}
    options: dict[str, Any] = {"cwd": folder, "env": environ, "capture_output": True, "text": True, "timeout": 60}
    without, with_it = subprocess.run(command, **options), subprocess.run([*command, "--dev"], **options)

    assert without.returncode == 1 and without.stderr.endswith("has started: --dev\n")
    assert (with_it.returncode, with_it.stdout) == (0, "Hello")


def test_every_command_has_help_with_examples() -> None:
    listed = shell("--help")
    section = listed.stdout.partition("Commands:\n")[2].partition("\n\n")[0]
    commands = [line.split()[0] for line in section.splitlines()]
    helps = {name: shell(name, "--help").stdout for name in commands}

    assert commands == ["serve", "token", "stream", "doctor", "callbacks", "openapi"]
    assert [name for name, text in helps.items() if "Example" not in text or "aistream " + name not in text] == []


def test_an_unknown_command_is_a_matter_of_usage() -> None:
    unknown = shell("sreve")

    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert "No such command 'sreve'" in unknown.stderr
