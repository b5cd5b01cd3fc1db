"""A worker's connections to its Redis, used at the level of commands and replies.

redis-py makes them (user, password, timeouts, errors); hiredis speaks RESP over them. What redis-py has above that (retries,
response callbacks, metrics, a pool that polls each connection through gevent's hub) costs more CPU than the command and is left
out: docs/performance.md has the difference.

With Sentinels each new connection asks them where the master is, and asks that whether it is one. What breaks, or says that it
is a master no more, takes all idle connections with it: so a failover is over for a worker as soon as the Sentinels have
decided it.
"""

from __future__ import annotations

import logging
import ssl
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import hiredis
import redis
from gevent.lock import BoundedSemaphore
from redis.backoff import NoBackoff
from redis.connection import AbstractConnection
from redis.retry import Retry

from aistream import tls
from aistream.config import Config
from aistream.metrics import REDIS
from aistream.sockets import PEEK, RECEIVE, receive, send
from aistream.tally import Tally

#: Seconds to wait for a turn.
PATIENCE = 5.0
#: Seconds for a new connection, and for an answer.
CONNECT, ANSWER = 2.0, 5.0
#: The same for a Sentinel: where one does not answer, another one does.
SENTINEL = 1.0

Command = Sequence[str | bytes | int | float]
#: What a round trip is for: entries of the log writer, the follower's or a viewer's look at logs, a script, anything else.
Kind = Literal["append", "read", "script", "command"]
KINDS: tuple[Kind, ...] = ("append", "read", "script", "command")
_KINDS: dict[object, Kind] = {"XREAD": "read", "EVALSHA": "script", "EVAL": "script"}

#: Said by a Redis that is a replica now: behind the same address another one may be the master, for a new connection.
_MOVED = (redis.ReadOnlyError, redis.exceptions.MasterDownError)


class Connections:
    """Sends commands and gives replies as RESP2 has them. Safe to use from many greenlets.

    Nothing is ever sent twice: an append that is sent again is refused by Redis as a late one, and the scripts' callers know
    best when to say something again. Raises what redis-py raises.
    """

    def __init__(self, make: Callable[[], Any], size: int) -> None:
        """`make` gives a new connection; it connects when it is first used. More greenlets than `size` take turns."""
        #: Counts connections that broke: what was said just before may be lost, and another Redis may answer now.
        self.lost = 0
        #: How long round trips took, with the wait for a connection; those that failed are left out.
        self.seconds = {kind: Tally(REDIS) for kind in KINDS}
        self._make = make
        self._idle: list[Any] = []
        self._turns = BoundedSemaphore(size)

    def call(self, *command: str | bytes | int | float) -> Any:
        """The reply to one command."""
        (reply,) = self.many([command])
        if isinstance(reply, redis.ResponseError):
            raise reply
        return reply

    def many(self, commands: Sequence[Command]) -> list[Any]:
        """The replies to several commands sent at once; one that Redis refused has its ResponseError as its reply."""
        packed = [hiredis.pack_command((*command,)) for command in commands]  # type: ignore[arg-type]  # a tuple of any length
        return self.exchange(b"".join(packed), len(packed), _KINDS.get(commands[0][0], "command") if commands else "command")

    def exchange(self, packed: bytes, count: int, kind: Kind) -> list[Any]:
        """As `many`, for `count` commands that stand in `packed` as RESP has them."""
        began = time.monotonic()
        if not self._turns.acquire(timeout=PATIENCE):
            raise redis.TimeoutError("all connections are in use")
        try:
            connection = self._idle.pop() if self._idle else self._make()
            try:
                replies = self._exchange(connection, packed, count)
                self.seconds[kind].add(time.monotonic() - began)
                return replies
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
    address = config.redis_address
    if address is None:
        import fakeredis  # only where it is used: it is as large as the rest of the store together

        # Its own warnings about what it leaves out mean nothing for our commands.
        logging.getLogger("fakeredis").setLevel(logging.ERROR)
        client = fakeredis.FakeRedis(server=fakeredis.FakeServer(version=(7, 4)), protocol=2)
        return Connections(client.connection_pool.make_connection, config.redis_pool_size)
    common: dict[str, Any] = {
        "username": address.username or None,
        "password": address.password or None,
        "db": address.db,
        **_COMMON,
    }
    if address.path:
        unix: Callable[..., Any] = _Unix
        return Connections(partial(unix, path=address.path, **common), config.redis_pool_size)
    secured: dict[str, Any] = {"context": tls.context(config)} if address.tls else {}
    kind: Callable[..., Any] = _TLS if address.tls else _TCP
    if not address.master:
        ((host, port),) = address.hosts
        return Connections(partial(kind, host=host, port=port, **common, **secured), config.redis_pool_size)
    of_sentinels: dict[str, Any] = {
        **_COMMON,
        "username": config.redis_sentinel_username or None,
        "password": config.redis_sentinel_password or None,
        "socket_connect_timeout": SENTINEL,
        "socket_timeout": SENTINEL,
        **secured,
    }
    sentinels = _Sentinels(address.hosts, address.master, partial(kind, **of_sentinels))
    led: Callable[..., Any] = _LedTLS if address.tls else _LedTCP
    return Connections(partial(led, find=sentinels.master, **common, **secured), config.redis_pool_size)


#: XREAD's answer has another shape under RESP3. `driver_info`: no CLIENT SETINFO, two round trips, and a right that it takes.
_COMMON: dict[str, Any] = {
    "protocol": 2,
    "retry": Retry(NoBackoff(), 0),
    "driver_info": None,
    "socket_connect_timeout": CONNECT,
    "socket_timeout": ANSWER,
}


def _ask(connection: Any, packed: bytes, count: int) -> list[Any]:
    """The replies as redis-py reads them: from the embedded store."""
    connection.send_packed_command([packed], check_health=False)
    replies = []
    for _ in range(count):
        try:
            replies.append(connection.read_response())
        except redis.ResponseError as refusal:
            replies.append(refusal)
    return replies


class _Direct(AbstractConnection):
    """A connection that redis-py makes and hiredis reads; what lies between them is left out."""

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
            self._send(sock, packed)
            while len(replies) < count:
                reply = reader.gets()
                if reply is not False:  # RESP2 has no booleans: not enough has arrived
                    replies.append(reply)
                    continue
                data = self._receive(sock)
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
        try:
            if not self._peek(self._sock):
                raise redis.ConnectionError("closed by the server")
        except (BlockingIOError, ssl.SSLWantReadError):
            return False
        except OSError as error:
            raise redis.ConnectionError("broken") from error
        return True

    # Over a plain socket.
    _send = staticmethod(send)
    _receive = staticmethod(receive)

    @staticmethod
    def _peek(sock: Any) -> bytes:
        found: bytes = getattr(sock, "_sock", sock).recv(1, PEEK)
        return found


class _TCP(_Direct, redis.Connection):
    pass


class _Unix(_Direct, redis.UnixDomainSocketConnection):
    pass


class _TLS(_TCP):
    """The same over TLS. redis-py's own reads all authorities anew for each connection, the system's always among them."""

    def __init__(self, *, context: ssl.SSLContext, **options: Any) -> None:
        super().__init__(**options)  # type: ignore[no-untyped-call]
        self._context = context

    def _connect(self) -> Any:
        sock = super()._connect()  # type: ignore[no-untyped-call]
        try:
            return self._context.wrap_socket(sock, server_hostname=self.host)
        except BaseException:
            sock.close()
            raise

    @staticmethod
    def _send(sock: Any, data: bytes) -> None:
        sock.sendall(data)

    @staticmethod
    def _receive(sock: Any) -> bytes:
        data: bytes = sock.recv(RECEIVE)
        return data

    @staticmethod
    def _peek(sock: Any) -> bytes:
        # What waits may be TLS's own, such as a session ticket, and no answer: reading tells. A byte of an answer is lost here,
        # with its connection, which is given up.
        data: bytes = sock._sslobj.read(1)
        return data


class _Led:
    """A connection to whichever server is the master when it connects."""

    def __init__(self, *, find: Callable[[], tuple[str, int]], **options: Any) -> None:
        super().__init__(**options)
        self._find = find

    def _connect(self) -> Any:
        self.host, self.port = self._find()
        return super()._connect()  # type: ignore[misc]

    def on_connect_check_health(self, check_health: bool = True) -> None:
        """Asks it, too: a Sentinel may not know yet that it is one no more."""
        connection: Any = super()
        connection.on_connect_check_health(check_health)
        connection.send_command("ROLE", check_health=False)
        if connection.read_response()[0] != b"master":
            raise redis.ConnectionError("the Sentinels' master is none")


class _LedTCP(_Led, _TCP):
    pass


class _LedTLS(_Led, _TLS):
    pass


class _Sentinels:
    """Knows where the master is: asks the Sentinels one after the other, the one that knew it last first."""

    def __init__(self, hosts: Sequence[tuple[str, int]], name: str, make: Callable[..., _TCP]) -> None:
        self._hosts = list(hosts)
        self._question = hiredis.pack_command(("SENTINEL", "GET-MASTER-ADDR-BY-NAME", name))  # type: ignore[arg-type]  # of any length
        self._make = make

    def master(self) -> tuple[str, int]:
        """Its host and port. Raises redis.ConnectionError where no Sentinel tells."""
        for host, port in list(self._hosts):
            sentinel = self._make(host=host, port=port)
            try:
                (answer,) = sentinel.ask(self._question, 1)
            except redis.RedisError:
                continue
            finally:
                sentinel.disconnect()  # type: ignore[no-untyped-call]
            if isinstance(answer, list):
                self._hosts.sort(key=lambda one: one != (host, port))
                return answer[0].decode(), int(answer[1])
        raise redis.ConnectionError("no Sentinel says where the master is")
