"""Asks models for an answer until one begins: retries with back-off, then the fallbacks in their order, in one time budget.

All of it happens before the first token. From then on nothing is retried or spliced: what a viewer has seen of one model is
never followed by another's words.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from random import random

import gevent
from gevent.hub import get_hub

from aistream import metrics
from aistream.config import Config
from aistream.errors import ProviderFailed
from aistream.events import End, Reasoning, Text, Usage
from aistream.providers import Providers, failures
from aistream.providers.base import Call, Say
from aistream.providers.failures import FIRST_TOKEN, SILENCE
from aistream.session import Request, Route
from aistream.telemetry import log as lines

#: Longest Retry-After in seconds that is waited for; beyond it another model is the better choice.
PATIENCE = 10.0
#: A wait is varied by up to this share, so that those that failed together do not come back together.
JITTER = 0.2


class _Silent(BaseException):
    """The provider has said nothing for too long. No Exception: it is thrown into the SDK, which must not take it for its own."""


def watch_period(config: Config) -> float:
    """Seconds between two checks: a share of the shortest silence that ends anything."""
    limits = [endpoint.limits for endpoint in config.endpoints]
    own = [seconds for limit in limits for seconds in (limit.first_token_seconds, limit.silence_seconds) if seconds is not None]
    return min(1.0, min([config.first_token_seconds, config.reasoning_first_token_seconds, config.silence_seconds, *own]) / 4)


def next_wait(failure: ProviderFailed, retries: int, *, allowed: int, backoff: float, left: float, dice: float) -> float | None:
    """Seconds until the same model is asked again, or None where it is not.

    `retries` were made of `allowed`; `left`: seconds of the budget. The provider's Retry-After is a lower bound. `dice` in 0..1
    gives the jitter of ±20 %.
    """
    if not failure.again or retries >= allowed:
        return None
    wait = backoff * 2.0**retries * (1 - JITTER + 2 * JITTER * dice)
    if failure.retry_after is not None:
        if failure.retry_after > PATIENCE:
            return None
        wait = max(wait, failure.retry_after)
    return wait if wait < left else None


class Asking:
    """One generation's way to its answer. `session_id` is for the log lines, which show nothing of what `written` gives."""

    def __init__(
        self, config: Config, providers: Providers, request: Request, session_id: str, written: Callable[[], list[str]]
    ) -> None:
        self._config = config
        self._providers = providers
        self._request = request
        self._session_id = session_id
        self._written = written
        self._greenlet: gevent.Greenlet[..., None] | None = None
        #: The model that is asked, and what is known of its answer.
        self.route = request.routes[0]
        self.call = Call(request, request.model)
        #: Requests of earlier calls, and seconds spent in providers' queues.
        self._requests = 0
        self.queued = 0.0
        self._began = time.monotonic()
        #: The first token is there.
        self.begun = False
        #: Seconds of the longest silence since then, as far as `check` has met it.
        self.longest_gap = 0.0
        # When the provider must have said something (`time.monotonic()`), while it is listened to.
        self._first_token_by = self._thought_by = 0.0
        self._silence = 0.0
        self._listening = False

    @property
    def requests(self) -> int:
        """How many were sent to providers."""
        return self._requests + self.call.requests

    def answer(self, say: Say) -> End:
        """Says what the first model that begins to answer says, and gives its end.

        Raises ProviderFailed: that of the model that broke off, or, where none began, the last one that another try might mend.
        To be iterated in a greenlet, which `check` ends the silence of.
        """
        self._greenlet = gevent.getcurrent()  # type: ignore[assignment]  # a Greenlet: a generation runs in one of its own
        budget = self._budget()
        failed: list[tuple[ProviderFailed, Route, Call]] = []
        for route in self._request.routes:
            if failed:
                if self._left(budget) <= 0:
                    break
                metrics.provider_fell_back(self.route.provider)
                lines.info("provider.fallback", session=self._session_id, provider=route.provider, model=route.model)
            try:
                return self._ask(route, budget, say)
            except ProviderFailed as failure:
                if self.begun:
                    raise
                failed.append((failure, route, self.call))
        requests = self.requests
        told, self.route, self.call = next((one for one in reversed(failed) if one[0].retryable), failed[0])
        self._requests = requests - self.call.requests
        raise told

    def check(self, now: float) -> None:
        """Ends a silence that has lasted too long. Called from time to time, from another greenlet."""
        if self._listening and self.begun:
            self.longest_gap = max(self.longest_gap, now - self.call.heard_at)
        if self._listening and now > self._deadline():
            # In the hub: what was about to be heard in this moment is heard first.
            get_hub().loop.run_callback(self._break_silence)

    def left_out(self) -> list[str]:
        """What of the request the model that answered was not sent, since it does not take it."""
        names = {_REQUESTED.get(name, name) for name in self.call.left_out}
        given = ("temperature", "top_p", "stop", "reasoning_effort")
        asked = [name for name in given if getattr(self._request, name) not in (None, ())]
        found = [f"{name} was not sent: {self.route.model} does not take it" for name in asked if name in names]
        if self.call.whole and self.call.answered:
            found.append(f"the answer came in one piece: {self.route.model} may not be streamed with this key")
        return found

    def _budget(self) -> float:
        first = self._request.routes[0]
        own = self._providers.first_token_seconds(first, self._request) if self._providers.known(first.provider) else 0.0
        return max(self._config.first_token_budget_seconds, own)

    def _left(self, budget: float) -> float:
        """Seconds of it. Time in a queue does not count."""
        return self._began + self.queued + budget - time.monotonic()

    def _turn_to(self, route: Route) -> Call:
        self._requests += self.call.requests
        self.route = route
        self.call = Call(self._request, route.model, self._providers.secret(route.provider), self._written)
        return self.call

    def _ask(self, route: Route, budget: float, say: Say) -> End:
        self._turn_to(route)
        if not self._providers.known(route.provider):
            raise ProviderFailed("provider_not_configured", "The service no longer has this model's provider.", retryable=False)
        bulkhead = self._providers.bulkhead(route.provider)
        asked = time.monotonic()
        waits = not bulkhead.free
        try:
            bulkhead.enter()
        except ProviderFailed as failure:
            self._report(failure, None)
            raise
        finally:
            if waits:
                waited = time.monotonic() - asked
                self.queued += waited
                metrics.provider_queued(route.provider, waited)
        try:
            return self._attempts(route, budget, say)
        finally:
            bulkhead.leave()

    def _attempts(self, route: Route, budget: float, say: Say) -> End:
        retries = 0
        while True:
            try:
                return self._attempt(route, budget, say)
            except ProviderFailed as failure:
                wait = None
                if not self.begun:
                    wait = next_wait(
                        failure,
                        retries,
                        allowed=self._config.provider_retries,
                        backoff=self._config.provider_backoff_seconds,
                        left=self._left(budget),
                        dice=random(),  # nosec B311  # spreads retries; nothing is secret about it
                    )
                self._report(failure, wait)
                if wait is None:
                    raise
                retries += 1
                metrics.provider_retried(route.provider)
                gevent.sleep(wait)

    def _attempt(self, route: Route, budget: float, say: Say) -> End:
        call = self._turn_to(route)
        began = time.monotonic()
        self._first_token_by = began + min(self._providers.first_token_seconds(route, self._request), self._left(budget))
        self._thought_by = began + self._config.reasoning_first_token_seconds
        self._silence = self._providers.silence_seconds(route.provider)
        outcome = "stopped"

        def hear(event: Text | Reasoning | Usage) -> None:
            self._listening = False
            if not self.begun and not isinstance(event, Usage):
                self.begun = True
                metrics.provider_began(route.provider, route.model, time.monotonic() - began)
            say(event)
            # What happened to the event may have taken long; the provider is not to blame.
            call.heard_at = time.monotonic()
            self._listening = True

        try:
            self._listening = True
            ending = self._providers.answer(route, self._request, call, hear)
            outcome = "answered"
            return ending
        except _Silent:
            outcome = SILENCE.code if self.begun else FIRST_TOKEN.code
            # Asking a model again that has let its time pass would cost that time once more.
            raise failures.failed(SILENCE if self.begun else FIRST_TOKEN, again=False) from None
        except ProviderFailed as failure:
            outcome = failure.code
            raise
        finally:
            self._listening = False
            metrics.provider_asked(route.provider, route.model, outcome, time.monotonic() - began)

    def _deadline(self) -> float:
        if self.begun:
            return self.call.heard_at + self._silence
        if self.call.whole:
            return float("inf")  # an answer in one piece takes as long as it takes: MAX_STREAM_SECONDS bounds it
        return max(self._first_token_by, self._thought_by) if self.call.thinks else self._first_token_by

    def _break_silence(self) -> None:
        if self._listening and self._greenlet is not None and time.monotonic() > self._deadline():
            self._listening = False
            self._greenlet.throw(_Silent())

    def _report(self, failure: ProviderFailed, wait: float | None) -> None:
        lines.warning(
            "provider.failed",
            session=self._session_id,
            provider=self.route.provider,
            model=self.route.model,
            code=failure.code,
            retry_in_ms=None if wait is None else round(wait * 1000),
            **failure.log_detail,
        )


#: Parameters by the names that an init has for them.
_REQUESTED = {"stop_sequences": "stop", "thinking": "reasoning_effort", "output_config": "reasoning_effort"}
