"""Takes a due callback, sends it, and settles what came of it.

At least once: the callback is owed from the same atomic step that ends the session, and an attempt is taken before it is
made. Whoever is alive takes what another worker left open. Each origin has its own places: one that is slow or down keeps
nothing waiting but its own.
"""

from __future__ import annotations

import logging
import random
import time
from collections import Counter
from typing import Any

import gevent
from gevent.event import Event as Signal
from gevent.pool import Pool

from aistream.callback import Dead, Delivered, Meaning, Retry, headers, meaning, next_step, payload
from aistream.config import Config
from aistream.destination import Destinations
from aistream.errors import DestinationRefused, StoreUnavailable
from aistream.metrics import callback_attempted
from aistream.outbound import Outbound, SendFailed
from aistream.outbox import Outbox, Taken, Word
from aistream.parse import origin_of
from aistream.recall import Recall
from aistream.session import Attempt
from aistream.store import AWAY, Places
from aistream.telemetry import log as lines

#: Attempts at the same time per worker, to all origins. One that finds no place is taken at a later look at what is due.
SENDERS = 200
#: Seconds one attempt may last in all: a receiver that drips its answer is cut off.
ATTEMPT = 35.0
#: Seconds to keep saying what came of an attempt to a store that is away: after that another worker takes it again.
SETTLE = 60.0
#: Seconds between two looks at what is due while more is due than there are places, at least: each look is one for many.
BREATH = 0.05


class Delivery:
    """The callbacks that this worker sends."""

    def __init__(self, config: Config, outbox: Outbox, destinations: Destinations, outbound: Outbound, recall: Recall) -> None:
        self._config = config
        self._outbox = outbox
        self._recall = recall
        self._destinations = destinations
        self._outbound = outbound
        self._secrets = [secret for secret in (config.callback_secret, config.callback_secret_previous) if secret]
        self._senders = Pool(SENDERS)
        #: Those of them that wait for a receiver.
        self._sending: set[Any] = set()
        #: Attempts that are not settled yet: session id -> number.
        self._open: dict[str, int] = {}
        #: How many places of an origin are taken.
        self._taken: Counter[str] = Counter()
        #: More was due at the last look than there were places.
        self._more = False
        self._room = Signal()

    def __len__(self) -> int:
        return len(self._senders)

    @property
    def places(self) -> Places:
        """How many attempts there is a place for."""
        each = self._config.callback_concurrency
        return Places(int(self._senders.free_count()), each, {origin: each - taken for origin, taken in self._taken.items()})

    def wake(self, session_id: str, origin: str) -> None:
        """The callback of this session, to this origin, is due: it is attempted now if there is a place. Without yielding."""
        if not self._senders.full() and self._taken[origin] < self._config.callback_concurrency:
            self._taken[origin] += 1
            self._senders.spawn(self._attempt, session_id, origin)
        else:
            self._more = True

    def looked(self, more: bool) -> None:
        """What was due has been looked at; `more`: there was no place for some of it."""
        self._more = more

    def rest(self, seconds: float) -> None:
        """Waits until it is time for another look at what is due: so long, or until there is room for more."""
        gevent.sleep(BREATH)
        self._room.wait(seconds - BREATH)
        self._room.clear()

    def hold(self) -> None:
        """Keeps what is being attempted here from other workers. Raises StoreUnavailable."""
        if self._open:
            self._outbox.hold(self._open)

    def give_up(self) -> int:
        """Breaks off the attempts that are still being made: another worker makes the next ones. Gives their number."""
        sending = list(self._sending)
        for sender in sending:
            sender.kill(SendFailed("the service was stopped in mid-attempt", sent=True), block=False)
        return len(sending)

    def _attempt(self, session_id: str, origin: str) -> None:
        taken = None
        try:
            taken = self._outbox.take(session_id)
            if taken is not None:
                self._recall.attempting(session_id)
                self._open[session_id] = taken.attempt
                self._deliver(taken)
        except StoreUnavailable:
            return  # it stays due
        except Exception as error:  # the root of this greenlet: the attempt stays open and is taken again
            lines.error("callback.broke", session=session_id, error=error)
        finally:
            # A worker that stood still for longer than a lease may have a later attempt of the same callback.
            if taken is not None and self._open.get(session_id) == taken.attempt:
                del self._open[session_id]
            self._leave(origin)

    def _leave(self, origin: str) -> None:
        self._taken[origin] -= 1
        if not self._taken[origin]:
            del self._taken[origin]
        if self._more:
            self._room.set()

    def _deliver(self, taken: Taken) -> None:
        began, at = time.monotonic(), time.time()
        said, status, origin = self._send(taken)
        outcome, delay = self._follows(taken, said)
        duration = time.monotonic() - began
        line = Attempt(
            attempt=taken.attempt,
            outcome=_WORDS[type(outcome)],
            at=round(at * 1000),
            status=status,
            reason=_reason(outcome, status),
            duration_ms=round(duration * 1000),
        )
        callback_attempted(line.outcome, duration, taken.age + duration)
        lines.log(
            logging.ERROR if isinstance(outcome, Dead) else logging.INFO,
            "callback.attempted",
            session=taken.session.id,
            attempt=taken.attempt,
            outcome=line.outcome,
            status=status,
            reason=line.reason or None,
            origin=origin,
            next_in=round(delay, 1) if isinstance(outcome, Retry) else None,
            duration_ms=line.duration_ms,
        )
        self._settle(taken, said, _WORDS[type(outcome)], delay, line)

    def _follows(self, taken: Taken, said: Meaning) -> tuple[Meaning, float]:
        """What has become of the callback, and the seconds until its next attempt if there is one."""
        if not isinstance(said, Retry):
            return said, 0.0
        step = next_step(
            said,
            attempt=taken.tries,
            ambiguous=taken.ambiguous or said.arrived,
            running_for=taken.running_for,
            schedule=self._config.callback_schedule,
            dice=random.random(),  # nosec B311  # spreads attempts; nothing is secret about it
        )
        return (step, 0.0) if isinstance(step, (Delivered, Dead)) else (said, step)

    def _send(self, taken: Taken) -> tuple[Meaning, int | None, str]:
        """What came of it, with the status of the answer and the origin it went to."""
        origin = origin_of(taken.session.resume_url)
        sender: Any = gevent.getcurrent()
        try:
            url = self._destinations.of(taken.session.resume_url)
            origin = origin_of(url)
            body = payload(taken.session, taken.attempt)
            named = headers(taken.session.id, body, int(time.time()), self._secrets, self._config.callback_headers)
            self._sending.add(sender)
            with gevent.Timeout(ATTEMPT, SendFailed("no whole answer in time", sent=True)):
                answer = self._outbound.post(url, body, named)
        except SendFailed as failed:
            return Retry(failed.reason, arrived=failed.sent), None, origin
        except DestinationRefused as refused:
            return Dead(f"resumeUrl {refused}"), None, origin
        finally:
            self._sending.discard(sender)
        return meaning(answer, ambiguous=taken.ambiguous), answer.status, origin

    def _settle(self, taken: Taken, said: Meaning, word: Word, delay: float, line: Attempt) -> None:
        until = time.monotonic() + SETTLE
        # Before the store is told: one that is away, or has just lost the session, is told again what came of it.
        self._recall.attempted(taken.session.id, taken.attempt, word)
        while True:
            try:
                self._outbox.settle(
                    taken.session.id,
                    taken.attempt,
                    word,
                    delay=delay,
                    ambiguous=isinstance(said, Retry) and said.arrived,
                    running=isinstance(said, Retry) and said.running,
                    last_answer=line.reason,
                    line=line,
                )
                return
            except StoreUnavailable:
                if time.monotonic() > until:
                    raise
                gevent.sleep(AWAY)


_WORDS: dict[type[Meaning], Word] = {Delivered: "delivered", Retry: "retry", Dead: "dead"}


def _reason(outcome: Meaning, status: int | None) -> str:
    if not isinstance(outcome, Delivered):
        return outcome.reason
    return "" if status is not None and status < 300 else f"n8n answered {status}: an earlier attempt has arrived"
