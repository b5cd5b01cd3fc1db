"""Starts and stops a worker's loops: log writer, follower, heartbeats, leases, deadlines, stops, recall; and drains a worker.

Nothing here starts at import: gunicorn calls `start` after fork and patch, `flask run` at the first request.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import gevent
from gevent.event import Event as Signal

from aistream import metrics
from aistream.asking import watch_period
from aistream.config import Config
from aistream.delivery import Delivery
from aistream.errors import StoreUnavailable
from aistream.follower import Follower
from aistream.generation import SHUTTING_DOWN, WATCH, Generations
from aistream.meter import Meter
from aistream.providers import Providers
from aistream.pulse import Pulse
from aistream.recall import Recall
from aistream.session import State
from aistream.store import NO_PLACES, Due, Places, Store
from aistream.telemetry import log as lines
from aistream.viewing import Viewing
from aistream.writer import LogWriter

#: Seconds between two looks at the deadlines.
POLL = 0.5
#: Seconds for the last answers to leave, once everything is done.
LAST_BYTES = 0.1
#: Seconds for what is left to be recorded when the drain's time is over.
LAST_WORDS = 5.0


class Background:
    """The loops of one worker, and its way out."""

    def __init__(
        self,
        config: Config,
        store: Store,
        providers: Providers,
        writer: LogWriter,
        follower: Follower,
        recall: Recall,
        pulse: Pulse,
        generations: Generations,
        viewing: Viewing,
        delivery: Delivery,
        meter: Meter,
    ) -> None:
        #: What the worker is measured by.
        self.meter = meter
        self.draining = False
        #: Requests that are being answered now; a stream counts as a viewer instead.
        self.requests = 0
        self._drained = Signal()
        self._away_since: float | None = None
        self._config = config
        self._store = store
        self._providers = providers
        self._recall = recall
        self._pulse = pulse
        self._generations = generations
        self._viewing = viewing
        self._delivery = delivery
        self._loops: list[gevent.Greenlet[..., None]] = []
        self._runs: list[Callable[[], None]] = [
            writer.run,
            follower.run,
            meter.run,
            self._heartbeats,
            self._ticks,
            self._check_store,
            partial(self._repeat, "deadlines", partial(delivery.rest, POLL), self._look_at_deadlines),
            *(
                partial(self._repeat, name, partial(gevent.sleep, period), work)
                for name, period, work in (
                    ("renewal", config.lease_seconds / 3, generations.renew),
                    ("attempts", config.lease_seconds / 3, delivery.hold),
                    ("stops", POLL / 2, generations.stop_cancelled),
                    ("silences", watch_period(config), generations.end_silences),
                    ("viewers", WATCH, lambda: generations.stop_unwatched(viewing.take_watched())),
                    ("claims", POLL, generations.confirm),
                    ("recall", POLL, recall.step),
                )
            ),
        ]

    def start(self) -> None:
        """Starts the loops, once."""
        if not self._loops and not self.draining:
            self._loops = [gevent.spawn(run) for run in self._runs]
            self._providers.warm_up()
            estimator = self._generations.estimator
            estimator.load()
            if estimator.reason:
                lines.debug("tokens.estimated_by", method=estimator.method, reason=estimator.reason)
            else:
                lines.info("tokens.estimated_by", method=estimator.method)

    def stop(self) -> None:
        """Ends the loops at once. What was running here is recovered by another worker, as after a crash."""
        gevent.killall(self._loops)
        self._loops = []

    def drain(self) -> None:
        """Lets everything finish for up to DRAIN_SECONDS; what is left ends as failed, with its partial answer.

        A callback that is still being sent then is left to another worker.

        Returns when that is done, to every caller.
        """
        if self.draining:
            self._drained.wait()
            return
        self.draining = True
        began = time.monotonic()
        metrics.drain_began(time.time())
        # What begins late is likely to be cut: in the second half nothing does, and once all is done nothing does either.
        self._wait_until_idle(began + self._config.drain_seconds / 2)
        self._generations.close()
        self._wait_until_idle(began + self._config.drain_seconds)
        cut = list(self._generations.running.values())
        for generation in cut:
            generation.stop(SHUTTING_DOWN)
        if cut:
            self._wait_until_idle(time.monotonic() + LAST_WORDS)
        if len(self._recall):
            # What the store has lost goes for good with the worker that knows it: it is asked once more.
            with suppress(StoreUnavailable):
                self._look(NO_PLACES)
            until = time.monotonic() + self._config.lease_seconds / 3 + LAST_WORDS
            while self._recall.telling and time.monotonic() < until:
                gevent.sleep(0.05)
        given_up = self._delivery.give_up()
        if given_up:
            self._wait_until_idle(time.monotonic() + 1.0)  # what came of them is recorded
        gevent.sleep(LAST_BYTES)
        duration_ms = round((time.monotonic() - began) * 1000)
        metrics.drain_ended(len(cut), given_up)
        self.meter.note()  # what was counted since it last did
        lines.info("worker.drained", cut=len(cut), callbacks_given_up=given_up, duration_ms=duration_ms)
        self.stop()
        self._providers.close()
        self._drained.set()

    def _wait_until_idle(self, until: float) -> None:
        while self._is_busy() and time.monotonic() < until:
            gevent.sleep(0.05)

    def _is_busy(self) -> bool:
        forgotten = self._recall.telling or (self._away_since is not None and len(self._recall))
        return bool(self._generations.running or len(self._delivery) or len(self._viewing) or self.requests or forgotten)

    def _heartbeats(self) -> None:
        self._viewing.beat(lambda: min(1.0, self._config.heartbeat_seconds / 4))

    def _ticks(self) -> None:
        while True:
            gevent.sleep(self._pulse.period)
            if self._pulse.doubted():
                lines.warning("worker.was_stopped")
                self._generations.answer_doubt()

    def _check_store(self) -> None:
        """Says, as soon as Redis answers, what it is, and what would make it lose sessions."""
        while True:
            try:
                nature = self._store.nature()
                break
            except StoreUnavailable:
                gevent.sleep(POLL)
        if nature is None:
            return
        evicts = nature.maxmemory_policy != "noeviction"
        advice = ["set maxmemory-policy to noeviction: Redis may drop sessions when it is full"] if evicts else []
        if not nature.append_only:
            advice.append("set appendonly to yes: a Redis that restarts without its data forgets what no worker knows")
        (lines.warning if evicts else lines.info)("store.checked", **nature._asdict(), **({"advice": advice} if advice else {}))

    def _repeat(self, name: str, rest: Callable[[], object], work: Callable[[], None]) -> None:
        # At once for the first time: a store that is new to the first look, after a session was stored, has been emptied.
        while True:
            try:
                work()
            except StoreUnavailable as error:
                self._note_away(error)
            except Exception as error:  # the root of a loop: it goes on
                lines.error("background.failed", during=name, error=error)
            rest()

    def _note_away(self, error: StoreUnavailable) -> None:
        """One line for an outage, however many loops meet it and however long it lasts."""
        if self._away_since is None:
            self._away_since = time.monotonic()
            metrics.store_away()
            # Such as a refused connection, a wrong password, a certificate with another name: it has nothing of a session in it.
            lines.warning("store.away", reason=str(error.__cause__ or error))

    def _look(self, places: Places) -> list[Due]:
        """What is due; nothing where the store has lost writes, which it is told again first. Raises StoreUnavailable."""
        look = self._store.due(places)
        self._delivery.looked(look.more)
        if self._away_since is not None:
            away = time.monotonic() - self._away_since
            metrics.store_back(away)
            lines.warning("store.back", away_ms=round(away * 1000))
            self._away_since = None
        if look.lost:
            # What is owed first: nobody may act on what the store says before it has been told what it lost.
            (lines.warning if len(self._recall) or self._generations.running else lines.debug)("store.lost_writes")
            self._recall.doubt()
            self._generations.renew()
            return []
        return look.due

    def _look_at_deadlines(self) -> None:
        for session_id, state, origin in self._look(NO_PLACES if self._recall.behind else self._delivery.places):
            if state is State.PENDING:
                self._generations.expire(session_id)
            elif state is State.RUNNING:
                if session_id not in self._generations.running:
                    self._generations.recover(session_id)
            else:
                self._delivery.wake(session_id, origin)
