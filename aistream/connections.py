"""A worker's connections to its Redis, used at the level of commands and replies.

redis-py makes them (URL, password, TLS, timeouts, errors) and speaks RESP over them; its client's own layers above that
(retries, response callbacks, metrics, a pool that polls each connection through gevent's hub) cost more CPU than the command
and are left out: `python -m bench.stream_cost` shows the difference.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

import hiredis
import redis
from gevent.lock import BoundedSemaphore
from redis.backoff import NoBackoff
from redis.connection import AbstractConnection
from redis.retry import Retry

from aistream.config import Config

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
        if not self._turns.acquire(timeout=PATIENCE):
            raise redis.TimeoutError("all connections are in use")
        try:
            connection = self._idle.pop() if self._idle else self._make()
            try:
                return self._exchange(connection, commands)
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

    def _exchange(self, connection: Any, commands: Sequence[Command]) -> list[Any]:
        try:
            if connection.is_connected and connection.can_read():
                raise redis.ConnectionError("an answer that nobody waits for")
        except redis.ConnectionError:
            self._drop(connection)  # Redis has closed it meanwhile: sending connects anew
        packed = [hiredis.pack_command((*command,)) for command in commands]  # type: ignore[arg-type]  # a tuple of any length
        connection.send_packed_command(packed, check_health=False)
        replies = []
        moved = False
        for _ in commands:
            try:
                replies.append(connection.read_response())
            except redis.ResponseError as refusal:
                moved = moved or isinstance(refusal, _MOVED)
                replies.append(refusal)
        if moved:
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


class _Peeking(AbstractConnection):
    """A connection that looks at its socket in one system call, where redis-py's poll() goes through gevent's hub."""

    def can_read(self, timeout: float = 0) -> bool:
        """Whether bytes wait that nobody asked for. Raises redis.ConnectionError where the server has closed."""
        sock: Any = self._sock
        try:
            if not getattr(sock, "_sock", sock).recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                raise redis.ConnectionError("closed by the server")
        except BlockingIOError:
            return False
        except OSError as error:
            raise redis.ConnectionError("broken") from error
        return True


class _TCP(_Peeking, redis.Connection):
    pass


class _Unix(_Peeking, redis.UnixDomainSocketConnection):
    pass


# Under TLS bytes on the socket may be no answer but TLS's own: there only redis-py's way tells.
_CLASSES: dict[str, Any] = {"redis": _TCP, "rediss": redis.SSLConnection, "unix": _Unix}
