"""A proxy that does to streams what networks do: it cuts, refuses, delays, buffers, goes silent, or answers by itself.

It knows as much of HTTP as it needs for that: where an answer's head ends. Faults are dealt to the requests for a stream, one
each, in the order in which these come; whoever finds none left is passed through, as is every other request.
"""

import contextlib
import socket
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Self

from tests.neighbours.http1 import HOST, ClientGone, Connection, Request, Server

PAGE = b"<html><body><h1>502 Bad Gateway</h1></body></html>"


@dataclass(frozen=True, slots=True)
class Pass:
    """Everything goes through, in pieces of `lump` bytes (0: as it comes), the first after `delay` seconds."""

    delay: float = 0.0
    lump: int = 0


@dataclass(frozen=True, slots=True)
class Cut:
    """The line breaks when so many bytes of the body have gone through: with an RST, or (polite) with an EOF."""

    after: int
    polite: bool = False


@dataclass(frozen=True, slots=True)
class Silent:
    """After so many bytes of the body nothing comes any more, and the line stays open: as it looks after a sleep."""

    after: int


@dataclass(frozen=True, slots=True)
class Says:
    """The proxy's own answer: a balancer's 502, a captive portal's page."""

    status: int
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = field(default=PAGE)


Fault = Pass | Cut | Silent | Says


class FaultyProxy:
    """Stands before the service on `target`, a port of this machine; `faults` are dealt, `requests` are what came."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._server = Server(self._handle)
        self._lines: set[socket.socket] = set()
        self.faults: deque[Fault] = deque()
        self.requests: list[Request] = []

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.cut()
        self._server.stop()

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://{HOST}:{self._server.port}"

    def through(self, stream_url: str) -> str:
        """The same stream, asked through this proxy."""
        return self.url + stream_url[stream_url.index("/stream/") :]

    @property
    def watched(self) -> list[Request]:
        """The requests for streams."""
        return [request for request in self.requests if request.method == "GET" and "/stream/" in request.target]

    def refuse(self) -> None:
        """Breaks every line, and refuses new ones, as a machine does on which nobody listens."""
        self.cut()
        self._server.suspend()

    def accept(self) -> None:
        """Is there again after `refuse`."""
        self._server.start()

    def cut(self) -> None:
        """Breaks every line that is open."""
        for line in list(self._lines):
            with contextlib.suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)

    def _handle(self, connection: Connection, request: Request) -> None:
        self.requests.append(request)
        stream = request.method == "GET" and "/stream/" in request.target
        fault = self.faults.popleft() if stream and self.faults else Pass()
        if isinstance(fault, Says):
            connection.reply(fault.status, [("Content-Type", "text/html"), *fault.headers], fault.body)
            return
        with socket.create_connection((HOST, self._target)) as line:
            self._lines.add(line)
            try:
                line.sendall(_asked(request))
                self._answer(connection, line, fault)
            finally:
                self._lines.discard(line)
        # The answer's length is for the client to know; without a word about it the end of the line is its end.
        connection.close()

    def _answer(self, connection: Connection, line: socket.socket, fault: Fault) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            data = line.recv(65536)
            if not data:
                return
            head += data
        head, _, body = head.partition(b"\r\n\r\n")
        connection.send(head + b"\r\n\r\n")
        if isinstance(fault, Pass) and fault.delay:
            connection.pause(fault.delay)
        carried = 0
        held = b""
        while True:
            if isinstance(fault, Cut) and carried + len(body) >= fault.after:
                connection.send(body[: fault.after - carried])
                time.sleep(0.02)  # an RST takes along what the client has not yet read
                if not fault.polite:
                    connection.reset()
                raise ClientGone("cut")
            if isinstance(fault, Silent) and carried + len(body) >= fault.after:
                connection.send(body[: fault.after - carried])
                connection.pause(60)
                raise ClientGone("silent")
            carried += len(body)
            held += body
            lump = fault.lump if isinstance(fault, Pass) else 0
            while len(held) >= max(lump, 1):
                size = lump or len(held)
                connection.send(held[:size])
                held = held[size:]
            try:
                connection.wait_for(line)
                body = line.recv(65536)
            except OSError:
                body = b""
            if not body:
                if held:
                    connection.send(held)
                return


def _asked(request: Request) -> bytes:
    headers = {**request.headers, "connection": "close"}
    lines = [f"{request.method} {request.target} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + request.body
