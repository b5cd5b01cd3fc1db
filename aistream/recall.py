"""What this worker has told the store lately, and says again when the store has lost it.

A Redis that starts empty, or a replica that was promoted without the last writes, forgets what it had confirmed. What runs is
known to its generation; this is the rest: sessions that were accepted and still wait for a viewer, and endings, until their
callback is settled and for a while after. A lost ending would be a workflow that hangs, or one that is told twice.

Not saved is what Redis loses together with the only worker that knows it.
"""

from __future__ import annotations

import time

from gevent.pool import Pool

from aistream.config import Config
from aistream.events import Ending
from aistream.log import Log
from aistream.outbox import Word
from aistream.session import CANCELLED, Accepted, Claimed, Finished, Outcome, State
from aistream.store import Store
from aistream.telemetry import log as lines

#: Seconds with a store that answers for which a settled callback is remembered: longer than a replica lags behind.
SETTLED = 10.0
#: Seconds for which a callback that is told again stays hidden while its attempt is under way here: longer than that may last.
HIDDEN = 40.0
#: Seconds that a pending session is remembered beyond its deadline: by then somebody has ended it, or no worker is alive.
OVERDUE = 60.0
#: Bytes of prompts and answers remembered at most; beyond that the oldest endings are forgotten first.
LIMIT = 64 * 1024 * 1024
#: Bytes that a remembered session takes besides its texts, about.
OVERHEAD = 2_000
#: Sessions asked about in one go, and the seconds between two goes.
BATCH = 500
PERIOD = 1.0
#: Sessions told again at the same time.
VOICES = 16


class Told:
    """One ending, with all that is needed to tell it again. `claimed` None: it ended while it was pending."""

    __slots__ = ("accepted", "claimed", "ending", "log", "open", "outcome", "settled", "settled_at", "size")

    def __init__(self, accepted: Accepted, claimed: Claimed | None, log: Log, ending: Ending, outcome: Outcome) -> None:
        self.accepted = accepted
        self.claimed = claimed
        self.log = log
        self.ending = ending
        self.outcome = outcome
        #: An attempt of its callback is being made by this worker.
        self.open = False
        #: Number and outcome of the attempt that settled it.
        self.settled: tuple[int, Word] | None = None
        self.settled_at = 0.0
        #: Bytes, about.
        self.size = OVERHEAD + len(accepted.request.prompt) + 2 * len(log.answer())


class Recall:
    """This worker's memory of what it has told the store."""

    def __init__(self, config: Config, store: Store) -> None:
        self._store = store
        # Whoever runs a session renews it within this time, and so writes it anew before it could be taken for pending.
        self._patience = config.lease_seconds / 3
        self._overdue = config.session_ttl_seconds + OVERDUE
        #: Each with the moment at which it is forgotten.
        self._pending: dict[str, tuple[Accepted, float]] = {}
        self._told: dict[str, Told] = {}
        self._size = 0
        self._behind = False
        self._pending_again_at: float | None = None
        #: The pending sessions that were known then: what is accepted later stands in the store as it is now.
        self._doubted: set[str] = set()
        self._pruned_at = 0.0

    def __len__(self) -> int:
        return len(self._pending) + len(self._told)

    @property
    def behind(self) -> bool:
        """Whether the store has yet to be told again: until then it may offer callbacks that are settled already."""
        return self._behind

    @property
    def telling(self) -> bool:
        """Whether something is still to be told again, pending sessions included."""
        return self._behind or (self._pending_again_at is not None and not self._doubted.isdisjoint(self._pending))

    def accepted(self, accepted: Accepted) -> None:
        """A session was accepted here, and waits for its first viewer."""
        self._pending[accepted.id] = accepted, time.monotonic() + self._overdue

    def claimed(self, session_id: str) -> None:
        """A session runs here now: its generation knows it."""
        self._pending.pop(session_id, None)

    def ended(self, told: Told) -> None:
        """A session was ended here."""
        self._pending.pop(told.accepted.id, None)
        self._forget(told.accepted.id)
        self._told[told.accepted.id] = told
        self._size += told.size
        while self._size > LIMIT:
            self._forget(self._least())

    def attempting(self, session_id: str) -> None:
        """An attempt of a callback begins here."""
        if session_id in self._told:
            self._told[session_id].open = True

    def attempted(self, session_id: str, attempt: int, outcome: Word) -> None:
        """What came of it."""
        told = self._told.get(session_id)
        if told is not None:
            told.open = False
            if outcome != "retry":
                told.settled, told.settled_at = (attempt, outcome), time.monotonic()

    def doubt(self) -> None:
        """The store may have lost writes: everything is to be told again."""
        self._behind = True
        self._pending_again_at = time.monotonic() + self._patience
        self._doubted = set(self._pending)

    def step(self) -> None:
        """Tells again what is to be told, then forgets what is no longer needed. Raises StoreUnavailable."""
        if self._behind:
            began = time.monotonic()
            voices = Pool(VOICES)
            for again in [voices.spawn(self._tell_again, told) for told in list(self._told.values())]:
                again.get()  # raises what it raised
            self._behind = False
            if self._told:
                lines.warning("recall.told", endings=len(self._told), duration_ms=round((time.monotonic() - began) * 1000))
        if self._pending_again_at is not None and time.monotonic() >= self._pending_again_at:
            for accepted, _ in list(self._pending.values()):
                self._store.create_again(accepted)
            self._pending_again_at = None
        now = time.monotonic()
        if not self._behind and self._pending_again_at is None and len(self) and now - self._pruned_at >= PERIOD:
            self._pruned_at = now
            self._prune(now)

    def _tell_again(self, told: Told) -> None:
        if told.claimed is None:
            self._store.create_again(told.accepted)
            if told.ending == CANCELLED:
                self._store.cancel(told.accepted.id)  # it may have been stopped long before its deadline
        # An attempt that is under way hides the callback, as taking it has.
        result = self._finish(told)
        if not isinstance(result, Finished) and told.claimed is not None:
            if not self._store.restore(told.claimed, told.log.entries(before_ending=True)):
                return
            result = self._finish(told)
        if isinstance(result, Finished) and told.settled is not None:
            self._store.outbox.settle(told.accepted.id, *told.settled)

    def _finish(self, told: Told) -> object:
        epoch, seq, before = 0, 0, 0
        if told.claimed is not None:
            epoch, seq, before = told.claimed.epoch, told.log.cursors[-1].seq, len(told.log) - 1
        return self._store.finish(
            told.accepted.id,
            epoch,
            before,
            seq,
            told.ending,
            told.log.answer(),
            told.outcome,
            callback_in=HIDDEN if told.open or told.settled else 0,
        )

    def _prune(self, now: float) -> None:
        """Others may have started a session of ours, or settled a callback: they remember it now."""
        owed = [session_id for session_id, told in self._told.items() if told.settled is None]
        asked = [*self._pending, *owed][:BATCH]
        standing = self._store.standing(asked) if asked else {}
        for session_id in asked:
            state, callback = standing.get(session_id, (None, ""))
            waiting, told = self._pending.pop(session_id, None), self._told.get(session_id)
            if waiting is not None and state in (None, State.PENDING) and now < waiting[1]:
                self._pending[session_id] = waiting  # behind the others: they are asked about before it is again
            if told is not None and told.settled is None and not told.open and callback in ("delivered", "dead"):
                self._forget(session_id)
        for session_id, told in list(self._told.items()):
            told.log.forget_frames()  # its viewers have had the time to take them
            if told.settled is not None and now - told.settled_at > SETTLED:
                self._forget(session_id)

    def _least(self) -> str:
        """Which ending is missed least: a settled one, else the oldest."""
        settled = (session_id for session_id, told in self._told.items() if told.settled is not None)
        return next(settled, next(iter(self._told)))

    def _forget(self, session_id: str) -> None:
        told = self._told.pop(session_id, None)
        if told is not None:
            self._size -= told.size
