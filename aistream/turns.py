"""Requests take turns with streams.

All requests that are ready in one round of the event loop would be answered in it, before any stream gets to send what has come
for it: fifty clients that say as much as they can, or one that says a hundred requests in one breath, make streams wait for as
long as all of them take. So requests have so much of each round, whoever comes later is served in a later one, in the order of
coming, and streams wait no longer than that and one request more.

A request that finds nobody before it pays two looks at the clock.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from gevent.hub import Waiter, get_hub

#: Seconds of each round that requests may begin in.
SHARE = 0.005


class Turns:
    """Of one worker."""

    def __init__(self, share: float = SHARE) -> None:
        self._share = share
        self._queue: deque[Waiter[None]] = deque()
        self._until = 0.0
        #: A request has begun in this round.
        self._begun = False
        self._timer: Any = None

    def take(self) -> None:
        """Returns when it is this greenlet's turn to work."""
        if not self._queue:
            now = time.monotonic()
            if not self._begun:
                self._begun, self._until = True, now + self._share
                get_hub().loop.run_callback(self._next_round)
            if now < self._until:
                return
        waiter: Waiter[None] = Waiter()
        self._queue.append(waiter)
        self._call()
        try:
            waiter.get()
        finally:
            if waiter in self._queue:
                self._queue.remove(waiter)  # this greenlet was ended while it waited

    def _next_round(self) -> None:
        self._begun = False

    def _call(self) -> None:
        """Has the first ones called in the next round."""
        if self._timer is None:
            self._timer = get_hub().loop.timer(0)
        if not self._timer.active:
            self._timer.start(self._let_in)

    def _let_in(self) -> None:
        """In the hub: each works until it waits for something."""
        until = time.monotonic() + self._share
        while self._queue:
            self._queue.popleft().switch(None)
            if time.monotonic() >= until:
                break
        if self._queue:
            self._timer.stop()
            self._timer.start(self._let_in)
