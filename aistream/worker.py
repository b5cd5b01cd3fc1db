"""gunicorn's gevent worker, as a service of long streams needs it to end.

On SIGTERM gunicorn's own worker closes its listener and waits for connections, whatever they are. This one goes on serving
while it drains: whoever comes back to the last worker of a service that stops still finds it. (A refused connection ends an
EventSource of Firefox for good.) Where other workers listen on the same port, new connections are theirs. Every connection that
was taken has its answer before the worker exits: only a refused one may be asked of another replica, whatever it asks.
"""

from __future__ import annotations

import errno
import sys
import time
from functools import partial
from typing import Any

import gevent
from gevent.select import select
from gevent.server import StreamServer
from gunicorn.workers.ggevent import GeventWorker  # type: ignore[import-untyped]

from aistream import garbage, kernel_limits
from aistream.sockets import Socket

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


class Listener(StreamServer):
    """Accepts connections; `last` only those that nobody else has taken."""

    last = False
    _said_at = -REMINDER

    def do_read(self) -> Any:
        """One new connection, or None: there is none, or no file descriptor for it. Then it waits with the kernel.

        As gevent's own, but for the kind of socket.
        """
        sock: Any = self.socket
        try:
            descriptor, address = sock._accept()
            return Socket(sock.family, sock.type, sock.proto, fileno=descriptor), address
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
            _lines().warning("descriptors.exhausted")
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
        self._draining = False
        #: Connections that were accepted since then and are still open: each asks once.
        self._late = 0

    @property
    def background(self) -> Any:
        """The loops of the app that this worker serves."""
        return self.wsgi.extensions["aistream"].background

    def begin(self) -> None:
        """Starts the loops, after fork and patch, before it serves."""
        self.background.start()
        garbage.settle()
        gevent.spawn(garbage.run)

    def run(self) -> None:
        """Serves, with no more connections than there are file descriptors for; the service's first worker says what is short.

        Called by gunicorn after the fork, when all is loaded.
        """
        config = self.wsgi.extensions["aistream"].config
        asked = kernel_limits.demand(config, self.cfg.worker_connections)
        limit = kernel_limits.raise_descriptors(asked.wanted)
        self.worker_connections = asked.connections_within(limit)
        self.wsgi.extensions["aistream"].viewing.take_lines(asked.lines_within(limit))
        if self.age == 1:
            for short in kernel_limits.shortages(asked, limit, self.cfg.backlog, self.cfg.workers):
                level = "debug" if config.dev_mode else "warning" if short.warns else "info"
                getattr(_lines(), level)(short.event, **short.facts)
        super().run()

    def server_class(self, sock: Any, *, spawn: Any, **_: Any) -> Listener:
        """gunicorn's hook for a server of one's own: its plain one, kept at hand."""
        listener = Listener(sock, handle=partial(self.handle, sock), spawn=spawn)
        if self.cfg.workers > 1:
            listener.max_accept = 1  # as gunicorn does: the others shall have some
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


def _lines() -> Any:
    # Only in a worker: the master imports this module before it has made the folder that prometheus_client looks for.
    from aistream.telemetry import log

    return log
