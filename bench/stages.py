"""What a token, and what a session, costs at each stage of the service: py-spy looks at the worker from outside.

The worker's stack is read a few hundred times a second while it runs; each stack is given to a stage by the innermost of its
frames that tells (`stage_of`). A stage's cost is its share of the samples times the CPU of the service, which is read from
/proc in a window without samples. The worker is not stopped for a sample (at hundreds a second that would overload it), so one
in ten is lost or torn where the stack changes meanwhile; beside samples that stop it, shares agreed to five points. Nothing of
this is in the service, so that any commit can be measured. Where py-spy may not look (it needs the right to ptrace), everything
but Redis is one stage, `other`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bench.load.rig import Came, Load, Rig, Server, check

HUB = "hub and epoll"
READ = "read from the provider"
DECODE = "decode"
LOG = "generation and log"
FRAMES = "frames"
SEND = "send to the viewer"
WRITER = "log writer, Redis client"
REDIS = "Redis server"
INIT = "init request"
VIEW = "viewer's request"
HTTP = "gunicorn and Flask, per request"
ASK = "SDK's request"
END = "ending and callback"
TELEMETRY = "log lines and metrics"
LOOPS = "leases and other loops"
OTHER = "other"

#: In the order of a token's way, then of a session's.
STAGES = [HUB, READ, DECODE, LOG, FRAMES, SEND, WRITER, REDIS, INIT, VIEW, HTTP, ASK, END, TELEMETRY, LOOPS, OTHER]

#: Modules of the service that work for whoever called them, as gevent, the standard library and the Redis client do; and those
#: that are not on the way of a session.
NEUTRAL = [
    *("store", "scripts", "connections", "session", "tokens", "parse", "endpoints", "retry_after", "errors", "sockets", "worker"),
    *("patience", "turns"),
    *("__init__", "__main__", "cli", "wsgi", "server", "config", "installation", "environment", "kernel_limits", "tls"),
]
#: What a frame tells, by `function (path`. Modules of older commits and of newer ones stand side by side.
_TELLING = [
    (
        TELEMETRY,
        r"aistream/(telemetry|metrics|meter|tally|loglines|server_lines|shared_metrics)\.py|/structlog/|/prometheus_client/",
    ),
    (FRAMES, r"aistream/sse\.py|^Log\.frames "),
    (READ, r"aistream/providers/(transport|http1|resolver)\.py|/httpx2/|/httpcore2/|/h11/"),
    (READ, r"/(openai|anthropic)/_(response|streaming)\.py"),
    (DECODE, r"aistream/providers/(wire|openai|anthropic|echo)\.py"),
    (ASK, r"/(openai|anthropic)/"),
    (WRITER, r"aistream/writer\.py"),
    (END, r"aistream/(delivery|outbound|callback|outbox|recall|destination|estimate)\.py|/requests/|/urllib3/"),
    (END, r"^Generation\.(finish|_commit|_reconcile|_written|_estimate) |^_report "),
    (INIT, r"aistream/api/init\.py|aistream/limits\.py|/pydantic/"),
    (VIEW, r"aistream/api/stream\.py|^Viewer\.(__init__|open|watch|close|_look|_unwatch) |^Viewing\."),
    (VIEW, r"^Generations\.(claim|_ask|_begin) "),
    (SEND, r"aistream/viewing\.py|^AsyncWorker\.handle_request |^ClosingIterator\."),
    (SEND, r"^Response\.(write|_emit_body) .*gunicorn/|^write(_chunk)? .*gunicorn/"),
    (HTTP, r"/gunicorn/|/flask/|/flask_cors/|/werkzeug/|aistream/app\.py|aistream/api/"),
    (LOG, r"aistream/(generation|asking|log|events|pulse)\.py|aistream/providers/"),
    (LOOPS, r"aistream/(background|follower|garbage)\.py"),
    (HUB, r"^Hub\.run .*gevent/hub\.py"),
]
_RULES = [(stage, re.compile(pattern)) for stage, pattern in _TELLING]
#: Under these the provider's connection works for a request, not for an answer.
_ASKING = re.compile(r"/(openai|anthropic)/_base_client\.py")
#: A thread that only waits for work.
_IDLE = re.compile(r"gevent/(threadpool|_threading)|/threading\.py")

#: Many streams at a steady pace: what a token costs. CPU is read in the window, samples are taken after it.
TOKENS = Load(streams=150, tokens=240, rate=20, per_second=100, settle=1, window=4)
#: Short sessions, twenty at a time: what a session costs.
SESSIONS = Load(streams=250, tokens=10, rate=20, per_second=1000, at_once=20)
#: Samples per second, and seconds of them.
RATE, SAMPLED = 400, 5


@dataclass(frozen=True, slots=True)
class Stages:
    """µs per token, and ms per session of `session_tokens`, by stage. `setup_ms`: a session without its tokens."""

    token_us: Mapping[str, float]
    session_ms: Mapping[str, float]
    session_tokens: int
    setup_ms: float
    samples: int
    came: Came

    @property
    def total_us(self) -> float:
        """Per token."""
        return sum(self.token_us.values())

    def json(self) -> dict[str, Any]:
        """For the file of results."""
        return {
            "token_us": dict(self.token_us),
            "session_ms": dict(self.session_ms),
            "session_tokens": self.session_tokens,
            "setup_ms": self.setup_ms,
            "samples": self.samples,
            "load": self.came.summary(),
        }


def stage_of(frames: Sequence[str]) -> str:
    """The stage of a stack; the innermost frame is the last. `function (path:line)` each."""
    for frame in reversed(frames):
        for stage, pattern in _RULES:
            if pattern.search(frame):
                if stage == READ and any(map(_ASKING.search, frames)):
                    return ASK
                return stage
    return OTHER


def counted(lines: Iterable[str]) -> Counter[str]:
    """Samples by stage, of py-spy's raw output: frames separated by semicolons, then a number. Threads that wait do not count."""
    counts: Counter[str] = Counter()
    for line in lines:
        stack, _, number = line.rpartition(" ")
        frames = stack.split(";")
        if not _IDLE.search(frames[0]):
            counts[stage_of(frames)] += int(number)
    return counts


def measure(rig: Rig, server: Server, *, quick: bool = False) -> Stages:
    """Both loads, on a server that is warm. Raises Failed."""
    tokens = replace(TOKENS, streams=10, tokens=40, settle=0.1, window=0.5) if quick else TOKENS
    sessions = replace(SESSIONS, streams=10, tokens=4) if quick else SESSIONS
    with rig.driving(server, tokens) as drive:
        used = drive.steady()
        token_samples = _sample(rig, server, 1 if quick else SAMPLED)
        came = drive.finish(used)
    check(came, server)
    token_us = _shared(token_samples, came.token_us - came.redis_us, came.redis_us)
    with rig.driving(server, sessions) as drive:
        drive.until(0)
        session_samples = _sample(rig, server, 1 if quick else SAMPLED - 1)
        sessions_came = drive.finish(used)
    check(sessions_came, server)
    each = 1000 / sessions.streams
    session_ms = _shared(session_samples, sessions_came.whole.service * each, sessions_came.whole.redis * each)
    setup_ms = sum(session_ms.values()) - sessions.tokens * sum(token_us.values()) / 1000
    return Stages(token_us, session_ms, sessions.tokens, setup_ms, token_samples.total() + session_samples.total(), came)


def _sample(rig: Rig, server: Server, seconds: int) -> Counter[str]:
    program = shutil.which("py-spy", path=f"{sys.prefix}/bin:{os.environ['PATH']}")
    if program is None:
        print("py-spy is not installed: `make bench` installs it", file=sys.stderr)
        return Counter()
    target = rig.folder / "samples"
    command = [program, "record", "--rate", str(RATE), "--duration", str(seconds), "--format", "raw"]
    command += ["--full-filenames", "--nonblocking", "--pid", str(server.workers[0]), "--output", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"py-spy cannot look at the worker: {done.stderr.strip()[-500:]}", file=sys.stderr)
        return Counter()
    with target.open() as lines:
        return counted(lines)


def _shared(samples: Counter[str], service: float, redis: float) -> dict[str, float]:
    total = max(1, samples.total())
    shared = {stage: service * samples[stage] / total for stage in STAGES} | {REDIS: redis}
    return shared if samples else shared | {OTHER: service}
