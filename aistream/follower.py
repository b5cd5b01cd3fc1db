"""The follower: one greenlet that fills the logs of sessions that this worker watches but does not generate.

One XREAD over all followed logs, about every 15 ms while there are any. All viewers of a session share one log, read from
the store once from its beginning.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import gevent
from gevent.event import Event as Signal

from aistream.config import Config
from aistream.errors import StoreUnavailable
from aistream.events import Cursor, Event, Reasoning, Text
from aistream.log import Log
from aistream.metrics import LAG
from aistream.store import AWAY, Store
from aistream.tally import Tally
from aistream.telemetry import log as lines

#: Seconds between two reads.
PERIOD = 0.015


class _Followed:
    __slots__ = ("heard_at", "log", "viewers")

    def __init__(self, session_id: str) -> None:
        self.log = Log(session_id)
        self.viewers = 0
        self.heard_at = time.monotonic()

    @property
    def open(self) -> bool:
        """Whether more may come."""
        return not (self.log.ended or self.log.dropped or self.log.lost)


class Follower:
    """Gives a viewer the log of a session that runs elsewhere or has ended."""

    def __init__(self, store: Store, config: Config) -> None:
        self._store = store
        self._silence = config.lease_seconds
        self._followed: dict[str, _Followed] = {}
        self._signal = Signal()
        #: How long two reads lay apart, while there was anything to read.
        self.lag = Tally(LAG)

    def __len__(self) -> int:
        return len(self._followed)

    @contextmanager
    def follow(self, session_id: str) -> Iterator[Log]:
        """The session's log, filled up to now, and further for as long as the context is open. Raises StoreUnavailable."""
        followed = self._followed.get(session_id)
        if followed is None or followed.log.dropped or followed.log.lost:
            followed = self._followed[session_id] = _Followed(session_id)
        followed.viewers += 1
        try:
            if not len(followed.log):
                # Several viewers may read it at the same time; only what follows on is taken, so that this is harmless.
                self._take(followed, self._store.read({session_id: None}).get(session_id, []))
            self._signal.set()
            yield followed.log
        finally:
            followed.viewers -= 1
            if not followed.viewers and self._followed.get(session_id) is followed:
                del self._followed[session_id]

    def run(self) -> None:
        """The loop; never returns."""
        read_at: float | None = None
        while True:
            self._signal.wait()
            live = {session_id: one for session_id, one in self._followed.items() if one.open}
            if not live:
                self._signal.clear()
                read_at = None
                continue
            pause = PERIOD
            try:
                found = self._store.read({session_id: one.log.last for session_id, one in live.items()})
                for session_id, entries in found.items():
                    self._take(live[session_id], entries)
                now = time.monotonic()
                if read_at is not None:
                    self.lag.add(now - read_at)
                read_at = now
                self._end_the_lost(live)
            except StoreUnavailable:
                pause = AWAY
            except Exception as error:  # the root of a loop
                lines.error("follower.failed", error=error)
            gevent.sleep(pause)

    def _take(self, followed: _Followed, entries: list[tuple[Cursor, Event]]) -> None:
        log = followed.log
        for cursor, event in entries:
            if 0 < log.text_epoch < cursor.epoch and isinstance(event, (Text, Reasoning)):
                # What this copy has was lost in a failover, and the session was run once more: its log has other text now.
                log.drop()
                return
            if log.follows(cursor):
                log.append(cursor, event)
        if entries:
            followed.heard_at = time.monotonic()

    def _end_the_lost(self, live: dict[str, _Followed]) -> None:
        """Lets go of sessions that are gone without an ending: nobody will ever write one."""
        now = time.monotonic()
        silent = [session_id for session_id, one in live.items() if now - one.heard_at > self._silence]
        if not silent:
            return
        forgotten = self._store.forgotten(silent)
        for session_id in silent:
            one = live[session_id]
            one.heard_at = now
            if session_id in forgotten:
                one.log.lose()
