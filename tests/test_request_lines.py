"""Each finished request has one line, which says what became of it and ties it to its session."""

import json
import re
import socket
from collections.abc import Callable
from typing import Any

import pytest
from flask.testing import FlaskClient

from tests.conftest import MakeClient
from tests.service import PROMPT, Service, n8n_token, session_in, wait_until

Lines = Callable[[], list[dict[str, Any]]]
TRACE = "0af7651916cd43dd8448eb211c80319c"


@pytest.fixture
def lines(capsys: pytest.CaptureFixture[str]) -> Lines:
    """What the service has said since it was last asked."""
    return lambda: [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def init(client: FlaskClient, headers: dict[str, str] | None = None, **body: Any) -> Any:
    """The answer to an init."""
    asked = {"n8nToken": n8n_token(), "resumeUrl": "http://127.0.0.1:9/none", "prompt": PROMPT, **body}
    return client.post("/init-stream", json=asked, headers=headers)


def test_an_accepted_init_is_one_line_that_ties_its_request_to_its_session(client: FlaskClient, lines: Lines) -> None:
    lines()

    answer = init(client, {"X-Request-ID": "execution-7"})

    (line,) = lines()
    assert line.pop("timestamp").endswith("Z") and 0 <= line.pop("duration_ms") < 10_000
    assert line == {
        "event": "session.accepted",
        "level": "info",
        "session": answer.json["streamId"],
        "provider": "echo",
        "model": "echo",
        "method": "POST",
        "route": "/init-stream",
        "status": 200,
        "request_id": "execution-7",
    }
    assert answer.headers["X-Request-ID"] == "execution-7"


def test_a_repeated_init_accepts_nothing_new(client: FlaskClient, lines: Lines) -> None:
    first = init(client, {"Idempotency-Key": "k"})
    lines()

    init(client, {"Idempotency-Key": "k"})

    (line,) = lines()
    assert (line["event"], line["session"], line["replayed"]) == ("request.finished", first.json["streamId"], True)


@pytest.mark.parametrize(
    ("path", "route", "status", "code"),
    [
        ("/stream/abc?access_token=x", "/stream/<session_id>", 401, "token_malformed"),
        ("/sessions/abc", "/sessions/<session_id>", 401, "token_missing"),
        ("/nowhere/at%0aall?q=1", None, 404, "not_found"),
        ("/init-stream", None, 405, "method_not_allowed"),
    ],
)
def test_a_refused_request_is_told_by_its_route_and_code_alone(
    client: FlaskClient, lines: Lines, path: str, route: str | None, status: int, code: str
) -> None:
    lines()

    answer = client.get(path)

    (line,) = lines()
    assert (line["event"], line["route"], line["status"], line["code"]) == ("request.finished", route, status, code)
    assert line["request_id"] == answer.json["requestId"] == answer.headers["X-Request-ID"]
    assert "session" not in line


def test_a_session_is_named_to_whoever_may_know_it_and_no_one_elses_request(client: FlaskClient, lines: Lines) -> None:
    session = init(client).json["streamId"]
    lines()

    for subject in ("n8n", "another"):
        client.get(f"/sessions/{session}", headers={"Authorization": f"Bearer {n8n_token(sub=subject)}"})

    assert [line.get("session") for line in lines()] == [session, None]


@pytest.mark.parametrize("path", ["/health", "/health/ready", "/metrics"])
def test_what_is_asked_every_few_seconds_is_told_at_debug(make_client: MakeClient, lines: Lines, path: str) -> None:
    quiet = make_client()
    quiet.get("/health")
    lines()

    quiet.get(path)
    told = lines()
    make_client(LOG_LEVEL="debug").get(path)

    assert told == []
    assert [line["route"] for line in lines() if line["event"] == "request.finished"] == [path]


@pytest.mark.parametrize(
    ("traceparent", "trace_id"),
    [
        (f"00-{TRACE}-b7ad6b7169203331-01", TRACE),
        (f"00-{TRACE.upper()}-b7ad6b7169203331-01", None),
        (f"00-{'0' * 32}-b7ad6b7169203331-01", None),
        (f"00-{TRACE}-{'0' * 16}-01", None),
        (f"ff-{TRACE}-b7ad6b7169203331-01", None),
        (f"00-{TRACE}-b7ad6b7169203331-01-more", None),
        (f"00-{TRACE}-b7ad6b7169203331-01{'x' * 5_000}", None),
        ("", None),
    ],
)
def test_a_valid_traceparent_gives_the_line_its_trace(
    client: FlaskClient, lines: Lines, traceparent: str, trace_id: str | None
) -> None:
    lines()

    init(client, {"traceparent": traceparent})

    assert [line.get("trace_id") for line in lines()] == [trace_id]


def test_an_error_of_ours_is_told_with_its_place_and_without_its_message(
    client: FlaskClient, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: object, **__: object) -> None:
        raise OSError(28, f"no space for {PROMPT}") from ValueError(PROMPT)

    monkeypatch.setattr("aistream.store.Store.create", breaks)
    lines()

    init(client)

    broke, finished = lines()
    assert (broke["event"], broke["error"], broke["errno"], broke["cause"]) == (
        "request.broke",
        "OSError",
        "ENOSPC",
        "ValueError",
    )
    assert re.fullmatch(r"test_request_lines\.py:\d+ breaks", broke["trace"][-1])
    assert (finished["event"], finished["status"], finished["code"]) == ("request.finished", 500, "internal")
    assert broke["request_id"] == finished["request_id"]


def test_a_stream_is_told_when_it_is_over_by_one_line_with_its_requests_id(service: Service) -> None:
    url = service.stream_url(model="echo", prompt="a b")
    request_id = f"of-{session_in(url)}"

    with service.watch(url, **{"X-Request-ID": request_id}) as events:
        seen = list(events)

    wait_until(lambda: request_id in service.log)
    (line,) = (json.loads(line) for line in service.log.splitlines() if request_id in line)
    assert (line["event"], line["session"], line["gone"]) == ("viewer.left", session_in(url), False)
    with service.watch(url, seen[-1].id, **{"X-Request-ID": f"{request_id}-again"}) as again:
        assert again.response.status_code == 204
    wait_until(lambda: service.lines("request.finished", request_id=f"{request_id}-again", status=204, session=session_in(url)))


def test_a_body_whose_chunks_are_none_is_the_clients_fault(service: Service) -> None:
    before = service.lines("request.broke")
    head = b"POST /init-stream HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as sock:
        sock.sendall(head + b"Transfer-Encoding: chunked\r\n\r\nnot-a-size\r\n")
        answer = b"".join(iter(lambda: sock.recv(65_536), b""))

    assert answer.startswith(b"HTTP/1.1 400 ") and b'"code":"malformed_http"' in answer
    assert service.lines("request.broke") == before
