"""What went wrong with a provider, in stable codes and safe words.

The provider's own words go into the log alone, redacted. What the SDKs raise was measured with openai 3.54.0 and anthropic
2.12.0 (`tests/test_neighbours.py` keeps it true); where a rule comes from a provider's documentation, it says so.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import httpx2

from aistream.errors import ProviderFailed
from aistream.providers.base import Call
from aistream.providers.redaction import redacted
from aistream.retry_after import retry_after


class _Kind(NamedTuple):
    code: str
    message: str
    retryable: bool = False


REJECTED = _Kind("provider_rejected", "The model provider did not accept the request.")
TOO_LARGE = _Kind("provider_rejected", "The request is too large for the model provider.")
TOO_LONG = _Kind("context_length_exceeded", "The conversation is too long for this model.")
FILTERED = _Kind("content_filtered", "The model provider's content filter did not accept the request.")
KEY = _Kind("provider_auth_failed", "The service's key for the model provider was not accepted.")
FORBIDDEN = _Kind("provider_auth_failed", "The service may not use this model.")
QUOTA = _Kind("provider_quota", "The service's quota with the model provider is used up.")
UNKNOWN_MODEL = _Kind("model_not_found", "The model provider does not know this model.")
TIMEOUT = _Kind("provider_timeout", "The model provider took too long.", True)
RATE_LIMITED = _Kind("provider_rate_limited", "The model provider is limiting requests.", True)
OVERLOADED = _Kind("provider_overloaded", "The model provider is overloaded.", True)
UNAVAILABLE = _Kind("provider_unavailable", "The model provider could not be reached or had an error.", True)
DISCONNECTED = _Kind("upstream_disconnected", "The connection to the model provider broke off.", True)
TRUNCATED = _Kind("upstream_truncated", "The model's answer broke off.", True)
MALFORMED = _Kind("upstream_malformed", "The model's answer could not be read.", True)
FIRST_TOKEN = _Kind("first_token_timeout", "The model did not begin to answer in time.", True)
SILENCE = _Kind("silence_timeout", "The model stopped writing in mid-answer.", True)

#: developers.openai.com, Error codes; docs.claude.com, Errors (529 is Anthropic's own).
_STATUSES: dict[int, _Kind] = {
    400: REJECTED,
    401: KEY,
    402: QUOTA,
    403: FORBIDDEN,
    404: UNKNOWN_MODEL,
    408: TIMEOUT,
    413: TOO_LARGE,
    422: REJECTED,
    429: RATE_LIMITED,
    504: TIMEOUT,
    529: OVERLOADED,
}
#: The `code` or `type` of an error object: says more than the status, and is all there is for an error event, which comes
#: under status 200.
_WORDS: dict[str, _Kind] = {
    "invalid_request_error": REJECTED,
    "authentication_error": KEY,
    "invalid_api_key": KEY,
    "billing_error": QUOTA,
    "permission_error": FORBIDDEN,
    "not_found_error": UNKNOWN_MODEL,
    "model_not_found": UNKNOWN_MODEL,
    "request_too_large": TOO_LARGE,
    "context_length_exceeded": TOO_LONG,
    "content_filter": FILTERED,  # Azure OpenAI, for a prompt that its filter does not let through
    "content_policy_violation": FILTERED,
    "rate_limit_error": RATE_LIMITED,
    "rate_limit_exceeded": RATE_LIMITED,
    "insufficient_quota": QUOTA,  # comes as 429, but no waiting helps
    "overloaded_error": OVERLOADED,
    "timeout_error": TIMEOUT,
}
#: Anthropic has one type for all of these, and tells them apart in words.
_SENTENCES: tuple[tuple[re.Pattern[str], _Kind], ...] = (
    (re.compile(r"prompt is too long", re.IGNORECASE), TOO_LONG),
    (re.compile(r"content filtering policy", re.IGNORECASE), FILTERED),
    (re.compile(r"credit balance is too low", re.IGNORECASE), QUOTA),
)


def failed(kind: _Kind, *, again: bool | None = None, **detail: object) -> ProviderFailed:
    """This failure. `again`: see ProviderFailed; `detail` is for the log."""
    return ProviderFailed(kind.code, kind.message, retryable=kind.retryable, again=again, log_detail=detail)


def error_event(error: Any, call: Call) -> ProviderFailed:
    """The failure that an error object in the stream tells of. It comes under status 200, so only its words count."""
    error = error if isinstance(error, dict) else {}
    kind = _by_words(error) or _STATUSES.get(_whole(error.get("code")), UNAVAILABLE)  # OpenRouter's code is the status
    return ProviderFailed(kind.code, kind.message, retryable=kind.retryable, log_detail=_detail(error, call))


def filtered(error: Any) -> bool:
    """Whether an error event says that the provider's filter has stopped the answer (Anthropic; OpenAI has a finish reason)."""
    return isinstance(error, dict) and _by_words(error) is FILTERED


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
        raise failed(kind, causes=sorted(causes)) from error


def _status(error: Any, call: Call) -> ProviderFailed:
    """The failure that an answer with this status stands for."""
    body = error.body if isinstance(error.body, dict) else {}
    nested = body.get("error")
    inner: dict[str, Any] = nested if isinstance(nested, dict) else body
    status, headers = error.status_code, error.response.headers
    kind = _by_words(inner) or REJECTED
    if kind is REJECTED:  # the words say no more than that it was refused
        kind = _STATUSES.get(status, UNAVAILABLE if status >= 500 or status == 409 else REJECTED)
    # Both SDKs obey it (`_should_retry`), so it is for clients to obey.
    again = {"true": True, "false": False}.get(headers.get("x-should-retry", ""), kind.retryable)
    return ProviderFailed(
        kind.code,
        kind.message,
        retryable=kind.retryable,
        again=again,
        retry_after=_wait(headers),
        parameters=_parameters(status, inner, body),
        log_detail={"provider_status": status, "provider_request": _request_id(headers), **_detail(inner, call)},
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


def _by_words(error: dict[str, Any]) -> _Kind | None:
    """Its code before its type: the code says more. A type that is general is told apart by its sentence."""
    words = [word for word in (error.get("code"), error.get("type")) if isinstance(word, str)]
    kind = next((_WORDS[word] for word in words if word in _WORDS), None)
    message = error.get("message")
    if kind in (None, REJECTED) and isinstance(message, str):
        return next((known for pattern, known in _SENTENCES if pattern.search(message)), kind)
    return kind


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


def _detail(error: dict[str, Any], call: Call) -> dict[str, object]:
    """What the log says of it: the provider's identifiers, and its words without keys, ids, and what was said to it."""
    words = [_word(error.get(key)) for key in ("type", "code", "param")]
    message = error.get("message")
    said = redacted(message, secrets=[call.secret], said=call.request.texts()) if isinstance(message, str) else ""
    return {"provider_error": [word for word in words if word], "provider_message": said}


def _word(value: object) -> str:
    """A provider's own identifier if it is nothing but one."""
    return value if isinstance(value, str) and re.fullmatch(r"[a-z0-9_.]{1,60}", value) else ""


def _whole(value: object) -> int:
    return value if isinstance(value, int) else 0
