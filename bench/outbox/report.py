"""The tables, and the story of each finding."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.command import Row, rows_markdown, rows_text
from bench.outbox.verdict import Finding, Seen, Table


@dataclass(frozen=True, slots=True)
class Report:
    """What came of a run. `failures` has each finding with the story of its session; empty: all is well."""

    rows: list[Row]
    tables: list[Table]
    failures: list[str]
    facts: dict[str, str]
    folder: Path

    def count(self, what: str) -> int:
        """The count of the row of this name; KeyError where there is none."""
        return {row.what.strip(): row.count for row in self.rows}[what]

    def text(self) -> str:
        """The tables, aligned."""
        lines = rows_text(self.facts, self.rows)
        for table in self.tables:
            lines += ["", table.title, *_aligned([table.head, *table.rows])]
        return "\n".join(lines)

    def markdown(self) -> str:
        """The tables as Markdown."""
        lines = ["# What becomes of the callbacks: a run against an n8n that fails", ""]
        lines += [f"- {name}: {value}" for name, value in self.facts.items()]
        lines += ["", "What is done, and the rule by which a callback may come twice: `bench/outbox/__init__.py`."]
        lines += rows_markdown(self.rows)
        for table in self.tables:
            lines += [
                "",
                f"## {table.title}",
                "",
                f"| {' | '.join(table.head)} |",
                "|---" + "|---:" * (len(table.head) - 1) + "|",
            ]
            lines += [f"| {' | '.join(row)} |" for row in table.rows]
        return "\n".join(lines) + "\n"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]


def story(finding: Finding, seen: Seen, began: float, log: Mapping[str, list[tuple[float, str]]]) -> str:
    """A finding with everything that happened to its session, and the kills meanwhile, in order of time."""
    session = finding.session
    if session is None:
        return f"{finding.rule}: {finding.text}"
    happened = [*session.notes, *log.get(session.id, [])]
    for one in seen.exchanges(session):
        what = f"N8N gets attempt {one.attempt} from port {one.port} while it is {one.phase}: {one.reaction.label}"
        happened.append((one.at, what + (", takes it" if one.took else "")))
        if one.over_at < float("inf"):
            happened.append((one.over_at, f"N8N is done with attempt {one.attempt}" + (", answered whole" if one.whole else "")))
    first, last = min((at for at, _ in happened), default=began), max((at for at, _ in happened), default=began)
    for kill in seen.evidence.kills:
        if first - 5 <= kill.at <= last + 2:
            ours = sorted({one.port for one in seen.exchanges(session)} & kill.ports)
            attempt, deadline = kill.owed.get(session.id, (0, 0.0))
            owed = f"owed at attempt {attempt}, next look {deadline - began:.3f}" if session.id in kill.owed else "not owed"
            happened.append((kill.at, f"KILL worker {kill.pid}, which had its ports {ours}; then in Redis: {owed}"))
    kept = seen.kept(session)
    lines = [f"{finding.rule}: {finding.text}"]
    lines.append(
        f"  session {session.id} ({session.plan.name}), {session.path}; in the end {kept.callback}, attempt {kept.attempt}"
    )
    lines += [f"  {at - began:9.3f}  {text}" for at, text in sorted(happened)]
    return "\n".join(lines)
