"""A client of the service: asks for an answer, follows its stream over as many connections as it takes, and stops it.

Uses JSON mode, which is exact. No text comes twice and none is left out: what has been seen is a whole event with its id, and a
new connection asks for what follows it. Sent with httpx2: it gives bytes as they arrive however the answer is framed, where
requests waits for the end of one without chunks.
"""

from __future__ import annotations

import json
import random
import re
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import httpx2

from aistream.cli.eventsource import Decoder, Message

#: Seconds without a byte after which a line counts as dead: three heartbeats.
SILENCE = 45.0
CONNECT = 5.0
#: Seconds before a new connection, doubled with each one in a row that brought nothing.
BACKOFF = 0.5
MOST_BACKOFF = 10.0
#: Seconds without a stream after which nobody is asked any more.
PATIENCE = 300.0
#: What a service that starts, drains or is too busy says, and a proxy before one that is away.
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})


class Refused(Exception):
    """The service, or whoever answers in its place, does not give what was asked for. `code` is the service's own, or `""`."""

    def __init__(self, message: str, code: str = "") -> None:
        super().__init__(message)
        self.code = code


class Started(NamedTuple):
    """An accepted init."""

    stream_id: str
    stream_url: str
    warnings: list[str]


@dataclass(frozen=True)
class Opened:
    """A connection stands. `reconnects`: how many were lost before it."""

    reconnects: int


@dataclass(frozen=True)
class Lost:
    """The connection is gone, or there was none; tried again in `delay` seconds."""

    reason: str
    delay: float


@dataclass(frozen=True)
class Said:
    """One event of JSON mode; `ends` where it is the last."""

    id: str
    event: dict[str, Any]
    ends: bool = False


class _Gone(Exception):
    """This connection brings nothing more; another one may."""


@dataclass
class Following:
    """One stream, followed to its ending.

    for one in Following(url).run():    # Opened, Said and Lost; the last one is a Said that ends
        ...
    """

    url: str
    last_id: str = ""
    reconnects: int = 0
    #: Whether a stream has ever been there.
    known: bool = False
    _pending: dict[str, Any] | None = field(default=None, init=False)
    _heard: bool = field(default=False, init=False)

    def run(self) -> Iterator[Opened | Lost | Said]:
        """What comes. Raises Refused where the service has no such stream for us, or was away for too long."""
        url, failures, away_since = in_json_mode(self.url), 0, time.monotonic()
        with _client() as client:
            while True:
                self._heard = False
                try:
                    for one in self._connection(client, url):
                        yield one
                        if isinstance(one, Said) and one.ends:
                            return
                    reason, held = "the line was cut", True
                except _Gone as gone:
                    reason, held = str(gone), False
                except httpx2.ReadTimeout:
                    reason, held = f"nothing came for {SILENCE:g} s", True
                except httpx2.TransportError as error:
                    reason, held = _reason(error), self._heard
                if held or self._heard:
                    away_since = time.monotonic()
                failures = 0 if self._heard else failures + 1
                if time.monotonic() - away_since > PATIENCE:
                    raise Refused(f"there was no stream for {PATIENCE:g} s: {reason}")
                delay = min(MOST_BACKOFF, BACKOFF * 2 ** min(failures, 8)) * random.uniform(0.8, 1.2)  # nosec B311  # no secret
                yield Lost(reason, delay)
                time.sleep(delay)
                self.reconnects += 1

    def _connection(self, client: httpx2.Client, url: str) -> Iterator[Opened | Said]:
        asked = self.last_id
        headers = {"Accept": "text/event-stream", **({"Last-Event-ID": asked} if asked else {})}
        with client.stream("GET", url, headers=headers) as response:
            if response.status_code == 204:
                raise Refused("the stream had ended before, and everything of it has been seen")
            if response.status_code in _PASSING:
                raise _Gone(f"{urlsplit(url).netloc} answers {response.status_code}")
            if response.status_code != 200:
                response.read()
                raise refusal(response)
            if not response.headers.get("Content-Type", "").startswith("text/event-stream"):
                if self.known:
                    raise _Gone("what answers is no stream")  # such as a proxy's page about the service that is away
                raise Refused("what answers is no stream of aistream")
            self.known = True
            yield Opened(self.reconnects)
            decoder = Decoder(asked)
            for data in response.iter_raw():
                for message in decoder.feed(data):
                    yield from self._take(message, asked)

    def _take(self, message: Message, asked: str) -> Iterator[Said]:
        if message.data == "[DONE]" and message.event == "message":
            self.last_id = message.id
            yield Said(message.id, self._pending or {"type": "end", "finish_reason": None}, ends=True)
            return
        try:
            event = json.loads(message.data)
        except ValueError:
            event = None
        if not isinstance(event, dict):
            raise Refused("what comes is not aistream's JSON mode")
        if message.event == "error":
            # What may pass has no id, or the one that was asked with; an ending has one of its own.
            if event.get("retryable") is True and message.id in ("", asked, self.last_id):
                raise _Gone(str(event.get("message") or event.get("code")))
            yield Said(message.id, {"type": "error", **event}, ends=True)
            return
        self._heard = True
        if event.get("type") in ("end", "cancelled"):
            self._pending = event  # it counts with [DONE], whose id covers both: a line cut between the two brings both again
            return
        self.last_id = message.id
        yield Said(message.id, event)


def start(base_url: str, token: str, body: dict[str, Any]) -> Started:
    """POST /init-stream. The stream's address is below `base_url`, whatever the service calls itself. Raises Refused."""
    headers = {"Authorization": f"Bearer {token}", "Idempotency-Key": uuid.uuid4().hex}
    try:
        with _client() as client:
            response = client.post(f"{base_url}/init-stream", json={**body, "format": "json"}, headers=headers)
    except httpx2.TransportError as error:
        raise Refused(f"no service answers at {base_url}: {_reason(error)}", "unreachable") from None
    if response.status_code != 200:
        raise refusal(response)
    try:
        told = response.json()
        stream_id, url = str(told["streamId"]), str(told["streamUrl"])
        below = url[url.rindex(f"/stream/{stream_id}") :]
    except (ValueError, KeyError, TypeError):
        raise Refused(f"what answers at {base_url} is not aistream") from None
    return Started(stream_id, base_url + below, [str(one) for one in told.get("warnings", [])])


def cancel(stream_url: str) -> str:
    """Stops the answer; what became of it: `cancelling`, or the ending that it has. Raises Refused where nobody could do it."""
    parts = urlsplit(stream_url)
    url = urlunsplit(parts._replace(path=parts.path + "/cancel"))
    refused = Refused("nobody answered")
    for pause in (0.5, 1.0, 2.0, 4.0, 0.0):
        try:
            with _client() as client:
                response = client.post(url)
            if response.status_code in (200, 202):
                return str(response.json().get("status"))
            refused = refusal(response)
            if response.status_code not in _PASSING:
                break
        except httpx2.TransportError as error:
            refused = Refused(_reason(error))
        except ValueError:
            refused = Refused("what answers is not aistream")
        time.sleep(pause)
    raise refused


def in_json_mode(url: str) -> str:
    """The stream's address with `format=json` in its query."""
    parts = urlsplit(url)
    query = [(name, value) for name, value in parse_qsl(parts.query, keep_blank_values=True) if name != "format"]
    return urlunsplit(parts._replace(query=urlencode([*query, ("format", "json")])))


def refusal(response: httpx2.Response) -> Refused:
    """What an answer that is no success says, in one line."""
    try:
        told = response.json()
        detail, code = str(told["detail"]), str(told.get("code", ""))
    except (ValueError, KeyError, TypeError, AttributeError):
        where = f", to {response.headers['Location'].partition('?')[0]}" if "Location" in response.headers else ""
        return Refused(f"{response.url.host} answers {response.status_code}{where}")
    return Refused(f"{detail} ({response.status_code} {code})", code)


def _client() -> httpx2.Client:
    return httpx2.Client(timeout=httpx2.Timeout(SILENCE, connect=CONNECT), headers={"Accept-Encoding": "identity"})


def _reason(error: httpx2.TransportError) -> str:
    """Without the address, which may hold a token."""
    if isinstance(error, httpx2.ConnectTimeout):
        return f"no connection within {CONNECT:g} s"
    if isinstance(error, httpx2.ConnectError):
        return re.sub(r"\[Errno -?\d+\] ", "", str(error)) or "no connection"
    if isinstance(error, httpx2.TimeoutException):
        return "no answer in time"
    return "the line was cut"
