"""What every provider is to the rest of the service."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from aistream.endpoints import Endpoint
from aistream.events import End, Reasoning, Text, Usage
from aistream.session import Request

#: Tokens of an answer where neither the request nor the provider's defaults say.
MAX_TOKENS = 4_096
#: Characters of one event of an answer that did not come as a stream.
PIECE = 64


#: Takes what a provider says, in the order in which it says it, while it says it. What it raises ends the answer.
Say = Callable[[Text | Reasoning | Usage], None]


class Call:
    """A mutable note about one call of a provider, which the provider fills in as it learns, and the generation reads.

    `model`: what the provider calls the one that answers. `secret`: the key, which no log may show. `answered`: its answer has
    begun (status and headers are there). `refused`: it was turned away, or never reached anybody, so nobody bills it. `whole`:
    its answer comes in one piece, so nothing is to be heard before it is complete. `heard_at`: when it last sent anything
    (`time.monotonic()`). `input`: what is known of the usage before its end, without the output. `usage`: all of it so far.
    `requests`: how many were sent. `left_out`: parameters that were not sent, since the provider does not take them. `thinks`: it
    has said that it thinks, in silence.
    """

    __slots__ = (
        "_written",
        "answered",
        "heard_at",
        "input",
        "left_out",
        "model",
        "refused",
        "request",
        "requests",
        "secret",
        "thinks",
        "usage",
        "whole",
    )

    def __init__(  # nosec B107  # no secret is none
        self, request: Request, model: str, secret: str = "", written: Callable[[], list[str]] = lambda: []
    ) -> None:
        """`written` gives what the model has said so far."""
        self.request = request
        self._written = written
        self.model = model
        self.secret = secret
        self.answered = False
        self.thinks = False
        self.refused = False
        self.whole = False
        self.heard_at = time.monotonic()
        self.input: Usage | None = None
        self.usage: Usage | None = None
        self.requests = 0
        self.left_out: frozenset[str] = frozenset()

    def texts(self) -> list[str]:
        """All that was said in the conversation, by either side."""
        return [*self.request.texts(), *self._written()]


class Provider(Protocol):
    """Runs a model and says what it says, as events."""

    endpoint: Endpoint

    def warnings(self, request: Request) -> list[str]:
        """What of the request does not go to this provider, or not as it stands, in words for the workflow's author."""
        ...

    def answer(self, request: Request, model: str, call: Call, say: Say) -> End:
        """Has the model write its answer, and says it meanwhile; gives how it ended.

        Each step takes all that has arrived and says it as one event, so that batching grows with load. Raises ProviderFailed
        where it does not come to an end. Whatever is thrown into its greenlet closes the connection to the provider.
        """
        ...

    def models(self, timeout: float) -> list[str]:
        """The names of the models that the server has, as it lists them. Raises ProviderFailed. `timeout`: seconds."""
        ...

    def warm_up(self) -> None:
        """Does ahead of the first request what would delay it."""
        ...

    def close(self) -> None:
        """Closes the connections that wait for a next request."""
        ...


class Parameters(NamedTuple):
    """What is asked of the model besides the conversation: the request's word, else the endpoint's default."""

    max_tokens: int
    temperature: float | None
    top_p: float | None
    stop: Sequence[str]
    reasoning_effort: str | None
    extra: dict[str, Any]


def parameters(request: Request, endpoint: Endpoint) -> Parameters:
    """The parameters of a request to this endpoint, within its limits."""
    defaults = endpoint.defaults
    tokens = request.max_tokens or defaults.max_tokens or MAX_TOKENS
    return Parameters(
        max_tokens=min(tokens, endpoint.limits.max_tokens or tokens),
        temperature=defaults.temperature if request.temperature is None else request.temperature,
        top_p=defaults.top_p if request.top_p is None else request.top_p,
        stop=request.stop or defaults.stop or (),
        reasoning_effort=request.reasoning_effort or defaults.reasoning_effort,
        extra=endpoint.extra,
    )


def limited(request: Request, endpoint: Endpoint) -> list[str]:
    """The warning that belongs to a limit of the endpoint."""
    limit = endpoint.limits.max_tokens
    if limit is None or (request.max_tokens or 0) <= limit:
        return []
    return [f"max_tokens is {request.max_tokens}: limited to {limit} for {endpoint.name}"]


def say_whole(say: Say, reasoning: str, text: str) -> None:
    """Says an answer that came whole, in the pieces of a stream."""
    for kind, whole in ((Reasoning, reasoning), (Text, text)):
        for start in range(0, len(whole), PIECE):
            say(kind(whole[start : start + PIECE]))
