"""What both SDK providers share: the SDK's HTTP client, and reading its raw response as server-sent events.

The SDKs make the request (auth, URL, errors, timeouts); their typed chunks are not built, since those cost five to ten
times what the bytes do.
"""

from __future__ import annotations

import json
import select
import time
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar

import httpcore2._utils
import httpx2
import msgspec
from gevent import monkey

from aistream.providers import transport
from aistream.providers.base import Call, Events
from aistream.providers.failures import MALFORMED, failed

T = TypeVar("T")

#: Seconds: to connect, to send, to get a place in the pool. How long an answer may be silent is watched by who asks.
TIMEOUT = httpx2.Timeout(connect=10.0, read=None, write=30.0, pool=10.0)
#: The SDKs' own default of 1,000 connections would hold the 1,001st stream back in silence.
LIMITS = httpx2.Limits(max_connections=20_000, max_keepalive_connections=100, keepalive_expiry=30.0)


# The SDKs' own pool (PROVIDER_TRANSPORT=httpx) asks poll() about each of its idle connections at both ends of every request.
# gevent's poll goes through the hub with two watchers, for up to a hundred connections: a third of a session's CPU. The pool
# never waits in it (its timeout is 0), so the plain one does.
setattr(  # noqa: B010  # mypy knows that the name is httpcore2's own
    httpcore2._utils, "select", SimpleNamespace(poll=monkey.get_original("select", "poll"), POLLIN=select.POLLIN)
)


def http_client(kind: type[httpx2.Client], choice: str) -> httpx2.Client:
    """An SDK's kind of client, on the transport that PROVIDER_TRANSPORT names."""
    if choice == "httpx":
        return kind(limits=LIMITS, timeout=TIMEOUT)
    return transport.client(kind, TIMEOUT, LIMITS)


def read(
    response: Any,
    call: Call,
    whole: Callable[[bytes, Call], Events],
    events: Callable[[Iterator[bytes], Call], Events],
) -> Events:
    """The answer in an SDK's raw response: a stream, or one piece of JSON, also of a server that was asked for a stream.

    Raises ProviderFailed, also for a page of HTML: the login of a captive portal, or an address that is not an API's. Both SDKs
    take it for a stream without events.
    """
    call.answered = True
    kind = response.headers.get("content-type", "")
    if kind.startswith("text/html"):
        raise failed(MALFORMED, content_type="text/html")
    yield from whole(response.read(), call) if kind.startswith("application/json") else events(_chunks(response), call)


def _chunks(response: Any) -> Iterator[bytes]:
    """The bytes as they arrive: past httpx2's layers, where nothing is to be decoded and the transport is ours."""
    body: Iterable[bytes] | None = response.http_response.extensions.get(transport.BODY)
    if body is None or "content-encoding" in response.headers:
        return response.iter_bytes()  # type: ignore[no-any-return]
    return iter(body)


class ServerEvent(NamedTuple):
    """One server-sent event of a provider: its name (`b""` when it has none) and its data."""

    name: bytes
    data: bytes


def server_events(chunks: Iterable[bytes], call: Call) -> Iterator[list[ServerEvent]]:
    """The events in a byte stream, for each chunk those that it completed. Chunks may be cut anywhere.

    `call` notes when anything was heard, be it a comment. An event that the end of the stream cuts off is discarded (WHATWG
    9.2.6).
    """
    rest = b""
    for chunk in chunks:
        call.heard_at = time.monotonic()
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
        raise failed(MALFORMED) from error
