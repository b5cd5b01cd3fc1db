"""A real PostgreSQL in a test's hand, started as its official image starts one: made empty, prepared by the scripts of
/docker-entrypoint-initdb.d as the superuser by a socket, and only then on a port.
"""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from tests.neighbours.http1 import HOST

#: Where Debian has its programs; others have them on PATH.
_PATH = os.pathsep.join([*map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)), os.environ["PATH"]])


def program(name: str) -> str | None:
    """One of its programs."""
    return shutil.which(name, path=_PATH)


def user() -> int:
    """Whom it runs as: it refuses root."""
    return pwd.getpwnam("postgres").pw_uid if os.geteuid() == 0 else os.geteuid()


class Postgres:
    """One PostgreSQL with the database `POSTGRES_DB`. `environ` is the environment of its container.

    with Postgres(environ, [script]) as server:
        server.ask("n8n", "SELECT 1")
    """

    def __init__(self, environ: Mapping[str, str], scripts: list[Path]) -> None:
        # Not among pytest's folders: those are for their owner alone.
        self.folder = Path(tempfile.mkdtemp(prefix="aistream-postgres-"))
        self.port = _free_port()
        self._data = self.folder / "data"
        self._socket = self.folder / "socket"
        self._environ = {**environ, "PATH": _PATH, "PGHOST": str(self._socket), "PGPORT": str(self.port), "LANG": "C.UTF-8"}
        self._scripts = scripts
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.make()
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        shutil.rmtree(self.folder)

    def make(self) -> None:
        """Makes the empty database and runs the scripts, on the socket alone."""
        password = self.folder / "password"
        password.write_text(self._environ["POSTGRES_PASSWORD"])
        self._socket.mkdir()
        for path in (self.folder, self._socket, password):
            os.chown(path, user(), -1)
        asked = ["--username", self._environ["POSTGRES_USER"], f"--pwfile={password}", "--no-sync"]
        self._run("initdb", "--pgdata", str(self._data), *asked, *self._environ["POSTGRES_INITDB_ARGS"].split(), user=user())
        self._spawn("")
        self._run("createdb", "--username", self._environ["POSTGRES_USER"], self._environ["POSTGRES_DB"])
        for script in self._scripts:
            self._run(str(script))
        self.kill()

    def start(self) -> None:
        """Starts it on its port."""
        self._spawn(HOST)

    def kill(self) -> None:
        """Ends it, as the image's STOPSIGNAL does: without waiting for its clients."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(30)
            self._process = None

    def ask(self, role: str, sql: str, database: str = "n8n") -> "subprocess.CompletedProcess[str]":
        """What psql says to this role, which proves itself with its password."""
        passwords = {"n8n": self._environ["N8N_DB_PASSWORD"], "postgres": self._environ["POSTGRES_PASSWORD"]}
        return self.by_tcp("psql", "-X", "-At", "-U", role, "-d", database, "-c", sql, password=passwords[role])

    def by_tcp(self, name: str, *arguments: str, password: str) -> "subprocess.CompletedProcess[str]":
        """Runs a client program as one from another container."""
        environ = {"PATH": _PATH, "PGHOST": HOST, "PGPORT": str(self.port), "PGPASSWORD": password}
        return subprocess.run([name, *arguments], env=environ, capture_output=True, text=True, timeout=30)

    def _run(self, *command: str, user: int | None = None) -> None:
        done = subprocess.run(command, env=self._environ, user=user, cwd=self.folder, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr

    def _spawn(self, address: str) -> None:
        server = program("postgres")
        assert server is not None
        settings = {"listen_addresses": address, "port": self.port, "unix_socket_directories": self._socket, "fsync": "off"}
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        with (self.folder / "log").open("a") as log:
            self._process = subprocess.Popen(
                [server, "-D", self._data, *options], cwd=self.folder, stdout=log, stderr=log, user=user()
            )
        until = time.monotonic() + 30
        ready = [
            program("pg_isready") or "pg_isready",
            "--quiet",
            "--host",
            address or str(self._socket),
            "--port",
            str(self.port),
        ]
        while subprocess.run(ready, timeout=10).returncode != 0:
            assert self._process.poll() is None and time.monotonic() < until, (self.folder / "log").read_text()
            time.sleep(0.05)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        return int(sock.getsockname()[1])
