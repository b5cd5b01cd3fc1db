"""What went wrong with a provider, in stable codes and safe words.

The provider's own words go into the log alone, redacted. Where a rule comes from a provider's documentation, it says so.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from aistream.errors import ProviderFailed
from aistream.providers.base import Call
from aistream.providers.redaction import redacted


class Kind(NamedTuple):
    """A public code, the safe words that go with it, and whether the same request may succeed later."""

    code: str
    message: str
    retryable: bool = False


REJECTED = Kind("provider_rejected", "The model provider did not accept the request.")
TOO_LARGE = Kind("provider_rejected", "The request is too large for the model provider.")
TOO_LONG = Kind("context_length_exceeded", "The conversation is too long for this model.")
FILTERED = Kind("content_filtered", "The model provider's content filter did not accept the request.")
KEY = Kind("provider_auth_failed", "The service's key for the model provider was not accepted.")
FORBIDDEN = Kind("provider_auth_failed", "The service may not use this model.")
QUOTA = Kind("provider_quota", "The service's quota with the model provider is used up.")
UNKNOWN_MODEL = Kind("model_not_found", "The model provider does not know this model.")
TIMEOUT = Kind("provider_timeout", "The model provider took too long.", True)
RATE_LIMITED = Kind("provider_rate_limited", "The model provider is limiting requests.", True)
OVERLOADED = Kind("provider_overloaded", "The model provider is overloaded.", True)
UNAVAILABLE = Kind("provider_unavailable", "The model provider could not be reached or had an error.", True)
DISCONNECTED = Kind("upstream_disconnected", "The connection to the model provider broke off.", True)
TRUNCATED = Kind("upstream_truncated", "The model's answer broke off.", True)
MALFORMED = Kind("upstream_malformed", "The model's answer could not be read.", True)
FIRST_TOKEN = Kind("first_token_timeout", "The model did not begin to answer in time.", True)
SILENCE = Kind("silence_timeout", "The model stopped writing in mid-answer.", True)

#: developers.openai.com, Error codes; docs.claude.com, Errors (529 is Anthropic's own).
STATUSES: dict[int, Kind] = {
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
_WORDS: dict[str, Kind] = {
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
_SENTENCES: tuple[tuple[re.Pattern[str], Kind], ...] = (
    (re.compile(r"prompt is too long", re.IGNORECASE), TOO_LONG),
    (re.compile(r"content filtering policy", re.IGNORECASE), FILTERED),
    (re.compile(r"credit balance is too low", re.IGNORECASE), QUOTA),
)


def failed(kind: Kind, *, again: bool | None = None, **detail: object) -> ProviderFailed:
    """This failure. `again`: see ProviderFailed; `detail` is for the log."""
    return ProviderFailed(kind.code, kind.message, retryable=kind.retryable, again=again, log_detail=detail)


def error_event(error: Any, call: Call) -> ProviderFailed:
    """The failure that an error object in the stream tells of. It comes under status 200, so only its words count."""
    error = error if isinstance(error, dict) else {}
    kind = by_words(error) or STATUSES.get(_whole(error.get("code")), UNAVAILABLE)  # OpenRouter's code is the status
    return ProviderFailed(kind.code, kind.message, retryable=kind.retryable, log_detail=detail(error, call))


def filtered(error: Any) -> bool:
    """Whether an error event says that the provider's filter has stopped the answer (Anthropic; OpenAI has a finish reason)."""
    return isinstance(error, dict) and by_words(error) is FILTERED


def by_words(error: dict[str, Any]) -> Kind | None:
    """Its code before its type: the code says more. A type that is general is told apart by its sentence."""
    words = [word for word in (error.get("code"), error.get("type")) if isinstance(word, str)]
    kind = next((_WORDS[word] for word in words if word in _WORDS), None)
    message = error.get("message")
    if kind in (None, REJECTED) and isinstance(message, str):
        return next((known for pattern, known in _SENTENCES if pattern.search(message)), kind)
    return kind


def detail(error: dict[str, Any], call: Call) -> dict[str, object]:
    """What the log says of it: the provider's identifiers, and its words without keys, ids, and what was said."""
    words = [_word(error.get(key)) for key in ("type", "code", "param")]
    message = error.get("message")
    said = redacted(message, secrets=[call.secret], said=call.texts()) if isinstance(message, str) else ""
    return {"provider_error": [word for word in words if word], "provider_message": said}


def _word(value: object) -> str:
    """A provider's own identifier if it is nothing but one."""
    return value if isinstance(value, str) and re.fullmatch(r"[a-z0-9_.]{1,60}", value) else ""


def _whole(value: object) -> int:
    return value if isinstance(value, int) else 0
