"""The project's own benchmarks: `make bench`, or `python -m bench [PART...]`.

Measures the real service part by part, then writes docs/performance/results.json, the plots beside it, and the tables of
docs/performance.md. With names of parts, only these are measured and the rest of the results stays. `--report` measures
nothing: page and plots from the results that there are. `--quick`: with loads that mean nothing; writes nothing.

    comparison  the service and a naive relay: CPU per token and per stream, latency, what one core carries
    stages      what a token and a session cost at each stage
    batches     cost by the number of tokens in one write of the provider
    memory      what 1,000 and 5,000 open streams hold, and what Redis keeps
    scaling     one worker and two; a viewer on another worker than the generation

Exit code 1 where a stream failed. Two cores are wanted, one for the service and one for the load; it takes about a quarter of
an hour, and other load on the machine makes its figures worse.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from bench import page
from bench.load.rig import Failed, Rig
from bench.parts import PARTS, local_ports
from tests.neighbours.redis import program
from tests.service import ROOT

#: What the service runs on.
PACKAGES = ["gevent", "gunicorn", "flask", "openai", "httpx2", "redis", "hiredis", "msgspec"]


def facts(files: int) -> dict[str, Any]:
    """Of the machine, the interpreter, the versions and this tree."""
    redis = subprocess.run([str(program()), "--version"], capture_output=True, text=True, check=True).stdout
    cpu = Path("/proc/cpuinfo").read_text()
    model = re.search(r"^model name\s*: *(.*)$", cpu, re.MULTILINE)
    cores = f"{os.cpu_count()} cores of {model[1] if model else platform.machine()}"
    return {
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": cores + ", virtual" * ("hypervisor" in cpu) + ", shared by service and load" * (os.cpu_count() == 1),
        "kernel": platform.release(),
        "python": f"{platform.python_implementation()} {platform.python_version()}, {build()}",
        "redis_server": redis.split("v=")[-1].split()[0],
        "packages": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES),
        "files": files,
        "local_ports": local_ports(),
    }


def build() -> str:
    """Whether this interpreter was configured with what makes it faster by 10 to 15 %. (Debian does the like in its own way.)"""
    arguments = str(sysconfig.get_config_var("CONFIG_ARGS"))
    return f"configured {'with' if '--enable-optimizations' in arguments else 'without'} --enable-optimizations"


def commit() -> str:
    """Of this tree, with a + if it has changes that are not committed; empty where git does not know it."""
    told = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=ROOT, capture_output=True, text=True)
    return told.stdout.strip()


@contextmanager
def telling(names: list[str], quick: bool) -> Iterator[Callable[[str], None]]:
    """A progress bar; a line every ten seconds where there is no terminal. What it gives is told the part that begins, or ""."""
    total = sum(PARTS[name].seconds for name in names) * (0.05 if quick else 1)
    began, last, now = time.monotonic(), 0.0, ""
    columns = [TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"), TimeElapsedColumn()]
    terminal = sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), disable=not terminal) as progress:
        task = progress.add_task("", total=total)

        def say(name: str) -> None:
            nonlocal last, now
            now = name or now
            seconds = time.monotonic() - began
            progress.update(task, description=now, completed=min(seconds, 0.99 * total))
            if not terminal and (name or seconds - last >= 10):
                last = seconds
                print(f"{now}: {seconds:.0f} s of about {total:.0f}", file=sys.stderr, flush=True)

        yield say
        progress.update(task, completed=total)


def measure(names: list[str], quick: bool, results: dict[str, Any]) -> None:
    """Puts into `results` the facts, then each of these parts when it is done.

    Raises Failed, and FileNotFoundError where a program is missing.
    """
    with telling(names, quick) as say, Rig(say, quick=quick) as rig:
        results["facts"] = facts(rig.files)
        for name in names:
            say(name)
            results[name] = {"commit": results["facts"]["commit"], **PARTS[name].run(rig, quick)}


def main(argv: list[str]) -> int:
    """Measures, writes, and prints where."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="The project's own benchmarks; see the module.")
    parser.add_argument("part", nargs="*", help=f"only these: {', '.join(PARTS)}")
    parser.add_argument("--quick", action="store_true", help="with loads that mean nothing; prints the results, writes nothing")
    parser.add_argument("--report", action="store_true", help="measure nothing; page and plots from the results that there are")
    given = parser.parse_args(argv)
    if unknown := set(given.part) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    names = [name for name in PARTS if name in given.part] or list(PARTS)
    results: dict[str, Any] = json.loads(page.RESULTS.read_text()) if page.RESULTS.exists() and not given.quick else {}
    wrong = ""
    if not given.report:
        try:
            measure(names, given.quick, results)
        except (Failed, FileNotFoundError) as error:
            wrong = f"\n{error}"
        except KeyboardInterrupt:
            print("\nstopped", file=sys.stderr)
            return 130
    if given.quick:
        print(json.dumps(results, indent=1))
    elif missing := [name for name in PARTS if name not in results]:
        wrong += f"\nthere are no results yet of {', '.join(missing)}: run `make bench` once"
    else:
        page.write(results)
        print(f"written: {page.PAGE.relative_to(ROOT)} and {page.FOLDER.relative_to(ROOT)}/")
    if not wrong and (failed := sum(one["failed"] for one in results.get("memory", {"open": []})["open"])):
        wrong = f"{failed} streams failed"
    if wrong:
        print(wrong, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
