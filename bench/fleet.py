"""What many open streams need, from measured unit costs: the arithmetic of docs/performance.md.

Every stream is an answer of `ANSWER` tokens at a steady pace; when it ends, another begins. A core, be it a worker's or
Redis', is loaded to `LOADED`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from aistream.config import settings
from aistream.kernel_limits import CONNECTIONS, RESERVE
from bench.stages import REDIS

#: Tokens of an answer: with its pace, how long a stream is open.
ANSWER = 1_000
#: Share of a core that is planned for.
LOADED = 0.8
#: Bytes around each write on an Ethernet: its own header, IP's, and TCP's with time stamps.
PACKET = 66
#: Tokens per second of a stream: a slow model that thinks, and a fast one.
PACES = [1, 20]
#: Seconds for which Redis keeps a finished session at least.
REPLAY = float(settings()["REPLAY_SECONDS"].default)
#: Answers of one provider at the same time on one worker, by default.
PLACES = int(settings()["PROVIDER_CONCURRENCY"].default)


@dataclass(frozen=True, slots=True)
class Units:
    """Unit costs at one pace. `token_us`, `setup_ms`: of a worker; `redis_…`: of Redis."""

    pace: float
    token_us: float
    redis_token_us: float
    setup_ms: float
    redis_setup_ms: float
    stream_kib: float
    worker_kib: float
    stream_files: float
    kept_bytes: float
    provider_bytes: float
    viewer_bytes: float
    ports: int
    files: int

    @classmethod
    def of(cls, results: Mapping[str, Any], pace: float) -> Units:
        """From the file of results: at 1 token a second those of the slow open streams, else those of the steady load."""
        held = results["memory"]["open"][-1]
        load = held if pace == PACES[0] else results["comparison"]["service"]["steady"]
        session, by_stage = results["memory"]["session"], results["stages"]
        tokens_ms = by_stage["session_tokens"] * by_stage["token_us"][REDIS] / 1000
        redis_setup = max(0.0, by_stage["session_ms"][REDIS] - tokens_ms)
        return cls(
            pace=pace,
            token_us=load["token_us"] - load["redis_us"],
            redis_token_us=load["redis_us"],
            setup_ms=max(0.0, results["comparison"]["service"]["setup_ms"] - redis_setup),
            redis_setup_ms=redis_setup,
            stream_kib=held["stream_kib"],
            worker_kib=results["memory"]["empty_pss_kib"],
            stream_files=held["stream_files"],
            kept_bytes=session["kept_bytes"] / session["answer_tokens"] * ANSWER,
            provider_bytes=session["provider_bytes"] + PACKET,
            viewer_bytes=session["viewer_bytes"] + PACKET * session["viewer_writes"],
            ports=results["facts"]["local_ports"],
            files=results["facts"]["files"],
        )

    @property
    def stream_us(self) -> float:
        """CPU of a worker for one open stream, in µs per second."""
        return self.pace * self.token_us + self.pace / ANSWER * self.setup_ms * 1000

    @property
    def redis_stream_us(self) -> float:
        """CPU of Redis for one open stream, in µs per second."""
        return self.pace * self.redis_token_us + self.pace / ANSWER * self.redis_setup_ms * 1000


@dataclass(frozen=True, slots=True)
class Limit:
    """What bounds the streams of one worker, and how many that are."""

    what: str
    streams: int


def limits(units: Units) -> list[Limit]:
    """The limits of one worker, the one that is met first in front."""
    found = [
        Limit(f"its core, {LOADED:.0%} busy", int(LOADED * 1e6 / max(0.001, units.stream_us))),
        Limit("`PROVIDER_CONCURRENCY` (default)", PLACES),
        Limit("gunicorn's `worker_connections`", CONNECTIONS),
        Limit("local ports towards one address of the provider", units.ports),
        Limit(f"descriptors, at `ulimit -n` {units.files:,}", int((units.files - RESERVE) / max(0.001, units.stream_files))),
    ]
    return sorted(found, key=lambda limit: limit.streams)


@dataclass(frozen=True, slots=True)
class Fleet:
    """What so many open streams need. Memory in GiB, network in Gbit/s."""

    streams: int
    tokens_per_second: float
    sessions_per_second: float
    cores: float
    workers: int
    breaks_first: str
    memory: float
    redis_cores: float
    shards: int
    redis_memory: float
    from_provider: float
    to_viewers: float


def fleet(units: Units, streams: int) -> Fleet:
    """By the formulas that stand on the page."""
    tokens = streams * units.pace
    sessions = tokens / ANSWER
    first = limits(units)[0]
    workers = math.ceil(streams / max(1, first.streams))
    redis_cores = streams * units.redis_stream_us / 1e6
    # Open sessions are half written on average; finished ones are whole.
    kept = (streams / 2 + sessions * REPLAY) * units.kept_bytes
    return Fleet(
        streams=streams,
        tokens_per_second=tokens,
        sessions_per_second=sessions,
        cores=streams * units.stream_us / 1e6,
        workers=workers,
        breaks_first=first.what if streams > first.streams else "nothing",
        memory=(streams * units.stream_kib + workers * units.worker_kib) / 2**20,
        redis_cores=redis_cores,
        shards=max(1, math.ceil(redis_cores / LOADED)),
        redis_memory=kept / 2**30,
        from_provider=tokens * units.provider_bytes * 8 / 1e9,
        to_viewers=tokens * units.viewer_bytes * 8 / 1e9,
    )
