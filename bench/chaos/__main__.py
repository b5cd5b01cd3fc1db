"""The command: `python -m bench.chaos`."""

import argparse
import sys
from pathlib import Path

from bench.chaos.experiment import run
from bench.chaos.plan import FAULTS, KINDS, Options
from bench.chaos.run import Progress
from bench.command import conduct, sayer


def _told(progress: Progress) -> tuple[int, int, float, str]:
    text = f"{progress.done}/{progress.of} streams, {progress.faults} faults, {progress.seconds:.0f} s, {progress.phase}"
    return progress.done, progress.of, progress.seconds, text


def main() -> int:
    """Runs it and prints the table."""
    known = {*KINDS, *FAULTS, "drop"}
    defaults = Options()
    parser = argparse.ArgumentParser(prog="python -m bench.chaos", description="Faults on the real service; see the module.")
    parser.add_argument("--streams", type=int, default=defaults.streams)
    parser.add_argument("--concurrency", type=int, default=defaults.concurrency, help="streams at the same time, at most")
    parser.add_argument("--faults", type=int, default=defaults.faults, help="of all kinds, at least")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--without", default="", help=f"kinds to leave out, of {', '.join(sorted(known))}")
    parser.add_argument("--markdown", type=Path, help="file for the table")
    parser.add_argument("--keep", type=Path, help="keep logs and stories, in a new folder in this one, also if all is well")
    given = parser.parse_args()
    without = frozenset(filter(None, given.without.split(",")))
    if without - known:
        parser.error(f"unknown kinds: {', '.join(sorted(without - known))}")
    options = Options(given.streams, given.concurrency, given.faults, given.seed, without, given.keep)
    return conduct(lambda: run(options, sayer(_told)), markdown=given.markdown, keep=given.keep)


if __name__ == "__main__":
    sys.exit(main())
