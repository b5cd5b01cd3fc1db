"""A session: what init stores, the states it passes through, and how it ended. Pure values.

pending ──first viewer──► running ──► completed | failed | cancelled
   ├──nobody came──► expired                       └── each ending owes n8n one callback
   └──stopped──► cancelled
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, NamedTuple

import msgspec

from aistream.events import Cursor, End, Ending, Failed, Start, Usage

#: The ending of a session that nobody came for.
EXPIRED = Failed("expired", "Nobody opened the stream in time.", False)
#: The ending of a generation whose worker was lost after viewers had seen text of it.
WORKER_LOST = Failed("worker_lost", "The server that wrote this answer was lost.", True)
#: The ending of a session that somebody stopped.
CANCELLED = End("cancelled")


class State(StrEnum):
    """Where a session stands. The last four are its endings."""

    PENDING = "pending"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


def state_of(ending: Ending) -> State:
    """The state that an ending event leaves its session in."""
    if isinstance(ending, Failed):
        return State.EXPIRED if ending.code == EXPIRED.code else State.FAILED
    return State.CANCELLED if ending == CANCELLED else State.COMPLETED


class Message(msgspec.Struct, frozen=True):
    """One turn of a conversation. `role` is `user`, `assistant` or `system`."""

    role: str
    content: str


class Route(NamedTuple):
    """Where a model's name leads: the provider, and the name that it is asked for."""

    provider: str
    model: str


class Request(msgspec.Struct, frozen=True, omit_defaults=True):
    """What an accepted init asked for: all that the generation and the callback need, and nothing of how it was asked.

    `max_tokens` None: as the provider's defaults have it. `fallbacks`: who is asked, in this order, when the model has failed
    before its first token. `user_id`, `chat_id` and `metadata` are echoed in the JSON type they came in. `disconnect_grace`:
    seconds after the last viewer has left until the session is cancelled; None: it goes on without viewers. `immediate`: it
    waits for no viewer.
    """

    prompt: str
    requested_model: str
    model: str
    provider: str
    max_tokens: int | None = None
    fallbacks: tuple[Route, ...] = ()
    reasoning_effort: str | None = None
    messages: tuple[Message, ...] = ()
    system: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop: tuple[str, ...] = ()
    user_id: Any = None
    chat_id: Any = None
    metadata: Any = None
    disconnect_grace: float | None = None
    immediate: bool = False

    def conversation(self) -> list[Message]:
        """All turns in order; the prompt is the last."""
        return [*self.messages, Message("user", self.prompt)]

    @property
    def routes(self) -> list[Route]:
        """Who is asked for the answer, one after the other."""
        return [Route(self.provider, self.model), *self.fallbacks]

    def texts(self) -> list[str]:
        """Every text that goes to the model."""
        return [self.system or "", *(message.content for message in self.messages), self.prompt]


class Outcome(msgspec.Struct, frozen=True, omit_defaults=True):
    """How a generation ended, without its text.

    `model`: as the provider that was asked last calls it; `provider`: that one, `""` for the one that was asked for.
    `first_token_ms`: milliseconds since it began; `queued_ms`: how much of that it waited for a place with a provider.
    `requests`: sent to providers, retries and fallbacks included. `warnings`: what of the request did not go to the model.
    """

    ending: End | Failed
    model: str
    usage: Usage
    first_token_ms: int | None = None
    provider: str = ""
    queued_ms: int = 0
    requests: int = 0
    warnings: tuple[str, ...] = ()


class Session(msgspec.Struct, frozen=True):
    """An ended session as its callback needs it. Points in time are milliseconds since 1970 by Redis's clock.

    `started_at`: when the generation that said it began; a session that was run once more began then.
    """

    id: str
    request: Request
    resume_url: str
    answer: str
    outcome: Outcome
    created_at: int
    started_at: int | None
    ended_at: int


class IdempotencyKey(msgspec.Struct, frozen=True):
    """An init's Idempotency-Key. `name`: a digest of it and of the caller's subject; `body`: a digest of what was asked."""

    name: str
    body: str


class Quota(NamedTuple):
    """How many inits there may be in `seconds`, counted from the first. `name`: as headers and metrics have it, and the setting
    before `_RATE_LIMIT`; `of`: a digest of whose inits they are."""

    name: str
    of: str
    amount: int
    seconds: int


class Left(NamedTuple):
    """What is left of a quota, and the seconds until there is all of it again."""

    amount: int
    seconds: float


class Quotas:
    """The quotas that an init counts against. `left` has what is left of each, when the store has looked."""

    __slots__ = ("left", "of")

    def __init__(self, *of: Quota) -> None:
        self.of = of
        self.left: list[Left] = []


class Accepted(msgspec.Struct, frozen=True):
    """What an accepted init stored, and what never changes afterwards. Points in time are ms since 1970 by Redis's clock.

    `subject` owns the session; at `deadline` it expires if nobody has come, or is begun if it waits for nobody.
    """

    id: str
    subject: str
    request: Request
    resume_url: str
    created_at: int
    deadline: int
    key: IdempotencyKey | None = None

    @property
    def start(self) -> Start:
        """The first event of its log, in every epoch."""
        return Start(self.id, self.request.model, self.request.provider)


class Attempt(msgspec.Struct, frozen=True, omit_defaults=True):
    """One attempt of a callback, as its history has it. `outcome`: `delivered`, `retry`, `dead`, or `lost` with its worker.

    `at`: ms since 1970 when it began; `status`: of n8n's answer, None where none came.
    """

    attempt: int
    outcome: str
    at: int | None = None
    status: int | None = None
    reason: str = ""
    duration_ms: int | None = None


class CallbackRecord(msgspec.Struct, frozen=True):
    """Where an ended session's callback stands. `state`: `owed`, `delivered` or `dead`.

    Points in time are ms since 1970. `next_at`: of an owed one; `open`: an attempt is being made; `settled_at`: of the others.
    """

    state: str
    attempt: int
    origin: str
    open: bool
    next_at: int | None
    settled_at: int | None
    last_answer: str
    history: list[Attempt]


class Record(msgspec.Struct, frozen=True):
    """All that is kept of a session but prompt, answer and resumeUrl. Points in time are ms since 1970 by Redis's clock."""

    id: str
    subject: str
    state: State
    start: Start
    created_at: int
    started_at: int | None
    ended_at: int | None
    outcome: Outcome | None
    callback: CallbackRecord | None


class Counts(msgspec.Struct, frozen=True):
    """Callbacks that are owed, seconds since the oldest of them is, and dead letters; sessions that are pending or running."""

    owed: int
    oldest_owed: float
    dead: int
    open: int


class Claimed(msgspec.Struct, frozen=True):
    """The right to generate, until the lease lapses, and all there is to know of the session: enough to write it anew.

    `may_run` is false where an earlier epoch had already said something, or somebody has stopped it (`cancelled`).
    """

    accepted: Accepted
    epoch: int
    started_at: int
    may_run: bool
    cancelled: bool = False

    @property
    def request(self) -> Request:
        """What was asked for."""
        return self.accepted.request


class Elsewhere(msgspec.Struct, frozen=True):
    """The session is running; its events are in its log. `cancels`: it is cancelled when its last viewer has left."""

    worker: str
    cancels: bool = False


class Ended(msgspec.Struct, frozen=True):
    """The session is over. `ending_id` is the last event's id; `replayable` tells whether its log is still kept."""

    state: State
    ending_id: Cursor | None
    replayable: bool


class Missing(msgspec.Struct, frozen=True):
    """The store knows no such session. `perhaps`: it may have lost it a moment ago, and be told of it again."""

    perhaps: bool = False


Claim = Claimed | Elsewhere | Ended | Missing


class Finished(msgspec.Struct, frozen=True):
    """The ending is committed under this id. `state`: as what; one that was stopped meanwhile is cancelled."""

    ending_id: Cursor
    state: State


class Fenced(msgspec.Struct, frozen=True):
    """The session belongs to another epoch by now: stop, and show nothing more."""


class Short(msgspec.Struct, frozen=True):
    """The log in the store is not what its writer counts: events are missing before the ending, or arrived unheard."""


Finish = Finished | Fenced | Short | Missing
