"""Every Redis command of the service.

`{0}` is a hash tag: every script touches one slot, so that sharding by id over a cluster stays possible.

    key                          type    holds
    aistream:{0}:session:<id>    hash    state, epoch, worker, times, callback state and attempts; nothing private
    aistream:{0}:content:<id>    hash    request (with the prompt), resumeUrl, answer: gone when the replay is over
    aistream:{0}:log:<id>        stream  the events; entry id = SSE id = `<epoch>-<seq>`
    aistream:{0}:deadlines       zset    id of a pending or running session -> its one next deadline, ms by Redis's clock
    aistream:{0}:origins         zset    origin of resumeUrls -> since when a callback to it may be due
    aistream:{0}:origins:<o>     zset    id of an ended session -> when its next attempt is due; a queue for each origin
    aistream:{0}:owed            zset    owed callbacks by the time of the ending
    aistream:{0}:dead            zset    dead letters by time
    aistream:{0}:init:<digest>   hash    what an Idempotency-Key has begun: id of the session, digest of the body
    aistream:{0}:tick            hash    when somebody last looked for due sessions; a random birth and a count of looks, which
                                         tell a Redis that lost its data; since when it is known to have lost nothing
    aistream:{0}:inbox:<worker>  list    ids of the worker's sessions that somebody has stopped

Transitions are Lua scripts in `lua/`, one file each; their headers give keys, arguments, result and why they are atomic.
Foreign exceptions end here: whatever means "Redis is away" is StoreUnavailable.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import files
from typing import Any, Literal, NamedTuple, cast

import msgspec
import redis

from aistream.config import Config, origin_of
from aistream.connections import Command, Connections, connect
from aistream.errors import StoreUnavailable
from aistream.events import Cursor, Ending, Event, Start, from_entry, to_entry
from aistream.session import (
    CANCELLED,
    Accepted,
    Attempt,
    CallbackRecord,
    Claim,
    Claimed,
    Counts,
    Elsewhere,
    Ended,
    Fenced,
    Finish,
    Finished,
    IdempotencyKey,
    Missing,
    Outcome,
    Record,
    Request,
    Session,
    Short,
    State,
    state_of,
)

PREFIX = "aistream:{0}:"
#: Seconds that the mark of an ended session outlives its content.
TOMBSTONE = 86_400
#: Seconds a dead letter is kept for a person.
DEAD_LETTER = 7 * 86_400
#: Seconds before a store that was away is asked again.
AWAY = 0.25
#: Seconds in which every worker notices that the store may have lost writes: three looks.
NOTICED = 1.5
#: Most due sessions looked at in one go.
DUE = 1000
#: Times that many are looked through for one page of callbacks.
LISTED = 10
#: Seconds that a word to a worker waits for it. One that reads it later than this has lost its sessions anyway.
INBOX = 600

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

_SCRIPTS = (
    *("create", "claim", "renew", "restore", "finish", "cancel", "watched", "due"),
    *("take_callback", "hold", "settle", "redeliver"),
)

_json = msgspec.json.Encoder().encode
_request = msgspec.json.Decoder(Request)
_outcome = msgspec.json.Decoder(Outcome)
_start = msgspec.json.Decoder(Start)
_attempt = msgspec.json.Decoder(Attempt)

#: Of a session that a worker generates: it is its own; its own, but the log has lost entries; somebody else's, or over; lost.
Verdict = Literal["owner", "short", "fenced", "gone"]
_VERDICTS: dict[int, Verdict] = {1: "owner", 2: "short", 0: "fenced", -1: "gone"}
#: What came of an attempt of a callback.
Word = Literal["delivered", "retry", "dead"]
#: How a claim is meant: see `lua/claim.lua`.
Intent = Literal["open", "recover", "confirm"]
#: What came of the wish to have a callback delivered again: see `lua/redeliver.lua`.
Redelivery = Literal["missing", "not_ended", "delivered", "gone", "trying", "owed"]


class Places(NamedTuple):
    """How many callbacks there is a place for: in all, to one origin, and to those origins where it is another number."""

    total: int
    each: int
    left: Mapping[str, int]


#: None at all.
NO_PLACES = Places(0, 0, {})


class Due(NamedTuple):
    """A session whose deadline has passed: its state says what to do. `origin`: where its callback goes, if it has ended."""

    session_id: str
    state: State
    origin: str


class Look(NamedTuple):
    """What is due. `more`: callbacks that there was no place for; `lost`: the store may have lost writes since the last look."""

    due: list[Due]
    more: bool
    lost: bool


class Holding(NamedTuple):
    """What a worker holds of a session that it generates: its epoch, and how many log entries it knows to be stored."""

    epoch: int
    stored: int


class Nature(NamedTuple):
    """What kind of Redis it is: its version, what it does when it is full, and whether it keeps an append-only file."""

    version: str
    maxmemory_policy: str
    append_only: bool


class Taken(msgspec.Struct, frozen=True):
    """A callback taken for one attempt. `ambiguous`: an earlier attempt may have arrived.

    `tries`: attempts since somebody had it delivered again, with this one; `running_for`: seconds since n8n began to say that the
    execution is running; `age`: seconds since the session ended.
    """

    session: Session
    attempt: int
    ambiguous: bool
    tries: int
    running_for: float
    age: float


class Page(NamedTuple):
    """Some callbacks in order, and after which id and time (ms) the next page begins; None after the last."""

    callbacks: list[Record]
    after: tuple[int, str] | None


class AppendRefused(Exception):
    """Redis did not take an entry. A hint that the epoch is over, or an echo of an entry that arrived before: ask `renew`."""


class Store:
    """The sessions, in one Redis. Safe to use from many greenlets. Every method may raise StoreUnavailable."""

    def __init__(self, config: Config, *, connections: Connections | None = None, worker: str | None = None) -> None:
        """`worker` is this process's name in the store; by default a random one."""
        self.worker = worker or uuid.uuid4().hex
        self._config = config
        self._last_look: tuple[bytes, int, int] | None = None
        self.connections = connections or connect(config)
        prelude = _source("prelude")
        self._scripts = {name: _Script(prelude + _source(name)) for name in _SCRIPTS}

    def ping(self) -> None:
        """Returns when Redis answers."""
        self._call("PING")

    def nature(self) -> Nature | None:
        """What kind of Redis it is, or None where it does not say so (the embedded store, or an ACL without INFO)."""
        if self._config.embedded_store:
            return None
        try:
            said = dict(line.split(":", 1) for line in self._call("INFO").decode().splitlines() if ":" in line)
            return Nature(said["redis_version"], said["maxmemory_policy"], said["aof_enabled"] == "1")
        except (redis.ResponseError, KeyError):
            return None

    def create(
        self, session_id: str, subject: str, request: Request, resume_url: str, key: IdempotencyKey | None = None
    ) -> Accepted | None:
        """A new pending session. Idempotent by id, and by `key`: used again for the same body, it gives the session it began;
        for another, None.

        One that waits for no viewer is claimed by whoever accepted it; a lease later, by whoever is alive.
        """
        accepted = Accepted(session_id, subject, request, resume_url, created_at=0, deadline=0, key=key)
        found, created_at, deadline = self._create(accepted, "", "")
        return msgspec.structs.replace(accepted, id=found, created_at=created_at, deadline=deadline) if found else None

    def create_again(self, accepted: Accepted) -> None:
        """The session as it was accepted, where the store has lost it; nothing where it stands."""
        self._create(accepted, accepted.created_at, accepted.deadline)

    def _create(self, accepted: Accepted, created_at: int | str, deadline: int | str) -> tuple[str, int, int]:
        answer = self._run(
            "create",
            [_session(accepted.id), _content(accepted.id), _DEADLINES, _init(accepted)],
            [
                accepted.id,
                _ms(self._config.lease_seconds if accepted.request.immediate else self._config.session_ttl_seconds),
                self._config.keep_seconds,
                accepted.subject,
                to_entry(accepted.start)[1],
                _json(accepted.request),
                accepted.resume_url,
                _cancels(accepted),
                created_at,
                deadline,
                *_origin_and_key(accepted),
                _session(""),
            ],
        )
        return answer[0].decode(), int(answer[1]), int(answer[2])

    def claim(self, session_id: str, intent: Intent = "open", *, nonce: str | None = None) -> Claim | None:
        """Asks for the right to generate: of a pending session, or (`recover`) of a running one whose lease has lapsed.

        A claim whose answer was lost is asked again with its `nonce`; `confirm` asks only whether it had arrived, and gives None
        where the session is still pending.
        """
        answer = self._run(
            "claim",
            [*_keys(session_id), _DEADLINES, _TICK],
            [
                session_id,
                self.worker,
                nonce or uuid.uuid4().hex,
                _ms(self._config.lease_seconds),
                self._config.keep_seconds,
                intent,
            ],
        )
        match answer[0]:
            case b"claimed":
                return _claimed(session_id, answer)
            case b"running":
                return Elsewhere(answer[1].decode(), answer[2] == b"1")
            case b"ended":
                return Ended(State(answer[1].decode()), Cursor.parse((answer[2] or b"").decode()), answer[3] == b"1")
            case b"pending":
                return None
            case _:
                return self._missing(answer[1])

    def _missing(self, sure_for: int) -> Missing:
        return Missing(perhaps=sure_for < self._unsure or self._connection_lost())

    @property
    def _unsure(self) -> int:
        """For so many ms after it may have lost something the store may yet be told of a session again: two leases and a bit.

        What the embedded store has lost went with the one process that could tell it.
        """
        return 0 if self._config.embedded_store else 2 * _ms(self._config.lease_seconds + NOTICED)

    def renew(self, held: Mapping[str, Holding]) -> dict[str, Verdict]:
        """Renews the leases of the sessions this worker generates, and says whose each still is."""
        if not held:
            return {}
        keys = [key for session_id in held for key in (_session(session_id), _log(session_id))]
        args = [arg for session_id, one in held.items() for arg in (session_id, one.epoch, one.stored)]
        verdicts = self._run("renew", [_DEADLINES, *keys], [self.worker, _ms(self._config.lease_seconds), *args])
        return {session_id: _VERDICTS[verdict] for session_id, verdict in zip(held, verdicts, strict=True)}

    def restore(self, claimed: Claimed, log: Sequence[tuple[Cursor, Event]]) -> bool:
        """Writes a running session anew with this log. False where it is somebody else's by now, or over."""
        accepted = claimed.accepted
        entries = [part for cursor, event in log for part in (str(cursor), *to_entry(event))]
        return bool(
            self._run(
                "restore",
                [*_keys(accepted.id), _DEADLINES, _init(accepted)],
                [
                    accepted.id,
                    self.worker,
                    claimed.epoch,
                    _ms(self._config.lease_seconds),
                    self._config.keep_seconds,
                    accepted.subject,
                    to_entry(accepted.start)[1],
                    _json(accepted.request),
                    accepted.resume_url,
                    accepted.created_at,
                    accepted.deadline,
                    claimed.started_at,
                    _cancels(accepted),
                    *_origin_and_key(accepted),
                    *entries,
                ],
            )
        )

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

    def forgotten(self, session_ids: Sequence[str]) -> set[str]:
        """Those that the store does not know, and will not be told of again: it has lost nothing for two leases."""
        tick, clock, *known = self._many(
            [("HGET", _TICK, "unsure_at"), ("TIME",), *(("EXISTS", _session(session_id)) for session_id in session_ids)]
        )
        sure_for = int(clock[0]) * 1000 + int(clock[1]) // 1000 - int(tick) if tick else 0
        if sure_for < self._unsure or self._connection_lost():
            return set()
        return {session_id for session_id, exists in zip(session_ids, known, strict=True) if not exists}

    def standing(self, session_ids: Sequence[str]) -> dict[str, tuple[State, str]]:
        """State and state of the callback (`""` before the ending) of those that the store knows."""
        answers = self._many([("HMGET", _session(session_id), "state", "callback") for session_id in session_ids])
        return {
            session_id: (State(state.decode()), (callback or b"").decode())
            for session_id, (state, callback) in zip(session_ids, answers, strict=True)
            if state
        }

    def finish(
        self,
        session_id: str,
        epoch: int,
        before: int,
        seq: int,
        ending: Ending,
        answer: str,
        outcome: Outcome,
        *,
        callback_in: float = 0,
    ) -> Finish:
        """Ends the session with `ending` as event `<epoch>-<seq>`, and owes its callback. Idempotent.

        `before`: how many entries the log must have. Epoch 0 ends a pending session whose deadline has passed. One that somebody
        has stopped is recorded as cancelled. The callback is due in `callback_in` seconds.
        """
        result = self._run(
            "finish",
            [*_keys(session_id), _DEADLINES, _ORIGINS, _OWED],
            [
                session_id,
                epoch,
                seq,
                before,
                answer.encode(),
                self._config.keep_seconds,
                _ms(callback_in),
                *_ending(ending, outcome),
                *_ending(CANCELLED, msgspec.structs.replace(outcome, ending=CANCELLED)),
            ],
        )
        match result[0]:
            case b"ended":
                return Finished(_cursor(result[1]), State(result[2].decode()))
            case b"fenced":
                return Fenced()
            case b"short":
                return Short()
            case _:
                return Missing()

    def cancel(self, session_id: str) -> State | Missing:
        """Stops the session: whoever ends it now ends it as cancelled, and its owner is told. Gives the state it was found in.

        A pending one is due at once.
        """
        answer = self._run("cancel", [_session(session_id), _DEADLINES, _TICK], [session_id, _INBOX, INBOX])
        match answer[0]:
            case b"missing":
                return self._missing(answer[1])
            case b"ended":
                return State(answer[1].decode())
            case found:
                return State(found.decode())

    def stopped(self) -> list[str]:
        """The ids of this worker's sessions that somebody has stopped since it last asked."""
        return [session_id.decode() for session_id in self._call("LPOP", _INBOX + self.worker, DUE) or []]

    def watched(self, here: set[str], others: set[str]) -> dict[str, float | None]:
        """Notes that sessions have viewers `here`; gives the seconds that each of `others` has had none on any worker.

        None: it never had one.
        """
        ids = [*here, *others]
        ages = self._run("watched", [*map(_session, ids)], ["1"] * len(here) + ["0"] * len(others))
        return {session_id: None if age < 0 else age / 1000 for session_id, age in list(zip(ids, ages, strict=True))[len(here) :]}

    def pending(self, session_id: str) -> Accepted | None:
        """What an init stored, or None where that is no longer kept."""
        head, content = self._many([("HGETALL", _session(session_id)), ("HGETALL", _content(session_id))])
        return _accepted(session_id, _pairs(head), _pairs(content)) if head and content else None

    def due(self, places: Places) -> Look:
        """Sessions whose deadline has passed, and callbacks that are due as far as there are places for them."""
        seen = self._last_look
        word = uuid.uuid4().hex.encode()
        while True:
            lost = self.connections.lost
            args = [DUE, _ms(self._config.lease_seconds), _session(""), word, int(self._connection_lost()), _ms(NOTICED)]
            args += [places.total, places.each, *(part for pair in places.left.items() for part in pair)]
            birth, number, more, answer = self._run("due", [_DEADLINES, _TICK, _ORIGINS, _OWED], args)
            if lost == self.connections.lost:
                break  # else a connection broke unheard, and what answered may be another Redis: it is told so
        # A store that is new to a worker's first look may have been emptied since the worker began to use it.
        went_back = birth == word if seen is None else birth != seen[0] or number <= seen[1]
        went_back = went_back or self._connection_lost()
        self._last_look = (birth, number, lost)
        items = [item.decode() for item in answer]
        due = [Due(items[i], State(items[i + 1]), items[i + 2]) for i in range(0, len(items), 3)]
        return Look(due, more == b"1", went_back)

    def _connection_lost(self) -> bool:
        """Whether a connection has broken since the last look: behind it may be another Redis now, without the last writes."""
        return self.connections.lost != (self._last_look[2] if self._last_look else 0)

    def take_callback(self, session_id: str) -> Taken | None:
        """Takes a due callback for one attempt, for a lease, or None where there is nothing to do now."""
        answer = self._run(
            "take_callback",
            [_session(session_id), _content(session_id), _ORIGINS],
            [session_id, _ms(self._config.lease_seconds)],
        )
        if answer is None:
            return None
        attempt, tries, ambiguous, running_for, age = answer[:5]
        head, content = _pairs(answer[5]), _pairs(answer[6])
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
        return Taken(session, attempt, ambiguous == b"1", tries, running_for / 1000, age / 1000)

    def hold(self, attempts: Mapping[str, int]) -> None:
        """Renews the leases of attempts (session id -> number) that this worker is making."""
        keys = [_ORIGINS, *map(_session, attempts)]
        args = [arg for session_id, attempt in attempts.items() for arg in (session_id, attempt)]
        self._run("hold", keys, [_ms(self._config.lease_seconds), *args])

    def settle(
        self,
        session_id: str,
        attempt: int,
        outcome: Word,
        *,
        delay: float = 0,
        ambiguous: bool = False,
        running: bool = False,
        last_answer: str = "",
        line: Attempt | None = None,
    ) -> bool:
        """Records what came of an attempt; `delay` seconds until the next. False where the attempt is not the current one.

        `running`: n8n said that the execution is; `line`: what the history says of the attempt.
        """
        return bool(
            self._run(
                "settle",
                [*_keys(session_id), _ORIGINS, _OWED, _DEAD],
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
                    int(running),
                    "" if line is None else _json(line),
                ],
            )
        )

    def redeliver(self, session_id: str, subject: str | None = None) -> Redelivery:
        """Has a callback delivered again that is owed or dead. `subject`: only one that it owns; None: whoever owns it."""
        whose = ["any", ""] if subject is None else ["own", subject]
        answer = self._run(
            "redeliver",
            [*_keys(session_id), _ORIGINS, _OWED, _DEAD],
            [session_id, *whose, self._config.keep_seconds],
        )
        return cast(Redelivery, answer.decode())

    def record(self, session_id: str) -> Record | None:
        """What is kept of a session, its texts aside; None where it is not known (any more)."""
        return self._records([session_id])[0]

    def callbacks(
        self,
        state: Literal["owed", "dead"],
        subject: str | None = None,
        after: tuple[int, str] | None = None,
        limit: int = 100,
    ) -> Page:
        """Callbacks that are owed or dead, those that have been so for longest first. `subject`: only those that it owns.

        A page may have fewer than `limit`, or none, and yet not be the last: where most belong to others.
        """
        key = _OWED if state == "owed" else _DEAD
        self._forget_old_letters()
        since, last_id = after or (0, "")
        found: list[Record] = []
        for _ in range(LISTED):
            members = self._call("ZRANGEBYSCORE", key, since, "+inf", "WITHSCORES", "LIMIT", 0, DUE)
            pairs = [(int(float(members[i + 1])), members[i].decode()) for i in range(0, len(members), 2)]
            new = [pair for pair in pairs if pair > (since, last_id)]
            for (at, session_id), record in zip(new, self._records([session_id for _, session_id in new]), strict=True):
                since, last_id = at, session_id
                if record is None or record.callback is None:
                    self._call("ZREM", key, session_id)  # its session has run out
                elif record.callback.state == state and subject in (None, record.subject):
                    found.append(record)
                    if len(found) == limit:
                        return Page(found, (since, last_id))
            if len(pairs) < DUE:
                return Page(found, None)
        return Page(found, (since, last_id))

    def counts(self) -> Counts:
        """How many callbacks are owed and dead, of all subjects."""
        self._forget_old_letters()
        owed, oldest, clock, dead = self._many(
            [("ZCARD", _OWED), ("ZRANGE", _OWED, 0, 0, "WITHSCORES"), ("TIME",), ("ZCARD", _DEAD)]
        )
        now = int(clock[0]) * 1000 + int(clock[1]) // 1000
        return Counts(owed, max(0.0, (now - float(oldest[1])) / 1000) if oldest else 0.0, dead)

    def _forget_old_letters(self) -> None:
        clock = self._call("TIME")
        self._call("ZREMRANGEBYSCORE", _DEAD, "-inf", f"({(int(clock[0]) - DEAD_LETTER) * 1000}")

    def _records(self, session_ids: Sequence[str]) -> list[Record | None]:
        heads = [_pairs(flat) for flat in self._many([("HGETALL", _session(session_id)) for session_id in session_ids])]
        queues = [("ZSCORE", _queue(head.get("origin", b"").decode()), one) for one, head in zip(session_ids, heads, strict=True)]
        due = self._many(queues)
        return [_record(*one) if one[1] else None for one in zip(session_ids, heads, due, strict=True)]

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

    def _many(self, commands: Sequence[Command]) -> list[Any]:
        with _translated():
            replies = self.connections.many(commands)
            for reply in replies:
                if isinstance(reply, redis.RedisError):
                    raise reply
            return replies


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
_ORIGINS = PREFIX + "origins"
_OWED = PREFIX + "owed"
_DEAD = PREFIX + "dead"
_TICK = PREFIX + "tick"
_INBOX = PREFIX + "inbox:"


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


def _queue(origin: str) -> str:
    return f"{_ORIGINS}:{origin}"


def _init(accepted: Accepted) -> str:
    return f"{PREFIX}init:{accepted.key.name}" if accepted.key else _session(accepted.id)


def _origin_and_key(accepted: Accepted) -> tuple[str, str, str]:
    key = accepted.key
    return (origin_of(accepted.resume_url), key.name if key else "", key.body if key else "")


def _cancels(accepted: Accepted) -> str:
    return "" if accepted.request.disconnect_grace is None else "1"


def _ending(ending: Ending, outcome: Outcome) -> tuple[str, bytes, bytes, bytes]:
    return (state_of(ending).value, *to_entry(ending), _json(outcome))


def _claimed(session_id: str, answer: Sequence[Any]) -> Claimed:
    _, epoch, may_run, cancelled, started_at, head, content = answer
    accepted = _accepted(session_id, _pairs(head), _pairs(content))
    return Claimed(accepted, int(epoch), int(started_at), may_run == b"1", cancelled == b"1")


def _accepted(session_id: str, head: Mapping[str, bytes], content: Mapping[str, bytes]) -> Accepted:
    return Accepted(
        id=session_id,
        subject=head["subject"].decode(),
        request=_request.decode(content["request"]),
        resume_url=content["resume_url"].decode(),
        created_at=int(head["created_at"]),
        deadline=int(head["deadline"]),
        key=IdempotencyKey(head["init_key"].decode(), head["init_body"].decode()) if head["init_key"] else None,
    )


def _record(session_id: str, head: Mapping[str, bytes], due: bytes | None) -> Record:
    def number(name: str) -> int | None:
        return int(head[name]) if name in head else None

    callback = None
    if "callback" in head:
        callback = CallbackRecord(
            state=head["callback"].decode(),
            attempt=int(head["attempt"]),
            origin=head["origin"].decode(),
            open=head.get("open") == b"1",
            next_at=None if due is None else int(float(due)),
            settled_at=number("settled_at"),
            last_answer=head.get("last_answer", b"").decode(),
            history=[_attempt.decode(line) for line in head.get("history", b"").splitlines()],
        )
    return Record(
        id=session_id,
        subject=head["subject"].decode(),
        state=State(head["state"].decode()),
        start=_start.decode(head["start"]),
        created_at=int(head["created_at"]),
        started_at=number("started_at"),
        ended_at=number("ended_at"),
        outcome=_outcome.decode(head["outcome"]) if "outcome" in head else None,
        callback=callback,
    )


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
