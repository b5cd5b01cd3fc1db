"""Starts what is measured and what measures it, each on its core, and says what a load cost.

with Rig() as rig, rig.service() as service:
    came = rig.run(service, Load(streams=200, tokens=200, rate=20, per_second=100))
    came.token_us

The service is the real one (gunicorn, a Redis with an append-only file, callbacks on), in production's configuration as far as
one machine allows. The CPU of its processes and of its Redis is read from /proc. A load in which a stream fails, a callback is
missing or comes twice, raises `Failed`: a wrong answer has no cost per token.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from bench.load import processes
from tests.neighbours.redis import RedisServer, program
from tests.service import ROOT, SECRET, UNLIMITED

HOST = "127.0.0.1"
#: Share of its core above which the load itself is what is measured.
HARNESS_LIMIT = 0.75
#: Share of tokens that the provider may send over 10 ms late before the same holds.
LATE_LIMIT = 0.05
#: Seconds that an answer of a server is waited for.
PATIENCE = 10.0
#: Seconds in which all callbacks must have come.
CALLBACKS = 20.0


class Failed(Exception):
    """A load did not come out as it must."""


@dataclass(frozen=True, slots=True)
class Load:
    """So many streams of so many tokens, `rate` a second each, `batch` in one write.

    `per_second` of them begin, at most `at_once` are open. `settle`: seconds after the last has begun in which nothing is
    measured. `patience`: seconds beyond what it should take.
    """

    streams: int
    tokens: int
    rate: float
    per_second: float
    at_once: int = 1_000_000
    batch: int = 1
    delay_ms: int = 50
    settle: float = 0.5
    patience: float = 20.0
    body: Mapping[str, Any] = field(default_factory=dict)
    #: Seconds of the steady window; 0: until a stream ends.
    window: float = 0

    @property
    def model(self) -> str:
        """The name that tells the provider."""
        return f"gpt-bench-n{self.tokens}-r{self.rate:g}-d{self.delay_ms}-b{self.batch}"

    @property
    def steady(self) -> tuple[float, float]:
        """Seconds from the first init between which all streams are open and none begins or ends."""
        begun = self.streams / self.per_second + self.settle
        ends = self.delay_ms / 1000 + self.tokens / self.rate
        return begun, begun + self.window if self.window else max(begun, ends)

    @property
    def until(self) -> float:
        """Seconds from the first init after which nothing is waited for."""
        rounds = math.ceil(self.streams / self.at_once)
        return self.streams / self.per_second + rounds * (self.tokens / self.rate + self.delay_ms / 1000 + 1) + self.patience


@dataclass(frozen=True, slots=True)
class Cpu:
    """Seconds of CPU: of the service's processes, and of its Redis."""

    service: float
    redis: float

    def __add__(self, other: Cpu) -> Cpu:
        return Cpu(self.service + other.service, self.redis + other.redis)

    def __sub__(self, other: Cpu) -> Cpu:
        return Cpu(self.service - other.service, self.redis - other.redis)

    @property
    def both(self) -> float:
        """In all."""
        return self.service + self.redis


@dataclass(frozen=True, slots=True)
class Came:
    """What came of a load. `whole`: CPU from before the first init until after the last callback; `steady`: in the steady window.

    `viewers` and `provider`: what these two processes told. Shares are of one core: of the load itself, and of others on the
    service's core.
    """

    load: Load
    whole: Cpu
    steady: Cpu
    seconds: float
    steady_seconds: float
    viewers: Mapping[str, Any]
    provider: Mapping[str, Any]
    foreign: float

    @property
    def token_us(self) -> float:
        """CPU per token in the steady window, in µs, Redis included."""
        return self.steady.both / self._told * 1e6

    @property
    def redis_us(self) -> float:
        """Of that, Redis."""
        return self.steady.redis / self._told * 1e6

    @property
    def _told(self) -> int:
        return max(1, int(self.viewers["window_tokens"]))

    @property
    def delivered(self) -> float:
        """Tokens per second that arrived in the steady window."""
        return float(self.viewers["window_tokens"] / max(0.001, self.steady_seconds))

    @property
    def harness(self) -> float:
        """Share of their core that the load's two processes took."""
        return float((self.viewers["cpu"] + self.provider["cpu"]) / self.viewers["seconds"])

    @property
    def late(self) -> float:
        """Share of tokens that the provider itself sent late."""
        return float(self.provider["late"] / max(1, self.provider["tokens"]))

    @property
    def harness_limited(self) -> bool:
        """Whether the load, not the service, may be what was measured."""
        return self.harness > HARNESS_LIMIT or self.late > LATE_LIMIT

    def summary(self) -> dict[str, Any]:
        """For the file of results."""
        return {
            "streams": self.load.streams,
            "failed": self.viewers["failed"] + self.load.streams - self.provider["callbacks"],
            "tokens_per_second": round(self.delivered),
            "token_us": self.token_us,
            "redis_us": self.redis_us,
            "latency_ms": self.viewers["latency_ms"],
            "first_token_ms": self.viewers["first_token_ms"],
            "init_ms": self.viewers["init_ms"],
            "harness": self.harness,
            "late": self.late,
            "harness_limited": self.harness_limited,
            "foreign": self.foreign,
        }


class Server:
    """One gunicorn under load, with its Redis."""

    def __init__(self, command: list[str], environ: Mapping[str, str], cwd: Path, log: Path, redis: RedisServer) -> None:
        self.port = int(environ["PORT"])
        self.redis = redis
        self._log = log
        with log.open("a") as file:
            self._process = subprocess.Popen(command, cwd=cwd, env=environ, stdout=file, stderr=file, start_new_session=True)

    @property
    def pid(self) -> int:
        """gunicorn's master."""
        return self._process.pid

    @property
    def workers(self) -> list[int]:
        """Its worker processes."""
        return processes.tree(self.pid)[1:]

    @property
    def log(self) -> str:
        """The last of what it has printed."""
        return self._log.read_text(errors="replace")[-3000:]

    def cpu(self) -> Cpu:
        """What it has used so far."""
        return Cpu(processes.cpu(self.pid), processes.cpu(self.redis.pid))

    def ask(self, path: str = "/health") -> float:
        """Seconds that GET of this path takes, on a connection of its own. OSError where there is no answer."""
        began = time.monotonic()
        _get(self.port, path)
        return time.monotonic() - began

    def wait(self) -> None:
        """Waits until it answers. Raises Failed."""
        until = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError, http.client.HTTPException):
                self.ask()
                return
            if self._process.poll() is not None or time.monotonic() > until:
                raise Failed(f"the service does not start:\n{self.log}")
            time.sleep(0.05)

    def stop(self) -> None:
        """Kills it and its workers: nothing of their leaving is measured, and all they have written is in the rig's folder."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()


class Drive:
    """A load that runs."""

    def __init__(self, rig: Rig, servers: list[Server], load: Load) -> None:
        self._rig = rig
        self._servers = servers
        self.load = load
        rig.provider_stats()
        self._before, self._busy, self._since = self.cpu(), processes.busy(rig.service_cores), time.monotonic()
        self.began = time.monotonic() + 0.2
        init, view = servers[0], servers[-1]
        job = {
            **{"init_port": init.port, "view_port": view.port if view is not init else 0},
            **{"model": load.model, "streams": load.streams, "tokens": load.tokens, "per_second": load.per_second},
            **{"at_once": load.at_once, "begin": self.began, "until": load.until, "window": load.steady, "body": dict(load.body)},
            **{"secret": SECRET, "resume_url": f"{rig.provider_url}/resume"},
        }
        self._viewers = _spawn("bench.load.viewers")
        assert self._viewers.stdin
        self._viewers.stdin.write(json.dumps(job))
        self._viewers.stdin.close()

    def cpu(self) -> Cpu:
        """What service and Redis have used so far. One Redis that two services share is counted once."""
        service = sum(processes.cpu(server.pid) for server in self._servers)
        return Cpu(service, sum(processes.cpu(pid) for pid in {server.redis.pid for server in self._servers}))

    def until(self, seconds: float) -> None:
        """Waits for this point in time, from the first init."""
        while (rest := self.began + seconds - time.monotonic()) > 0:
            self._rig.say("")
            time.sleep(min(rest, 0.25))

    def steady(self) -> Cpu:
        """Waits for the steady window and its end; gives what it took."""
        begin, end = self.load.steady
        self.until(begin)
        before = self.cpu()
        self.until(end)
        return self.cpu() - before

    def finish(self, steady: Cpu) -> Came:
        """Waits for the last stream and the last callback."""
        while self._viewers.poll() is None:
            self._rig.say("")
            time.sleep(0.1)
        assert self._viewers.stdout
        told = self._viewers.stdout.read()
        if self._viewers.returncode:
            raise Failed("the viewers' process broke")
        viewers = json.loads(told)
        stats = self._callbacks(viewers["ok"])
        whole = self.cpu() - self._before
        seconds = time.monotonic() - self.began
        others = processes.busy(self._rig.service_cores) - self._busy - whole.both
        foreign = max(0.0, others) / (time.monotonic() - self._since)
        begin, end = self.load.steady
        return Came(self.load, whole, steady, seconds, end - begin, viewers, stats, foreign)

    def _callbacks(self, owed: int) -> dict[str, Any]:
        until = time.monotonic() + CALLBACKS
        total = self._rig.provider_stats()
        while total["callbacks"] < owed and time.monotonic() < until:
            time.sleep(0.1)
            for name, value in self._rig.provider_stats().items():
                total[name] += value
        return total

    def stop(self) -> None:
        """Ends its process, where it still runs."""
        self._viewers.kill()
        self._viewers.wait()


class Rig:
    """The load's two processes and the cores. One load at a time. `quick`: nothing is pinned, and no figure means anything."""

    def __init__(self, say: Callable[[str], None] = lambda _: None, *, quick: bool = False) -> None:
        self.say = say
        cores = sorted(os.sched_getaffinity(0))
        #: Where the load runs, the service of one worker, and one of two workers.
        self.load_cores = {cores[-1]}
        self.service_cores = {cores[0]}
        self.two_cores = set(cores[:2]) - self.load_cores or self.service_cores
        if quick:
            self.load_cores = self.service_cores = self.two_cores = set(cores)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        if program() is None:
            raise FileNotFoundError("redis-server is not installed: `make test` installs one")
        stack = self._stack
        self.folder = Path(tempfile.mkdtemp(prefix="aistream-bench-"))
        stack.callback(shutil.rmtree, self.folder)
        self.files = stack.enter_context(processes.many_files())
        stack.enter_context(processes.pinned(self.load_cores))
        provider = _spawn("bench.load.provider")
        stack.callback(_end, provider)
        assert provider.stdout
        self.provider_port = int(provider.stdout.readline())
        self.provider_url = f"http://{HOST}:{self.provider_port}"
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @contextlib.contextmanager
    def redis(self) -> Iterator[RedisServer]:
        """A Redis on the service's core."""
        with processes.pinned(self.service_cores):
            server = RedisServer(Path(tempfile.mkdtemp(dir=self.folder)) / "redis")
            server.start()
        try:
            yield server
        finally:
            server.kill()

    @contextlib.contextmanager
    def service(
        self, root: Path = ROOT, *, workers: int = 1, redis: RedisServer | None = None, more: Mapping[str, str] | None = None
    ) -> Iterator[Server]:
        """aistream, of this tree or another. `more`: variables beside those of every load."""
        environ = {"WEB_CONCURRENCY": str(workers), "DEV_MODE": "true", "LOG_FORMAT": "json", "DRAIN_SECONDS": "1"}
        environ |= {"RESUME_URL_ALLOWED_ORIGINS": self.provider_url, **(more or {})}
        with self._server(["wsgi:app"], root, environ, redis, self.two_cores if workers > 1 else self.service_cores) as server:
            yield server

    @contextlib.contextmanager
    def naive(self) -> Iterator[Server]:
        """The relay to compare with: see `bench.naive`."""
        options = ["--worker-class", "gevent", "--worker-connections", "20000", "--backlog", "4096"]
        with self._server([*options, "naive:app"], ROOT / "bench", {}, None, self.service_cores) as server:
            yield server

    @contextlib.contextmanager
    def _server(
        self, arguments: list[str], cwd: Path, environ: Mapping[str, str], redis: RedisServer | None, cores: set[int]
    ) -> Iterator[Server]:
        with contextlib.ExitStack() as stack:
            redis = redis or stack.enter_context(self.redis())
            port = _free_port()
            settings = {
                **{"PATH": os.environ["PATH"], "HOME": str(self.folder), "TMPDIR": str(self.folder)},
                **{"PYTHON_DOTENV_DISABLED": "true", "JWT_SECRET": SECRET},
                **{"OPENAI_API_KEY": "sk-bench", "OPENAI_BASE_URL": f"{self.provider_url}/v1", "REDIS_URL": redis.url},
                **{"PORT": str(port), **UNLIMITED, **environ},
            }
            command = [sys.executable, "-m", "gunicorn", "--bind", f"{HOST}:{port}", *arguments]
            with processes.pinned(cores):
                server = Server(command, settings, cwd, self.folder / "service.log", redis)
            stack.callback(server.stop)
            server.wait()
            yield server

    @contextlib.contextmanager
    def driving(self, servers: Server | list[Server], load: Load) -> Iterator[Drive]:
        """Puts a load on a server; on two, the first takes the inits and the second the viewers."""
        drive = Drive(self, servers if isinstance(servers, list) else [servers], load)
        try:
            yield drive
        finally:
            drive.stop()

    def run(self, servers: Server | list[Server], load: Load, *, strict: bool = True) -> Came:
        """The whole load. Raises Failed, if `strict`, where anything is not as it must be."""
        with self.driving(servers, load) as drive:
            came = drive.finish(drive.steady())
        if strict:
            check(came, servers if isinstance(servers, Server) else servers[0])
        return came

    def warm_up(self, servers: Server | list[Server], quick: bool = False, **body: Any) -> None:
        """A few sessions, so that no import and no first connection is measured."""
        streams, tokens = (4, 4) if quick else (60, 20)
        self.run(servers, Load(streams, tokens, rate=50, per_second=100, at_once=20, settle=0, body=body))

    def provider_stats(self) -> dict[str, Any]:
        """What the provider counted since it was last asked."""
        return dict(json.loads(_get(self.provider_port, "/stats")))


def check(came: Came, server: Server) -> None:
    """Raises Failed where a stream, or a callback, is not as it must be."""
    viewers, provider = came.viewers, came.provider
    wrong = [f"{count} streams: {what}" for what, count in viewers["wrong"].items()]
    if provider["callbacks"] != came.load.streams:
        wrong.append(f"{provider['callbacks']} callbacks of {came.load.streams}")
    for name in ("doubles", "unfinished"):
        if provider[name]:
            wrong.append(f"{provider[name]} callbacks {name}")
    if wrong:
        raise Failed("\n".join([*wrong, server.log]))


def _get(port: int, path: str) -> bytes:
    connection = http.client.HTTPConnection(HOST, port, timeout=PATIENCE)
    try:
        connection.request("GET", path)
        return connection.getresponse().read()
    finally:
        connection.close()


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        return int(sock.getsockname()[1])


def _spawn(module: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", module]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)


def _end(process: subprocess.Popen[str]) -> None:
    assert process.stdin and process.stdout
    process.stdin.close()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()
