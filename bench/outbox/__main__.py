"""The command: `python -m bench.outbox`."""

import argparse
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from bench.outbox.experiment import run
from bench.outbox.plan import Options
from bench.outbox.run import Progress


def _sayer() -> Callable[[Progress], None]:
    """A line that rewrites itself on a terminal; a line every ten seconds elsewhere."""
    last = -10.0
    terminal = sys.stderr.isatty()

    def say(progress: Progress) -> None:
        nonlocal last
        text = f"{progress.made}/{progress.of} sessions, {progress.taken} callbacks taken, {progress.kills} workers killed"
        text += f", {progress.seconds:.0f} s, {progress.phase}"
        if terminal:
            bar = "#" * (30 * progress.made // max(1, progress.of))
            print(f"\r[{bar:30}] {text}      ", end="", file=sys.stderr, flush=True)
        elif progress.seconds - last >= 10:
            last = progress.seconds
            print(text, file=sys.stderr, flush=True)

    return say


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
    if given.keep:
        given.keep.mkdir(parents=True, exist_ok=True)
    kills = max(1, given.endings // 250) if given.kills is None else given.kills
    options = Options(endings=given.endings, seed=given.seed, kills=kills, folder=given.keep)
    try:
        report = run(options, _sayer())
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except FileNotFoundError as error:
        sys.exit(str(error))
    if sys.stderr.isatty():
        print(file=sys.stderr)
    print(report.text())
    if given.report:
        given.report.write_text(report.markdown())
    if report.failures:
        print("\n" + "\n\n".join(report.failures[:20]))
        print(f"\n{len(report.failures)} findings: all are in {report.folder}/failures.txt, beside the logs")
        return 1
    if given.keep is None:
        shutil.rmtree(report.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
