"""What has happened: what was done to processes, and what became of each stream at our end."""

import math
import time
from dataclasses import dataclass, field

from bench.chaos.plan import Plan
from bench.chaos.viewer import Viewer


@dataclass(slots=True)
class Trouble:
    """One thing that was done to a process: killed, stopped, away, emptied, drained. Times are `time.time()`.

    `ports`: of a killed worker or an emptied Redis, the provider connections that the worker, or every worker, had just before.
    `left`: which workers were there after Redis had come back empty.
    """

    what: str
    since: float
    until: float = math.inf
    pid: int | None = None
    ports: dict[int, frozenset[int]] = field(default_factory=dict)
    left: frozenset[int] = frozenset()

    def touches(self, since: float, until: float) -> bool:
        """Whether it lasted into that time."""
        return self.since <= until and self.until >= since

    def __str__(self) -> str:
        who = f"worker {self.pid}" if self.pid else "all workers" if self.what == "drained" else "Redis"
        return f"{who} {self.what}" + (f" for {self.until - self.since:.1f} s" if self.until > self.since else "")


@dataclass(slots=True)
class Session:
    """One stream of the run: its plan, and what became of it at our end. `notes`: what happened when."""

    plan: Plan
    id: str = ""
    target: str = ""
    path: str = ""
    model: str = ""
    accepted_at: float = math.inf
    accepted_by: int | None = None
    stop_answered: tuple[float, int] | None = None
    ended: bool = False
    undefined: list[str] = field(default_factory=list)
    refused: int = 0
    viewers: list[Viewer] = field(default_factory=list)
    notes: list[tuple[float, str]] = field(default_factory=list)

    @property
    def accepted(self) -> bool:
        """Whether its ending is owed."""
        return bool(self.id)

    @property
    def undefined_answers(self) -> list[str]:
        """Answers that must not be: to init and stop, and to its viewers."""
        return [*self.undefined, *(text for viewer in self.viewers for text in viewer.undefined)]

    def note(self, text: str) -> None:
        """Remembers what happened, for its story."""
        self.notes.append((time.time(), text))
