"""What both SDK providers share: reading the SDK's raw response as server-sent events, and naming what went wrong.

The SDKs make the request (auth, URL, errors, timeouts); their typed chunks are not built, since those cost five to ten
times what the bytes do.
"""

from __future__ import annotations

import json
import re
import select
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar

import httpcore2._utils
import httpx2
import msgspec
from gevent import monkey

from aistream.errors import ProviderFailed

T = TypeVar("T")

#: Seconds: to connect, between two pieces of the answer (and so to the first), to send, to get a place in the pool.
TIMEOUT = httpx2.Timeout(connect=10.0, read=60.0, write=30.0, pool=10.0)
#: The SDKs' own default of 1,000 connections would hold the 1,001st stream back in silence.
LIMITS = httpx2.Limits(max_connections=20_000, max_keepalive_connections=100, keepalive_expiry=30.0)


# The pool under the SDKs asks poll() about each of its idle connections at both ends of every request. gevent's poll goes
# through the hub with two watchers, for up to a hundred connections: a third of a session's CPU. The pool never waits in it
# (its timeout is 0), so the plain one does.
setattr(  # noqa: B010  # mypy knows that the name is httpcore2's own
    httpcore2._utils, "select", SimpleNamespace(poll=monkey.get_original("select", "poll"), POLLIN=select.POLLIN)
)


class ServerEvent(NamedTuple):
    """One server-sent event of a provider: its name (`b""` when it has none) and its data."""

    name: bytes
    data: bytes


def server_events(chunks: Iterable[bytes]) -> Iterator[list[ServerEvent]]:
    """The events in a byte stream, for each chunk those that it completed. Chunks may be cut anywhere.

    An event that the end of the stream cuts off is discarded (WHATWG 9.2.6).
    """
    rest = b""
    for chunk in chunks:
        data = rest + chunk if rest else chunk
        if b"\r" in data:
            # JSON holds no bare CR or LF, so these are line ends; the LF of a last CR may still be on its way.
            held = b"\r" if data.endswith(b"\r") else b""
            data = data[: len(data) - len(held)].replace(b"\r\n", b"\n").replace(b"\r", b"\n") + held
        blocks = data.split(b"\n\n")
        rest = blocks.pop()
        events = [event for event in map(_event, blocks) if event is not None]
        if events:
            yield events


def _event(block: bytes) -> ServerEvent | None:
    if block.startswith(b"data: ") and b"\n" not in block:
        return ServerEvent(b"", block[6:])
    name, data = b"", []
    for line in block.split(b"\n"):
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"data":
            data.append(value)
        elif field == b"event":
            name = value
    return ServerEvent(name, b"\n".join(data)) if data else None


def decode(data: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """The needed fields of a provider's JSON. What msgspec refuses (halves of surrogate pairs) is decoded in full.

    Raises ProviderFailed for what is no such JSON at all.
    """
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError):
        pass
    try:
        return msgspec.convert(json.loads(data), decoder.type, strict=False)
    except (ValueError, RecursionError) as error:
        raise malformed() from error


def malformed() -> ProviderFailed:
    """The provider sent something that is not its own format."""
    return ProviderFailed("upstream_malformed", "The model's answer could not be read.", retryable=True)


def truncated() -> ProviderFailed:
    """The provider's stream ended without its mark of an end. The SDKs raise nothing here."""
    return ProviderFailed("upstream_truncated", "The model's answer broke off.", retryable=True)


#: HTTP status, or the type in an error event -> (public code, safe message, retryable)
_FAILURES: dict[int | str, tuple[str, str, bool]] = {
    400: ("provider_rejected", "The model provider did not accept the request.", False),
    401: ("provider_auth_failed", "The service's key for the model provider was not accepted.", False),
    402: ("provider_quota", "The service's quota with the model provider is used up.", False),
    403: ("provider_auth_failed", "The service may not use this model.", False),
    404: ("model_not_found", "The model provider does not know this model.", False),
    408: ("provider_timeout", "The model provider took too long.", True),
    413: ("provider_rejected", "The request is too large for the model provider.", False),
    422: ("provider_rejected", "The model provider did not accept the request.", False),
    429: ("provider_rate_limited", "The model provider is limiting requests.", True),
    529: ("provider_overloaded", "The model provider is overloaded.", True),
    "invalid_request_error": ("provider_rejected", "The model provider did not accept the request.", False),
    "authentication_error": (
        "provider_auth_failed",
        "The service's key for the model provider was not accepted.",
        False,
    ),
    "permission_error": ("provider_auth_failed", "The service may not use this model.", False),
    "not_found_error": ("model_not_found", "The model provider does not know this model.", False),
    "request_too_large": ("provider_rejected", "The request is too large for the model provider.", False),
    "rate_limit_error": ("provider_rate_limited", "The model provider is limiting requests.", True),
    "rate_limit_exceeded": ("provider_rate_limited", "The model provider is limiting requests.", True),
    "insufficient_quota": ("provider_quota", "The service's quota with the model provider is used up.", False),
    "overloaded_error": ("provider_overloaded", "The model provider is overloaded.", True),
    "timeout_error": ("provider_timeout", "The model provider took too long.", True),
}
_UNAVAILABLE = ("provider_unavailable", "The model provider could not be reached or had an error.", True)


def failure(kind: int | str, *, detail: dict[str, object]) -> ProviderFailed:
    """The failure that an HTTP status or the type in an error event stands for."""
    code, message, retryable = _FAILURES.get(kind, _UNAVAILABLE)
    return ProviderFailed(code, message, retryable=retryable, log_detail=detail)


def error_event(error: Any) -> ProviderFailed:
    """The failure that an error object in the stream tells of. It comes under status 200, so only its type counts."""
    error = error if isinstance(error, dict) else {}
    kinds = [value for value in (error.get("code"), error.get("type")) if isinstance(value, str)]
    kind = next((kind for kind in kinds if kind in _FAILURES), "")
    return failure(kind, detail={"provider_error": [_word(kind) for kind in kinds]})


@contextmanager
def translated(status_error: type[Any], connection_error: type[Any], timeout_error: type[Any]) -> Iterator[None]:
    """Turns what an SDK and its transport raise, at creation and during iteration, into ProviderFailed.

    anthropic 2.12.0 lets httpx2's errors through in mid-stream; openai 3.54.0 wraps them.
    """
    try:
        yield
    except (timeout_error, httpx2.TimeoutException) as error:
        raise failure(408, detail={"exception": type(error).__name__}) from error
    except status_error as error:
        raise _status(error) from error
    except (connection_error, httpx2.TransportError) as error:
        raise failure(0, detail={"exception": type(error).__name__}) from error


def _status(error: Any) -> ProviderFailed:
    body: dict[str, Any] = error.body if isinstance(error.body, dict) else {}
    nested = body.get("error")
    inner: dict[str, Any] = nested if isinstance(nested, dict) else body
    words = [_word(inner.get(key)) for key in ("type", "code", "param")]
    kind: int | str = error.status_code
    if inner.get("code") == "insufficient_quota":
        kind = "insufficient_quota"  # comes as 429, but no waiting helps
    return failure(kind, detail={"provider_status": error.status_code, "provider_error": words})


def _word(value: object) -> str:
    """A provider's own identifier if it is nothing but one: its prose may hold keys and organisation ids."""
    return value if isinstance(value, str) and re.fullmatch(r"[a-z_.]{1,60}", value) else ""
