"""Every Redis command of the service.

`{0}` is a hash tag: every script touches one slot, so that sharding by id over a cluster stays possible.

    key                          type    holds
    aistream:{0}:session:<id>    hash    state, epoch, worker, times, callback state and attempts; nothing private
    aistream:{0}:content:<id>    hash    request (with the prompt), resumeUrl, answer: gone when the replay is over
    aistream:{0}:log:<id>        stream  the events; entry id = SSE id = `<epoch>-<seq>`
    aistream:{0}:deadlines       zset    session id -> its one next deadline, ms by Redis's clock
    aistream:{0}:dead            zset    dead letters by time
    aistream:{0}:tick            hash    when somebody last asked for due sessions

Transitions are Lua scripts in `lua/`, one file each; their headers give keys, arguments, result and why they are atomic.
Foreign exceptions end here: whatever means "Redis is away" is StoreUnavailable.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import files
from typing import Any, Literal

import msgspec
import redis

from aistream.config import Config
from aistream.connections import Connections, connect
from aistream.errors import StoreUnavailable
from aistream.events import Cursor, Ending, Event, Start, from_entry, to_entry
from aistream.session import (
    Accepted,
    Claim,
    Claimed,
    Elsewhere,
    Ended,
    Fenced,
    Finish,
    Finished,
    Missing,
    Outcome,
    Request,
    Session,
    Short,
    State,
    state_of,
)

PREFIX = "aistream:{0}:"
#: Seconds a taken callback is hidden from other workers: more than one attempt may last.
VISIBILITY = 60
#: Seconds that the mark of an ended session outlives its content.
TOMBSTONE = 86_400
#: Seconds a dead letter is kept for a person.
DEAD_LETTER = 7 * 86_400
#: Seconds before a store that was away is asked again.
AWAY = 0.25
#: Most due sessions looked at in one go.
DUE = 1000

#: With these a Redis that is up says that it cannot serve now. redis-py names some; the others are told by their first word.
_AWAY_ERRORS = (
    redis.ConnectionError,
    redis.TimeoutError,
    redis.ReadOnlyError,
    redis.OutOfMemoryError,
    redis.exceptions.MasterDownError,
    redis.exceptions.ClusterDownError,
    redis.exceptions.TryAgainError,
)
_AWAY_WORDS = ("LOADING", "OOM", "READONLY", "MISCONF", "MASTERDOWN", "NOREPLICAS")

_SCRIPTS = ("create", "claim", "renew", "finish", "due", "take_callback", "settle")

_json = msgspec.json.Encoder().encode
_request = msgspec.json.Decoder(Request)
_outcome = msgspec.json.Decoder(Outcome)

Verdict = Literal["owner", "fenced", "gone"]
_VERDICTS: dict[int, Verdict] = {1: "owner", 0: "fenced", -1: "gone"}


class Taken(msgspec.Struct, frozen=True):
    """A callback taken for one attempt. `ambiguous`: an earlier attempt may have arrived."""

    session: Session
    attempt: int
    ambiguous: bool


class AppendRefused(Exception):
    """Redis did not take an entry. A hint that the epoch is over, or an echo of an entry that arrived before: ask `renew`."""


class Store:
    """The sessions, in one Redis. Safe to use from many greenlets. Every method may raise StoreUnavailable."""

    def __init__(self, config: Config, *, connections: Connections | None = None, worker: str | None = None) -> None:
        """`worker` is this process's name in the store; by default a random one."""
        self.worker = worker or uuid.uuid4().hex
        self._config = config
        self.connections = connections or connect(config)
        prelude = _source("prelude")
        self._scripts = {name: _Script(prelude + _source(name)) for name in _SCRIPTS}

    def ping(self) -> None:
        """Returns when Redis answers."""
        self._call("PING")

    def create(self, session_id: str, subject: str, request: Request, resume_url: str) -> Accepted:
        """A new pending session. Idempotent by id."""
        start = to_entry(Start(session_id, request.model, request.provider))[1]
        created_at, deadline = self._run(
            "create",
            [_session(session_id), _content(session_id), _DEADLINES],
            [
                session_id,
                _ms(self._config.session_ttl_seconds),
                self._config.keep_seconds,
                subject,
                start,
                _json(request),
                resume_url,
            ],
        )
        return Accepted(int(created_at), int(deadline))

    def claim(self, session_id: str, *, recover: bool = False) -> Claim:
        """Asks for the right to generate. `recover` also takes a running session whose lease has lapsed."""
        nonce = uuid.uuid4().hex
        answer = self._run(
            "claim",
            [*_keys(session_id), _DEADLINES],
            [
                session_id,
                self.worker,
                nonce,
                _ms(self._config.lease_seconds),
                self._config.keep_seconds,
                int(recover),
            ],
        )
        match answer[0]:
            case b"claimed":
                return Claimed(int(answer[1]), _request.decode(answer[2]), answer[3] == b"1")
            case b"running":
                return Elsewhere(answer[1].decode())
            case b"ended":
                return Ended(State(answer[1].decode()), Cursor.parse((answer[2] or b"").decode()), answer[3] == b"1")
            case _:
                return Missing()

    def renew(self, epochs: Mapping[str, int]) -> dict[str, Verdict]:
        """Renews the leases of the sessions this worker generates (id -> epoch), and says whose it still is."""
        if not epochs:
            return {}
        pairs = [part for pair in epochs.items() for part in pair]
        verdicts = self._run(
            "renew",
            [_DEADLINES, *map(_session, epochs)],
            [self.worker, _ms(self._config.lease_seconds), *pairs],
        )
        return {session_id: _VERDICTS[verdict] for session_id, verdict in zip(epochs, verdicts, strict=True)}

    def append(self, batch: Sequence[tuple[str, Cursor, Event]]) -> list[AppendRefused | None]:
        """Writes log entries of any number of sessions in one round trip; for each the refusal, or None.

        NOMKSTREAM: a log that is gone is not begun anew by a late entry.
        """
        commands = []
        for session_id, cursor, event in batch:
            name, value = to_entry(event)
            commands.append(("XADD", _log(session_id), "NOMKSTREAM", str(cursor), name, value))
        with _translated():
            answers = self.connections.many(commands)
        results: list[AppendRefused | None] = []
        for answer in answers:
            if isinstance(answer, redis.RedisError):
                if _means_away(answer):
                    raise StoreUnavailable from answer
                results.append(AppendRefused(str(answer)))
            else:
                results.append(None if answer is not None else AppendRefused("the log is gone"))
        return results

    def last_id(self, session_id: str) -> Cursor | None:
        """The id of the log's last entry, or None where there is no log."""
        entries = self._call("XREVRANGE", _log(session_id), "+", "-", "COUNT", 1)
        return Cursor.parse(entries[0][0].decode()) if entries else None

    def read(self, positions: Mapping[str, Cursor | None]) -> dict[str, list[tuple[Cursor, Event]]]:
        """What the logs hold after the given ids (None: from the beginning), of many sessions in one round trip."""
        if not positions:
            return {}
        after = [str(cursor or "0-0") for cursor in positions.values()]
        answer = self._call("XREAD", "STREAMS", *map(_log, positions), *after) or []
        prefix = len(_log(""))
        found: dict[str, list[tuple[Cursor, Event]]] = {}
        for key, entries in answer:
            found[key.decode()[prefix:]] = [(_cursor(entry_id), _event(fields)) for entry_id, fields in entries]
        return found

    def exists(self, session_id: str) -> bool:
        """Whether the store knows the session."""
        return bool(self._call("EXISTS", _session(session_id)))

    def finish(self, session_id: str, epoch: int, seq: int, ending: Ending, answer: str, outcome: Outcome) -> Finish:
        """Ends the session with `ending` as event `<epoch>-<seq>`, and owes its callback. Idempotent.

        Epoch 0 ends a pending session whose deadline has passed.
        """
        name, value = to_entry(ending)
        result = self._run(
            "finish",
            [*_keys(session_id), _DEADLINES],
            [
                session_id,
                epoch,
                seq,
                state_of(ending).value,
                name,
                value,
                answer.encode(),
                _json(outcome),
                self._config.keep_seconds,
            ],
        )
        match result[0]:
            case b"ended":
                return Finished(_cursor(result[1]))
            case b"fenced":
                return Fenced()
            case b"short":
                return Short(Cursor.parse(result[1].decode()))
            case _:
                return Missing()

    def request(self, session_id: str) -> Request | None:
        """What a session asked for, or None where that is no longer kept."""
        raw = self._call("HGET", _content(session_id), "request")
        return _request.decode(raw) if raw else None

    def due(self, *, callbacks: int) -> list[tuple[str, State]]:
        """Sessions whose deadline has passed, each with the state that says what to do; at most so many with a callback due."""
        answer = self._run("due", [_DEADLINES, _TICK], [DUE, _ms(self._config.lease_seconds), _session(""), callbacks])
        items = [item.decode() for item in answer]
        return [(items[i], State(items[i + 1])) for i in range(0, len(items), 2)]

    def take_callback(self, session_id: str) -> Taken | None:
        """Takes a due callback for one attempt, or None where there is nothing to do now."""
        answer = self._run(
            "take_callback",
            [_session(session_id), _content(session_id), _DEADLINES],
            [session_id, VISIBILITY * 1000],
        )
        if answer is None:
            return None
        head, content = _pairs(answer[2]), _pairs(answer[3])
        session = Session(
            id=session_id,
            request=_request.decode(content["request"]),
            resume_url=content["resume_url"].decode(),
            answer=content.get("answer", b"").decode(),
            outcome=_outcome.decode(head["outcome"]),
            created_at=int(head["created_at"]),
            started_at=int(head["started_at"]) if "started_at" in head else None,
            ended_at=int(head["ended_at"]),
        )
        return Taken(session, int(answer[0]), answer[1] == b"1")

    def settle(
        self,
        session_id: str,
        attempt: int,
        outcome: Literal["delivered", "retry", "dead"],
        *,
        delay: float = 0,
        ambiguous: bool = False,
        last_answer: str = "",
    ) -> bool:
        """Records what came of an attempt; `delay` seconds until the next. False where the attempt is not the current one."""
        return bool(
            self._run(
                "settle",
                [*_keys(session_id), _DEADLINES, _DEAD],
                [
                    session_id,
                    attempt,
                    outcome,
                    _ms(delay),
                    int(ambiguous),
                    last_answer,
                    int(self._config.replay_seconds),
                    DEAD_LETTER,
                    TOMBSTONE,
                ],
            )
        )

    def keep_demo_callback(self, key: str, value: bytes) -> None:
        """Keeps what the demo page's own receiver got, for ten minutes."""
        self._call("SET", PREFIX + "demo:" + key, value, "EX", 600)

    def demo_callback(self, key: str) -> bytes | None:
        """What the demo page's receiver got under `key`, if anything."""
        value: bytes | None = self._call("GET", PREFIX + "demo:" + key)
        return value

    def close(self) -> None:
        """Closes the connections."""
        self.connections.close()

    def _run(self, name: str, keys: Sequence[str], args: Sequence[Any]) -> Any:
        script = self._scripts[name]
        with _translated():
            try:
                return self.connections.call("EVALSHA", script.sha, len(keys), *keys, *args)
            except redis.exceptions.NoScriptError:
                return self.connections.call("EVAL", script.text, len(keys), *keys, *args)

    def _call(self, *command: str | bytes | int | float) -> Any:
        with _translated():
            return self.connections.call(*command)


class _Script:
    __slots__ = ("sha", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


def _source(name: str) -> str:
    return files("aistream").joinpath("lua", f"{name}.lua").read_text()


def _session(session_id: str) -> str:
    return f"{PREFIX}session:{session_id}"


def _content(session_id: str) -> str:
    return f"{PREFIX}content:{session_id}"


def _log(session_id: str) -> str:
    return f"{PREFIX}log:{session_id}"


def _keys(session_id: str) -> list[str]:
    return [_session(session_id), _log(session_id), _content(session_id)]


_DEADLINES = PREFIX + "deadlines"
_DEAD = PREFIX + "dead"
_TICK = PREFIX + "tick"


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


def _cursor(entry_id: bytes) -> Cursor:
    epoch, _, seq = entry_id.partition(b"-")
    return Cursor(int(epoch), int(seq))


def _event(fields: Sequence[bytes]) -> Event:
    name, value = fields
    return from_entry(name, value)


def _pairs(flat: Sequence[bytes]) -> dict[str, bytes]:
    return {flat[i].decode(): flat[i + 1] for i in range(0, len(flat), 2)}


def _means_away(error: redis.RedisError) -> bool:
    return isinstance(error, _AWAY_ERRORS) or str(error).startswith(_AWAY_WORDS)


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except redis.RedisError as error:
        if _means_away(error):
            raise StoreUnavailable from error
        raise
