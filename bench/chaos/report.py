"""The table, and the story of each finding."""

import contextlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from bench.chaos.verdict import Evidence, Finding
from bench.command import Row, rows_markdown, rows_text


@dataclass(frozen=True, slots=True)
class Report:
    """What came of a run. `failures` has each finding with the story of its session; empty: all is well."""

    rows: list[Row]
    failures: list[str]
    facts: dict[str, str]
    folder: Path

    def text(self) -> str:
        """The table, aligned."""
        return "\n".join(rows_text(self.facts, self.rows))

    def markdown(self) -> str:
        """The table as Markdown."""
        lines = ["# What survives: a chaos run", ""]
        lines += [f"- {name}: {value}" for name, value in self.facts.items()]
        lines += rows_markdown(self.rows)
        return "\n".join(lines) + "\n"


def story(finding: Finding, evidence: Evidence, began: float, log: Mapping[str, list[tuple[float, str]]]) -> str:
    """A finding with everything that happened to its session, and to the processes meanwhile, in order of time."""
    session = finding.session
    if session is None:
        return f"{finding.rule}: {finding.text}"
    plan = session.plan
    happened = [*session.notes, *(note for viewer in session.viewers for note in viewer.notes)]
    for request in evidence.asked(session):
        happened.append((request.started_at, f"PROVIDER asked, request {request.number} from port {request.client_port}"))
        if request.ended_at is not None:
            told = f"PROVIDER request {request.number} {request.ended} after {request.deltas} of {len(plan.pieces)} deltas"
            happened.append((request.ended_at, told))
    for one in evidence.callbacks(session):
        said = one.json
        code = (said["error"] or {}).get("code")
        text = f"N8N gets attempt {said['attempt']}: {said['status']} {code or ''}, {len(said['answer'])} chars"
        happened.append((one.at, text))
    happened += log.get(session.id, [])
    first = min((at for at, _ in happened), default=began)
    last = max((at for at, _ in happened), default=began)
    for trouble in evidence.trouble(first - 5, last + 2, "killed", "stopped", "away", "emptied", "drained"):
        happened.append((trouble.since, f"FAULT {trouble}"))
        if trouble.until > trouble.since:
            happened.append((trouble.until, f"FAULT is over: {trouble}"))
    lines = [f"{finding.rule}: {finding.text}"]
    lines.append(f"  stream {plan.number} ({plan.kind}), session {session.id}, {session.model}, {len(plan.text)} chars")
    for number, viewer in enumerate(session.viewers):
        mode = "json" if plan.viewers[number].json else "text"
        lines.append(f"  viewer {number} ({mode}): {viewer.outcome} {viewer.code}, {len(viewer.text)} chars")
    lines += [f"  {at - began:9.3f}  {text}" for at, text in sorted(happened)]
    return "\n".join(lines)


def log_by_session(path: Path) -> dict[str, list[tuple[float, str]]]:
    """The service's log lines by session."""
    found: dict[str, list[tuple[float, str]]] = {}
    for line in path.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            said = json.loads(line)
            at = datetime.fromisoformat(said.pop("timestamp")).timestamp()
            session = said.pop("session")
            name = said.pop("event")
            found.setdefault(session, []).append((at, f"LOG {name} " + " ".join(f"{k}={v}" for k, v in said.items())))
    return found


def errors_in_log(path: Path) -> Counter[str]:
    """The service's own errors by name: none is expected, and each is worth a look. Workers that were killed are no news."""
    found: Counter[str] = Counter()
    for line in path.read_text(errors="replace").splitlines():
        if line.startswith("Traceback"):
            found["Traceback"] += 1
        with contextlib.suppress(ValueError, KeyError, TypeError):
            said = json.loads(line)
            killed = said["event"] == "gunicorn.said" and " was sent SIG" in said["message"]
            if said["level"] == "error" and said["event"] != "callback.attempted" and not killed:
                found[f"{said['event']} ({said.get('error', '')})"] += 1
    return found
