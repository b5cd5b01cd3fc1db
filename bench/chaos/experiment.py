"""The whole experiment: the run, the verdict, and the files that tell how it came about."""

import os
import platform
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import gevent

from bench.chaos.plan import DRAIN, LEASE, SESSION_TTL, Options
from bench.chaos.report import Report, errors_in_log, log_by_session, story
from bench.chaos.run import Progress, Run
from bench.chaos.verdict import RULES, STUCK, WRONG, Finding, judge
from bench.command import Row, listed
from tests.neighbours.redis import program


def run(options: Options, say: Callable[[Progress], None]) -> Report:
    """Does it all. `say` is told twice a second how far it is. Everything it starts has ended when it returns or raises."""
    if program() is None:
        raise FileNotFoundError("redis-server is not installed: `make test` installs one")
    # A folder of its own in any case: what an earlier run has left in a Redis would come alive again.
    folder = Path(tempfile.mkdtemp(prefix="aistream-chaos-", dir=options.folder))
    one = Run(options, folder)
    phase = "streams"
    talking = None
    findings = []
    try:
        one.start()

        def talk() -> None:
            while True:
                say(one.progress(phase))
                gevent.sleep(0.5)

        talking = gevent.spawn(talk)
        limit = 2 * one.seconds + 120
        with gevent.Timeout(limit) as timer:
            try:
                one.drive()
            except gevent.Timeout as over:
                if over is not timer:
                    raise
                findings.append(Finding(STUCK, f"the run did not end within {limit:.0f} s"))
        phase = "the last callbacks"
        one.settle()
        evidence, leaks = one.evidence(), one.leaks()
        say(one.progress("the verdict"))
    finally:
        if talking is not None:
            talking.kill()
        one.stop()
    rows, found = judge(evidence, leaks)
    findings += found
    hits = one.hits()
    if sum(hits.values()) < options.faults:
        findings.append(Finding(WRONG, f"only {sum(hits.values())} of {options.faults} faults happened"))
    log = log_by_session(folder / "service.log")
    failures = [story(finding, evidence, one.began, log) for finding in findings]
    excused = [Finding(f"could not be saved: {why}", "", session) for session, why in evidence.unsaved()]
    (folder / "troubles.txt").write_text(
        "\n".join(f"{trouble.since - one.began:9.3f}  {trouble!r}" for trouble in evidence.troubles)
    )
    (folder / "failures.txt").write_text("\n\n".join(failures))
    (folder / "unsaved.txt").write_text("\n\n".join(story(finding, evidence, one.began, log) for finding in excused))
    kinds = Counter(session.plan.kind for session in evidence.sessions)
    errors = errors_in_log(folder / "service.log")
    rows = [
        Row("streams accepted", len(evidence.sessions), listed(kinds)),
        Row("faults", sum(hits.values()), listed(hits)),
        *rows[: -len(RULES)],
        Row("errors in the service's log", sum(errors.values()), listed(errors)),
        *rows[-len(RULES) :],
    ]
    return Report(rows, failures, _facts(options, one.began), folder)


def _facts(options: Options, began: float) -> dict[str, str]:
    version = subprocess.run([str(program()), "--version"], capture_output=True, text=True, check=True).stdout
    command = f"python -m bench.chaos --streams {options.streams} --concurrency {options.concurrency}"
    command += f" --faults {options.faults} --seed {options.seed}"
    if options.without:
        command += f" --without {','.join(sorted(options.without))}"
    return {
        "command": f"`{command}`",
        "versions": f"Python {platform.python_version()}, Redis {version.split('v=')[-1].split()[0]}",
        "machine": f"{os.cpu_count()} cores",
        "date": time.strftime("%Y-%m-%d"),
        "duration": f"{time.time() - began:.0f} s",
        "settings": f"2 workers, LEASE_SECONDS={LEASE:g}, DRAIN_SECONDS={DRAIN}, SESSION_TTL_SECONDS={SESSION_TTL:g}",
    }
