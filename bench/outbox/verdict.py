"""The verdict: what the receivers got, compared with the plans, with Redis, with the kills, and with itself."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Any

from bench.command import Row, listed
from bench.outbox.n8n import AMBIGUOUS, Exchange, N8n, Reaction
from bench.outbox.plan import DOOMED, KINDS, MANNERS, SESSION_TTL
from bench.outbox.record import Evidence, Kept, Kill, Session

#: An attempt lasts at most 35 s, and so does what was known of it; ports are given out again after longer than this.
MINUTE = 60.0
#: Seconds from an answer to its settle, from above: one that has not come by then, from a worker that lives, is lost.
SETTLING = 2.0
#: A request that lay in the kernel when its sender was killed is read no later than this.
UNREAD = 1.0
#: A time-out of the service's, from below: the scripts cut nothing that is this old, unless they end a hang.
TIMED_OUT = 29.5

LOST = "lost callbacks"
AGAIN = "sent again after a clear 2xx"
AFTER = "sent again after another final answer"
DEAD = "dead for no reason"
PAYLOAD = "wrong payloads"
NUMBERS = "wrong numbers of attempts"
VIEWERS = "viewers without their text"
LEFT = "left in Redis"
RULES = {
    LOST: "not known, still owed, or settled as delivered though n8n never took it",
    AGAIN: "and no worker was killed before its settle",
    AFTER: "409 finished already, 401, 404 wrong method; and no worker was killed before its settle",
    DEAD: "with attempts left, and no final refusal",
    PAYLOAD: "not the whole right answer with the six fields, another webhook-id, or not the same in all attempts",
    NUMBERS: "not upward, twice in the log, or beyond the schedule without a worker killed in the last attempt",
    VIEWERS: "not the exact text with [DONE], nor the part up to its worker's death, nor let in too late",
    LEFT: "deadlines, sessions that nobody made, a list of dead letters that is not theirs",
}
SIX = {"userId": str, "chatId": int, "prompt": str, "answer": str, "input_tokens": int, "output_tokens": int}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that must not be: against which row, and in which session."""

    rule: str
    text: str
    session: Session | None = None


@dataclass(frozen=True, slots=True)
class Table:
    """A table of times."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


class Seen:
    """The evidence, indexed by session."""

    def __init__(self, evidence: Evidence) -> None:
        self.evidence = evidence
        self.sessions = [session for session in evidence.sessions if session.id]
        self._watches = {watch.plan.number: watch for watch in evidence.watches}
        self._exchanges: dict[str, list[Exchange]] = {}
        for one in sorted([*evidence.failing.exchanges, *evidence.healthy.exchanges], key=lambda one: one.at):
            self._exchanges.setdefault(one.path, []).append(one)

    def exchanges(self, session: Session) -> list[Exchange]:
        """The session's attempts that arrived, in order."""
        return self._exchanges.get(session.path, [])

    def kept(self, session: Session) -> Kept:
        """What Redis holds of it."""
        return self.evidence.kept.get(session.id, Kept("unknown", 0, ""))

    def n8n(self, session: Session) -> N8n:
        """To whom it reports."""
        return self.evidence.healthy if session.plan.healthy else self.evidence.failing

    def taken_at(self, session: Session) -> float:
        """When n8n took the callback (inf: never)."""
        return self.n8n(session).taken.get(session.path, math.inf)

    def ended_at(self, session: Session) -> float:
        """When the session ended, as its callback has it (inf: none came)."""
        exchanges = self.exchanges(session)
        try:
            return _at(exchanges[0].said["timings"]["ended_at"])
        except (IndexError, KeyError, TypeError, ValueError):
            return math.inf

    def came_late(self, session: Session) -> bool:
        """Whether its viewer was let in only when its time was over: a worker was killed, or the machine is too busy."""
        watch = self._watches.get(session.plan.number)
        return watch is None or watch.opened_at > session.accepted_at + SESSION_TTL - 0.2

    def sent_by_the_killed(self, one: Exchange, kill: Kill) -> bool:
        """Whether a request had come over a connection of the worker that was killed then."""
        return one.port in kill.ports and kill.at - MINUTE <= one.at <= kill.at + UNREAD

    def unsettled(self, session: Session, one: Exchange) -> float | None:
        """How many seconds before its worker's death an attempt was answered whose settle never reached Redis; else None.

        The rule, and why it holds, is in `bench.outbox`.
        """
        for kill in self.evidence.kills:
            before = kill.at - one.over_at
            owed, _ = kill.owed.get(session.id, (0, 0.0))
            if self.sent_by_the_killed(one, kill) and owed == one.attempt and -UNREAD <= before <= SETTLING:
                return before
        return None

    def how_it_went(self, one: Exchange) -> str:
        """An attempt that was not final, in the words of the table."""
        if any(self.sent_by_the_killed(one, kill) and kill.at <= one.over_at + 0.05 for kill in self.evidence.kills):
            return "worker killed in mid-attempt"
        if one.reaction is Reaction.HANG:
            return "time-out" if one.over_at - one.at > TIMED_OUT else "hung until the restart"
        if one.reaction.answer is not None and not one.whole:
            return "answer cut off"
        return one.reaction.label


def judge(evidence: Evidence) -> tuple[list[Row], list[Table], list[Finding]]:
    """The counts, the times, and everything that must not be."""
    seen = Seen(evidence)
    findings = [Finding(LEFT, text) for text in evidence.leftovers]
    refused: Counter[str] = Counter()
    ambiguous: Counter[str] = Counter()
    excused: list[tuple[str, float]] = []
    beyond = 0
    for session in seen.sessions:
        findings += [Finding(rule, text, session) for rule, text in _settled(seen, session)]
        findings += [Finding(PAYLOAD, text, session) for text in _payload(seen, session)]
        findings += [Finding(NUMBERS, text, session) for text in _numbers(seen, session)]
        beyond += any(one.attempt > len(evidence.options.schedule) for one in seen.exchanges(session))
        for before, after in pairwise(seen.exchanges(session)):
            if not before.final:
                how = seen.how_it_went(before)
                clear = before.whole and before.reaction not in AMBIGUOUS and before.reaction.label == how
                (refused if clear else ambiguous)[how] += 1
            elif (seconds := seen.unsettled(session, before)) is not None:
                excused.append((before.reaction.label, seconds))
            else:
                rule = AGAIN if before.reaction is Reaction.STARTED else AFTER
                text = f"attempt {after.attempt} came {after.at - before.over_at:.3f} s after {before.reaction.label}"
                findings.append(Finding(rule, f"{text} to attempt {before.attempt}", session))
    findings += _twice_in_the_log(seen)
    findings += _watched(seen)
    rows = [
        *_owed_rows(seen),
        Row("attempts that arrived", sum(len(seen.exchanges(session)) for session in seen.sessions), _reactions(seen)),
        Row("attempts in the service's log", len(evidence.logged), listed(Counter(outcome for *_, outcome in evidence.logged))),
        Row("sent again after a clear refusal", sum(refused.values()), listed(refused)),
        Row("sent again after an ambiguous attempt", sum(ambiguous.values()), listed(ambiguous)),
        Row("sent again after a final answer, excused", len(excused), _excuses(excused)),
        Row("sessions with attempts beyond the schedule", beyond, "a worker killed in the last one"),
        Row(
            "workers killed", len(evidence.kills), f"{sum(len(kill.ports) for kill in evidence.kills)} connections to n8n broken"
        ),
        *_viewer_rows(evidence),
    ]
    counts = Counter(finding.rule for finding in findings)
    rows += [Row(rule, counts[rule], detail, zero=True) for rule, detail in RULES.items()]
    return rows, [_by_phase(seen), _returns(seen)], findings


def _owed_rows(seen: Seen) -> list[Row]:
    sessions, schedule = seen.sessions, len(seen.evidence.options.schedule)
    statuses = Counter(str(_said(exchanges[0]).get("status")) for one in sessions if (exchanges := seen.exchanges(one)))
    states = Counter(seen.kept(one).callback for one in sessions)
    unheard = sum(one.accepted_at == math.inf for one in sessions)
    manners = Counter(one.plan.manner for one in sessions if not one.plan.healthy)
    dead = Counter(
        "schedule over" if seen.kept(one).attempt >= schedule else "refused for good"
        for one in sessions
        if seen.kept(one).callback == "dead"
    )
    taken = [one for one in sessions if seen.taken_at(one) < math.inf]
    by_409 = sum(any(e.reaction is Reaction.FINISHED for e in seen.exchanges(one)) for one in taken)
    healthy = sum(one.plan.healthy for one in sessions)
    return [
        Row("endings made", len(sessions), f"{listed(statuses)}; {unheard} of them by inits whose answer was lost"),
        Row("  owed to the n8n that is well", healthy),
        Row("  owed to the one that fails", len(sessions) - healthy, listed({name: manners[name] for name in MANNERS})),
        Row(
            "callbacks delivered",
            states["delivered"],
            f"taken by n8n {len(taken)}; {by_409} of them known by 409 finished already",
        ),
        Row("callbacks dead", states["dead"], listed(dead)),
        Row("callbacks still owed, or unknown", len(sessions) - states["delivered"] - states["dead"]),
    ]


def _reactions(seen: Seen) -> str:
    return listed(Counter(one.reaction.label for session in seen.sessions for one in seen.exchanges(session)))


def _excuses(excused: Sequence[tuple[str, float]]) -> str:
    if not excused:
        return "a worker killed before its settle"
    before, after = (1000 * max(0.0, *(sign * seconds for _, seconds in excused)) for sign in (1, -1))
    answers = listed(Counter(label for label, _ in excused))
    return f"{answers}: answered at most {before:.0f} ms before, or {after:.0f} ms after, their worker was killed"


# What must not be.


def _settled(seen: Seen, session: Session) -> Iterator[tuple[str, str]]:
    kept, taken = seen.kept(session), seen.taken_at(session) < math.inf
    last = seen.exchanges(session)[-1:]
    if kept.callback == "dead":
        refused = bool(last) and last[0].final and last[0].reaction in (Reaction.INVALID_TOKEN, Reaction.WRONG_METHOD)
        if not refused and kept.attempt < len(seen.evidence.options.schedule):
            yield DEAD, f"dead after attempt {kept.attempt}"
    elif kept.callback != "delivered":
        yield LOST, f"its callback is {kept.callback or 'not owed yet'} in the end, attempt {kept.attempt}"
    elif not taken:
        yield LOST, f"delivered with attempt {kept.attempt}, as Redis has it, but n8n never took it"


def _numbers(seen: Seen, session: Session) -> Iterator[str]:
    exchanges = seen.exchanges(session)
    last = len(seen.evidence.options.schedule)
    if exchanges and exchanges[0].attempt < 1:
        yield f"attempt {exchanges[0].attempt}"
    for before, after in pairwise(exchanges):
        if after.attempt <= before.attempt:
            yield f"attempt {after.attempt} after attempt {before.attempt}"
    open_at_a_kill = {kill.owed[session.id][0] for kill in seen.evidence.kills if session.id in kill.owed}
    highest = max([one.attempt for one in exchanges], default=0)
    if highest > last and not set(range(last, highest)) <= open_at_a_kill:
        yield f"attempt {highest} with a schedule of {last}"


def _twice_in_the_log(seen: Seen) -> Iterator[Finding]:
    sessions = {session.id: session for session in seen.sessions}
    for (session_id, attempt), count in Counter((session, attempt) for session, attempt, _ in seen.evidence.logged).items():
        if count > 1:
            yield Finding(NUMBERS, f"attempt {attempt} stands {count} times in the log", sessions.get(session_id))


def _payload(seen: Seen, session: Session) -> Iterator[str]:
    exchanges, plan = seen.exchanges(session), session.plan
    if len({one.webhook_id for one in exchanges} | {f"msg_{session.id}"}) > 1:
        yield f"webhook-ids {sorted({one.webhook_id for one in exchanges})}"
    for before, after in pairwise(exchanges):
        if {**_said(before), "attempt": 0} != {**_said(after), "attempt": 0}:
            yield f"attempts {before.attempt} and {after.attempt} differ"
    if not exchanges:
        return
    said = _said(exchanges[0])
    wrong = [name for name, kind in SIX.items() if type(said.get(name)) is not kind]
    if wrong:
        yield f"{', '.join(wrong)}: missing, or of another type"
        return
    expected = {"userId": f"user {plan.number}", "chatId": plan.number, "prompt": plan.prompt, "streamId": session.id}
    yield from (f"{name} is {said.get(name)!r}" for name, value in expected.items() if said.get(name) != value)
    yield from _answer(seen, session, said)


def _answer(seen: Seen, session: Session, said: dict[str, Any]) -> Iterator[str]:
    """Whether the session ended as it had to, and the answer is what was said up to there."""
    plan, status, answer = session.plan, str(said.get("status")), str(said["answer"])
    code = (said.get("error") or {}).get("code")
    created, ended = _at(said["timings"]["created_at"]), _at(said["timings"]["ended_at"])
    killed = any(created <= kill.at + 0.1 and kill.at <= ended for kill in seen.evidence.kills)
    allowed = {
        "echo": {"completed"},
        "say": {"completed"},
        "watched": {"completed"} | ({"expired"} if seen.came_late(session) else set()),
        "failed": {"failed"},
        "stopped": {"cancelled"} | ({"completed"} if killed or session.stopped_as in ("completed", "") else set()),
        "cancelled": {"cancelled"} | ({"expired"} if killed or session.stopped_as in ("expired", "") else set()),
        "expired": {"expired"},
    }[plan.kind]
    if status == "failed" and code == "worker_lost" and killed and plan.kind != "expired":
        whole = False
    elif status not in allowed or (status == "failed" and code != "upstream_truncated"):
        yield f"ended as {status} {code or ''}"
        return
    else:
        whole = status == "completed" or plan.kind == "failed"
    if not (answer == plan.text if whole else plan.text.startswith(answer)):
        yield f"answer ({status}) is {answer[:100]!r}, of {plan.text[:100]!r}"
    if whole and plan.kind == "say":
        tokens = len(plan.prompt.split()), len(plan.prompt.split("\u241e"))
        if (said["input_tokens"], said["output_tokens"]) != tokens:
            yield f"tokens {said['input_tokens']} and {said['output_tokens']} instead of {tokens}"


def _watched(seen: Seen) -> Iterator[Finding]:
    sessions = {session.plan.number: session for session in seen.sessions}
    for watch in seen.evidence.watches:
        session = sessions[watch.plan.number]
        exact = watch.outcome == "done" and watch.text == watch.plan.text
        lost = watch.outcome == "worker_lost" and seen.evidence.kills and watch.plan.text.startswith(watch.text)
        late = watch.outcome == "expired" and not watch.text and seen.came_late(session)
        if not exact and not lost and not late:
            text = f"{watch.outcome or 'no ending'}, {len(watch.text)} of {len(watch.plan.text)} characters"
            yield Finding(VIEWERS, text, session)


# Times.


def _viewer_rows(evidence: Evidence) -> list[Row]:
    outcomes = Counter(watch.outcome or "no ending" for watch in evidence.watches)
    gaps = [gap for watch in evidence.watches for gap in watch.gaps]
    firsts = [watch.first for watch in evidence.watches if watch.first < math.inf]
    again = sum(watch.connects - 1 for watch in evidence.watches)
    return [
        Row("streams watched meanwhile", len(evidence.watches), f"{listed(outcomes)}; {again} reconnects"),
        Row("  first words", len(firsts), spread(firsts)),
        Row("  pauses between two events (50 ms at the provider)", len(gaps), spread(gaps)),
    ]


def _by_phase(seen: Seen) -> Table:
    """From the ending to the moment n8n took the callback, by what the failing n8n did when the session ended."""
    turns = [*seen.evidence.failing.turns, (math.inf, "")]
    rows = []
    delays: dict[tuple[str, bool], list[float]] = {}
    for session in seen.sessions:
        ended, taken = seen.ended_at(session), seen.taken_at(session)
        if taken == math.inf or session.plan.manner not in ("plain", "early"):
            continue
        phase = next((kind for (at, kind), (until, _) in pairwise(turns) if at <= ended < until), "up")
        for name in (phase, "all"):
            delays.setdefault((name, session.plan.healthy), []).append(taken - ended)
    for phase in ("up", "down", "starting", "hang", "errors", "cut", "busy", "all"):
        well, failing = delays.get((phase, True), []), delays.get((phase, False), [])
        rows.append([phase, str(len(well)), *_three(well), str(len(failing)), *_three(failing)])
    head = ["the failing n8n is", "well: endings", "p50", "p99", "max", "failing: endings", "p50", "p99", "max"]
    return Table("Seconds from ending to delivery, of sessions with which n8n does nothing in particular", head, rows)


def _returns(seen: Seen) -> Table:
    """What was owed whenever the failing n8n was well again, and how long it took."""
    rows, since, kinds = [], math.inf, list[str]()
    for (at, kind), (until, _) in pairwise([*seen.evidence.failing.turns, (math.inf, "")]):
        if kind != "up":
            since, kinds = min(since, at), [*kinds, kind]
            continue
        if kinds:
            rows.append(_return(seen, kinds, since, at, until))
        since, kinds = math.inf, []
    head = ["after", "lasted", "owed then", "p50", "p99", "backlog empty after", "not before the next outage"]
    return Table("Seconds from the failing n8n's return to delivery, of what was owed then", head, rows)


def _return(seen: Seen, kinds: Sequence[str], since: float, at: float, until: float) -> list[str]:
    owed = [
        session
        for session in seen.sessions
        if not session.plan.healthy
        and session.plan.manner not in DOOMED
        and seen.ended_at(session) <= at < seen.taken_at(session)
    ]
    times = [taken - at for session in owed if (taken := seen.taken_at(session)) <= until]
    late = len(owed) - len(times)
    p50, p99, most = _three(times)
    cells = [" + ".join(kinds), f"{at - since:.1f}", str(len(owed)), p50, p99]
    return [*cells, "-" if late else most, str(late)]


def _three(values: Sequence[float]) -> list[str]:
    if not values:
        return ["-", "-", "-"]
    return [f"{value:.2f}" for value in (percentile(values, 0.5), percentile(values, 0.99), max(values))]


def percentile(values: Iterable[float], share: float) -> float:
    """The smallest value that so many of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def spread(values: Sequence[float]) -> str:
    """p50, p99 and the largest, in milliseconds."""
    if not values:
        return ""
    p50, p99, most = (1000 * value for value in (percentile(values, 0.5), percentile(values, 0.99), max(values)))
    return f"p50 {p50:.0f} ms, p99 {p99:.0f} ms, max {most:.0f} ms"


def _said(one: Exchange) -> dict[str, Any]:
    return one.said if isinstance(one.said, dict) else {}


def _at(timestamp: str) -> float:
    return datetime.fromisoformat(timestamp).timestamp()


def kinds_of(evidence: Evidence) -> dict[str, int]:
    """How many sessions of each kind were accepted."""
    counts = Counter(session.plan.kind for session in evidence.sessions if session.id)
    return {kind: counts[kind] for kind in (*KINDS, "watched")}
