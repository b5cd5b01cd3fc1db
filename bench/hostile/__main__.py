"""The command: `python -m bench.hostile`."""

import argparse
import sys
from pathlib import Path

from bench.command import conduct, sayer
from bench.hostile.report import Report
from bench.hostile.run import Options, Progress, run


def _told(progress: Progress) -> tuple[int, int, float, str]:
    return (
        progress.done,
        progress.of,
        progress.seconds,
        f"{progress.done}/{progress.of}, {progress.seconds:.0f} s, {progress.phase}",
    )


def main() -> int:
    """Runs it and prints the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.hostile", description="Honest streams under attack; see the module.")
    parser.add_argument("--quick", action="store_true", help="a fiftieth of the connections, short phases, one worker")
    parser.add_argument("--only", default="", help="attacks whose name has this in it")
    parser.add_argument("--report", type=Path, help="file for the table as Markdown")
    parser.add_argument("--page", type=Path, help="page whose table is replaced, docs/security.md")
    parser.add_argument("--keep", type=Path, help="keep the logs, in a new folder in this one, also if all is well")
    given = parser.parse_args()
    options = Options(only=given.only, folder=given.keep)
    if given.quick:
        options = Options(workers=(1,), scale=0.02, quick=True, only=given.only, folder=given.keep)

    def noted() -> Report:
        report = run(options, sayer(_told))
        if given.page:
            given.page.write_text(report.written_into(given.page.read_text()))
        return report

    return conduct(noted, markdown=given.report, keep=given.keep)


if __name__ == "__main__":
    sys.exit(main())
