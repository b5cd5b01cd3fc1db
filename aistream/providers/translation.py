"""Turns what the SDKs raise into failures: which one, when to ask again, and which parameters were not taken.

Measured with openai 3.54.0 and anthropic 2.12.0; `tests/test_neighbours.py` keeps it true.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2

from aistream.errors import ProviderFailed
from aistream.providers import failures
from aistream.providers.base import Call
from aistream.providers.failures import DISCONNECTED, REJECTED, TIMEOUT, UNAVAILABLE
from aistream.retry_after import retry_after


@contextmanager
def translated(call: Call, status_error: type[Any], connection_error: type[Any]) -> Iterator[None]:
    """Turns what an SDK and its transport raise, at creation and during iteration, into ProviderFailed.

    anthropic 2.12.0 lets httpx2's errors through in mid-stream; openai 3.54.0 wraps them.
    """
    try:
        yield
    except status_error as error:
        call.refused = True
        raise _status(error, call) from error
    except (connection_error, httpx2.TransportError) as error:
        causes = {type(one).__name__ for one in (error, error.__cause__) if one is not None}
        timed_out = any("Timeout" in cause for cause in causes)
        kind = TIMEOUT if timed_out else DISCONNECTED if call.answered else UNAVAILABLE
        call.refused = not call.answered
        raise failures.failed(kind, causes=sorted(causes)) from error


def _status(error: Any, call: Call) -> ProviderFailed:
    """The failure that an answer with this status stands for."""
    body = error.body if isinstance(error.body, dict) else {}
    nested = body.get("error")
    inner: dict[str, Any] = nested if isinstance(nested, dict) else body
    status, headers = error.status_code, error.response.headers
    kind = failures.by_words(inner) or REJECTED
    if kind is REJECTED:  # the words say no more than that it was refused
        kind = failures.STATUSES.get(status, UNAVAILABLE if status >= 500 or status == 409 else REJECTED)
    # Both SDKs obey it (`_should_retry`), so it is for clients to obey.
    again = {"true": True, "false": False}.get(headers.get("x-should-retry", ""), kind.retryable)
    return ProviderFailed(
        kind.code,
        kind.message,
        retryable=kind.retryable,
        again=again,
        retry_after=_wait(headers),
        parameters=_parameters(status, inner, body),
        log_detail={"provider_status": status, "provider_request": _request_id(headers), **failures.detail(inner, call)},
    )


def _wait(headers: Any) -> float | None:
    exact = headers.get("retry-after-ms", "")  # OpenAI's own, which both SDKs prefer
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", exact):
        return float(exact) / 1000
    return retry_after(headers.get("retry-after"), time.time())


def _request_id(headers: Any) -> str:
    """By which the provider finds the request again, when it is asked about it (OpenAI's header, Anthropic's)."""
    given = headers.get("x-request-id") or headers.get("request-id") or ""
    return given if re.fullmatch(r"[\w-]{1,80}", given) else ""


#: Parameters that can be left out, or put in another way.
_OPTIONAL = frozenset(
    (
        "max_tokens",
        "max_completion_tokens",
        "temperature",
        "top_p",
        "stop",
        "stop_sequences",
        "stream",
        "stream_options",
        "reasoning_effort",
        "thinking",
        "output_config",
    )
)
_EXTRA = re.compile(r"([a-z_]+)[a-z_.]*: (?:Extra inputs are not permitted|Input tag)")
_NOT_TAKEN = re.compile(r"[`']?([a-z_]+)[`']? (?:is deprecated|is not supported)")
_UNRECOGNIZED = re.compile(r"Unrecognized request arguments? supplied: ([a-z_, ]+)")


def _parameters(status: int, inner: dict[str, Any], body: dict[str, Any]) -> list[str]:
    """The parameters that the provider does not take, if that is what a refusal says, and the request can do without."""
    if status not in (400, 422):
        return []
    return [name for name in dict.fromkeys(_accused(inner, body)) if name in _OPTIONAL]


def _accused(inner: dict[str, Any], body: dict[str, Any]) -> Iterator[str]:
    param, message = inner.get("param"), inner.get("message")
    # developers.openai.com: unsupported_parameter where there is no such one, unsupported_value where this one is not taken.
    if isinstance(param, str) and inner.get("code") in ("unsupported_parameter", "unsupported_value", "unknown_parameter"):
        yield param.partition(".")[0]
    # FastAPI's form, as Mistral (cline/cline#582, Gitlawb/openclaude#739) and other strict servers answer.
    for detail in (body.get("detail"), message.get("detail") if isinstance(message, dict) else None):
        for one in detail if isinstance(detail, list) else ():
            place = one.get("loc") if isinstance(one, dict) and one.get("type") == "extra_forbidden" else None
            if isinstance(place, list) and len(place) > 1 and isinstance(place[1], str):
                yield place[1]
    # Others name it in words alone: Anthropic ("temperature: Extra inputs are not permitted"), older versions of Azure
    # ("Unrecognized request argument supplied: stream_options", openai/openai-python#1724).
    if isinstance(message, str):
        for pattern in (_EXTRA, _NOT_TAKEN, _UNRECOGNIZED):
            if match := pattern.match(message):
                yield from re.findall(r"[a-z_]+", match[1])
