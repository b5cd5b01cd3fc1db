"""`aistream stream`: the exact text of an answer in a terminal, over lines that are cut and services that are killed."""

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import httpx
import httpx_sse
import pytest

from aistream.cli import following
from aistream.cli.eventsource import Decoder, Message
from aistream.cli.following import Following, Lost, Refused, Said, in_json_mode
from aistream.events import Cursor, End, Failed, Text, Usage
from aistream.sse import HEARTBEAT, PREAMBLE, Cutter, json_frame, text_frame
from tests.conftest import missing
from tests.leaks import leaks
from tests.nasty import NASTY, differences
from tests.neighbours.http1 import Connection, Request, Server
from tests.neighbours.line import Line
from tests.neighbours.provider import ProviderServer
from tests.neighbours.receiver import Receiver
from tests.neighbours.redis import RedisServer, program
from tests.service import ROOT, SECRET, Service, on, wait_until

# ---- What an EventSource makes of bytes ----


def stream_of(text: str) -> bytes:
    """A text as text mode sends it."""
    cutter = Cutter()
    pieces = [*cutter.feed(text), *cutter.end()]
    frames = [text_frame(Cursor(1, number), Text(piece)) for number, piece in enumerate(pieces, 1)]
    return PREAMBLE + HEARTBEAT + b"".join(frames)


STREAMS = {nasty.name: stream_of(nasty.answer) for nasty in NASTY if len(nasty.answer) < 5_000}


def decoded(*pieces: bytes) -> list[Message]:
    """What our decoder makes of these reads."""
    decoder = Decoder()
    return [message for piece in pieces for message in decoder.feed(piece)]


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_is_decoded_as_httpx_sse_does_it_wherever_the_reads_are_cut(name: str) -> None:
    stream = STREAMS[name]
    answer = httpx.Response(200, headers={"Content-Type": "text/event-stream"}, content=stream)
    expected = [Message(one.id, one.event, one.data) for one in httpx_sse.EventSource(answer).iter_sse()]

    cut = [decoded(stream[:place], stream[place:]) for place in range(len(stream) + 1)]
    bytewise = decoded(*(stream[place : place + 1] for place in range(len(stream))))

    assert decoded(stream) == expected == bytewise
    assert [place for place, got in enumerate(cut) if got != expected] == []


@pytest.mark.parametrize(
    ("stream", "messages"),
    [
        (b"data: a\r\rdata: b\r\r", [("", "message", "a"), ("", "message", "b")]),
        (b"data: a\r\n\r\ndata:b\n\r\n", [("", "message", "a"), ("", "message", "b")]),
        (b"data: a\r\ndata: b\r\n\r\n", [("", "message", "a\nb")]),
        (b"\xef\xbb\xbfdata: a\n\n", [("", "message", "a")]),
        (b"\xef\xbb\xbfid: 7\n\xef\xbb\xbfdata: x\n\ndata: y\n\n", [("7", "message", "y")]),
        (b"id: 1\ndata: a\n\ndata: b\n\nid\ndata: c\n\n", [("1", "message", "a"), ("1", "message", "b"), ("", "message", "c")]),
        (b"id: 1\ndata: a\n\nid: 2\x003\ndata: b\n\n", [("1", "message", "a"), ("1", "message", "b")]),
        (b"event: x\n\ndata: a\n\n", [("", "message", "a")]),
        (b"event: x\ndata\ndata:  b\ndata: \n\n", [("", "x", "\n b\n")]),
        (b": comment\nunknown: x\n:\n\ndata: a\n", []),
    ],
    ids=[
        "CR",
        "CRLF",
        "CRLF between lines",
        "BOM",
        "BOM inside",
        "ids",
        "NUL in an id",
        "event without data",
        "lines",
        "nothing whole",
    ],
)
def test_lines_and_fields_are_those_of_the_standard(stream: bytes, messages: list[tuple[str, str, str]]) -> None:
    expected = [Message(*one) for one in messages]

    cut = [decoded(stream[:place], stream[place:]) for place in range(len(stream) + 1)]

    assert [place for place, got in enumerate(cut) if got != expected] == []


# ---- A stream over many connections ----


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tried again is tried soon."""
    monkeypatch.setattr(following, "BACKOFF", 0.02)
    monkeypatch.setattr(following, "MOST_BACKOFF", 0.1)


def followed(stream: Following) -> tuple[str, dict[str, Any]]:
    """The whole text of a stream, and its ending."""
    said = [one for one in stream.run() if isinstance(one, Said)]
    return "".join(one.event["text"] for one in said if one.event["type"] == "text"), said[-1].event


def test_every_nasty_text_arrives_exactly_over_a_line_that_is_cut_again_and_again(service: Service) -> None:
    got, lost = {}, 0
    with Line(service.port) as line:
        for nasty in NASTY:
            url = service.stream_url(prompt=nasty.prompt, model=nasty.model("gpt"))
            stream = Following(url.replace(str(service.port), str(line.port)))
            cutting = gevent.spawn(_cut, line, 5)
            got[nasty.name], ending = followed(stream)
            cutting.kill()
            lost += stream.reconnects
            assert ending["type"] == "end"

    assert differences(got, {nasty.name: nasty.answer for nasty in NASTY}) == []
    assert lost > 0


def begun(stream: Following) -> None:
    """Waits until some of the answer has come."""
    wait_until(lambda: int((stream.last_id or "0-0").partition("-")[2]) >= 5)


def _cut(line: Line, times: int) -> None:
    for _ in range(times):
        gevent.sleep(0.01)
        line.cut()


def test_a_long_answer_loses_and_doubles_nothing_over_a_hundred_cuts(service: Service) -> None:
    url = service.stream_url(model="gpt-test-long-n600-d3")
    with Line(service.port) as line:
        stream = Following(url.replace(str(service.port), str(line.port)))
        cutting = gevent.spawn(_cut, line, 100)
        text, ending = followed(stream)
        cutting.kill()

    assert text == "".join(f"word{number} " for number in range(1, 601))
    assert ending == {"type": "end", "finish_reason": "stop"}
    assert stream.reconnects > 5


def test_a_line_that_is_cut_at_any_byte_goes_on_there() -> None:
    events = [Text("a\nb"), Text(" "), Text("é😀"), Usage(1, 2), End("stop")]
    frames = [json_frame(Cursor(1, number), event) for number, event in enumerate(events, 1)]
    whole = PREAMBLE + b"".join(frames)

    results = []
    for place in range(len(whole) + 1):
        with _Cutting(frames, place) as server:
            stream = Following(f"http://127.0.0.1:{server.port}/stream/x")
            said = [one for one in stream.run() if isinstance(one, Said)]
            results.append([(one.id, one.event.get("text"), one.ends) for one in said])

    expected = [("1-1", "a\nb", False), ("1-2", " ", False), ("1-3", "é😀", False), ("1-4", None, False), ("1-5", None, True)]
    assert [place for place, got in enumerate(results) if got != expected] == []


class _Cutting(Server):
    """Says a stream of these frames up to a byte, then cuts; afterwards what follows the asked id."""

    def __init__(self, frames: list[bytes], place: int) -> None:
        super().__init__(self._answer)
        self._frames = frames
        self._place: int | None = place

    def _answer(self, connection: Connection, request: Request) -> None:
        asked = request.headers.get("last-event-id")
        seen = int(asked.partition("-")[2]) if asked else 0
        stream = PREAMBLE + b"".join(self._frames[seen:])
        if self._place is not None:
            stream, self._place = stream[: self._place], None
        # Without chunks: the end of the body is the end of the connection, as behind a proxy that speaks HTTP/1.0.
        connection.head(200, [("Content-Type", "text/event-stream"), ("Connection", "close")])
        connection.send(stream)
        connection.reset() if len(stream) % 2 else connection.close()


def test_a_service_that_is_restarted_behind_a_proxy_goes_on_from_redis(
    start_services: Callable[..., list[Service]], redis_url: str, provider: ProviderServer
) -> None:
    environ = {"REDIS_URL": redis_url, "LEASE_SECONDS": "1", **provider.openai_environ}
    writes, shows = start_services(2, **environ)
    url = writes.stream_url(model="gpt-test-long-n200-d20", start="immediate")
    stream = Following(on(shows, url))
    restarts = gevent.spawn(lambda: [begun(stream), shows.kill(), gevent.sleep(0.3), shows.start()])

    text, ending = followed(stream)

    restarts.join()
    assert text == "".join(f"word{number} " for number in range(1, 201))
    assert ending["type"] == "end" and stream.reconnects > 0


def test_the_worker_that_writes_is_killed_and_the_part_is_followed_by_its_ending(
    start_services: Callable[..., list[Service]], redis_url: str, provider: ProviderServer
) -> None:
    environ = {"REDIS_URL": redis_url, "LEASE_SECONDS": "1", **provider.openai_environ}
    writes, other = start_services(2, **environ)
    with Line(writes.port) as line:
        url = writes.stream_url(model="gpt-test-long-n200-d20")
        stream = Following(url.replace(str(writes.port), str(line.port)))
        killing = gevent.spawn(lambda: [begun(stream), writes.kill(), line.lead_to(other.port)])

        text, ending = followed(stream)

        killing.join()
    assert (ending["type"], ending["code"]) == ("error", "worker_lost")
    assert "".join(f"word{number} " for number in range(1, 201)).startswith(text) and len(text) > 10


def test_a_redis_that_is_restarted_is_waited_for(
    start_services: Callable[..., list[Service]], provider: ProviderServer, tmp_path: Path
) -> None:
    if program() is None:
        missing("redis-server")
    with RedisServer(tmp_path / "redis") as redis:
        writes, shows = start_services(2, REDIS_URL=redis.url, LEASE_SECONDS="1", **provider.openai_environ)
        url = writes.stream_url(model="gpt-test-long-n150-d20", start="immediate")
        stream = Following(on(shows, url))
        hurting = gevent.spawn(lambda: [begun(stream), redis.kill(), gevent.sleep(0.5), redis.start()])

        text, ending = followed(stream)

        hurting.join()
        for service in (writes, shows):
            service.kill()
    assert text == "".join(f"word{number} " for number in range(1, 151))
    assert ending["type"] == "end"


Answers = list[tuple[int, list[tuple[str, str]], bytes]]


@contextlib.contextmanager
def answering(*answers: tuple[int, bytes]) -> Iterator[tuple[str, list[Request]]]:
    """A server that gives these answers, the last one again and again; its address, and what it was asked."""
    asked: list[Request] = []

    def answer(connection: Connection, request: Request) -> None:
        asked.append(request)
        status, body = answers[min(len(asked), len(answers)) - 1]
        kind = "application/problem+json" if status >= 400 else "text/html" if body.startswith(b"<") else "text/event-stream"
        connection.reply(status, [("Content-Type", kind)], body)

    with Server(answer) as server:
        yield f"http://127.0.0.1:{server.port}/stream/x?access_token=t", asked


def passing(code: str, event_id: str = "") -> bytes:
    """A refusal that may pass."""
    said = b'event: error\ndata: {"type":"error","code":"%b","message":"m","retryable":true}\n\n' % code.encode()
    return (f"id: {event_id}\n".encode() if event_id else b"") + said


A = json_frame(Cursor(1, 1), Text("a"))
DONE = json_frame(Cursor(1, 2), End("stop"))


@pytest.mark.parametrize(
    "between",
    [
        (200, passing("too_many_viewers")),
        (200, passing("store_unavailable", "1-1")),
        (502, b"<html>bad gateway</html>"),
        (503, b'{"code":"draining","detail":"d"}'),
        (200, b"<html>we are back soon</html>"),
        (200, PREAMBLE + HEARTBEAT),
    ],
    ids=["no id", "the id that was asked with", "502", "503", "a page", "nothing"],
)
def test_what_may_pass_is_asked_again_with_the_last_id(between: tuple[int, bytes]) -> None:
    with answering((200, PREAMBLE + A), between, (200, PREAMBLE + DONE)) as (url, asked):
        items = list(Following(url).run())

    assert [one.event.get("text") for one in items if isinstance(one, Said)] == ["a", None]
    assert [request.headers.get("last-event-id") for request in asked] == [None, "1-1", "1-1"]
    assert all(request.target == "/stream/x?access_token=t&format=json" for request in asked)
    assert len([one for one in items if isinstance(one, Lost)]) == 2


@pytest.mark.parametrize(
    ("ending", "code"),
    [
        (json_frame(Cursor(1, 2), Failed("provider_overloaded", "m", True)), "provider_overloaded"),
        (json_frame(Cursor(1, 1), Failed("session_lost", "m", False)), "session_lost"),
        (passing("worker_lost", "2-1"), "worker_lost"),
    ],
    ids=["an ending that is retryable", "not retryable", "an id of its own"],
)
def test_an_error_with_an_id_of_its_own_or_without_hope_is_final(ending: bytes, code: str) -> None:
    with answering((200, PREAMBLE + A), (200, PREAMBLE + ending)) as (url, asked):
        *_, last = Following(url).run()

    assert isinstance(last, Said) and last.ends and last.event["code"] == code
    assert len(asked) == 2


@pytest.mark.parametrize("status", [401, 404, 410])
def test_a_stream_that_is_not_ours_is_asked_for_once(status: int) -> None:
    refused = b'{"code":"not_found","detail":"There is no such stream."}'

    with answering((status, refused)) as (url, asked), pytest.raises(Refused, match="There is no such stream"):
        list(Following(url).run())

    assert len(asked) == 1


def test_a_service_that_stays_away_is_given_up(monkeypatch: pytest.MonkeyPatch, free_port: int) -> None:
    monkeypatch.setattr(following, "PATIENCE", 0.3)

    with pytest.raises(Refused, match=r"no stream for 0\.3 s"):
        list(Following(f"http://127.0.0.1:{free_port}/stream/x").run())


def test_a_silent_line_counts_as_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "SILENCE", 0.2)

    def answer(connection: Connection, request: Request) -> None:
        connection.head(200, [("Content-Type", "text/event-stream"), ("Connection", "close")])
        if "last-event-id" in request.headers:
            connection.send(PREAMBLE + DONE)
            connection.close()
        else:
            connection.send(PREAMBLE + A)
            connection.pause(5)

    with Server(answer) as server:
        items = list(Following(f"http://127.0.0.1:{server.port}/stream/x").run())

    assert [one.event.get("text") for one in items if isinstance(one, Said)] == ["a", None]
    assert [one.reason for one in items if isinstance(one, Lost)] == ["nothing came for 0.2 s"]


def test_the_format_is_put_into_an_address_once() -> None:
    assert (
        in_json_mode("http://a/stream/x?format=text&access_token=e.y-_J") == "http://a/stream/x?access_token=e.y-_J&format=json"
    )


# ---- The command ----


class Shell:
    """`aistream …` against one service."""

    def __init__(self, service: Service) -> None:
        self.environ = {
            "PATH": os.environ["PATH"],
            "PYTHON_DOTENV_DISABLED": "true",
            "DEV_MODE": "true",
            "JWT_SECRET": SECRET,
            "PORT": str(service.port),
        }

    def start(self, *args: str, **options: Any) -> "subprocess.Popen[bytes]":
        """Starts it."""
        options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        return subprocess.Popen([sys.executable, "-m", "aistream", "stream", *args], cwd=ROOT, env=self.environ, **options)

    def run(self, *args: str, stdin: bytes = b"") -> tuple[int, bytes, str]:
        """Its exit code, and both outputs."""
        process = self.start(*args, stdin=subprocess.PIPE)
        out, err = process.communicate(stdin, timeout=60)
        assert leaks(err.decode(), [SECRET]) == []
        return process.returncode, out, err.decode()


@pytest.fixture
def shell(service: Service) -> Shell:
    """The shell beside the shared service."""
    return Shell(service)


@pytest.mark.parametrize("name", ["plain words", "CRLF split between two chunks", "NUL inside", "[DONE] as the whole answer"])
def test_standard_output_is_the_answer_and_nothing_else(shell: Shell, name: str) -> None:
    nasty = next(one for one in NASTY if one.name == name)

    code, out, err = shell.run("-", "--model", nasty.model("gpt"), stdin=nasty.prompt.encode())

    assert (code, out) == (0, nasty.answer.encode())
    last = err.splitlines()
    assert last[0].startswith("completed (stop) · ") and " tokens in, " in last[0] and "first token after" in last[0]
    assert last[1].startswith(f"the callback is shown by http://127.0.0.1:{shell.environ['PORT']}/demo/callback/")


def test_options_reach_the_model_and_a_prompt_is_read_from_a_pipe(shell: Shell, provider: ProviderServer) -> None:
    options = ("--model", "gpt-test-hello", "--system", "Be brief.", "--max-tokens", "77", "--temperature", "0.5")

    code, _, _ = shell.run(*options, stdin="from a pipe é".encode())

    asked = provider.requests()[-1].body
    assert code == 0
    assert [message["content"] for message in asked["messages"]] == ["Be brief.", "from a pipe é"]
    assert (asked.get("max_tokens") or asked.get("max_completion_tokens"), asked["temperature"]) == (77, 0.5)


def test_with_json_each_event_is_a_line_and_the_last_one_a_summary(shell: Shell) -> None:
    code, out, _ = shell.run("x", "--model", "gpt-test-reasoning", "--json")

    lines = [json.loads(line) for line in out.decode().splitlines()]
    assert code == 0
    assert [line["type"] for line in lines[:2]] == ["start", "reasoning"]
    assert "".join(line["text"] for line in lines if line["type"] == "text") == "Hello, this is the test provider."
    ids = [line["id"] for line in lines[:-1]]
    assert len(set(ids)) == len(ids) and lines[-2]["type"] == "end"
    summary = lines[-1]
    assert (summary["type"], summary["status"], summary["finish_reason"], summary["error"]) == (
        "summary",
        "completed",
        "stop",
        None,
    )
    assert summary["streamId"] == lines[0]["streamId"] and summary["output_tokens"] > 0 and summary["last_id"] == ids[-1]


def test_thoughts_are_shown_where_they_are_asked_for_and_never_on_standard_output(shell: Shell) -> None:
    _, out, err = shell.run("x", "--model", "gpt-test-reasoning")
    _, also, thoughts = shell.run("x", "--model", "gpt-test-reasoning", "--reasoning")

    assert out == also == b"Hello, this is the test provider."
    assert "Let me think about it." in thoughts and "Let me think" not in err


def test_a_failed_answer_is_told_and_ends_with_one(shell: Shell) -> None:
    code, out, err = shell.run("x", "--model", "gpt-test-truncated-k2")
    asked, _, told = shell.run("x", "--model", "no-such-model")

    assert (code, out) == (1, b"word1 word2 ")
    assert "failed: The model's answer broke off. (upstream_truncated)" in err
    assert asked == 1 and "unknown_model" in told and "Traceback" not in told + err


def test_a_service_that_is_not_there_is_told_with_what_starts_one(shell: Shell, free_port: int) -> None:
    code, out, err = shell.run("x", "--url", f"http://127.0.0.1:{free_port}")

    assert (code, out) == (1, b"")
    assert f"no service answers at http://127.0.0.1:{free_port}" in err and "aistream serve --dev" in err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((), "expected a prompt"),
        (("x", "--watch", "http://h/stream/1"), "--watch follows"),
        (("--watch", "nonsense"), "expected a streamUrl"),
        (("x", "--url", "nonsense"), "expected a full URL"),
        (("x", "--temperature", "3"), "--temperature"),
    ],
    ids=["nothing", "both", "no streamUrl", "no URL", "too hot"],
)
def test_a_wrong_use_is_told_and_ends_with_two(shell: Shell, args: tuple[str, ...], said: str) -> None:
    code, out, err = shell.run(*args)

    assert (code, out) == (2, b"") and said in err


def test_a_stream_that_was_asked_for_elsewhere_is_watched(shell: Shell, service: Service) -> None:
    url = service.stream_url(model="gpt-test-hello")

    code, out, err = shell.run("--watch", url)
    again, whole, _ = shell.run("--watch", url)

    assert (code, again) == (0, 0)
    assert out == whole == b"Hello, this is the test provider."
    assert "callback" not in err


def test_the_command_goes_on_where_its_line_was_cut(shell: Shell, service: Service, provider: ProviderServer) -> None:
    with Line(service.port) as line:
        model = "gpt-test-hold-n150-k50-d5"
        process = shell.start("x", "--model", model, "--url", f"http://127.0.0.1:{line.port}")
        first = started(process)
        for _ in range(3):
            line.cut()
            time.sleep(0.3)
        provider.release()
        out, err = process.communicate(timeout=60)

    assert (process.returncode, (first + out).decode()) == (0, "".join(f"word{number} " for number in range(1, 151)))
    assert b"the line was cut; asked again in" in err and b"goes on" in err and b" reconnect" in err


def started(process: "subprocess.Popen[bytes]") -> bytes:
    """The first bytes that it writes."""
    assert process.stdout is not None
    return process.stdout.read(6)


def test_ctrl_c_stops_the_answer_and_n8n_gets_the_part(shell: Shell, provider: ProviderServer, n8n: Receiver) -> None:
    process = shell.start("x", "--model", "gpt-test-hold-n20-k5", "--resume-url", n8n.url("/wait"))
    begun = started(process)

    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)

    (callback,) = n8n.wait_for(1)
    told = callback.json
    assert process.returncode == 130
    assert (told["status"], told["answer"].encode()) == ("cancelled", begun + out)
    assert b"stopping the answer; Ctrl-C again leaves at once" in err
    assert f"n8n gets status cancelled, with these {len(begun + out)} characters as the answer".encode() in err
    provider.wait_for_open_streams(0)


def test_a_second_ctrl_c_leaves_at_once(service: Service, provider: ProviderServer) -> None:
    provider.reset()
    shell = Shell(service)
    with Line(service.port) as line:
        process = shell.start("x", "--model", "gpt-test-hold-n20-k5", "--url", f"http://127.0.0.1:{line.port}")
        started(process)
        line.lead_to(None)  # it cannot be stopped by this way

        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        said = b""
        while b"stopping" not in said:
            said += process.stderr.read(1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=10)
    provider.release()

    assert process.returncode == 130
    assert b"left: " in err and b"Traceback" not in said + err


def test_a_terminal_gets_no_control_characters_and_its_last_line_is_its_own(shell: Shell) -> None:
    nasty = next(one for one in NASTY if one.name == "control characters")
    near, far = pty.openpty()
    process = shell.start(nasty.prompt, "--model", nasty.model("gpt"), stdout=far, stderr=far)

    code = process.wait(30)

    shown = os.read(near, 4096)  # gevent keeps the far end open: there is no end to wait for
    for end in (near, far):
        os.close(end)
    assert code == 0
    assert b"\x1b[31m" not in shown and "\ufffd[31mred".encode() in shown
    assert b"\ncompleted (stop)" in shown.replace(b"\r", b"").replace(b"\x1b[2m", b"")


def test_whoever_has_read_enough_leaves_no_traceback_behind(shell: Shell) -> None:
    process = shell.start("x", "--model", "gpt-test-long-n50-d20")
    started(process)
    assert process.stdout is not None and process.stderr is not None

    process.stdout.close()

    assert process.wait(30) == 1
    err = process.stderr.read()
    assert b"nobody reads standard output any more" in err and b"Traceback" not in err and b"Exception" not in err
