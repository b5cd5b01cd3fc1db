"""How long a worker waits for its clients, and whom it sends away when it runs out of room.

gunicorn's gevent worker bounds neither: a body may come a byte at a time for ever, a head for as long as an idle connection is
kept, at a megabyte of memory; and when all its connections are taken, nobody gets in, health checks included. Here a request's
head and its body have so many seconds in all, however they drip; and when connections run short, the client that has kept the
worker waiting longest has to go. Streams and requests that are being answered are never touched: the worker does not wait for
them. (Who takes nothing of a stream is `viewing`'s affair; who cannot be reached any more, the kernel's: `watch_for_the_dead`.)

What it costs: three entries into dictionaries and three looks at the clock per request; no timer, and nothing per token.
"""

from __future__ import annotations

import errno
import heapq
import itertools
import socket
import time
from collections import Counter
from contextlib import suppress
from typing import Any

from aistream.errors import Code, Problem
from aistream.sockets import PEEK, Socket

#: Most bytes of a request's head, with what comes in one piece with its end. Nobody writes half as much; nginx takes 32 KiB.
HEAD_BYTES = 40_960
#: Part of a worker's connections that is kept free for who comes next, and most of them.
SPARE, MOST_SPARE = 0.1, 100
#: Seconds that whoever has just connected is not sent away in: a round trip around the world.
GRACE = 0.5
#: How many are looked at to find one: those that stand in front for the worker's own lateness are few, or there is no time.
CANDIDATES = 20
#: Seconds between two looks at who is late, and at least between two lines that say how many were sent away.
LOOK = 1.0
REMINDER = 60.0


class HeadTooLarge(Exception):
    """A request's head has more than HEAD_BYTES."""


class TooLate(Problem):
    """A request's body did not come in time."""

    status = 408
    code: Code = "request_timeout"
    title = "The request took too long"

    def __init__(self) -> None:
        super().__init__("The body did not arrive in time (REQUEST_SECONDS).")


class Waits:
    """Clients that are waited for, longest first. `patience`: seconds until one is late."""

    def __init__(self, patience: float) -> None:
        self.patience = patience
        self.since: dict[Client, float] = {}

    def first(self) -> tuple[float, Client] | None:
        """Since when the first has been waited for, and which it is."""
        return next(((since, client) for client, since in self.since.items()), None)


class Patience:
    """The clients that one worker waits for: to ask for something, to end a head, to end a body."""

    def __init__(self, request_seconds: float, idle_seconds: float) -> None:
        self.idle = Waits(idle_seconds)
        self.heads = Waits(request_seconds)
        self.bodies = Waits(request_seconds)
        #: How many were sent away, by why: `late`, `no_room`, or what was wrong with their request.
        self.sent_away: Counter[str] = Counter()
        self._told: Counter[str] = Counter()
        self._told_at = -REMINDER

    def make_room(self) -> bool:
        """Sends the client away that has been waited for longest. False: there is none, but for who came in this moment.

        Who has said something that was not read yet does not keep us waiting, but we it.
        """
        before = time.monotonic() - GRACE
        waiting = heapq.merge(*(waits.since.items() for waits in (self.idle, self.heads, self.bodies)), key=lambda one: one[1])
        for client, since in itertools.islice(waiting, CANDIDATES):
            if since > before:
                break
            if not client.has_spoken:
                self.sent_away["no_room"] += 1
                client.send_away()
                return True
        return False

    def look(self) -> None:
        """Sends away who is late. (Who asks for nothing more is no news.)"""
        now = time.monotonic()
        for waits in (self.idle, self.heads, self.bodies):
            while (front := waits.first()) and front[0] <= now - waits.patience:
                self.sent_away["late"] += waits is not self.idle
                front[1].send_away()

    def news(self) -> dict[str, int]:
        """How many were sent away since this was last told, by why. Nothing within a minute of that."""
        now = time.monotonic()
        fresh = self.sent_away - self._told
        if not fresh or now - self._told_at < REMINDER:
            return {}
        self._told, self._told_at = self.sent_away.copy(), now
        return dict(fresh)


class Client(Socket):
    """A connection that was accepted, and what it is waited for: at first for its first head."""

    #: The plain one below gevent's.
    _sock: Any

    def __init__(self, patience: Patience, sock: Any, descriptor: int) -> None:
        super().__init__(sock.family, sock.type, sock.proto, fileno=descriptor)
        self.patience = patience
        #: None while a request is being answered, until somebody asks for its body.
        self._awaited: Waits | None = None
        self._head_bytes = 0
        self._sent_away = False
        self._await(patience.heads)

    def begin_answer(self) -> None:
        """The head is complete."""
        self._forget()
        self._awaited = None

    def end_answer(self) -> None:
        """The request is over. The next one may follow."""
        self._forget()
        self._head_bytes = 0
        self._await(self.patience.idle)

    def send_away(self) -> None:
        """It has no more to say. What it is being answered still goes to it."""
        self._forget()
        self._sent_away = True
        with suppress(OSError):
            # Below gevent, so that whoever is reading finds the end.
            self._sock.shutdown(socket.SHUT_RD)

    @property
    def has_spoken(self) -> bool:
        """Whether something of it, be it its leaving, waits to be read."""
        try:
            self._sock.recv(1, PEEK)
        except BlockingIOError:
            return False
        except OSError:
            pass
        return True

    def recv(self, *args: Any) -> bytes:
        """As gevent's. Raises TooLate, HeadTooLarge, and of OSErrors those alone that gunicorn takes for a client that left."""
        patience = self.patience
        if self._awaited is None:
            self._await(patience.bodies)
        try:
            data: bytes = super().recv(*args)
        except OSError as error:
            raise _left(error) from error
        if self._awaited is patience.bodies:
            if self._sent_away:
                raise TooLate
            return data
        if self._sent_away:
            return b""
        if self._awaited is patience.idle and data:
            self._forget()
            self._await(patience.heads)
        self._head_bytes += len(data)
        if self._head_bytes > HEAD_BYTES:
            raise HeadTooLarge
        return data

    def sendall(self, data: Any, flags: int = 0) -> None:
        """As Socket's, with the errors of `recv`."""
        try:
            super().sendall(data, flags)
        except OSError as error:
            raise _left(error) from error

    def close(self) -> None:
        """As gevent's."""
        self._forget()
        super().close()

    def _await(self, waits: Waits) -> None:
        self._awaited = waits
        waits.since[self] = time.monotonic()

    def _forget(self) -> None:
        if self._awaited is not None:
            self._awaited.since.pop(self, None)


def _left(error: OSError) -> OSError:
    """gunicorn prints a traceback of whatever it does not know to be a client that left: one that cannot be reached, say."""
    return error if error.errno in (errno.EPIPE, errno.ENOTCONN) else ConnectionResetError(errno.ECONNRESET, "the client left")


def watch_for_the_dead(listener: Any, seconds: float) -> None:
    """Connections that are accepted from here end when nothing that was sent to them has been acknowledged for so long.

    A client that is gone without a word (a phone out of reach) takes nothing, and what little goes to a silent stream never
    fills a buffer: the kernel alone would know, after a quarter of an hour.
    """
    with suppress(OSError):  # a unix socket
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(seconds * 1000))
