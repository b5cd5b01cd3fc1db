"""Whether this process was stopped for a while: by a signal, a debugger, a frozen host, or a loop that never yielded.

A worker that was stopped for longer than its leases has lost them without having noticed, and others act in its place. It
cannot tell from Redis being silent: that, by itself, proves nothing. So it looks at its own clock.
"""

from __future__ import annotations

import time

#: The clock goes on while the machine is suspended, where the system has one that does.
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


class Pulse:
    """Doubts that the leases are still held from the first hole in the process's own ticks until `renew` has said so."""

    def __init__(self, hole: float) -> None:
        """`hole`: seconds without a tick that raise a doubt."""
        #: How many doubts there have been.
        self.doubts = 0
        #: Seconds between two ticks that leave room for a late one.
        self.period = hole / 4
        self._hole = hole
        self._answered = 0
        self._at = time.clock_gettime(_CLOCK)

    def doubted(self) -> bool:
        """Whether there is a doubt. Without yielding; to be asked before anything new is shown."""
        now = time.clock_gettime(_CLOCK)
        if now - self._at > self._hole:
            self.doubts += 1
        self._at = now
        return self.doubts != self._answered

    def answer(self, doubts: int) -> None:
        """The leases were renewed by a call that began when there had been so many doubts."""
        self.doubted()  # a stop during that call is a new one
        self._answered = max(self._answered, doubts)
