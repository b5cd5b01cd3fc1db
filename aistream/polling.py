"""How often a busy hub asks the kernel what has arrived: at most a thousand times a second.

Thousands of tokens a second, each on a socket of its own, wake an idle process thousands of times: each time a system call, a
context switch and cold caches for the work of one token. Asked once a millisecond, the kernel has a few of them at once. Network
cards do the same with their interrupts (interrupt moderation). It costs a token half a millisecond on average, so a hub that is
not busy does without: what comes alone is taken at once.
"""

from __future__ import annotations

import time
from typing import Any

from gevent import monkey
from gevent.hub import get_hub

#: Seconds between two polls of a busy hub.
INTERVAL = 0.001
#: Seconds over which its polls are counted, from how many on it is busy, and from how many on it stays so with its pauses.
WINDOW = 0.05
BUSY = 50
STAYS = 25

_sleep = monkey.get_original("time", "sleep")


class Polling:
    """Watches the polls of this thread's hub, and makes those of a busy one fewer."""

    def __init__(self) -> None:
        # The last of all that is done before a poll: what this round has brought is written by then.
        self._watcher: Any = get_hub().loop.prepare(ref=False, priority=-2)
        self._polled_at = 0.0
        self._since = 0.0
        self._polls = 0
        #: Whether it pauses before its polls.
        self.busy = False

    def start(self) -> None:
        """From now on."""
        self._watcher.start(self._before_poll)

    def stop(self) -> None:
        """No longer."""
        self._watcher.stop()
        self._watcher.close()

    def _before_poll(self) -> None:
        now = time.monotonic()
        self._polls += 1
        if now - self._since >= WINDOW:
            enough = STAYS if self.busy else BUSY
            self.busy = self._polls >= enough and now - self._since < 2 * WINDOW
            self._since, self._polls = now, 0
        if self.busy and now - self._polled_at < INTERVAL:
            _sleep(self._polled_at + INTERVAL - now)
            now = time.monotonic()
        self._polled_at = now
