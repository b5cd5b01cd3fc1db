"""What the commands of this package have in common: a line of progress, the report at the end, and the exit code."""

import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

P = TypeVar("P")


class Report(Protocol):
    """What came of a run. `failures` has each finding with its story."""

    @property
    def failures(self) -> list[str]:
        """Empty: all is well."""

    @property
    def folder(self) -> Path:
        """Of the logs."""

    def text(self) -> str:
        """For a terminal."""

    def markdown(self) -> str:
        """For a page."""


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a table: what was counted, how often, in which parts. `zero`: it must not occur."""

    what: str
    count: int
    detail: str = ""
    zero: bool = False


def sayer(tell: Callable[[P], tuple[int, int, float, str]]) -> Callable[[P], None]:
    """A line that rewrites itself on a terminal; a line every ten seconds elsewhere. `tell`: done, of, seconds, and in words."""
    last = -10.0
    terminal = sys.stderr.isatty()

    def say(progress: P) -> None:
        nonlocal last
        done, of, seconds, text = tell(progress)
        if terminal:
            print(f"\r[{'#' * (30 * done // max(1, of)):30}] {text}      ", end="", file=sys.stderr, flush=True)
        elif seconds - last >= 10:
            last = seconds
            print(text, file=sys.stderr, flush=True)

    return say


def conduct(run: Callable[[], Report], *, markdown: Path | None, keep: Path | None) -> int:
    """Runs it, prints what came of it, and gives the exit code. Its folder stays if it is in `keep`, or if not all is well."""
    if keep:
        keep.mkdir(parents=True, exist_ok=True)
    try:
        report = run()
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except FileNotFoundError as error:
        sys.exit(str(error))
    if sys.stderr.isatty():
        print(file=sys.stderr)
    print(report.text())
    if markdown:
        markdown.write_text(report.markdown())
    if report.failures:
        print("\n" + "\n\n".join(report.failures[:20]))
        print(f"\n{len(report.failures)} findings: all are in {report.folder}/failures.txt, beside the logs")
        return 1
    if keep is None:
        shutil.rmtree(report.folder)
    return 0


def rows_text(facts: Mapping[str, str], rows: Sequence[Row]) -> list[str]:
    """The lines of a report for a terminal, aligned."""
    width = max(len(row.what) for row in rows)
    lines = [*(f"{name}: {value}" for name, value in facts.items()), ""]
    for row in rows:
        must = ("must be 0   " if row.zero else "") + row.detail
        lines.append(f"{row.what:{width}}  {row.count:6}   {must}".rstrip())
    return lines


def rows_markdown(rows: Sequence[Row]) -> list[str]:
    """The lines of its table for a page."""
    lines = ["", "| what | count | |", "|---|---:|---|"]
    for row in rows:
        what = f"**{row.what}**" if row.zero else row.what
        lines.append(f"| {what.strip()} | {row.count} | {'must be 0: ' if row.zero else ''}{row.detail} |")
    return lines


def listed(counts: Mapping[str, int]) -> str:
    """Names and counts, the largest first."""
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))
