"""A worker's connections to its Redis, used at the level of commands and replies.

redis-py makes them (URL, password, TLS, timeouts, errors) and speaks RESP over them; its client's own layers above that
(retries, response callbacks, metrics, a pool that polls each connection through gevent's hub) cost more CPU than the command
and are left out: docs/performance.md has the difference.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import hiredis
import redis
from gevent.lock import BoundedSemaphore
from redis.backoff import NoBackoff
from redis.connection import AbstractConnection
from redis.retry import Retry

from aistream.config import Config
from aistream.sockets import PEEK, receive, send

#: Connections per worker. Commands take well under a millisecond; more greenlets than this take turns.
SIZE = 50
#: Seconds to wait for a turn.
PATIENCE = 5.0

Command = Sequence[str | bytes | int | float]

#: Said by a Redis that is a replica now: behind the same address another one may be the master, for a new connection.
_MOVED = (redis.ReadOnlyError, redis.exceptions.MasterDownError)


class Connections:
    """Sends commands and gives replies as RESP2 has them. Safe to use from many greenlets.

    Nothing is ever sent twice: an append that is sent again is refused by Redis as a late one, and the scripts' callers know
    best when to say something again. Raises what redis-py raises.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        """`make` gives a new connection; it connects when it is first used."""
        #: Counts connections that broke: what was said just before may be lost, and another Redis may answer now.
        self.lost = 0
        self._make = make
        self._idle: list[Any] = []
        self._turns = BoundedSemaphore(SIZE)

    def call(self, *command: str | bytes | int | float) -> Any:
        """The reply to one command."""
        (reply,) = self.many([command])
        if isinstance(reply, redis.ResponseError):
            raise reply
        return reply

    def many(self, commands: Sequence[Command]) -> list[Any]:
        """The replies to several commands sent at once; one that Redis refused has its ResponseError as its reply."""
        packed = [hiredis.pack_command((*command,)) for command in commands]  # type: ignore[arg-type]  # a tuple of any length
        return self.exchange(b"".join(packed), len(packed))

    def exchange(self, packed: bytes, count: int) -> list[Any]:
        """As `many`, for `count` commands that stand in `packed` as RESP has them."""
        if not self._turns.acquire(timeout=PATIENCE):
            raise redis.TimeoutError("all connections are in use")
        try:
            connection = self._idle.pop() if self._idle else self._make()
            try:
                return self._exchange(connection, packed, count)
            except BaseException as error:
                # Also of a greenlet that is killed here: a reply that is still to come must not reach the next command.
                self._drop(connection, broken=isinstance(error, redis.RedisError))
                raise
            finally:
                self._idle.append(connection)
        finally:
            self._turns.release()

    def close(self) -> None:
        """Closes the connections that are not in use."""
        for connection in self._idle:
            connection.disconnect()

    def _exchange(self, connection: Any, packed: bytes, count: int) -> list[Any]:
        try:
            if connection.is_connected and connection.can_read():
                raise redis.ConnectionError("an answer that nobody waits for")
        except redis.ConnectionError:
            self._drop(connection)  # Redis has closed it meanwhile: sending connects anew
        ask = connection.ask if isinstance(connection, _Direct) else partial(_ask, connection)
        replies: list[Any] = ask(packed, count)
        for reply in replies:
            if isinstance(reply, redis.ConnectionError):
                raise reply
        if any(isinstance(reply, _MOVED) for reply in replies):
            self._drop(connection)
        return replies

    def _drop(self, connection: Any, *, broken: bool = True) -> None:
        connection.disconnect()
        if broken:
            self.lost += 1
            for idle in self._idle:  # those that wait broke in the same moment: each would be news only when it is next used
                idle.disconnect()


def connect(config: Config) -> Connections:
    """Connections to the configured Redis, or to a new embedded store."""
    if config.embedded_store:
        import fakeredis  # only where it is used: it is as large as the rest of the store together

        # Its own warnings about what it leaves out mean nothing for our commands.
        logging.getLogger("fakeredis").setLevel(logging.ERROR)
        client = fakeredis.FakeRedis(server=fakeredis.FakeServer(version=(7, 4)), protocol=2)
        return Connections(client.connection_pool.make_connection)
    scheme = urlsplit(config.redis_url).scheme
    network: dict[str, Any] = {"socket_connect_timeout": 2, "socket_keepalive": True}
    pool = redis.ConnectionPool.from_url(
        config.redis_url,
        connection_class=_CLASSES[scheme],
        protocol=2,  # XREAD's answer has another shape under RESP3
        retry=Retry(NoBackoff(), 0),
        socket_timeout=5,
        **({} if scheme == "unix" else network),
    )
    return Connections(pool.make_connection)


def _ask(connection: Any, packed: bytes, count: int) -> list[Any]:
    """The replies as redis-py reads them: over TLS, and from the embedded store."""
    connection.send_packed_command([packed], check_health=False)
    replies = []
    for _ in range(count):
        try:
            replies.append(connection.read_response())
        except redis.ResponseError as refusal:
            replies.append(refusal)
    return replies


class _Direct(AbstractConnection):
    """A connection over a plain socket. redis-py makes it, hiredis reads it; what lies between them is left out."""

    _reader: tuple[Any, hiredis.Reader] | None = None

    def ask(self, packed: bytes, count: int) -> list[Any]:
        """The replies to so many commands, refusals among them. Raises redis.ConnectionError and redis.TimeoutError."""
        if self._sock is None:
            self.connect()  # type: ignore[no-untyped-call]
        sock: Any = self._sock
        if self._reader is None or self._reader[0] is not sock:  # redis-py's own has read the greeting, and nothing is left in it
            self._reader = sock, hiredis.Reader(replyError=self._parser.parse_error)
        reader = self._reader[1]
        replies: list[Any] = []
        try:
            send(sock, packed)
            while len(replies) < count:
                reply = reader.gets()
                if reply is not False:  # RESP2 has no booleans: not enough has arrived
                    replies.append(reply)
                    continue
                data = receive(sock)
                if not data:
                    raise redis.ConnectionError("closed by the server")
                reader.feed(data)
        except TimeoutError as error:
            raise redis.TimeoutError("no answer in time") from error
        except OSError as error:
            raise redis.ConnectionError("broken") from error
        except hiredis.ProtocolError as error:
            raise redis.ConnectionError("no Redis answers there") from error
        return replies

    def can_read(self, timeout: float = 0) -> bool:
        """Whether bytes wait that nobody asked for. Raises redis.ConnectionError where the server has closed.

        In one system call, where redis-py's poll() goes through gevent's hub.
        """
        sock: Any = self._sock
        try:
            if not getattr(sock, "_sock", sock).recv(1, PEEK):
                raise redis.ConnectionError("closed by the server")
        except BlockingIOError:
            return False
        except OSError as error:
            raise redis.ConnectionError("broken") from error
        return True


class _TCP(_Direct, redis.Connection):
    pass


class _Unix(_Direct, redis.UnixDomainSocketConnection):
    pass


# Under TLS bytes on the socket may be no answer but TLS's own: there only redis-py's way tells.
_CLASSES: dict[str, Any] = {"redis": _TCP, "rediss": redis.SSLConnection, "unix": _Unix}
