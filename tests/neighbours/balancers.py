"""nginx and HAProxy as real processes, with the configuration of `deploy/`: only its addresses, ports and paths are others.

Each is started over the given replicas and listens on ports of its own; its log lines are parsed.
"""

import contextlib
import getpass
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from tests.neighbours.http1 import HOST

DEPLOY = Path(__file__).parents[2] / "deploy"
PATH = f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin"


def program(name: str) -> str | None:
    """The path of `nginx` or `haproxy`; Debian has them where only root looks."""
    return shutil.which(name, path=PATH)


def put(text: str, changes: dict[str, str]) -> str:
    """The text with these regular expressions replaced; each must occur."""
    for pattern, there in changes.items():
        text, count = re.subn(pattern, lambda _, there=there: there, text, flags=re.MULTILINE)  # type: ignore[misc]
        assert count, f"{pattern} does not occur"
    return text


class Balancer:
    """What both have in common. `port`: plain HTTP. `name`: the program."""

    name = ""

    def __init__(self, folder: Path, replicas: Sequence[int], changes: dict[str, str] | None = None) -> None:
        """`changes`: further replacements in the configuration, such as a time that a test cannot wait for."""
        self.port = _free_port()
        self._folder = folder
        self._replicas = replicas
        self._changes = changes or {}
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://{HOST}:{self.port}"

    @property
    def log(self) -> str:
        """Everything it has printed."""
        return (self._folder / "log").read_text(errors="replace")

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Its lines about requests."""
        return [json.loads(line) for line in self.log.splitlines() if line.startswith("{")]

    def start(self) -> None:
        """Starts it; returns when it listens."""
        self._folder.mkdir(parents=True, exist_ok=True)
        command = self._command()
        with (self._folder / "log").open("a") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        until = time.monotonic() + 10
        while not self._listens():
            assert self._process.poll() is None and time.monotonic() < until, self.log
            time.sleep(0.02)

    def stop(self) -> None:
        """Ends it at once, with its streams."""
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            self._process.wait(10)
            self._process = None

    def reload(self) -> None:
        """Has it read its configuration and certificates anew, as an operator does."""
        assert self._process is not None
        self._process.send_signal(signal.SIGHUP)

    def _listens(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection((HOST, self.port), timeout=1):
            return True
        return False

    def _command(self) -> list[str]:
        raise NotImplementedError


class Nginx(Balancer):
    """nginx; with `certs`, a folder with fullchain.pem and privkey.pem, it has its TLS configuration and a `tls_port` too."""

    name = "nginx"

    def __init__(
        self, folder: Path, replicas: Sequence[int], changes: dict[str, str] | None = None, certs: Path | None = None
    ) -> None:
        super().__init__(folder, replicas, changes)
        self._certs = certs
        self.tls_port = _free_port() if certs else 0
        #: Where an ACME client would put its answers.
        self.acme = folder / "acme"

    @property
    def tls_url(self) -> str:
        """Where browsers reach it."""
        return f"https://localhost:{self.tls_port}"

    def _command(self) -> list[str]:
        found = program("nginx")
        assert found is not None
        self._write()
        # pytest's folders are for their owner alone.
        return [found, "-c", str(self._folder / "nginx.conf"), "-g", f"daemon off; user {getpass.getuser()};"]

    def _write(self) -> None:
        server = "tls.conf" if self._certs else "plain.conf"
        places = {
            "nginx.conf": {r"/tmp/nginx\.pid": str(self._folder / "pid")},
            "locations.conf": {},
            "replicas.conf": {
                r"^resolver .*$": "",  # no Docker here, and Debian's nginx is too old for `resolve`
                r"^server aistream:8000 resolve (.*)$": "\n".join(
                    f"server {HOST}:{port} max_fails=1 fail_timeout=2s;" for port in self._replicas
                ),
            },
            server: {r"listen 80;": f"listen {HOST}:{self.port};"},
        }
        if self._certs:
            places[server] |= {
                r"listen 443 ": f"listen {self.tls_port} ",
                "certs/": f"{self._certs}/",
                "/var/www/acme": str(self.acme),
            }
        texts = {name: put((DEPLOY / "nginx" / name).read_text(), changes) for name, changes in places.items()}
        for pattern, value in self._changes.items():
            (name,) = (name for name, text in texts.items() if re.search(pattern, text))
            texts[name] = put(texts[name], {pattern: value})
        (self._folder / "conf.d").mkdir(exist_ok=True)
        for name, text in texts.items():
            (self._folder / ("conf.d/default.conf" if name == server else name)).write_text(text)


class HAProxy(Balancer):
    """HAProxy, in its master-worker mode, as its image starts it."""

    name = "haproxy"

    def _command(self) -> list[str]:
        found = program("haproxy")
        assert found is not None
        servers = "\n".join(f"    server replica{number} {HOST}:{port}" for number, port in enumerate(self._replicas, 1))
        changes = {
            r"bind :80$": f"bind {HOST}:{self.port}",
            r"^    server-template replica 10 aistream:8000 .*$": servers,
            **self._changes,
        }
        config = self._folder / "haproxy.cfg"
        config.write_text(put((DEPLOY / "haproxy" / "haproxy.cfg").read_text(), changes))
        return [found, "-W", "-db", "-f", str(config)]

    def reload(self) -> None:
        """As an operator does."""
        assert self._process is not None
        self._process.send_signal(signal.SIGUSR2)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        return int(sock.getsockname()[1])
