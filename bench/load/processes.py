"""What the kernel says of processes: CPU, memory, descriptors; and on which core they run. Linux alone."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")


def tree(pid: int) -> list[int]:
    """A process and its living descendants; nothing where it is gone."""
    found = []
    with contextlib.suppress(OSError):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        found = [pid, *(one for child in children for one in tree(int(child)))]
    return found


def cpu(pid: int) -> float:
    """User and system time of a process and its descendants, in seconds; to 10 ms."""
    ticks = 0
    for one in tree(pid):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / TICKS


def pss_kib(pid: int) -> int:
    """Memory of a process and its descendants in KiB, what they share counted once."""
    total = 0
    for one in tree(pid):
        for line in Path(f"/proc/{one}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1])
    return total


def descriptors(pid: int) -> int:
    """Open descriptors of a process and its descendants."""
    return sum(len(os.listdir(f"/proc/{one}/fd")) for one in tree(pid))


def busy(cores: set[int]) -> float:
    """Seconds that these cores have worked, for whomever."""
    total = 0
    for line in Path("/proc/stat").read_text().splitlines():
        name, *fields = line.split()
        if name.removeprefix("cpu").isdigit() and int(name.removeprefix("cpu")) in cores:
            counts = [int(field) for field in fields[:8]]
            total += sum(counts) - counts[3] - counts[4]
    return total / TICKS


@contextlib.contextmanager
def pinned(cores: set[int]) -> Iterator[None]:
    """What is started in it runs on these cores, with all its threads and children."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextlib.contextmanager
def many_files() -> Iterator[int]:
    """As many descriptors as the hard limit allows, also for what is started in it. Gives that number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        yield hard
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
