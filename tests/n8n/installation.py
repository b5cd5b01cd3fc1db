"""n8n as docker-compose.yml runs it: on PostgreSQL with the role that deploy/postgres makes, prepared by deploy/n8n/setup, with
the environment of its containers. Only the names of other containers, and the ports, are this machine's.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests import compose
from tests.n8n.client import N8n
from tests.neighbours.postgres import Postgres
from tests.service import ROOT

NODE = ROOT / "n8n" / "n8n-nodes-aistream"
#: The API key of the tests is asked for over plain HTTP, under another name than localhost.
TESTS_NEED = {"N8N_SECURE_COOKIE": "false"}


class Installation:
    """The containers n8n-setup and n8n, over a PostgreSQL; `service_url` is where the workflow finds aistream."""

    def __init__(self, home: Path, folder: Path, postgres: Postgres, env: Mapping[str, str], service_url: str) -> None:
        self.services: dict[str, dict[str, Any]] = compose.read(env)["services"]
        self.volume = folder / "n8n"
        self._home = home
        self._env = env
        self._postgres = postgres
        self._image = self._make_image(folder / "opt-aistream", service_url)
        self.n8n = N8n(home, self.volume, {**self._environment("n8n"), **TESTS_NEED})

    def _make_image(self, image: Path, service_url: str) -> Path:
        """/opt/aistream as deploy/n8n/Dockerfile fills it."""
        image.mkdir(parents=True)
        package = image / "n8n-nodes-aistream"
        shutil.copytree(NODE / "dist", package / "dist")
        shutil.copy(NODE / "package.json", package)
        for name in ("setup", "first-import.mjs"):
            shutil.copy(ROOT / "deploy" / "n8n" / name, image)
        workflow = (ROOT / "n8n" / "workflow.json").read_text()
        (image / "workflow.json").write_text(workflow.replace("http://aistream:8000", service_url))
        return image

    def _environment(self, name: str) -> dict[str, str]:
        here = {"DB_POSTGRESDB_HOST": "127.0.0.1", "DB_POSTGRESDB_PORT": str(self._postgres.port)}
        return {**compose.environment(self.services[name], self._env), **here}

    def setup(self) -> "subprocess.CompletedProcess[str]":
        """Runs n8n-setup to its end."""
        kind, script = self.services["n8n-setup"]["entrypoint"]
        assert script == "/opt/aistream/setup"
        return self._run([kind, str(self._image / "setup")], self.volume, self._environment("n8n-setup"))

    def command(self, volume: Path, *command: str, **environ: str) -> "subprocess.CompletedProcess[str]":
        """Runs one of n8n's commands in its container, with this volume and these variables instead of its own."""
        return self._run(["n8n", *command], volume, {**self._environment("n8n"), **environ})

    def _run(self, command: list[str], volume: Path, environ: Mapping[str, str]) -> "subprocess.CompletedProcess[str]":
        volume.mkdir(exist_ok=True)
        programs = f"{self._home / 'node24' / 'bin'}:{self._home / 'app' / 'node_modules' / '.bin'}"
        places = {"PATH": f"{programs}:{os.environ['PATH']}", "HOME": str(volume), "N8N_USER_FOLDER": str(volume)}
        # Killed with its children, should it take too long: n8n is a shell's child.
        with tempfile.TemporaryFile("w+") as told:
            process = subprocess.Popen(
                command, env={**places, **environ}, stdin=subprocess.DEVNULL, stdout=told, stderr=told, start_new_session=True
            )
            try:
                status = process.wait(500)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            told.seek(0)
            return subprocess.CompletedProcess(command, status, told.read())

    def healthy(self, port: int) -> bool:
        """What n8n's health check says of this port."""
        kind, *command = self.services["n8n"]["healthcheck"]["test"]
        assert (kind, command[0]) == ("CMD", "node")
        node = self._home / "node24" / "bin" / "node"
        here = [part.replace("5678", str(port)) for part in command[1:]]
        return subprocess.run([node, *here], timeout=30, stderr=subprocess.DEVNULL).returncode == 0
