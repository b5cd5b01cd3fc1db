"""What survives: `python -m bench.chaos` (after `make test`, which installs a Redis).

Many streams with known texts run over the real service (gunicorn, two workers, a short lease) and a real Redis with an
append-only file, while a repeatable schedule of faults hits both:

    kill      SIGKILL to a worker                          restart   Redis killed, away for a while, back with its data
    stop      SIGSTOP to a worker for longer than its      empty     Redis killed, back with nothing
              lease, then SIGCONT                          double    Redis emptied within a second of a kill or a stop
    drain     SIGHUP: all workers replaced                 drop      a viewer's socket reset; it comes back with its last id

Nothing the service says about itself is taken for proof. What an answer must be is known before it is asked for; what the
provider was asked, when, and over which connection, is the provider's own record; what n8n was told is the receiver's;
what a viewer saw is what an EventSource of our own decoded. At the end the three are compared with each other and with
the times of the faults. Each row that says "must be 0" is one way in which they could disagree.

What cannot be saved is a session that nobody knew when Redis lost its data: the worker that had accepted it (pending), or
run it, was gone, or was killed or stopped in that same moment. Which worker that was is looked up in the kernel's tables
of connections, not asked of the service. Such sessions have rows of their own, with the reason.

Exit code 1, every finding with the story of its session, and all artefacts kept, where a row that must be 0 is not.
"""

import argparse
import contextlib
import http.client
import json
import math
import os
import platform
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from gevent import monkey

if not monkey.is_module_patched("socket"):
    monkey.patch_all()

import gevent
import redis
from gevent.pool import Pool

from tests.neighbours.provider import Asked, ProviderServer
from tests.neighbours.receiver import Received, Receiver
from tests.neighbours.scenarios import SEPARATOR
from tests.service import Service, n8n_token

HOST = "127.0.0.1"
LEASE = 2.0
#: Longer than the longest stream: a drain must not cut any.
DRAIN = 20
SESSION_TTL = 8.0
#: A connection silent for this long is dead to us: fifteen heartbeats, and more than the longest stop.
SILENCE = 15.0
#: Seconds after its last word for which a stream may still be waited for.
PATIENCE = 60.0
#: Seconds in which the last callbacks must come. One whose worker was lost in mid-attempt is hidden for 60.
SETTLE = 100.0
#: A callback has come this many seconds after it is due, or is lost: twice a lease, the longest outage, and a second.
OVERDUE = 2 * LEASE + 6.0
#: Until a killed or woken worker's traces are gone: the kernel closes its sockets, the woken one asks who owns what.
AFTERMATH = 1.0

ENVIRON = {
    "WEB_CONCURRENCY": "2",
    "LEASE_SECONDS": f"{LEASE:g}",
    "DRAIN_SECONDS": str(DRAIN),
    "SESSION_TTL_SECONDS": f"{SESSION_TTL:g}",
    "HEARTBEAT_SECONDS": "1",
    "REPLAY_SECONDS": "120",
    "CALLBACK_SCHEDULE": "0,0.5,1,2,2,3,3,3,5,5,5,5,10,10,10,10",
    "LOG_FORMAT": "json",
}

#: Kinds of streams and their shares.
KINDS = {
    "watched": 36,  # by one viewer
    "crowd": 15,  # by two or three, the later ones from the middle on
    "left": 10,  # its viewer leaves after a few events: the generation goes on
    "immediate": 8,  # "start": "immediate", and nobody ever opens it
    "nobody": 6,  # nobody ever opens it: expired
    "stopped": 8,  # POST …/cancel in mid-answer
    "stopped-early": 3,  # … while pending
    "deserted": 4,  # "onDisconnect": "cancel", and its viewer leaves
    "slow-start": 10,  # seconds before the first word: lost in that time, it runs once more
}
#: Kinds of faults and their shares; `drop` is made by the viewers.
FAULTS = {"kill": 30, "stop": 20, "restart": 20, "empty": 10, "drain": 10, "double": 10}
#: Of all faults, so many are those of FAULTS; the rest are drops.
SHARE = 0.55

FRAGMENTS = (
    *(" ", "  ", "\n", "\n\n", "\t", "\\n", "\u2028", " \u00e9", " \U0001f642", " \u6f22\u5b57", " \U0001f469\u200d\U0001f467"),
    *("[DONE]", "\n[DONE]\n", " data: ", "\ndata:", ": ", "\n: ", "\nid: 9-9\n", "\nevent: error\n", "retry: 1\n"),
    '{"type":"end"}',
)

#: Refusals that may pass: an EventSource comes back.
PASSING = {"store_unavailable", "too_many_viewers"}
#: Errors that say that a viewer cannot be told how its session ended.
UNTOLD = {"session_lost", "log_lost", "replay_over"}


@dataclass(frozen=True, slots=True)
class Options:
    """How much, and from which seed. Logs and stories go into a new folder in `folder` (None: where temporary files go)."""

    streams: int = 2000
    concurrency: int = 30
    faults: int = 200
    seed: int = 1
    without: frozenset[str] = frozenset()
    folder: Path | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is."""

    done: int
    of: int
    faults: int
    seconds: float
    phase: str


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. `zero`: it must be 0."""

    what: str
    count: int
    detail: str = ""
    zero: bool = False


@dataclass(frozen=True, slots=True)
class Report:
    """What came of a run. `failures` has each finding with the story of its session; empty: all is well."""

    rows: list[Row]
    failures: list[str]
    facts: dict[str, str]
    folder: Path

    def text(self) -> str:
        """The table, aligned."""
        width = max(len(row.what) for row in self.rows)
        lines = [f"{name}: {value}" for name, value in self.facts.items()]
        lines.append("")
        for row in self.rows:
            must = ("must be 0   " if row.zero else "") + row.detail
            lines.append(f"{row.what:{width}}  {row.count:6}   {must}".rstrip())
        return "\n".join(lines)

    def markdown(self) -> str:
        """The table as Markdown."""
        lines = ["# What survives: a chaos run", ""]
        lines += [f"- {name}: {value}" for name, value in self.facts.items()]
        lines += ["", "| | | |", "|---|---:|---|"]
        for row in self.rows:
            what = f"**{row.what}**" if row.zero else row.what
            lines.append(f"| {what.strip()} | {row.count} | {'must be 0: ' if row.zero else ''}{row.detail} |")
        return "\n".join(lines) + "\n"


# ---- What is going to happen: all of it from the seed ----


@dataclass(frozen=True, slots=True)
class Watching:
    """What one viewer does: comes after `delay` seconds; its line breaks after so many events of a connection; may leave."""

    delay: float
    json: bool
    breaks: tuple[int, ...]
    leaves_after: int | None
    seed: str


@dataclass(frozen=True, slots=True)
class Plan:
    """One stream: what the model says and how, who watches, and when somebody stops it. `at`: seconds into the schedule."""

    number: int
    kind: str
    family: str
    pieces: tuple[str, ...]
    pause_ms: int
    first_ms: int
    viewers: tuple[Watching, ...]
    stop_after: int | None
    stop_at: float | None
    at: float

    @property
    def text(self) -> str:
        """The whole answer, known before it is asked for."""
        return "".join(self.pieces)

    @property
    def lasts(self) -> float:
        """Seconds from the first viewer to the ending, when nothing happens."""
        return (self.first_ms + self.pause_ms * len(self.pieces)) / 1000


@dataclass(frozen=True, slots=True)
class Planned:
    """One fault: how long it lasts, how long it is quiet afterwards, and what chance decides (the victim, for one)."""

    kind: str
    at: float
    lasts: float
    quiet: float
    victim: float
    delay: float
    variant: int


def plan_faults(options: Options) -> list[Planned]:
    """The schedule of the faults that hit processes. After Redis was emptied, nobody is hurt until everything is written anew."""
    rng = random.Random(f"faults {options.seed}")
    shares = {kind: share for kind, share in FAULTS.items() if kind not in options.without}
    kinds = _deal(shares, math.ceil(options.faults * SHARE), rng)
    schedule: list[Planned] = []
    at = 2.0
    for kind, following in zip(kinds, [*kinds[1:], ""], strict=True):
        lasts = {
            "kill": 0.0,
            "stop": rng.uniform(LEASE * 1.2, LEASE * 2.2),
            "restart": rng.choice((rng.uniform(0.5, LEASE), rng.uniform(LEASE, 5.0))),
            "empty": rng.uniform(0.1, 1.5) + AFTERMATH,
            "drain": 0.0,
            "double": rng.uniform(LEASE * 1.2, LEASE * 2.2) + 1.0 + AFTERMATH,
        }[kind]
        quiet = rng.uniform(3.0, 5.0) if kind in ("kill", "drain") else rng.uniform(1.5, 3.0)
        if kind in ("empty", "double") or following in ("empty", "double"):
            # Before it: who was lost must have been recovered, else it would be a double fault that nobody meant.
            quiet = max(quiet, LEASE + 2.5)
        schedule.append(Planned(kind, at, lasts, quiet, rng.random(), rng.uniform(0.0, 0.8), rng.randrange(3)))
        at += lasts + quiet
    return schedule


def plan_streams(options: Options, seconds: float) -> list[Plan]:
    """The streams, spread over the schedule's `seconds`, and their viewers' broken lines."""
    rng = random.Random(f"streams {options.seed}")
    shares = {kind: share for kind, share in KINDS.items() if kind not in options.without}
    kinds = _deal(shares, options.streams, rng)
    drops = 0 if "drop" in options.without else max(1.6 * options.faults * (1 - SHARE), options.streams / 5)
    per_viewer = drops / max(1, sum(kind in ("watched", "crowd", "slow-start", "stopped") for kind in kinds))
    return [_plan(number, kind, per_viewer, seconds * number / len(kinds), rng) for number, kind in enumerate(kinds)]


def _plan(number: int, kind: str, drops: float, at: float, rng: random.Random) -> Plan:
    count, pause_ms, first_ms = rng.randint(20, 80), rng.randint(40, 100), rng.randint(0, 300)
    if kind == "slow-start":
        count, first_ms = rng.randint(8, 20), rng.randint(1500, 4000)
    elif kind == "deserted":
        count, pause_ms = 80, 110
    pieces = [f"{number}.{i}{rng.choice(FRAGMENTS)}" if rng.random() > 0.04 else "[DONE]" for i in range(count)]
    watchers = {"crowd": rng.randint(2, 3), "immediate": 0, "nobody": 0, "stopped-early": 0}.get(kind, 1)
    viewers = []
    for i in range(watchers):
        stays = kind not in ("left", "deserted")
        breaks = tuple(rng.randint(1, 12) for _ in range(int(drops) + (rng.random() < drops % 1))) if stays else ()
        delay = rng.uniform(0.3, 4.0) if i else rng.uniform(0.0, 0.2)
        viewers.append(Watching(delay, rng.random() < 0.4, breaks, None if stays else rng.randint(2, 8), f"{number} {i} {at}"))
    return Plan(
        number=number,
        kind=kind,
        family=rng.choice(("gpt", "claude")),
        pieces=(*pieces, f"/{number}"),
        pause_ms=pause_ms,
        first_ms=first_ms,
        viewers=tuple(viewers),
        stop_after=rng.randint(1, count // 2) if kind == "stopped" else None,
        stop_at=rng.uniform(0.2, 2.0) if kind == "stopped-early" else None,
        at=at,
    )


def _deal(shares: Mapping[str, int], count: int, rng: random.Random) -> list[str]:
    """`count` cards in these shares, at least one of each kind if there are enough, shuffled."""
    if not shares:
        return []
    total = sum(shares.values())
    cards = list(shares)[:count]
    while len(cards) < count:
        held = Counter(cards)
        cards.append(max(shares, key=lambda kind: shares[kind] * count / total - held[kind]))
    rng.shuffle(cards)
    return cards


# ---- What has happened ----


@dataclass(slots=True)
class Trouble:
    """One thing that was done to a process: killed, stopped, away, emptied, drained. Times are `time.time()`.

    `ports`: of a killed worker or an emptied Redis, the provider connections that the worker, or every worker, had just before.
    `left`: which workers were there after Redis had come back empty.
    """

    what: str
    since: float
    until: float = math.inf
    pid: int | None = None
    ports: dict[int, frozenset[int]] = field(default_factory=dict)
    left: frozenset[int] = frozenset()

    def touches(self, since: float, until: float) -> bool:
        """Whether it lasted into that time."""
        return self.since <= until and self.until >= since

    def __str__(self) -> str:
        who = f"worker {self.pid}" if self.pid else "all workers" if self.what == "drained" else "Redis"
        return f"{who} {self.what}" + (f" for {self.until - self.since:.1f} s" if self.until > self.since else "")


@dataclass(slots=True)
class Session:
    """One stream of the run: its plan, and what became of it at our end. `notes`: what happened when."""

    plan: Plan
    id: str = ""
    target: str = ""
    path: str = ""
    model: str = ""
    accepted_at: float = math.inf
    accepted_by: int | None = None
    stop_answered: tuple[float, int] | None = None
    ended: bool = False
    undefined: list[str] = field(default_factory=list)
    refused: int = 0
    viewers: list["Viewer"] = field(default_factory=list)
    notes: list[tuple[float, str]] = field(default_factory=list)

    @property
    def accepted(self) -> bool:
        """Whether its ending is owed."""
        return bool(self.id)

    def note(self, text: str) -> None:
        """Remembers what happened, for its story."""
        self.notes.append((time.time(), text))


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

    def __init__(self, session: Session, number: int, watching: Watching, port: int) -> None:
        self.text = ""
        self.outcome = ""
        self.code = ""
        self.ended_at = math.inf
        self.drops = 0
        self.connects = 0
        self.refusals = 0
        self.seen = 0
        self.flaws: list[str] = []
        self._session = session
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
        target = self._session.target + ("&format=json" if self._watching.json else "")
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
        self._session.notes.append((began, f"{self._name} connects after {headers.get('Last-Event-ID', '-')}: {status or '-'}"))
        self._session.note(f"{self._name} {how}; {events}")

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
            self._session.undefined.append(f"{self._name} got {said}")
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


# ---- Processes ----


def redis_program() -> str | None:
    """A redis-server (or valkey-server) on PATH or in the venv, as the tests look for it."""
    path = f"{sys.prefix}/bin:{os.environ['PATH']}"
    return shutil.which("redis-server", path=path) or shutil.which("valkey-server", path=path)


class Redis:
    """A Redis with an append-only file that can be killed and started, with its data and without."""

    def __init__(self, program: str, folder: Path) -> None:
        self.port = _quiet_port()
        self._program = program
        self._folder = folder
        self._lives = 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it is."""
        return f"redis://{HOST}:{self.port}"

    def start(self, *, empty: bool = False) -> None:
        """Starts it and waits until it answers."""
        self._lives += empty or not self._lives
        data = self._folder / f"redis-{self._lives}"
        data.mkdir(exist_ok=True)
        command = [self._program, "--bind", HOST, "--port", str(self.port), "--dir", str(data), "--save", ""]
        command += ["--appendonly", "yes", "--maxmemory-policy", "noeviction", "--auto-aof-rewrite-percentage", "0"]
        with (self._folder / "redis.log").open("a") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        until = time.monotonic() + 15
        while not self._answers():
            assert self._process.poll() is None and time.monotonic() < until, f"Redis: see {self._folder}/redis.log"
            gevent.sleep(0.01)

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        with socket.socket() as sock:
            sock.settimeout(1.0)
            try:
                sock.connect((HOST, self.port))
                sock.sendall(b"PING\r\n")
                return sock.recv(16).startswith(b"+PONG")
            except OSError:
                return False


def _quiet_port() -> int:
    """A free port below those the kernel gives to clients: while Redis is away, a client must not be given its port."""
    while True:
        with contextlib.suppress(OSError), socket.socket() as sock:
            sock.bind((HOST, random.randint(15_000, 31_000)))
            return int(sock.getsockname()[1])


def workers_of(master: int) -> list[int]:
    """The processes that gunicorn has started."""
    try:
        return sorted(int(pid) for pid in Path(f"/proc/{master}/task/{master}/children").read_text().split())
    except OSError:
        return []


def connections_of(pid: int) -> set[tuple[int, int]]:
    """The (own, other) ports of a process's TCP connections."""
    table: dict[str, tuple[int, int]] = {}
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        own, other = (int(address.rpartition(":")[2], 16) for address in fields[1:3])
        table[f"socket:[{fields[9]}]"] = own, other
    found = set()
    with contextlib.suppress(OSError):  # it may end meanwhile
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                found.add(table.get(os.readlink(f"/proc/{pid}/fd/{name}"), (0, 0)))
    return found


# ---- The run ----


class Run:
    """One run: the neighbours, the streams, the faults."""

    def __init__(self, options: Options, folder: Path, program: str) -> None:
        self.options = options
        self.folder = folder
        self.schedule = plan_faults(options)
        self.seconds = self.schedule[-1].at + self.schedule[-1].lasts + 1 if self.schedule else options.streams / 10
        self.plans = plan_streams(options, self.seconds)
        self.sessions: list[Session] = []
        self.troubles: list[Trouble] = []
        self.faults: Counter[str] = Counter()
        self.began = time.time()
        self.provider = ProviderServer()
        self.n8n = Receiver()
        self.redis = Redis(program, folder)
        self.service: Service
        self._now: tuple[float, float, float] = (0.0, 0.0, self.began)

    def start(self) -> None:
        """Starts everything."""
        self.provider.start()
        self.n8n.__enter__()
        self.redis.start()
        environ = {**self.provider.environ, **ENVIRON, "REDIS_URL": self.redis.url}
        self.service = Service(self.folder / "service.log", environ)
        self.service.start()
        self._wait_for_workers()
        self.began = time.time()

    def stop(self) -> None:
        """Ends everything that was started; in order if nobody is in a hurry."""
        with contextlib.suppress(AttributeError, AssertionError):
            pids = [self.service.pid, *workers_of(self.service.pid)]
            if sys.exc_info()[0] is not None:
                for pid in pids:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            self.service.stop()
        self.redis.kill()
        self.n8n.__exit__()
        self.provider.stop()

    def drive(self) -> None:
        """All streams and all faults, to the end of both."""
        streams = Pool(self.options.concurrency)
        faults = gevent.spawn(self._hurt)
        try:
            for plan in self.plans:
                while self._scheduled() < plan.at and not faults.ready():
                    gevent.sleep(0.02)
                session = Session(plan)
                self.sessions.append(session)
                streams.spawn(self._live, session)
            streams.join()
            faults.join()
            faults.get()
        finally:
            faults.kill()
            streams.kill()

    def settle(self) -> None:
        """Waits until every callback has come that can come, then a moment for those that should not."""
        until = time.time() + SETTLE
        while time.time() < until:
            got = {received.path for received in self.n8n.requests}
            if all(not session.accepted or session.path in got for session in self.sessions) and self._nothing_is_due():
                break
            gevent.sleep(0.2)
            if until - time.time() < SETTLE - 15 and self._only_the_unsaved_are_missing(got):
                break
        gevent.sleep(2.0)

    def evidence(self) -> "Evidence":
        """Everything that was seen, for the judge."""
        return Evidence(self.sessions, self.troubles, self.n8n.requests, self.provider.requests())

    def leaks(self) -> list[str]:
        """What is left in Redis and at the provider that should not be."""
        found = []
        with contextlib.closing(redis.Redis.from_url(self.redis.url)) as client:
            for key in client.scan_iter("*", 1000):
                kind = client.type(key)
                # The store's birth certificate lives as long as the store.
                if kind not in (b"zset", b"none") and client.ttl(key) == -1 and not key.endswith(b":birth"):
                    found.append(f"key without a time to live: {key!r}")
            for member in client.zrange("aistream:{0}:deadlines", 0, -1):
                if not client.exists(b"aistream:{0}:session:" + member):
                    found.append(f"deadline without a session: {member!r}")
        until = time.monotonic() + 10
        while (count := self.provider.open_streams()) and time.monotonic() < until:
            gevent.sleep(0.1)
        return found + [f"{count} provider streams still open"] * bool(count)

    def progress(self, phase: str) -> Progress:
        """How far it is."""
        done = sum(session.ended for session in self.sessions)
        return Progress(done, len(self.plans), sum(self.hits().values()), time.time() - self.began, phase)

    def hits(self) -> Counter[str]:
        """Faults by kind, the dropped lines included."""
        drops = sum(viewer.drops for session in self.sessions for viewer in session.viewers)
        return self.faults + Counter({"drop": drops})

    def _nothing_is_due(self) -> bool:
        with contextlib.closing(redis.Redis.from_url(self.redis.url)) as client:
            return not client.zcard("aistream:{0}:deadlines")

    def _only_the_unsaved_are_missing(self, got: set[str]) -> bool:
        missing = [session for session in self.sessions if session.accepted and session.path not in got]
        evidence = self.evidence()
        return bool(missing) and all(evidence.unknown_to_all(session) for session in missing) and self._nothing_is_due()

    # Streams

    def _scheduled(self) -> float:
        """Seconds into the schedule: streams keep step with the faults, also where these are late."""
        at, length, began = self._now
        return at + min(length, time.time() - began)

    def _live(self, session: Session) -> None:
        try:
            plan = session.plan
            if not self._init(session):
                return
            watching = enumerate(plan.viewers)
            session.viewers = [Viewer(session, number, one, self.service.port) for number, one in watching]
            until = time.time() + plan.lasts + PATIENCE
            parts = [gevent.spawn(viewer.watch, until) for viewer in session.viewers]
            if plan.kind in ("stopped", "stopped-early"):
                parts.append(gevent.spawn(self._stop_stream, session, until))
            try:
                for part in gevent.joinall(parts):
                    part.get()
            finally:
                gevent.killall(parts)
        finally:
            session.ended = True

    def _init(self, session: Session) -> bool:
        plan = session.plan
        until = time.time() + PATIENCE
        body = {"prompt": SEPARATOR.join(plan.pieces), "userId": f"user {plan.number}", "chatId": plan.number}
        body |= {"immediate": {"start": "immediate"}}.get(plan.kind, {})
        body |= {"deserted": {"onDisconnect": "cancel", "disconnectGraceSeconds": 1}}.get(plan.kind, {})
        attempt = 0
        while time.time() < until:
            # An init whose answer was lost may have been accepted: what becomes of it must not look like ours.
            session.path = f"/w/{plan.number}/{attempt}"
            name = f"{plan.family}-test-say-d{plan.pause_ms}-f{plan.first_ms}"
            session.model = f"{name}-i{plan.number}{attempt:02}"
            attempt += 1
            asked = {**body, "model": session.model, "resumeUrl": self.n8n.url(session.path), "n8nToken": n8n_token()}
            wait = self._ask_init(session, asked)
            if wait is None:
                return session.accepted
            gevent.sleep(wait)
        session.undefined.append(f"init was not accepted within {PATIENCE:g} s")
        return False

    def _ask_init(self, session: Session, asked: Mapping[str, Any]) -> float | None:
        """One POST: None where it was answered for good, else the seconds after which to ask again."""
        connection = http.client.HTTPConnection(HOST, self.service.port, timeout=SILENCE)
        try:
            connection.connect()
            session.accepted_by = self._worker_at(connection.sock)
            connection.request("POST", "/init-stream", json.dumps(asked), {"Content-Type": "application/json"})
            response = connection.getresponse()
            said = response.read()
            if response.status == 200:
                answer = json.loads(said)
                session.accepted_at = time.time()
                session.id = answer["streamId"]
                session.target = answer["streamUrl"].removeprefix(f"http://{HOST}:{self.service.port}")
                warned = f", warnings {answer['warnings']}" if answer["warnings"] else ""
                session.note(f"accepted as {session.id} by worker {session.accepted_by}{warned}")
                return None
            if response.status == 503 and response.headers.get_content_type() == "application/problem+json":
                session.refused += 1
                session.note(f"init refused: {said[:300]!r}")
                return float(response.headers["Retry-After"])
            session.undefined.append(f"init got {response.status} {said[:300]!r}")
            session.note(session.undefined[-1])
            return None
        except (OSError, http.client.HTTPException) as error:
            session.note(f"init broke: {type(error).__name__} {error}")
            return 0.3
        finally:
            connection.close()

    def _worker_at(self, sock: socket.socket) -> int | None:
        """The worker that has accepted a connection; asked before the request, since a worker that drains closes it after."""
        ports = (self.service.port, sock.getsockname()[1])
        for _ in range(20):
            for pid in workers_of(self.service.pid):
                if ports in connections_of(pid):
                    return pid
            gevent.sleep(0.02)
        return None

    def _stop_stream(self, session: Session, until: float) -> None:
        plan = session.plan
        if plan.stop_at is not None:
            gevent.sleep(plan.stop_at)
        else:
            viewer = session.viewers[0]
            while viewer.seen < (plan.stop_after or 0) and not viewer.outcome:
                gevent.sleep(0.02)
        path, _, query = session.target.partition("?")
        while time.time() < until:
            connection = http.client.HTTPConnection(HOST, self.service.port, timeout=SILENCE)
            try:
                connection.request("POST", f"{path}/cancel?{query}")
                response = connection.getresponse()
                said = response.read(300)
                session.note(f"cancel got {response.status} {said!r}")
                if response.status in (200, 202):
                    session.stop_answered = (time.time(), response.status)
                    return
                if response.status != 503 or response.headers.get_content_type() != "application/problem+json":
                    session.undefined.append(f"cancel got {response.status} {said!r}")
                    return
                gevent.sleep(float(response.headers["Retry-After"]))
            except (OSError, http.client.HTTPException) as error:
                session.note(f"cancel broke: {type(error).__name__} {error}")
                gevent.sleep(0.3)
            finally:
                connection.close()
        session.undefined.append(f"cancel was not answered within {PATIENCE:g} s")

    # Faults

    def _hurt(self) -> None:
        self._now = (0.0, self.schedule[0].at if self.schedule else self.seconds, time.time())
        if not self.schedule:
            gevent.sleep(self.seconds)
            return
        gevent.sleep(self.schedule[0].at)
        for planned in self.schedule:
            workers = self._wait_for_workers()
            self._now = (planned.at, planned.lasts + planned.quiet, time.time())
            victim = self._choose(workers, planned.victim)
            match planned.kind:
                case "kill":
                    self._kill(victim)
                case "stop":
                    self._stop_worker(victim, planned.lasts)
                case "restart":
                    self._restart(planned.lasts)
                case "empty":
                    self._empty(planned.lasts - AFTERMATH)
                case "drain":
                    os.kill(self.service.pid, signal.SIGHUP)
                    self.troubles.append(Trouble("drained", time.time(), time.time()))
                case "double":
                    self._double(planned, victim)
            self.faults[planned.kind] += 1
            gevent.sleep(planned.quiet)

    def _choose(self, workers: list[int], dice: float) -> int:
        """In two of three cases the one with most to lose: gevent's workers do not share evenly."""
        if dice < 2 / 3:
            return max(workers, key=lambda pid: len(self._provider_ports(pid)))
        return workers[int((dice * 3 - 2) * len(workers))]

    def _wait_for_workers(self) -> list[int]:
        """The workers that serve (they have a connection to Redis) as soon as there are two."""
        until = time.monotonic() + 30
        while True:
            ready = [pid for pid in workers_of(self.service.pid) if self._has_store(pid)]
            if len(ready) >= 2:
                return ready
            assert time.monotonic() < until, f"no two workers within 30 s: see {self.folder}/service.log"
            gevent.sleep(0.1)

    def _has_store(self, pid: int) -> bool:
        return any(other == self.redis.port for _, other in connections_of(pid))

    def _kill(self, pid: int) -> None:
        ports = {pid: self._provider_ports(pid)}
        os.kill(pid, signal.SIGKILL)
        self.troubles.append(Trouble("killed", time.time(), time.time(), pid, ports))

    def _provider_ports(self, pid: int) -> frozenset[int]:
        provider = urlsplit(self.provider.url).port
        return frozenset(own for own, other in connections_of(pid) if other == provider)

    def _stop_worker(self, pid: int, seconds: float) -> None:
        trouble = Trouble("stopped", time.time(), pid=pid)
        self.troubles.append(trouble)
        os.kill(pid, signal.SIGSTOP)
        try:
            gevent.sleep(seconds)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
            trouble.until = time.time()

    def _restart(self, away: float) -> None:
        trouble = Trouble("away", time.time())
        self.troubles.append(trouble)
        self.redis.kill()
        gevent.sleep(away)
        self.redis.start()
        trouble.until = time.time()

    def _empty(self, away: float) -> None:
        ports = {pid: self._provider_ports(pid) for pid in workers_of(self.service.pid)}
        trouble = Trouble("emptied", time.time(), ports=ports)
        self.troubles.append(trouble)
        self.redis.kill()
        gevent.sleep(away)
        self.redis.start(empty=True)
        trouble.until = time.time()
        gevent.sleep(AFTERMATH)
        trouble.left = frozenset(workers_of(self.service.pid))

    def _double(self, planned: Planned, victim: int) -> None:
        """A worker is killed just before Redis is emptied, or just after, or is stopped meanwhile."""
        away = 0.9 - planned.delay
        emptied = gevent.spawn_later(planned.delay if planned.variant else 0.0, self._empty, away)
        try:
            if planned.variant == 2:
                self._stop_worker(victim, planned.lasts - 1.0 - AFTERMATH)
            else:
                gevent.sleep(0.0 if planned.variant else planned.delay)
                self._kill(victim)
            emptied.join()
            emptied.get()
        finally:
            emptied.kill()


# ---- The verdict ----


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that must not be: against which row, and in which session."""

    rule: str
    text: str
    session: Session | None = None


LOST = "lost endings"
AGAIN = "callbacks sent again for no reason"
TWO_ENDINGS = "sessions with two different endings"
TWO_WORKERS = "sessions run by two workers at once"
TEXT = "doubled or missing characters"
UNDEFINED = "undefined answers"
WRONG = "endings that nothing explains"
STUCK = "viewers without an ending"
LEAKS = "leaks"
RULES = {
    LOST: "accepted, could be saved, and n8n was never told",
    AGAIN: "after a 2xx, with no worker lost and Redis there",
    TWO_ENDINGS: "callbacks that differ, or a viewer that saw another ending than n8n",
    TWO_WORKERS: "provider requests that overlap by over a second, or one too many",
    TEXT: "a text that is not the known one, not a part from its start, or ids with a gap",
    UNDEFINED: "404, 5xx or whatever docs/http.md does not have",
    WRONG: "failed without a lost worker, expired though it was opened, not stopped though told so",
    STUCK: "nothing within a minute of the last word",
    LEAKS: "keys without a time to live, deadlines without a session, open provider streams",
}


class Evidence:
    """What was seen, indexed by session."""

    def __init__(
        self, sessions: Sequence[Session], troubles: Sequence[Trouble], received: Iterable[Received], asked: Iterable[Asked]
    ) -> None:
        self.sessions = [session for session in sessions if session.accepted]
        self.all_sessions = list(sessions)
        self.troubles = list(troubles)
        self._received: dict[str, list[Received]] = {}
        for one in received:
            self._received.setdefault(one.path, []).append(one)
        self._asked: dict[str, list[Asked]] = {}
        for request in asked:
            self._asked.setdefault(request.model, []).append(request)

    def callbacks(self, session: Session) -> list[Received]:
        """The session's callbacks, in order."""
        return self._received.get(session.path, [])

    def asked(self, session: Session) -> list[Asked]:
        """What the provider was asked for the session, in order."""
        return self._asked.get(session.model, [])

    def delivered_at(self, session: Session) -> float:
        """When the first callback came."""
        callbacks = self.callbacks(session)
        return callbacks[0].at if callbacks else math.inf

    def trouble(self, since: float, until: float, *what: str) -> list[Trouble]:
        """What happened to processes in that time."""
        return [one for one in self.troubles if one.what in what and one.touches(since, until)]

    def unknown_to_all(self, session: Session) -> str:
        """Why the session could not be saved: how it stood when Redis lost its data, and what its worker's trouble was."""
        for emptied in self.troubles:
            if emptied.what != "emptied" or session.accepted_at > emptied.until or self.delivered_at(session) <= emptied.since:
                continue
            state, pid, due_at = self._knower(session, emptied)
            if emptied.since > due_at + OVERDUE:
                continue  # it was lost already, and not by this
            # What a worker knew it has written anew one lease after Redis is back, unless it is hurt before.
            for one in self.trouble(emptied.since - AFTERMATH, emptied.until + LEASE + 1.5, "killed", "stopped"):
                if one.pid == pid:
                    return f"{state}, its worker {one.what} in the same moment"
            if pid is None or pid not in emptied.ports:
                return f"{state}, its worker gone before"
            if state == "pending" and pid not in emptied.left:
                return f"{state}, its worker drained away meanwhile"
        return ""

    def unsaved(self) -> list[tuple[Session, str]]:
        """The sessions that could not be saved, and were not, each with the reason."""
        lost = [session for session in self.sessions if not self.callbacks(session)]
        return [(session, why) for session in lost if (why := self.unknown_to_all(session))]

    def _knower(self, session: Session, emptied: Trouble) -> tuple[str, int | None, float]:
        """How the session stood when Redis was emptied, the worker whose memory had it, and when its callback is due."""
        requests = [one for one in self.asked(session) if one.started_at <= emptied.since]
        if not requests:
            return "pending", session.accepted_by, session.accepted_at + SESSION_TTL
        last = requests[-1]
        killed = self.trouble(last.started_at, emptied.since, "killed")
        ports = [item for one in (emptied, *killed) for item in one.ports.items()]
        holder = next((pid for pid, own in ports if last.client_port in own), None)
        ended_at = math.inf if last.ended_at is None else last.ended_at
        ended = last.ended == "complete" and ended_at <= emptied.since
        return "ended, callback owed" if ended else "running", holder, ended_at

    def forgotten(self, session: Session, at: float) -> bool:
        """Whether Redis had lost the session after its end, and before `at`: nobody need know it any more."""
        delivered = self.delivered_at(session)
        return any(one.what == "emptied" and one.until >= delivered and one.since <= at for one in self.troubles)


def judge(evidence: Evidence, leaks: Sequence[str]) -> tuple[list[Row], list[Finding]]:
    """The table, and everything that must not be."""
    findings = [Finding(LEAKS, leak) for leak in leaks]
    unsaved = Counter(why for _, why in evidence.unsaved())
    again_with_reason = 0
    for session in evidence.all_sessions:
        findings += [Finding(UNDEFINED, text, session) for text in session.undefined if not _excused_404(evidence, session)]
    for session in evidence.sessions:
        callbacks = evidence.callbacks(session)
        if not callbacks and not evidence.unknown_to_all(session):
            findings.append(Finding(LOST, "no callback", session))
        repeats, reasons = _repeats(evidence, session)
        again_with_reason += reasons
        findings += [Finding(AGAIN, text, session) for text in repeats]
        findings += [Finding(TWO_ENDINGS, text, session) for text in _two_endings(evidence, session)]
        findings += [Finding(TWO_WORKERS, text, session) for text in _two_workers(evidence, session)]
        findings += [Finding(TEXT, text, session) for text in _characters(evidence, session)]
        findings += [Finding(WRONG, text, session) for text in _unexplained(evidence, session)]
        findings += [Finding(STUCK, "a viewer got no ending", session) for one in session.viewers if one.outcome == "stuck"]
    got = sum(bool(evidence.callbacks(session)) for session in evidence.sessions)
    rows = [
        *_viewer_rows(evidence, findings),
        Row("callbacks owed", len(evidence.sessions)),
        Row("callbacks got", got, _list(_statuses(evidence))),
        Row("sessions that could not be saved", sum(unsaved.values()), _list(unsaved)),
        Row("callbacks sent again", again_with_reason, "a worker lost, or Redis away or emptied, before the answer was noted"),
        Row("generations run once more", sum(len(evidence.asked(one)) == 2 for one in evidence.sessions), "lost before a word"),
        Row("inits refused and repeated", sum(session.refused for session in evidence.all_sessions), "503 while Redis was away"),
    ]
    counts = Counter(finding.rule for finding in findings)
    rows += [Row(rule, counts[rule], detail, zero=True) for rule, detail in RULES.items()]
    return rows, findings


def _viewer_rows(evidence: Evidence, findings: Sequence[Finding]) -> list[Row]:
    flawed = {id(finding.session) for finding in findings if finding.rule in (TEXT, TWO_ENDINGS)}
    exact, stopped, left, unsaved, forgotten = 0, 0, 0, 0, 0
    codes: Counter[str] = Counter()
    viewers = [(session, viewer) for session in evidence.sessions for viewer in session.viewers]
    for session, viewer in viewers:
        if viewer.outcome == "done" and viewer.text == session.plan.text:
            exact += 1
        elif viewer.outcome == "done" and id(session) not in flawed:
            stopped += 1
        elif viewer.outcome == "left":
            left += 1
        elif viewer.code in ("session_lost", "404") and evidence.unknown_to_all(session):
            unsaved += 1
        elif viewer.code in ("session_lost", "404") and evidence.forgotten(session, viewer.ended_at):
            forgotten += 1
        elif viewer.outcome == "error":
            codes[viewer.code] += 1
    reconnects = sum(max(0, viewer.connects - 1) for _, viewer in viewers)
    refusals = sum(viewer.refusals for _, viewer in viewers)
    return [
        Row("viewers", len(viewers), f"{reconnects} reconnects, {refusals} of them refused until the store was back"),
        Row("  whose text was exact, with [DONE]", exact),
        Row("  of a stopped answer, exact up to there", stopped),
        Row("  that left, exact up to there", left),
        Row("  with a defined error", sum(codes.values()), _list(codes)),
        Row("  whose session could not be saved", unsaved),
        Row("  back after Redis lost an ended session", forgotten),
    ]


def _excused_404(evidence: Evidence, session: Session) -> bool:
    """Whether all that the session's clients were told is that it is gone, and so it is."""
    gone = session.accepted and (evidence.unknown_to_all(session) or evidence.forgotten(session, math.inf))
    return bool(gone) and all(" got 404 " in text for text in session.undefined)


def _repeats(evidence: Evidence, session: Session) -> tuple[list[str], int]:
    """Callbacks after the first, which got its 2xx: those that nothing explains, and the number of the others."""
    callbacks = evidence.callbacks(session)
    found, explained = [], 0
    for before, after in pairwise(callbacks):
        # What came of an attempt is said to the store until it hears it: while Redis is away, the answer is only in memory.
        if evidence.trouble(before.at - 1.5, after.at, "killed", "stopped", "away", "emptied"):
            explained += 1
        else:
            found.append(f"sent again {after.at - before.at:.3f} s after a 2xx")
    return found, explained


def _two_endings(evidence: Evidence, session: Session) -> list[str]:
    callbacks = [one.json for one in evidence.callbacks(session)]
    endings = {(one["status"], one["answer"], (one["error"] or {}).get("code")) for one in callbacks}
    found = []
    if len(endings) > 1:
        found.append("callbacks differ: " + "; ".join(f"{status} {code} {len(text)} chars" for status, text, code in endings))
    if {one["streamId"] for one in callbacks} - {session.id}:
        found.append("a callback names another session")
    if not callbacks:
        return found
    status, code = callbacks[0]["status"], (callbacks[0]["error"] or {}).get("code")
    for viewer in session.viewers:
        if viewer.outcome == "done" and status not in ("completed", "cancelled"):
            found.append(f"a viewer saw [DONE], n8n got {status} {code}")
        if viewer.outcome == "error" and viewer.code not in UNTOLD and viewer.code not in (code, status):
            found.append(f"a viewer saw {viewer.code}, n8n got {status} {code}")
        lost = viewer.outcome == "error" and viewer.code == "session_lost"
        if lost and not evidence.unknown_to_all(session) and not evidence.forgotten(session, viewer.ended_at):
            found.append(f"a viewer was told session_lost, n8n got {status} {code}")
    return found


def _two_workers(evidence: Evidence, session: Session) -> list[str]:
    requests = evidence.asked(session)
    found = []
    for i, first in enumerate(requests):
        for second in requests[i + 1 :]:
            since = max(first.started_at, second.started_at)
            until = min(first.ended_at or time.time(), second.ended_at or time.time())
            overlap = until - since - _stopped_between(evidence, since, until)
            if overlap > 1.0:
                found.append(f"two provider requests at once for {overlap:.1f} s while no worker was stopped")
    hurt = evidence.trouble(session.accepted_at, math.inf, "killed", "stopped")
    if len(requests) > 1 and not [one for one in hurt if one.since <= requests[-1].started_at]:
        found.append(f"run {len(requests)} times, though no worker was lost")
    if len(requests) > 2 and not evidence.unknown_to_all(session):
        found.append(f"run {len(requests)} times")
    return found


def _stopped_between(evidence: Evidence, since: float, until: float) -> float:
    """Seconds of that time in which a worker was stopped, or had just been woken."""
    covered, at = 0.0, since
    for one in sorted(evidence.trouble(since - AFTERMATH, until, "stopped"), key=lambda one: one.since):
        begin, end = max(at, one.since), min(until, one.until + AFTERMATH)
        covered += max(0.0, end - begin)
        at = max(at, end)
    return covered


def _characters(evidence: Evidence, session: Session) -> list[str]:
    known = session.plan.text
    found = []
    callbacks = [one.json for one in evidence.callbacks(session)]
    status = callbacks[0]["status"] if callbacks else ""
    for number, viewer in enumerate(session.viewers):
        found += [f"viewer {number}: {flaw}" for flaw in viewer.flaws]
        if viewer.outcome == "done" and status != "cancelled":
            whole, what = viewer.text == known, "[DONE]"
        else:
            whole, what = known.startswith(viewer.text), viewer.outcome
        if not whole:
            found.append(f"viewer {number} ({what}): {_difference(known, viewer.text)}")
        if viewer.outcome == "done" and status == "cancelled" and viewer.text != (answer := callbacks[0]["answer"]):
            # A viewer may be ahead of the log by one window, which goes with its worker.
            lost = evidence.trouble(session.accepted_at, viewer.ended_at, "killed", "stopped")
            if not (lost and viewer.text.startswith(answer)):
                found.append(f"viewer {number} of a stopped answer has {len(viewer.text)} chars, n8n {len(answer)}")
        if viewer.outcome == "ended":
            found.append(f"viewer {number} was sent away with 204 before it had an ending")
    for one in callbacks:
        if not (one["answer"] == known if one["status"] == "completed" else known.startswith(one["answer"])):
            found.append(f"callback ({one['status']}): {_difference(known, one['answer'])}")
        if one["prompt"] != SEPARATOR.join(session.plan.pieces) or one["userId"] != f"user {session.plan.number}":
            found.append("callback with another prompt or user")
    return found


def _difference(known: str, got: str) -> str:
    """Where two texts part, in a few words."""
    at = bisect_left(range(min(len(known), len(got))), True, key=lambda i: known[: i + 1] != got[: i + 1])
    return f"{len(got)} of {len(known)} chars, from {at} on {got[at : at + 60]!r} instead of {known[at : at + 60]!r}"


def _unexplained(evidence: Evidence, session: Session) -> list[str]:
    callbacks = evidence.callbacks(session)
    if not callbacks or evidence.unknown_to_all(session):
        return []
    said, at, kind = callbacks[0].json, callbacks[0].at, session.plan.kind
    status = said["status"]
    lost = evidence.trouble(session.accepted_at - LEASE, at, "killed", "stopped")
    # While a worker is stopped or Redis is away, nobody can open or stop anything.
    any_trouble = lost or evidence.trouble(session.accepted_at - LEASE, at, "away", "emptied", "drained")
    ending = f"{status} {(said['error'] or {}).get('code') or ''}".strip()
    if status == "failed" and (not lost or said["error"]["code"] != "worker_lost"):
        return [f"ended as {ending}" + ("" if lost else " though no worker was lost")]
    if status == "cancelled" and kind not in ("stopped", "stopped-early", "deserted"):
        return [f"ended as {ending}, which nobody asked for"]
    if status == "expired" and kind != "nobody" and (kind == "immediate" or not any_trouble):
        return [f"ended as {ending} though it was opened"]
    if status == "completed" and kind in ("nobody", "stopped-early"):
        return [f"ended as {ending} though nobody opened it"]
    if status == "completed" and kind == "deserted" and not any_trouble:
        return [f"ended as {ending} though its viewer had left"]
    stop = session.stop_answered
    flag_lost = evidence.trouble(session.accepted_at, at, "emptied")
    if stop is not None and stop[1] == 202 and status not in ("cancelled", "failed") and not flag_lost:
        return [f"ended as {ending} though its stop was accepted"]
    return []


def _statuses(evidence: Evidence) -> Counter[str]:
    return Counter(callbacks[0].json["status"] for one in evidence.sessions if (callbacks := evidence.callbacks(one)))


def _list(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))


# ---- The story of a finding ----


def story(finding: Finding, evidence: Evidence, began: float, log: Mapping[str, list[tuple[float, str]]]) -> str:
    """A finding with everything that happened to its session, and to the processes meanwhile, in order of time."""
    session = finding.session
    if session is None:
        return f"{finding.rule}: {finding.text}"
    plan = session.plan
    happened = list(session.notes)
    for request in evidence.asked(session):
        happened.append((request.started_at, f"PROVIDER asked, request {request.number} from port {request.client_port}"))
        if request.ended_at is not None:
            told = f"PROVIDER request {request.number} {request.ended} after {request.deltas} of {len(plan.pieces)} deltas"
            happened.append((request.ended_at, told))
    for one in evidence.callbacks(session):
        said = one.json
        code = (said["error"] or {}).get("code")
        text = f"N8N gets attempt {said['attempt']}: {said['status']} {code or ''}, {len(said['answer'])} chars"
        happened.append((one.at, text))
    happened += log.get(session.id, [])
    first = min((at for at, _ in happened), default=began)
    last = max((at for at, _ in happened), default=began)
    for trouble in evidence.trouble(first - 5, last + 2, "killed", "stopped", "away", "emptied", "drained"):
        happened.append((trouble.since, f"FAULT {trouble}"))
        if trouble.until > trouble.since:
            happened.append((trouble.until, f"FAULT is over: {trouble}"))
    lines = [f"{finding.rule}: {finding.text}"]
    lines.append(f"  stream {plan.number} ({plan.kind}), session {session.id}, {session.model}, {len(plan.text)} chars")
    for number, viewer in enumerate(session.viewers):
        mode = "json" if plan.viewers[number].json else "text"
        lines.append(f"  viewer {number} ({mode}): {viewer.outcome} {viewer.code}, {len(viewer.text)} chars")
    lines += [f"  {at - began:9.3f}  {text}" for at, text in sorted(happened)]
    return "\n".join(lines)


def log_by_session(path: Path) -> dict[str, list[tuple[float, str]]]:
    """The service's log lines by session."""
    found: dict[str, list[tuple[float, str]]] = {}
    for line in path.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            said = json.loads(line)
            at = datetime.fromisoformat(said.pop("timestamp")).timestamp()
            session = said.pop("session")
            name = said.pop("event")
            found.setdefault(session, []).append((at, f"LOG {name} " + " ".join(f"{k}={v}" for k, v in said.items())))
    return found


def errors_in_log(path: Path) -> Counter[str]:
    """The service's own errors by name: none is expected, and each is worth a look."""
    found: Counter[str] = Counter()
    for line in path.read_text(errors="replace").splitlines():
        if line.startswith("Traceback"):
            found["Traceback"] += 1
        with contextlib.suppress(ValueError, KeyError, TypeError):
            said = json.loads(line)
            if said["level"] == "error" and said["event"] != "callback.attempted":
                found[f"{said['event']} ({said.get('exception', '')})"] += 1
    return found


def run(options: Options, say: Callable[[Progress], None]) -> Report:
    """Does it all. `say` is told twice a second how far it is. Everything it starts has ended when it returns or raises."""
    program = redis_program()
    if program is None:
        raise FileNotFoundError("redis-server is not installed: `make test` installs one")
    # A folder of its own in any case: what an earlier run has left in a Redis would come alive again.
    folder = Path(tempfile.mkdtemp(prefix="aistream-chaos-", dir=options.folder))
    one = Run(options, folder, program)
    phase = "streams"
    talking = None
    findings = []
    try:
        one.start()

        def talk() -> None:
            while True:
                say(one.progress(phase))
                gevent.sleep(0.5)

        talking = gevent.spawn(talk)
        limit = 2 * one.seconds + 120
        with gevent.Timeout(limit) as timer:
            try:
                one.drive()
            except gevent.Timeout as over:
                if over is not timer:
                    raise
                findings.append(Finding(STUCK, f"the run did not end within {limit:.0f} s"))
        phase = "the last callbacks"
        one.settle()
        evidence, leaks = one.evidence(), one.leaks()
        say(one.progress("the verdict"))
    finally:
        if talking is not None:
            talking.kill()
        one.stop()
    rows, found = judge(evidence, leaks)
    findings += found
    hits = one.hits()
    if sum(hits.values()) < options.faults:
        findings.append(Finding(WRONG, f"only {sum(hits.values())} of {options.faults} faults happened"))
    log = log_by_session(folder / "service.log")
    failures = [story(finding, evidence, one.began, log) for finding in findings]
    excused = [Finding(f"could not be saved: {why}", "", session) for session, why in evidence.unsaved()]
    (folder / "troubles.txt").write_text(
        "\n".join(f"{trouble.since - one.began:9.3f}  {trouble!r}" for trouble in evidence.troubles)
    )
    (folder / "failures.txt").write_text("\n\n".join(failures))
    (folder / "unsaved.txt").write_text("\n\n".join(story(finding, evidence, one.began, log) for finding in excused))
    kinds = Counter(session.plan.kind for session in evidence.sessions)
    errors = errors_in_log(folder / "service.log")
    rows = [
        Row("streams accepted", len(evidence.sessions), _list(kinds)),
        Row("faults", sum(hits.values()), _list(hits)),
        *rows[: -len(RULES)],
        Row("errors in the service's log", sum(errors.values()), _list(errors)),
        *rows[-len(RULES) :],
    ]
    return Report(rows, failures, _facts(options, program, one.began), folder)


def _facts(options: Options, program: str, began: float) -> dict[str, str]:
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    command = f"python -m bench.chaos --streams {options.streams} --concurrency {options.concurrency}"
    command += f" --faults {options.faults} --seed {options.seed}"
    if options.without:
        command += f" --without {','.join(sorted(options.without))}"
    return {
        "command": f"`{command}`",
        "versions": f"Python {platform.python_version()}, Redis {version.split('v=')[-1].split()[0]}",
        "machine": f"{os.cpu_count()} cores",
        "date": time.strftime("%Y-%m-%d"),
        "duration": f"{time.time() - began:.0f} s",
        "settings": f"2 workers, LEASE_SECONDS={LEASE:g}, DRAIN_SECONDS={DRAIN}, SESSION_TTL_SECONDS={SESSION_TTL:g}",
    }


def _sayer() -> Callable[[Progress], None]:
    """A line that rewrites itself on a terminal; a line every ten seconds elsewhere."""
    last = -10.0
    terminal = sys.stderr.isatty()

    def say(progress: Progress) -> None:
        nonlocal last
        text = f"{progress.done}/{progress.of} streams, {progress.faults} faults, {progress.seconds:.0f} s, {progress.phase}"
        if terminal:
            bar = "#" * (30 * progress.done // max(1, progress.of))
            print(f"\r[{bar:30}] {text}   ", end="", file=sys.stderr, flush=True)
        elif progress.seconds - last >= 10:
            last = progress.seconds
            print(text, file=sys.stderr, flush=True)

    return say


def main() -> int:
    """Runs it and prints the table."""
    known = {*KINDS, *FAULTS, "drop"}
    defaults = Options()
    parser = argparse.ArgumentParser(prog="python -m bench.chaos", description="Faults on the real service; see the module.")
    parser.add_argument("--streams", type=int, default=defaults.streams)
    parser.add_argument("--concurrency", type=int, default=defaults.concurrency, help="streams at the same time, at most")
    parser.add_argument("--faults", type=int, default=defaults.faults, help="of all kinds, at least")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--without", default="", help=f"kinds to leave out, of {', '.join(sorted(known))}")
    parser.add_argument("--markdown", type=Path, help="file for the table")
    parser.add_argument("--keep", type=Path, help="keep logs and stories, in a new folder in this one, also if all is well")
    given = parser.parse_args()
    without = frozenset(filter(None, given.without.split(",")))
    if without - known:
        parser.error(f"unknown kinds: {', '.join(sorted(without - known))}")
    if given.keep:
        given.keep.mkdir(parents=True, exist_ok=True)
    options = Options(given.streams, given.concurrency, given.faults, given.seed, without, given.keep)
    try:
        report = run(options, _sayer())
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except FileNotFoundError as error:
        sys.exit(str(error))
    if sys.stderr.isatty():
        print(file=sys.stderr)
    print(report.text())
    if given.markdown:
        given.markdown.write_text(report.markdown())
    if report.failures:
        print("\n" + "\n\n".join(report.failures[:20]))
        print(f"\n{len(report.failures)} findings: all are in {report.folder}/failures.txt, beside unsaved.txt and the logs")
        return 1
    if given.keep is None:
        shutil.rmtree(report.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
