"""The run: the neighbours, the streams, and how long all of them are waited for."""

import contextlib
import http.client
import json
import os
import random
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gevent
from gevent.pool import Pool

from bench.chaos.faults import Faults
from bench.chaos.plan import DRAIN, LEASE, SESSION_TTL, Options, Plan, plan_faults, plan_streams
from bench.chaos.processes import connections_of, workers_of
from bench.chaos.record import Session
from bench.chaos.verdict import Evidence
from bench.chaos.viewer import SILENCE, Viewer
from tests.neighbours.http1 import HOST
from tests.neighbours.provider import ProviderServer
from tests.neighbours.receiver import Receiver
from tests.neighbours.redis import RedisServer
from tests.neighbours.scenarios import SEPARATOR
from tests.service import UNLIMITED, Service, n8n_token

#: Seconds after its last word for which a stream may still be waited for.
PATIENCE = 60.0
#: Seconds in which the last callbacks must come. One whose worker was lost in mid-attempt is hidden for 40.
SETTLE = 100.0
ENVIRON = {
    "WEB_CONCURRENCY": "2",
    "LEASE_SECONDS": f"{LEASE:g}",
    "DRAIN_SECONDS": str(DRAIN),
    "SESSION_TTL_SECONDS": f"{SESSION_TTL:g}",
    "HEARTBEAT_SECONDS": "1",
    "REPLAY_SECONDS": "120",
    "CALLBACK_SCHEDULE": "0,0.5,1,2,2,3,3,3,5,5,5,5,10,10,10,10",
    "LOG_FORMAT": "json",
    **UNLIMITED,
}


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is."""

    done: int
    of: int
    faults: int
    seconds: float
    phase: str


class Run:
    """One run: the neighbours, the streams, the faults."""

    def __init__(self, options: Options, folder: Path, environ: Mapping[str, str] | None = None) -> None:
        """`environ`: on top of the service's variables."""
        self.options = options
        self.folder = folder
        self.schedule = plan_faults(options)
        self.seconds = self.schedule[-1].at + self.schedule[-1].lasts + 1 if self.schedule else options.streams / options.pace
        self.plans = plan_streams(options, self.seconds)
        self.sessions: list[Session] = []
        self.began = time.time()
        self.provider = ProviderServer()
        self.n8n = Receiver()
        self.redis = RedisServer(folder / "redis", _quiet_port())
        self._environ = environ or {}
        self.service: Service
        self.faults: Faults

    def start(self) -> None:
        """Starts everything."""
        self.provider.start()
        self.n8n.__enter__()
        self.redis.start()
        environ = {**self.provider.environ, **ENVIRON, **self._environ, "REDIS_URL": self.redis.url}
        self.service = Service(self.folder / "service.log", environ)
        self.faults = Faults(self.schedule, self.seconds, self.service, self.redis, self.provider.url)
        self.service.start()
        self.faults.wait_for_workers()
        self.began = time.time()

    def stop(self) -> None:
        """Ends everything that was started; in order if nobody is in a hurry."""
        with contextlib.suppress(AttributeError, AssertionError):
            pids = [self.service.pid, *workers_of(self.service.pid)]
            if sys.exc_info()[0] is not None:
                for pid in pids:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            self.service.stop()
        self.redis.kill()
        self.n8n.__exit__()
        self.provider.stop()

    def drive(self, plans: Sequence[Plan] | None = None) -> None:
        """All streams (or these) and all faults, to the end of both."""
        streams = Pool(self.options.concurrency)
        faults = gevent.spawn(self.faults.run)
        try:
            for plan in self.plans if plans is None else plans:
                while self.faults.scheduled() < plan.at and not faults.ready():
                    gevent.sleep(0.02)
                session = Session(plan)
                self.sessions.append(session)
                streams.spawn(self._live, session)
            streams.join()
            faults.join()
            faults.get()
        finally:
            faults.kill()
            streams.kill()

    def settle(self) -> None:
        """Waits until every callback has come that can come, then a moment for those that should not."""
        until = time.time() + SETTLE
        while time.time() < until:
            got = {received.path for received in self.n8n.requests}
            if all(not session.accepted or session.path in got for session in self.sessions) and self._nothing_is_due():
                break
            gevent.sleep(0.2)
            if until - time.time() < SETTLE - 15 and self._only_the_unsaved_are_missing(got):
                break
        gevent.sleep(2.0)

    def evidence(self) -> Evidence:
        """Everything that was seen, for the judge."""
        return Evidence(self.sessions, self.faults.troubles, self.n8n.requests, self.provider.requests())

    def leaks(self) -> list[str]:
        """What is left in Redis and at the provider that should not be."""
        found = []
        with contextlib.closing(self.redis.client()) as client:
            for key in client.scan_iter("*", 1000):
                kind = client.type(key)
                if kind not in (b"zset", b"none") and client.ttl(key) == -1:
                    found.append(f"key without a time to live: {key!r}")
            for name in ("deadlines", "owed"):
                members: Any = client.zrange("aistream:{0}:" + name, 0, -1)
                for member in members:
                    if not client.exists(b"aistream:{0}:session:" + member):
                        found.append(f"{name} without a session: {member!r}")
        until = time.monotonic() + 10
        while (count := self.provider.open_streams()) and time.monotonic() < until:
            gevent.sleep(0.1)
        return found + [f"{count} provider streams still open"] * bool(count)

    def progress(self, phase: str) -> Progress:
        """How far it is."""
        done = sum(session.ended for session in self.sessions)
        return Progress(done, len(self.plans), sum(self.hits().values()), time.time() - self.began, phase)

    def hits(self) -> Counter[str]:
        """Faults by kind, the dropped lines included."""
        drops = sum(viewer.drops for session in self.sessions for viewer in session.viewers)
        return self.faults.counts + Counter({"drop": drops})

    def _nothing_is_due(self) -> bool:
        with contextlib.closing(self.redis.client()) as client:
            return not client.zcard("aistream:{0}:deadlines") and not client.zcard("aistream:{0}:owed")

    def _only_the_unsaved_are_missing(self, got: set[str]) -> bool:
        missing = [session for session in self.sessions if session.accepted and session.path not in got]
        evidence = self.evidence()
        return bool(missing) and all(evidence.unknown_to_all(session) for session in missing) and self._nothing_is_due()

    def _live(self, session: Session) -> None:
        try:
            plan = session.plan
            if not self._init(session):
                return
            watching = enumerate(plan.viewers)
            session.viewers = [Viewer(session.target, number, one, self.service.port) for number, one in watching]
            until = time.time() + plan.lasts + PATIENCE
            parts: list[gevent.Greenlet[..., None]] = [gevent.spawn(viewer.watch, until) for viewer in session.viewers]
            if plan.kind in ("stopped", "stopped-early"):
                parts.append(gevent.spawn(self._stop_stream, session, until))
            try:
                for part in gevent.joinall(parts):
                    part.get()
            finally:
                gevent.killall(parts)
        finally:
            session.ended = True

    def _init(self, session: Session) -> bool:
        plan = session.plan
        until = time.time() + PATIENCE
        body = {"prompt": SEPARATOR.join(plan.pieces), "userId": f"user {plan.number}", "chatId": plan.number}
        body |= {"immediate": {"start": "immediate"}}.get(plan.kind, {})
        body |= {"deserted": {"onDisconnect": "cancel", "disconnectGraceSeconds": 1}}.get(plan.kind, {})
        attempt = 0
        while time.time() < until:
            # An init whose answer was lost may have been accepted: what becomes of it must not look like ours.
            session.path = f"/w/{plan.number}/{attempt}"
            name = f"{plan.family}-test-say-d{plan.pause_ms}-f{plan.first_ms}"
            session.model = f"{name}-i{plan.number}{attempt:02}"
            attempt += 1
            asked = {**body, "model": session.model, "resumeUrl": self.n8n.url(session.path), "n8nToken": n8n_token()}
            wait = self._ask_init(session, asked)
            if wait is None:
                return session.accepted
            gevent.sleep(wait)
        session.undefined.append(f"init was not accepted within {PATIENCE:g} s")
        return False

    def _ask_init(self, session: Session, asked: Mapping[str, Any]) -> float | None:
        """One POST: None where it was answered for good, else the seconds after which to ask again."""
        connection = http.client.HTTPConnection(HOST, self.service.port, timeout=SILENCE)
        try:
            connection.connect()
            # Needed only where workers are hurt, and by far the dearest thing that is done here.
            session.accepted_by = self._worker_at(connection.sock) if self.schedule else None
            connection.request("POST", "/init-stream", json.dumps(asked), {"Content-Type": "application/json"})
            response = connection.getresponse()
            said = response.read()
            if response.status == 200:
                answer = json.loads(said)
                session.accepted_at = time.time()
                session.id = answer["streamId"]
                session.target = answer["streamUrl"].removeprefix(f"http://{HOST}:{self.service.port}")
                warned = f", warnings {answer['warnings']}" if answer["warnings"] else ""
                session.note(f"accepted as {session.id} by worker {session.accepted_by}{warned}")
                return None
            if response.status == 503 and response.headers.get_content_type() == "application/problem+json":
                session.refused += 1
                session.note(f"init refused: {said[:300]!r}")
                return float(response.headers["Retry-After"])
            session.undefined.append(f"init got {response.status} {said[:300]!r}")
            session.note(session.undefined[-1])
            return None
        except (OSError, http.client.HTTPException) as error:
            session.note(f"init broke: {type(error).__name__} {error}")
            return 0.3
        finally:
            connection.close()

    def _worker_at(self, sock: socket.socket) -> int | None:
        """The worker that has accepted a connection; asked before the request, since a worker that drains closes it after."""
        ports = (self.service.port, sock.getsockname()[1])
        for _ in range(20):
            for pid in workers_of(self.service.pid):
                if ports in connections_of(pid):
                    return pid
            gevent.sleep(0.02)
        return None

    def _stop_stream(self, session: Session, until: float) -> None:
        plan = session.plan
        if plan.stop_at is not None:
            gevent.sleep(plan.stop_at)
        else:
            viewer = session.viewers[0]
            while viewer.seen < (plan.stop_after or 0) and not viewer.outcome:
                gevent.sleep(0.02)
        path, _, query = session.target.partition("?")
        while time.time() < until:
            connection = http.client.HTTPConnection(HOST, self.service.port, timeout=SILENCE)
            try:
                connection.request("POST", f"{path}/cancel?{query}")
                response = connection.getresponse()
                said = response.read(300)
                session.note(f"cancel got {response.status} {said!r}")
                if response.status in (200, 202):
                    session.stop_answered = (time.time(), response.status)
                    return
                if response.status != 503 or response.headers.get_content_type() != "application/problem+json":
                    session.undefined.append(f"cancel got {response.status} {said!r}")
                    return
                gevent.sleep(float(response.headers["Retry-After"]))
            except (OSError, http.client.HTTPException) as error:
                session.note(f"cancel broke: {type(error).__name__} {error}")
                gevent.sleep(0.3)
            finally:
                connection.close()
        session.undefined.append(f"cancel was not answered within {PATIENCE:g} s")


def _quiet_port() -> int:
    """A free port below those the kernel gives to clients: while Redis is away, a client must not be given its port."""
    while True:
        with contextlib.suppress(OSError), socket.socket() as sock:
            sock.bind((HOST, random.randint(15_000, 31_000)))
            return int(sock.getsockname()[1])
