"""The documentation's claims: every test that it names exists, and README's table is the one that is shown to hold."""

import re
from pathlib import Path

import pytest

from aistream.config import settings
from bench.chaos.plan import FAULTS, KINDS
from tests.service import ROOT

SURVIVAL = ROOT / "docs" / "survival.md"
TESTS = {
    name for path in (ROOT / "tests").glob("test_*.py") for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
}


def rows(path: Path, heading: str) -> list[list[str]]:
    """The cells of the first table under a heading, without its head."""
    section = path.read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.parametrize("page", sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")]), ids=lambda page: page.name)
def test_every_test_that_a_page_names_exists(page: Path) -> None:
    named = set(re.findall(r"`(test_\w+)`", page.read_text()))

    assert named - TESTS == set()


def test_every_row_of_readmes_table_is_backed_by_named_tests() -> None:
    promised = [row[0] for row in rows(ROOT / "README.md", "What survives what")]
    shown = {row[0]: row[1] for row in rows(SURVIVAL, "The table")}

    assert len(promised) > 10 and promised == list(shown)
    assert [row for row, tests in shown.items() if not re.search(r"`test_\w+`", tests)] == []


def test_every_rule_has_its_tests() -> None:
    rules = rows(SURVIVAL, "The rules")

    assert [int(rule.split(".")[0]) for rule, _ in rules] == list(range(1, 14))
    assert all(re.search(r"`test_\w+`", tests) for _, tests in rules)


def test_every_row_of_what_is_kept_has_its_test_or_a_reason() -> None:
    kept = rows(ROOT / "docs" / "operations.md", "What is kept, where and how long")

    assert len(kept) > 15 and {len(row) for row in kept} == {5}
    assert [row[0] for row in kept if not re.search(r"^Reason: .|`test_\w+`", row[4])] == []


def test_what_is_kept_names_settings_and_keys_that_there_are() -> None:
    kept = rows(ROOT / "docs" / "operations.md", "What is kept, where and how long")
    settings_named = {name for row in kept for name in re.findall(r"`([A-Z][A-Z_]+_[A-Z_]+)`", row[3])}
    keys_named = {key for row in kept for key in re.findall(r"`([a-z]+)(?::<\w+>)*`", row[1])}
    map_of_keys = (ROOT / "aistream" / "scripts.py").read_text().partition('"""')[2].partition('"""')[0]

    assert {name for name in settings_named if not name.startswith("EXECUTIONS_")} - settings().keys() == set()
    assert keys_named == {*re.findall(r"aistream:\{0\}:([a-z]+)", map_of_keys), "demo"}


def test_every_rule_of_the_security_checklist_has_its_tests_or_its_reason() -> None:
    section = (ROOT / "docs" / "security.md").read_text().partition("\n## The checklist\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ") and not line.startswith("| rule |")]
    shown = {cells[0]: cells[2] for line in lines if (cells := [cell.strip() for cell in line.strip("|").split("|")])}

    assert len(shown) == len(lines) > 50
    assert [rule for rule, by in shown.items() if not re.match(r"(`test_\w+`|Refused: \w|Reason: \w)", by) or "TODO" in by] == []


def test_the_table_names_kinds_of_chaos_that_there_are() -> None:
    named = {kind for row in rows(SURVIVAL, "The table") for kind in re.findall(r"`([a-z-]+)`", row[2])}

    assert named - {*KINDS, *FAULTS, "drop"} == set()
    assert {*FAULTS, "drop"} - named == set()


def test_the_chaos_run_that_is_shown_was_a_full_one_and_ended_with_zeros() -> None:
    page = (ROOT / "docs" / "chaos.md").read_text()
    counts = dict(re.findall(r"^\| \*{0,2}([^|*]+?)\*{0,2} \| (\d+) \|", page, re.MULTILINE))
    zeros = re.findall(r"^\| \*\*([^|*]+)\*\* \| (\d+) \| must be 0", page, re.MULTILINE)

    assert int(counts["streams accepted"]) >= 2_000 and int(counts["faults"]) >= 200
    assert len(zeros) == 9 and {count for _, count in zeros} == {"0"}
    owed, got, lost = (int(counts[what]) for what in ("callbacks owed", "callbacks got", "sessions that could not be saved"))
    assert owed == got + lost


def test_the_run_against_a_failing_n8n_that_is_shown_was_a_full_one_and_ended_with_zeros() -> None:
    page = (ROOT / "docs" / "outbox.md").read_text()
    counts = dict(re.findall(r"^\| \*{0,2}([^|*]+?)\*{0,2} \| (\d+) \|", page, re.MULTILINE))
    zeros = re.findall(r"^\| \*\*([^|*]+)\*\* \| (\d+) \| must be 0", page, re.MULTILINE)

    assert int(counts["endings made"]) >= 5_000 and int(counts["workers killed"]) >= 20
    assert len(zeros) == 8 and {count for _, count in zeros} == {"0"}
    owed, delivered, dead = (int(counts[what]) for what in ("endings made", "callbacks delivered", "callbacks dead"))
    assert owed == delivered + dead and counts["callbacks still owed, or unknown"] == "0"
