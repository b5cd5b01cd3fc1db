"""What both SDK providers share: the SDK's HTTP client, and reading its raw response as server-sent events.

The SDKs make the request (auth, URL, errors, timeouts); their typed chunks are not built, since those cost five to ten
times what the bytes do.
"""

from __future__ import annotations

import json
import select
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, TypeVar

import httpcore2._utils
import httpx2
import msgspec
from gevent import monkey

from aistream.events import End, Reasoning, Text
from aistream.providers import transport
from aistream.providers.base import Call, Say
from aistream.providers.failures import MALFORMED, error_event, failed

T = TypeVar("T")

#: By which both SDKs know that a response is wanted as it is (openai 3.54.0, anthropic 2.12.0, `_constants.py`).
_RAW = "X-Stainless-Raw-Response"
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
        return kind(limits=LIMITS, timeout=TIMEOUT, verify=transport.trust())
    return transport.client(kind, TIMEOUT, LIMITS)


@contextmanager
def posted(client: Any, path: str, body: dict[str, Any], stream: type[Any] | None) -> Iterator[Any]:
    """An SDK's raw response to a request, as its `with_streaming_response` gives it. `stream`: its class of a stream.

    By the SDK's way for endpoints that it does not know, with its auth, URL, headers, timeouts and errors. The methods of those
    that it knows walk each parameter by its annotation: a third of a request's CPU, for a body that is complete.
    """
    options = {"headers": {_RAW: "stream"}}
    response = client.post(path, cast_to=object, body=body, options=options, stream=stream is not None, stream_cls=stream)
    try:
        yield response
    finally:
        response.close()


class Reading:
    """One answer, as its provider's events say it."""

    def __init__(self, call: Call) -> None:
        self.call = call
        #: What the events of this step have said so far.
        self.text = ""
        self.reasoning = ""
        #: It is over before the stream is: cut off, or by what the provider says of an error.
        self.ending: End | None = None
        self.error: Any = None

    def take(self, data: bytes) -> None:
        """Takes the data of one event. Raises ProviderFailed."""
        raise NotImplementedError

    def end(self) -> End:
        """How it ended, when the stream has. Raises ProviderFailed where it has not."""
        raise NotImplementedError


def read(response: Any, reading: Reading, whole: Callable[[bytes, Call, Say], End], say: Say) -> End:
    """The answer in an SDK's raw response: a stream, or one piece of JSON, also of a server that was asked for a stream.

    Raises ProviderFailed, also for a page of HTML: the login of a captive portal, or an address that is not an API's. Both SDKs
    take it for a stream without events.
    """
    call = reading.call
    call.answered = True
    kind = response.headers.get("content-type", "")
    if kind.startswith("text/html"):
        raise failed(MALFORMED, content_type="text/html")
    if kind.startswith("application/json"):
        ending = whole(response.read(), call, say)
    else:
        _read(_chunks(response), reading, say)
        if reading.ending is not None:
            return reading.ending  # cut off: what is known of the usage is not all of it
        ending = reading.end()
    if call.usage is not None:
        say(call.usage)
    return ending


def _read(chunks: Iterable[bytes], reading: Reading, say: Say) -> None:
    """Said, and not yielded: each generator between a greenlet and its wait lies on the stack that its switches copy."""
    call, take, events = reading.call, reading.take, ServerEvents()
    for chunk in chunks:
        call.heard_at = time.monotonic()
        try:
            # One whole event, of data alone, and nothing else: servers send a token so.
            if (
                chunk[-2:] == b"\n\n"
                and chunk.find(b"\n") == len(chunk) - 2
                and chunk[:6] == b"data: "
                and not events.rest
                and b"\r" not in chunk
            ):
                take(chunk[6:-2])
            else:
                for data in events.feed(chunk):
                    take(data)
                    if reading.error is not None or reading.ending is not None:
                        break
        finally:  # also what was said before nonsense in the same step
            if reading.text or reading.reasoning:
                text, reasoning = reading.text, reading.reasoning
                reading.text = reading.reasoning = ""
                if reasoning:  # thought comes before word
                    say(Reasoning(reasoning))
                if text:
                    say(Text(text))
        if reading.error is not None:  # after the words of the same step, which it may quote: a log must not have them
            raise error_event(reading.error, call)
        if reading.ending is not None:
            return


def _chunks(response: Any) -> Iterable[bytes]:
    """The bytes as they arrive: past httpx2's layers, where nothing is to be decoded and the transport is ours."""
    body: Iterable[bytes] | None = response.http_response.extensions.get(transport.BODY)
    if body is None or "content-encoding" in response.headers:
        return response.iter_bytes()  # type: ignore[no-any-return]
    return body


class ServerEvents:
    """The server-sent events in a byte stream: their data alone, since what their names say stands in it too."""

    __slots__ = ("rest",)

    def __init__(self) -> None:
        #: The beginning of an event whose end is still to come.
        self.rest = b""

    def feed(self, chunk: bytes) -> list[bytes]:
        """The events that this chunk completes. Chunks may be cut anywhere.

        An event that the end of the stream cuts off is discarded (WHATWG 9.2.6).
        """
        data = self.rest + chunk if self.rest else chunk
        if b"\r" in data:
            # JSON holds no bare CR or LF, so these are line ends; the LF of a last CR may still be on its way.
            held = b"\r" if data.endswith(b"\r") else b""
            data = data[: len(data) - len(held)].replace(b"\r\n", b"\n").replace(b"\r", b"\n") + held
        blocks = data.split(b"\n\n")
        self.rest = blocks.pop()
        return [found for found in map(_data, blocks) if found is not None]


def _data(block: bytes) -> bytes | None:
    if block.startswith(b"data: ") and b"\n" not in block:
        return block[6:]
    lines = []
    for line in block.split(b"\n"):
        field, _, value = line.partition(b":")
        if field == b"data":
            lines.append(value.removeprefix(b" "))
    return b"\n".join(lines) if lines else None


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
