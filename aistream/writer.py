"""The log writer: one greenlet that stores the events of all of this process's generations, many at a time.

Group commit: what comes in within one window goes to Redis in one round trip. What is not stored yet is a number, not a
buffer: the log in memory has it. While Redis is away the number stays where it is and is tried again; what a Redis has lost is
written anew.
"""

from __future__ import annotations

import time

import gevent
from gevent.event import Event as Signal
from gevent.lock import BoundedSemaphore

from aistream.errors import StoreUnavailable
from aistream.events import Cursor, Event
from aistream.log import Log
from aistream.metrics import LAG
from aistream.pulse import Pulse
from aistream.session import Claimed
from aistream.store import AWAY, Holding, Store
from aistream.tally import Tally
from aistream.telemetry import log as lines

#: Seconds between two flushes: also the most that a killed worker can lose.
WINDOW = 0.02
#: Most events of one session in one round trip.
BATCH = 500


class Storing:
    """How much of one generation's log is in the store, and what else stands there of its session."""

    __slots__ = ("claimed", "log", "stored", "touched")

    def __init__(self, log: Log, claimed: Claimed, stored: int) -> None:
        self.log = log
        self.claimed = claimed
        self.stored = stored
        self.touched = False

    @property
    def holding(self) -> Holding:
        """What `renew` compares with the store."""
        return Holding(self.claimed.epoch, self.stored)


class LogWriter:
    """Takes the hand-over of events (`touch`) and stores them soon, or at once (`flush`)."""

    def __init__(self, store: Store, pulse: Pulse) -> None:
        self._store = store
        self._pulse = pulse
        self._dirty: list[Storing] = []
        #: What is being written now.
        self._in_flight: list[Storing] = []
        self._signal = Signal()
        # One pipeline at a time: a second one with the same entries would be refused as late.
        self._writing = BoundedSemaphore()
        #: Since when what is being written, or could not be, has been waiting; since when what has come meanwhile has.
        self._behind_since: float | None = None
        self._touched_at = 0.0
        #: Events that were stored, and how long windows took from their first event to that.
        self.events = 0
        self.lag = Tally(LAG)

    @property
    def unstored(self) -> int:
        """Events in memory that the store has not."""
        return sum(len(storing.log) - storing.stored for storing in {*self._dirty, *self._in_flight})

    @property
    def behind(self) -> float:
        """Seconds for which the oldest of them has been waiting."""
        since = self._touched_at if self._dirty and self._behind_since is None else self._behind_since
        return 0.0 if since is None else time.monotonic() - since

    def touch(self, storing: Storing) -> None:
        """There are new events in the log: they are stored within a window. Without yielding."""
        if not storing.touched:
            storing.touched = True
            if not self._dirty:
                self._signal.set()
                self._touched_at = time.monotonic()
            self._dirty.append(storing)

    def run(self) -> None:
        """The loop; never returns."""
        while True:
            self._signal.wait()
            gevent.sleep(WINDOW)
            dirty = self._in_flight = self._dirty
            self._dirty = []
            since = self._behind_since = self._touched_at if self._behind_since is None else self._behind_since
            self._signal.clear()
            for storing in dirty:
                storing.touched = False
            try:
                self._write(dirty)
                self._behind_since = None
                self.lag.add(time.monotonic() - since)
            except StoreUnavailable:
                for storing in dirty:
                    self.touch(storing)
                gevent.sleep(AWAY)
            except Exception as error:  # the root of a loop: one bad entry must not stop all logs
                self._behind_since = None
                lines.error("log_writer.failed", error=error)
            self._in_flight = []

    def flush(self, storing: Storing) -> None:
        """Stores what this log has and the store has not, unless the log turns out to be void. Raises StoreUnavailable."""
        while storing.stored < len(storing.log) and not storing.log.dropped:
            self._write([storing])

    def write_first(self, storing: Storing, cursor: Cursor, event: Event) -> bool:
        """Stores a log's first event before the log has it, however long the store is away. False: the log is void."""
        log = storing.log
        while not log.dropped:
            try:
                (refusal,) = self._store.append([(log.session_id, cursor, event)])
                if refusal is not None:
                    with self._writing:
                        self._judge(storing)
                    # It may have arrived with an earlier try whose answer was lost.
                    if log.dropped or self._store.last_id(log.session_id) != cursor:
                        continue
                storing.stored = len(log) + 1
                self.events += 1
                return True
            except StoreUnavailable:
                gevent.sleep(AWAY)
        return False

    def rewrite(self, storing: Storing) -> None:
        """Writes the whole session anew, since the store has lost it or a part of it. The log is void if it is another's now.

        Raises StoreUnavailable.
        """
        with self._writing:
            self._rewrite(storing)

    def _write(self, many: list[Storing]) -> None:
        with self._writing:
            batch: list[tuple[str, Cursor, Event]] = []
            spans: list[tuple[Storing, int, int]] = []
            for one in many:
                log, stored = one.log, one.stored
                stop = min(len(log.events), stored + BATCH)
                if stored < stop and not log.ended and not log.dropped:
                    spans.append((one, len(batch), stop))
                    batch += [(log.session_id, log.cursors[i], log.events[i]) for i in range(stored, stop)]
            if not batch:
                return
            refusals = self._store.append(batch)
            self.events += len(batch)
            refused = any(refusals)
            for one, first, stop in spans:
                if refused and any(refusals[first : first + stop - one.stored]):
                    self._judge(one)
                else:
                    one.stored = stop
                if one.stored < len(one.log.events):
                    self.touch(one)

    def _judge(self, storing: Storing) -> None:
        """A refusal is a hint, `renew` is the judge: still ours means that an earlier sending had arrived unheard."""
        log = storing.log
        verdict = self._store.renew({log.session_id: storing.holding})[log.session_id]
        if verdict == "owner":
            last = self._store.last_id(log.session_id)
            if last is not None and last.epoch == storing.claimed.epoch:
                storing.stored = min(log.position(last), len(log))
                return
        if verdict == "fenced":
            lines.warning("log_writer.fenced", session=log.session_id, epoch=storing.claimed.epoch)
            log.drop()
        else:
            self._rewrite(storing)

    def _rewrite(self, storing: Storing) -> None:
        log, count = storing.log, len(storing.log)
        # Never straight after a stop: what is gone may have been ended by another worker, told to n8n, and lost only then.
        if not self._pulse.doubted() and self._store.restore(storing.claimed, log.entries()[:count]):
            storing.stored = count
            lines.warning("log_writer.restored", session=log.session_id, epoch=storing.claimed.epoch, events=count)
        else:
            lines.warning("log_writer.fenced", session=log.session_id, epoch=storing.claimed.epoch)
            log.drop()
