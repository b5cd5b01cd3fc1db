"""The faults: done to the processes as planned, each noted with what it hit."""

import contextlib
import os
import signal
import time
from collections import Counter
from collections.abc import Sequence
from urllib.parse import urlsplit

import gevent

from bench.chaos.plan import AFTERMATH, Planned
from bench.chaos.processes import connections_of, workers_of
from bench.chaos.record import Trouble
from tests.neighbours.redis import RedisServer
from tests.service import Service


class Faults:
    """Hurts the workers and their Redis. `troubles`: what was done; `counts`: how often, by kind."""

    def __init__(
        self, schedule: Sequence[Planned], seconds: float, service: Service, redis: RedisServer, provider_url: str
    ) -> None:
        """`seconds`: how long it all takes, if nothing is late."""
        self.troubles: list[Trouble] = []
        self.counts: Counter[str] = Counter()
        self._schedule = schedule
        self._seconds = seconds
        self._service = service
        self._redis = redis
        self._provider_port = urlsplit(provider_url).port
        self._now: tuple[float, float, float] = (0.0, 0.0, time.time())

    def scheduled(self) -> float:
        """Seconds into the schedule: streams keep step with the faults, also where these are late."""
        at, length, began = self._now
        return at + min(length, time.time() - began)

    def run(self) -> None:
        """All of them, one after the other."""
        self._now = (0.0, self._schedule[0].at if self._schedule else self._seconds, time.time())
        if not self._schedule:
            gevent.sleep(self._seconds)
            return
        gevent.sleep(self._schedule[0].at)
        for planned in self._schedule:
            workers = self.wait_for_workers()
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
                    os.kill(self._service.pid, signal.SIGHUP)
                    self.troubles.append(Trouble("drained", time.time(), time.time()))
                case "double":
                    self._double(planned, victim)
            self.counts[planned.kind] += 1
            gevent.sleep(planned.quiet)

    def _choose(self, workers: list[int], dice: float) -> int:
        """In two of three cases the one with most to lose: gevent's workers do not share evenly."""
        if dice < 2 / 3:
            return max(workers, key=lambda pid: len(self._provider_ports(pid)))
        return workers[int((dice * 3 - 2) * len(workers))]

    def wait_for_workers(self) -> list[int]:
        """The workers that serve (they have a connection to Redis) as soon as there are two."""
        until = time.monotonic() + 30
        while True:
            ready = [pid for pid in workers_of(self._service.pid) if self._has_store(pid)]
            if len(ready) >= 2:
                return ready
            assert time.monotonic() < until, "no two workers within 30 s: see service.log"
            gevent.sleep(0.1)

    def _has_store(self, pid: int) -> bool:
        return any(other == self._redis.port for _, other in connections_of(pid))

    def _kill(self, pid: int) -> None:
        ports = {pid: self._provider_ports(pid)}
        os.kill(pid, signal.SIGKILL)
        self.troubles.append(Trouble("killed", time.time(), time.time(), pid, ports))

    def _provider_ports(self, pid: int) -> frozenset[int]:
        return frozenset(own for own, other in connections_of(pid) if other == self._provider_port)

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
        self._redis.kill()
        gevent.sleep(away)
        self._redis.start()
        trouble.until = time.time()

    def _empty(self, away: float) -> None:
        ports = {pid: self._provider_ports(pid) for pid in workers_of(self._service.pid)}
        trouble = Trouble("emptied", time.time(), ports=ports)
        self.troubles.append(trouble)
        self._redis.kill()
        gevent.sleep(away)
        self._redis.empty()
        trouble.until = time.time()
        gevent.sleep(AFTERMATH)
        trouble.left = frozenset(workers_of(self._service.pid))

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
