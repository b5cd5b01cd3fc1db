"""What a change costs: `python bench/hotpath.py --compare REV` shows each stage in REV and here, and the ratio.

REV is checked out into a worktree that is removed afterwards. Both trees run in this environment under the same load, in turn
(REV, here, REV, here, …), on the same cores: what else the machine does meets both. A figure is the median of the rounds, with
the lowest and the highest; only ratios of one run mean something. Without `--compare`: this tree alone. `bench.stages` says
how it is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.table import Table

from bench import stages
from bench.load.rig import Failed, Rig
from tests.service import ROOT

TOTAL = "all stages"
SETUP = "a session without its tokens"
TOKEN, SESSION = "µs of CPU per token", "ms of CPU per session of ten tokens"
#: What is less than this on all sides is not shown, and has too few samples for a ratio.
LITTLE = {TOKEN: 0.5, SESSION: 0.05}


@dataclass(frozen=True, slots=True)
class Side:
    """One tree, and what it cost: by TOKEN and SESSION, by stage, one figure for each round."""

    name: str
    root: Path
    costs: dict[str, dict[str, list[float]]]

    def add(self, measured: stages.Stages) -> None:
        """One more round."""
        token = {**measured.token_us, TOTAL: measured.total_us}
        session = {**measured.session_ms, TOTAL: sum(measured.session_ms.values()), SETUP: measured.setup_ms}
        for kind, costs in ((TOKEN, token), (SESSION, session)):
            for what, cost in costs.items():
                self.costs.setdefault(kind, {}).setdefault(what, []).append(cost)


@contextlib.contextmanager
def tree(rev: str) -> Iterator[Path]:
    """The files of a commit, in a folder that is removed afterwards. Raises LookupError where there is no such commit."""
    found = _git("rev-parse", "--verify", "--quiet", f"{rev}^{{commit}}")
    if found.returncode:
        raise LookupError(found.stderr.strip() or f"git knows no commit {rev}")
    with tempfile.TemporaryDirectory(prefix="aistream-hotpath-") as folder:
        path = Path(folder) / "tree"
        added = _git("worktree", "add", "--detach", str(path), found.stdout.strip())
        if added.returncode:
            raise LookupError(added.stderr.strip())
        try:
            yield path
        finally:
            _git("worktree", "remove", "--force", str(path))


def _git(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True)


def compare(sides: list[Side], rounds: int, quick: bool, say: Callable[[str], None]) -> None:
    """Measures the sides in turn. Raises Failed, and FileNotFoundError where a program is missing."""
    with Rig(quick=quick) as rig:
        for number in range(rounds):
            for side in sides:
                say(f"round {number + 1} of {rounds}: {side.name}")
                with rig.service(side.root) as server:
                    rig.warm_up(server, quick)
                    side.add(stages.measure(rig, server, quick=quick))


def table(kind: str, sides: list[Side]) -> Table:
    """For a terminal: the last side against the first."""
    told = Table(title=f"{kind}: median (lowest to highest) of the rounds")
    told.add_column("stage")
    for side in sides:
        told.add_column(side.name, justify="right")
    if len(sides) > 1:
        told.add_column("ratio", justify="right")
    for what in sides[0].costs[kind]:
        every = [side.costs[kind][what] for side in sides]
        medians = [statistics.median(costs) for costs in every]
        if what == TOTAL:
            told.add_section()
        elif max(medians) < LITTLE[kind]:
            continue
        ratio = f"{medians[-1] / medians[0]:.2f}" if medians[0] >= LITTLE[kind] else "-"
        told.add_row(what, *map(_told, every), *([ratio] if len(sides) > 1 else []))
    return told


def _told(costs: list[float]) -> str:
    digits = 1 if max(costs) >= 10 else 2
    return f"{statistics.median(costs):.{digits}f} ({min(costs):.{digits}f} to {max(costs):.{digits}f})"


def main(argv: list[str]) -> int:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(prog="bench/hotpath.py", description="What a change costs, by stage; see the module.")
    parser.add_argument("--compare", metavar="REV", help="a commit, branch or tag to compare with")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print all rounds as JSON")
    parser.add_argument("--quick", action="store_true", help="with a load that means nothing")
    given = parser.parse_args(argv)
    if given.rounds < 1:
        parser.error("--rounds: expected at least 1")
    here = Side("here", ROOT, {})
    try:
        with contextlib.ExitStack() as stack:
            sides = [here]
            if given.compare:
                sides.insert(0, Side(given.compare, stack.enter_context(tree(given.compare)), {}))
            compare(sides, given.rounds, given.quick, lambda text: print(text, file=sys.stderr, flush=True))
    except (LookupError, Failed, FileNotFoundError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        return 130
    if given.json:
        print(json.dumps({side.name: side.costs for side in sides}, indent=1))
    else:
        console = Console(width=None if sys.stdout.isatty() else 110)
        for kind in (TOKEN, SESSION):
            console.print(table(kind, sides))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
