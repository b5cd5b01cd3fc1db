"""The project's own benchmarks: each part runs, what is wrong is noticed, and page, plots and results belong together."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import fleet, hotpath, page, plots, stages
from bench.load import STAMP_NS, STAMPS
from bench.parts import PARTS
from tests.service import ROOT, SECRET

RESULTS: dict[str, Any] = json.loads(page.RESULTS.read_text())


def shape(value: Any) -> Any:
    """Names and kinds of a value, without its figures: of a list those of its first element."""
    if isinstance(value, dict):
        return {name: shape(one) for name, one in value.items() if name != "wrong"}
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    return "number" if isinstance(value, (int, float)) and not isinstance(value, bool) else type(value).__name__


@pytest.fixture(scope="module")
def running() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """All parts, beside one another: most of their time is waiting."""
    command, pipes = [sys.executable, "-m", "bench", "--quick"], {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    started = {part: subprocess.Popen([*command, part], cwd=ROOT, text=True, **pipes) for part in PARTS}
    yield started
    for process in started.values():
        process.send_signal(signal.SIGINT)
        process.communicate()


@pytest.mark.parametrize("part", PARTS)
def test_each_part_runs_and_gives_what_the_page_is_drawn_from(part: str, running: dict[str, subprocess.Popen[str]]) -> None:
    out, err = running[part].communicate()

    assert running[part].returncode == 0, err
    assert shape(json.loads(out)) == shape({name: RESULTS[name] for name in ("facts", part)})


def test_page_plots_and_results_belong_together() -> None:
    text, drawn = page.PAGE.read_text(), page.drawn(RESULTS)
    on_disk = {path.name: path.read_text() for path in page.FOLDER.glob("*.svg")}

    assert text == page.page(text, RESULTS), "run `python -m bench --report`"
    assert on_disk == drawn, "run `python -m bench --report`"
    assert [name for name in page.TABLES if f"<!-- bench: {name} -->" not in text] == []
    assert [name for name in drawn if f"](performance/{name})" not in text] == []


def test_a_report_changes_nothing_but_the_tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(page, "FOLDER", tmp_path)
    monkeypatch.setattr(page, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(page, "PAGE", tmp_path / "page.md")
    page.PAGE.write_text("before\n<!-- bench: batches -->old<!-- bench: batches ends -->\nafter\n")

    page.write(RESULTS)

    lines = page.PAGE.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("before", "after")
    assert "old" not in page.PAGE.read_text() and len(lines) == 8 + len(RESULTS["batches"]["sizes"])
    assert json.loads(page.RESULTS.read_text()) == RESULTS


@pytest.mark.parametrize(
    "drawn",
    [
        plots.bars("<title>", "µs", {"a & b": [1.5, 2], "nothing": [0, 0]}, ("first", "second")),
        plots.line("title", "x", "y", [(1, 250.0), (50, 12.5)], logarithmic=True),
        plots.line("title", "x", "y", [(0, 0)]),
    ],
)
def test_a_plot_is_svg_with_all_its_labels_inside(drawn: str) -> None:
    root = ElementTree.fromstring(drawn)
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    texts = [element for element in root.iter() if element.tag.endswith("text")]

    assert len(texts) > 4
    assert all(0 <= float(text.attrib["x"]) <= width and 0 <= float(text.attrib["y"]) <= height for text in texts)


def of(path: str, *functions: str) -> list[str]:
    """Frames of functions in one file."""
    return [f"{function} ({path}:1)" for function in functions]


SITE = "/venv/lib/site-packages/"
GENERATION = of("/tree/aistream/generation.py", "Generation._run", "Generation._ask_provider")
ANSWER = [*GENERATION, *of("/tree/aistream/providers/wire.py", "read", "server_events")]
VIEWER = of(f"{SITE}gunicorn/workers/base_async.py", "AsyncWorker.handle", "AsyncWorker.handle_request")
SOCKET = of(f"{SITE}gevent/_socketcommon.py", "SocketMixin.recv")
HUB = of(f"{SITE}gevent/hub.py", "Hub.run")


@pytest.mark.parametrize(
    ("frames", "stage"),
    [
        (HUB, stages.HUB),
        ([*ANSWER, *of(f"{SITE}httpcore2/_sync/http11.py", "HTTP11Connection._receive_event"), *SOCKET], stages.READ),
        ([*ANSWER, *of(f"{SITE}openai/_response.py", "APIResponse.iter_bytes")], stages.READ),
        ([*HUB, *of("/tree/aistream/providers/transport.py", "Body.readable"), *SOCKET], stages.READ),
        (
            [*GENERATION, *of(f"{SITE}openai/_base_client.py", "f"), *of(f"{SITE}httpx2/a.py", "f")],
            stages.ASK,
        ),
        ([*GENERATION, *of(f"{SITE}openai/_base_client.py", "f"), *of("/tree/aistream/providers/transport.py", "f")], stages.ASK),
        (ANSWER, stages.DECODE),
        ([*HUB, *of("/tree/aistream/providers/transport.py", "f"), *of("/tree/aistream/log.py", "Log.append")], stages.LOG),
        (GENERATION, stages.LOG),
        ([*VIEWER, *of("/tree/aistream/log.py", "Log.frames")], stages.FRAMES),
        ([*VIEWER, *of(f"{SITE}gunicorn/http/wsgi.py", "Response.write"), *SOCKET], stages.SEND),
        ([*VIEWER, *of("/tree/aistream/viewing.py", "Viewer.stream", "Viewer._wait")], stages.SEND),
        (VIEWER, stages.SEND),
        ([*VIEWER, *of(f"{SITE}flask/app.py", "Flask.wsgi_app")], stages.HTTP),
        ([*VIEWER, *of("/tree/aistream/api/init.py", "accept"), *of("/tree/aistream/store.py", "Store.create")], stages.INIT),
        ([*VIEWER, *of("/tree/aistream/api/stream.py", "stream")], stages.VIEW),
        ([*of("/tree/aistream/writer.py", "LogWriter.run"), *of(f"{SITE}redis/connection.py", "f"), *SOCKET], stages.WRITER),
        ([*of("/tree/aistream/delivery.py", "Delivery._attempt"), *of(f"{SITE}urllib3/a.py", "f"), *SOCKET], stages.END),
        ([*GENERATION, *of("/tree/aistream/generation.py", "Generation.finish")], stages.END),
        ([*GENERATION, *of(f"{SITE}structlog/_base.py", "f")], stages.TELEMETRY),
        ([*of("/tree/aistream/background.py", "Background._repeat"), *of("/tree/aistream/store.py", "f")], stages.LOOPS),
        (of(f"{SITE}unheard/of.py", "f"), stages.OTHER),
    ],
)
def test_a_stack_belongs_to_the_stage_of_its_innermost_frame_that_tells(frames: list[str], stage: str) -> None:
    assert stages.stage_of(frames) == stage


@pytest.mark.parametrize("path", sorted((ROOT / "aistream").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_of_the_service_has_its_stage_or_works_for_its_caller(path: Path) -> None:
    told = stages.stage_of(of(str(path), "f"))

    assert (told == stages.OTHER) == (path.relative_to(ROOT / "aistream").parts[0].removesuffix(".py") in stages.NEUTRAL)


def test_threads_that_wait_for_work_are_no_samples() -> None:
    idle = ";".join(of(f"{SITE}gevent/threadpool.py", "_WorkerGreenlet.run"))

    counts = stages.counted([f"{';'.join(ANSWER)} 3\n", f"{';'.join(HUB)} 2\n", f"{idle} 1000\n"])

    assert counts == {stages.DECODE: 3, stages.HUB: 2}


UNITS = fleet.Units(
    pace=20,
    token_us=39,
    redis_token_us=2,
    setup_ms=1,
    redis_setup_ms=0.5,
    stream_kib=64,
    worker_kib=102_400,
    stream_files=2,
    kept_bytes=50_000,
    provider_bytes=400,
    viewer_bytes=100,
    ports=28_000,
    files=65_536,
)


def test_the_arithmetic_of_a_fleet_can_be_done_by_hand() -> None:
    many = fleet.fleet(UNITS, 1_000_000)

    # A stream: 20 · (39 + 1000 / 1000) = 800 µs of its worker, 20 · (2 + 500 / 1000) = 50 µs of Redis, each second.
    assert [limit.streams for limit in fleet.limits(UNITS)] == [1_000, 10_000, 20_000, 28_000, 32_618]
    assert (many.tokens_per_second, many.sessions_per_second) == (20_000_000, 20_000)
    assert (round(many.cores), many.workers) == (800, 1_000)
    assert round(many.memory, 2) == round((64_000_000 + 102_400_000) / 2**20, 2)
    assert (round(many.redis_cores), many.shards) == (50, 63)
    assert round(many.redis_memory, 2) == round((500_000 + 20_000 * 1_800) * 50_000 / 2**30, 2)
    assert (many.from_provider, many.to_viewers) == (64, 16)
    assert many.breaks_first.startswith("its core")
    assert fleet.fleet(UNITS, 1_000).breaks_first == "nothing"


# ---- What is wrong with a stream is noticed ----


def event(text: str, name: str = "") -> bytes:
    """A chunk with an event."""
    data = f"id: 1-1\n{name}data: {text}\n\n".encode()
    return b"%x\r\n%b\r\n" % (len(data), data)


def token(number: int) -> str:
    """A token's text, sent now."""
    own = ".0" if number == 0 else ""
    return f"{time.monotonic_ns() // STAMP_NS % STAMPS}.{number}{own} "


class Broken:
    """A service whose streams are these bytes; each request has a connection of its own."""

    def __init__(self, body: bytes) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._body = body
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        for _ in range(2):
            sock, _ = self._listener.accept()
            with sock:
                asked = sock.recv(65_536)
                head = b"HTTP/1.1 200 OK\r\n"
                if asked.startswith(b"POST"):
                    body = b'{"streamUrl": "http://127.0.0.1:%d/stream/1?access_token=x"}' % self.port
                    sock.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
                else:
                    sock.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n" + self._body)

    def close(self) -> None:
        """Both requests have come."""
        self._thread.join()
        self._listener.close()


@pytest.fixture
def watched(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """What the viewers say of one stream of three tokens with this body."""
    broken = Broken(request.param)
    job = {
        **{"init_port": broken.port, "model": "any", "streams": 1, "tokens": 3, "per_second": 100.0, "at_once": 1, "until": 10.0},
        **{"begin": time.monotonic(), "window": [0, 10], "secret": SECRET, "resume_url": "http://127.0.0.1:9/resume"},
    }
    command = [sys.executable, "-m", "bench.load.viewers"]
    done = subprocess.run(command, cwd=ROOT, input=json.dumps(job), capture_output=True, text=True, check=True)
    broken.close()
    yield json.loads(done.stdout)


ALL = [event(token(number)) for number in range(3)]
DONE = event("[DONE]")
LAST = b"0\r\n\r\n"


@pytest.mark.parametrize("watched", [b"".join([*ALL, DONE, LAST])], indirect=True, ids=["perfect"])
def test_a_perfect_stream_is_well(watched: dict[str, Any]) -> None:
    assert (watched["ok"], watched["failed"], watched["wrong"], watched["tokens"]) == (1, 0, {}, 3)


@pytest.mark.parametrize(
    ("watched", "wrong"),
    [
        (b"".join([*ALL[:2], ALL[1], DONE, LAST]), "token 1 came where 2 was due"),
        (b"".join([ALL[0], ALL[2], DONE, LAST]), "token 2 came where 1 was due"),
        (b"".join([*ALL[:2], DONE, LAST]), "[DONE], 1 tokens too early"),
        (b"".join([*ALL, LAST]), "it ended without [DONE]"),
        (b"".join(ALL), "the line broke"),
        (ALL[0] + event("{}", "event: error\n"), "id: 1-1\nevent: error\ndata: {}"),
    ],
    indirect=["watched"],
    ids=["twice", "lost", "early", "no-done", "broken", "error"],
)
def test_what_is_wrong_with_a_stream_is_noticed(watched: dict[str, Any], wrong: str) -> None:
    assert (watched["ok"], watched["failed"], watched["wrong"]) == (0, 1, {wrong: 1})


# ---- Two commits compared ----


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of its own with this tree's service in its one commit."""
    root = tmp_path / "repository"
    root.mkdir()
    shutil.copytree(ROOT / "aistream", root / "aistream", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("wsgi.py", "gunicorn.conf.py"):
        shutil.copy(ROOT / name, root)
    who = {f"GIT_{role}_{what}": "test" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message", "all"]):
        subprocess.run(["git", *command], cwd=root, check=True, env=os.environ | who)
    monkeypatch.setattr(hotpath, "ROOT", root)
    return root


def test_two_commits_are_compared_stage_by_stage(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = hotpath.main(["--compare", "HEAD", "--rounds", "1", "--quick"])

    out = capsys.readouterr().out
    listed = subprocess.run(["git", "worktree", "list"], cwd=repository, capture_output=True, text=True, check=True).stdout
    assert code == 0
    told = (hotpath.TOKEN, hotpath.SESSION, hotpath.TOTAL, hotpath.SETUP, "HEAD", "ratio")
    assert [what for what in told if what not in " ".join(out.split())] == []
    assert len([stage for stage in stages.STAGES if f"│ {stage} " in out]) > 1
    assert len(listed.splitlines()) == 1


def test_an_unknown_commit_is_one_clear_line(repository: Path) -> None:
    with pytest.raises(SystemExit) as exit_:
        hotpath.main(["--compare", "no-such-commit"])

    assert exit_.value.code == "git knows no commit no-such-commit"


def test_the_ways_to_wait_for_a_token_are_measured_beside_one_another() -> None:
    ran = subprocess.run([sys.executable, "-m", "bench.waiting", "0.3"], cwd=ROOT, capture_output=True, text=True, check=True)

    figures = [line.split() for line in ran.stdout.splitlines()[1:]]
    assert [name for name, *_ in figures] == ["recv", "wait", "watcher", "pump"]
    assert all(float(spent) > 0 for _, spent, *_ in figures)
