"""The command: `python -m bench.chaos`."""

import argparse
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from bench.chaos.experiment import run
from bench.chaos.plan import FAULTS, KINDS, Options
from bench.chaos.run import Progress


def _sayer() -> Callable[[Progress], None]:
    """A line that rewrites itself on a terminal; a line every ten seconds elsewhere."""
    last = -10.0
    terminal = sys.stderr.isatty()

    def say(progress: Progress) -> None:
        nonlocal last
        text = f"{progress.done}/{progress.of} streams, {progress.faults} faults, {progress.seconds:.0f} s, {progress.phase}"
        if terminal:
            bar = "#" * (30 * progress.done // max(1, progress.of))
            print(f"\r[{bar:30}] {text}   ", end="", file=sys.stderr, flush=True)
        elif progress.seconds - last >= 10:
            last = progress.seconds
            print(text, file=sys.stderr, flush=True)

    return say


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
    if given.keep:
        given.keep.mkdir(parents=True, exist_ok=True)
    options = Options(given.streams, given.concurrency, given.faults, given.seed, without, given.keep)
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
    if given.markdown:
        given.markdown.write_text(report.markdown())
    if report.failures:
        print("\n" + "\n\n".join(report.failures[:20]))
        print(f"\n{len(report.failures)} findings: all are in {report.folder}/failures.txt, beside unsaved.txt and the logs")
        return 1
    if given.keep is None:
        shutil.rmtree(report.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
