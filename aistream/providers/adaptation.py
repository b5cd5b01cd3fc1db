"""Which parameters a model takes, learned from its refusals and remembered for each base URL and model."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterable

#: Seconds for which a lesson holds: an organisation is verified, a server updated, and the parameter is tried again.
FORGET = 3_600.0
#: Models remembered at most; names are free text.
MODELS = 1_000


class Adaptations:
    """The lessons of this process."""

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
