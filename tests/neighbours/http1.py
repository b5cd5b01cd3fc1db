"""An HTTP/1.1 server that controls what a framework hides: each byte, each chunk boundary, and how a connection ends.

One thread per connection, from the plain standard library: under gevent's monkey patching these are greenlets.
Connections are kept alive, as real providers and n8n do. Nagle is off, so one `send` is one segment unless the reader
is slow. With TLS each connection is wrapped: one `send` is then one record, and every ending is without close_notify, as
when a proxy or a process dies.
"""

import contextlib
import select
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Self

MAX_HEAD_BYTES = 64 * 1024
HOST = "127.0.0.1"


class ClientGone(Exception):
    """The client closed the connection, or it was closed under us, before we were done with it."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request as it came: `target` is path and query byte for byte; header names are lower case."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes


class Connection:
    """One accepted connection. Every method raises ClientGone when there is nobody left to talk to."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._buffer = b""
        self.client_port: int = sock.getpeername()[1]
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def read_request(self) -> Request:
        """The next request, read to its end; bodies need a Content-Length (both SDKs and urllib3 send one)."""
        while b"\r\n\r\n" not in self._buffer:
            if len(self._buffer) > MAX_HEAD_BYTES:
                raise ClientGone("request head too large")
            self._receive()
        head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        method, target, _ = first.split(" ", 2)
        pairs = (line.partition(":") for line in lines)
        headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
        length = int(headers.get("content-length", "0"))
        while len(self._buffer) < length:
            self._receive()
        body, self._buffer = self._buffer[:length], self._buffer[length:]
        return Request(method, target, headers, body)

    def _receive(self) -> None:
        try:
            data = self._socket.recv(65536)
        except OSError as error:
            raise ClientGone(str(error)) from error
        if not data:
            raise ClientGone("closed")
        self._buffer += data

    def send(self, data: bytes) -> None:
        """These bytes in one write; returns when the kernel has them."""
        try:
            self._socket.sendall(data)
        except OSError as error:
            raise ClientGone(str(error)) from error

    def head(self, status: int, headers: Iterable[tuple[str, str]]) -> None:
        """Status line and headers; what frames the body (Content-Length, Transfer-Encoding) is the caller's."""
        reason = HTTPStatus(status).phrase if status in HTTPStatus._value2member_map_ else ""
        lines = [f"HTTP/1.1 {status} {reason}", *(f"{name}: {value}" for name, value in headers)]
        self.send("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n")

    def reply(self, status: int, headers: Iterable[tuple[str, str]], body: bytes) -> None:
        """A whole answer with its Content-Length."""
        self.head(status, [*headers, ("Content-Length", str(len(body)))])
        if body:
            self.send(body)

    def chunk(self, data: bytes) -> None:
        """One chunk of a `Transfer-Encoding: chunked` body in one write; no data would be the end, and is not sent."""
        if data:
            self.send(b"%x\r\n%s\r\n" % (len(data), data))

    def end_chunks(self) -> None:
        """The end of a chunked body; the connection can take the next request."""
        self.send(b"0\r\n\r\n")

    def pause(self, seconds: float) -> None:
        """Wait, but notice at once (and not at the next write) when the client closes."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            try:
                self._socket.settimeout(left)
                data = self._socket.recv(65536)  # TLS cannot peek
                self._socket.settimeout(None)
            except TimeoutError:
                with contextlib.suppress(OSError):
                    self._socket.settimeout(None)
                return
            except OSError as error:
                raise ClientGone(str(error)) from error
            if not data:
                raise ClientGone("closed")
            self._buffer += data  # of a pipelined request: the client is still there

    def wait_for(self, other: socket.socket) -> None:
        """Returns when `other` has something to read, or its end; notices at once when the client closes."""
        while other not in (ready := select.select([other, self._socket], [], [])[0]):
            if self._socket in ready:
                self._receive()  # of a pipelined request: the client is still there

    def close(self) -> None:
        """The polite ending: what was written arrives, then FIN."""
        # An SSLSocket's shutdown() is the plain one: only its unwrap() would say close_notify.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def reset(self) -> None:
        """The rude ending: RST (SO_LINGER 0). On loopback what was written before is still readable by the client."""
        with contextlib.suppress(OSError):
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._socket.close()


Handler = Callable[[Connection, Request], None]


class Server:
    """Listens on 127.0.0.1 and calls `handle` for each request, one after another on each connection.

    tls: a server's context, for a TLS listener; a client that does not shake hands is one that has gone.

    `stop` closes the listener and all connections and waits for their threads: nothing is left behind. A handler that
    raises ClientGone, or has ended the connection itself, is normal.
    """

    def __init__(self, handle: Handler, tls: ssl.SSLContext | None = None) -> None:
        self._handle = handle
        self._tls = tls
        self._listener: socket.socket | None = None
        self._reserved: socket.socket | None = None
        self._threads: dict[threading.Thread, Connection | None] = {}
        self.port = 0

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Listen, on the port of an earlier `suspend` or on one that the system chooses."""
        listener = self._reserved or self._bound()
        listener.listen(1024)
        self._listener, self._reserved = listener, None
        self.port = listener.getsockname()[1]
        self._spawn(self._accept, listener)

    def _bound(self) -> socket.socket:
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((HOST, self.port))
        return sock

    def stop(self) -> None:
        """Close everything and wait (at most 5 s) until every thread has ended."""
        if self._reserved is not None:
            self._reserved.close()
            self._reserved = None
        if self._listener is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept() in a real thread; gevent needs the close
            self._listener.close()
            self._listener = None
        until = time.monotonic() + 5
        while self._threads and time.monotonic() < until:
            for thread, connection in list(self._threads.items()):
                if connection is not None:
                    connection.close()
                thread.join(0.1)
            self._forget_ended_threads()

    def suspend(self) -> None:
        """Be down: connections are closed, new ones refused, and the port stays ours until `start`."""
        self.stop()
        self._reserved = self._bound()  # bound without listen(): the kernel refuses

    def _spawn(self, target: Callable[..., None], *args: object, connection: Connection | None = None) -> None:
        self._forget_ended_threads()
        thread = threading.Thread(target=target, args=args, daemon=True)
        thread.start()
        self._threads[thread] = connection

    def _forget_ended_threads(self) -> None:
        self._threads = {thread: connection for thread, connection in self._threads.items() if thread.is_alive()}

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            try:
                if self._tls is not None:
                    # The handshake is a part of the first read, in the connection's own thread.
                    sock = self._tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
                connection = Connection(sock)
            except OSError:  # gone already
                sock.close()
                continue
            self._spawn(self._serve, connection, connection=connection)

    def _serve(self, connection: Connection) -> None:
        try:
            while True:
                request = connection.read_request()
                self._handle(connection, request)
                if request.headers.get("connection", "").lower() == "close":
                    return
        except ClientGone:
            pass
        finally:
            connection.close()
