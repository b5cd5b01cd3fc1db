"""gunicorn's gevent worker, as a service of long streams needs it: to outlast its clients, and to end.

Who takes too long over a request, or is no longer there, has to go (`patience`). What is no HTTP is answered like every other
refusal, and told in the log by its kind alone: gunicorn would print the request's line, access token and all, for each.

On SIGTERM gunicorn's own worker closes its listener and waits for connections, whatever they are. This one goes on serving
while it drains: whoever comes back to the last worker of a service that stops still finds it. (A refused connection ends an
EventSource of Firefox for good.) Where other workers listen on the same port, new connections are theirs. Every connection that
was taken has its answer before the worker exits: only a refused one may be asked of another replica, whatever it asks.
"""

from __future__ import annotations

import errno
import json
import sys
import time
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from typing import Any

import gevent
from gevent.pool import Pool
from gevent.select import select
from gevent.server import StreamServer
from gunicorn.http import errors  # type: ignore[import-untyped]
from gunicorn.workers.ggevent import GeventWorker  # type: ignore[import-untyped]

from aistream import garbage, kernel_limits
from aistream.config import Config
from aistream.errors import Code, Problem
from aistream.patience import LOOK, MOST_SPARE, SPARE, Client, HeadTooLarge, Patience, watch_for_the_dead
from aistream.telemetry import log as lines
from aistream.turns import Turns

#: Seconds between two looks of a worker that drains at whether a new connection waits.
RELUCTANCE = 0.25
#: Seconds in which another worker would have taken one that waits.
COURTESY = 0.05
#: Seconds for which it then accepts.
MOMENT = 0.005
#: Seconds in which a connection that was accepted in the last moment says what it wants, and at most until it has its answer.
LAST_WISH = 1.0
LAST_ANSWER = 5.0
#: Seconds until a worker that has no file descriptor left tries again to accept, and between two lines that say so.
SCARCITY = 0.1
REMINDER = 60.0
#: Most connections that are accepted in one round of the event loop, and seconds of it: streams wait meanwhile.
CROWD, ACCEPTING = 100, 0.002
#: Most bytes of a body that are read for nobody, so that a client which is still sending gets to see its refusal.
LEFTOVER = 16 * 2**20
#: Connections that METRICS_PORT takes on each worker, beside those of the public one: Prometheus, and a balancer's checks.
METRICS_CONNECTIONS = 20


class Listener(StreamServer):
    """Accepts connections; `last` only those that nobody else has taken. Keeps a few places free for who comes next."""

    last = False
    pool: Pool
    _said_at = -REMINDER

    def __init__(self, sock: Any, *, handle: Any, spawn: Any, patience: Patience, alone: bool) -> None:
        super().__init__(sock, handle=handle, spawn=spawn)
        self.patience = patience
        self._alone = alone
        self._spare = min(MOST_SPARE, int(SPARE * spawn.size))
        self._until = 0.0

    def _do_read(self) -> None:
        """As gevent's, in each round of its loop in which somebody waits. Where there are other workers they shall have some.

        But not when places run short: behind those who come in masses, whoever is honest would wait for as many rounds.
        """
        self.max_accept = CROWD if self._alone or self.pool.free_count() < self._spare else 1
        self._until = time.monotonic() + ACCEPTING
        super()._do_read()  # type: ignore[misc]  # gevent's types leave it out

    def make_room(self, most: int = MOST_SPARE) -> None:
        """Lets clients go that it only waits for, up to `most`, where places are short."""
        for _ in range(min(most, self._spare - self.pool.free_count())):
            if not self.patience.make_room():
                break

    def do_read(self) -> Any:
        """One new connection, or None: there is none, or no time or file descriptor for it. Then it waits with the kernel.

        As gevent's own, but for the kind of socket.
        """
        if time.monotonic() > self._until:
            return None
        sock: Any = self.socket
        try:
            descriptor, address = sock._accept()
            self.make_room(1)
            return Client(self.patience, sock, descriptor), address
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
        # gevent would wait for up to a second, and print a traceback each time.
        self.stop_accepting()
        gevent.spawn_later(SCARCITY, self._try_again)
        if time.monotonic() - self._said_at >= REMINDER:
            self._said_at = time.monotonic()
            lines.warning("descriptors.exhausted")
        return None

    def start_accepting(self) -> None:
        """Called by gevent at the start, and whenever the pool has room again."""
        if not self.last:
            super().start_accepting()

    def _try_again(self) -> None:
        if self.started:
            self.start_accepting()

    def accept_left(self) -> None:
        """Accepts what has waited for longer than any other worker would have let it; never returns."""
        self.last = True
        self.stop_accepting()
        while True:
            gevent.sleep(RELUCTANCE)
            if self._one_waits():
                gevent.sleep(COURTESY)
                if self._one_waits():
                    super().start_accepting()
                    gevent.sleep(MOMENT)
                    self.stop_accepting()

    def close_behind_the_last(self) -> None:
        """Accepts whatever still waits, then refuses connections: one that only the kernel had taken would be cut by the exit."""
        until = time.monotonic() + LAST_WISH
        self.stop_accepting()
        while self._one_waits() and time.monotonic() < until:
            gevent.sleep(COURTESY)
            if self._one_waits():
                super().start_accepting()
                gevent.sleep(MOMENT)
                self.stop_accepting()
        self.close()

    def _one_waits(self) -> bool:
        return bool(select([self.socket], [], [], 0)[0])


class Worker(GeventWorker):  # type: ignore[misc]  # gunicorn has no types
    """Drains on SIGTERM, then exits."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._listeners: list[Listener] = []
        #: The connections of clients, a pool for each address.
        self._pools: list[Pool] = []
        self._draining = False
        #: Connections that were accepted since then and are still open: each asks once.
        self._late = 0
        self._turns = Turns()

    @property
    def background(self) -> Any:
        """The loops of the app that this worker serves."""
        return self.wsgi.extensions["aistream"].background

    @property
    def _config(self) -> Config:
        config: Config = self.wsgi.extensions["aistream"].config
        return config

    def _connections(self) -> tuple[int, int]:
        return sum(map(len, self._pools)), self.worker_connections

    def begin(self) -> None:
        """Starts the loops, after fork and patch, before it serves."""
        self.background.start()
        self.background.meter.connections = self._connections
        garbage.settle()
        gevent.spawn(garbage.run)

    def run(self) -> None:
        """Serves, with no more connections than there are file descriptors for; the service's first worker says what is short.

        Called by gunicorn after the fork, when all is loaded.
        """
        config = self._config
        asked = kernel_limits.demand(config, self.cfg.worker_connections)
        limit = kernel_limits.raise_descriptors(asked.wanted)
        self.worker_connections = asked.connections_within(limit)
        self.wsgi.extensions["aistream"].viewing.take_lines(asked.lines_within(limit))
        if self.age == 1:
            for short in kernel_limits.shortages(asked, limit, self.cfg.backlog, self.cfg.workers):
                level = "debug" if config.dev_mode else "warning" if short.warns else "info"
                getattr(lines, level)(short.event, **short.facts)
        for sock in self.sockets:
            watch_for_the_dead(sock, 2 * config.slow_viewer_seconds)  # `viewing` judges first who is slow
        gevent.spawn(self._look)
        super().run()

    def server_class(self, sock: Any, *, spawn: Any, **_: Any) -> Listener:
        """gunicorn's hook for a server of one's own: its plain one, kept at hand."""
        # gunicorn gives each listener a pool, and a full one leaves the other its own; neither sends the other's clients away.
        if sock.getsockname()[1:2] == (self._config.metrics_port,):
            spawn = Pool(METRICS_CONNECTIONS)
        else:
            self._pools.append(spawn)
        patience = Patience(self._config.request_seconds, self.cfg.keepalive)
        handle = partial(self.handle, sock)
        listener = Listener(sock, handle=handle, spawn=spawn, patience=patience, alone=self.cfg.workers == 1)
        self._listeners.append(listener)
        return listener

    def handle(self, listener: Any, client: Any, address: Any) -> None:
        """gunicorn's: one connection, from its first byte to its last."""
        late = self._draining
        self._late += late
        try:
            super().handle(listener, client, address)
        finally:
            self._late -= late

    def timeout_ctx(self) -> AbstractContextManager[None]:
        """gunicorn's hook for a timer around each head: there is another way."""
        return nullcontext()

    def handle_request(self, listener_name: Any, req: Any, sock: Client, addr: Any) -> Any:
        """gunicorn's, between a complete head and the next one."""
        sock.begin_answer()
        with_body = getattr(req.body.reader, "length", None) != 0
        if with_body:
            req.body.reader = _Reader(req, self._turns)
        self._turns.take()
        super().handle_request(listener_name, req, sock, addr)
        if with_body and not _read_out(req.body):
            raise StopIteration  # where the next request begins is not known
        sock.end_answer()

    def handle_error(self, req: Any, client: Client, addr: Any, exc: BaseException) -> None:
        """Answers what is no HTTP, or broke outside of the app; then gunicorn closes the connection."""
        refused = _refusal(exc)
        if not isinstance(exc, Exception):
            return  # this worker ends
        if refused is None:
            lines.error("request.broke", error=exc)
            refused = Problem("The error was logged.")
        else:
            client.patience.sent_away[refused.code] += 1
        with suppress(OSError):
            client._sock.send(_written(refused))

    def _look(self) -> None:
        while True:
            gevent.sleep(LOOK)
            for listener in self._listeners:
                listener.patience.look()
                listener.make_room()
                if news := listener.patience.news():
                    lines.info("clients.sent_away", **news)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """SIGTERM: stays alive for gunicorn's master and for its connections, until it has drained."""
        if not self._draining:
            self._draining = True
            # A balancer that keeps its connections to us would meet the exit in one of them: each answer is the last one of its
            # connection from now on.
            self.cfg.set("keepalive", 0)
            gevent.spawn(self._leave)

    def _leave(self) -> None:
        if getattr(self, "wsgi", None) is None:
            sys.exit(0)  # told before it had begun
        accepting = [gevent.spawn(listener.accept_left) for listener in self._listeners]
        self.background.drain()
        gevent.killall(accepting)
        for listener in self._listeners:
            listener.close_behind_the_last()
        began = time.monotonic()
        while True:
            gevent.sleep(0.02)
            seconds = time.monotonic() - began
            answering = self.background.requests and seconds < LAST_ANSWER
            wishing = self._late and seconds < LAST_WISH
            if not (answering or wishing):
                break
        # What is left now are kept-alive connections with nothing to say. gunicorn would wait for them to the end of
        # `graceful_timeout` and answer each with a 500; an exit just closes them.
        sys.exit(0)  # from any greenlet gevent carries this to the main one


class _Reader:
    """A body as it comes in; what is wrong with it is the client's fault, and the connection's end."""

    def __init__(self, req: Any, turns: Turns) -> None:
        self._req = req
        self._turns = turns
        self._reader = req.body.reader

    def read(self, size: int) -> bytes:
        """The next bytes. Raises Problem."""
        try:
            data: bytes = self._reader.read(size)
        except errors.ParseException as error:
            self._req.force_close()
            raise _refusal(error) or Problem("The body cannot be read.") from None
        except Problem:
            self._req.force_close()
            raise
        self._turns.take()  # what is done with it may take a while
        return data


def _read_out(body: Any) -> bool:
    """Reads what the app has left of a body. False: that is too much, or does not come."""
    left = 0 if body.failed else LEFTOVER
    try:
        while left > 0:
            data = body.read(65_536)
            if not data:
                return True
            left -= len(data)
    except Problem:
        pass
    return False


_TOO_LARGE = "Request Header Fields Too Large"
#: What gunicorn, or `patience`, finds in a request -> what is answered: status, code, its title, and in words.
_REFUSALS: list[tuple[type[BaseException], int, Code, str, str]] = [
    (errors.LimitRequestLine, 414, "address_too_long", "URI Too Long", "The request's line is too long."),
    (HeadTooLarge, 431, "head_too_large", _TOO_LARGE, "The request's head is too large."),
    (
        errors.LimitRequestHeaders,
        431,
        "head_too_large",
        _TOO_LARGE,
        "Its fields are too many, or too large.",
    ),
    (errors.ExpectationFailed, 417, "expectation_failed", "Expectation Failed", "Expected no Expect but 100-continue."),
    (
        errors.UnsupportedTransferCoding,
        501,
        "transfer_coding_unknown",
        "Not Implemented",
        "Expected chunked or no coding.",
    ),
    (errors.ParseException, 400, "malformed_http", "Bad Request", "What arrived is not valid HTTP."),
]
#: Those that gunicorn finds in an answer of ours.
_OUR_FAULT = (errors.InvalidResponseHeader, errors.InvalidResponseHeaderName, errors.ConfigurationProblem)


def _refusal(error: BaseException) -> Problem | None:
    """What is wrong with a request, None where that is not what is wrong."""
    if isinstance(error, _OUR_FAULT):
        return None
    for kind, status, code, title, detail in _REFUSALS:
        if isinstance(error, kind):
            return Problem(detail, status=status, code=code, title=title)
    return None


def _written(refused: Problem) -> bytes:
    """The whole answer, as `api.problem` has it; the request that it is for has no id."""
    body = {"ok": False, "type": "about:blank", "title": refused.title, "status": refused.status}
    body |= {"code": refused.code, "detail": refused.detail, "requestId": None}
    text = json.dumps(body).encode()
    head = [
        f"HTTP/1.1 {refused.status} {refused.title}",
        "Content-Type: application/problem+json",
        f"Content-Length: {len(text)}",
        *("Cache-Control: no-store", "X-Content-Type-Options: nosniff", "Referrer-Policy: no-referrer", "Connection: close"),
    ]
    return "\r\n".join([*head, "", ""]).encode() + text
