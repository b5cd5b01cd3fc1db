"""Every block of code in the documentation is run, or says why it is not; code in a sentence names what there is."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import doc_blocks
from tests.browser import programs
from tests.conftest import missing
from tests.doc_blocks import Block
from tests.doc_scenes import NEEDS, SCENES, Stage
from tests.neighbours import redis
from tests.neighbours.provider import ProviderServer
from tests.service import ROOT

BLOCKS = doc_blocks.every_block()
RUN = [block for block in BLOCKS if block.scene in SCENES]
NAMES = list(SCENES)


@pytest.fixture(scope="module")
def stage(provider_process: ProviderServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """What the scenes share."""
    stage = Stage(tmp_path_factory.mktemp("stage"), provider_process, programs())
    yield stage
    stage.close()


def play(block: Block, stage: Stage, folder: Path) -> None:
    """Runs a block in its scene. AssertionError where it does not work; skips where this machine has no program for it."""
    there = {"chromium": programs() is not None, "node": shutil.which("node") is not None}
    if redis.program() is None:
        missing("redis-server")
    if block.scene in NEEDS and not there[NEEDS[block.scene]]:
        missing(NEEDS[block.scene])
    SCENES[block.scene](stage, block, folder)


# The documentation


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.id)
def test_every_block_says_how_it_is_run_or_why_not_and_is_what_it_is_called(block: Block) -> None:
    assert not (fault := doc_blocks.fault(block, NAMES)), f"{block.place}: the block {fault}"


@pytest.mark.parametrize("block", RUN, ids=lambda block: block.id)
def test_every_block_that_can_be_run_does_what_it_says(block: Block, stage: Stage, tmp_path: Path) -> None:
    try:
        play(block, stage, tmp_path)
    except AssertionError as error:
        pytest.fail(f"{block.place}, in the scene {block.scene}: {error}\n\n{block.script}", pytrace=False)


@pytest.mark.parametrize("page", doc_blocks.pages())
def test_every_piece_of_code_in_a_sentence_names_what_there_is(page: str) -> None:
    text = (ROOT / page).read_text()

    wrong = [f"`{code}`: {fault}" for code in doc_blocks.inline(text) for fault in doc_blocks.faults_of_code(code, page)]

    assert wrong + doc_blocks.stray_marks(text, page) == []


def test_blocks_have_names_of_their_own_and_every_scene_a_block() -> None:
    names = [block.id for block in BLOCKS]

    assert sorted(names) == sorted(set(names))
    assert {block.scene for block in BLOCKS} - {""} == set(SCENES)


def test_every_test_that_a_reason_names_exists() -> None:
    tests = {path.name: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    named = {name for block in BLOCKS for name in re.findall(r"\btest_\w+(?:\.py)?", block.reason or "")}

    assert [name for name in named if name not in tests and not any(f"def {name}(" in text for text in tests.values())] == []


def test_every_exception_is_still_needed() -> None:
    texts = "\n".join((ROOT / page).read_text() for page in doc_blocks.pages())

    assert [name for name in (*doc_blocks.OTHERS, *doc_blocks.MADE) if name not in texts] == []


# The harness itself, on small pages


def page(language: str, text: str, mark: str = "") -> Block:
    """The only block of a page."""
    comment = f"<!-- {mark} -->\n" if mark else ""
    (block,) = doc_blocks.blocks(f"# A page\n\nSo:\n\n{comment}```{language}\n{text}\n```\n", "docs/page.md")
    return block


def fault(language: str, text: str, mark: str = "") -> str:
    """What is said of it."""
    return doc_blocks.fault(page(language, text, mark), NAMES)


@pytest.mark.parametrize(
    ("language", "text", "mark", "said"),
    [
        ("", "make test", "", "has no language"),
        ("text", "make test", "", "is called text, and begins with the command make"),
        ("text", ".venv/bin/python wsgi.py", "", "is called text, and begins with the command .venv/bin/python"),
        ("text", "a picture", "run: shell", "is called text, and has a mark"),
        ("bash", "make test", "", "says neither in which scene"),
        ("js", "stop()", "", "says neither in which scene"),
        ("bash", "make test", "run: nowhere", "is run in 'nowhere', which is none of"),
        ("bash", "make test", "not run:", "is not run, and the reason is missing"),
        ("bash", "make test", "not run: too long", "is not run, and the reason is missing"),
        ("bash", "if true", "not run: it would have no end", "is no bash"),
        ("bash", "make tests", "not run: it would take a quarter of an hour", "make has no target tests"),
        ("bash", "python -m bench.kaos", "not run: it would take a quarter of an hour", "there is no bench/kaos.py"),
        ("bash", "python -m bench.leaks --flows 3", "not run: it would take long", "bench/leaks.py has no option --flows"),
        ("bash", "deploy/backup && deploy/restor x", "not run: it needs a Docker engine", "there is no deploy/restor"),
        ("bash", "docker compose --profile tsl up", "not run: it needs a Docker engine", "there is no profile tsl"),
        ("json", '{"ok": true,}', "", "is no json"),
        ("yaml", "a: [1", "", "is no yaml"),
        ("toml", "a = ", "", "is no toml"),
        ("ini", "[Service\nLimitNOFILE=1", "", "is no ini"),
        ("ini", "JWT_SECERT=x", "", "is no ini: not a variable of anything: JWT_SECERT"),
        ("dotenv", "MAX_STREAM_SECONDS=soon", "", "is no dotenv: MAX_STREAM_SECONDS"),
        ("dotenv", "MAX_STREAM_SECONDS", "", "is no dotenv: a line without a ="),
    ],
)
def test_a_block_that_hides_or_is_not_what_it_is_called_is_told(language: str, text: str, mark: str, said: str) -> None:
    assert fault(language, text, mark).startswith(said)


@pytest.mark.parametrize(
    ("language", "text", "mark"),
    [
        ("text", "make ─► test", "not there"),
        ("text", "$ make test\n200 passed", ""),
        ("bash", "make test  # all of them", "not run: it would take a quarter of an hour"),
        ("json", '{"ok": "…"}', ""),
        ("ini", "[Service]\nLimitNOFILE=2300\nEnvironment=A=b\nEnvironment=C=d", ""),
        (
            "dotenv",
            "JWT_SECRET=   # at least 32 bytes\nBASE_URL=https://ai.example.com  # and so on\nWEBHOOK_URL=http://n8n/",
            "",
        ),
    ],
)
def test_a_block_that_is_in_order_is_left_alone(language: str, text: str, mark: str) -> None:
    expected = "is called text, and begins with the command make" if mark == "not there" else ""

    assert fault(language, text, "" if mark == "not there" else mark) == expected


@pytest.mark.parametrize(
    ("scene", "text", "said"),
    [
        ("shell", "echo one\nfalse\necho two", r"exit status 1; it printed:\none\n$"),
        ("shell", "curl http://127.0.0.1:8000/models", "exit status 22"),
        ("shell", "curl http://127.0.0.1:8000/models | tail -1", "exit status 22"),
        ("shell", "echo $JWT_SECRET", "it has printed 1 secrets"),
        ("shell", "echo $NO_SUCH_VARIABLE", "NO_SUCH_VARIABLE: unbound variable"),
        ("shell-empty", "cat .env", "exit status 1"),
        ("serve", "echo over", "over"),
        ("outbox", '.venv/bin/python -m aistream callbacks show "$STREAM_ID-not"', "is not known"),
        ("node", "console.log(streamUrl.split('?')[0])", "the answer is not printed"),
        ("node", 'import { flow } from "aistream-client"', "does not provide an export named 'flow'"),
        ("browser", "new EventSource(streamUrl)", "the answer is not seen, but 'Stop'"),
        ("browser", "appendix(streamUrl)", "appendix is not defined"),
        ("browser", "new EventSource(streamUrl.replace('stream', 'steam')).onmessage = (e) => append(e.data)", "404"),
        ("n8n-claims", "{{ JSON.stringify({ sub: 'n8n' }) }}", "token_claim_missing"),
        ("n8n-claims", "{ sub: 'n8n' }", "no expression"),
        ("n8n-body", "{{ JSON.stringify({ n8nToken: $json.token, resumeUrl: $execution.resumeUrl }) }}", "prompt: is missing"),
        ("n8n-body-lines", "fallbackModel: 'gpt-4o-mini',", "fallbackModel"),
        ("redis-cli", "ACL SETUSER aistream +nothing", "Unknown command"),
    ],
)
def test_a_block_that_does_not_work_fails(
    scene: str, text: str, said: str, stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.doc_scenes.PATIENCE", 1.0)

    with pytest.raises(Exception) as failure:
        play(page("x", text, f"run: {scene}"), stage, tmp_path)

    assert re.search(said, str(failure.value))


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("js", 'import { stream } from "aistream-client";\nfor await (const chunk of stream(streamUrl)) append(chunk);'),
        (
            "js",
            'import { stream } from "http://127.0.0.1:8000/aistream.mjs";\nfor await (const it of stream(streamUrl)) append(it);',
        ),
        (
            "html",
            '<p id="answer"></p>\n<script src="http://127.0.0.1:8000/aistream.js"></script>\n'
            "<script>aistream.connectToStream(streamUrl, { onMessage: (chunk) => answer.append(chunk) });</script>",
        ),
    ],
    ids=["a bundler's import", "an import of the service's module", "a page"],
)
def test_a_page_is_served_as_it_stands_and_has_the_client(language: str, text: str, stage: Stage, tmp_path: Path) -> None:
    play(page(language, text, "run: browser"), stage, tmp_path)


def test_a_block_that_does_not_end_is_ended(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.doc_scenes.LIMIT", 0.5)

    with pytest.raises(AssertionError, match="it did not end"):
        play(page("bash", "sleep 600", "run: shell-empty"), stage, tmp_path)


def test_a_block_that_goes_on_is_run_behind_those_before_it() -> None:
    first, second, third, other = doc_blocks.blocks(
        "<!-- run: shell-empty -->\n```bash\none\n```\n\n- list\n\n  <!-- run: serve, continued -->\n  ```bash\n  two\n  ```\n\n"
        "<!-- run: serve, continued -->\n```bash\nthree\n```\n\n<!-- run: shell -->\n~~~bash\nfour\n~~~\n",
        "README.md",
    )

    assert [block.scene for block in (first, second, third, other)] == ["shell-empty", "serve", "serve", "shell"]
    assert [block.script for block in (first, second, third, other)] == ["one\n", "one\ntwo\n", "one\ntwo\nthree\n", "four\n"]


def test_a_block_keeps_its_name_when_lines_are_added_above_it() -> None:
    text = "# A page\n\n## How it's done: *twice*\n\n```text\na\n```\n\n    indented\n"

    names = [(block.id, block.language) for block in doc_blocks.blocks(f"An opening.\n\n{text}", "README.md")]

    assert names == [("README.md#how-it-s-done-twice-1", "text"), ("README.md#how-it-s-done-twice-2", "")]


def test_a_mark_away_from_its_block_is_told() -> None:
    text = "<!-- run: shell -->\n\n```bash\ntrue\n```\n\nAs in `<!-- run: shell -->`, or\n\n```text\n<!-- run: shell -->\n```\n"

    assert doc_blocks.stray_marks(text, "README.md") == ["README.md:1: a mark that is not on the line before a block"]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("make benhc", ["make has no target benhc"]),
        ('make bench BENCH_ARGS="stages"', []),
        ("BENCH_ARG=stages make bench", ["BENCH_ARG is no variable"]),
        ("PORT=9000 make run", []),
        ("python -m aistream callbacks lst", ["aistream callbacks has no command lst"]),
        ("aistream callbacks list --stat dead", ["aistream callbacks list: No such option '--stat'."]),
        ("aistream callbacks …", []),
        (".venv/bin/python -m aistream callbacks show <id>", []),
        ("python -m bench.chaos --streams 3", []),
        ("MAX_STREAMS_SECONDS", ["MAX_STREAMS_SECONDS is no variable"]),
        ("MAX_STREAM_SECONDS=60", []),
        ("RESUME_URL_REWRITES=a=b", ["RESUME_URL_REWRITES is no variable"]),
        ("aistream/stroe.py", ["there is no aistream/stroe.py"]),
        ("aistream/lua/*.lua", []),
        ("tests/n8n/test_nodes.py", ["there is no tests/n8n/test_nodes.py"]),
        ("deploy/nginx/", []),
    ],
)
def test_what_a_sentence_names_and_there_is_not_is_told(code: str, said: list[str]) -> None:
    found = doc_blocks.faults_of_code(code, "README.md")

    assert found == said
