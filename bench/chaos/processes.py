"""What the kernel knows of the service's processes, so that the service need not be asked."""

import contextlib
import os
from pathlib import Path


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
