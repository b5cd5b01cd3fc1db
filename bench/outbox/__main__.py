"""The command: `python -m bench.outbox`."""

import argparse
import sys
from pathlib import Path

from bench.command import conduct, sayer
from bench.outbox.experiment import run
from bench.outbox.plan import Options
from bench.outbox.run import Progress


def _told(progress: Progress) -> tuple[int, int, float, str]:
    text = f"{progress.made}/{progress.of} sessions, {progress.taken} callbacks taken, {progress.kills} workers killed"
    return progress.made, progress.of, progress.seconds, f"{text}, {progress.seconds:.0f} s, {progress.phase}"


def main() -> int:
    """Runs it and prints the tables."""
    defaults = Options()
    parser = argparse.ArgumentParser(
        prog="python -m bench.outbox", description="Callbacks to an n8n that fails, from workers that are killed; see the module."
    )
    parser.add_argument("--endings", type=int, default=defaults.endings, help="sessions, besides those that are watched")
    parser.add_argument("--kills", type=int, help="workers killed; if not given, one for 250 endings")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--report", type=Path, help="file for the tables as Markdown")
    parser.add_argument("--keep", type=Path, help="keep logs and stories, in a new folder in this one, also if all is well")
    given = parser.parse_args()
    if given.endings < 1:
        parser.error("--endings: expected at least 1")
    kills = max(1, given.endings // 250) if given.kills is None else given.kills
    options = Options(endings=given.endings, seed=given.seed, kills=kills, folder=given.keep)
    return conduct(lambda: run(options, sayer(_told)), markdown=given.report, keep=given.keep)


if __name__ == "__main__":
    sys.exit(main())
