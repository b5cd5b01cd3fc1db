"""Which parameters a model takes, learned from its refusals and remembered for each base URL and model."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

from aistream import metrics
from aistream.endpoints import Endpoint
from aistream.errors import ProviderFailed
from aistream.events import End
from aistream.providers.base import Call
from aistream.telemetry import log as lines

#: Seconds for which a lesson holds: an organisation is verified, a server updated, and the parameter is tried again.
FORGET = 3_600.0
#: Models remembered at most; names are free text.
MODELS = 1_000


class Adaptations:
    """The lessons of this process."""

    def adapted(
        self,
        endpoint: Endpoint,
        model: str,
        call: Call,
        body: Callable[[frozenset[str]], dict[str, Any]],
        answer: Callable[[dict[str, Any]], End],
    ) -> End:
        """The answer to a request that is made once more without what the model refuses, until that is not the reason any more.

        `body` gives the request without these parameters, `answer` says what comes of it. Raises ProviderFailed.
        """
        refused = self.of(endpoint.base_url, model)
        while True:
            asked = body(refused)
            call.left_out = refused
            call.requests += 1
            call.refused = False
            try:
                return answer(asked)
            except ProviderFailed as failed:
                # What was not sent cannot be the reason.
                named = [name for name in failed.parameters if name in asked]
                if not named:
                    raise
                refused = self.learn(endpoint.base_url, model, named)
                # About once an hour for a model.
                metrics.provider_adapted(endpoint.name, named)
                lines.info("provider.adapted", provider=endpoint.name, model=model, parameters=named)

    def __init__(self) -> None:
        self._learned: OrderedDict[tuple[str, str], tuple[float, frozenset[str]]] = OrderedDict()

    def of(self, base_url: str, model: str) -> frozenset[str]:
        """The parameters that this model does not take."""
        until, refused = self._learned.get((base_url, model), (0.0, frozenset()))
        return refused if time.monotonic() < until else frozenset()

    def learn(self, base_url: str, model: str, parameters: Iterable[str]) -> frozenset[str]:
        """Adds these, and gives all."""
        refused = self.of(base_url, model) | frozenset(parameters)
        self._learned[base_url, model] = time.monotonic() + FORGET, refused
        self._learned.move_to_end((base_url, model))
        if len(self._learned) > MODELS:
            self._learned.popitem(last=False)
        return refused
