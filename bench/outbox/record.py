"""What has happened: to each session at our end, to the workers, and what Redis holds in the end."""

import math
import time
from dataclasses import dataclass, field

from bench.outbox.n8n import N8n
from bench.outbox.plan import Options, Plan


@dataclass(slots=True, eq=False)
class Session:
    """One try to make a session: its plan, and what became of it at our end. `notes`: what happened when.

    A try whose answer was lost (its worker was killed) may have been accepted all the same: it has a path of its own, and its
    id is learned from Redis.
    """

    plan: Plan
    path: str
    id: str = ""
    target: str = ""
    accepted_at: float = math.inf
    stopped_as: str = ""
    notes: list[tuple[float, str]] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Remembers what happened, for its story."""
        self.notes.append((time.time(), text))


@dataclass(frozen=True, slots=True, eq=False)
class Kill:
    """One worker killed. `ports`: from which it had connections to the two n8ns.

    owed: what Redis held as owed when the worker was gone: session id -> number of its last attempt, and its deadline.
    """

    at: float
    pid: int
    ports: frozenset[int]
    owed: dict[str, tuple[int, float]]


@dataclass(slots=True)
class Watch:
    """What one live viewer saw of one stream. `opened_at`: when it was first answered (inf: never).

    `gaps`: seconds between two events of a connection; `first`: seconds from its coming to the first one.
    """

    plan: Plan
    text: str = ""
    outcome: str = ""
    opened_at: float = math.inf
    first: float = math.inf
    gaps: list[float] = field(default_factory=list)
    connects: int = 0


@dataclass(frozen=True, slots=True)
class Kept:
    """What Redis holds of a session in the end: state of its callback, number of attempts, resumeUrl's path."""

    callback: str
    attempt: int
    path: str


@dataclass(frozen=True, slots=True)
class Evidence:
    """Everything that was seen. `logged`: of each attempt in the service's log, session, number and outcome."""

    options: Options
    sessions: list[Session]
    failing: N8n
    healthy: N8n
    kills: list[Kill]
    watches: list[Watch]
    kept: dict[str, Kept]
    leftovers: list[str]
    logged: list[tuple[str, int, str]]
