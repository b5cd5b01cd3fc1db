"""What the kernel allows against what is configured: file descriptors, connections that wait to be accepted, local ports.

A stream takes two descriptors, its viewer's socket and its provider's. A process without a free one accepts nobody, health
checks included, and reaches no provider. So a worker raises its soft limit as far as it may, takes no more connections than
the limit carries, and says at start what cannot be reached.

What is needed follows from numbers that an operator can set. The streams of a worker are the answers that its providers have
places for (PROVIDER_CONCURRENCY, or `concurrency` in MODELS_FILE, of each), at most MAX_STREAMS_PER_WORKER and gunicorn's
worker_connections. Whoever has too few descriptors for that gets more of them or sets fewer places; further answers then wait in
the provider's queue.
"""

from __future__ import annotations

import resource
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from aistream.config import Config

#: gunicorn's worker_connections unless it is given others. It bounds everything on the public port of a worker, health
#: checks included, so it stands well above the streams that a worker can carry.
CONNECTIONS = 20_000
#: Descriptors beside the streams and the connections to Redis: 200 callbacks, 50 for the process itself (it starts with about 15,
#: and METRICS_PORT may have 20).
OWN = 250
#: All of those with the default REDIS_POOL_SIZE.
RESERVE = OWN + 50
#: Of the last 50 those for connections that no stream takes, so that inits and health checks find one.
SPARE = 30

_BACKLOG = "net/core/somaxconn"
_PORTS = "net/ipv4/ip_local_port_range"


class Demand(NamedTuple):
    """What one worker is configured for: its connections, and answers at the same time, by the provider's host and port.

    `most`: of them in all; `reserve`: descriptors beside those.
    """

    connections: int
    places: dict[str, int]
    most: int = 10_000
    reserve: int = RESERVE

    @property
    def answers(self) -> int:
        """Answers at the same time that connect to a provider."""
        return min(self.most, sum(self.places.values()))

    @property
    def streams(self) -> int:
        """Answers at the same time, each with a viewer."""
        return min(self.connections, self.answers)

    @property
    def needed(self) -> int:
        """The smallest limit that carries these streams."""
        return 2 * self.streams + min(self.reserve, 2 * self.streams)

    @property
    def wanted(self) -> int:
        """The limit that leaves all connections room, those without an answer of their own too."""
        return self.reserve + self.connections + self.streams

    def connections_within(self, limit: int) -> int:
        """How many connections a worker may take without running out, were each answer to have its viewer."""
        room = limit - _reserve(limit, self.reserve)
        return max(1, min(self.connections, max(room // 2, room - self.answers) + _spare(limit, self.reserve)))

    def lines_within(self, limit: int) -> int:
        """How many of these connections may be open streams."""
        connections = self.connections_within(limit)
        return max(1, connections - min(_spare(limit, self.reserve), (connections + 3) // 4))


class Shortage(NamedTuple):
    """One line for the log: its name, whether it is worth a warning, and what it says."""

    event: str
    warns: bool
    facts: dict[str, Any]


def demand(config: Config, connections: int = CONNECTIONS) -> Demand:
    """What a worker with this configuration is to carry. The echo model connects to nobody, and takes no place here."""
    places: Counter[str] = Counter()
    for endpoint in config.endpoints:
        if endpoint.usable:
            places[urlsplit(endpoint.base_url).netloc] += endpoint.limits.concurrency or config.provider_concurrency
    return Demand(connections, dict(places), config.max_streams_per_worker, OWN + config.redis_pool_size)


def streams_within(limit: int, reserve: int = RESERVE) -> int:
    """How many streams a limit of so many descriptors carries."""
    return (limit - _reserve(limit, reserve)) // 2


def _reserve(limit: int, reserve: int) -> int:
    # 200 callbacks at once are rare: they must not leave a small limit without any stream.
    return min(reserve, (limit + 1) // 2)


def _spare(limit: int, reserve: int) -> int:
    return SPARE * _reserve(limit, reserve) // reserve


def raise_descriptors(wanted: int) -> int:
    """Raises this process's soft limit to `wanted`, or as far towards it as the hard limit allows. Gives what it is now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if allowed > soft:
        # Refused where the hard limit itself is above what the kernel has meanwhile been set to (fs.nr_open).
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
            return allowed
    return soft


def shortages(asked: Demand, limit: int, backlog: int, workers: int, proc: Path = Path("/proc/sys")) -> list[Shortage]:
    """What of the configuration cannot be reached. `limit`: descriptors of a worker; what `proc` does not tell is no shortage.

    Local ports are a shortage of all workers together, and only where they are the narrower limit. That is no warning: with
    default settings it takes no more than three workers, and a provider with several addresses has as many times the ports.
    """
    return [
        *_descriptors(asked, limit),
        *_backlog(backlog, _numbers(proc / _BACKLOG)),
        *_ports(asked, limit, workers, _numbers(proc / _PORTS)),
    ]


def _descriptors(asked: Demand, limit: int) -> list[Shortage]:
    needed = asked.needed
    if limit >= needed:
        return []
    facts = {
        "limit": limit,
        "carries_streams": streams_within(limit, asked.reserve),
        "needed": needed,
        "for_streams": asked.streams,
        "advice": [
            f"systemd: LimitNOFILE={needed}",
            f"Docker: --ulimit nofile={needed}, in a compose file ulimits: nofile: {needed}",
            f"a shell, as root: ulimit -n {needed}",
            "or a smaller PROVIDER_CONCURRENCY: further answers wait for a place",
        ],
    }
    return [Shortage("descriptors.short", True, facts)]


def _backlog(backlog: int, allowed: list[int]) -> list[Shortage]:
    if not allowed or allowed[0] >= backlog:
        return []
    name = _BACKLOG.replace("/", ".")
    advice = [f"sysctl -w {name}={backlog} (Docker: --sysctl {name}={backlog})"]
    return [Shortage("backlog.short", True, {"limit": allowed[0], "needed": backlog, "advice": advice})]


def _ports(asked: Demand, limit: int, workers: int, bounds: list[int]) -> list[Shortage]:
    if len(bounds) != 2 or not asked.places:
        return []
    ports = bounds[1] - bounds[0] + 1
    provider, places = max(asked.places.items(), key=lambda one: one[1])
    streams = workers * min(places, asked.connections, streams_within(limit, asked.reserve))
    if ports >= streams:
        return []
    name = _PORTS.replace("/", ".")
    advice = [f'sysctl -w {name}="1024 65535" (Docker: --sysctl)'] if bounds[0] > 1024 or bounds[1] < 65_535 else []
    advice.append("or a smaller PROVIDER_CONCURRENCY, or workers on several hosts")
    return [Shortage("ports.short", False, {"limit": ports, "provider": provider, "for_streams": streams, "advice": advice})]


def _numbers(path: Path) -> list[int]:
    """The whole numbers in a file of /proc; none where there is no such file (another system, a sandbox)."""
    try:
        return [int(word) for word in path.read_text().split()]
    except (OSError, ValueError):
        return []
