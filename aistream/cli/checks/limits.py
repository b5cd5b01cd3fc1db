"""What this machine gives, against what is configured: descriptors, backlog, ports, cores, memory.

They are those of this shell: a service of systemd or a container may have others.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from aistream import kernel_limits
from aistream.cli.checks import Finding, Patient, State
from aistream.server import BACKLOG

NAME = "limits"
#: A worker with both SDKs, without streams: docs/performance.md.
WORKER = 120 * 2**20

_WORDS = {
    "descriptors.short": "{limit} file descriptors carry {carries_streams} streams of a worker, {for_streams} are configured",
    "backlog.short": "the kernel lets {limit} connections wait to be accepted, {needed} are configured",
    "ports.short": "{limit} local ports for {for_streams} streams to {provider}",
}


def check(patient: Patient) -> Iterator[Finding]:
    """What is short, or one line that nothing is."""
    config = patient.found.config
    asked = kernel_limits.demand(config)
    limit = _descriptors(asked.wanted)
    short = kernel_limits.shortages(asked, limit, BACKLOG, config.web_concurrency)
    for one in short:
        # In DEV_MODE nobody has thousands of streams.
        state: State = "warning" if one.warns and not config.dev_mode else "ok"
        found, mend = _WORDS[one.event].format(**one.facts), "; ".join(one.facts["advice"])
        yield Finding(f"{NAME} {one.event.partition('.')[0]}", state, found, mend)
    if not any(one.event == "descriptors.short" for one in short):
        yield Finding(f"{NAME} descriptors", "ok", f"{limit} of the {asked.wanted} that a worker has a use for")
    yield _cores(config.web_concurrency)
    yield _memory(config.web_concurrency)


def _descriptors(wanted: int) -> int:
    """How far a worker can raise its limit; it is not raised here."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY in (soft, hard):
        return wanted
    return max(soft, min(hard, wanted))


def _cores(workers: int) -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    words = f"{workers} worker{'s' if workers > 1 else ''} on {cores} core{'s' if cores > 1 else ''}"
    if workers > cores:
        return Finding(f"{NAME} cores", "warning", words, f"set WEB_CONCURRENCY to at most {cores}: more only take turns")
    return Finding(f"{NAME} cores", "ok", words)


def _memory(workers: int) -> Finding:
    free = _available()
    if free is None:
        return Finding(f"{NAME} memory", "skipped", "this system does not tell")
    words = f"{free / 2**30:.1f} GiB are free; {workers * WORKER / 2**20:.0f} MiB are taken by the workers before any stream"
    if free < workers * WORKER:
        return Finding(f"{NAME} memory", "warning", words, "give it more memory, or fewer workers (WEB_CONCURRENCY)")
    return Finding(f"{NAME} memory", "ok", words)


def _available(proc: Path = Path("/proc/meminfo"), group: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that may still be taken: the machine's, or what the container's limit leaves."""
    found = []
    with suppress(OSError, ValueError, StopIteration):
        line = next(line for line in proc.read_text().splitlines() if line.startswith("MemAvailable:"))
        found.append(int(line.split()[1]) * 1024)
    with suppress(OSError, ValueError):  # no cgroup v2, or no limit ("max")
        found.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return min(found) if found else None
