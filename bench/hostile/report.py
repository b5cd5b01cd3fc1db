"""The table of an attacked service."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.command import listed

#: Between these stands the table in docs/security.md.
BEGIN, END = "<!-- python -m bench.hostile -->", "<!-- until here -->"

_HEAD = [
    *("workers", "attack", "connections made, most at once", "answers", "ready p50 / max ms", "lag p50 / p99 ms"),
    *("init p50 / p99 ms", "not ready", "failed", "MiB", "descriptors"),
]


@dataclass(frozen=True, slots=True)
class Phase:
    """What came of honest load in one phase. `memory` (MiB) and `descriptors`: of the workers, while the attack went on.

    `not_ready`: readiness checks that failed; `failed`: honest streams, or their callbacks; `wrong`: with what. `left`:
    descriptors too many when the attack was over.
    """

    workers: int
    name: str
    opened: int
    held: int
    answers: Mapping[str, int]
    ready_ms: Mapping[str, float]
    not_ready: int
    lag_ms: Mapping[str, float]
    init_ms: Mapping[str, float]
    failed: int
    wrong: Sequence[str]
    memory: float
    descriptors: int
    left: int

    def cells(self) -> list[str]:
        """Its line of the table."""
        return [
            *(str(self.workers), self.name),
            f"{self.opened:,}, {self.held:,}" if self.opened else "",
            listed(self.answers),
            f"{self.ready_ms['p50']:.1f} / {self.ready_ms['max']:.0f}",
            f"{self.lag_ms['p50']:.1f} / {self.lag_ms['p99']:.1f}",
            f"{self.init_ms['p50']:.1f} / {self.init_ms['p99']:.0f}",
            *(str(self.not_ready), str(self.failed), f"{self.memory:.0f}", f"{self.descriptors:,}"),
        ]


@dataclass(frozen=True, slots=True)
class Report:
    """What came of a run."""

    phases: list[Phase]
    folder: Path
    seconds: float

    @property
    def failures(self) -> list[str]:
        """What must not be."""
        found = []
        for phase in self.phases:
            where = f"{phase.workers} workers, {phase.name}"
            if phase.not_ready or phase.failed:
                found.append(f"{where}: {phase.not_ready} times not ready, {phase.failed} streams failed: {list(phase.wrong)}")
            if phase.left:
                found.append(f"{where}: {phase.left} connections left when it was over")
            if "500" in phase.answers:
                found.append(f"{where}: {phase.answers['500']} answers of 500")
        return found

    def text(self) -> str:
        """The table, aligned."""
        table = [_HEAD, *(phase.cells() for phase in self.phases)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
        return "\n".join([*lines, "", f"{self.seconds:.0f} s"])

    def written_into(self, page: str) -> str:
        """The page with this table in the place of its own."""
        before, _, rest = page.partition(BEGIN)
        _, found, after = rest.partition(END)
        if not found:
            raise ValueError("the page has no place for the table")
        return f"{before}{BEGIN}\n\n{self.markdown()}\n{END}{after}"

    def markdown(self) -> str:
        """The table as Markdown."""
        lines = ["| " + " | ".join(_HEAD) + " |", "|---:|---|---|---|" + "---:|" * (len(_HEAD) - 4)]
        return "\n".join([*lines, *("| " + " | ".join(phase.cells()) + " |" for phase in self.phases)]) + "\n"
