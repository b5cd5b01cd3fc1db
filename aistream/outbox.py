"""The callbacks that are owed, and those that were given up: taken for an attempt, settled, looked at, delivered again.

A callback is owed by the step that ends its session (`Store.finish`) and offered by the look at what is due (`Store.due`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, cast

import msgspec

from aistream.config import Config
from aistream.events import Start
from aistream.scripts import (
    DEAD,
    DEADLINES,
    ORIGINS,
    OWED,
    Scripts,
    content_key,
    keys_of,
    milliseconds,
    pairs,
    queue_key,
    session_key,
)
from aistream.session import Attempt, CallbackRecord, Counts, Outcome, Record, Request, Session, State

#: Callbacks looked at in one round trip, and how often for one page.
BATCH = 1000
ROUNDS = 10

_json = msgspec.json.Encoder().encode
_request = msgspec.json.Decoder(Request)
_outcome = msgspec.json.Decoder(Outcome)
_start = msgspec.json.Decoder(Start)
_attempt = msgspec.json.Decoder(Attempt)

#: What came of an attempt of a callback.
Word = Literal["delivered", "retry", "dead"]
#: What came of the wish to have a callback delivered again: see `lua/redeliver.lua`.
Redelivery = Literal["missing", "not_ended", "delivered", "gone", "trying", "owed"]


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


class Outbox:
    """The callbacks, in one Redis. Safe to use from many greenlets. Every method may raise StoreUnavailable."""

    def __init__(self, config: Config, scripts: Scripts) -> None:
        self._config = config
        self._scripts = scripts

    def take(self, session_id: str) -> Taken | None:
        """Takes a due callback for one attempt, for a lease, or None where there is nothing to do now."""
        answer = self._scripts.run(
            "take_callback",
            [session_key(session_id), content_key(session_id), ORIGINS],
            [session_id, milliseconds(self._config.lease_seconds)],
        )
        if answer is None:
            return None
        attempt, tries, ambiguous, running_for, age = answer[:5]
        head, content = pairs(answer[5]), pairs(answer[6])
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
        keys = [ORIGINS, *map(session_key, attempts)]
        args = [arg for session_id, attempt in attempts.items() for arg in (session_id, attempt)]
        self._scripts.run("hold", keys, [milliseconds(self._config.lease_seconds), *args])

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
            self._scripts.run(
                "settle",
                [*keys_of(session_id), ORIGINS, OWED, DEAD],
                [
                    session_id,
                    attempt,
                    outcome,
                    milliseconds(delay),
                    int(ambiguous),
                    last_answer,
                    int(self._config.replay_seconds),
                    int(self._config.dead_letter_seconds),
                    int(self._config.tombstone_seconds),
                    int(running),
                    "" if line is None else _json(line),
                ],
            )
        )

    def redeliver(self, session_id: str, subject: str | None = None) -> Redelivery:
        """Has a callback delivered again that is owed or dead. `subject`: only one that it owns; None: whoever owns it."""
        whose = ["any", ""] if subject is None else ["own", subject]
        answer = self._scripts.run(
            "redeliver",
            [*keys_of(session_id), ORIGINS, OWED, DEAD],
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
        key = OWED if state == "owed" else DEAD
        self._forget_old_letters()
        since, last_id = after or (0, "")
        found: list[Record] = []
        for _ in range(ROUNDS):
            members = self._scripts.call("ZRANGEBYSCORE", key, since, "+inf", "WITHSCORES", "LIMIT", 0, BATCH)
            listed = [(int(float(members[i + 1])), members[i].decode()) for i in range(0, len(members), 2)]
            new = [pair for pair in listed if pair > (since, last_id)]
            for (at, session_id), record in zip(new, self._records([session_id for _, session_id in new]), strict=True):
                since, last_id = at, session_id
                if record is None or record.callback is None:
                    self._scripts.call("ZREM", key, session_id)  # its session has run out
                elif record.callback.state == state and subject in (None, record.subject):
                    found.append(record)
                    if len(found) == limit:
                        return Page(found, (since, last_id))
            if len(listed) < BATCH:
                return Page(found, None)
        return Page(found, (since, last_id))

    def counts(self) -> Counts:
        """How many callbacks are owed and dead, and how many sessions open, of all subjects."""
        self._forget_old_letters()
        owed, oldest, clock, dead, standing = self._scripts.many(
            [("ZCARD", OWED), ("ZRANGE", OWED, 0, 0, "WITHSCORES"), ("TIME",), ("ZCARD", DEAD), ("ZCARD", DEADLINES)]
        )
        now = int(clock[0]) * 1000 + int(clock[1]) // 1000
        return Counts(owed, max(0.0, (now - float(oldest[1])) / 1000) if oldest else 0.0, dead, standing)

    def _forget_old_letters(self) -> None:
        clock = self._scripts.call("TIME")
        self._scripts.call("ZREMRANGEBYSCORE", DEAD, "-inf", f"({(int(clock[0]) - int(self._config.dead_letter_seconds)) * 1000}")

    def _records(self, session_ids: Sequence[str]) -> list[Record | None]:
        heads = [pairs(flat) for flat in self._scripts.many([("HGETALL", session_key(session_id)) for session_id in session_ids])]
        queues = [queue_key(head.get("origin", b"").decode()) for head in heads]
        due = self._scripts.many([("ZSCORE", queue, one) for queue, one in zip(queues, session_ids, strict=True)])
        return [_record(*one) if one[1] else None for one in zip(session_ids, heads, due, strict=True)]


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
