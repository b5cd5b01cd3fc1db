"""Short runs of `bench.chaos` and `bench.leaks`: what the full ones prove with hundreds of faults and thousands of streams."""

from typing import NamedTuple

import gevent
import pytest

from bench.chaos import experiment
from bench.chaos.plan import FAULTS, KINDS, Options
from bench.chaos.report import Report
from bench.leaks import Leaks, measure
from tests.conftest import missing, nothing_left_running
from tests.neighbours.redis import program

STREAMS = 60

pytestmark = pytest.mark.timeout(240)


class Runs(NamedTuple):
    """Both runs, when they have ended; `get` gives the result, or raises what the run has raised."""

    chaos: "gevent.Greenlet[..., Report]"
    leaks: "gevent.Greenlet[..., Leaks]"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Both at the same time, with neighbours of their own: each waits most of its time."""
    if program() is None:
        missing("redis-server")
    with nothing_left_running():
        options = Options(streams=STREAMS, concurrency=25, faults=12, seed=1, folder=tmp_path_factory.mktemp("chaos"))
        both = Runs(
            gevent.spawn(experiment.run, options, lambda progress: None),
            gevent.spawn(measure, 100, 100, 0, tmp_path_factory.mktemp("leaks"), lambda text: None),
        )
        try:
            gevent.joinall(both)
        finally:
            gevent.killall(both)
    return both


def test_a_short_chaos_run_ends_with_zeros(runs: Runs) -> None:
    report = runs.chaos.get()

    print(report.text())
    assert report.failures == [], "\n\n".join(report.failures)
    happened = {row.what: row for row in report.rows}
    assert happened["streams accepted"].count == STREAMS
    assert all(kind in happened["streams accepted"].detail for kind in KINDS)
    assert all(kind in happened["faults"].detail for kind in (*FAULTS, "drop"))


def test_nothing_is_left_of_streams_of_every_kind(runs: Runs) -> None:
    leaks = runs.leaks.get()

    print(leaks.text())
    assert leaks.findings == []
    assert [held.generations + held.viewers for held in leaks.end] == [0, 0]
