"""The store's keys, and Redis as the store uses it: commands, and the transitions of `lua/` by name.

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
    aistream:{0}:pending:<sub>   zset    id of a subject's pending session -> its deadline; the key has a digest of the subject
    aistream:{0}:limit:<n>:<of>  string  inits that count against a quota, in the window that its time to live leaves
    aistream:{0}:tick            hash    when somebody last looked for due sessions; a random birth and a count of looks, which
                                         tell a Redis that lost its data; since when it is known to have lost nothing
    aistream:{0}:inbox:<worker>  list    ids of the worker's sessions that somebody has stopped

Transitions are Lua scripts in `lua/`, one file each; their headers give keys, arguments, result and why they are atomic.
Foreign exceptions end here: whatever means "Redis is away" is StoreUnavailable.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from typing import Any

import redis

from aistream import metrics
from aistream.connections import Command, Connections
from aistream.errors import StoreUnavailable
from aistream.session import Quota

PREFIX = "aistream:{0}:"
DEADLINES = PREFIX + "deadlines"
ORIGINS = PREFIX + "origins"
OWED = PREFIX + "owed"
DEAD = PREFIX + "dead"
PENDING = PREFIX + "pending:"
TICK = PREFIX + "tick"
INBOX = PREFIX + "inbox:"

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


_NAMES = (
    *("create", "claim", "renew", "restore", "finish", "cancel", "watched", "due"),
    *("take_callback", "hold", "settle", "redeliver"),
)


def session_key(session_id: str) -> str:
    """The hash of a session: state, epoch, worker, times, its callback."""
    return f"{PREFIX}session:{session_id}"


def content_key(session_id: str) -> str:
    """The hash of what is private: request, resumeUrl, answer."""
    return f"{PREFIX}content:{session_id}"


def log_key(session_id: str) -> str:
    """The stream of its events."""
    return f"{PREFIX}log:{session_id}"


def keys_of(session_id: str) -> list[str]:
    """All three, in the order in which the scripts take them."""
    return [session_key(session_id), log_key(session_id), content_key(session_id)]


def quota_key(quota: Quota) -> str:
    """The counter of the inits that count against a quota."""
    return f"{PREFIX}limit:{quota.name}:{quota.of}"


def queue_key(origin: str) -> str:
    """The zset of the callbacks that go to an origin, by the time of their next attempt."""
    return f"{ORIGINS}:{origin}"


def milliseconds(seconds: float) -> int:
    """As Redis counts time."""
    return round(seconds * 1000)


def pairs(flat: Sequence[bytes]) -> dict[str, bytes]:
    """A hash, which Redis gives as a flat list."""
    return {flat[i].decode(): flat[i + 1] for i in range(0, len(flat), 2)}


class Scripts:
    """Runs commands and scripts. Safe to use from many greenlets. Every method may raise StoreUnavailable."""

    def __init__(self, connections: Connections) -> None:
        self.connections = connections
        prelude = _source("prelude")
        self._scripts = {name: _Script(prelude + _source(name)) for name in _NAMES}

    def run(self, name: str, keys: Sequence[str], args: Sequence[Any]) -> Any:
        """The result of the script `lua/<name>.lua`."""
        script = self._scripts[name]
        with translated():
            try:
                return self.connections.call("EVALSHA", script.sha, len(keys), *keys, *args)
            except redis.exceptions.NoScriptError:
                return self.connections.call("EVAL", script.text, len(keys), *keys, *args)

    def call(self, *command: str | bytes | int | float) -> Any:
        """The reply to one command."""
        with translated():
            return self.connections.call(*command)

    def many(self, commands: Sequence[Command]) -> list[Any]:
        """The replies to several commands sent at once; raises what Redis says to the first that it refuses."""
        with translated():
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


def means_away(error: redis.RedisError) -> bool:
    """Whether what Redis says means that it cannot serve now."""
    return isinstance(error, _AWAY_ERRORS) or str(error).startswith(_AWAY_WORDS)


def away(error: redis.RedisError) -> StoreUnavailable:
    """What is raised in place of an error that means so. Counts it."""
    reason = "timeout" if isinstance(error, redis.TimeoutError) else "connection"
    metrics.store_failed("refused" if isinstance(error, redis.ResponseError) else reason)
    return StoreUnavailable()


@contextmanager
def translated() -> Iterator[None]:
    """Makes StoreUnavailable of whatever means away."""
    try:
        yield
    except redis.RedisError as error:
        if means_away(error):
            raise away(error) from error
        raise
