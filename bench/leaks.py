"""What is left when all is over: `python -m bench.leaks` (after `make test`, which installs a Redis).

Many mixed streams (`bench.chaos` without faults: watched, crowded, left, stopped, deserted, expired, never opened; a fifth of
the viewers' lines break) over the real service and a real Redis. Before the first, and when the last has ended and the
service had the time to forget it, each worker says what it holds, the kernel what is connected, Redis what it keeps.

Exit code 1 where anything but memory is left, or a worker's memory has not come back to within a tenth of what it was
after the first tenth of the streams: by then the pools and caches are filled, and what grows from there on would grow for ever.
Connections that wait for the next request to the same provider are no leak; how many there may be is in providers/wire.py.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from gevent import monkey

if not monkey.is_module_patched("socket"):
    monkey.patch_all()

import gevent

from aistream.providers.wire import LIMITS
from bench.chaos.plan import Options
from bench.chaos.processes import connections_of, workers_of
from bench.chaos.run import Run
from bench.chaos.verdict import judge

#: Seconds after the last ending in which a worker forgets: ten for what it would tell a store that lost it, and a look.
FORGET = 13.0
#: By how much a worker's memory may be larger at the end.
GROWTH = 0.1
#: Connections to both providers that a worker keeps for the next request, at most.
KEPT = 2 * (LIMITS.max_keepalive_connections or 0)


@dataclass(frozen=True, slots=True)
class Held:
    """What one worker holds. `upstream`: its connections to the provider, all of them idle by then."""

    greenlets: int
    generations: int
    viewers: int
    objects: int
    rss_kib: int
    upstream: int


@dataclass(frozen=True, slots=True)
class Leaks:
    """What came of it, worker by worker: at the start, after the first part, at the end."""

    streams: int
    seconds: float
    start: list[Held]
    settled: list[Held]
    end: list[Held]
    findings: list[str]

    def text(self) -> str:
        """The table."""
        lines = [f"{self.streams} streams in {self.seconds:.0f} s, 2 workers", ""]
        lines.append(f"{'':12}{'at the start':>24}{'after some':>24}{'at the end':>24}")
        for name in Held.__slots__:
            cells = [" / ".join(str(getattr(one, name)) for one in held) for held in (self.start, self.settled, self.end)]
            lines.append(f"{name:12}" + "".join(f"{cell:>24}" for cell in cells))
        return "\n".join([*lines, "", *(self.findings or ["nothing is left"])])


def measure(streams: int, concurrency: int, first: int, folder: Path, say: Callable[[str], None]) -> Leaks:
    """Runs so many streams, with a look after `first` of them (0: none), and compares.

    Everything it starts has ended when it returns or raises.
    """
    environ = {"GUNICORN_CMD_ARGS": "--config bench/insight.py", "INSIGHT": str(folder)}
    run = Run(Options(streams=streams, concurrency=concurrency, faults=0, pace=float("inf")), folder, environ)
    began = time.monotonic()
    try:
        run.start()
        gevent.sleep(1)
        start = _look(run, folder)
        looks = []
        for plans in filter(None, (run.plans[:first], run.plans[first:])):
            with _telling(run, say):
                run.drive(plans)
                run.settle()
            gevent.sleep(FORGET)
            looks.append(_look(run, folder))
        _, found = judge(run.evidence(), run.leaks())
    finally:
        run.stop()
    settled, end = looks[0], looks[-1]
    findings = [f"{finding.rule}: {finding.text}" for finding in found]
    for before, after in zip(start, end, strict=True):
        if after.greenlets > before.greenlets:
            findings.append(f"{after.greenlets - before.greenlets} greenlets left")
        if after.generations or after.viewers:
            findings.append(f"{after.generations} generations and {after.viewers} viewers left")
        if after.upstream > KEPT:
            findings.append(f"{after.upstream} connections to the provider left")
    for before, after in zip(settled, end, strict=True):
        if after.rss_kib > before.rss_kib * (1 + GROWTH):
            findings.append(f"memory went from {before.rss_kib} to {after.rss_kib} KiB")
    return Leaks(streams, time.monotonic() - began, start, settled, end, findings)


def _look(run: Run, folder: Path) -> list[Held]:
    """Asks each worker what it holds."""
    held = []
    provider = urlsplit(run.provider.url).port
    for pid in workers_of(run.service.pid):
        target = folder / f"{pid}.json"
        target.unlink(missing_ok=True)
        os.kill(pid, signal.SIGUSR2)
        with gevent.Timeout(30):
            while not target.exists():
                gevent.sleep(0.05)
        upstream = sum(other == provider for _, other in connections_of(pid))
        held.append(Held(**json.loads(target.read_text()), upstream=upstream))
    return held


@contextlib.contextmanager
def _telling(run: Run, say: Callable[[str], None]) -> Iterator[None]:
    def tell() -> None:
        while True:
            progress = run.progress("")
            say(f"{progress.done}/{progress.of} streams, {progress.seconds:.0f} s")
            gevent.sleep(10)

    telling = gevent.spawn(tell)
    try:
        yield
    finally:
        telling.kill()


def main() -> int:
    """Runs it and prints the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.leaks", description="What is left when all is over; see the module.")
    parser.add_argument("--streams", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=200)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="aistream-leaks-"))
    try:
        leaks = measure(
            given.streams, given.concurrency, given.streams // 10, folder, lambda text: print(text, file=sys.stderr, flush=True)
        )
    finally:
        shutil.rmtree(folder)
    print(leaks.text())
    return 1 if leaks.findings else 0


if __name__ == "__main__":
    sys.exit(main())
