"""What `aistream doctor` looks at: a module for each subject, each a generator of findings.

Nothing is changed anywhere. What is asked of others costs nothing, and is waited for no longer than `reach.TIMEOUT`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from aistream.environment import Found

State = Literal["ok", "warning", "problem", "skipped"]


class Finding(NamedTuple):
    """One check: a line for what was found, and one for what mends it (`""` where nothing needs to be)."""

    check: str
    state: State
    found: str
    mend: str = ""


class Clock(NamedTuple):
    """How many seconds another's clock is ahead of ours; `whose`: for a person."""

    whose: str
    ahead: float


@dataclass
class Patient:
    """What is looked at. Checks note the clocks that they have met."""

    found: Found
    resume_url: str = ""
    clocks: list[Clock] = field(default_factory=list)

    def faulty(self, prefix: str) -> bool:
        """Whether a setting whose name begins so cannot be used, and is at its default therefore."""
        return any(fault.startswith(prefix) for fault in self.found.faults)


Check = Callable[[Patient], Iterator[Finding]]
