"""The browser's client: as the service serves it, and as it watches a real service under Node.js."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from aistream import errors
from aistream.errors import Refused
from aistream.events import Cursor, Failed
from aistream.sse import ENCODERS
from aistream.viewing import refusal_frame
from tests.conftest import MakeClient, missing
from tests.service import ROOT, Service, session_in, wait_until

StartService = Callable[..., Service]
PAGE = "https://chat.test"
PRODUCTION = {"DEV_MODE": "", "BASE_URL": "https://ai.test", "RESUME_URL_ALLOWED_ORIGINS": "http://n8n:5678"}
FILES = ["aistream.js", "aistream.mjs"]
FOLDER = ROOT / "aistream" / "static" / "client"
NODE_PATH = f"{sys.prefix}/bin:{os.environ['PATH']}"  # `make test` may have put Node.js into the venv


# ---- The routes ----


@pytest.mark.parametrize("environ", [{}, PRODUCTION], ids=["dev", "production"])
@pytest.mark.parametrize("name", FILES)
def test_the_client_is_served_as_javascript_that_browsers_keep(
    make_client: MakeClient, name: str, environ: dict[str, str]
) -> None:
    client = make_client(**environ)

    answer = client.get(f"/{name}")
    head = client.head(f"/{name}")

    assert (answer.status_code, answer.data) == (200, (FOLDER / name).read_bytes())
    assert answer.headers["Content-Type"] == "text/javascript; charset=utf-8"
    assert answer.headers["Cache-Control"] == "public, max-age=300"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert (head.status_code, head.data, head.headers["ETag"]) == (200, b"", answer.headers["ETag"])


@pytest.mark.parametrize("name", FILES)
def test_whoever_has_the_client_already_is_told_so(make_client: MakeClient, name: str) -> None:
    client = make_client()
    tag = client.get(f"/{name}").headers["ETag"]

    same = client.get(f"/{name}", headers={"If-None-Match": tag})
    other = client.get(f"/{name}", headers={"If-None-Match": '"another"'})

    assert (same.status_code, same.data, same.headers["ETag"]) == (304, b"", tag)
    assert same.headers["Cross-Origin-Resource-Policy"] == "cross-origin"
    assert other.status_code == 200


def test_two_builds_have_two_tags(make_client: MakeClient) -> None:
    client = make_client()

    assert len({client.get(f"/{name}").headers["ETag"] for name in FILES}) == 2


@pytest.mark.parametrize("name", FILES)
def test_every_page_may_embed_the_client_and_an_allowed_one_may_read_it(make_client: MakeClient, name: str) -> None:
    client = make_client(**PRODUCTION, ALLOWED_ORIGINS=PAGE)

    answers = [client.get(f"/{name}", headers={"Origin": one} if one else {}) for one in (PAGE, "https://other.test", None)]

    # A plain script of another origin is asked for without an Origin, a module with it.
    assert [one.headers["Cross-Origin-Resource-Policy"] for one in answers] == ["cross-origin"] * 3
    assert [one.headers.get("Access-Control-Allow-Origin") for one in answers] == [PAGE, None, None]
    assert {one.headers["Vary"] for one in answers} == {"Origin"}


def test_the_client_is_not_on_the_metrics_port(start_service: StartService, free_port: int) -> None:
    service = start_service(METRICS_PORT=str(free_port))

    statuses = [httpx.get(f"http://127.0.0.1:{port}/aistream.js").status_code for port in (service.port, free_port)]

    assert statuses == [200, 404]


# ---- What tells a refusal from an ending ----


@pytest.mark.parametrize("cursor", [None, Cursor(1, 5)], ids=["no-cursor", "cursor"])
@pytest.mark.parametrize("mode", ["text", "json"])
@pytest.mark.parametrize("code", sorted(errors._REFUSALS))
def test_only_a_refusal_that_may_pass_is_retryable_and_has_no_id(code: errors.Code, mode: str, cursor: Cursor | None) -> None:
    refused = Refused(code)
    refusal = refusal_frame(refused, cursor, mode)  # type: ignore[arg-type]
    ending = ENCODERS[mode](Cursor(1, 6), Failed(code, "It is so.", True))

    assert passes(refusal) == (not refused.final)
    assert not passes(ending)
    # 204 at the next try, for a browser that would come back for ever.
    assert (b"id: 1-5\n" in refusal) == (refused.final and cursor is not None)


def passes(frame: bytes) -> bool:
    """The rule of docs/http.md."""
    fields = [line.partition(b": ") for line in frame.splitlines()]
    told = json.loads(next(value for name, _, value in fields if name == b"data"))
    return told["retryable"] and all(name != b"id" for name, _, _ in fields)


# ---- It watches a real service ----

#: Prints what it is told, line by line.
WATCH = """
const { connectToStream, stream } = await import(process.argv[1]);
const say = (...told) => console.log(JSON.stringify(told));
let text = "";
const connection = connectToStream(process.argv[2], {
  onMessage: (chunk) => { text += chunk; say("message", chunk); },
  onStart: (start) => say("start", start),
  onUsage: (usage) => say("usage", usage),
  onOpen: ({ reconnects }) => say("open", reconnects),
  onReconnect: ({ reason }) => say("reconnect", reason),
  onComplete: (ending) => say("complete", ending, text),
  onError: (error) => say("error", error.code, error.status ?? null),
});
process.stdin.once("data", async () => say("cancel", await connection.cancel()));
await connection.done;
process.exit();
"""


class Watcher:
    """Node.js that watches with the client; `lines` is what it has been told so far."""

    def __init__(self, url: str, folder: Path) -> None:
        node = shutil.which("node", path=NODE_PATH)
        if node is None:
            missing("Node.js")
        self._out = folder / f"watcher-{session_in(url)}"
        with self._out.open("w") as out:
            module = (FOLDER / "aistream.mjs").as_uri()
            command = [node, "--input-type=module", "-e", WATCH, module, url]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=out, stderr=out)

    @property
    def lines(self) -> list[list[object]]:
        return [json.loads(line) for line in self._out.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def named(self, name: str) -> list[list[object]]:
        return [line for line in self.lines if line[0] == name]

    def cancel(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()

    def end(self) -> list[list[object]]:
        """Waits for its end; everything it was told."""
        assert self._process.stdin is not None
        assert self._process.wait(30) == 0, self._out.read_text()
        self._process.stdin.close()
        return self.lines

    def kill(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()


@pytest.fixture
def watch(tmp_path: Path):  # type: ignore[no-untyped-def]
    """Starts watchers, which end with the test."""
    watchers: list[Watcher] = []

    def start(url: str) -> Watcher:
        watchers.append(Watcher(url, tmp_path))
        return watchers[-1]

    yield start
    for one in watchers:
        one.kill()


WORDS = " ".join(f"w{i}" for i in range(40))


def test_an_answer_whose_line_is_cut_again_and_again_comes_whole(service: Service, watch: Callable[[str], Watcher]) -> None:
    url = service.stream_url(prompt=WORDS, model="echo/slow")

    watcher = watch(url)
    for count in (1, 2):
        wait_until(lambda count=count: len(watcher.named("open")) == count and watcher.lines[-1][0] == "message")
        httpx.post(f"{service.url}/demo/drop/{session_in(url)}")
        wait_until(lambda count=count: len(watcher.named("reconnect")) == count)
    told = watcher.end()

    assert told[-1] == ["complete", {"status": "completed", "finishReason": "stop"}, WORDS]
    assert [line[1] for line in told if line[0] == "open"] == [0, 1, 2]
    assert "".join(str(line[1]) for line in told if line[0] == "message") == WORDS
    assert (len(watcher.named("start")), len(watcher.named("usage"))) == (1, 1)


def test_a_service_that_is_away_is_waited_for(
    start_service: StartService, redis_url: str, watch: Callable[[str], Watcher]
) -> None:
    service = start_service(REDIS_URL=redis_url)
    url = service.stream_url(prompt="a b c", model="echo")
    service.stop()

    watcher = watch(url)
    wait_until(lambda: watcher.named("reconnect"))
    service.start()
    told = watcher.end()

    assert told[-1] == ["complete", {"status": "completed", "finishReason": "stop"}, "a b c"]


def test_a_viewer_too_many_for_the_worker_comes_back_until_there_is_room(
    start_service: StartService, watch: Callable[[str], Watcher]
) -> None:
    service = start_service(MAX_VIEWERS_PER_WORKER="1")
    first, second = (service.stream_url(prompt=WORDS, model=model) for model in ("echo/slow", "echo"))

    with service.watch(first) as events:
        next(events)
        watcher = watch(second)
        wait_until(lambda: watcher.named("reconnect"))
    told = watcher.end()

    assert watcher.named("reconnect")[0] == ["reconnect", "overloaded"]
    assert told[-1] == ["complete", {"status": "completed", "finishReason": "stop"}, WORDS]


def test_an_answer_is_stopped_by_its_viewer(service: Service, watch: Callable[[str], Watcher]) -> None:
    watcher = watch(service.stream_url(prompt=WORDS, model="echo/slow"))
    wait_until(lambda: watcher.named("message"))
    watcher.cancel()
    told = watcher.end()

    said = "".join(str(line[1]) for line in told if line[0] == "message")
    assert ["cancel", "cancelling"] in told
    assert ["complete", {"status": "cancelled", "finishReason": None}, said] in told
    assert said != WORDS and WORDS.startswith(said)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda url: url.partition("access_token=")[0], ["error", "token_missing", 401]),
        (lambda url: url.replace("/stream/", "/nowhere/"), ["error", "not_found", 404]),
    ],
    ids=["no-token", "nowhere"],
)
def test_what_is_final_is_told_with_its_code(
    service: Service, watch: Callable[[str], Watcher], change: Callable[[str], str], error: list[object]
) -> None:
    url = service.stream_url(prompt="a")

    told = watch(change(url).replace("/nowhere/", "/stream/nowhere-")).end()

    assert told == [error]
