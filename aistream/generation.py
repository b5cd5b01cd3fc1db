"""Runs the model for a session and writes what it says to the session's log.

One generation per session, held by a lease: a worker that stops renewing it (crash, long pause) loses it, and from then on
the store refuses its writes. The generation does not know whether anyone is watching. It holds everything in memory: a store
that has lost the session is given it anew.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import gevent
import msgspec
from gevent.event import AsyncResult
from gevent.lock import BoundedSemaphore

from aistream import metrics
from aistream.asking import Asking
from aistream.config import Config
from aistream.errors import Overloaded, ProviderFailed, StoreUnavailable
from aistream.estimate import Estimator
from aistream.events import Cursor, End, Ending, Event, Failed, Reasoning, Text, Usage
from aistream.log import Log
from aistream.parse import origin_of
from aistream.providers import Providers
from aistream.pulse import Pulse
from aistream.recall import Recall, Told
from aistream.session import (
    CANCELLED,
    EXPIRED,
    WORKER_LOST,
    Accepted,
    Claimed,
    Elsewhere,
    Ended,
    Fenced,
    Finished,
    IdempotencyKey,
    Missing,
    Outcome,
    Quotas,
    Request,
    Short,
    State,
    state_of,
)
from aistream.sse import Cutter
from aistream.store import AWAY, Intent, Store
from aistream.telemetry import log as lines
from aistream.writer import LogWriter, Storing

SHUTTING_DOWN = Failed("shutting_down", "The server that wrote this answer had to stop.", True)
TOO_LONG = Failed("answer_too_long", "The answer grew beyond the service's limit.", False)
TIMED_OUT = Failed("stream_timeout", "The answer took longer than the service allows.", True)
INTERNAL = Failed("internal", "Something went wrong on our side.", True)

#: Seconds between two notes of which sessions have viewers, for those that are cancelled without any.
WATCH = 1.0


class _Stop(gevent.GreenletExit):
    """Ends a generation from outside. `ending` None: it belongs to somebody else by now."""

    def __init__(self, ending: Ending | None) -> None:
        self.ending = ending


class _OutOfTime(BaseException):
    """MAX_STREAM_SECONDS are over. No Exception: it is thrown into the SDK, which must not take it for one of its own."""


class _TooLong(BaseException):
    """The answer has reached its limit. No Exception: it is raised into the SDK's hands, as `_OutOfTime` is."""


class Generation:
    """One epoch of one session, in one greenlet. `log` is what it has said; `request` what it was asked."""

    def __init__(self, generations: Generations, session_id: str, claimed: Claimed) -> None:
        self.session_id = session_id
        self.claimed = claimed
        self.epoch = claimed.epoch
        self.request = claimed.request
        self.log = Log(session_id)
        self.storing = Storing(self.log, claimed, stored=0)
        #: How it ended, once the store has it.
        self.told: Told | None = None
        self._all = generations
        self._greenlet: gevent.Greenlet[..., None] | None = None
        #: Its ending, on its way to the store: nothing stops it any more.
        self.ending: Ending | None = None
        self._started = time.monotonic()
        self._first_token: float | None = None
        self._usage: Usage | None = None
        self._answer_bytes = 0
        self._max_bytes = generations.config.max_answer_bytes
        #: Its way to an answer.
        # Not by a method of this one: what refers back to its owner is freed by the garbage collector alone.
        written = partial(_written, self.log)
        self.asking = Asking(generations.config, generations.providers, claimed.request, session_id, written)
        self._cutters: dict[type[Text | Reasoning], Cutter] = {Text: Cutter(), Reasoning: Cutter()}

    @property
    def finishing(self) -> bool:
        """Whether it is ending already."""
        return self.ending is not None

    def start(self) -> None:
        """Runs it in a greenlet of its own."""
        self._greenlet = gevent.spawn(self._run)
        self._greenlet.link(self._end)

    def _end(self, _greenlet: object) -> None:
        self._greenlet = None
        self._all.ended(self)

    def stop(self, ending: Ending | None) -> None:
        """Ends it now, unless it is ending already. None: it belongs to somebody else, show nothing more."""
        if self.finishing or self._greenlet is None:
            return
        if ending is None:
            self.log.drop()
        self._greenlet.kill(_Stop(ending), block=False)

    def inherit(self, entries: list[tuple[Cursor, Event]]) -> None:
        """Takes over what earlier epochs and the claim itself have written."""
        for cursor, event in entries:
            if self.log.follows(cursor):
                self.log.append(cursor, event)
        self.storing.stored = len(self.log)

    def finish(self, ending: Ending) -> None:
        """Ends the log and the session. Nothing is shown as ended before the store has it."""
        self.ending = ending
        answered_at = time.monotonic()
        for kind, cutter in self._cutters.items():
            for piece in cutter.end():
                self._append(kind(piece))
        usage = self._usage or self._estimate()
        if isinstance(ending, End):
            self._append(usage)
        asking = self.asking
        outcome = Outcome(
            ending=ending,
            model=asking.call.model,
            usage=usage,
            first_token_ms=None if self._first_token is None else round((self._first_token - self._started) * 1000),
            provider=asking.route.provider,
            queued_ms=round(asking.queued * 1000),
            requests=asking.requests,
            warnings=tuple(asking.left_out()),
        )
        finished = self._commit(ending, outcome)
        if finished is None:
            self.log.drop()
            return
        if finished.state is State.CANCELLED:
            ending, outcome = CANCELLED, msgspec.structs.replace(outcome, ending=CANCELLED)
        self.log.append(finished.ending_id, ending)
        self.told = Told(self.claimed.accepted, self.claimed, self.log, ending, outcome)
        duration_ms = round((time.monotonic() - self._started) * 1000)
        _report(self.session_id, self.epoch, self.request, outcome, finished.ending_id.seq, duration_ms)
        if self.claimed.may_run:
            metrics.generation_ended(
                asking.route.provider,
                asking.route.model,
                "" if state_of(ending) is State.COMPLETED else _reason(ending),
                usage,
                answered_at - self._started,
                None if self._first_token is None else self._first_token - self._started,
                asking.longest_gap,
            )

    def _run(self) -> None:
        try:
            try:
                ending = self._generate() if self.claimed.may_run else CANCELLED if self.claimed.cancelled else WORKER_LOST
            except _Stop as stop:
                if stop.ending is None:
                    return
                ending = stop.ending
            self.finish(ending)
        except _Stop:
            return
        except Exception as error:  # the root of this greenlet: the lease lapses, and another look is taken then
            lines.error("generation.broke", session=self.session_id, error=error)
            self.log.drop()

    def _generate(self) -> Ending:
        try:
            with gevent.Timeout(self._all.config.max_stream_seconds, _OutOfTime):
                return self._ask_provider()
        except _OutOfTime:
            return TIMED_OUT
        except ProviderFailed as failed:
            return Failed(failed.code, failed.message, failed.retryable)
        except Exception as error:  # whatever a provider does, n8n is told how it ended
            lines.error("provider.broke", session=self.session_id, provider=self.asking.route.provider, error=error)
            return INTERNAL

    def _ask_provider(self) -> Ending:
        try:
            return self.asking.answer(self._hear)
        except _TooLong:
            return TOO_LONG

    def _hear(self, event: Text | Reasoning | Usage) -> None:
        if isinstance(event, Usage):
            self._usage = event
        elif not self._say(event):
            raise _TooLong

    def _estimate(self) -> Usage:
        """The usage of an answer whose provider has not said it, or not to the end: what is known, and the rest estimated."""
        estimator, call = self._all.estimator, self.asking.call
        if call.usage is not None:
            return msgspec.structs.replace(call.usage, source="partial")
        if self.claimed.may_run and (call.refused or not self.asking.requests):
            return Usage(0, 0, source="provider")  # nothing was answered, so nothing is billed
        reasoning = estimator.tokens(self.log.reasoning())
        output = estimator.tokens(self.log.answer()) + reasoning
        if call.input is not None:
            usage = msgspec.structs.replace(call.input, output_tokens=output, reasoning_tokens=reasoning, source="partial")
        else:
            asked = sum(map(estimator.tokens, self.request.texts()))
            usage = Usage(asked, output, reasoning_tokens=reasoning, source="estimated")
        return msgspec.structs.replace(usage, estimated_by=estimator.method)

    def _say(self, event: Text | Reasoning) -> bool:
        """Puts an event into the log, in the pieces that the wire can carry. False: its beginning, it is too long."""
        kind: type[Text | Reasoning] = type(event)
        text, fits = event.text, True
        if kind is Text:
            size = len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
            room = self._max_bytes - self._answer_bytes
            self._answer_bytes += size
            if size > room:
                text, fits = _beginning(text, room), False
        cutter = self._cutters[kind]
        if fits and cutter.lets_pass(text):
            self._append(event)
            return True
        for piece in cutter.feed(text):
            self._append(kind(piece))
        return fits

    def _append(self, event: Text | Reasoning | Usage) -> None:
        log = self.log
        if self._all.pulse.doubted():
            self._all.answer_doubt()
        if log.dropped:
            raise _Stop(None)
        cursor = log.next(self.epoch)
        # A log with nothing but `start` proves that nobody has seen anything, so that the session may run again.
        if cursor.seq == 1 and not self._all.writer.write_first(self.storing, cursor, event):
            raise _Stop(None)
        if self._first_token is None and not isinstance(event, Usage):
            self._first_token = time.monotonic()
        log.append(cursor, event)
        self._all.writer.touch(self.storing)

    def _commit(self, ending: Ending, outcome: Outcome) -> Finished | None:
        """The ending in the store, however long the store is away. None: the session is not ours any more."""
        while not self.log.dropped:
            try:
                self._all.writer.flush(self.storing)
                last = self.log.last
                if last is None or self.log.dropped:
                    return None
                result = self._all.store.finish(
                    self.session_id,
                    self.epoch,
                    len(self.log),
                    last.seq + 1,
                    ending,
                    self.log.answer(),
                    outcome,
                    callback_in=self._all.config.callback_schedule[0],
                )
                match result:
                    case Finished():
                        return result
                    case Fenced():
                        lines.warning("generation.lost", session=self.session_id, epoch=self.epoch)
                        return None
                    case Missing():
                        self._all.writer.rewrite(self.storing)
                    case Short():
                        self._reconcile()
            except StoreUnavailable:
                gevent.sleep(AWAY)
        return None

    def _reconcile(self) -> None:
        """The store's log is not ours: a failover lost a part, or we were stopped between sending and noting."""
        # What arrived unheard is ours too: others may have seen it.
        self.inherit(self._all.store.read({self.session_id: self.log.last}).get(self.session_id, []))
        self._all.writer.rewrite(self.storing)


class Generations:
    """The generations of this worker: starts one for a session that may have one, keeps their leases, ends the abandoned."""

    def __init__(
        self,
        config: Config,
        store: Store,
        providers: Providers,
        writer: LogWriter,
        recall: Recall,
        pulse: Pulse,
        estimator: Estimator,
        on_ended: Callable[[str, str], None],
    ) -> None:
        """`on_ended` gets the id of a session that has just ended, and the origin that its callback goes to."""
        self.config = config
        self.store = store
        self.providers = providers
        self.writer = writer
        self.pulse = pulse
        self.estimator = estimator
        self.running: dict[str, Generation] = {}
        #: Nothing begins here any more.
        self.closed = False
        self._recall = recall
        self._on_ended = on_ended
        self._claiming: dict[str, AsyncResult[Generation | Elsewhere | Ended | Missing | None]] = {}
        #: Claims whose answer was lost, with the nonce by which they are known again.
        self._unheard: dict[str, str] = {}
        #: Claims under way that may begin a generation.
        self._beginning = 0
        self._doubting = BoundedSemaphore()
        self._watched_from = 0.0

    @property
    def full(self) -> bool:
        """Whether as many run here as may (MAX_STREAMS_PER_WORKER)."""
        return len(self.running) + self._beginning >= self.config.max_streams_per_worker

    def accept(
        self,
        session_id: str,
        subject: str,
        request: Request,
        resume_url: str,
        key: IdempotencyKey | None = None,
        quotas: Quotas | None = None,
    ) -> Accepted | None:
        """A new session, or the one that `key` has begun; None where it has begun one for another body.

        It waits for its first viewer, unless it is to start immediately. Raises Limited and StoreUnavailable.
        """
        full = self.full
        if full and key is None:
            raise Overloaded
        accepted = self.store.create(session_id, subject, request, resume_url, key, quotas, room=not full)
        if accepted is None or accepted.id != session_id:
            return accepted
        self._recall.accepted(accepted)
        metrics.session_accepted()
        if request.immediate:
            with suppress(StoreUnavailable, Overloaded):  # it is accepted: its first viewer starts it, or its deadline
                self.claim(session_id)
        return accepted

    def claim(self, session_id: str) -> Generation | Elsewhere | Ended | Missing:
        """The session's generation if it runs here, started if it was pending; else where it stands.

        One question to the store for any number of viewers that come at the same moment. Raises StoreUnavailable, and Overloaded
        where it is pending and there is no room for it.
        """
        while True:
            generation = self.running.get(session_id)
            if generation is not None and not generation.log.dropped:
                return generation
            full = self.full
            found = self._ask(session_id, "confirm" if full else "open")
            if found is not None:
                return found
            if self.closed:
                raise StoreUnavailable  # it is pending, and waits for another worker
            if full:
                raise Overloaded

    def close(self) -> None:
        """Lets nothing begin here any more: the worker exits soon. What runs, or has ended, can still be watched."""
        self.closed = True

    def _ask(self, session_id: str, intent: Intent) -> Generation | Elsewhere | Ended | Missing | None:
        asked = self._claiming.get(session_id)
        if asked is not None:
            return asked.get()
        asked = self._claiming[session_id] = AsyncResult()
        nonce = self._unheard.setdefault(session_id, uuid.uuid4().hex)
        closed = self.closed
        beginning = not closed and intent != "confirm"
        self._beginning += beginning
        try:
            claim = self.store.claim(session_id, "confirm" if closed else intent, nonce=nonce)
            if not isinstance(claim, Claimed):
                found: Generation | Elsewhere | Ended | Missing | None = claim
            elif closed:
                found = Elsewhere(self.store.worker)  # claimed before, unheard: its lease lapses, and another takes it over
            else:
                found = self._begin(session_id, claim)
            del self._unheard[session_id]
            asked.set(found)
            return found
        except BaseException as error:
            asked.set_exception(error if isinstance(error, Exception) else StoreUnavailable())
            raise
        finally:
            self._beginning -= beginning
            del self._claiming[session_id]

    def recover(self, session_id: str) -> None:
        """Takes over a session whose worker let its lease lapse: runs it again if nobody saw anything, else ends it."""
        found = self._ask(session_id, "recover")
        if isinstance(found, Generation):
            claimed = found.claimed
            metrics.session_recovered()
            lines.warning("session.recovered", session=session_id, epoch=claimed.epoch, rerun=claimed.may_run)

    def confirm(self) -> None:
        """Asks again for claims whose answer was lost: one that had arrived is a lease that nobody makes use of."""
        for session_id in list(self._unheard):
            self._ask(session_id, "confirm")

    def expire(self, session_id: str) -> None:
        """Ends a pending session that nobody came for, or that somebody has stopped. One that waits for nobody is begun."""
        accepted = self.store.pending(session_id)
        if accepted is None:
            return
        if accepted.request.immediate:
            self._ask(session_id, "open")
            return
        outcome = Outcome(EXPIRED, accepted.request.model, Usage(0, 0, source="provider"))
        first = self.config.callback_schedule[0]
        finished = self.store.finish(session_id, 0, 0, 0, EXPIRED, "", outcome, callback_in=first)
        if isinstance(finished, Finished):
            ending: Ending = CANCELLED if finished.state is State.CANCELLED else EXPIRED
            outcome = msgspec.structs.replace(outcome, ending=ending)
            log = Log(session_id)
            log.append(finished.ending_id, ending)
            self._recall.ended(Told(accepted, None, log, ending, outcome))
            _report(session_id, 0, accepted.request, outcome, 0, 0)
            self._on_ended(session_id, origin_of(accepted.resume_url))

    def cancel(self, session_id: str) -> State | Missing:
        """Stops the session, wherever it runs. Gives its state: an ending, or `running` while that is still to come.

        Raises StoreUnavailable, unless it runs here and has not ended otherwise: then the provider is let go at once, and the
        rest happens when the store is back.
        """
        generation = self.running.get(session_id)
        if generation is not None:
            generation.stop(CANCELLED)
        try:
            state = self.store.cancel(session_id)
        except StoreUnavailable:
            if generation is None or generation.ending not in (None, CANCELLED):
                raise
            return State.RUNNING
        if state is State.PENDING:
            self.expire(session_id)
            return State.CANCELLED
        return state

    def stop_cancelled(self) -> None:
        """Stops what others have stopped. Raises StoreUnavailable."""
        if self.running:
            for session_id in self.store.stopped():
                if session_id in self.running:
                    self.running[session_id].stop(CANCELLED)

    def end_silences(self) -> None:
        """Ends the calls of providers that have been silent for too long."""
        now = time.monotonic()
        for generation in list(self.running.values()):
            generation.asking.check(now)

    def stop_unwatched(self, watched: set[str]) -> None:
        """Cancels the sessions that want it and have had no viewer for their time. `watched`: those with viewers here.

        Raises StoreUnavailable.
        """
        mine = {
            session_id: generation.request.disconnect_grace
            for session_id, generation in self.running.items()
            if generation.request.disconnect_grace is not None and session_id not in watched
        }
        if not mine and not watched:
            return
        now = time.monotonic()
        try:
            alone = self.store.watched(watched, set(mine))
        except StoreUnavailable:
            # Nobody could note a viewer meanwhile: when the store is back, all get the time to do so first.
            self._watched_from = float("inf")
            raise
        if self._watched_from == float("inf") or self.pulse.doubted():
            self._watched_from = now + 3 * WATCH
        if now < self._watched_from:
            return
        for session_id, seconds in alone.items():
            generation = self.running.get(session_id)
            grace = mine[session_id]
            if generation is not None and grace is not None and seconds is not None and seconds >= grace + WATCH:
                lines.info("session.unwatched", session=session_id, seconds=round(seconds, 1))
                generation.stop(CANCELLED)

    def renew(self) -> None:
        """Renews the leases of all that runs here; what has another owner is stopped, what is lost written anew.

        Raises StoreUnavailable.
        """
        doubts = self.pulse.doubts
        held = {session_id: generation.storing.holding for session_id, generation in self.running.items()}
        verdicts = self.store.renew(held)
        for session_id, verdict in verdicts.items():
            generation = self.running.get(session_id)
            if generation is None or generation.epoch != held[session_id].epoch or generation.finishing:
                continue  # the ending finds out for itself
            if verdict in ("gone", "short"):
                self.writer.rewrite(generation.storing)
            if verdict == "fenced" or generation.log.dropped:
                generation.stop(None)
        self.pulse.answer(doubts)

    def answer_doubt(self) -> None:
        """Returns when the store has said whose the sessions are, however long it is away: until then nothing new is shown."""
        with self._doubting:
            while self.pulse.doubted():
                try:
                    self.renew()
                except StoreUnavailable:
                    gevent.sleep(AWAY)

    def ended(self, generation: Generation) -> None:
        """A generation's greenlet is over."""
        if self.running.get(generation.session_id) is generation:
            del self.running[generation.session_id]
        if generation.told is not None:
            self._recall.ended(generation.told)
            self._on_ended(generation.session_id, origin_of(generation.claimed.accepted.resume_url))

    def _begin(self, session_id: str, claimed: Claimed) -> Generation:
        self._recall.claimed(session_id)
        generation = Generation(self, session_id, claimed)
        if claimed.epoch == 1:
            generation.inherit([(Cursor(1, 0), claimed.accepted.start)])
        else:
            generation.inherit(self.store.read({session_id: None}).get(session_id, []))
        self.running[session_id] = generation
        generation.start()
        return generation


def _report(session_id: str, epoch: int, request: Request, outcome: Outcome, events: int, duration_ms: int) -> None:
    ending = outcome.ending
    provider = outcome.provider or request.provider
    reason = _reason(ending)
    metrics.session_ended(state_of(ending).value, reason, provider, outcome.usage)
    lines.info(
        "session.ended",
        session=session_id,
        epoch=epoch,
        state=state_of(ending).value,
        reason=reason,
        provider=provider,
        model=outcome.model,
        requests=outcome.requests,
        events=events,
        input_tokens=outcome.usage.input_tokens,
        output_tokens=outcome.usage.output_tokens,
        usage_source=outcome.usage.source,
        first_token_ms=outcome.first_token_ms,
        queued_ms=outcome.queued_ms,
        duration_ms=duration_ms,
    )


def _reason(ending: Ending) -> str:
    return ending.code if isinstance(ending, Failed) else ending.finish_reason


def _written(log: Log) -> list[str]:
    return [log.answer(), log.reasoning()]


def _beginning(text: str, size: int) -> str:
    """As many of its first characters as have no more than `size` bytes."""
    raw = text.encode("utf-8", "surrogatepass")
    while raw[size] & 0xC0 == 0x80:  # in the middle of a character
        size -= 1
    return raw[:size].decode("utf-8", "surrogatepass")
