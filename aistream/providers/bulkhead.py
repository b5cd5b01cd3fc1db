"""How many answers of one provider are written at the same time, and who waits for a place.

A bulkhead (M. Nygard, Release It!): a provider that is slow fills its own places and its own queue, and nobody else's.
"""

from __future__ import annotations

from collections import deque

import gevent
from gevent.event import AsyncResult

from aistream.errors import ProviderFailed


class Bulkhead:
    """Places of one provider on this worker, given in the order in which they were asked for."""

    def __init__(self, places: int, queue: int, seconds: float) -> None:
        """`places` answers at the same time, `queue` that wait, each for at most `seconds`."""
        self._places = places
        self._queue = queue
        self._seconds = seconds
        self.running = 0
        self._waiting: deque[AsyncResult[bool]] = deque()

    @property
    def free(self) -> bool:
        """Whether there is a place."""
        return self.running < self._places

    @property
    def waiting(self) -> int:
        """How many wait for a place."""
        return len(self._waiting)

    def enter(self) -> None:
        """Takes a place, or waits for one. Raises ProviderFailed `overloaded`."""
        if self.free:
            self.running += 1
            return
        if self.waiting >= self._queue:
            raise _overloaded("full")
        turn: AsyncResult[bool] = AsyncResult()
        self._waiting.append(turn)
        try:
            turn.get(timeout=self._seconds)
        except gevent.Timeout:
            if not turn.ready():
                raise _overloaded("timeout") from None
        except BaseException:
            if turn.ready():
                self.leave()  # stopped in the moment in which it got its place
            raise
        finally:
            if not turn.ready():
                self._waiting.remove(turn)

    def leave(self) -> None:
        """Gives the place back: to who has waited longest."""
        if self._waiting:
            self._waiting.popleft().set(True)
        else:
            self.running -= 1


def _overloaded(queue: str) -> ProviderFailed:
    message = "The service has as many answers of this model under way as it may have. Try again shortly."
    return ProviderFailed("overloaded", message, retryable=True, again=False, log_detail={"queue": queue})
