"""Notes once a second what stands on this worker, and what it has counted in plain numbers, where a scrape finds it.

A scrape is answered by whichever worker accepts it, which cannot ask the others: each notes its own in the folder that they
share. So a figure is at most a second old. Whatever is counted on the way of a token is an integer until then.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from contextlib import suppress

import gevent

from aistream import metrics
from aistream.config import Config
from aistream.delivery import Delivery
from aistream.follower import Follower
from aistream.generation import Generations
from aistream.providers import Providers
from aistream.store import Store
from aistream.tally import Tally
from aistream.viewing import Viewing
from aistream.writer import LogWriter

#: Seconds of a timer that shows how late the hub is, how many of them lie between two notes, and how many notes between two of
#: the process: with 20,000 open descriptors an old kernel takes 5 ms to count them.
BEAT = 0.25
BEATS = 4
NOTES = 5


class Meter:
    """The figures of one worker."""

    def __init__(
        self,
        config: Config,
        store: Store,
        providers: Providers,
        writer: LogWriter,
        follower: Follower,
        generations: Generations,
        viewing: Viewing,
        delivery: Delivery,
    ) -> None:
        self._config = config
        self._store = store
        self._providers = providers
        self._writer = writer
        self._follower = follower
        self._generations = generations
        self._viewing = viewing
        self._delivery = delivery
        self._late = Tally(metrics.HUB)
        self._stored = 0
        self._cpu = 0.0
        #: How many connections the server has, and may have; None where it does not say.
        self.connections: Callable[[], tuple[int, int]] | None = None

    def run(self) -> None:
        """The loop; never returns."""
        named = [name for endpoint in self._config.endpoints for name in (endpoint.model, *endpoint.models) if name]
        metrics.worker_started([name for name, _ in self._providers.bulkheads()], [self._config.default_model, *named])
        metrics.START_TIME.set(_started_at())
        while True:
            self.note_process()
            for _ in range(NOTES):
                self.note()
                for _ in range(BEATS):
                    began = time.monotonic()
                    gevent.sleep(BEAT)
                    self._late.add(max(0.0, time.monotonic() - began - BEAT))

    def note(self) -> None:
        """Notes what stands now, and what was counted since the last time. Without yielding."""
        metrics.RUNNING.set(len(self._generations.running))
        metrics.VIEWERS.set(len(self._viewing))
        metrics.CALLBACKS_SENDING.set(len(self._delivery))
        for name, bulkhead in self._providers.bulkheads():
            metrics.PROVIDER_RUNNING.labels(name).set(bulkhead.running)
            metrics.PROVIDER_WAITING.labels(name).set(bulkhead.waiting)
        metrics.LOG_BACKLOG.set(self._writer.unstored)
        metrics.LOG_BEHIND.set(self._writer.behind)
        metrics.LOG_FLUSH.add(self._writer.lag)
        stored, self._stored = self._stored, self._writer.events
        metrics.LOG_EVENTS.inc(self._stored - stored)
        metrics.FOLLOWED.set(len(self._follower))
        metrics.FOLLOWER_LAG.add(self._follower.lag)
        for kind, tally in self._store.connections.seconds.items():
            metrics.REDIS_SECONDS.labels(kind).add(tally)
        metrics.HUB_LAG.add(self._late)
        if self.connections is not None:
            taken, most = self.connections()
            metrics.CONNECTIONS.set(taken)
            metrics.CONNECTIONS_LIMIT.set(most)

    def note_process(self) -> None:
        """Notes what the kernel says of this process, where it does (Linux)."""
        cpu, self._cpu = self._cpu, time.process_time()
        metrics.CPU.inc(self._cpu - cpu)
        metrics.DESCRIPTORS_LIMIT.set(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        with suppress(OSError, ValueError):
            with open("/proc/self/statm", "rb") as file:
                metrics.MEMORY.set(int(file.read().split()[1]) * resource.getpagesize())
            # Since Linux 6.2 the folder's size is their number.
            metrics.DESCRIPTORS.set(os.stat("/proc/self/fd").st_size or len(os.listdir("/proc/self/fd")))

    @property
    def facts(self) -> dict[str, float]:
        """What of the configuration alerts and panels compare with."""
        config = self._config
        names = ("drain_seconds", "lease_seconds", "max_stream_seconds", "max_streams_per_worker", "max_viewers_per_session")
        return {name: float(getattr(config, name)) for name in (*names, "web_concurrency")}


def _started_at() -> float:
    """When this process was started, in seconds since 1970: now, where the kernel does not tell."""
    with suppress(OSError, ValueError, IndexError):
        with open("/proc/self/stat", "rb") as file:
            # The name stands in brackets, and may hold anything; the 22nd field is the start, in ticks since boot.
            ticks = int(file.read().rpartition(b")")[2].split()[19])
        return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")
    return time.time()
