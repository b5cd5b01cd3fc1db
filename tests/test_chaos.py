"""A short run of `bench.chaos`: what the full one proves with hundreds of faults, with a few of each kind."""

from pathlib import Path

import pytest

from bench.chaos.experiment import run
from bench.chaos.plan import FAULTS, KINDS, Options
from tests.conftest import missing
from tests.neighbours.redis import program


@pytest.mark.timeout(240)
def test_a_short_chaos_run_ends_with_zeros(tmp_path: Path) -> None:
    if program() is None:
        missing("redis-server")
    options = Options(streams=60, concurrency=25, faults=12, seed=1, folder=tmp_path)

    report = run(options, lambda progress: None)

    print(report.text())
    assert report.failures == [], "\n\n".join(report.failures)
    happened = {row.what: row for row in report.rows}
    assert happened["streams accepted"].count == options.streams
    assert all(kind in happened["streams accepted"].detail for kind in KINDS)
    assert all(kind in happened["faults"].detail for kind in (*FAULTS, "drop"))
