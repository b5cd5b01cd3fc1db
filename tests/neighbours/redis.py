"""A real Redis in a test's hand: killed, started again with or without its data, made a replica, promoted; and its Sentinels.

With `Locks` it asks for a password, and speaks TLS to whoever has a certificate.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import redis

from tests.neighbours.http1 import HOST


def program() -> str | None:
    """The server's program: `make test` may have put one into the venv."""
    path = f"{sys.prefix}/bin:{os.environ['PATH']}"
    return shutil.which("redis-server", path=path) or shutil.which("valkey-server", path=path)


def speaks_tls() -> bool:
    """Whether it was built with TLS: one that was not stumbles over the option, this one over the folder behind it."""
    found = program()
    if found is None:
        return False
    said = subprocess.run([found, "--tls-replication", "no", "--dir", "/no/such"], capture_output=True, check=False)
    return b"No such file" in said.stdout + said.stderr


@dataclass(frozen=True, slots=True)
class Locks:
    """What keeps others out: a password, and TLS with these files, of which clients show theirs too."""

    password: str = "of-redis"
    folder: Path | None = None

    @classmethod
    def make(cls, folder: Path, *names: str) -> Self:
        """With certificates for these names, from an authority of their own."""
        import trustme  # only here: with cryptography it takes longer to import than everything else

        ca = trustme.CA()
        folder.mkdir(parents=True, exist_ok=True)
        ca.cert_pem.write_to_path(str(folder / "ca.pem"))
        for whose, issued in (("server", ca.issue_cert(*names)), ("client", ca.issue_cert("aistream"))):
            issued.private_key_pem.write_to_path(str(folder / f"{whose}.key"))
            issued.cert_chain_pems[0].write_to_path(str(folder / f"{whose}.pem"))
        return cls(folder=folder)

    def server(self, port: int) -> list[str]:
        """How a server is started with them, on this port."""
        if self.folder is None:
            return ["--port", str(port)]
        files = ("cert-file", "server.pem"), ("key-file", "server.key"), ("ca-cert-file", "ca.pem")
        options = [word for option, name in files for word in (f"--tls-{option}", str(self.folder / name))]
        return ["--port", "0", "--tls-port", str(port), "--tls-replication", "yes", *options]

    def client(self) -> dict[str, Any]:
        """How redis-py opens them."""
        if self.folder is None:
            return {}
        files = {"ca_certs": "ca.pem", "certfile": "client.pem", "keyfile": "client.key"}
        return {"ssl": True, **{f"ssl_{option}": str(self.folder / name) for option, name in files.items()}}

    @property
    def environ(self) -> dict[str, str]:
        """How the service opens them."""
        if self.folder is None:
            return {}
        files = {"CA": "ca.pem", "CERT": "client.pem", "KEY": "client.key"}
        return {f"REDIS_{which}_FILE": str(self.folder / name) for which, name in files.items()}


NONE = Locks(password="")


class RedisServer:
    """One Redis on a port of its own, with an append-only file in `folder`.

    with RedisServer(folder) as server:
        server.kill()
        server.start()              # with its data
        server.empty()              # killed, and started without
    """

    def __init__(self, folder: Path, port: int | None = None, locks: Locks = NONE) -> None:
        self.folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._locks = locks
        self.port = port or _free_port()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def url(self) -> str:
        """`redis://…`, or `rediss://…` with its password."""
        login = f":{self._locks.password}@" if self._locks.password else ""
        return f"redis{'s' if self._locks.folder else ''}://{login}{HOST}:{self.port}"

    @property
    def pid(self) -> int:
        """Its process."""
        assert self._process is not None
        return self._process.pid

    def client(self) -> "redis.Redis":
        """A client of the test's own."""
        return redis.Redis(
            host=HOST, port=self.port, password=self._locks.password or None, socket_timeout=5, **self._locks.client()
        )

    def start(self) -> None:
        """Starts it, with whatever data its folder has; returns when it answers."""
        self.folder.mkdir(parents=True, exist_ok=True)
        found = program()
        assert found is not None, "redis-server is not on this machine: `make test` installs it"
        command = [found, *self._locks.server(self.port), "--bind", HOST, "--dir", str(self.folder)]
        if self._locks.password:
            command += ["--requirepass", self._locks.password, "--masterauth", self._locks.password]
        with (self.folder / "log").open("a") as log:
            options = ["--appendonly", "yes", "--save", "", "--maxmemory-policy", "noeviction", "--repl-diskless-sync-delay", "0"]
            self._process = subprocess.Popen([*command, *options], stdout=log, stderr=log)
        until = time.monotonic() + 10
        while not self._answers():
            assert self._process.poll() is None and time.monotonic() < until, (self.folder / "log").read_text()
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
        shutil.rmtree(self.folder)
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


class Sentinels:
    """Three Sentinels that know a master as `aistream`; two must agree that it is gone. They have a password of their own.

    with Sentinels(folder, master, locks) as sentinels:
        ...                   # sentinels.environ
        sentinels.kill(0)
    """

    PASSWORD = "of-the-sentinels"

    def __init__(self, folder: Path, master: RedisServer, locks: Locks = NONE, *, down_after_ms: int = 500) -> None:
        self._folder = folder
        self._locks = locks
        self._master = master
        self._down_after_ms = down_after_ms
        self._ports = [_free_port() for _ in range(3)]
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        for index, port in enumerate(self._ports):
            folder = self._folder / str(index)
            folder.mkdir(parents=True)
            lines = [
                f"sentinel monitor aistream {HOST} {self._master.port} 2",
                f"sentinel down-after-milliseconds aistream {self._down_after_ms}",
                f"sentinel auth-pass aistream {self._locks.password}" if self._locks.password else "",
                f"requirepass {self.PASSWORD}",
                f"sentinel sentinel-pass {self.PASSWORD}",
            ]
            (folder / "conf").write_text("\n".join(lines) + "\n")
            found = program()
            assert found is not None, "redis-server is not on this machine: `make test` installs it"
            command = [found, str(folder / "conf"), "--sentinel", *self._locks.server(port), "--bind", HOST, "--dir", str(folder)]
            with (folder / "log").open("w") as log:
                self._processes.append(subprocess.Popen(command, stdout=log, stderr=log))
        until = time.monotonic() + 15
        while not all(self._sees_all(index) for index in range(3)):
            if time.monotonic() > until:
                self.__exit__()
                raise AssertionError("the Sentinels did not find each other, or no replica")
            time.sleep(0.1)
        return self

    def __exit__(self, *_: object) -> None:
        for index in range(3):
            self.kill(index)

    @property
    def environ(self) -> dict[str, str]:
        """How the service finds the master."""
        login = f":{self._locks.password}@" if self._locks.password else ""
        hosts = ",".join(f"{HOST}:{port}" for port in self._ports)
        url = f"redis{'s' if self._locks.folder else ''}+sentinel://{login}{hosts}/aistream"
        return {"REDIS_URL": url, "REDIS_SENTINEL_PASSWORD": self.PASSWORD, **self._locks.environ}

    def kill(self, index: int) -> None:
        """Kills one."""
        self._processes[index].kill()
        self._processes[index].wait()

    def master_port(self, index: int) -> int:
        """Whom this one takes for the master."""
        with self._client(index) as client:
            return int(client.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", "aistream")[1])

    def _client(self, index: int) -> "redis.Redis":
        return redis.Redis(host=HOST, port=self._ports[index], password=self.PASSWORD, socket_timeout=5, **self._locks.client())

    def _sees_all(self, index: int) -> bool:
        try:
            with self._client(index) as client:
                known = client.sentinel_master("aistream")
        except redis.RedisError:
            return False
        return bool(known["num-other-sentinels"] == 2 and known["num-slaves"] >= 1)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        return int(sock.getsockname()[1])
