"""What n8n is told, when, and what its answer means. Pure functions.

The rules of meaning come from a real n8n 2.41 (docs/n8n.md has the table); the headers are Standard Webhooks 1.0.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from aistream import __version__
from aistream.events import End, Ending
from aistream.session import CallbackRecord, Outcome, Record, Session, State, state_of

#: n8n's option "Ignore bots" refuses the names of HTTP libraries.
USER_AGENT = f"Mozilla/5.0 (compatible; aistream/{__version__})"
#: Seconds for which n8n may go on saying that the execution is running: it has not reached its Wait node yet, or has left it.
RUNNING = 600.0
#: A delay is varied by up to this share, so that callbacks that failed together do not come back together.
JITTER = 0.2


class Delivered(msgspec.Struct, frozen=True):
    """n8n has it."""


class Retry(msgspec.Struct, frozen=True):
    """Not delivered; may be later. `arrived`: this attempt may have reached n8n all the same.

    `running`: n8n says that the execution is running, which is judged when it has said so for RUNNING seconds.
    """

    reason: str
    arrived: bool = False
    retry_after: float | None = None
    running: bool = False


class Dead(msgspec.Struct, frozen=True):
    """Never to be delivered; the reason is one an author can act on."""

    reason: str


Meaning = Delivered | Retry | Dead


class Answer(msgspec.Struct, frozen=True):
    """What came back for an attempt. `body` is its beginning; `broken`: it broke off before that; `retry_after` in seconds."""

    status: int
    content_type: str = ""
    body: str = ""
    retry_after: float | None = None
    broken: bool = False


#: n8n says 500 also to the loser of two simultaneous callbacks, and after a later node failed; 504 and 524 (Cloudflare's) come
#: from a proxy that has waited for n8n's answer in vain.
_MAY_HAVE_ARRIVED = (500, 504, 524)
_NOT_LET_IN = (
    "its Wait node's authentication wants another secret (CALLBACK_HEADERS), its 'Ignore bots' is on, or the resumeUrl has lost "
    "its signature"
)


def meaning(answer: Answer, *, ambiguous: bool) -> Meaning:
    """What an answer says about the delivery. `ambiguous`: an earlier attempt may have arrived."""
    status, body = answer.status, answer.body
    html = answer.content_type.lower().startswith("text/html")
    if 200 <= status < 300:
        # n8n answers 200 text/html while it starts, and with its editor's page where the path is not routed.
        return (
            Retry("n8n answered with a page: it is starting, or the resumeUrl's path is not routed to it")
            if html
            else Delivered()
        )
    if status in (408, 425, 429) or status >= 500:
        return Retry(f"n8n answered {status}", arrived=status in _MAY_HAVE_ARRIVED, retry_after=answer.retry_after)
    if status == 404 and html:
        return Retry("n8n is starting: its routes are not there yet")
    if status in (404, 409) and answer.broken:
        return Retry(f"n8n answered {status}, and its words broke off")
    if status == 409 and "running already" in body:
        return Retry("the execution is running: it has not reached its Wait node yet, or has left it already", running=True)
    if status == 409 or (status == 404 and "does not exist" in body):
        return Delivered() if ambiguous else Dead("the execution no longer waits")
    if status == 404 and "matching path/method" in body:
        perhaps = "; or an earlier attempt has arrived, and another node waits now" if ambiguous else ""
        return Dead("set the Wait node's HTTP method to POST and its suffix to none" + perhaps)
    if status in (401, 403):
        return Dead(f"n8n answered {status}: {_NOT_LET_IN}")
    if 300 <= status < 400:
        return Dead(f"n8n answered {status}: a redirect is not followed; use the final address as resumeUrl")
    return Dead(f"n8n answered {status}")


def next_step(
    outcome: Retry,
    *,
    attempt: int,
    ambiguous: bool,
    running_for: float,
    schedule: tuple[float, ...],
    dice: float,
) -> float | Delivered | Dead:
    """What follows an attempt that did not deliver: seconds until the next one, or what has become of the callback.

    `attempt` counts from 1, and anew when somebody has had it delivered again. `ambiguous`: this or an earlier attempt may have
    arrived. `running_for`: seconds since n8n began to answer that the execution is running.
    """
    last = Dead(f"{outcome.reason}; this was the last attempt")
    if outcome.running and running_for >= RUNNING:
        return Delivered() if ambiguous else last
    delay = next_delay(attempt, outcome.retry_after, schedule, dice)
    if delay is None:
        # Also where an attempt may have arrived: a letter that is kept is safer than a guess.
        return last
    return min(delay, RUNNING - running_for) if outcome.running else delay


def next_delay(attempt: int, retry_after: float | None, schedule: tuple[float, ...], dice: float) -> float | None:
    """Seconds to wait before the attempt after `attempt` (0: before the first), or None when there is none.

    Retry-After is honoured between one and two times the planned delay (as Svix does): a receiver may slow us down, but not
    park a callback for days. `dice` in 0..1 gives the jitter of ±20 %; it does not bring an attempt before its Retry-After.
    """
    if attempt >= len(schedule):
        return None
    planned = schedule[attempt]
    delay = planned * (1 - JITTER + 2 * JITTER * dice)
    return delay if retry_after is None else min(max(delay, retry_after), 2 * planned)


def one_of(*values: str) -> Meta:
    """What a text may be, for the OpenAPI document."""
    return Meta(extra_json_schema={"enum": list(values)})


Time = Annotated[str, Meta(extra_json_schema={"format": "date-time"})]
EndState = Annotated[str, one_of(State.COMPLETED, State.FAILED, State.CANCELLED, State.EXPIRED)]


class Failure(msgspec.Struct, frozen=True):
    """What went wrong. `code` is stable, `message` safe to show; `retryable`: the same request may succeed later."""

    code: str
    message: str
    retryable: bool


class TokenUsage(msgspec.Struct, frozen=True):
    """Tokens of the whole answer. `input_tokens` include the cached ones, `output_tokens` those of its reasoning.

    `source`: `provider`, where all figures are its own; `partial`: it has said a part; `estimated`: none. `estimated_by`: how
    the rest was estimated, `tiktoken` or `characters`.
    """

    input_tokens: int
    output_tokens: int
    cached_input_tokens: int
    reasoning_tokens: int
    source: Annotated[str, one_of("provider", "partial", "estimated")]
    estimated_by: str | None


class Timings(msgspec.Struct, frozen=True):
    """When what happened, in UTC, and how long it took. `null`: it did not, or not yet."""

    created_at: Time | None
    started_at: Time | None
    first_token_at: Time | None
    ended_at: Time | None
    queued_ms: int | None
    time_to_first_token_ms: int | None
    duration_ms: int | None


class Payload(msgspec.Struct, frozen=True, rename={"user_id": "userId", "chat_id": "chatId", "stream_id": "streamId"}):
    """The callback's body. The first six fields are there, with their types, on every ending.

    `answer`: the provider's exact text, or what was written of it. `model` and `provider`: who answered, or was asked last.
    `provider_requests`: how many were made for it, retries and fallbacks included. `warnings`: what of the request the model
    was not sent. `attempt`: 1 for the first. `userId`, `chatId` and `metadata` as they were given.
    """

    user_id: str | int | float | None
    chat_id: str | int | float | None
    prompt: str
    answer: str
    input_tokens: int
    output_tokens: int
    stream_id: str
    status: EndState
    finish_reason: str
    error: Failure | None
    model: str
    requested_model: str
    provider: str
    provider_requests: int
    warnings: tuple[str, ...]
    usage: TokenUsage
    timings: Timings
    attempt: int
    metadata: dict[str, Any] | None


class CallbackAttempt(msgspec.Struct, frozen=True):
    """One attempt. `lost`: with its worker. `status`: of the answer, `null` where none came."""

    attempt: int
    at: Time | None
    outcome: Annotated[str, one_of("delivered", "retry", "dead", "lost")]
    status: int | None
    reason: str
    duration_ms: int | None


class CallbackState(msgspec.Struct, frozen=True):
    """Where a callback stands. `next_at`: of an owed one that waits; `attempting`: an attempt is being made now.

    `history`: the latest attempts, about 8 KiB of them.
    """

    state: Annotated[str, one_of("owed", "delivered", "dead")]
    origin: str
    attempts: int
    attempting: bool
    next_at: Time | None
    settled_at: Time | None
    last_answer: str
    history: list[CallbackAttempt]


class Description(msgspec.Struct, frozen=True, rename={"stream_id": "streamId"}):
    """A session as its owner may look at it: never prompt, answer or resumeUrl.

    `finish_reason`, `provider_requests`, `usage` and `callback` are `null` before the ending.
    """

    stream_id: str
    status: Annotated[str, one_of(*State)]
    finish_reason: str | None
    error: Failure | None
    model: str
    provider: str
    provider_requests: int | None
    warnings: tuple[str, ...]
    usage: TokenUsage | None
    timings: Timings
    callback: CallbackState | None


def payload(session: Session, attempt: int) -> bytes:
    """The callback's body as it is sent."""
    request, outcome = session.request, session.outcome
    ending = outcome.ending
    body = Payload(
        user_id=request.user_id,
        chat_id=request.chat_id,
        prompt=request.prompt,
        answer=session.answer,
        input_tokens=outcome.usage.input_tokens,
        output_tokens=outcome.usage.output_tokens,
        stream_id=session.id,
        status=state_of(ending).value,
        finish_reason=finish_reason(ending),
        error=error_of(ending),
        model=outcome.model,
        requested_model=request.requested_model,
        provider=outcome.provider or request.provider,
        provider_requests=outcome.requests,
        warnings=outcome.warnings,
        usage=usage_of(outcome),
        timings=timings(session.created_at, session.started_at, session.ended_at, outcome),
        attempt=attempt,
        metadata=request.metadata,
    )
    return msgspec.json.encode(body)


def description(record: Record) -> Description:
    """A session as its owner may look at it: how it stands, its times and tokens, and what became of its callback."""
    outcome = record.outcome
    return Description(
        stream_id=record.id,
        status=record.state.value,
        finish_reason=finish_reason(outcome.ending) if outcome else None,
        error=error_of(outcome.ending) if outcome else None,
        model=outcome.model if outcome else record.start.model,
        provider=(outcome.provider if outcome else "") or record.start.provider,
        provider_requests=outcome.requests if outcome else None,
        warnings=outcome.warnings if outcome else (),
        usage=usage_of(outcome) if outcome else None,
        timings=timings(record.created_at, record.started_at, record.ended_at, outcome),
        callback=_standing(record.callback) if record.callback else None,
    )


def _standing(callback: CallbackRecord) -> CallbackState:
    return CallbackState(
        state=callback.state,
        origin=callback.origin,
        attempts=callback.attempt,
        attempting=callback.open,
        next_at=None if callback.open or callback.state != "owed" else timestamp(callback.next_at),
        settled_at=timestamp(callback.settled_at),
        last_answer=callback.last_answer,
        history=[
            CallbackAttempt(one.attempt, timestamp(one.at), one.outcome, one.status, one.reason, one.duration_ms)
            for one in callback.history
        ],
    )


def finish_reason(ending: Ending) -> str:
    """Why it ended: the model's reason, or the session's state."""
    return ending.finish_reason if isinstance(ending, End) else state_of(ending).value


def error_of(ending: Ending) -> Failure | None:
    """What went wrong, or None."""
    return None if isinstance(ending, End) else Failure(ending.code, ending.message, ending.retryable)


def usage_of(outcome: Outcome) -> TokenUsage:
    """The tokens, in detail."""
    usage = outcome.usage
    return TokenUsage(
        usage.input_tokens,
        usage.output_tokens,
        usage.cached_input_tokens,
        usage.reasoning_tokens,
        usage.source,
        usage.estimated_by,
    )


def timings(created_at: int, started_at: int | None, ended_at: int | None, outcome: Outcome | None) -> Timings:
    """When what happened, and how long it took. The arguments are points in time in ms since 1970."""
    first_token_ms = outcome.first_token_ms if outcome else None
    first_token = None if started_at is None or first_token_ms is None else started_at + first_token_ms
    return Timings(
        created_at=timestamp(created_at),
        started_at=timestamp(started_at),
        first_token_at=timestamp(first_token),
        ended_at=timestamp(ended_at),
        queued_ms=None if started_at is None or outcome is None else outcome.queued_ms,
        time_to_first_token_ms=first_token_ms,
        duration_ms=None if started_at is None or ended_at is None else ended_at - started_at,
    )


def timestamp(ms: int | None) -> str | None:
    """Milliseconds since 1970 as RFC 3339 in UTC, or None for None."""
    if ms is None:
        return None
    return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def headers(
    session_id: str, body: bytes, at: int, secrets: Sequence[bytes], own: Sequence[tuple[str, str]] = ()
) -> dict[str, str]:
    """The request's headers. `at`: seconds since 1970; `own`: the operator's. Signed (Standard Webhooks 1.0) with each secret.

    `webhook-id` is the same in all attempts: a receiver that must not act twice remembers it.
    """
    message_id = f"msg_{session_id}"
    named = {
        **dict(own),
        "Content-Type": "application/json",
        "User-Agent": USER_AGENT,
        "webhook-id": message_id,
        "webhook-timestamp": str(at),
    }
    if secrets:
        signed = (hmac.new(secret, f"{message_id}.{at}.".encode() + body, hashlib.sha256).digest() for secret in secrets)
        named["webhook-signature"] = " ".join("v1," + base64.b64encode(one).decode() for one in signed)
    return named
