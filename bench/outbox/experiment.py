"""The whole experiment: the run, the verdict, and the files that tell how it came about."""

import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import gevent

import aistream
from bench.chaos.report import errors_in_log, log_by_session
from bench.command import Row, listed
from bench.outbox.plan import LEASE, SESSION_TTL, Options
from bench.outbox.report import Report, story
from bench.outbox.run import Progress, Run, telling
from bench.outbox.verdict import RULES, Seen, judge, kinds_of
from tests.neighbours.redis import program


def run(options: Options, say: Callable[[Progress], None]) -> Report:
    """Does it all. `say` is told twice a second how far it is. Everything it starts has ended when it returns or raises.

    gevent.Timeout where the sessions cannot be made in three times their time and two minutes.
    """
    if program() is None:
        raise FileNotFoundError("redis-server is not installed: `make test` installs one")
    folder = Path(tempfile.mkdtemp(prefix="aistream-outbox-", dir=options.folder))
    one = Run(options, folder)
    talking, phase = None, ""
    try:
        one.start()
        talking = telling(one, say, lambda: phase)
        with gevent.Timeout(3 * options.seconds + 120):
            one.drive()
        phase = "the last callbacks"
        one.settle()
        phase = "the verdict"
        evidence = one.evidence()
    finally:
        if talking is not None:
            talking.kill()
        one.stop()
    rows, tables, findings = judge(evidence)
    seen, log = Seen(evidence), log_by_session(folder / "service.log")
    failures = [story(finding, seen, one.began, log) for finding in findings]
    (folder / "failures.txt").write_text("\n\n".join(failures))
    errors = errors_in_log(folder / "service.log")
    rows.insert(1, Row("  by kind", sum(kinds_of(evidence).values()), listed(kinds_of(evidence))))
    rows.insert(len(rows) - len(RULES), Row("errors in the service's log", sum(errors.values()), listed(errors)))
    return Report(rows, tables, failures, _facts(options, one.began), folder)


def _facts(options: Options, began: float) -> dict[str, str]:
    redis = subprocess.run([str(program()), "--version"], capture_output=True, text=True, check=True).stdout
    schedule = ",".join(f"{delay:g}" for delay in options.schedule)
    settings = f"2 workers, CALLBACK_SCHEDULE={schedule}, LEASE_SECONDS={LEASE:g}, SESSION_TTL_SECONDS={SESSION_TTL:g}"
    return {
        "command": f"`python -m bench.outbox --endings {options.endings} --kills {options.kills} --seed {options.seed}`",
        "versions": f"aistream {aistream.__version__}, Python {platform.python_version()}, "
        f"Redis {redis.split('v=')[-1].split()[0]}",
        "machine": f"{os.cpu_count()} cores, shared by service, Redis, provider, both n8ns and viewers",
        "date": time.strftime("%Y-%m-%d"),
        "duration": f"{time.time() - began:.0f} s, of which {options.seconds:.0f} s with new sessions",
        "settings": settings,
    }
