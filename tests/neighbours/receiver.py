"""An n8n that waits for callbacks: records every request, and answers as the test says, also while it runs.

It lives in the test process (under gevent's monkey patching its threads are greenlets). What a real n8n answers, and
when, was measured with n8n 2.41.1; the answers that matter are constants here.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, Self
from urllib.parse import urlsplit

from tests.neighbours.http1 import HOST, ClientGone, Connection, Request, Server


@dataclass(frozen=True, slots=True)
class Received:
    """One request: `target` is path and query byte for byte, header names are lower case, `at` is `time.time()`."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes
    at: float

    @property
    def path(self) -> str:
        """The target without its query."""
        return urlsplit(self.target).path

    @property
    def json(self) -> Any:
        """The body, decoded; ValueError where it is no JSON."""
        return json.loads(self.body)


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP answer, after `delay` seconds; with `drip`, so many seconds between each two bytes of the body."""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=lambda: {"Content-Type": "application/json; charset=utf-8"})
    body: str | bytes = '{"message":"Workflow was started"}'
    delay: float = 0.0
    drip: float = 0.0


class Behaviour(Enum):
    """What a receiver can do instead of answering."""

    HANG = auto()
    """Take the request and say nothing until the sender leaves."""
    CUT = auto()
    """Take the request and reset the connection: did it arrive?"""
    CUT_BODY = auto()
    """Answer 200, and reset the connection in the middle of the body."""
    ENDLESS = auto()
    """Answer 200 with a body that never ends, 16 KiB at a time."""


HANG, CUT, CUT_BODY, ENDLESS = Behaviour.HANG, Behaviour.CUT, Behaviour.CUT_BODY, Behaviour.ENDLESS

_HTML = {"Content-Type": "text/html; charset=utf-8"}
STARTED = Answer()
STARTING_UP = Answer(200, _HTML, "<html><body>n8n is starting up. Please wait</body></html>")
CANNOT_POST = Answer(404, _HTML, "<pre>Cannot POST /webhook-waiting/7</pre>")
DATABASE_NOT_READY = Answer(503, body='{"code":503,"message":"Database is not ready!"}')
RUNNING_ALREADY = Answer(409, body='{"code":409,"message":"The execution \\"7\\" is running already."}')
FINISHED_ALREADY = Answer(409, body='{"code":409,"message":"The execution \\"7 has finished already."}')
FINISHED_WITH_ERROR = Answer(409, body='{"code":409,"message":"The execution \\"7\\" has finished with error."}')
DOES_NOT_EXIST = Answer(404, body='{"code":404,"message":"The execution \\"7\\" does not exist."}')
WRONG_METHOD = Answer(
    404, body='{"code":404,"message":"The workflow does not contain a waiting webhook with a matching path/method."}'
)
LOST_THE_RACE = Answer(500, body='{"code":0,"message":"There was a problem executing the workflow"}')
INVALID_TOKEN = Answer(401, body='{"error":"Invalid token"}')

Reaction = Answer | Behaviour | tuple[int, Mapping[str, str], str | bytes]
Script = Reaction | Callable[[Received], Reaction]


class Receiver:
    """A callback receiver on a port of its own.

    with Receiver() as n8n:
        n8n.answers([RUNNING_ALREADY, (503, {}, "busy"), CUT])   # the first three; then STARTED again
        ...  resumeUrl = n8n.url("/webhook-waiting/7?signature=ab%2Fcd")
        first, *later = n8n.wait_for(4, timeout=10)
        assert first.json["answer"] == "Hello"
    """

    def __init__(self) -> None:
        self._server = Server(self._handle)
        self._received: list[Received] = []
        self._scripts: dict[str | None, list[Script]] = {}
        self._default: Script = STARTED

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop()

    @property
    def origin(self) -> str:
        """`http://127.0.0.1:PORT`."""
        return f"http://{HOST}:{self._server.port}"

    def url(self, path: str = "/webhook-waiting/1?signature=0123abcd") -> str:
        """The URL of `path` (with its query, if it has one); every path is answered."""
        return self.origin + path

    @property
    def requests(self) -> list[Received]:
        """Everything received since the last reset, in order, also what was never answered."""
        return list(self._received)

    def answers(self, script: Sequence[Script], path: str | None = None) -> None:
        """React to the next requests with these, one after another; then as `always` says (200, as n8n).

        With `path` (without query) the script is for that path alone, and goes before the one for all. A function gets
        the request and returns what to do.
        """
        self._scripts[path] = list(script)

    def always(self, script: Script) -> None:
        """React with this to every request for which there is no script."""
        self._default = script

    def reset(self) -> None:
        """Forget requests and scripts."""
        self._received.clear()
        self._scripts.clear()
        self._default = STARTED

    def down(self) -> None:
        """Refuse connections, as an n8n that is not there; the port is kept."""
        self._server.suspend()

    def up(self) -> None:
        """Be there again after `down`, under the same URL."""
        self._server.start()

    def wait_for(self, count: int, timeout: float = 5.0, path: str | None = None) -> list[Received]:
        """The requests (with `path`: for that path) as soon as there are `count`; AssertionError after `timeout` s."""
        until = time.monotonic() + timeout
        while True:
            found = [received for received in self._received if path in (None, received.path)]
            if len(found) >= count:
                return found
            assert time.monotonic() < until, f"{len(found)} of {count} requests after {timeout} s: {found}"
            time.sleep(0.005)

    def _handle(self, connection: Connection, request: Request) -> None:
        received = Received(request.method, request.target, request.headers, request.body, time.time())
        self._received.append(received)
        reaction = self._next(received)
        if isinstance(reaction, Behaviour):
            self._misbehave(connection, reaction)
            return
        answer = Answer(*reaction) if isinstance(reaction, tuple) else reaction
        connection.pause(answer.delay)
        body = answer.body.encode() if isinstance(answer.body, str) else answer.body
        if not answer.drip:
            connection.reply(answer.status, answer.headers.items(), body)
            return
        connection.head(answer.status, [*answer.headers.items(), ("Content-Length", str(len(body)))])
        for byte in body:
            connection.send(bytes([byte]))
            connection.pause(answer.drip)

    def _next(self, received: Received) -> Reaction:
        script = self._scripts.get(received.path) or self._scripts.get(None)
        step = script.pop(0) if script else self._default
        return step(received) if callable(step) else step

    def _misbehave(self, connection: Connection, behaviour: Behaviour) -> None:
        json_type = ("Content-Type", "application/json")
        match behaviour:
            case Behaviour.HANG:
                connection.pause(3600)
            case Behaviour.CUT_BODY:
                connection.head(200, [json_type, ("Content-Length", "34")])
                connection.send(b'{"message":"Work')
                time.sleep(0.05)  # the sender has read the half answer before the reset arrives
            case Behaviour.ENDLESS:
                connection.head(200, [json_type, ("Transfer-Encoding", "chunked")])
                while True:
                    connection.chunk(b" " * 16384)
                    connection.pause(0.001)
        connection.reset()
        raise ClientGone("ended by the script")
