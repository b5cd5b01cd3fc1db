"""No line of any log has a prompt, an answer, a token, a key or a resumeUrl's query: a net, and the proof that it holds.

The net is under every test (tests/leaks.py); here every path is driven that could print something, also those that no other
test takes.
"""

import contextlib
import errno
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from aistream import loglines
from aistream.telemetry import log as lines
from tests.conftest import MakeClient, missing, pytest_runtest_makereport
from tests.leaks import CANARY, leaks, secrets_of
from tests.neighbours.broken import LEAKS, WAYS
from tests.neighbours.provider import ProviderServer
from tests.neighbours.receiver import CUT, Answer, Receiver
from tests.neighbours.redis import RedisServer, program
from tests.service import ROOT, SECRET, Service, n8n_token, session_in, wait_until

EVENT_STREAM = {"Accept": "text/event-stream"}
#: What is in every canary of this run, and nowhere else.
MARK = f"c{uuid.uuid4().hex[:12]}"


def canary(where: str) -> str:
    """A word that must not be printed; it tells where it came from."""
    return f"{MARK}-{where}"


def raw(port: int, sent: bytes, *, whole: bool = True) -> None:
    """Sends these bytes, and no more if that is all; returns when there is an answer, or nothing is left to be said."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as sock, contextlib.suppress(ConnectionError):
        sock.sendall(sent)
        if not whole:
            sock.shutdown(socket.SHUT_WR)
        sock.recv(65_536)


def malformed() -> Iterator[bytes]:
    """Requests that no server can read, each with a secret in the part that a server likes to quote."""
    yield b"GET /stream/x?access_token=%b HTTP/9.9\r\n\r\n" % canary("version").encode()
    yield b"GET /stream/x?access_token=a %b HTTP/1.1\r\n\r\n" % canary("line").encode()
    yield b"G%bT / HTTP/1.1\r\n\r\n" % canary("method").lower().encode()
    yield b"GET /health HTTP/1.1\r\nAuthorization Bearer %b\r\n\r\n" % canary("header").encode()
    yield b"GET /health HTTP/1.1\r\nX: %b\x00\r\n\r\n" % canary("value").encode()
    yield b"GET /health HTTP/1.1\r\nAuthorization: %b\r\n\r\n" % (canary("field").encode() * 2_000)
    yield b"GET /%b HTTP/1.1\r\n\r\n" % (canary("url").encode() * 500)
    yield b"POST /init-stream HTTP/1.1\r\nHost: a\r\nContent-Length: %b\r\n\r\n" % canary("length").encode()
    yield b"POST /init-stream HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: %b\r\n\r\n" % canary("coding").encode()
    chunked = b"POST /init-stream HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Type: application/json\r\n\r\n"
    yield chunked + b"%b\r\n" % canary("chunk").encode()
    yield chunked + b'5\r\n{"a":%b\r\n' % canary("terminator").encode()


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis that the test may kill."""
    if program() is None:
        missing("redis-server")
    with RedisServer(tmp_path / "redis") as server:
        yield server


@pytest.fixture
def broken(tmp_path: Path, provider: ProviderServer, redis: RedisServer, request: pytest.FixtureRequest) -> Iterator[Service]:
    """A service that says all it can say, in this format, has a secret in every setting, and breaks on demand."""
    environ = {
        **provider.environ,
        "LOG_LEVEL": "debug",
        "LOG_FORMAT": request.param,
        "OPENAI_LOG": "debug",
        "ANTHROPIC_LOG": "debug",
        "REDIS_URL": redis.url,
        "LEASE_SECONDS": "1",
        "METRICS_TOKEN": canary("metrics-token"),
        "CALLBACK_HEADERS": f"X-Key: {canary('callback-header')}",
        "CALLBACK_SECRET": "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
        "CALLBACK_SCHEDULE": "0,0.1",
        "PROVIDER_RETRIES": "1",
        "PROVIDER_BACKOFF_SECONDS": "0",
    }
    service = Service(tmp_path / "log", environ, app="tests.neighbours.broken_app:app")
    service.start()
    yield service
    service.kill()


@pytest.mark.parametrize("broken", ["json", "console"], indirect=True)
def test_nothing_secret_is_printed_whatever_happens(broken: Service, redis: RedisServer, n8n: Receiver) -> None:
    token = n8n_token(jti=canary("jti"))
    urls, told = answered(broken, n8n, token)
    refused(broken, token)
    for way in [way for way in WAYS if way not in LEAKS] + ["server", "stream"]:
        raw(broken.port, f"GET /break/{way}?q={canary(way)}&access_token={token} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
    for sent in malformed():
        raw(broken.port, sent)
        raw(broken.port, sent[: len(sent) // 2], whole=False)
    if broken.lines("session.accepted"):  # as JSON: the form makes no difference to what is said here, and it takes longest
        lost(broken, redis, n8n)
        assert broken.lines("session.recovered") and broken.lines("store.away")

    printed = broken.log
    secrets = [MARK, SECRET, token, *(url.partition("access_token=")[2] for url in urls), *secrets_of(broken._environ)]
    assert "ValueError" in printed and printed.count("callback.attempted") > 3 and "malformed_http" in printed
    assert leaks(printed, secrets) == []
    assert [answer.url for answer in told if leaks(answer.text, secrets)] == []


def answered(service: Service, n8n: Receiver, token: str) -> tuple[list[str], list[httpx.Response]]:
    """Sessions that go well, and those that a provider or n8n spoils; and all that may be asked about them, with the answers."""
    body = {
        "prompt": canary("prompt"),
        "system": canary("system"),
        "messages": [{"role": "user", "content": canary("turn")}],
        "userId": canary("user"),
        "chatId": canary("chat"),
        "metadata": {canary("name"): canary("value")},
        canary("unknown"): 1,
        "n8nToken": token,
    }
    n8n.answers([Answer(503, body=canary("n8n-says"))], path="/retried")
    n8n.answers([Answer(302, {"Location": f"http://127.0.0.1/{canary('location')}"})], path="/dead")
    n8n.answers([CUT], path="/cut")
    urls = [
        service.stream_url(**body, model=model, resumeUrl=n8n.url(f"/{path}?signature={canary('signature')}"))
        for model, path in (
            ("echo", "delivered"),
            ("gpt-test-say", "retried"),
            ("gpt-test-echoing", "dead"),
            ("claude-test-echoing", "cut"),
            ("gpt-test-quoting", "a"),
            ("claude-test-status-s401", "b"),
            ("gpt-test-html", "c"),
            ("gpt-test-garbage", "d"),
        )
    ]
    told = []
    for url in urls:
        events = service.read(url)
        service.read(url, events[0].id)
        told += [
            httpx.post(url.replace("?", "/cancel?")),
            service.get(f"/sessions/{session_in(url)}", token),
            service.post(f"/callbacks/{session_in(url)}/redeliver", token),
        ]
    for path in ("/callbacks?state=dead", f"/callbacks?state=owed&after={canary('after')}", "/models", "/metrics"):
        told.append(service.get(path, token))
    told.append(service.get("/metrics", canary("metrics-token")))
    n8n.wait_for(len(urls))
    return urls, told


def refused(service: Service, token: str) -> None:
    """Requests that are read and not accepted."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {canary('bearer')}"}
    for content in (f'{{"prompt": "{canary("json")}', canary("large") * 20_000, json.dumps({"prompt": canary("bad-token")})):
        httpx.post(f"{service.url}/init-stream", content=content, headers=headers, timeout=10)
    service.init(n8nToken=token, prompt=canary("nul") + "\0", model=canary("model"), resumeUrl=f"ftp://{canary('user')}@a")
    for path in (f"/stream/{canary('id')}?access_token={canary('access')}", f"/{canary('path')}?q={canary('query')}"):
        httpx.get(service.url + path, headers={"Cookie": canary("cookie"), "Last-Event-ID": canary("cursor"), **EVENT_STREAM})


def lost(service: Service, redis: RedisServer, n8n: Receiver) -> None:
    """A worker is killed in mid-answer, then Redis."""
    url = service.stream_url(prompt=canary("killed"), model="gpt-test-stall", resumeUrl=n8n.url(f"/lost?signature={canary('s')}"))
    with service.watch(url) as events:
        next(events)
        worker = int(subprocess.check_output(["pgrep", "-P", str(service.pid)], text=True).split()[0])
        os.kill(worker, signal.SIGKILL)
        n8n.wait_for(1, timeout=60, path="/lost")
    redis.kill()
    wait_until(lambda: "store.away" in service.log)
    service.init(prompt=canary("away"))


def test_the_net_sees_what_is_printed(tmp_path: Path) -> None:
    service = Service(tmp_path / "log", {}, app="tests.neighbours.broken_app:app")
    service.start()
    token = n8n_token()
    for way in LEAKS:
        httpx.get(f"{service.url}/break/{way}", params={"q": f"by {way} {CANARY} {token} {SECRET}"})

    with pytest.raises(AssertionError) as failed:
        service.stop()

    told = str(failed.value).splitlines()
    for what in ("a JWT", "the canary of all prompts", f"a secret of {len(SECRET)} characters"):
        found = [line for line in told if line.startswith(f"{what}: ") and "█" in line]
        assert [way for way in LEAKS if any(f"by {way}" in line for line in found)] == list(LEAKS)


def test_what_is_found_is_told_without_it() -> None:
    token = n8n_token()
    text = f"a fine line\na={token}\nb=http://a/?signature=0123&access_token={token} {SECRET}\n"

    found = leaks(text, [SECRET])

    assert len(found) == 5 and all("█" in line for line in found)
    assert not [line for line in found if line.startswith("a JWT") and token in line]
    assert leaks("http://a/stream/<session_id> signature access_token canary", [SECRET]) == []


def test_a_test_that_prints_a_secret_in_its_own_process_fails() -> None:
    report = pytest.TestReport(
        "a test", ("a file", 1, ""), {}, "passed", None, "call", [("Captured stdout call", f"a {CANARY} b")]
    )
    hook = pytest_runtest_makereport()
    next(hook)

    with pytest.raises(StopIteration):
        hook.send(report)

    assert report.failed and str(report.longrepr).endswith("the canary of all prompts: a █ b")


def test_flask_run_prints_nothing_secret_either(free_port: int, tmp_path: Path) -> None:
    environ = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "JWT_SECRET": SECRET,
        "LOG_LEVEL": "debug",
        "FLASK_APP": "tests.neighbours.broken_app",
        "FLASK_RUN_PORT": str(free_port),
        "PYTHON_DOTENV_DISABLED": "true",
        "DEV_MODE": "true",
    }
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, "-m", "flask", "run"], cwd=ROOT, env=environ, stdout=file, stderr=file)
    try:
        wait_until(lambda: "Running on" in log.read_text(), timeout=20)
        for way in [way for way in WAYS if way not in LEAKS] + ["server", "stream"]:
            raw(free_port, f"GET /break/{way}?q={canary(way)}&access_token={n8n_token()} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
        for sent in malformed():
            raw(free_port, sent[:60_000], whole=False)
        wait_until(lambda: "Bad request" in log.read_text() and "thread.broke" in log.read_text())
    finally:
        process.terminate()
        process.wait(10)

    assert leaks(log.read_text(), [MARK, SECRET]) == []


# ---- The form of a line ----


NASTY = "a\nb\r\x1b[31mc\x00\x7f\x9bd\u2028\u202ee\ud800é😀"


@pytest.mark.parametrize("form", ["json", "console"])
def test_no_text_of_a_client_begins_a_line_or_moves_a_cursor(
    make_client: MakeClient, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    make_client(LOG_FORMAT=form)

    lines.info("event.happened", text=NASTY, listed=[NASTY], keyed={NASTY: NASTY})

    (line,) = capsys.readouterr().out.splitlines()
    plain = re.sub(r"\x1b\[\d*(;\d+)*m", "", line)  # ConsoleRenderer's own colours
    assert plain.isprintable() and "[31mc" in plain and "é😀" in plain


def test_a_long_text_is_cut(make_client: MakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    make_client()

    lines.info("event.happened", text="x" * 10_000)

    assert json.loads(capsys.readouterr().out)["text"] == "x" * loglines.MAX_CHARS + "…"


class Full(io.StringIO):
    """Standard output on a disk that is full."""

    def write(self, _text: str) -> int:
        """Fails."""
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("closed", [False, True])
def test_a_line_that_cannot_be_written_is_lost_and_nothing_else(
    make_client: MakeClient, monkeypatch: pytest.MonkeyPatch, closed: bool
) -> None:
    client = make_client()
    out = Full()
    if closed:
        out.close()
    monkeypatch.setattr(sys, "stdout", out)

    answer = client.get("/nowhere")

    assert answer.status_code == 404
