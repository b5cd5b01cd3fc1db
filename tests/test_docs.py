"""The documentation's claims: every link leads somewhere, every test that it names exists, and what survives what is the
table that is shown to hold."""

import json
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from aistream.config import settings
from bench.chaos.plan import FAULTS, KINDS
from tests import markdown
from tests.service import ROOT

SURVIVAL = ROOT / "docs" / "survival.md"
TESTS = {
    name for path in (ROOT / "tests").glob("test_*.py") for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
}

PAGES = markdown.pages(ROOT)


def rows(path: Path, heading: str) -> list[list[str]]:
    """The cells of the first table under a heading, without its head."""
    section = path.read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def linked(page: Path, target: str) -> tuple[Path, str]:
    """The file that a relative link of a page leads to, and the anchor in it, or ""."""
    path, _, anchor = target.partition("#")
    return ((page.parent / unquote(path)).resolve() if path else page), unquote(anchor)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    dead = []

    for target in markdown.links(page.read_text()):
        if re.match(r"[a-z][a-z0-9+.-]*:", target):
            parts = urlsplit(target)
            sound = parts.scheme == "mailto" or (parts.scheme == "https" and "." in (parts.hostname or ""))
        else:
            file, anchor = linked(page, target)
            # GitHub makes anchors for Markdown; in other files it knows lines alone.
            sound = file.is_relative_to(ROOT) and file.exists() and (not anchor or file.suffix == ".md")
            sound = sound and (not anchor or anchor in markdown.anchors(file.read_text()))
        if not sound:
            dead.append(target)

    assert dead == []


def test_every_page_of_docs_is_reached_from_its_index() -> None:
    index = ROOT / "docs" / "README.md"
    reached, ahead = set(), [index]

    while ahead:
        page = ahead.pop()
        if page in reached or page.suffix != ".md" or not page.is_relative_to(ROOT / "docs"):
            continue
        reached.add(page)
        ahead += [linked(page, target)[0] for target in markdown.links(page.read_text()) if not re.match(r"[a-z]+:", target)]

    assert {page for page in PAGES if page.is_relative_to(ROOT / "docs")} - reached == set()
    direct = {linked(index, target)[0] for target in markdown.links(index.read_text())}
    assert set((ROOT / "docs").glob("*.md")) - direct == {index}


def test_the_pages_made_from_code_are_current(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "scripts" / "write-docs", tmp_path], check=True, timeout=60)

    made = {path.name: path.read_text() for path in tmp_path.iterdir()}

    assert made.keys() == {"configuration.md", "http-reference.md"}
    assert [name for name, text in made.items() if (ROOT / "docs" / name).read_text() != text] == []  # make docs


def test_every_setting_has_an_anchor_of_its_own() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()

    assert {name.lower() for name in settings()} - markdown.anchors(page) == set()


def test_every_operation_and_schema_has_an_anchor_of_its_own() -> None:
    document = json.loads((ROOT / "docs" / "openapi.json").read_text())
    operations = {one["operationId"] for methods in document["paths"].values() for one in methods.values()}
    schemas = {f"schema-{name}" for name in document["components"]["schemas"]}

    page = (ROOT / "docs" / "http-reference.md").read_text()

    assert (operations | schemas) - markdown.anchors(page) == set()


@pytest.mark.parametrize(
    ("text", "anchors"),
    [
        ("# What survives what", {"what-survives-what"}),
        ("## GET /stream/&lt;id&gt;?a=…", {"get-streamida"}),
        ("## `make run`, *now* and [here](there.md)", {"make-run-now-and-here"}),
        ("## Same\n\n## Same\n\n## Same", {"same", "same-1", "same-2"}),
        ("## Same\n\n## Same 1\n\n## Same", {"same", "same-1", "same-2"}),
        ("```bash\n# no heading\n```\n## A_b – Ü", {"a_b--ü"}),
        ('<a id="JWT_SECRET"></a>', {"JWT_SECRET"}),
    ],
)
def test_an_anchor_is_what_github_makes_of_a_heading(text: str, anchors: set[str]) -> None:
    assert markdown.anchors(text) == anchors


def test_a_link_is_found_in_each_form_and_none_in_code() -> None:
    text = (
        '[![a](b.png)](c.md#d "title")\n<img src="e.png">\n[f]: g.md\n<https://h.example>\n'
        "`[no](no)`\n```text\n[no](no)\n```\n<!-- [no](no) -->"
    )

    assert sorted(markdown.links(text)) == ["b.png", "c.md#d", "e.png", "g.md", "https://h.example"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_test_that_a_page_names_exists(page: Path) -> None:
    named = set(re.findall(r"`(test_\w+)`", page.read_text()))

    assert named - TESTS == set()


def test_every_row_of_what_survives_what_is_backed_by_named_tests() -> None:
    promised = [row[0] for row in rows(SURVIVAL, "What survives what")]
    shown = {row[0]: row[1] for row in rows(SURVIVAL, "How it is shown")}

    assert len(promised) > 10 and promised == list(shown)
    assert [row for row, tests in shown.items() if not re.search(r"`test_\w+`", tests)] == []


def test_readme_has_a_few_rows_of_what_survives_what_and_changes_none() -> None:
    text = (ROOT / "README.md").read_text()
    few = rows(ROOT / "README.md", "What survives what")
    all_rows = rows(SURVIVAL, "What survives what")

    assert len(few) == 5 and [row for row in few if row not in all_rows] == []
    assert f"[All {len(all_rows)} rows](docs/survival.md)" in text


def test_readme_is_short_and_starts_with_the_two_commands() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    commands = [line for line in lines if line.startswith("make ")]

    assert len(lines) <= 100
    assert [line.split("#")[0].strip() for line in commands[:2]] == ["make run", "make test"] and commands[1] in lines[:12]


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
    named = {kind for row in rows(SURVIVAL, "How it is shown") for kind in re.findall(r"`([a-z-]+)`", row[2])}

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
