"""What every provider is to the rest of the service."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from aistream.events import End, Reasoning, Text, Usage
from aistream.session import Request


class Model:
    """A mutable note of what the provider calls the model it answered with; the iterator fills it in when it learns it."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class Provider(Protocol):
    """Runs a model and says what it says, as events."""

    #: Fields of a request that this provider has nothing for: not sent, and named in init's warnings.
    ignores: frozenset[str]

    def stream(self, request: Request, model: Model) -> Iterator[Text | Reasoning | Usage | End]:
        """The answer as it is written: each step takes all that has arrived, so that batching grows with load.

        The last event is `End`; raises ProviderFailed where it does not come to that. Closing the iterator closes the
        connection to the provider.
        """
        ...

    def warm_up(self) -> None:
        """Does ahead of the first request what would delay it."""
        ...


def said(text: str, reasoning: str) -> Iterator[Text | Reasoning]:
    """The events of one step: thought comes before word, and an empty one is none."""
    if reasoning:
        yield Reasoning(reasoning)
    if text:
        yield Text(text)
