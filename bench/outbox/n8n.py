"""An n8n that fails by a script, and keeps a record of every request: what it answered, whole or not, and over which port."""

import json
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Self
from urllib.parse import urlsplit

from bench.outbox.plan import Plan
from tests.neighbours.http1 import HOST, ClientGone, Connection, Request, Server
from tests.neighbours.receiver import (
    CANNOT_POST,
    DATABASE_NOT_READY,
    FINISHED_ALREADY,
    INVALID_TOKEN,
    LOST_THE_RACE,
    RUNNING_ALREADY,
    STARTED,
    STARTING_UP,
    WRONG_METHOD,
    Answer,
)

#: Seconds between a look whether the sender is still there and the answer. Who waits that long has not just timed out.
LOOK = 0.0005


class Reaction(Enum):
    """What the n8n does with a request: its name for the table, and the answer (None: none that is whole)."""

    STARTED = ("200", STARTED)
    STARTING_UP = ("200 with a page", STARTING_UP)
    CANNOT_POST = ("404 with a page", CANNOT_POST)
    NOT_READY = ("503", DATABASE_NOT_READY)
    RUNNING = ("409 running already", RUNNING_ALREADY)
    FINISHED = ("409 finished already", FINISHED_ALREADY)
    LOST_THE_RACE = ("500", LOST_THE_RACE)
    INVALID_TOKEN = ("401", INVALID_TOKEN)
    WRONG_METHOD = ("404 wrong method", WRONG_METHOD)
    HANG = ("hung", None)
    CUT = ("cut", None)
    HALF = ("half a 200", None)

    @property
    def label(self) -> str:
        """Its name for the table."""
        return str(self.value[0])

    @property
    def answer(self) -> Answer | None:
        """What is answered."""
        answer: Answer | None = self.value[1]
        return answer


#: After these, written whole, nothing may come.
FINAL = {Reaction.STARTED, Reaction.FINISHED, Reaction.INVALID_TOKEN, Reaction.WRONG_METHOD}
#: After these the sender cannot know whether its callback has arrived.
AMBIGUOUS = {Reaction.LOST_THE_RACE, Reaction.HANG, Reaction.CUT, Reaction.HALF}


@dataclass(slots=True, eq=False)
class Exchange:
    """One request and what became of it. Times are `time.time()`; `port` is the sender's.

    `took`: with this request n8n took the callback. `whole`: the answer was written to its end, to a sender that was there.
    `over_at`: when the answer was written, or the connection was over (inf: neither).
    """

    path: str
    at: float
    port: int
    webhook_id: str
    said: Any
    phase: str
    reaction: Reaction
    took: bool = False
    whole: bool = False
    over_at: float = float("inf")

    @property
    def attempt(self) -> int:
        """Its number as the payload has it; 0 where it has none."""
        number = self.said.get("attempt") if isinstance(self.said, dict) else None
        return number if isinstance(number, int) else 0

    @property
    def final(self) -> bool:
        """Whether nothing may come after it."""
        return self.whole and self.reaction in FINAL


@dataclass(slots=True)
class N8n:
    """One n8n on a port of its own. `turn` makes it well or not as a whole; a session's plan says what happens to it alone.

    `early`: seconds for which a session that is early stays so, at most. `turns`: when it became what; `taken`: path -> when it
    took the session's callback.
    """

    early: float = 0.0
    phase: str = "up"
    exchanges: list[Exchange] = field(default_factory=list)
    turns: list[tuple[float, str]] = field(default_factory=list)
    taken: dict[str, float] = field(default_factory=dict)
    _plans: dict[str, Plan] = field(default_factory=dict)
    _seen: Counter[str] = field(default_factory=Counter)
    _first: dict[str, float] = field(default_factory=dict)
    _server: Server = field(init=False)

    def __post_init__(self) -> None:
        self._server = Server(self._handle)

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop()

    @property
    def port(self) -> int:
        """Where it is, or comes back to."""
        return self._server.port

    def url(self, path: str) -> str:
        """The URL of `path`."""
        return f"http://{HOST}:{self.port}{path}"

    def expect(self, path: str, plan: Plan) -> None:
        """A session will report to this path."""
        self._plans[path] = plan

    def turn(self, phase: str) -> None:
        """From now on it is like this as a whole. Down: all connections are closed, and new ones refused."""
        before, self.phase = self.phase, phase
        self.turns.append((time.time(), phase))
        if phase == "down":
            self._server.suspend()
        elif before == "down":
            self._server.start()

    def _handle(self, connection: Connection, request: Request) -> None:
        path, said = urlsplit(request.target).path, _decoded(request.body)
        reaction, took, delay = self._react(path)
        webhook_id = request.headers.get("webhook-id", "")
        one = Exchange(path, time.time(), connection.client_port, webhook_id, said, self.phase, reaction)
        self.exchanges.append(one)
        try:
            if delay:
                connection.pause(delay)
                took = path not in self.taken  # of two at once one is taken
            if took:
                one.took = True
                self.taken[path] = time.time()
            self._answer(connection, one)
        finally:
            one.over_at = time.time()

    def _answer(self, connection: Connection, one: Exchange) -> None:
        answer = one.reaction.answer
        if answer is not None:
            connection.pause(LOOK)
            body = answer.body.encode() if isinstance(answer.body, str) else answer.body
            connection.reply(answer.status, answer.headers.items(), body)
            one.whole = True
            return
        if one.reaction is Reaction.HANG:
            connection.pause(3600)
        if one.reaction is Reaction.HALF:
            connection.head(200, [("Content-Type", "application/json"), ("Content-Length", "34")])
            connection.send(b'{"message":"Work')
            connection.pause(0.05)  # the sender has read the half answer before the reset arrives
        connection.reset()
        raise ClientGone("ended by the script")

    def _react(self, path: str) -> tuple[Reaction, bool, float]:
        """What to do with a request, whether it takes the callback with it, and after how many seconds."""
        self._seen[path] += 1
        turn, taken = self._seen[path], path in self.taken
        dice = (self._plans[path].dice * 7919 + turn * 0.37) % 1 if path in self._plans else 0.0
        match self.phase:
            case "starting":
                return (Reaction.STARTING_UP, Reaction.CANNOT_POST, Reaction.NOT_READY)[int(dice * 3)], False, 0.0
            case "hang":
                return Reaction.HANG, False, 0.0
            case "errors":
                return (Reaction.LOST_THE_RACE, Reaction.NOT_READY)[int(dice * 2)], False, 0.0
            case "cut":
                doomed = path in self._plans and self._plans[path].manner in ("refused", "hopeless")
                return Reaction.CUT, dice < 0.5 and not taken and not doomed, 0.0
            case "busy" if not taken:
                return (Reaction.RUNNING, Reaction.NOT_READY)[int(dice * 2)], False, 0.0
        if taken:
            return Reaction.FINISHED, False, 0.0
        return self._well(path, turn)

    def _well(self, path: str, turn: int) -> tuple[Reaction, bool, float]:
        plan = self._plans.get(path)
        first = self._first.setdefault(path, time.time())
        match plan.manner if plan else "plain":
            case "early" if plan and time.time() - first < plan.dice * self.early:
                return Reaction.RUNNING, False, 0.0
            case "cut":
                return Reaction.CUT, True, 0.0
            case "error":
                return Reaction.LOST_THE_RACE, True, 0.0
            case "half":
                return Reaction.HALF, True, 0.0
            case "held" if plan:
                return Reaction.STARTED, False, 0.5 + plan.dice * self.early / 2
            case "hung" if turn == 1:
                return Reaction.HANG, False, 0.0
            case "refused" if plan:
                return (Reaction.INVALID_TOKEN, Reaction.WRONG_METHOD)[int(plan.dice * 2)], False, 0.0
            case "hopeless":
                return Reaction.LOST_THE_RACE, False, 0.0
        return Reaction.STARTED, True, 0.0


def _decoded(body: bytes) -> Mapping[str, Any] | None:
    try:
        said = json.loads(body)
    except ValueError:
        return None
    return said if isinstance(said, dict) else None
