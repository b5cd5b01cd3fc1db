"""Short runs of `bench.chaos` and `bench.leaks`: what the full ones prove with hundreds of faults and thousands of streams."""

from pathlib import Path

import pytest

from bench.chaos.experiment import run
from bench.chaos.plan import FAULTS, KINDS, Options
from bench.leaks import measure
from tests.conftest import missing
from tests.neighbours.redis import program


@pytest.fixture(autouse=True)
def _with_a_redis() -> None:
    if program() is None:
        missing("redis-server")


@pytest.mark.timeout(240)
def test_a_short_chaos_run_ends_with_zeros(tmp_path: Path) -> None:
    options = Options(streams=60, concurrency=25, faults=12, seed=1, folder=tmp_path)

    report = run(options, lambda progress: None)

    print(report.text())
    assert report.failures == [], "\n\n".join(report.failures)
    happened = {row.what: row for row in report.rows}
    assert happened["streams accepted"].count == options.streams
    assert all(kind in happened["streams accepted"].detail for kind in KINDS)
    assert all(kind in happened["faults"].detail for kind in (*FAULTS, "drop"))


def test_nothing_is_left_of_streams_of_every_kind(tmp_path: Path) -> None:
    leaks = measure(100, 100, 0, tmp_path, lambda text: None)

    print(leaks.text())
    assert leaks.findings == []
    assert [held.generations + held.viewers for held in leaks.end] == [0, 0]
