"""The service under honest load, before, during each attack, and after."""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from bench.hostile import attacker
from bench.hostile.attacks import Attack, attacks
from bench.hostile.report import Phase, Report
from bench.load import processes
from bench.load.rig import HOST, Load, Rig, Server
from bench.load.viewers import percentiles, signed
from tests.service import SECRET

#: Connections of a worker; seconds that a client may take; viewers of the sessions that attackers watch.
PLACES, PATIENCE, VIEWERS = 2_000, 5, 1_000
#: Honest load of a phase, and of a short one.
HONEST = Load(streams=100, tokens=80, rate=10, per_second=40)
QUICK = Load(streams=20, tokens=20, rate=10, per_second=20)
#: Seconds between two readiness checks, and for an answer to one: a balancer's.
PROBE, PROBE_PATIENCE = 0.1, 5.0
#: Seconds from an attack's beginning to the honest load, and at most until an attacker's connections are let go.
AHEAD, AFTERWARDS = 1.0, 30.0
#: Descriptors that may be open beyond what there were before: kept connections to Redis, the provider and n8n.
KEPT = 300


@dataclass(frozen=True, slots=True)
class Options:
    """What is asked for. `scale`: part of the attackers' connections."""

    workers: tuple[int, ...] = (1, 2)
    scale: float = 1.0
    quick: bool = False
    only: str = ""
    folder: Path | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """How far it is."""

    done: int
    of: int
    seconds: float
    phase: str


@dataclass(slots=True)
class Probe:
    """Asks /health/ready again and again, as a balancer does."""

    port: int
    seconds: list[float] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    _over: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Until it is stopped."""
        while not self._over.wait(PROBE):
            began = time.monotonic()
            connection = http.client.HTTPConnection(HOST, self.port, timeout=PROBE_PATIENCE)
            try:
                connection.request("GET", "/health/ready")
                if (status := connection.getresponse().status) != 200:
                    self.failed.append(str(status))
            except (OSError, http.client.HTTPException) as error:
                self.failed.append(type(error).__name__)
            finally:
                connection.close()
            self.seconds.append(time.monotonic() - began)

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        """Asks meanwhile."""
        thread = threading.Thread(target=self.run)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()


def run(options: Options, say: Callable[[Progress], None] = lambda _: None) -> Report:
    """All phases, for each number of workers."""
    began = time.monotonic()
    chosen = [attack for attack in attacks(options.scale) if options.only in attack.name]
    folder = Path(tempfile.mkdtemp(prefix="hostile-", dir=options.folder))
    phases: list[Phase] = []
    of = len(options.workers) * (len(chosen) + 2)
    with Rig(quick=options.quick) as rig:
        for workers in options.workers:
            environ = {"GUNICORN_CMD_ARGS": f"--worker-connections {PLACES}", "MAX_VIEWERS_PER_SESSION": str(VIEWERS)}
            environ |= {"REQUEST_SECONDS": str(PATIENCE), "SLOW_VIEWER_SECONDS": str(PATIENCE)}
            with rig.service(workers=workers, more=environ) as server:
                stage = _Stage(rig, server, workers, QUICK if options.quick else HONEST)
                for attack in (None, *chosen, None):
                    name = attack.name if attack else ("after" if len(stage.phases) else "before")
                    say(Progress(len(phases), of, time.monotonic() - began, f"{workers} workers, {name}"))
                    phases.append(stage.phase(name, attack))
                shutil.copy(rig.folder / "service.log", folder / f"service-{workers}.log")
    report = Report(phases, folder, time.monotonic() - began)
    if report.failures:
        (folder / "failures.txt").write_text("\n".join(report.failures) + "\n")
    return report


class _Stage:
    """One service, and what was measured on it."""

    def __init__(self, rig: Rig, server: Server, workers: int, load: Load) -> None:
        self._rig, self._server, self._workers, self._load = rig, server, workers, load
        self.phases: list[Phase] = []
        rig.warm_up(server, quick=True)
        #: Half a megabyte that can be replayed, and an answer that outlasts all phases.
        self._finished = self._stream("gpt-bench-n10000-r4000-d0-b100")
        self._running = self._stream("gpt-bench-n20000-r10-d0-b1")
        time.sleep(4)

    def phase(self, name: str, attack: Attack | None) -> Phase:
        """The honest load while this attack goes on."""
        probe = Probe(self._server.port)
        attacking = attacker.start(attack, self._server.port, self._watched(attack)) if attack else None
        try:
            if attacking:
                time.sleep(AHEAD)
            with probe.asking():
                came = self._rig.run(self._server, self._load, strict=False)
            pids = self._server.workers
            memory = sum(processes.pss_kib(pid) for pid in pids) / 1024
            open_files = sum(processes.descriptors(pid) for pid in pids)
            told = attacker.end(attacking) if attacking else {}
        finally:
            if attacking:
                attacking.kill()
                attacking.wait()
        viewers = came.viewers
        phase = Phase(
            workers=self._workers,
            name=name,
            opened=told.get("opened", 0),
            held=told.get("held", 0),
            answers=told.get("answers", {}),
            ready_ms=percentiles([seconds * 1000 for seconds in probe.seconds]),
            not_ready=len(probe.failed),
            lag_ms=viewers["latency_ms"],
            init_ms=viewers["init_ms"],
            failed=viewers["failed"] + max(0, viewers["ok"] - came.provider["callbacks"]),
            wrong=[*map(str, viewers["wrong"]), *sorted(set(probe.failed))],
            memory=memory,
            descriptors=open_files,
            left=self._left(),
        )
        self.phases.append(phase)
        return phase

    def _left(self) -> int:
        """Descriptors beyond those of the first phase, when attackers have had the time to be let go."""
        if not self.phases:
            return 0
        until = time.monotonic() + AFTERWARDS
        while True:
            more = sum(processes.descriptors(pid) for pid in self._server.workers) - self.phases[0].descriptors
            if more <= KEPT or time.monotonic() > until:
                return max(0, more - KEPT)
            time.sleep(0.5)

    def _watched(self, attack: Attack) -> str:
        return self._running if attack.vanishes else self._finished

    def _stream(self, model: str) -> str:
        """The path of a stream of this model, which has begun."""
        body = {
            "prompt": "a",
            "model": model,
            "start": "immediate",
            "resumeUrl": f"{self._rig.provider_url}/resume/0",
        }
        body["n8nToken"] = signed({"sub": "attacked", "exp": int(time.time()) + 3600}, SECRET)
        connection = http.client.HTTPConnection(HOST, self._server.port, timeout=10)
        connection.request("POST", "/init-stream", json.dumps(body), {"Content-Type": "application/json"})
        url = urlsplit(json.loads(connection.getresponse().read())["streamUrl"])
        connection.close()
        return f"{url.path}?{url.query}"
