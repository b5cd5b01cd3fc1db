"""A short run of `bench.outbox`: what the full one shows with thousands of endings; and that its verdict excuses nothing else."""

from pathlib import Path

import pytest

from bench.outbox.experiment import run
from bench.outbox.n8n import Exchange, N8n, Reaction
from bench.outbox.plan import Options, plan_sessions
from bench.outbox.record import Evidence, Kept, Kill, Session
from bench.outbox.verdict import AFTER, AGAIN, judge
from tests.conftest import missing
from tests.neighbours.redis import program


def test_every_ending_is_delivered_once_or_dead_whatever_n8n_does(tmp_path: Path) -> None:
    if program() is None:
        missing("redis-server")
    options = Options(endings=150, seed=1, kills=1, pace=45.0, viewers=2, folder=tmp_path)

    report = run(options, lambda progress: None)

    print(report.text())
    assert report.failures == [], "\n\n".join(report.failures)
    assert report.count("endings made") >= options.endings
    assert report.count("endings made") == report.count("callbacks delivered") + report.count("callbacks dead")
    assert report.count("callbacks still owed, or unknown") == 0
    assert report.count("callbacks dead") > 0 and report.count("workers killed") == 1
    assert report.count("sent again after a clear refusal") > 0 and report.count("sent again after an ambiguous attempt") > 0
    assert report.count("streams watched meanwhile") > 0


@pytest.mark.parametrize(
    ("port", "killed_at", "owed", "excused"),
    [
        pytest.param(4001, 101.0, (1, 140.0), True, id="its worker was killed, and Redis held attempt 1 as owed"),
        pytest.param(4002, 101.0, (1, 140.0), False, id="another worker was killed"),
        pytest.param(4001, 101.0, (2, 140.0), False, id="Redis had another attempt"),
        pytest.param(4001, 101.0, None, False, id="Redis held it as settled"),
        pytest.param(4001, 98.0, (1, 140.0), False, id="killed before the attempt"),
        pytest.param(4001, 103.0, (1, 140.0), False, id="killed long after the settle was due"),
    ],
)
@pytest.mark.parametrize(("reaction", "rule"), [(Reaction.STARTED, AGAIN), (Reaction.FINISHED, AFTER)])
def test_a_callback_after_a_final_answer_is_excused_by_its_killed_worker_alone(
    port: int, killed_at: float, owed: tuple[int, float] | None, excused: bool, reaction: Reaction, rule: str
) -> None:
    plan = plan_sessions(Options(endings=20))[0]
    session, n8n = Session(plan, "/w", "s", accepted_at=99.0), N8n()
    n8n.taken["/w"] = 100.0
    for attempt, at in ((1, 100.0), (2, 141.0)):
        one = Exchange("/w", at, 4001, "msg_s", {"attempt": attempt}, "up", reaction, whole=True, over_at=at)
        n8n.exchanges.append(one)
    kill = Kill(killed_at, 7, frozenset({port}), {} if owed is None else {"s": owed})
    kept = {"s": Kept("delivered", 2, "/w")}

    rows, _, findings = judge(Evidence(Options(), [session], n8n, N8n(), [kill], [], kept, [], []))

    assert [finding.rule for finding in findings if finding.rule in (AGAIN, AFTER)] == ([] if excused else [rule])
    assert {row.what: row.count for row in rows}["sent again after a final answer, excused"] == int(excused)
