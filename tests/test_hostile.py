"""Under attack: the service stays ready, an honest stream flows, and whoever keeps it waiting is let go."""

import contextlib
import dataclasses
import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import httpx
import pytest

from aistream.patience import GRACE, HEAD_BYTES
from aistream.turns import Turns
from bench.hostile import attacker
from bench.hostile.attacker import hear_nothing
from bench.hostile.attacks import BODIES, HEADS, Attack, attacks, get, post
from bench.hostile.report import BEGIN, END, Phase, Report
from tests.neighbours.provider import ProviderServer
from tests.service import ROOT, SECRET, Service, n8n_token, session_in, text_of, wait_until

#: What is answered to each of them.
STATUS = {
    **dict.fromkeys(HEADS, 400),
    **dict.fromkeys(("many fields", "a long field", "a megabyte", "cookies"), 431),
    **dict.fromkeys(("a long line", "an endless line"), 414),
    "an unknown expectation": 417,
    **dict.fromkeys(BODIES, 400),
    "an unknown coding": 501,
    **dict.fromkeys(("chunks without end", "a length beyond all bounds"), 413),
    **dict.fromkeys(("many keys", "another Idempotency-Key each time, no token"), 401),
}
#: A second for a head, a body, and a viewer that takes nothing; another for a connection that asks for nothing more.
BRIEF = {"REQUEST_SECONDS": "1", "SLOW_VIEWER_SECONDS": "1", "HEARTBEAT_SECONDS": "0.3", "MAX_VIEWERS_PER_SESSION": "1000"}
#: Attacks that do nothing but keep their connections.
HELD = ("slow heads", "slow bodies", "connected, silent", "answered, then silent")
VIEWERS = ("viewers that read nothing", "viewers out of reach")
STRANGERS = ("streams without a token", "connections that end at once", "floods of heads")
#: Those that take all the CPU there is come alone.
TOGETHER = [HELD, VIEWERS, STRANGERS, ("bodies that are none",), ("pipelined requests",)]
KEPT = {"GUNICORN_CMD_ARGS": "--keep-alive 1", "UNAUTHORIZED_RATE_LIMIT": "off"}


@pytest.fixture(scope="module")
def shared_target(provider_process: ProviderServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The process behind `target`."""
    service = Service(tmp_path_factory.mktemp("target") / "log", {**provider_process.openai_environ, **BRIEF, **KEPT})
    service.start()
    yield service
    service.kill()


@pytest.fixture
def target(shared_target: Service, provider: ProviderServer) -> Iterator[Service]:
    """A service with little patience; whatever a test does to it, nothing of ours may break."""
    yield shared_target
    assert "Traceback" not in shared_target.log and '"level":"error"' not in shared_target.log
    assert "canary" not in shared_target.log and SECRET not in shared_target.log


@contextlib.contextmanager
def attacking(service: Service, some: list[Attack], path: str) -> Iterator[dict[str, dict[str, Any]]]:
    """These attacks meanwhile; afterwards what came of each, by its name."""
    told: dict[str, dict[str, Any]] = {}
    processes = {attack.name: attacker.start(attack, service.port, path) for attack in some}
    try:
        yield told
        told |= {name: attacker.end(process) for name, process in processes.items()}
    finally:
        for process in processes.values():
            process.kill()
            process.wait()


def said(service: Service, data: bytes) -> bytes:
    """What the service answers to these bytes, until it closes the connection."""
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as line:
        with contextlib.suppress(OSError):  # it may have enough before it has all
            line.sendall(data)
        return rest_of(line)


def rest_of(line: socket.socket) -> bytes:
    """What comes until the service closes the connection."""
    answer = b""
    with contextlib.suppress(ConnectionError):
        while piece := line.recv(65_536):
            answer += piece
    return answer


# ---- Whole attacks, at a fiftieth of their size (`python -m bench.hostile` has them whole) ----


@pytest.mark.parametrize("names", TOGETHER)
def test_under_attack_the_service_stays_ready_and_a_stream_flows(
    target: Service, provider: ProviderServer, names: tuple[str, ...]
) -> None:
    watched = target.stream_url(model="gpt-test-hold-n4-k2-i61", start="immediate")
    some = [attack for attack in attacks(0.02) if attack.name in names]

    with attacking(target, some, watched[watched.index("/stream/") :]) as told:
        events = target.read(target.stream_url(model="gpt-test-long-n25-d20-i62"))
        ready = [httpx.get(f"{target.url}/health/ready", timeout=5).status_code for _ in range(5)]
        if names is HELD:
            gevent.sleep(2)  # until the first of them have had their time
    provider.release()

    assert ready == [200] * 5
    assert events[-1].data == "[DONE]" and text_of(events) == "".join(f"word{number} " for number in range(1, 26))
    assert set(told) == set(names)
    assert all("500" not in one["answers"] for one in told.values())
    assert names is not HELD or all(one["let_go"] > 0 for one in told.values())


def test_every_attack_has_its_turn_here() -> None:
    assert {name for names in TOGETHER for name in names} == {attack.name for attack in attacks(1)}


@pytest.mark.parametrize(("name", "data"), {**HEADS, **BODIES}.items(), ids=[*HEADS, *BODIES])
def test_what_is_no_proper_request_is_refused_as_a_problem(target: Service, name: str, data: bytes) -> None:
    head, _, body = said(target, data).partition(b"\r\n\r\n")

    assert int(head.split()[1]) == STATUS[name] == json.loads(body)["status"]
    assert b"content-type: application/problem+json" in head.lower() and json.loads(body)["ok"] is False
    assert b"canary" not in body


# ---- A request has its time ----


def test_a_head_that_does_not_end_in_time_ends_its_connection(target: Service) -> None:
    whole = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    begun = {"silent": b"", "slow": whole[:-10], "kept": whole + whole[:-10]}

    answers = [answer.get() for answer in [gevent.spawn(said, target, data) for data in begun.values()]]

    assert [answer.count(b"HTTP/1.1 200") for answer in answers] == [0, 0, 1]
    assert [answer.count(b"HTTP/1.1") for answer in answers] == [0, 0, 1]


def test_a_body_that_does_not_come_in_time_is_told_so(target: Service) -> None:
    begun = [post(b"{", length=100), post(b"5\r\nab", "Transfer-Encoding: chunked\r\n", -1)]

    answers = [answer.get() for answer in [gevent.spawn(said, target, data) for data in begun]]

    for answer in answers:
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408") and json.loads(body)["code"] == "request_timeout"
        assert b"connection: close" in head.lower()


def test_a_request_that_comes_in_pieces_but_in_time_is_answered(target: Service) -> None:
    body = json.dumps({"n8nToken": n8n_token(), "resumeUrl": "http://127.0.0.1:9/none", "prompt": "a"}).encode()
    whole = post(body)

    with socket.create_connection(("127.0.0.1", target.port), timeout=10) as line:
        for at in range(0, len(whole), len(whole) // 5 + 1):
            line.sendall(whole[at : at + len(whole) // 5 + 1])
            gevent.sleep(0.05)
        answer = rest_of(line)

    assert answer.startswith(b"HTTP/1.1 200")


def test_an_answer_takes_as_long_as_it_takes(target: Service, provider: ProviderServer) -> None:
    url = target.stream_url(model="gpt-test-hold-n4-k2-i63")

    with target.watch(url) as viewer:
        seen = [next(viewer) for _ in range(2)]
        gevent.sleep(2.5)  # more than a head, a body or an idle connection has
        provider.release()
        seen += list(viewer)

    assert seen[-1].data == "[DONE]" and len(seen) == 5


def test_a_body_that_nobody_wants_does_not_end_its_connection_unless_it_is_endless(target: Service) -> None:
    unwanted = b"POST /health HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
    small = unwanted % 1_000_000 + bytes(1_000_000)

    answers = said(target, small * 2 + get("/health"))
    endless = said(target, unwanted % 10**9 + bytes(20_000_000) + get("/health"))

    assert [answers.count(b"HTTP/1.1 405"), answers.count(b"HTTP/1.1 200")] == [2, 1]
    assert b"HTTP/1.1 200" not in endless


def test_a_large_head_within_the_bound_is_read(target: Service) -> None:
    fields = "".join(f"X-{i}: {'a' * 10_000}\r\n" for i in range(3))

    assert len(get("/health", fields)) < HEAD_BYTES
    assert said(target, get("/health", fields)).startswith(b"HTTP/1.1 200")


# ---- A worker that has no room ----


def test_when_connections_run_short_those_that_ask_for_nothing_go_first(
    start_service: Callable[..., Service], provider: ProviderServer
) -> None:
    patient = {"REQUEST_SECONDS": "300", "GUNICORN_CMD_ARGS": "--worker-connections 40"}
    service = start_service(**provider.openai_environ, **patient)
    with contextlib.ExitStack() as stack, service.watch(service.stream_url(model="gpt-test-hold-n4-k2-i64")) as viewer:
        seen = [next(viewer) for _ in range(2)]
        for _ in range(100):
            stack.enter_context(socket.create_connection(("127.0.0.1", service.port)))
        gevent.sleep(GRACE)

        answers = [httpx.get(f"{service.url}/health/ready", timeout=10).status_code for _ in range(30)]
        flowing = service.read(service.stream_url(model="gpt-test-hello-i65"))
        provider.release()
        seen += list(viewer)

    assert answers == [200] * 30
    assert (seen[-1].data, flowing[-1].data) == ("[DONE]", "[DONE]")
    wait_until(lambda: service.lines("clients.sent_away"))
    assert service.lines("clients.sent_away")[0]["no_room"] > 0


# ---- Viewers that are gone, or as good as gone ----


def test_a_viewer_out_of_reach_is_let_go(target: Service, provider: ProviderServer) -> None:
    url = target.stream_url(model="gpt-test-hold-n4-k2-i66")
    with socket.create_connection(("127.0.0.1", target.port), timeout=10) as line:
        line.sendall(get(url[url.index("/stream/") :], "Accept: text/event-stream\r\n"))
        begun = line.recv(65_536)

        hear_nothing(line)  # what is sent to it is lost from here on, and it closes nothing

        wait_until(lambda: target.lines("viewer.left", session=session_in(url)))
    provider.release()
    assert begun.startswith(b"HTTP/1.1 200")
    assert text_of(target.read(url)) != ""


# ---- The report ----


def phase(**changed: Any) -> Phase:
    """A phase in which all is well."""
    ms = {"p50": 1.0, "p99": 2.0, "max": 3.0}
    well = Phase(1, "slow heads", 10, 5, {"408": 5}, ms, 0, ms, ms, 0, [], 80.0, 40, 0)
    return dataclasses.replace(well, **changed)


@pytest.mark.parametrize("wrong", [{"not_ready": 1}, {"failed": 1}, {"left": 1}, {"answers": {"500": 1}}])
def test_the_report_of_an_attack_fails_for_whatever_must_not_be(tmp_path: Path, wrong: dict[str, Any]) -> None:
    assert Report([phase()], tmp_path, 1.0).failures == []
    assert len(Report([phase(), phase(**wrong)], tmp_path, 1.0).failures) == 1


def test_the_page_gets_the_table_in_the_place_of_its_own(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "security.md").read_text()

    written = Report([phase(opened=12_345)], tmp_path, 1.0).written_into(page)

    assert written.count("12,345") == 1 and "12,345" not in page
    assert written.partition(BEGIN)[0] == page.partition(BEGIN)[0] and written.partition(END)[2] == page.partition(END)[2]
    assert Report([phase(opened=12_345)], tmp_path, 1.0).written_into(written) == written


# ---- Turns ----


def test_requests_begin_in_the_order_in_which_they_came_and_leave_each_round_to_others() -> None:
    turns, begun, rounds = Turns(share=0), [], 0
    counting = gevent.get_hub().loop.check()

    def count() -> None:
        nonlocal rounds
        rounds += 1

    def request(number: int) -> None:
        turns.take()
        begun.append((number, rounds))

    counting.start(count)
    gevent.joinall([gevent.spawn(request, number) for number in range(5)])
    counting.stop()
    counting.close()

    assert [number for number, _ in begun] == [0, 1, 2, 3, 4]
    assert len({at for _, at in begun}) == 5


def test_whoever_is_ended_while_it_waits_takes_no_turn() -> None:
    turns, begun = Turns(share=0), []

    def request(number: int) -> None:
        turns.take()
        begun.append(number)

    waiting = [gevent.spawn(request, number) for number in range(3)]
    gevent.sleep(0)
    waiting[1].kill()
    gevent.joinall(waiting)

    assert begun == [0, 2]
