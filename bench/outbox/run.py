"""The run: the neighbours, the sessions, the kills, and how long the last callback is waited for."""

import contextlib
import http.client
import json
import math
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gevent
from gevent.pool import Pool

from bench.chaos.processes import connections_of, workers_of
from bench.chaos.viewer import Decoder
from bench.outbox.n8n import N8n
from bench.outbox.plan import LEASE, SESSION_TTL, Options, Plan, plan_kills, plan_phases, plan_sessions, watched
from bench.outbox.record import Evidence, Kept, Kill, Session, Watch
from tests.neighbours.http1 import HOST
from tests.neighbours.provider import ProviderServer
from tests.neighbours.redis import RedisServer
from tests.service import UNLIMITED, Service, n8n_token

#: Seconds for a request to the service, and for all tries of one.
SILENCE = 15.0
PATIENCE = 60.0
#: Seconds in which the last callbacks must be settled.
SETTLE = 150.0
#: Seconds to give a settled callback the time to come once more.
AFTERWARDS = 1.5
#: Requests to the service at the same time, at most.
CONCURRENCY = 100
#: Sessions asked about in one round trip.
BATCH = 500
PREFIX = "aistream:{0}:"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is. `taken`: callbacks that the n8ns have."""

    made: int
    of: int
    taken: int
    kills: int
    phase: str
    seconds: float


class Run:
    """One run."""

    def __init__(self, options: Options, folder: Path) -> None:
        self.options = options
        self.folder = folder
        self.plans = plan_sessions(options)
        self.sessions: list[Session] = []
        self.kills: list[Kill] = []
        self.watches: list[Watch] = []
        self.began = time.time()
        self.made = 0
        self.failing = N8n(early=6.0 * options.scale)
        self.healthy = N8n()
        self.provider = ProviderServer()
        self.redis = RedisServer(folder / "redis")
        self.service: Service

    def start(self) -> None:
        """Starts everything."""
        self.provider.start()
        self.failing.__enter__()
        self.healthy.__enter__()
        self.redis.start()
        environ = {
            **self.provider.openai_environ,
            "WEB_CONCURRENCY": "2",
            "LEASE_SECONDS": f"{LEASE:g}",
            "SESSION_TTL_SECONDS": f"{SESSION_TTL:g}",
            "CALLBACK_SCHEDULE": ",".join(f"{delay:g}" for delay in self.options.schedule),
            "LOG_FORMAT": "json",
            **UNLIMITED,
            "REDIS_URL": self.redis.url,
        }
        self.service = Service(self.folder / "service.log", environ)
        self.service.start()
        self._wait_for_workers()
        self.began = time.time()

    def stop(self) -> None:
        """Ends everything that was started; in order if nobody is in a hurry."""
        with contextlib.suppress(AttributeError, AssertionError):
            if sys.exc_info()[0] is not None:
                for pid in [self.service.pid, *workers_of(self.service.pid)]:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            self.service.stop()
        self.redis.kill()
        self.healthy.__exit__()
        self.failing.__exit__()
        self.provider.stop()

    def drive(self) -> None:
        """All sessions, all that n8n does, and all kills."""
        making = Pool(CONCURRENCY)
        viewing = [gevent.spawn(self._view, number) for number in range(self.options.viewers)]
        others = [gevent.spawn(self._turn), gevent.spawn(self._kill_all)]
        try:
            made: list[gevent.Greenlet[..., None]] = []
            for plan in self.plans:
                gevent.sleep(max(0.0, self.began + plan.at - time.time()))
                made.append(making.spawn(self._make, plan))
            for one in [*made, *others, *viewing]:
                one.get()  # raises what it raised
        finally:
            gevent.killall([*others, *viewing])
            making.kill()

    def settle(self) -> None:
        """Waits until nothing is owed any more, as Redis has it, then a moment for what should not come."""
        until = time.time() + SETTLE
        with contextlib.closing(self.redis.client()) as client:
            while client.zcard(f"{PREFIX}deadlines") + client.zcard(f"{PREFIX}owed") and time.time() < until:
                gevent.sleep(0.2)
        gevent.sleep(AFTERWARDS)

    def evidence(self) -> Evidence:
        """Everything that was seen, for the judge."""
        kept, leftovers = self._kept()
        by_path = {session.path: session for session in self.sessions}
        for session_id, one in kept.items():
            session = by_path.get(one.path)
            if session is None:
                leftovers.append(f"session {session_id} in Redis, with a resumeUrl that is not ours: {one.path!r}")
            elif not session.id:
                session.id = session_id
                session.note(f"is {session_id}, though the answer to its init was lost")
        lines = self.service.lines("callback.attempted")
        logged = [(str(line["session"]), int(line["attempt"]), str(line["outcome"])) for line in lines]
        watches, kills = self.watches, self.kills
        return Evidence(self.options, self.sessions, self.failing, self.healthy, kills, watches, kept, leftovers, logged)

    def progress(self, phase: str = "") -> Progress:
        """How far it is."""
        taken = len(self.failing.taken) + len(self.healthy.taken)
        phase = phase or f"n8n: {self.failing.phase}"
        return Progress(self.made, len(self.plans), taken, len(self.kills), phase, time.time() - self.began)

    # What n8n does, and what is done to workers.

    def _turn(self) -> None:
        for phase in plan_phases(self.options):
            gevent.sleep(max(0.0, self.began + phase.at - time.time()))
            if phase.kind != self.failing.phase:
                self.failing.turn(phase.kind)

    def _kill_all(self) -> None:
        rng = random.Random(f"victims {self.options.seed}")
        for at in plan_kills(self.options):
            gevent.sleep(max(0.0, self.began + at - time.time()))
            self.kills.append(self._kill(rng.choice(self._wait_for_workers())))

    def _kill(self, pid: int) -> Kill:
        """Kills a worker, and says from which ports it spoke, and what Redis held as owed when it could say nothing any more."""
        os.kill(pid, signal.SIGSTOP)
        _wait_for_state(pid, "T")
        goals = (self.failing.port, self.healthy.port)
        ports = frozenset(own for own, other in connections_of(pid) if other in goals)
        at = time.time()
        os.kill(pid, signal.SIGKILL)
        _wait_for_state(pid, "Z")
        with contextlib.closing(self.redis.client()) as client:
            for _ in range(2):  # what it had sent stands in Redis's sockets before ours, and is taken no later than this
                client.ping()
                gevent.sleep(0.05)
        return Kill(at, pid, ports, self._owed())

    def _owed(self) -> dict[str, tuple[int, float]]:
        """The callbacks that are owed, as Redis has it: the number of the last attempt, and the deadline."""
        owed: dict[str, tuple[int, float]] = {}
        with contextlib.closing(self.redis.client()) as client:
            due: list[Any] = []
            origins: Any = client.zrange(f"{PREFIX}origins", 0, -1)
            for origin in origins:
                due += client.zrange(f"{PREFIX}origins:{origin.decode()}", 0, -1, withscores=True)
            for start in range(0, len(due), BATCH):
                some = [(member.decode(), deadline / 1000) for member, deadline in due[start : start + BATCH]]
                pipeline = client.pipeline(transaction=False)
                for session_id, _ in some:
                    pipeline.hmget(f"{PREFIX}session:{session_id}", "callback", "attempt")
                for (session_id, deadline), (callback, attempt) in zip(some, pipeline.execute(), strict=True):
                    if callback == b"owed":
                        owed[session_id] = int(attempt), deadline
        return owed

    def _wait_for_workers(self) -> list[int]:
        """The workers that serve (they have a connection to Redis) as soon as there are two."""
        until = time.monotonic() + 30
        while True:
            ready = [
                pid for pid in workers_of(self.service.pid) if any(other == self.redis.port for _, other in connections_of(pid))
            ]
            if len(ready) >= 2:
                return ready
            assert time.monotonic() < until, "no two workers within 30 s: see service.log"
            gevent.sleep(0.1)

    # Sessions.

    def _make(self, plan: Plan) -> None:
        try:
            session = self._init(plan)
            if plan.kind in ("stopped", "cancelled"):
                if plan.kind == "stopped":
                    gevent.sleep(plan.stop_after)
                self._stop_stream(session)
        finally:
            self.made += 1

    def _init(self, plan: Plan) -> Session:
        """Until it is accepted, each try with a path of its own. AssertionError where it never is."""
        receiver = self.healthy if plan.healthy else self.failing
        body: dict[str, Any] = {"prompt": plan.prompt, "model": plan.model, "userId": f"user {plan.number}"}
        body |= {"chatId": plan.number, "metadata": {"kind": plan.kind}}
        if plan.kind not in ("cancelled", "expired", "watched"):
            body["start"] = "immediate"
        until = time.time() + PATIENCE
        while time.time() < until:
            session = Session(plan, f"/w/{plan.number}/{len(self.sessions)}")
            self.sessions.append(session)
            receiver.expect(session.path, plan)
            status, said = self._ask(
                session, "/init-stream", json.dumps({**body, "resumeUrl": receiver.url(session.path), "n8nToken": n8n_token()})
            )
            if status == 200:
                session.id, session.accepted_at = said["streamId"], time.time()
                session.target = said["streamUrl"].removeprefix(self.service.url)
                return session
            assert status in (0, 503), f"init got {status}: {said}"
            gevent.sleep(0.3)
        raise AssertionError(f"init was not accepted within {PATIENCE:g} s: {session.notes}")

    def _stop_stream(self, session: Session) -> None:
        path, _, query = session.target.partition("?")
        until = time.time() + PATIENCE
        while time.time() < until:
            status, said = self._ask(session, f"{path}/cancel?{query}", "")
            if status in (200, 202):
                session.stopped_as = str(said["status"])
                return
            assert status in (0, 503), f"cancel got {status}: {said}"
            gevent.sleep(0.3)

    def _ask(self, session: Session, target: str, body: str) -> tuple[int, Any]:
        """One POST: status and what was said, or 0 where no answer came."""
        connection = http.client.HTTPConnection(HOST, self.service.port, timeout=SILENCE)
        what = target.partition("?")[0].rpartition("/")[2]
        try:
            connection.request("POST", target, body, {"Content-Type": "application/json"} if body else {})
            response = connection.getresponse()
            said = json.loads(response.read())
            session.note(f"{what} got {response.status} {said.get('streamId') or said}")
            return response.status, said
        except (OSError, http.client.HTTPException) as error:
            session.note(f"{what} broke: {type(error).__name__} {error}")
            return 0, None
        finally:
            connection.close()

    # Viewers.

    def _view(self, number: int) -> None:
        """One stream after the other, as long as sessions are made."""
        count = 0
        while time.time() < self.began + self.options.seconds - 2.5:
            plan = watched(1_000_000 * (number + 1) + count)
            count += 1
            session = self._init(plan)
            watch = Watch(plan)
            self.watches.append(watch)
            self._watch(session, watch, time.time() + PATIENCE)

    def _watch(self, session: Session, watch: Watch, until: float) -> None:
        last_id, began = "", time.time()
        while not watch.outcome and time.time() < until:
            headers = {"Accept": "text/event-stream", **({"Last-Event-ID": last_id} if last_id else {})}
            connection = http.client.HTTPConnection(HOST, self.service.port, timeout=SILENCE)
            watch.connects += 1
            before = math.inf
            try:
                connection.request("GET", session.target, headers=headers)
                response = connection.getresponse()
                watch.opened_at = min(watch.opened_at, time.time())
                decoder = Decoder()
                while not watch.outcome and (chunk := response.read1(65536)):
                    now = time.time()
                    for message in decoder.feed(chunk):
                        last_id = message.id if message.id is not None else last_id
                        if message.event == "error":
                            code = str(json.loads(message.data)["code"])
                            watch.outcome = "" if code == "store_unavailable" else code
                        elif message.data == "[DONE]":
                            watch.outcome = "done"
                        else:
                            watch.text += message.data
                            watch.first = min(watch.first, now - began)
                    if before < now:
                        watch.gaps.append(now - before)
                    before = now
            except (OSError, http.client.HTTPException) as error:
                session.note(f"its viewer's line broke: {type(error).__name__} {error}")
            finally:
                connection.close()
            gevent.sleep(0 if watch.outcome else 0.2)

    # The end.

    def _kept(self) -> tuple[dict[str, Kept], list[str]]:
        """What Redis holds of every session that it knows, and what stands there that should not."""
        kept, leftovers = {}, []
        with contextlib.closing(self.redis.client()) as client:
            head = f"{PREFIX}session:"
            ids = [key.decode().removeprefix(head) for key in client.scan_iter(f"{head}*", BATCH)]
            for start in range(0, len(ids), BATCH):
                some = ids[start : start + BATCH]
                pipeline = client.pipeline(transaction=False)
                for session_id in some:
                    pipeline.hmget(f"{head}{session_id}", "callback", "attempt")
                    pipeline.hget(f"{PREFIX}content:{session_id}", "resume_url")
                answers = pipeline.execute()
                for i, session_id in enumerate(some):
                    (callback, attempt), url = answers[2 * i], answers[2 * i + 1]
                    path = urlsplit((url or b"").decode()).path
                    kept[session_id] = Kept((callback or b"").decode(), int(attempt or 0), path)
            for name in ("deadlines", "owed", "origins"):
                left = client.zcard(PREFIX + name)
                if left:
                    leftovers.append(f"{left} {name} are left in Redis")
            letters: Any = client.zrange(f"{PREFIX}dead", 0, -1)
            dead = {letter.decode() for letter in letters}
        if dead != {session_id for session_id, one in kept.items() if one.callback == "dead"}:
            leftovers.append("the list of dead letters is not that of the sessions whose callback is dead")
        return kept, leftovers


def _wait_for_state(pid: int, state: str) -> None:
    """Until the process is stopped (`T`) or over (`Z`, or gone); AssertionError after 5 s."""
    until = time.monotonic() + 5
    while True:
        try:
            now = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
        except OSError:
            now = "Z"
        if now in (state, "Z"):
            return
        assert time.monotonic() < until, f"worker {pid} is {now}, not {state}, after 5 s"
        if state == "T":
            os.sched_yield()  # and nothing of this process runs: the n8ns answer nobody who stands still
        else:
            gevent.sleep(0.001)


def telling(run: Run, say: Callable[[Progress], None], phase: Callable[[], str]) -> "gevent.Greenlet[..., None]":
    """Tells twice a second how far it is, until it is killed."""

    def tell() -> None:
        while True:
            say(run.progress(phase()))
            gevent.sleep(0.5)

    return gevent.spawn(tell)
