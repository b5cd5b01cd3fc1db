"""`aistream doctor`: looks at all that the service needs, says what is wrong, and what mends it."""

from __future__ import annotations

import json
import sys
import traceback
from collections import Counter
from collections.abc import Iterator

import click
import gevent
from rich.table import Table
from rich.text import Text

from aistream.cli.checks import (
    Check,
    Finding,
    Patient,
    State,
    callbacks,
    clock,
    configuration,
    limits,
    models,
    public,
    store,
    versions,
)
from aistream.cli.common import as_json, console, dev
from aistream.environment import look

#: In the order of the list. All are asked at the same time, but the clock, which lives on what the others have met.
CHECKS: tuple[tuple[str, Check], ...] = (
    (configuration.NAME, configuration.check),
    (store.NAME, store.check),
    (models.NAME, models.check),
    (callbacks.NAME, callbacks.check),
    (public.NAME, public.check),
    (clock.NAME, clock.check),
    (limits.NAME, limits.check),
    (versions.NAME, versions.check),
)
#: Seconds for one of them, whatever its own steps allow.
PATIENCE = 30.0

STATES: tuple[State, ...] = ("ok", "warning", "problem", "skipped")
_STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red", "skipped": "dim"}


@click.command(
    short_help="Say what is wrong, and what mends it.",
    epilog="""\b
Examples:
  aistream doctor
  aistream doctor --resume-url "http://n8n:5678/webhook-waiting/231?signature=…"
  aistream doctor --json | jq 'select(.state == "problem")'

\b
Exit codes: 0 nothing stands in the way, 1 there is a problem (with --strict: or a warning), 2 usage.
""",
)
@click.option("--resume-url", default="", help="Also judge this resumeUrl as init would. It is not called.")
@click.option("--strict", is_flag=True, help="Warnings count as problems.")
@dev
@as_json
def doctor(resume_url: str, strict: bool, as_json: bool) -> None:
    """Looks for what is wrong: configuration, Redis, providers, resume URLs, the public side, clocks, limits.

    Nothing is changed and nothing is paid for; no answer is waited for longer than 5 seconds. It looks from this machine, with
    this environment: run it where the service runs.
    """
    findings = list(examine(Patient(look(), resume_url)))
    if as_json:
        for finding in findings:
            click.echo(json.dumps(finding._asdict(), ensure_ascii=False))
    else:
        printer = console()
        with printer.capture() as shown:
            printer.print(_table(findings))
        click.echo("\n".join(line.rstrip() for line in shown.get().splitlines()))
        counts = Counter(finding.state for finding in findings)
        plurals = {"warning": "warnings", "problem": "problems"}
        told = [f"{counts[state]} {state if counts[state] == 1 else plurals.get(state, state)}" for state in STATES]
        click.echo(", ".join(told))
    states = {finding.state for finding in findings}
    sys.exit(1 if "problem" in states or (strict and "warning" in states) else 0)


def examine(patient: Patient) -> Iterator[Finding]:
    """All findings, in the order of CHECKS. One that fails hides none of the others."""
    asked = {name: gevent.spawn(_guarded, name, check, patient) for name, check in CHECKS if name != clock.NAME}
    gevent.joinall(list(asked.values()))
    for name, check in CHECKS:
        yield from asked[name].get() if name in asked else _guarded(name, check, patient)


def _guarded(name: str, check: Check, patient: Patient) -> list[Finding]:
    findings: list[Finding] = []
    over = gevent.Timeout(PATIENCE)
    try:
        with over:
            for finding in check(patient):
                findings.append(finding)  # what was found before it failed counts
    except gevent.Timeout as timeout:
        if timeout is not over:
            raise
        findings.append(
            Finding(name, "problem", f"this check took longer than {PATIENCE:g} s", "look at what hangs: DNS, a server")
        )
    except Exception as error:  # told by kind and place alone: its message may quote anything
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{type(error).__name__} at {place.filename.rpartition('/')[2]}:{place.lineno}"
        findings.append(Finding(name, "problem", f"this check itself failed: {where}", "report it, with the version below"))
    return findings


def _table(findings: list[Finding]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold", style="bold")
    table.add_column(overflow="fold")
    for finding in findings:
        text = Text(finding.found)
        if finding.mend:
            text.append(f"\n→ {finding.mend}", style="" if finding.state in ("problem", "warning") else "dim")
        table.add_row(Text(finding.state, style=_STYLES[finding.state]), finding.check, text)
    return table
