"""A model provider that does what its model's name says: OpenAI's chat completions and Anthropic's messages.

`python -m tests.neighbours.provider` listens on a port that the system chooses, says `listening 127.0.0.1:PORT` in one
line, and ends when its standard input is closed or its parent is gone, so that no test run leaves one behind. What
the models do is in `scenarios`. It refuses what the real ones refuse first: no key, no model, no messages, Anthropic
without max_tokens. `--tls FOLDER` makes it speak TLS, with a certificate for localhost and 127.0.0.1 by a CA of its own,
which it writes to FOLDER/ca.pem.

For tests: `GET /_requests` (what was asked, oldest first, and how each ended), `GET /_open` (streams that are being
written now), `POST /_release` (models that `hold` go on), `POST /_models` (the list of models is answered with the status
in the body from then on; 0: not at all), `POST /_reset` (forget the requests, the -x counts and that status).
"""

import argparse
import http.client
import json
import os
import select
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from tests.neighbours import scenarios
from tests.neighbours.http1 import HOST, ClientGone, Connection, Request, Server
from tests.neighbours.scenarios import (
    Ask,
    Cut,
    ErrorEvent,
    Finish,
    HangUp,
    Headers,
    Hold,
    Noise,
    Open,
    Page,
    Ping,
    Raw,
    Shred,
    Sleep,
    Status,
    Step,
)
from tests.neighbours.wires import AnthropicWire, OpenAIWire, Whole, Wire, models, to_json

SHRED_PAUSE = 0.0003  # long enough that the reader sees two reads, short enough for texts of some hundred characters
HOLD_POLL = 0.005
HOLD_POLL_MOST = 0.1
CA_FILE = "ca.pem"
APIS = {"/v1/chat/completions": "openai", "/v1/messages": "anthropic"}


@dataclass(slots=True)
class Asked:
    """One request that the provider got, and what became of it.

    ended: `""` while it is being answered, `complete` (the ending was written), `refused` (an error status), `broken`
    (the scenario ended it), or `client_left`: the client closed early, `ended_at` says when and `deltas` how many
    deltas had been written by then. Times are `time.time()`. client_port tells one connection from another.
    """

    number: int
    path: str
    model: str
    headers: dict[str, str]
    body: Any
    client_port: int
    started_at: float
    deltas: int = 0
    ended: str = ""
    ended_at: float | None = None

    @property
    def client_left(self) -> bool:
        """Whether the client closed the connection before the answer had ended."""
        return self.ended == "client_left"

    def end(self, how: str) -> None:
        """Note how it ended; the first word holds."""
        if not self.ended:
            self.ended, self.ended_at = how, time.time()


class Provider:
    """The requests, and the answers to them."""

    def __init__(self) -> None:
        self.asked: list[Asked] = []
        self.open: set[int] = set()
        self._count = 0
        self._seen: Counter[str] = Counter()
        self._gate = threading.Event()
        self._models_status = 200

    def handle(self, connection: Connection, request: Request) -> None:
        """Answer one request: a control endpoint, the models, or a model."""
        path = urlsplit(request.target).path
        if path in APIS and request.method == "POST":
            self._answer(connection, request, path)
        elif path == "/v1/models":
            self._list_models(connection, request)
        elif path == "/_requests":
            _reply_json(connection, [asdict(asked) for asked in self.asked])
        elif path == "/_open":
            _reply_json(connection, len(self.open))
        elif path == "/_release":
            self._gate.set()
            self._gate = threading.Event()
            _reply_json(connection, "released")
        elif path == "/_models":
            self._models_status = int(request.body)
            _reply_json(connection, "noted")
        elif path == "/_reset":
            self.asked = []
            self._seen.clear()
            self._models_status = 200
            _reply_json(connection, "forgotten")
        else:
            connection.reply(404, [("Content-Type", "text/plain")], b"not found")

    def _list_models(self, connection: Connection, request: Request) -> None:
        api = "anthropic" if "anthropic-version" in request.headers else "openai"
        body: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}  # nothing wrong with it
        ask = Ask(api, "", (), request.headers, body, {}, "plain", 0)
        wire = _wire(ask)
        fault = wire.fault()
        if self._models_status == 0:
            connection.pause(scenarios.FOR_EVER)
        elif fault is not None or self._models_status != 200:
            step = fault or Status(self._models_status)
            headers, told = wire.error(step)
            connection.reply(step.status, [*headers, *wire.headers()], told)
        else:
            _reply_json(connection, models(api))

    def _answer(self, connection: Connection, request: Request, path: str) -> None:
        self._count += 1
        try:
            body = json.loads(request.body)
            model = str(body["model"])
            texts = scenarios.all_texts(body)
        except (ValueError, KeyError, TypeError, AttributeError):
            body, model, texts = {"messages": []}, "", ()
        asked = Asked(self._count, path, model, request.headers, body, connection.client_port, time.time())
        self.asked.append(asked)
        self._seen[model] += 1
        parsed = scenarios.parse(model)
        name, params = parsed or ("", {})
        if params.get("x", self._seen[model]) < self._seen[model]:
            name = "hello"
        usage = scenarios.USAGE.get(name, "plain")
        ask = Ask(APIS[path], model, texts, request.headers, body, params, usage, self._count)
        wire = _wire(ask)
        stage = Stage(connection, wire, ask, asked, self._gate)
        self.open.add(asked.number)
        try:
            if (fault := wire.fault()) is not None:
                stage.refuse(fault)
            elif parsed is None:
                stage.refuse(Status(404, f"The model `{model}` does not exist or you do not have access to it."))
            elif body.get("stream") and name != "whole":
                stage.stream(scenarios.SCENARIOS[name](ask))
            else:
                stage.whole(scenarios.SCENARIOS[name](ask))
        except ClientGone:
            asked.end("client_left")
            raise
        finally:
            self.open.discard(asked.number)


def _wire(ask: Ask) -> Wire:
    return OpenAIWire(ask) if ask.api == "openai" else AnthropicWire(ask)


def _reply_json(connection: Connection, value: Any) -> None:
    connection.reply(200, [("Content-Type", "application/json")], to_json(value))


class Stage:
    """One answer being given: plays a scenario's steps onto the connection and notes in `asked` what happened."""

    def __init__(self, connection: Connection, wire: Wire, ask: Ask, asked: Asked, gate: threading.Event) -> None:
        self._connection = connection
        self._wire = wire
        self._ask = ask
        self._asked = asked
        self._gate = gate
        self._headers_sent = False
        self._opened = False
        self._shredded = False

    def refuse(self, step: Status) -> None:
        """An error answer instead of an answer."""
        headers, body = self._wire.error(step)
        headers = [*headers, *step.headers, *scenarios.retry_headers(self._ask.params), *self._wire.headers()]
        self._asked.end("refused")
        self._connection.reply(step.status, headers, body)

    def _page(self, step: Page) -> None:
        self._asked.end("broken")
        self._connection.reply(200, [("Content-Type", "text/html; charset=utf-8")], step.html.encode())

    def stream(self, steps: Iterator[Step]) -> None:
        """Play the steps as a stream. Raises ClientGone when the connection is over, whoever ended it."""
        for step in steps:
            if isinstance(step, Status):
                return self.refuse(step)
            if isinstance(step, Page):
                return self._page(step)
            self._play(step)
        self._headers()
        self._asked.end("broken")
        self._connection.end_chunks()

    def _play(self, step: Step) -> None:
        match step:
            case Headers():
                self._headers()
            case Open():
                self._open()
            case Sleep(seconds):
                self._connection.pause(seconds)
            case Hold():
                self._hold()
            case Shred():
                self._shredded = True
            case Cut() | HangUp():
                self._break(step)
            case Raw(data):
                self._send([data])
            case Noise():
                self._open()
                self._send(self._wire.noise())
            case Ping():
                self._send(self._wire.ping())
            case ErrorEvent():
                self._open()
                self._asked.end("broken")
                self._send(self._wire.error_event(step))
            case Finish():
                self._open()
                self._asked.end("complete" if step.done else "broken")
                self._send(self._wire.finish(step, self._asked.deltas))
            case Status() | Page():
                raise AssertionError(f"{step} must be the first step")
            case _:
                self._delta(step)

    def _delta(self, step: scenarios.Delta) -> None:
        self._open()
        self._connection.pause(self._ask.params["d" if self._asked.deltas else "f"] / 1000)
        self._send(self._wire.delta(step, self._asked.deltas + 1))
        self._asked.deltas += 1
        if self._asked.deltas % 50 == 0:
            time.sleep(0)  # under gevent nothing else makes a fast writer yield

    def _headers(self) -> None:
        if not self._headers_sent:
            self._headers_sent = True
            framing = [("Content-Type", "text/event-stream; charset=utf-8"), ("Transfer-Encoding", "chunked")]
            self._connection.head(200, [*framing, ("Cache-Control", "no-cache"), *self._wire.headers()])

    def _open(self) -> None:
        self._headers()
        if not self._opened:
            self._opened = True
            self._send(self._wire.opening())

    def _send(self, events: list[bytes]) -> None:
        self._headers()
        for event in events:
            if not self._shredded:
                self._connection.chunk(event)
                continue
            for piece in shred(event):
                self._connection.chunk(piece)
                self._connection.pause(SHRED_PAUSE)

    def _hold(self) -> None:
        began = time.monotonic()
        while not self._gate.is_set():
            # Hundreds may hold for long: each looks again after a twentieth of the time for which it has held.
            self._connection.pause(min(max(HOLD_POLL, (time.monotonic() - began) / 20), HOLD_POLL_MOST))

    def _break(self, step: Cut | HangUp) -> None:
        if isinstance(step, HangUp):
            self._open()
        self._asked.end("broken")
        if isinstance(step, Cut):
            self._connection.reset()
        else:
            self._connection.close()
        raise ClientGone("ended by the scenario")

    def whole(self, steps: Iterator[Step]) -> None:
        """Collect the steps and answer in one piece; in a stream that breaks, so does this answer."""
        answer = Whole()
        for step in steps:
            match step:
                case Status():
                    return self.refuse(step)
                case Page():
                    return self._page(step)
                case ErrorEvent(status, message):
                    return self.refuse(Status(status or 500, message))
                case Sleep() | Hold() | Cut():
                    self._play(step)
                case HangUp():
                    self._break(Cut())
                case Finish():
                    answer.finish = step
                case Headers() | Open() | Noise() | Ping() | Raw() | Shred():
                    pass
                case _:
                    self._connection.pause(self._ask.params["d" if answer.deltas else "f"] / 1000)
                    answer.add(step)
        self._asked.deltas = answer.deltas
        self._asked.end("complete")
        body = to_json(self._wire.whole(answer))
        self._connection.reply(200, [("Content-Type", "application/json"), *self._wire.headers()], body)


def shred(event: bytes) -> list[bytes]:
    """Cut at the places where a careless reader breaks: inside characters, inside lines, between newlines."""
    cuts = {place for place, byte in enumerate(event) if byte & 0xC0 == 0x80}  # in front of each continuation byte
    start = 0
    for line in event.split(b"\n"):
        cuts |= {start + len(line) // 2, start + len(line)}
        start += len(line) + 1
    places = sorted(cuts - {0, len(event)})
    return [event[a:b] for a, b in zip(chain([0], places), chain(places, [len(event)]), strict=True)]


class ProviderServer:
    """The provider as its own process, for fixtures; everything about it is asked over HTTP.

    with ProviderServer() as provider:
        client = openai.OpenAI(api_key="any", base_url=provider.openai_url, max_retries=0)
        ...
        assert provider.requests()[-1].ended == "complete"

    tls: a folder for its CA; it speaks TLS then, at https://localhost:PORT.
    """

    def __init__(self, tls: Path | None = None) -> None:
        self._tls = tls
        self._process: subprocess.Popen[str] | None = None
        self._port = 0

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the process; returns when it listens. Raises RuntimeError with its output when it does not."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.neighbours.provider", *(("--tls", str(self._tls)) if self._tls else ())],
            cwd=Path(__file__).parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.startswith(f"listening {HOST}:"):
            self.stop()
            raise RuntimeError(f"the test provider did not start: {line!r}")
        self._port = int(line.rpartition(":")[2])

    def stop(self) -> None:
        """End the process: by closing its input, and after 5 s by force."""
        if self._process is None:
            return
        with self._process as process:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
        self._process = None

    @property
    def url(self) -> str:
        """`http://127.0.0.1:PORT` or `https://localhost:PORT`: also what the Anthropic SDK takes as its base URL."""
        return f"https://localhost:{self._port}" if self._tls else f"http://{HOST}:{self._port}"

    @property
    def ca(self) -> Path:
        """The CA to trust."""
        assert self._tls is not None
        return self._tls / CA_FILE

    @property
    def openai_url(self) -> str:
        """The base URL of the OpenAI SDK."""
        return f"{self.url}/v1"

    @property
    def anthropic_url(self) -> str:
        """The base URL of the Anthropic SDK."""
        return self.url

    @property
    def openai_environ(self) -> dict[str, str]:
        """The variables that point a service at this provider as OpenAI alone: one SDK less to import, at every start."""
        trust = {"SSL_CERT_FILE": str(self.ca)} if self._tls else {}
        return {"OPENAI_API_KEY": "sk-test-openai", "OPENAI_BASE_URL": self.openai_url, **trust}

    @property
    def environ(self) -> dict[str, str]:
        """The variables that point a service at this provider."""
        return {
            **self.openai_environ,
            "ANTHROPIC_API_KEY": "sk-ant-test-anthropic",
            "ANTHROPIC_BASE_URL": self.anthropic_url,
        }

    def requests(self, model: str | None = None) -> list[Asked]:
        """What was asked since the last reset, oldest first; `model`: only with this name."""
        every = [Asked(**asked) for asked in self._call("GET", "/_requests")]
        return [asked for asked in every if model in (None, asked.model)]

    def open_streams(self) -> int:
        """How many answers are being written now."""
        return int(self._call("GET", "/_open"))

    def wait_for_open_streams(self, count: int, timeout: float = 5.0) -> None:
        """Wait until exactly `count` answers are being written; AssertionError after `timeout` seconds."""
        until = time.monotonic() + timeout
        while (now := self.open_streams()) != count:
            assert time.monotonic() < until, f"{now} streams open after {timeout} s, expected {count}"
            time.sleep(0.01)

    def release(self) -> None:
        """Let every model that holds at this moment go on."""
        self._call("POST", "/_release")

    def answer_models(self, status: int) -> None:
        """Answer `GET /v1/models` with this status until `reset()`; 0: with nothing, as long as the client waits."""
        self._call("POST", "/_models", str(status))

    def reset(self) -> None:
        """Forget the requests, the -x counts and how the models are listed; answers in progress go on."""
        self._call("POST", "/_reset")

    def _call(self, method: str, path: str, body: str | None = None) -> Any:
        if self._tls:
            context = ssl.create_default_context(cafile=self.ca)
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(HOST, self._port, timeout=10, context=context)
        else:
            connection = http.client.HTTPConnection(HOST, self._port, timeout=10)
        try:
            connection.request(method, path, body)
            return json.loads(connection.getresponse().read())
        finally:
            connection.close()


def _live_until_orphaned() -> None:
    """Return when standard input is at its end or the parent process has died."""
    parent = os.getppid()
    while os.getppid() == parent:
        readable, _, _ = select.select([0], [], [], 1.0)
        if readable and not os.read(0, 4096):
            return


def _tls_context(folder: Path) -> ssl.SSLContext:
    """A server's context with a certificate by a new CA, which is written into `folder`."""
    import trustme  # only here: with cryptography it takes longer to import than everything else

    ca = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("localhost", HOST).configure_cert(context)
    ca.cert_pem.write_to_path(folder / CA_FILE)
    return context


def main(tls: Path | None) -> None:
    """Serve until the parent is gone."""
    with Server(Provider().handle, _tls_context(tls) if tls else None) as server:
        print(f"listening {HOST}:{server.port}", flush=True)
        _live_until_orphaned()
        os._exit(0)  # streams in progress end as a killed provider's would: cut


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--tls", type=Path, metavar="FOLDER")
    folder = parser.parse_args().tls
    if folder is None:
        from gevent import monkey

        # Greenlets instead of threads. Without ssl, which is imported already: with TLS they are real threads.
        monkey.patch_all(ssl=False)
    main(folder)
