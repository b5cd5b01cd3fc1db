"""A viewer: an EventSource of our own, whose line breaks as planned, and which checks each event that it gets."""

import contextlib
import http.client
import json
import math
import random
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass

import gevent

from bench.chaos.plan import Watching
from tests.neighbours.http1 import HOST

#: A connection silent for this long is dead to us: fifteen heartbeats, and more than the longest stop.
SILENCE = 15.0


#: Refusals that may pass: an EventSource comes back.
PASSING = {"store_unavailable", "too_many_viewers"}


@dataclass(frozen=True, slots=True)
class Message:
    """One server-sent event. `id` is the id line of this very event, None where it has none."""

    id: str | None
    event: str
    data: str


class Decoder:
    """Bytes in, events out, as WHATWG 9.2.6 has it."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[str] = []
        self._event = ""
        self._id: str | None = None

    def feed(self, chunk: bytes) -> Iterator[Message]:
        """The events that `chunk` completes. What is not completed by a blank line never was."""
        self._rest += chunk
        held = b"\r" if self._rest.endswith(b"\r") else b""  # whether a LF follows is not known yet
        whole = self._rest.removesuffix(b"\r").replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *lines, rest = whole.split(b"\n")
        self._rest = rest + held
        for line in lines:
            if not line:
                if self._data:
                    yield Message(self._id, self._event or "message", "\n".join(self._data))
                self._data, self._event, self._id = [], "", None
            else:
                self._field(line.decode(errors="replace"))

    def _field(self, line: str) -> None:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
        elif name == "event":
            self._event = value
        elif name == "id" and "\0" not in value:
            self._id = value


class Viewer:
    """One EventSource: reads, breaks off as planned, comes back with its last id, and notes what is wrong with what it gets.

    outcome: `""` while it watches, `done` ([DONE]), `error` (`code` says which), `left` (as planned), `ended` (204),
    `undefined` (an answer that must not be), or `stuck` (no ending in time).
    """

    def __init__(self, target: str, number: int, watching: Watching, port: int) -> None:
        """`target`: path and query of its stream."""
        self.text = ""
        self.outcome = ""
        self.code = ""
        self.ended_at = math.inf
        self.drops = 0
        self.connects = 0
        self.refusals = 0
        self.seen = 0
        self.flaws: list[str] = []
        #: Answers that must not be.
        self.undefined: list[str] = []
        #: What happened when.
        self.notes: list[tuple[float, str]] = []
        self._target = target
        self._name = f"viewer {number}"
        self._watching = watching
        self._port = port
        self._rng = random.Random(watching.seed)
        self._breaks = list(watching.breaks)
        self._last_id = ""
        self._last: tuple[int, int] | None = None
        self._recent: list[str] = []

    def watch(self, until: float) -> None:
        """Watches to the end, or to `until`."""
        gevent.sleep(self._watching.delay)
        while not self.outcome:
            if time.time() > until:
                self._end("stuck")
                return
            self._connect()
            if not self.outcome:
                gevent.sleep(self._rng.uniform(0.3, 2.0))

    def _connect(self) -> None:
        headers = {"Accept": "text/event-stream", "Cache-Control": "no-store"}
        if self._last_id:
            headers["Last-Event-ID"] = self._last_id
        target = self._target + ("&format=json" if self._watching.json else "")
        connection = http.client.HTTPConnection(HOST, self._port, timeout=SILENCE)
        self.connects += 1
        began, seen = time.time(), self.seen
        how = "closed by the server"
        status = 0
        try:
            connection.request("GET", target, headers=headers)
            sock = connection.sock
            with contextlib.closing(connection.getresponse()) as response:
                status = response.status
                how = self._answer(response, sock) or how
        except (OSError, http.client.HTTPException) as error:
            how = f"broke: {type(error).__name__} {error}"
            if isinstance(error, TimeoutError):
                self.flaws.append(f"nothing, not even a heartbeat, for {SILENCE:g} s")
        finally:
            connection.close()
        events = f"{self.seen - seen} events, the last {' '.join(self._recent[-4:]) or '-'}"
        self.notes.append((began, f"{self._name} connects after {headers.get('Last-Event-ID', '-')}: {status or '-'}"))
        self.notes.append((time.time(), f"{self._name} {how}; {events}"))

    def _answer(self, response: http.client.HTTPResponse, sock: socket.socket) -> str:
        """Takes an answer; says how it ended, or `""` where the server closed it."""
        kind = response.headers.get_content_type()
        if response.status == 204:
            self._end("ended")
            return "is sent away with 204"
        if response.status == 503 and kind == "application/problem+json":
            self.refusals += 1
            return f"is refused: {response.read(300)!r}"
        if response.status != 200 or kind != "text/event-stream":
            said = f"{response.status} {kind} {response.read(300)!r}"
            self._end("undefined", str(response.status))
            self.undefined.append(f"{self._name} got {said}")
            return f"got {said}"
        return self._read(response, sock)

    def _read(self, response: http.client.HTTPResponse, sock: socket.socket) -> str:
        decoder = Decoder()
        seen = 0
        while chunk := response.read1(65536):
            for message in decoder.feed(chunk):
                self._take(message)
                seen += 1
                if self.outcome:
                    return f"has {self.outcome} {self.code}"
                if self._watching.leaves_after and self.seen >= self._watching.leaves_after:
                    self._end("left")
                    _reset(sock)
                    return "leaves"
                if self._breaks and seen >= self._breaks[0]:
                    self._breaks.pop(0)
                    self.drops += 1
                    _reset(sock)
                    return "is cut off"
        return ""

    def _take(self, message: Message) -> None:
        self.seen += 1
        self._recent = [*self._recent[-5:], f"{message.id or '-'}:{message.event}"]
        what, text = self._meaning(message)
        if what == "flaw":
            self.flaws.append(f"does not understand {message}")
        else:
            self._check_order(message.id, what)
        if message.id is not None:
            self._last_id = message.id
        self.text += text
        if what == "done":
            self._end("done")
        elif what == "error":
            if text := _code(message.data):
                self._end("error", text)
            else:
                self.refusals += 1

    def _meaning(self, message: Message) -> tuple[str, str]:
        """What an event is (`text`, `silent`, `end`, `done`, `error`, `flaw`), and its text."""
        if message.event == "error":
            return "error", ""
        if message.event != "message":
            return "flaw", ""
        if message.data == "[DONE]":
            return "done", ""
        if not self._watching.json:
            return "text", message.data
        try:
            said = json.loads(message.data)
            if said["type"] == "text":
                return "text", said["text"]
            return {"start": "silent", "usage": "silent", "end": "end", "cancelled": "end"}[said["type"]], ""
        except (ValueError, KeyError, TypeError):
            return "flaw", ""

    def _check_order(self, event_id: str | None, what: str) -> None:
        """Ids rise; within an epoch without a gap; and who has seen an epoch's text never sees another's."""
        if event_id is None:
            if what not in ("end", "error"):
                self.flaws.append(f"{what} without an id after {self._last_id}")
            return
        last = self._last
        try:
            epoch, seq = (int(part) for part in event_id.split("-"))
        except ValueError:
            self.flaws.append(f"{what} with the id {event_id!r}")
            return
        new = (epoch, seq)
        if what == "error":  # a refusal has the id of what was seen last
            if last is not None and new < last:
                self.flaws.append(f"error {event_id} after {self._last_id}")
            return
        self._last = new
        # The usage in front of [DONE] has an id, but text mode does not show it.
        step = 2 if what == "done" and not self._watching.json else 1
        if last is None or last[0] < epoch:
            if seq > step and what != "done":
                self.flaws.append(f"{what} {event_id} is the first of its epoch, after {self._last_id or 'nothing'}")
            if last is not None and last[1] >= 1 and what == "text":
                self.flaws.append(f"{what} {event_id} of another epoch after {self._last_id}")
        elif new <= last:
            self.flaws.append(f"{what} {event_id} after {self._last_id}: again, or out of order")
        elif seq - last[1] > step:
            self.flaws.append(f"{what} {event_id} after {self._last_id}: a gap")

    def _end(self, outcome: str, code: str = "") -> None:
        self.outcome, self.code, self.ended_at = outcome, code, time.time()


def _code(data: str) -> str:
    """The code of a final error, `""` of one that may pass."""
    try:
        code = str(json.loads(data)["code"])
    except (ValueError, KeyError, TypeError):
        return f"unreadable {data[:100]!r}"
    return "" if code in PASSING else code


def _reset(sock: socket.socket) -> None:
    """Makes the close that follows a reset (RST), as of a line that broke."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
