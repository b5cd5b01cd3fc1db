"""The verdict: what the provider, n8n and the viewers saw, compared with each other, the known texts and the faults."""

import math
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from bench.chaos.plan import AFTERMATH, LEASE, SESSION_TTL
from bench.chaos.record import Session, Trouble
from bench.command import Row, listed
from tests.neighbours.provider import Asked
from tests.neighbours.receiver import Received
from tests.neighbours.scenarios import SEPARATOR

#: A callback has come this many seconds after it is due, or is lost: twice a lease, the longest outage, and a second.
OVERDUE = 2 * LEASE + 6.0

#: Errors that say that a viewer cannot be told how its session ended.
UNTOLD = {"session_lost", "log_lost", "replay_over"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that must not be: against which row, and in which session."""

    rule: str
    text: str
    session: Session | None = None


LOST = "lost endings"
AGAIN = "callbacks sent again for no reason"
TWO_ENDINGS = "sessions with two different endings"
TWO_WORKERS = "sessions run by two workers at once"
TEXT = "doubled or missing characters"
UNDEFINED = "undefined answers"
WRONG = "endings that nothing explains"
STUCK = "viewers without an ending"
LEAKS = "leaks"
RULES = {
    LOST: "accepted, could be saved, and n8n was never told",
    AGAIN: "after a 2xx, with no worker lost and Redis there",
    TWO_ENDINGS: "callbacks that differ, or a viewer that saw another ending than n8n",
    TWO_WORKERS: "provider requests that overlap by over a second, or one too many",
    TEXT: "a text that is not the known one, not a part from its start, or ids with a gap",
    UNDEFINED: "404, 5xx or whatever docs/http.md does not have",
    WRONG: "failed without a lost worker, expired though it was opened, not stopped though told so",
    STUCK: "nothing within a minute of the last word",
    LEAKS: "keys without a time to live, deadlines without a session, open provider streams",
}


class Evidence:
    """What was seen, indexed by session."""

    def __init__(
        self, sessions: Sequence[Session], troubles: Sequence[Trouble], received: Iterable[Received], asked: Iterable[Asked]
    ) -> None:
        self.sessions = [session for session in sessions if session.accepted]
        self.all_sessions = list(sessions)
        self.troubles = list(troubles)
        self._received: dict[str, list[Received]] = {}
        for one in received:
            self._received.setdefault(one.path, []).append(one)
        self._asked: dict[str, list[Asked]] = {}
        for request in asked:
            self._asked.setdefault(request.model, []).append(request)

    def callbacks(self, session: Session) -> list[Received]:
        """The session's callbacks, in order."""
        return self._received.get(session.path, [])

    def asked(self, session: Session) -> list[Asked]:
        """What the provider was asked for the session, in order."""
        return self._asked.get(session.model, [])

    def delivered_at(self, session: Session) -> float:
        """When the first callback came."""
        callbacks = self.callbacks(session)
        return callbacks[0].at if callbacks else math.inf

    def trouble(self, since: float, until: float, *what: str) -> list[Trouble]:
        """What happened to processes in that time."""
        return [one for one in self.troubles if one.what in what and one.touches(since, until)]

    def unknown_to_all(self, session: Session) -> str:
        """Why the session could not be saved: how it stood when Redis lost its data, and what its worker's trouble was."""
        for emptied in self.troubles:
            if emptied.what != "emptied" or session.accepted_at > emptied.until or self.delivered_at(session) <= emptied.since:
                continue
            state, pid, due_at = self._knower(session, emptied)
            if emptied.since > due_at + OVERDUE:
                continue  # it was lost already, and not by this
            # What a worker knew it has written anew one lease after Redis is back, unless it is hurt before.
            for one in self.trouble(emptied.since - AFTERMATH, emptied.until + LEASE + 1.5, "killed", "stopped"):
                if one.pid == pid:
                    return f"{state}, its worker {one.what} in the same moment"
            if pid is None or pid not in emptied.ports:
                return f"{state}, its worker gone before"
            if state == "pending" and pid not in emptied.left:
                return f"{state}, its worker drained away meanwhile"
        return ""

    def unsaved(self) -> list[tuple[Session, str]]:
        """The sessions that could not be saved, and were not, each with the reason."""
        lost = [session for session in self.sessions if not self.callbacks(session)]
        return [(session, why) for session in lost if (why := self.unknown_to_all(session))]

    def _knower(self, session: Session, emptied: Trouble) -> tuple[str, int | None, float]:
        """How the session stood when Redis was emptied, the worker whose memory had it, and when its callback is due."""
        requests = [one for one in self.asked(session) if one.started_at <= emptied.since]
        if not requests:
            return "pending", session.accepted_by, session.accepted_at + SESSION_TTL
        last = requests[-1]
        killed = self.trouble(last.started_at, emptied.since, "killed")
        ports = [item for one in (emptied, *killed) for item in one.ports.items()]
        holder = next((pid for pid, own in ports if last.client_port in own), None)
        ended_at = math.inf if last.ended_at is None else last.ended_at
        ended = last.ended == "complete" and ended_at <= emptied.since
        return "ended, callback owed" if ended else "running", holder, ended_at

    def forgotten(self, session: Session, at: float) -> bool:
        """Whether Redis had lost the session after its end, and before `at`: nobody need know it any more."""
        delivered = self.delivered_at(session)
        return any(one.what == "emptied" and one.until >= delivered and one.since <= at for one in self.troubles)


def judge(evidence: Evidence, leaks: Sequence[str]) -> tuple[list[Row], list[Finding]]:
    """The table, and everything that must not be."""
    findings = [Finding(LEAKS, leak) for leak in leaks]
    unsaved = Counter(why for _, why in evidence.unsaved())
    again_with_reason = 0
    for session in evidence.all_sessions:
        findings += [
            Finding(UNDEFINED, text, session) for text in session.undefined_answers if not _excused_404(evidence, session)
        ]
    for session in evidence.sessions:
        callbacks = evidence.callbacks(session)
        if not callbacks and not evidence.unknown_to_all(session):
            findings.append(Finding(LOST, "no callback", session))
        repeats, reasons = _repeats(evidence, session)
        again_with_reason += reasons
        findings += [Finding(AGAIN, text, session) for text in repeats]
        findings += [Finding(TWO_ENDINGS, text, session) for text in _two_endings(evidence, session)]
        findings += [Finding(TWO_WORKERS, text, session) for text in _two_workers(evidence, session)]
        findings += [Finding(TEXT, text, session) for text in _characters(evidence, session)]
        findings += [Finding(WRONG, text, session) for text in _unexplained(evidence, session)]
        findings += [Finding(STUCK, "a viewer got no ending", session) for one in session.viewers if one.outcome == "stuck"]
    got = sum(bool(evidence.callbacks(session)) for session in evidence.sessions)
    rows = [
        *_viewer_rows(evidence, findings),
        Row("callbacks owed", len(evidence.sessions)),
        Row("callbacks got", got, listed(_statuses(evidence))),
        Row("sessions that could not be saved", sum(unsaved.values()), listed(unsaved)),
        Row("callbacks sent again", again_with_reason, "a worker lost, or Redis away or emptied, before the answer was noted"),
        Row("generations run once more", sum(len(evidence.asked(one)) == 2 for one in evidence.sessions), "lost before a word"),
        Row("inits refused and repeated", sum(session.refused for session in evidence.all_sessions), "503 while Redis was away"),
    ]
    counts = Counter(finding.rule for finding in findings)
    rows += [Row(rule, counts[rule], detail, zero=True) for rule, detail in RULES.items()]
    return rows, findings


def _viewer_rows(evidence: Evidence, findings: Sequence[Finding]) -> list[Row]:
    flawed = {id(finding.session) for finding in findings if finding.rule in (TEXT, TWO_ENDINGS)}
    exact, stopped, left, unsaved, forgotten = 0, 0, 0, 0, 0
    codes: Counter[str] = Counter()
    viewers = [(session, viewer) for session in evidence.sessions for viewer in session.viewers]
    for session, viewer in viewers:
        if viewer.outcome == "done" and viewer.text == session.plan.text:
            exact += 1
        elif viewer.outcome == "done" and id(session) not in flawed:
            stopped += 1
        elif viewer.outcome == "left":
            left += 1
        elif viewer.code in ("session_lost", "404") and evidence.unknown_to_all(session):
            unsaved += 1
        elif viewer.code in ("session_lost", "404") and evidence.forgotten(session, viewer.ended_at):
            forgotten += 1
        elif viewer.outcome == "error":
            codes[viewer.code] += 1
    reconnects = sum(max(0, viewer.connects - 1) for _, viewer in viewers)
    refusals = sum(viewer.refusals for _, viewer in viewers)
    return [
        Row("viewers", len(viewers), f"{reconnects} reconnects, {refusals} of them refused until the store was back"),
        Row("  whose text was exact, with [DONE]", exact),
        Row("  of a stopped answer, exact up to there", stopped),
        Row("  that left, exact up to there", left),
        Row("  with a defined error", sum(codes.values()), listed(codes)),
        Row("  whose session could not be saved", unsaved),
        Row("  back after Redis lost an ended session", forgotten),
    ]


def _excused_404(evidence: Evidence, session: Session) -> bool:
    """Whether all that the session's clients were told is that it is gone, and so it is."""
    gone = session.accepted and (evidence.unknown_to_all(session) or evidence.forgotten(session, math.inf))
    return bool(gone) and all(" got 404 " in text for text in session.undefined_answers)


def _repeats(evidence: Evidence, session: Session) -> tuple[list[str], int]:
    """Callbacks after the first, which got its 2xx: those that nothing explains, and the number of the others."""
    callbacks = evidence.callbacks(session)
    found, explained = [], 0
    for before, after in pairwise(callbacks):
        # What came of an attempt is said to the store until it hears it: while Redis is away, the answer is only in memory.
        if evidence.trouble(before.at - 1.5, after.at, "killed", "stopped", "away", "emptied"):
            explained += 1
        else:
            found.append(f"sent again {after.at - before.at:.3f} s after a 2xx")
    return found, explained


def _two_endings(evidence: Evidence, session: Session) -> list[str]:
    callbacks = [one.json for one in evidence.callbacks(session)]
    endings = {(one["status"], one["answer"], (one["error"] or {}).get("code")) for one in callbacks}
    found = []
    if len(endings) > 1:
        found.append("callbacks differ: " + "; ".join(f"{status} {code} {len(text)} chars" for status, text, code in endings))
    if {one["streamId"] for one in callbacks} - {session.id}:
        found.append("a callback names another session")
    if not callbacks:
        return found
    status, code = callbacks[0]["status"], (callbacks[0]["error"] or {}).get("code")
    for viewer in session.viewers:
        if viewer.outcome == "done" and status not in ("completed", "cancelled"):
            found.append(f"a viewer saw [DONE], n8n got {status} {code}")
        if viewer.outcome == "error" and viewer.code not in UNTOLD and viewer.code not in (code, status):
            found.append(f"a viewer saw {viewer.code}, n8n got {status} {code}")
        lost = viewer.outcome == "error" and viewer.code == "session_lost"
        if lost and not evidence.unknown_to_all(session) and not evidence.forgotten(session, viewer.ended_at):
            found.append(f"a viewer was told session_lost, n8n got {status} {code}")
    return found


def _two_workers(evidence: Evidence, session: Session) -> list[str]:
    requests = evidence.asked(session)
    found = []
    for i, first in enumerate(requests):
        for second in requests[i + 1 :]:
            since = max(first.started_at, second.started_at)
            until = min(first.ended_at or time.time(), second.ended_at or time.time())
            overlap = until - since - _stopped_between(evidence, since, until)
            if overlap > 1.0:
                found.append(f"two provider requests at once for {overlap:.1f} s while no worker was stopped")
    if len(requests) < 2:
        return found
    # An immediate one runs before the answer to its init is here.
    hurt = evidence.trouble(min(session.accepted_at, requests[0].started_at), math.inf, "killed", "stopped")
    if not [one for one in hurt if one.since <= requests[-1].started_at]:
        found.append(f"run {len(requests)} times, though no worker was lost")
    if len(requests) > 2 and not evidence.unknown_to_all(session):
        found.append(f"run {len(requests)} times")
    return found


def _stopped_between(evidence: Evidence, since: float, until: float) -> float:
    """Seconds of that time in which a worker was stopped, or had just been woken."""
    covered, at = 0.0, since
    for one in sorted(evidence.trouble(since - AFTERMATH, until, "stopped"), key=lambda one: one.since):
        begin, end = max(at, one.since), min(until, one.until + AFTERMATH)
        covered += max(0.0, end - begin)
        at = max(at, end)
    return covered


def _characters(evidence: Evidence, session: Session) -> list[str]:
    known = session.plan.text
    found = []
    callbacks = [one.json for one in evidence.callbacks(session)]
    status = callbacks[0]["status"] if callbacks else ""
    for number, viewer in enumerate(session.viewers):
        found += [f"viewer {number}: {flaw}" for flaw in viewer.flaws]
        if viewer.outcome == "done" and status != "cancelled":
            whole, what = viewer.text == known, "[DONE]"
        else:
            whole, what = known.startswith(viewer.text), viewer.outcome
        if not whole:
            found.append(f"viewer {number} ({what}): {_difference(known, viewer.text)}")
        if viewer.outcome == "done" and status == "cancelled" and viewer.text != (answer := callbacks[0]["answer"]):
            # A viewer may be ahead of the log by one window, which goes with its worker.
            lost = evidence.trouble(session.accepted_at, viewer.ended_at, "killed", "stopped")
            if not (lost and viewer.text.startswith(answer)):
                found.append(f"viewer {number} of a stopped answer has {len(viewer.text)} chars, n8n {len(answer)}")
        if viewer.outcome == "ended":
            found.append(f"viewer {number} was sent away with 204 before it had an ending")
    for one in callbacks:
        if not (one["answer"] == known if one["status"] == "completed" else known.startswith(one["answer"])):
            found.append(f"callback ({one['status']}): {_difference(known, one['answer'])}")
        if one["prompt"] != SEPARATOR.join(session.plan.pieces) or one["userId"] != f"user {session.plan.number}":
            found.append("callback with another prompt or user")
    return found


def _difference(known: str, got: str) -> str:
    """Where two texts part, in a few words."""
    at = bisect_left(range(min(len(known), len(got))), True, key=lambda i: known[: i + 1] != got[: i + 1])
    return f"{len(got)} of {len(known)} chars, from {at} on {got[at : at + 60]!r} instead of {known[at : at + 60]!r}"


def _unexplained(evidence: Evidence, session: Session) -> list[str]:
    callbacks = evidence.callbacks(session)
    if not callbacks or evidence.unknown_to_all(session):
        return []
    said, at, kind = callbacks[0].json, callbacks[0].at, session.plan.kind
    status = said["status"]
    lost = evidence.trouble(session.accepted_at - LEASE, at, "killed", "stopped")
    # While a worker is stopped or Redis is away, nobody can open or stop anything.
    any_trouble = lost or evidence.trouble(session.accepted_at - LEASE, at, "away", "emptied", "drained")
    ending = f"{status} {(said['error'] or {}).get('code') or ''}".strip()
    if status == "failed" and (not lost or said["error"]["code"] != "worker_lost"):
        return [f"ended as {ending}" + ("" if lost else " though no worker was lost")]
    if status == "cancelled" and kind not in ("stopped", "stopped-early", "deserted"):
        return [f"ended as {ending}, which nobody asked for"]
    if status == "expired" and kind != "nobody" and (kind == "immediate" or not any_trouble):
        return [f"ended as {ending} though it was opened"]
    if status == "completed" and kind in ("nobody", "stopped-early"):
        return [f"ended as {ending} though nobody opened it"]
    if status == "completed" and kind == "deserted" and not any_trouble:
        return [f"ended as {ending} though its viewer had left"]
    stop = session.stop_answered
    flag_lost = evidence.trouble(session.accepted_at, at, "emptied")
    if stop is not None and stop[1] == 202 and status not in ("cancelled", "failed") and not flag_lost:
        return [f"ended as {ending} though its stop was accepted"]
    return []


def _statuses(evidence: Evidence) -> Counter[str]:
    return Counter(callbacks[0].json["status"] for one in evidence.sessions if (callbacks := evidence.callbacks(one)))
