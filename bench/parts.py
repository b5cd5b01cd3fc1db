"""The parts of `python -m bench`: each puts its loads on services of its own and gives what came, as plain values for a file.

`quick` runs the same with loads so small that their figures mean nothing: for tests of the bench itself. Each figure is of one
run; what is compared (service and relay, one worker and two) is measured one after the other in the same run.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import redis

from bench import stages
from bench.load import processes
from bench.load.rig import PATIENCE, Came, Drive, Load, Rig, Server
from bench.load.viewers import percentiles

#: Many streams at the pace of a fast model: 4,000 tokens a second.
STEADY = Load(streams=200, tokens=200, rate=20, per_second=100)
#: What every relay carries on one core: latency without a queue.
LIGHT = Load(streams=40, tokens=160, rate=20, per_second=40)
#: Short sessions, twenty at a time: what a session costs beside its tokens.
SHORT = Load(streams=400, tokens=10, rate=20, per_second=1000, at_once=20)
#: Streams of 50 tokens a second, as many as the search says.
SATURATING = Load(streams=0, tokens=350, rate=50, per_second=1, delay_ms=200)
#: Open streams with a slow model.
OPEN = [1_000, 5_000]
#: New streams a second until these are open: well below what a worker takes.
OPENING = 50.0
#: Seconds for which they are then watched.
HOLD = 8.0
#: A saturated core delivers this late at the 99th percentile, in ms.
LATE_MS = 100.0
#: Steps of the search for it, and how near they must come.
STEPS, NEAR = 9, 1.12
#: Share of the service's core that others took: a step that failed meanwhile, or for the load's sake, is done again, so often.
DISTURBING, AGAIN = 0.2, 3
#: What Redis keeps of a session is measured with answers of so many tokens.
ANSWER = 1_000
BATCHES = [1, 2, 5, 10, 50]


def small(load: Load, quick: bool) -> Load:
    """The load, or if `quick` one of a fraction of a second."""
    if not quick:
        return load
    tokens = max(2 * load.batch, load.tokens // 16, 3)
    streams = max(4, load.streams // 50)
    return replace(load, streams=streams, tokens=tokens, rate=3 * load.rate, per_second=100, settle=0.05)


def per_stream_ms(long: Came, short: Came) -> float:
    """CPU per stream beside its tokens: what solves streams · x + tokens · y = CPU for both loads, in ms."""
    (n1, k1, c1), (n2, k2, c2) = ((one.load.streams, one.viewers["tokens"], one.whole.both) for one in (long, short))
    return float((c2 * k1 - c1 * k2) / (n2 * k1 - n1 * k2) * 1000)


def comparison(rig: Rig, quick: bool) -> dict[str, Any]:
    """The service and the naive relay, under the same loads."""
    return {"service": _compared(rig, rig.service, quick, True), "naive": _compared(rig, rig.naive, quick, False)}


def _compared(rig: Rig, start: Callable[[], AbstractContextManager[Server]], quick: bool, strict: bool) -> dict[str, Any]:
    with start() as server:
        rig.warm_up(server, quick)
        light, steady, short = (rig.run(server, small(load, quick), strict=strict) for load in (LIGHT, STEADY, SHORT))
        return {
            "failed": sum(came.viewers["failed"] for came in (light, steady, short)),
            "steady": steady.summary(),
            "light": light.summary(),
            "setup_ms": per_stream_ms(steady, short),
            "session_ms": short.whole.both / short.load.streams * 1000,
            # The kernel counts CPU time in hundredths of a second: a short run may have taken none.
            "saturation": _saturation(rig, server, 0.7e6 / max(steady.token_us, 1.0), quick),
        }


def _saturation(rig: Rig, server: Server, guess: float, quick: bool) -> dict[str, Any]:
    """The highest rate of tokens that comes in time: up by half, then between what went and what did not."""
    rate, low, high, limited, disturbed = guess, 0.0, 0.0, False, 0
    steps: list[dict[str, Any]] = []
    while len(steps) < (1 if quick else STEPS) and not (low and high and high / low < NEAR):
        streams = max(2, round(rate / SATURATING.rate))
        load = replace(SATURATING, streams=streams, per_second=streams / 1.5)
        came = rig.run(server, small(load, quick), strict=False)
        rate = streams * SATURATING.rate
        carried = not came.viewers["failed"] and came.viewers["latency_ms"]["p99"] < LATE_MS
        steps.append({**came.summary(), "asked": rate, "carried": carried})
        if not carried and disturbed < AGAIN and (came.harness_limited or came.foreign > DISTURBING):
            disturbed += 1
            continue
        if came.harness_limited:
            limited = True
            low = rate if carried else low
            break
        low, high = (rate, high) if carried else (low, rate)
        rate = (low * high) ** 0.5 if low and high else low * 1.5 if low else high / 1.7
    return {"tokens_per_second": low, "harness_limited": limited, "steps": steps}


def by_stage(rig: Rig, quick: bool) -> dict[str, Any]:
    """What each stage costs."""
    with rig.service() as server:
        rig.warm_up(server, quick)
        return stages.measure(rig, server, quick=quick).json()


def batches(rig: Rig, quick: bool) -> dict[str, Any]:
    """CPU per token by the number of tokens that the provider writes at once."""
    sizes = BATCHES[::3] if quick else BATCHES
    with rig.service() as server:
        rig.warm_up(server, quick)
        return {"sizes": [{"batch": size, **_batch(rig, server, size, quick)} for size in sizes]}


def _batch(rig: Rig, server: Server, size: int, quick: bool) -> dict[str, Any]:
    return rig.run(server, small(replace(STEADY, batch=size), quick)).summary()


def memory(rig: Rig, quick: bool) -> dict[str, Any]:
    """What an open stream holds in the worker, and a session in Redis; how long the worker takes to answer meanwhile."""
    wanted = [4, 8] if quick else OPEN
    # A stream is two descriptors of the worker; 500 for whatever else it has.
    possible = (rig.files - 500) // 2
    with rig.service() as server:
        rig.warm_up(server, quick)
        nothing = processes.pss_kib(server.pid)
        few = processes.descriptors(server.pid)
        rows = [_open(rig, server, min(count, possible), nothing, few, quick) for count in wanted]
        session = _session_in_redis(rig, server, quick)
    return {
        "empty_pss_kib": nothing,
        "files": rig.files,
        "cut_short": possible < max(wanted),
        "open": rows,
        "session": session,
    }


def _open(rig: Rig, server: Server, count: int, nothing: int, few: int, quick: bool) -> dict[str, Any]:
    # The last to begin has a token's pace until it is counted as open, so that all are in the steady window.
    rate, opening, hold = (10.0, 40.0, 0.4) if quick else (1.0, OPENING, HOLD)
    seconds = count / opening + 1 / rate + hold
    load = Load(count, round(seconds * rate) + 2, rate, opening, settle=1 / rate, patience=60)
    answers: list[float] = []
    with rig.driving(server, load) as drive:
        begin, _ = load.steady
        drive.until(begin)
        before, since = drive.cpu(), time.monotonic()
        _ask_on(drive, server, begin + hold, answers)
        used, held = drive.cpu() - before, time.monotonic() - since
        pss, files = processes.pss_kib(server.pid), processes.descriptors(server.pid)
        came = drive.finish(used)
    delivered = max(1.0, came.delivered * held)
    return {
        "open": count,
        "failed": came.viewers["failed"],
        "wrong": came.viewers["wrong"],
        "pss_kib": pss,
        "stream_kib": (pss - nothing) / count,
        "stream_files": (files - few) / count,
        "answer_ms": percentiles([seconds * 1000 for seconds in answers]),
        "latency_ms": came.viewers["latency_ms"],
        "core": used.service / held,
        "token_us": used.both / delivered * 1e6,
        "redis_us": used.redis / delivered * 1e6,
        "tokens_per_second": round(came.delivered),
        "harness": came.harness,
        "harness_limited": came.harness_limited,
    }


def _ask_on(drive: Drive, server: Server, until: float, answers: list[float]) -> None:
    """Asks /health ten times a second: a request waits for the hub as every event does, and is a little work itself."""
    while (now := time.monotonic() - drive.began) < until:
        try:
            answers.append(server.ask())
        except OSError:
            answers.append(PATIENCE)
        drive.until(now + 0.1)


def _session_in_redis(rig: Rig, server: Server, quick: bool) -> dict[str, Any]:
    """Bytes that Redis keeps of a finished session, its commands, and the bytes on the network."""
    streams, tokens = (2, 20) if quick else (20, ANSWER)
    with server.redis.client() as client:
        before, commands = _kept(client), _commands(client)
        came = rig.run(server, Load(streams, tokens, 100.0, 1000.0))
        kept, commands = _kept(client) - before, _commands(client) - commands
    seen, window = came.viewers, max(1, came.viewers["window_tokens"])
    return {
        "answer_tokens": tokens,
        "kept_bytes": kept / streams,
        "commands": commands / streams,
        "provider_bytes": came.provider["bytes"] / came.provider["tokens"],
        "viewer_bytes": seen["window_bytes"] / window,
        "viewer_writes": seen["window_reads"] / window,
    }


def _commands(client: redis.Redis) -> int:
    return int(client.info("stats")["total_commands_processed"])


def _kept(client: redis.Redis) -> int:
    return sum(int(client.memory_usage(key, samples=0) or 0) for key in client.scan_iter(count=1000))


def scaling(rig: Rig, quick: bool) -> dict[str, Any]:
    """One worker and two under the same load; then a viewer beside its generation, and on another worker."""
    load = small(replace(STEADY, rate=10, tokens=100), quick)
    workers = []
    for count in (1, 2):
        with rig.service(workers=count) as server:
            rig.warm_up(server, quick)
            workers.append({"workers": count, **rig.run(server, load).summary()})
    load = replace(load, body={"start": "immediate"})
    with rig.redis() as shared, rig.service(redis=shared) as here, rig.service(redis=shared) as there:
        for servers in ([here], [here, there]):
            rig.warm_up(servers, quick, start="immediate")
        remote = {name: rig.run(servers, load).summary() for name, servers in (("here", [here]), ("elsewhere", [here, there]))}
    return {"workers": workers, "cores": len(rig.two_cores), "viewer": remote}


@dataclass(frozen=True, slots=True)
class Part:
    """One part; `seconds`: about how long it takes."""

    run: Callable[[Rig, bool], dict[str, Any]]
    seconds: float


PARTS: Mapping[str, Part] = {
    "comparison": Part(comparison, 280),
    "stages": Part(by_stage, 40),
    "batches": Part(batches, 80),
    "memory": Part(memory, 230),
    "scaling": Part(scaling, 80),
}


def local_ports() -> int:
    """Connections that one address of this machine may have to one address and port."""
    first, last = map(int, re.findall(r"\d+", Path("/proc/sys/net/ipv4/ip_local_port_range").read_text()))
    return last - first + 1
