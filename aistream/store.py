"""Sessions and their logs in Redis, from init to the ending. Their callbacks are in `outbox`, the keys in `scripts`."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import msgspec
import redis

from aistream.config import Config
from aistream.connections import Connections, connect
from aistream.errors import Limited, Overloaded
from aistream.events import Cursor, Ending, Event, from_entry, to_entry
from aistream.outbox import Outbox
from aistream.parse import origin_of
from aistream.scripts import (
    DEADLINES,
    INBOX,
    ORIGINS,
    OWED,
    PENDING,
    PREFIX,
    TICK,
    Scripts,
    away,
    content_key,
    keys_of,
    log_key,
    means_away,
    milliseconds,
    pairs,
    quota_key,
    session_key,
    translated,
)
from aistream.session import (
    CANCELLED,
    Accepted,
    Claim,
    Claimed,
    Elsewhere,
    Ended,
    Fenced,
    Finish,
    Finished,
    IdempotencyKey,
    Left,
    Missing,
    Outcome,
    Quota,
    Quotas,
    Request,
    Short,
    State,
    state_of,
)

#: Seconds before a store that was away is asked again.
AWAY = 0.25
#: Seconds in which every worker notices that the store may have lost writes: three looks.
NOTICED = 1.5
#: Most due sessions looked at in one go.
DUE = 1000
#: Seconds that a word to a worker waits for it. One that reads it later than this has lost its sessions anyway.
INBOX_SECONDS = 600

_json = msgspec.json.Encoder().encode
_request = msgspec.json.Decoder(Request)

#: Of a session that a worker generates: it is its own; its own, but the log has lost entries; somebody else's, or over; lost.
Verdict = Literal["owner", "short", "fenced", "gone"]
_VERDICTS: dict[int, Verdict] = {1: "owner", 2: "short", 0: "fenced", -1: "gone"}
#: How a claim is meant: see `lua/claim.lua`.
Intent = Literal["open", "recover", "confirm"]


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
        self._scripts = Scripts(self.connections)
        self.outbox = Outbox(config, self._scripts)

    def ping(self) -> None:
        """Returns when Redis answers."""
        self._scripts.call("PING")

    def nature(self) -> Nature | None:
        """What kind of Redis it is, or None where it does not say so (the embedded store, or an ACL without INFO)."""
        if self._config.embedded_store:
            return None
        try:
            said = dict(line.split(":", 1) for line in self._scripts.call("INFO").decode().splitlines() if ":" in line)
            return Nature(said["redis_version"], said["maxmemory_policy"], said["aof_enabled"] == "1")
        except (redis.ResponseError, KeyError):
            return None

    def create(
        self,
        session_id: str,
        subject: str,
        request: Request,
        resume_url: str,
        key: IdempotencyKey | None = None,
        quotas: Quotas | None = None,
        *,
        room: bool = True,
    ) -> Accepted | None:
        """A new pending session. Idempotent by id, and by `key`: used again for the same body, it gives the session it began;
        for another, None.

        One that waits for no viewer is claimed by whoever accepted it; a lease later, by whoever is alive. A new one counts
        against `quotas`, which are told what is left; Limited where one is used up, or the subject has too many pending, and
        Overloaded where there is no `room` for a new one.
        """
        accepted = Accepted(session_id, subject, request, resume_url, created_at=0, deadline=0, key=key)
        found, created_at, deadline = self._create(accepted, "", "", quotas or Quotas(), room=room)
        return msgspec.structs.replace(accepted, id=found, created_at=created_at, deadline=deadline) if found else None

    def create_again(self, accepted: Accepted) -> None:
        """The session as it was accepted, where the store has lost it; nothing where it stands. It has been counted."""
        self._create(accepted, accepted.created_at, accepted.deadline, Quotas())

    def _create(
        self, accepted: Accepted, created_at: int | str, deadline: int | str, quotas: Quotas, *, room: bool = True
    ) -> tuple[str, int, int]:
        waits_in = hashlib.sha256(accepted.subject.encode()).hexdigest()[:32]
        first, second, third, left = self._scripts.run(
            "create",
            [
                *(session_key(accepted.id), content_key(accepted.id), DEADLINES, _init(accepted)),
                *(PENDING + waits_in, *map(quota_key, quotas.of)),
            ],
            [
                accepted.id,
                milliseconds(self._config.lease_seconds if accepted.request.immediate else self._config.session_ttl_seconds),
                self._config.keep_seconds,
                accepted.subject,
                to_entry(accepted.start)[1],
                _json(accepted.request),
                accepted.resume_url,
                _cancels(accepted),
                created_at,
                deadline,
                *_origin_and_key(accepted),
                session_key(""),
                waits_in,
                self._config.max_pending_sessions,
                "1" if room else "",
                *(part for quota in quotas.of for part in (quota.amount, milliseconds(quota.seconds))),
            ],
        )
        quotas.left = [Left(left[i], left[i + 1] / 1000) for i in range(0, len(left), 2)]
        if first == b"full":
            raise Overloaded
        if first == b"limited":
            raise _limited(quotas.of[second - 1] if second else None, third / 1000, self._config.max_pending_sessions)
        return first.decode(), int(second), int(third)

    def claim(self, session_id: str, intent: Intent = "open", *, nonce: str | None = None) -> Claim | None:
        """Asks for the right to generate: of a pending session, or (`recover`) of a running one whose lease has lapsed.

        A claim whose answer was lost is asked again with its `nonce`; `confirm` asks only whether it had arrived, and gives None
        where the session is still pending.
        """
        answer = self._scripts.run(
            "claim",
            [*keys_of(session_id), DEADLINES, TICK],
            [
                session_id,
                self.worker,
                nonce or uuid.uuid4().hex,
                milliseconds(self._config.lease_seconds),
                self._config.keep_seconds,
                intent,
                PENDING,
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
        return 0 if self._config.embedded_store else 2 * milliseconds(self._config.lease_seconds + NOTICED)

    def renew(self, held: Mapping[str, Holding]) -> dict[str, Verdict]:
        """Renews the leases of the sessions this worker generates, and says whose each still is."""
        if not held:
            return {}
        keys = [key for session_id in held for key in (session_key(session_id), log_key(session_id))]
        args = [arg for session_id, one in held.items() for arg in (session_id, one.epoch, one.stored)]
        verdicts = self._scripts.run("renew", [DEADLINES, *keys], [self.worker, milliseconds(self._config.lease_seconds), *args])
        return {session_id: _VERDICTS[verdict] for session_id, verdict in zip(held, verdicts, strict=True)}

    def restore(self, claimed: Claimed, log: Sequence[tuple[Cursor, Event]]) -> bool:
        """Writes a running session anew with this log. False where it is somebody else's by now, or over."""
        accepted = claimed.accepted
        entries = [part for cursor, event in log for part in (str(cursor), *to_entry(event))]
        return bool(
            self._scripts.run(
                "restore",
                [*keys_of(accepted.id), DEADLINES, _init(accepted)],
                [
                    accepted.id,
                    self.worker,
                    claimed.epoch,
                    milliseconds(self._config.lease_seconds),
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
        packed = b"".join([_packed_entry(*one) for one in batch])
        with translated():
            replies = self.connections.exchange(packed, len(batch), "append")
        results: list[AppendRefused | None] = []
        for reply in replies:
            if type(reply) is bytes:
                results.append(None)
            elif isinstance(reply, redis.RedisError):
                if means_away(reply):
                    raise away(reply) from reply
                results.append(AppendRefused(str(reply)))
            else:
                results.append(AppendRefused("the log is gone"))
        return results

    def last_id(self, session_id: str) -> Cursor | None:
        """The id of the log's last entry, or None where there is no log."""
        entries = self._scripts.call("XREVRANGE", log_key(session_id), "+", "-", "COUNT", 1)
        return Cursor.parse(entries[0][0].decode()) if entries else None

    def read(self, positions: Mapping[str, Cursor | None]) -> dict[str, list[tuple[Cursor, Event]]]:
        """What the logs hold after the given ids (None: from the beginning), of many sessions in one round trip."""
        if not positions:
            return {}
        after = [str(cursor or "0-0") for cursor in positions.values()]
        answer = self._scripts.call("XREAD", "STREAMS", *map(log_key, positions), *after) or []
        prefix = len(log_key(""))
        found: dict[str, list[tuple[Cursor, Event]]] = {}
        for key, entries in answer:
            found[key.decode()[prefix:]] = [(_cursor(entry_id), _event(fields)) for entry_id, fields in entries]
        return found

    def forgotten(self, session_ids: Sequence[str]) -> set[str]:
        """Those that the store does not know, and will not be told of again: it has lost nothing for two leases."""
        tick, clock, *known = self._scripts.many(
            [("HGET", TICK, "unsure_at"), ("TIME",), *(("EXISTS", session_key(session_id)) for session_id in session_ids)]
        )
        sure_for = int(clock[0]) * 1000 + int(clock[1]) // 1000 - int(tick) if tick else 0
        if sure_for < self._unsure or self._connection_lost():
            return set()
        return {session_id for session_id, exists in zip(session_ids, known, strict=True) if not exists}

    def standing(self, session_ids: Sequence[str]) -> dict[str, tuple[State, str]]:
        """State and state of the callback (`""` before the ending) of those that the store knows."""
        answers = self._scripts.many([("HMGET", session_key(session_id), "state", "callback") for session_id in session_ids])
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
        result = self._scripts.run(
            "finish",
            [*keys_of(session_id), DEADLINES, ORIGINS, OWED],
            [
                session_id,
                epoch,
                seq,
                before,
                answer.encode(),
                self._config.keep_seconds,
                milliseconds(callback_in),
                *_ending(ending, outcome),
                *_ending(CANCELLED, msgspec.structs.replace(outcome, ending=CANCELLED)),
                PENDING,
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
        answer = self._scripts.run("cancel", [session_key(session_id), DEADLINES, TICK], [session_id, INBOX, INBOX_SECONDS])
        match answer[0]:
            case b"missing":
                return self._missing(answer[1])
            case b"ended":
                return State(answer[1].decode())
            case found:
                return State(found.decode())

    def stopped(self) -> list[str]:
        """The ids of this worker's sessions that somebody has stopped since it last asked."""
        return [session_id.decode() for session_id in self._scripts.call("LPOP", INBOX + self.worker, DUE) or []]

    def watched(self, here: set[str], others: set[str]) -> dict[str, float | None]:
        """Notes that sessions have viewers `here`; gives the seconds that each of `others` has had none on any worker.

        None: it never had one.
        """
        ids = [*here, *others]
        ages = self._scripts.run("watched", [*map(session_key, ids)], ["1"] * len(here) + ["0"] * len(others))
        return {session_id: None if age < 0 else age / 1000 for session_id, age in list(zip(ids, ages, strict=True))[len(here) :]}

    def pending(self, session_id: str) -> Accepted | None:
        """What an init stored, or None where that is no longer kept."""
        head, content = self._scripts.many([("HGETALL", session_key(session_id)), ("HGETALL", content_key(session_id))])
        return _accepted(session_id, pairs(head), pairs(content)) if head and content else None

    def due(self, places: Places) -> Look:
        """Sessions whose deadline has passed, and callbacks that are due as far as there are places for them."""
        seen = self._last_look
        word = uuid.uuid4().hex.encode()
        while True:
            lost = self.connections.lost
            args: list[Any] = [DUE, milliseconds(self._config.lease_seconds), session_key(""), word]
            args += [int(self._connection_lost()), milliseconds(NOTICED), places.total, places.each]
            args += [part for pair in places.left.items() for part in pair]
            birth, number, more, answer = self._scripts.run("due", [DEADLINES, TICK, ORIGINS, OWED], args)
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

    def keep_demo_callback(self, key: str, value: bytes) -> None:
        """Keeps what the demo page's own receiver got, for ten minutes."""
        self._scripts.call("SET", PREFIX + "demo:" + key, value, "EX", 600)

    def demo_callback(self, key: str) -> bytes | None:
        """What the demo page's receiver got under `key`, if anything."""
        value: bytes | None = self._scripts.call("GET", PREFIX + "demo:" + key)
        return value

    def close(self) -> None:
        """Closes the connections."""
        self.connections.close()


def _limited(quota: Quota | None, wait: float, pending: int) -> Limited:
    if quota is None:
        detail = f"{pending} sessions of this caller wait for their first viewer, and no more may (MAX_PENDING_SESSIONS)."
        return Limited(detail, limit="pending", retry_after=wait, code="too_many_pending")
    detail = f"The limit of {quota.amount} inits within {quota.seconds} s is used up ({quota.name.upper()}_RATE_LIMIT)."
    return Limited(detail, limit=quota.name, retry_after=wait)


def _init(accepted: Accepted) -> str:
    return f"{PREFIX}init:{accepted.key.name}" if accepted.key else session_key(accepted.id)


def _origin_and_key(accepted: Accepted) -> tuple[str, str, str]:
    key = accepted.key
    return (origin_of(accepted.resume_url), key.name if key else "", key.body if key else "")


def _cancels(accepted: Accepted) -> str:
    return "" if accepted.request.disconnect_grace is None else "1"


def _ending(ending: Ending, outcome: Outcome) -> tuple[str, bytes, bytes, bytes]:
    return (state_of(ending).value, *to_entry(ending), _json(outcome))


def _claimed(session_id: str, answer: Sequence[Any]) -> Claimed:
    _, epoch, may_run, cancelled, started_at, head, content = answer
    accepted = _accepted(session_id, pairs(head), pairs(content))
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


def _packed_entry(session_id: str, cursor: Cursor, event: Event) -> bytes:
    """The command that appends an event to its log, as RESP has it: by hand for a tenth of what a packer of any command costs."""
    key, entry_id = log_key(session_id).encode(), b"%d-%d" % cursor
    name, value = to_entry(event)
    return b"*6\r\n$4\r\nXADD\r\n$%d\r\n%b\r\n$10\r\nNOMKSTREAM\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n" % (
        *(len(key), key, len(entry_id), entry_id),
        *(len(name), name, len(value), value),
    )


def _cursor(entry_id: bytes) -> Cursor:
    epoch, _, seq = entry_id.partition(b"-")
    return Cursor(int(epoch), int(seq))


def _event(fields: Sequence[bytes]) -> Event:
    name, value = fields
    return from_entry(name, value)
