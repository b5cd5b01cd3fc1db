"""Takes a due callback, sends it, and settles what came of it.

At least once: the callback is owed from the same atomic step that ends the session, and an attempt is taken before it is
made. Whoever is alive takes what another worker left open.
"""

from __future__ import annotations

import random
import time
from typing import Any
from urllib.parse import urlsplit

import gevent
from gevent.pool import Pool

from aistream.callback import Dead, Delivered, Meaning, Retry, headers, meaning, next_delay, payload
from aistream.config import Config
from aistream.errors import StoreUnavailable
from aistream.outbound import Outbound, SendFailed
from aistream.recall import Recall
from aistream.store import AWAY, Store, Taken, Word
from aistream.telemetry import log as lines

#: Attempts at the same time per worker. One that finds no place is taken at the next look at the deadlines.
SENDERS = 50
#: Seconds one attempt may last in all: a receiver that drips its answer is cut off. Less than the store's visibility.
ATTEMPT = 35.0
#: Seconds to keep saying what came of an attempt to a store that is away: after that another worker takes it again.
SETTLE = 60.0


class Delivery:
    """The callbacks that this worker sends."""

    def __init__(self, config: Config, store: Store, outbound: Outbound, recall: Recall) -> None:
        self._config = config
        self._store = store
        self._recall = recall
        self._outbound = outbound
        self._senders = Pool(SENDERS)
        #: Those of them that wait for a receiver.
        self._sending: set[Any] = set()

    def __len__(self) -> int:
        return len(self._senders)

    @property
    def free(self) -> int:
        """How many attempts there is a place for."""
        return int(self._senders.free_count())

    def wake(self, session_id: str) -> None:
        """The session's callback is due: it is attempted now if there is a place. Without yielding."""
        if not self._senders.full():
            self._senders.spawn(self._attempt, session_id)

    def give_up(self) -> int:
        """Breaks off the attempts that are still being made: another worker makes the next ones. Gives their number."""
        sending = list(self._sending)
        for sender in sending:
            sender.kill(SendFailed("the service was stopped in mid-attempt", sent=True), block=False)
        return len(sending)

    def _attempt(self, session_id: str) -> None:
        try:
            taken = self._store.take_callback(session_id)
            if taken is not None:
                self._recall.attempting(session_id)
                self._deliver(taken)
        except StoreUnavailable:
            return  # it stays due
        except Exception as error:  # the root of this greenlet: the attempt stays open and is taken again
            lines.error("callback.broke", session=session_id, error=error)

    def _deliver(self, taken: Taken) -> None:
        began = time.monotonic()
        outcome, status = self._send(taken)
        delay = None
        if isinstance(outcome, Retry):
            delay = next_delay(taken.attempt, outcome.retry_after, self._config.callback_schedule, random.random())
            if delay is None:
                outcome = Dead(f"{outcome.reason}; this was the last attempt")
        lines.log(
            40 if isinstance(outcome, Dead) else 20,
            "callback.attempted",
            session=taken.session.id,
            attempt=taken.attempt,
            outcome=type(outcome).__name__.lower(),
            status=status,
            reason=None if isinstance(outcome, Delivered) else outcome.reason,
            origin=urlsplit(taken.session.resume_url).netloc,
            next_in=None if delay is None else round(delay, 1),
            duration_ms=round((time.monotonic() - began) * 1000),
        )
        self._settle(taken, outcome, delay or 0.0)

    def _send(self, taken: Taken) -> tuple[Meaning, int | None]:
        body = payload(taken.session, taken.attempt)
        signed = headers(taken.session.id, body, int(time.time()), self._config.callback_secret)
        sender: Any = gevent.getcurrent()
        try:
            self._sending.add(sender)
            with gevent.Timeout(ATTEMPT, SendFailed("no whole answer in time", sent=True)):
                answer = self._outbound.post(taken.session.resume_url, body, signed)
        except SendFailed as failed:
            return Retry(failed.reason, arrived=failed.sent), None
        finally:
            self._sending.discard(sender)
        return meaning(answer, ambiguous=taken.ambiguous), answer.status

    def _settle(self, taken: Taken, outcome: Meaning, delay: float) -> None:
        until = time.monotonic() + SETTLE
        word: Word = "delivered" if isinstance(outcome, Delivered) else "retry" if isinstance(outcome, Retry) else "dead"
        # Before the store is told: one that is away, or has just lost the session, is told again what came of it.
        self._recall.attempted(taken.session.id, taken.attempt, word)
        while True:
            try:
                self._store.settle(
                    taken.session.id,
                    taken.attempt,
                    word,
                    delay=delay,
                    ambiguous=isinstance(outcome, Retry) and outcome.arrived,
                    last_answer="" if isinstance(outcome, Delivered) else outcome.reason,
                )
                return
            except StoreUnavailable:
                if time.monotonic() > until:
                    raise
                gevent.sleep(AWAY)
