"""Two workers over one Redis, and workers that stop: in order, and not."""

import json
import os
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import gevent
import httpx
import msgspec
import pytest

from aistream.app import create_app
from aistream.errors import StoreUnavailable
from aistream.session import Claimed, Request
from aistream.store import Store
from tests.conftest import make_config
from tests.neighbours.provider import ProviderServer
from tests.neighbours.receiver import HANG, Answer, Receiver
from tests.neighbours.scenarios import words
from tests.service import ROOT, SECRET, Event, Service, n8n_token, on, session_in, text_of, wait_until, watch

StartService = Callable[..., Service]
WORDS = 30
#: A worker that stops in the first third of its first lease waits for the end of it; what is shown here is something else.
BRIEF = {"LEASE_SECONDS": "1"}
ECHO = Request(prompt="a", requested_model="echo", model="echo", provider="echo", max_tokens=5)


def test_a_viewer_on_another_worker_sees_the_whole_answer_as_it_is_written(pair: list[Service], provider: ProviderServer) -> None:
    model = "gpt-test-hold-n6-k3-i91"
    url = pair[0].stream_url(model=model)

    with watch(on(pair[0], url)) as first:
        seen = [next(first) for _ in range(3)]
        with watch(on(pair[1], url)) as second:
            followed = [next(second) for _ in range(3)]
            provider.release()
            rest = list(second)
        whole = seen + list(first)

    assert text_of(followed + rest) == text_of(whole)
    assert rest[-1].data == "[DONE]" and rest[-1].id == whole[-1].id
    assert len(provider.requests(model)) == 1


def test_a_reconnect_to_another_worker_brings_exactly_what_is_missing(pair: list[Service], provider: ProviderServer) -> None:
    url = pair[0].stream_url(model=f"gpt-test-long-n{WORDS}-d20-i92")
    got: list[Event] = []
    turn = 0

    while not got or got[-1].data != "[DONE]":
        with watch(on(pair[turn % 2], url), got[-1].id if got else None) as viewer:
            for event in viewer:
                got.append(event)
                if len(got) % 4 == 0:
                    break
        turn += 1

    assert turn > 3
    assert [event.id for event in got[:-1]] == [f"1-{i}" for i in range(1, len(got))]
    assert text_of(got) == text_of(pair[0].read(on(pair[0], url)))


def test_connects_to_both_workers_at_once_start_one_generation(pair: list[Service], provider: ProviderServer) -> None:
    model = "gpt-test-long-n20-d10-i93"
    url = pair[0].stream_url(model=model)

    reading = [gevent.spawn(pair[0].read, on(pair[i % 2], url)) for i in range(16)]

    assert {text_of(one.get(timeout=20)) for one in reading} == {text_of(pair[1].read(on(pair[1], url)))}
    assert len(provider.requests(model)) == 1


def test_a_killed_worker_ends_its_answer_as_failed_and_n8n_gets_the_part(
    own_pair: list[Service], provider: ProviderServer, n8n: Receiver
) -> None:
    lost, alive = own_pair
    url = lost.stream_url(model="gpt-test-hold-n6-k3-i94", resumeUrl=n8n.url())
    with watch(on(lost, url)) as viewer:
        seen = [next(viewer) for _ in range(3)]
        gevent.sleep(0.1)  # the log writer's window
        os.killpg(lost.pid, signal.SIGKILL)

    rest = alive.read(on(alive, url), seen[-1].id)

    (callback,) = n8n.wait_for(1, timeout=10)
    assert json.loads(rest[-1].data)["code"] == "worker_lost"
    assert (callback.json["status"], callback.json["error"]["code"]) == ("failed", "worker_lost")
    assert callback.json["answer"] == text_of(seen)


def test_a_worker_killed_before_the_first_word_is_replaced_unnoticed(
    own_pair: list[Service], provider: ProviderServer, n8n: Receiver
) -> None:
    lost, alive = own_pair
    url = lost.stream_url(model="gpt-test-hello-f1500-x1-i95", resumeUrl=n8n.url())
    connecting = gevent.spawn(_open_and_wait, on(lost, url))
    provider.wait_for_open_streams(1)
    os.killpg(lost.pid, signal.SIGKILL)
    connecting.get(timeout=5)

    events = alive.read(on(alive, url))

    (callback,) = n8n.wait_for(1, timeout=10)
    assert events[-1].data == "[DONE]"
    assert (callback.json["status"], callback.json["answer"]) == ("completed", text_of(events))
    assert {event.id.split("-")[0] for event in events} == {"2"}
    timings = callback.json["timings"]
    assert timings["started_at"] <= timings["first_token_at"] <= timings["ended_at"]


def _open_and_wait(url: str) -> None:
    with pytest.raises(httpx.TransportError), watch(url) as viewer:
        next(viewer)


def test_a_worker_that_wakes_up_after_its_lease_shows_its_viewers_what_the_log_says(
    own_pair: list[Service], provider: ProviderServer, n8n: Receiver
) -> None:
    paused, alive = own_pair
    url = paused.stream_url(model="gpt-test-hold-n6-k3-i89", resumeUrl=n8n.url())
    with watch(on(paused, url)) as viewer:
        seen = [next(viewer) for _ in range(3)]
        gevent.sleep(0.1)  # the log writer's window
        os.killpg(paused.pid, signal.SIGSTOP)
        (callback,) = n8n.wait_for(1, timeout=10)
        provider.release()

        os.killpg(paused.pid, signal.SIGCONT)
        rest = list(viewer)

    assert json.loads(rest[-1].data)["code"] == callback.json["error"]["code"] == "worker_lost"
    assert alive.read(on(alive, url)) == seen + rest[-1:]


def test_a_callback_whose_worker_was_killed_is_sent_by_another(own_pair: list[Service], n8n: Receiver) -> None:
    lost, alive = own_pair
    n8n.down()
    url = lost.stream_url(model="echo", prompt="a b", resumeUrl=n8n.url())
    lost.read(on(lost, url))
    wait_until(lambda: lost.lines("callback.attempted"))
    os.killpg(lost.pid, signal.SIGKILL)

    n8n.up()

    callback = n8n.wait_for(1, timeout=15)[0]
    assert callback.json["answer"] == "a b"
    wait_until(lambda: alive.lines("callback.attempted"))


def test_an_attempt_whose_worker_was_killed_is_made_again_a_lease_later(own_pair: list[Service], n8n: Receiver) -> None:
    lost, alive = own_pair
    n8n.answers([HANG])
    lost.read(lost.stream_url(model="echo", prompt="a b", resumeUrl=n8n.url()))
    n8n.wait_for(1)

    os.killpg(lost.pid, signal.SIGKILL)

    first, second = n8n.wait_for(2, timeout=10)
    assert (first.json["attempt"], second.json["attempt"], second.json["answer"]) == (1, 2, "a b")
    wait_until(lambda: alive.lines("callback.attempted"))


def test_an_attempt_that_takes_longer_than_a_lease_is_not_made_again(pair: list[Service], n8n: Receiver) -> None:
    n8n.answers([Answer(delay=3.5)])  # three leases
    url = pair[0].stream_url(model="echo", prompt="a b", resumeUrl=n8n.url())
    pair[0].read(url)

    def attempts() -> list[str]:
        # The other worker may have looked in the very moment in which it became due.
        return [line["outcome"] for one in pair for line in one.lines("callback.attempted", session=session_in(url))]

    wait_until(attempts)
    assert [received.json["attempt"] for received in n8n.requests] == [1]
    assert attempts() == ["delivered"]


@pytest.mark.parametrize("embedded", [True, False])
def test_a_worker_told_to_stop_lets_its_answers_and_callbacks_finish(
    start_service: StartService, request: pytest.FixtureRequest, provider: ProviderServer, n8n: Receiver, embedded: bool
) -> None:
    environ = BRIEF if embedded else {"REDIS_URL": request.getfixturevalue("redis_url"), **BRIEF}
    service = start_service(DRAIN_SECONDS="10", **environ, **provider.openai_environ)
    watched = service.stream_url(model="gpt-test-long-n40-d25-i96", resumeUrl=n8n.url("/watched"))
    alone = service.stream_url(model="gpt-test-long-n40-d25-i97", resumeUrl=n8n.url("/alone"))
    with service.watch(alone) as viewer:
        next(viewer)
    reading = gevent.spawn(service.read, watched)
    provider.wait_for_open_streams(2)

    stopping = gevent.spawn(service.stop)

    events = reading.get(timeout=15)
    stopping.get(timeout=20)
    callbacks = n8n.wait_for(2, timeout=5)
    assert events[-1].data == "[DONE]"
    assert {callback.json["status"] for callback in callbacks} == {"completed"}


def test_what_cannot_finish_in_the_drains_time_ends_as_failed_with_its_part(
    start_service: StartService, provider: ProviderServer, n8n: Receiver
) -> None:
    service = start_service(DRAIN_SECONDS="0.5", **BRIEF, **provider.openai_environ)
    url = service.stream_url(model="gpt-test-hold-n5-k2-i98", resumeUrl=n8n.url())
    with service.watch(url) as viewer:
        seen = [next(viewer) for _ in range(2)]

    service.stop()

    (callback,) = n8n.wait_for(1, timeout=5)
    assert (callback.json["status"], callback.json["error"]["code"]) == ("failed", "shutting_down")
    assert callback.json["answer"] == text_of(seen)


def test_a_worker_that_has_drained_begins_nothing_that_its_exit_would_cut(redis_url: str) -> None:
    config = make_config(REDIS_URL=redis_url, **BRIEF)
    with closing(Store(config)) as other:
        parts = create_app(config).extensions["aistream"]
        parts.background.start()
        pending = parts.generations.accept(str(uuid.uuid4()), "n8n", ECHO, "http://127.0.0.1:9/none")
        parts.background.drain()

        with pytest.raises(StoreUnavailable):  # a viewer is held, and then finds another worker
            parts.generations.claim(pending.id)
        late = parts.generations.accept(str(uuid.uuid4()), "n8n", msgspec.structs.replace(ECHO, immediate=True), "http://n8n/w")

        assert len(parts.generations.running) == 0
        assert all(isinstance(other.claim(session.id), Claimed) for session in (pending, late))
        parts.store.close()


def test_in_the_second_half_of_its_drain_a_worker_leaves_new_answers_to_others(
    start_service: StartService, redis_url: str, provider: ProviderServer, n8n: Receiver
) -> None:
    environ = {"REDIS_URL": redis_url, "LEASE_SECONDS": "1", "DRAIN_SECONDS": "5", **provider.openai_environ}
    service = start_service(**environ)
    ended = service.stream_url(model="gpt-test-hello-i103")
    said = service.read(ended)
    running = service.stream_url(model="gpt-test-hold-n5-k2-i101", resumeUrl=n8n.url("/running"), start="immediate")
    provider.wait_for_open_streams(1)
    stopping = gevent.spawn(service.stop)
    gevent.sleep(3.2)  # it drains, and waits for the one that runs

    late = service.stream_url(model="gpt-test-hello-i102", resumeUrl=n8n.url("/late"))
    sent_away = service.read(late)  # as by a broken line: nothing, and no reason not to come back
    begun = provider.requests("gpt-test-hello-i102")
    replayed = service.read(ended)
    stopping.get(timeout=20)
    alive = start_service(**environ)
    whole = alive.read(on(alive, late))

    assert (sent_away, begun, replayed) == ([], [], said)
    assert whole[-1].data == "[DONE]"
    assert [n8n.wait_for(1, path=path)[0].json["status"] for path in ("/running", "/late")] == ["failed", "completed"]
    assert running and len(provider.requests("gpt-test-hello-i102")) == 1


def test_an_idle_connection_does_not_hold_a_worker_back(start_service: StartService) -> None:
    service = start_service(DRAIN_SECONDS="60", **BRIEF)
    with socket.create_connection(("127.0.0.1", service.port)) as idle:
        idle.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert idle.recv(4096).startswith(b"HTTP/1.1 200")

        service.stop()

    assert service.lines("worker.drained") and "SIGKILL" not in service.log


def test_until_a_worker_refuses_connections_those_that_it_takes_have_their_answer(start_service: StartService) -> None:
    service = start_service(DRAIN_SECONDS="1", **BRIEF)
    request = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    answers: list[bytes] = []

    def ask() -> bool:
        with socket.socket() as sock:
            if sock.connect_ex(("127.0.0.1", service.port)):
                return False
            sock.sendall(request)
            try:
                answers.append(sock.recv(4096))
            except ConnectionError as error:
                answers.append(str(error).encode())
            return True

    def keep_asking() -> None:
        while ask():
            gevent.sleep(0.01)

    asking = [gevent.spawn(keep_asking) for _ in range(6)]
    gevent.sleep(0.2)
    os.kill(service.pid, signal.SIGTERM)
    gevent.joinall(asking, timeout=15, raise_error=True)

    assert all(one.ready() for one in asking) and len(answers) > 20
    # Between the last look and the close lies one instant, in which a busy machine may let a connection arrive. Without the close
    # it was the last one of each client.
    assert len([answer for answer in answers if not answer.startswith(b"HTTP/1.1 200")]) <= 1
    assert any(b"Connection: close" in answer for answer in answers)


def test_while_redis_is_away_init_says_so_and_local_viewers_notice_nothing(
    start_service: StartService, provider: ProviderServer, n8n: Receiver, tmp_path: Path, free_port: int
) -> None:
    redis = _redis(tmp_path, free_port)
    service = start_service(REDIS_URL=f"redis://127.0.0.1:{free_port}", **provider.openai_environ)
    url = service.stream_url(model="gpt-test-long-n60-d30-i99", resumeUrl=n8n.url())
    try:
        with service.watch(url) as viewer:
            got = [next(viewer) for _ in range(5)]
            redis.send_signal(signal.SIGTERM)
            redis.wait(10)
            refused = service.init()
            not_ready = httpx.get(f"{service.url}/health/ready")
            got += [next(viewer) for _ in range(20)]
            redis = _redis(tmp_path, free_port)
            got += list(viewer)

        (callback,) = n8n.wait_for(1, timeout=10)
        assert (refused.status_code, refused.json()["code"], refused.headers["Retry-After"]) == (503, "store_unavailable", "2")
        assert (not_ready.status_code, not_ready.json()["missing"]) == (503, ["redis"])
        assert got[-1].data == "[DONE]"
        assert [event.id for event in got[:-1]] == [f"1-{i}" for i in range(1, len(got))]
        assert text_of(got) == "".join(words(60))
        assert callback.json["answer"] == text_of(got) == text_of(service.read(url))
    finally:
        redis.terminate()
        redis.wait(10)


def _redis(folder: Path, port: int) -> "subprocess.Popen[bytes]":
    """A Redis that keeps its data over a restart."""
    command = ["redis-server", "--port", str(port), "--dir", str(folder), "--appendonly", "yes"]
    path = f"{sys.prefix}/bin:{os.environ['PATH']}"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "PATH": path})
    wait_until(lambda: _listens(port))
    return process


def _listens(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def test_flask_run_serves_the_same_for_debugging(free_port: int, tmp_path: Path, n8n: Receiver) -> None:
    environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "JWT_SECRET": SECRET, "FLASK_RUN_PORT": str(free_port)}
    environ["RESUME_URL_ALLOWED_ORIGINS"] = n8n.origin  # a .env beside .flaskenv may name others
    log = (tmp_path / "log").open("w")
    command = [sys.executable, "-m", "flask", "run"]
    process = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{free_port}"
    try:
        wait_until(lambda: _listens(free_port), timeout=20)
        body = {"n8nToken": n8n_token(), "prompt": "a b c", "resumeUrl": n8n.url()}
        answer = httpx.post(f"{url}/init-stream", json=body).json()
        stream = url + answer["streamUrl"][answer["streamUrl"].index("/stream/") :]

        with watch(stream) as viewer:
            events = list(viewer)

        (callback,) = n8n.wait_for(1)
        assert text_of(events) == callback.json["answer"] == "a b c"
        assert httpx.get(url).status_code == 200
    finally:
        process.terminate()
        process.wait(10)
        log.close()
    printed = (tmp_path / "log").read_text()
    assert '"event":"viewer.left"' in printed and "access_token" not in printed and "Traceback" not in printed
