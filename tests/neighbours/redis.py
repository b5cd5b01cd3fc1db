"""A real Redis in a test's hand: killed, started again with or without its data, made a replica, promoted."""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Self

import redis

from tests.neighbours.http1 import HOST


def program() -> str | None:
    """The server's program: `make test` may have put one into the venv."""
    path = f"{sys.prefix}/bin:{os.environ['PATH']}"
    return shutil.which("redis-server", path=path) or shutil.which("valkey-server", path=path)


class RedisServer:
    """One Redis on a port of its own, with an append-only file in `folder`.

    with RedisServer(folder) as server:
        server.kill()
        server.start()              # with its data
        server.empty()              # killed, and started without
    """

    def __init__(self, folder: Path, port: int | None = None) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self.port = port or _free_port()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def url(self) -> str:
        """`redis://…`."""
        return f"redis://{HOST}:{self.port}"

    @property
    def pid(self) -> int:
        """Its process."""
        assert self._process is not None
        return self._process.pid

    def client(self) -> "redis.Redis":
        """A client of the test's own."""
        return redis.Redis(host=HOST, port=self.port, socket_timeout=5)

    def start(self) -> None:
        """Starts it, with whatever data its folder has; returns when it answers."""
        self._folder.mkdir(parents=True, exist_ok=True)
        found = program()
        assert found is not None, "redis-server is not on this machine: `make test` installs it"
        command = [found, "--port", str(self.port), "--bind", HOST, "--dir", str(self._folder)]
        with (self._folder / "log").open("a") as log:
            options = ["--appendonly", "yes", "--save", "", "--maxmemory-policy", "noeviction", "--repl-diskless-sync-delay", "0"]
            self._process = subprocess.Popen([*command, *options], stdout=log, stderr=log)
        until = time.monotonic() + 10
        while not self._answers():
            assert self._process.poll() is None and time.monotonic() < until, (self._folder / "log").read_text()
            time.sleep(0.02)

    def _answers(self) -> bool:
        try:
            with self.client() as client:
                return bool(client.ping())
        except redis.RedisError:
            return False

    def kill(self) -> None:
        """Kills it, as the out-of-memory killer does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def empty(self) -> None:
        """Kills it, and starts it without its data."""
        self.kill()
        shutil.rmtree(self._folder)
        self.start()

    def follow(self, master: "RedisServer") -> None:
        """Makes it a replica; returns when it has caught up."""
        with self.client() as client:
            client.replicaof(HOST, str(master.port))
            until = time.monotonic() + 10
            while client.info("replication")["master_link_status"] != "up":
                assert time.monotonic() < until, "the replica did not catch up"
                time.sleep(0.02)

    def promote(self) -> None:
        """Makes it a master: what its master gets from now on, it does not have."""
        with self.client() as client:
            client.execute_command("REPLICAOF", "NO", "ONE")


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        return int(sock.getsockname()[1])
