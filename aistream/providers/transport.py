"""Our own HTTP/1.1 under both SDKs: gevent sockets, and as little as possible between a token's bytes and their reader.

It takes the place of httpx2's default transport, whose layers cost more for each token than everything else that is done with
it, and whose pool looks at every open connection twice for each request. The SDKs keep auth, URLs, headers, redirects and errors:
what happens on the wire is told by the exceptions of httpx2 that the default transport has for it. Proxied requests go through
the default transport (`client`).

Whatever is thrown into a waiting greenlet (GreenletExit, a Timeout) closes its connection, and goes on as it is.
"""

from __future__ import annotations

import os
import socket
import ssl
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import gevent
import gevent.socket
import httpx2
from gevent import monkey
from gevent.event import AsyncResult
from httpx2._utils import get_environment_proxies

from aistream.providers import http1
from aistream.sockets import PEEK, RECEIVE

#: Under which name a response has its `Body` among its extensions.
BODY = "aistream.body"
#: Connections of one transport: all that are open, those that wait for a next request, and for how many seconds.
CONNECTIONS = 20_000
IDLE = 100
IDLE_SECONDS = 30.0
#: A peer that vanished is noticed after six minutes: the Anthropic SDK's own setting (anthropic 2.12.0, `_base_client.py`), where
#: the system has the names.
_OPTIONS = [
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    *(
        (socket.IPPROTO_TCP, getattr(socket, name), value)
        for name, value in (("TCP_KEEPINTVL", 60), ("TCP_KEEPCNT", 5), ("TCP_KEEPIDLE", 60))
        if hasattr(socket, name)
    ),
]

_getaddrinfo = monkey.get_original("socket", "getaddrinfo")

#: Scheme, host and port.
Origin = tuple[str, str, int]


def client(kind: type[httpx2.Client], timeout: httpx2.Timeout, limits: httpx2.Limits) -> httpx2.Client:
    """An SDK's own kind of client, on our transport; `limits` are those of proxied requests.

    Which requests go through a proxy is up to the environment (HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY), as in a client with
    the default transport.
    """
    context = trust()
    mounts = {
        pattern: None if proxy is None else _proxied(proxy, context, limits)
        for pattern, proxy in get_environment_proxies().items()
    }
    return kind(transport=Transport(context), mounts=mounts, timeout=timeout)


def trust() -> ssl.SSLContext:
    """Whom a provider's certificate may be from, as the environment says (SSL_CERT_FILE, SSL_CERT_DIR); the same for all clients.

    Reading the authorities takes most of the time in which a client is made, and they are a megabyte.
    """
    return _trust(os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR"))


@lru_cache(maxsize=1)
def _trust(file: str | None, folder: str | None) -> ssl.SSLContext:
    return httpx2.create_ssl_context()  # which asks the environment itself


def _proxied(proxy: str, context: ssl.SSLContext, limits: httpx2.Limits) -> httpx2.HTTPTransport:
    return httpx2.HTTPTransport(proxy=proxy, verify=context, limits=limits, socket_options=_OPTIONS)


class Transport(httpx2.BaseTransport):
    """Sends requests of a client over connections that it keeps for further ones.

    Timeouts are the request's, None for none: of the wait for a place among `connections`, of connecting, of each send, and of
    each wait for bytes.
    """

    def __init__(
        self, context: ssl.SSLContext, connections: int = CONNECTIONS, idle: int = IDLE, idle_seconds: float = IDLE_SECONDS
    ) -> None:
        context.set_alpn_protocols(["http/1.1"])
        self._context = context
        self._pool = _Pool(connections, idle, idle_seconds)

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        """Sends a request and reads the head of its answer; the body is a `Body`."""
        origin = _origin(request.url)
        data, last = http1.request(request)
        timeouts = request.extensions.get("timeout", {})
        connection = self._pool.take(origin, timeouts.get("pool"))
        if connection is None:
            connection = self._connect(origin, timeouts.get("connect"), request.extensions.get("sni_hostname"))
        try:
            try:
                connection.send(data, timeouts.get("write"))
            except httpx2.WriteError:
                last = True  # a server may answer a request, and close, before it has read it
            head, rest = connection.head(timeouts.get("read"))
        except BaseException:
            connection.close()
            raise
        body = Body(connection, http1.reader(head, request.method), rest, keep=not (last or head.close))
        extensions = {"http_version": head.version, "reason_phrase": head.reason, BODY: body}
        return httpx2.Response(head.status, headers=head.headers, stream=body, extensions=extensions)

    def close(self) -> None:
        """Closes the connections that wait for a next request; those in use are closed when their bodies are."""
        self._pool.close()

    def _connect(self, origin: Origin, timeout: float | None, server_name: str | None) -> Connection:
        scheme, host, port = origin
        try:
            sock = _connected(host, port, timeout)
            if scheme == "https":
                sock = self._secured(sock, server_name or host)
            return Connection(self._pool, origin, sock)
        except BaseException as error:
            self._pool.leave()
            if isinstance(error, TimeoutError):
                raise httpx2.ConnectTimeout(str(error)) from error
            if isinstance(error, OSError):
                raise httpx2.ConnectError(str(error)) from error
            raise

    def _secured(self, sock: Any, host: str) -> Any:
        try:
            # Not as a part of it: a greenlet that is stopped in the handshake would leave a socket that nobody closes.
            sock = self._context.wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)
            sock.do_handshake()
            return sock
        except BaseException:
            sock.close()
            raise


def _origin(url: httpx2.URL) -> Origin:
    if url.scheme not in ("http", "https"):
        raise httpx2.UnsupportedProtocol(f"expected http:// or https://, not {url.scheme!r}")
    return url.scheme, url.raw_host.decode("ascii"), url.port or (443 if url.scheme == "https" else 80)


def _connected(host: str, port: int, timeout: float | None) -> Any:
    """A socket, connected to the first of the host's addresses that answers; each has the whole `timeout`."""
    failed: OSError | None = None
    for family, kind, protocol, _, address in _addresses(host, port):
        sock = gevent.socket.socket(family, kind, protocol)
        try:
            for option in _OPTIONS:
                sock.setsockopt(*option)
            sock.settimeout(timeout)
            sock.connect(address)
            return sock
        except OSError as error:
            sock.close()
            failed = error
        except BaseException:
            sock.close()
            raise
    raise failed or OSError("the host has no address")


def _addresses(host: str, port: int) -> list[Any]:
    try:
        # Of a number nobody is asked: it needs none of the ten threads in which gevent's resolver waits.
        return list(_getaddrinfo(host, port, 0, socket.SOCK_STREAM, 0, socket.AI_NUMERICHOST))
    except socket.gaierror:
        return list(gevent.socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM))


class Connection:
    """One connection to a server, with or without TLS. `until`: when it has waited long enough (`time.monotonic()`)."""

    __slots__ = ("_pending", "_plain", "_pool", "_readable", "_sock", "_wait", "origin", "until")

    def __init__(self, pool: _Pool, origin: Origin, sock: Any) -> None:
        self._pool = pool
        self.origin = origin
        self.until = 0.0
        self._sock: Any = sock
        self._plain = sock._sock
        self._wait = sock._wait
        self._readable = sock._read_event
        #: Bytes of a TLS record that has been taken from the kernel already; of a plain socket there are none.
        self._pending: Callable[[], int] = getattr(sock, "pending", int)

    def send(self, data: bytes, timeout: float | None) -> None:
        """Returns when the kernel has all of it. `timeout`: seconds until it takes some more. Raises WriteTimeout, WriteError."""
        try:
            self._sock.settimeout(timeout)
            sent = self._sock.send(data)
            while sent < len(data):
                sent += self._sock.send(memoryview(data)[sent:])
        except TimeoutError as error:
            raise httpx2.WriteTimeout(str(error)) from error
        except OSError as error:
            raise httpx2.WriteError(str(error)) from error

    def head(self, timeout: float | None) -> tuple[http1.Head, bytes]:
        """The head of the answer, and what has arrived behind it. `timeout`: seconds of silence, now and in the body.

        Raises ReadTimeout, ReadError, RemoteProtocolError.
        """
        self._sock.settimeout(timeout)
        rest = b""
        while True:
            data, rest = self._until_blank_line(rest)
            head = http1.head(data)
            if head.status == 101:
                raise httpx2.RemoteProtocolError("the server switches to a protocol that nobody asked for")
            if head.status >= 200:
                return head, rest

    def _until_blank_line(self, data: bytes) -> tuple[bytes, bytes]:
        known = 0
        while (found := http1.head_end(data, known)) is None:
            known = len(data)
            more = self.receive()
            if not more:
                raise httpx2.RemoteProtocolError("Server disconnected without sending a response.")
            data += more
        return data[: found[0]], data[found[1] :]

    def receive(self) -> bytes:
        """What has arrived, at least one byte, as soon as there is one; `b""` at the end. Raises ReadTimeout, ReadError."""
        try:
            if not self._pending():
                # First of all: a recv that finds nothing raises, and that costs more than the wait (`python -m bench.waiting`).
                self._wait(self._readable)
            return self._sock.recv(RECEIVE)  # type: ignore[no-any-return]
        except TimeoutError as error:
            raise httpx2.ReadTimeout(str(error)) from error
        except OSError as error:
            raise httpx2.ReadError(str(error)) from error

    @property
    def alive(self) -> bool:
        """Whether the server has left it open, and has said nothing unasked."""
        if self._pending():
            return False
        try:
            self._plain.recv(1, PEEK)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False

    def keep(self) -> None:
        """Leaves it to the next request."""
        self._pool.keep(self)

    def close(self) -> None:
        """For the first time it closes it; whoever waits in it gets a ReadError."""
        if self._plain is not None:
            self._plain = None
            self._sock.close()
            self._pool.leave()


class Body(httpx2.SyncByteStream):
    """The body of an answer: what has arrived, a piece for each recv. It can be read once.

    Raises ReadTimeout, ReadError, and RemoteProtocolError where it ends early or is none.
    """

    def __init__(self, connection: Connection, reader: http1.Reader, first: bytes, keep: bool) -> None:
        """`first`: the bytes that came with the head. `keep`: whether the connection may be used again."""
        self._connection: Connection | None = connection
        self._reader = reader
        self._first = first
        self._keep = keep

    def __iter__(self) -> Iterator[bytes]:
        connection, reader = self._connection, self._reader
        if connection is None:
            raise httpx2.StreamClosed
        try:
            if self._first:
                first, self._first = self._first, b""
                if piece := reader.feed(first):
                    yield piece
            feed, receive = reader.feed, connection.receive
            while not reader.ended:
                if piece := feed(receive()):
                    yield piece
            if reader.fault:
                raise httpx2.RemoteProtocolError(reader.fault)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Keeps the connection for a next request, if this one has been read to its end; else closes it."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        if self._keep and self._reader.clean:
            connection.keep()
        else:
            connection.close()


class _Pool:
    """The places of connections, and the connections that wait for a next request. Nothing here takes longer with many."""

    def __init__(self, places: int, idle: int, seconds: float) -> None:
        self._places = places
        self._max_idle = idle
        self._seconds = seconds
        self._open = 0
        #: Those of an origin, the one that was used last at the end.
        self._idle: dict[Origin, deque[Connection]] = {}
        #: All of them, the one that has waited longest first.
        self._order: dict[Connection, None] = {}
        self._waiting: deque[tuple[Origin, AsyncResult[Connection | None]]] = deque()
        self._timer: Any = None
        self._closed = False

    def take(self, origin: Origin, timeout: float | None) -> Connection | None:
        """A connection to this origin, or None: a place for a new one. Raises PoolTimeout after so many seconds."""
        while connections := self._idle.get(origin):
            connection = connections[-1]
            self._forget(connection)
            if connection.alive:
                return connection
            connection.close()
        if self._open == self._places and self._order:
            self._close_oldest()
        if self._open < self._places:
            self._open += 1
            return None
        return self._wait(origin, timeout)

    def _wait(self, origin: Origin, timeout: float | None) -> Connection | None:
        turn: AsyncResult[Connection | None] = AsyncResult()
        waiting = origin, turn
        self._waiting.append(waiting)
        try:
            turn.wait(timeout)
        except BaseException:
            if turn.ready():  # stopped in the moment in which it got its place
                self.keep(turn.value) if turn.value else self.leave()
            raise
        finally:
            if not turn.ready():
                self._waiting.remove(waiting)
        if not turn.ready():
            raise httpx2.PoolTimeout("all connections are in use")
        return turn.value

    def keep(self, connection: Connection) -> None:
        """Keeps a connection for a next request, or gives it, or its place, to who has waited longest."""
        if self._closed:
            connection.close()
        elif self._waiting:
            if self._waiting[0][0] == connection.origin:
                self._waiting.popleft()[1].set(connection)
            else:
                connection.close()
        else:
            connection.until = time.monotonic() + self._seconds
            self._idle.setdefault(connection.origin, deque()).append(connection)
            self._order[connection] = None
            if len(self._order) > self._max_idle:
                self._close_oldest()
            self._arm()

    def leave(self) -> None:
        """Gives the place of a connection back that is closed."""
        if self._waiting:
            self._waiting.popleft()[1].set(None)
        else:
            self._open -= 1

    def close(self) -> None:
        """Closes those that wait; from now on none is kept."""
        self._closed = True
        while self._order:
            self._close_oldest()
        if self._timer is not None:
            self._timer.close()
            self._timer = None

    def _close_oldest(self) -> None:
        connection = next(iter(self._order))
        self._forget(connection)
        connection.close()

    def _forget(self, connection: Connection) -> None:
        """It is the newest or the oldest of its origin: the oldest of all is the oldest of its own."""
        del self._order[connection]
        connections = self._idle[connection.origin]
        if connections[-1] is connection:
            connections.pop()
        else:
            connections.popleft()
        if not connections:
            del self._idle[connection.origin]

    def _arm(self) -> None:
        """Has the hub close those that have waited too long. It keeps no loop alive, and ends when there are none."""
        if self._timer is None and self._order:
            seconds = next(iter(self._order)).until - time.monotonic()
            self._timer = gevent.get_hub().loop.timer(max(seconds, 0.0), ref=False)
            self._timer.start(self._expire)

    def _expire(self) -> None:
        self._timer.close()
        self._timer = None
        while self._order and next(iter(self._order)).until <= time.monotonic():
            self._close_oldest()
        self._arm()
