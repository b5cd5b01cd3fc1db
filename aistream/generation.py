"""Runs the model for a session and writes what it says to the session's log.

One generation per session, held by a lease: a worker that stops renewing it (crash, long pause) loses it, and from then on
the store refuses its writes. The generation does not know whether anyone is watching.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import cast

import gevent
from gevent.event import AsyncResult

from aistream.config import Config
from aistream.errors import ProviderFailed, StoreUnavailable
from aistream.events import Cursor, End, Ending, Event, Failed, Reasoning, Start, Text, Usage
from aistream.log import Log
from aistream.providers import Providers
from aistream.providers.base import Model
from aistream.session import (
    EXPIRED,
    WORKER_LOST,
    Claimed,
    Elsewhere,
    Ended,
    Fenced,
    Finished,
    Missing,
    Outcome,
    Request,
    Short,
    state_of,
)
from aistream.sse import Cutter
from aistream.store import AWAY, Store
from aistream.telemetry import log as lines
from aistream.writer import LogWriter, Storing

SHUTTING_DOWN = Failed("shutting_down", "The server that wrote this answer had to stop.", True)
TOO_LONG = Failed("answer_too_long", "The answer grew beyond the service's limit.", False)
TIMED_OUT = Failed("stream_timeout", "The answer took longer than the service allows.", True)
INTERNAL = Failed("internal", "Something went wrong on our side.", True)


class _Stop(gevent.GreenletExit):
    """Ends a generation from outside. `ending` None: it belongs to somebody else by now."""

    def __init__(self, ending: Ending | None) -> None:
        self.ending = ending


class _OutOfTime(BaseException):
    """MAX_STREAM_SECONDS are over. No Exception: it is thrown into the SDK, which must not take it for one of its own."""


class Generation:
    """One epoch of one session, in one greenlet. `log` is what it has said; `request` what it was asked."""

    def __init__(self, generations: Generations, session_id: str, claimed: Claimed) -> None:
        self.session_id = session_id
        self.epoch = claimed.epoch
        self.request = claimed.request
        self.log = Log(session_id)
        self.storing = Storing(self.log, self.epoch, stored=0)
        self._all = generations
        self._may_run = claimed.may_run
        self._greenlet: gevent.Greenlet[..., None] | None = None
        self._finishing = False
        self._started = time.monotonic()
        self._first_token: float | None = None
        self._usage: Usage | None = None
        self._answer_bytes = 0
        self._model = Model(claimed.request.model)
        self._cutters: dict[type[Text | Reasoning], Cutter] = {Text: Cutter(), Reasoning: Cutter()}

    def start(self) -> None:
        """Runs it in a greenlet of its own."""
        self._greenlet = gevent.spawn(self._run)
        self._greenlet.link(lambda _: self._all.ended(self))

    def stop(self, ending: Ending | None) -> None:
        """Ends it now, unless it is ending already. None: it belongs to somebody else, show nothing more."""
        if self._finishing or self._greenlet is None:
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
        self._finishing = True
        for kind, cutter in self._cutters.items():
            for piece in cutter.end():
                self._append(kind(piece))
        usage = self._usage or _estimate(self.request, self.log.answer())
        if isinstance(ending, End):
            self._append(usage)
        outcome = Outcome(
            ending=ending,
            model=self._model.name,
            usage=usage,
            first_token_ms=None if self._first_token is None else round((self._first_token - self._started) * 1000),
        )
        ending_id = self._commit(ending, outcome)
        if ending_id is None:
            self.log.drop()
            return
        self.log.append(ending_id, ending)
        duration_ms = round((time.monotonic() - self._started) * 1000)
        _report(self.session_id, self.epoch, self.request, outcome, ending_id.seq, duration_ms)

    def _run(self) -> None:
        try:
            try:
                ending = self._generate() if self._may_run else WORKER_LOST
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
            lines.warning(
                "provider.failed",
                session=self.session_id,
                provider=self.request.provider,
                code=failed.code,
                **failed.log_detail,
            )
            return Failed(failed.code, failed.message, failed.retryable)
        except Exception as error:  # whatever a provider does, n8n is told how it ended
            lines.error("provider.broke", session=self.session_id, provider=self.request.provider, error=error)
            return INTERNAL

    def _ask_provider(self) -> Ending:
        events = self._all.providers[self.request.provider].stream(self.request, self._model)
        try:
            for event in events:
                if isinstance(event, End):
                    return event
                if isinstance(event, Usage):
                    self._usage = event
                elif not self._say(event):
                    return TOO_LONG
        finally:
            close: Callable[[], None] = getattr(events, "close", lambda: None)
            close()
        return INTERNAL

    def _say(self, event: Text | Reasoning) -> bool:
        """Puts an event into the log, in the pieces that the wire can carry. False: the answer would be too long."""
        kind: type[Text | Reasoning] = type(event)
        if isinstance(event, Text):
            self._answer_bytes += len(event.text.encode("utf-8", "surrogatepass"))
            if self._answer_bytes > self._all.config.max_answer_bytes:
                return False
        for piece in self._cutters[kind].feed(event.text):
            self._append(kind(piece))
        return True

    def _append(self, event: Text | Reasoning | Usage) -> None:
        log = self.log
        if log.dropped:
            raise _Stop(None)
        last = log.last
        cursor = Cursor(self.epoch, last.seq + 1 if last is not None and last.epoch == self.epoch else 0)
        # A log with nothing but `start` proves that nobody has seen anything, so that the session may run again.
        if cursor.seq == 1 and not self._all.writer.write_first(self.storing, cursor, event):
            raise _Stop(None)
        if self._first_token is None and not isinstance(event, Usage):
            self._first_token = time.monotonic()
        log.append(cursor, event)
        self._all.writer.touch(self.storing)

    def _commit(self, ending: Ending, outcome: Outcome) -> Cursor | None:
        """The ending in the store, however long the store is away. None: the session is not ours any more."""
        while not self.log.dropped:
            try:
                self._all.writer.flush(self.storing)
                last = self.log.last
                if last is None:
                    return None
                result = self._all.store.finish(self.session_id, self.epoch, last.seq + 1, ending, self.log.answer(), outcome)
                match result:
                    case Finished(ending_id):
                        return ending_id
                    case Fenced() | Missing():
                        lines.warning("generation.lost", session=self.session_id, epoch=self.epoch, why=type(result).__name__)
                        return None
                    case Short(last_id):
                        self._reconcile(last_id)
            except StoreUnavailable:
                gevent.sleep(AWAY)
        return None

    def _reconcile(self, stored: Cursor | None) -> None:
        """The store's log ends elsewhere than ours: a failover lost its tail, or we were stopped between sending and noting."""
        if stored is None or stored.epoch != self.epoch:
            self.log.drop()
            return
        self.storing.stored = min(self.log.position(stored), len(self.log))
        if self.log.last is not None and stored > self.log.last:
            self.inherit(self._all.store.read({self.session_id: self.log.last}).get(self.session_id, []))


class Generations:
    """The generations of this worker: starts one for a session that may have one, keeps their leases, ends the abandoned."""

    def __init__(
        self, config: Config, store: Store, providers: Providers, writer: LogWriter, on_ended: Callable[[str], None]
    ) -> None:
        """`on_ended` gets the id of a session whose callback has just become due."""
        self.config = config
        self.store = store
        self.providers = providers
        self.writer = writer
        self.running: dict[str, Generation] = {}
        self._on_ended = on_ended
        self._claiming: dict[str, AsyncResult[Generation | Elsewhere | Ended | Missing]] = {}

    def claim(self, session_id: str) -> Generation | Elsewhere | Ended | Missing:
        """The session's generation if it runs here, started if it was pending; else where it stands.

        One question to the store for any number of viewers that come at the same moment. Raises StoreUnavailable.
        """
        generation = self.running.get(session_id)
        if generation is not None and not generation.log.dropped:
            return generation
        asked = self._claiming.get(session_id)
        if asked is not None:
            return cast("Generation | Elsewhere | Ended | Missing", asked.get())
        asked = self._claiming[session_id] = AsyncResult()
        try:
            claim = self.store.claim(session_id)
            found = self._begin(session_id, claim) if isinstance(claim, Claimed) else claim
            asked.set(found)
            return found
        except BaseException as error:
            asked.set_exception(error if isinstance(error, Exception) else StoreUnavailable())
            raise
        finally:
            del self._claiming[session_id]

    def recover(self, session_id: str) -> None:
        """Takes over a session whose worker let its lease lapse: runs it again if nobody saw anything, else ends it."""
        claim = self.store.claim(session_id, recover=True)
        if isinstance(claim, Claimed):
            lines.warning("session.recovered", session=session_id, epoch=claim.epoch, rerun=claim.may_run)
            self._begin(session_id, claim)

    def expire(self, session_id: str) -> None:
        """Ends a pending session that nobody came for."""
        request = self.store.request(session_id)
        if request is None:
            return
        outcome = Outcome(EXPIRED, request.model, Usage(0, 0, source="provider"))
        if isinstance(self.store.finish(session_id, 0, 0, EXPIRED, "", outcome), Finished):
            _report(session_id, 0, request, outcome, 0, 0)
            self._on_ended(session_id)

    def renew(self) -> None:
        """Renews the leases of all that runs here; what was lost meanwhile is stopped. Raises StoreUnavailable."""
        epochs = {session_id: generation.epoch for session_id, generation in self.running.items()}
        for session_id, verdict in self.store.renew(epochs).items():
            generation = self.running.get(session_id)
            if verdict != "owner" and generation is not None:
                generation.stop(None)

    def ended(self, generation: Generation) -> None:
        """A generation's greenlet is over."""
        if self.running.get(generation.session_id) is generation:
            del self.running[generation.session_id]
        if generation.log.ended:
            self._on_ended(generation.session_id)

    def _begin(self, session_id: str, claimed: Claimed) -> Generation:
        generation = Generation(self, session_id, claimed)
        if claimed.epoch == 1:
            request = claimed.request
            generation.inherit([(Cursor(1, 0), Start(session_id, request.model, request.provider))])
        else:
            generation.inherit(self.store.read({session_id: None}).get(session_id, []))
        self.running[session_id] = generation
        generation.start()
        return generation


def _estimate(request: Request, answer: str) -> Usage:
    """Tokens by the rule of thumb of four characters each, where the provider gave no figures."""
    said = sum(len(message.content) for message in request.conversation()) + len(request.system or "")
    return Usage(-(-said // 4), -(-len(answer) // 4), source="estimated")


def _report(session_id: str, epoch: int, request: Request, outcome: Outcome, events: int, duration_ms: int) -> None:
    ending = outcome.ending
    lines.info(
        "session.ended",
        session=session_id,
        epoch=epoch,
        state=state_of(ending).value,
        reason=ending.code if isinstance(ending, Failed) else ending.finish_reason,
        provider=request.provider,
        model=outcome.model,
        events=events,
        input_tokens=outcome.usage.input_tokens,
        output_tokens=outcome.usage.output_tokens,
        first_token_ms=outcome.first_token_ms,
        duration_ms=duration_ms,
    )
