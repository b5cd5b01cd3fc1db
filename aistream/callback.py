"""What n8n is told, when, and what its answer means. Pure functions.

The rules of meaning come from a real n8n 2.41 (docs/n8n.md has the table); the headers are Standard Webhooks 1.0.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from datetime import UTC, datetime
from typing import Any

import msgspec

from aistream import __version__
from aistream.events import End, Failed
from aistream.session import Session, state_of

#: n8n's option "Ignore bots" refuses the names of HTTP libraries.
USER_AGENT = f"Mozilla/5.0 (compatible; aistream/{__version__})"
#: A delay is varied by up to this share, so that callbacks that failed together do not come back together.
JITTER = 0.2


class Delivered(msgspec.Struct, frozen=True):
    """n8n has it."""


class Retry(msgspec.Struct, frozen=True):
    """Not delivered; may be later. `arrived`: this attempt may have reached n8n all the same."""

    reason: str
    arrived: bool = False
    retry_after: float | None = None


class Dead(msgspec.Struct, frozen=True):
    """Never to be delivered; the reason is one an author can act on."""

    reason: str


Meaning = Delivered | Retry | Dead


class Answer(msgspec.Struct, frozen=True):
    """What came back for an attempt. `body` is its beginning; `retry_after` in seconds."""

    status: int
    content_type: str = ""
    body: str = ""
    retry_after: float | None = None


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
        # 500: n8n says so also to the loser of two simultaneous callbacks, and after a later node failed.
        return Retry(f"n8n answered {status}", arrived=status == 500, retry_after=answer.retry_after)
    if status == 404 and html:
        return Retry("n8n is starting: its routes are not there yet")
    if status == 409 and "running already" in body:
        return Retry("the execution has not reached its Wait node yet, or was resumed already")
    if status == 409 or (status == 404 and "does not exist" in body):
        return Delivered() if ambiguous else Dead("the execution no longer waits")
    if status == 404 and "matching path/method" in body:
        return Dead("set the Wait node's HTTP method to POST and its suffix to none")
    if 300 <= status < 400:
        return Dead(f"n8n answered {status}: a redirect is not followed; use the final address as resumeUrl")
    return Dead(f"n8n answered {status}")


def next_delay(attempt: int, retry_after: float | None, schedule: tuple[float, ...], dice: float) -> float | None:
    """Seconds to wait before the attempt after `attempt` (1 = the first), or None when the callback is dead.

    Retry-After is honoured between one and two times the planned delay (as Svix does): a receiver may slow us down, but not
    park a callback for days. `dice` in 0..1 gives the jitter of ±20 %.
    """
    if attempt >= len(schedule):
        return None
    planned = schedule[attempt]
    if retry_after is not None:
        planned = min(max(planned, retry_after), 2 * planned)
    return planned * (1 - JITTER + 2 * JITTER * dice)


def payload(session: Session, attempt: int) -> bytes:
    """The callback's body: the six fields that every ending has, with their types, and what was added to them."""
    request, outcome = session.request, session.outcome
    ending, usage = outcome.ending, outcome.usage
    started = session.started_at
    first_token = None if started is None or outcome.first_token_ms is None else started + outcome.first_token_ms
    body: dict[str, Any] = {
        "userId": request.user_id,
        "chatId": request.chat_id,
        "prompt": request.prompt,
        "answer": session.answer,
        "input_tokens": usage.input_tokens,
        "output_tokens": usage.output_tokens,
        "streamId": session.id,
        "status": state_of(ending).value,
        "finish_reason": ending.finish_reason if isinstance(ending, End) else state_of(ending).value,
        "error": _error(ending) if isinstance(ending, Failed) else None,
        "model": outcome.model,
        "requested_model": request.requested_model,
        "provider": request.provider,
        "usage": {
            "input_tokens": usage.input_tokens,
            "output_tokens": usage.output_tokens,
            "cached_input_tokens": usage.cached_input_tokens,
            "reasoning_tokens": usage.reasoning_tokens,
            "source": usage.source,
        },
        "timings": {
            "created_at": timestamp(session.created_at),
            "started_at": timestamp(started),
            "first_token_at": timestamp(first_token),
            "ended_at": timestamp(session.ended_at),
            "time_to_first_token_ms": outcome.first_token_ms,
            "duration_ms": None if started is None else session.ended_at - started,
        },
        "attempt": attempt,
        "metadata": request.metadata,
    }
    return msgspec.json.encode(body)


def _error(failed: Failed) -> dict[str, Any]:
    return {"code": failed.code, "message": failed.message, "retryable": failed.retryable}


def timestamp(ms: int | None) -> str | None:
    """Milliseconds since 1970 as RFC 3339 in UTC, or None for None."""
    if ms is None:
        return None
    return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def headers(session_id: str, body: bytes, at: int, secret: bytes) -> dict[str, str]:
    """The request's headers. `at`: seconds since 1970. Signed (Standard Webhooks 1.0, `v1`) when there is a secret.

    `webhook-id` is the same in all attempts: a receiver that must not act twice remembers it.
    """
    message_id = f"msg_{session_id}"
    named = {
        "Content-Type": "application/json",
        "User-Agent": USER_AGENT,
        "webhook-id": message_id,
        "webhook-timestamp": str(at),
    }
    if secret:
        signed = hmac.new(secret, f"{message_id}.{at}.".encode() + body, hashlib.sha256).digest()
        named["webhook-signature"] = "v1," + base64.b64encode(signed).decode()
    return named
