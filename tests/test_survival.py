"""What survives what: each row of docs/survival.md, produced with real processes, real signals and a real Redis.

Stops, viewers that leave, stores that go away or lose what they had, failovers, deploys. tests/test_workers.py has the lost and
the paused workers; tests/test_rules.py the interleavings that no process test can hit on purpose.
"""

import json
import os
import signal
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import gevent
import httpx
import pytest
from flask.testing import FlaskClient
from gevent.pool import Pool

from aistream.session import Request
from aistream.store import Store
from tests.conftest import make_config, parts_of
from tests.neighbours.line import Line
from tests.neighbours.provider import Asked, ProviderServer
from tests.neighbours.receiver import HANG, Receiver
from tests.neighbours.redis import RedisServer, program
from tests.neighbours.scenarios import words
from tests.service import PROMPT, Event, Service, n8n_token, on, session_in, text_of, wait_until, watch

StartService = Callable[..., Service]
LEASE = {"LEASE_SECONDS": "1"}
EVENT_STREAM = {"Accept": "text/event-stream"}


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis of the test's own, which it may kill."""
    if program() is None:
        from tests.conftest import missing

        missing("redis-server")
    with RedisServer(tmp_path / "redis") as server:
        yield server


def stop(url: str) -> httpx.Response:
    """Presses the stop button."""
    path, _, query = url.partition("?")
    return httpx.post(f"{path}/cancel?{query}", timeout=10)


def asked_of(provider: ProviderServer, model: str) -> Asked:
    """The one request for this model."""
    (asked,) = provider.requests(model)
    return asked


# The stop button


@pytest.mark.parametrize("by", ["its own worker", "another worker"])
def test_a_stopped_answer_lets_the_provider_go_within_a_second_and_is_kept(
    pair: list[Service], provider: ProviderServer, n8n: Receiver, by: str
) -> None:
    model = f"gpt-test-hold-n6-k3-i{200 + len(by)}"
    url = pair[0].stream_url(model=model, resumeUrl=n8n.url())
    other = pair[0 if by == "its own worker" else 1]

    with watch(on(pair[0], url)) as viewer, watch(on(pair[1], url) + "&format=json") as second:
        seen = [next(viewer) for _ in range(3)]
        wait_until(lambda: '" "' not in next(second).data and second.last_id == "1-3")
        stopped_at = time.time()
        first_word, again = stop(on(other, url)), stop(on(pair[0], url))
        rest, rest_of_second = list(viewer), list(second)

    (callback,) = n8n.wait_for(1)
    asked = asked_of(provider, model)
    late = stop(on(pair[1], url))
    session = session_in(url)
    # On its own worker it may have ended by the time the store is asked.
    for answer in (first_word, again):
        assert answer.json() == {"ok": True, "streamId": session, "status": answer.json()["status"]}
        assert (answer.status_code, answer.json()["status"]) in ((202, "cancelling"), (200, "cancelled"))
    assert asked.client_left and (asked.ended_at or 0) - stopped_at < 1
    assert [event.data for event in rest] == ["[DONE]"]
    assert [json.loads(event.data)["type"] for event in rest_of_second[:-1]] == ["usage", "cancelled"]
    assert (callback.json["status"], callback.json["answer"]) == ("cancelled", text_of(seen))
    assert (callback.json["finish_reason"], callback.json["error"]) == ("cancelled", None)
    assert (late.status_code, late.json()["status"]) == (200, "cancelled")


def test_a_session_that_is_stopped_before_anybody_came_never_runs(
    service: Service, provider: ProviderServer, n8n: Receiver
) -> None:
    url = service.stream_url(model="gpt-test-hello-i210", resumeUrl=n8n.url())

    answers = [stop(url), stop(url)]

    (callback,) = n8n.wait_for(1)
    events = service.read(url)
    assert [(answer.status_code, answer.json()["status"]) for answer in answers] == [(200, "cancelled")] * 2
    assert (callback.json["status"], callback.json["answer"], callback.json["output_tokens"]) == ("cancelled", "", 0)
    assert [event.data for event in events] == ["[DONE]"]
    assert provider.requests("gpt-test-hello-i210") == []


def test_an_answer_that_has_ended_is_not_stopped_any_more(service: Service, n8n: Receiver) -> None:
    url = service.stream_url(model="echo", prompt="a b", resumeUrl=n8n.url())
    service.read(url)

    answer = stop(url)

    (callback,) = n8n.wait_for(1)
    assert (answer.status_code, answer.json()["status"]) == (200, "completed")
    assert callback.json["status"] == "completed"


def test_only_who_may_watch_may_stop(service: Service) -> None:
    url, other = service.stream_url(model="echo"), service.stream_url(model="echo")
    path, _, query = url.partition("?")

    refused = [
        httpx.post(f"{path}/cancel"),
        httpx.post(f"{other.partition('?')[0]}/cancel?{query}"),
        httpx.post(f"{service.url}/stream/no-uuid/cancel?{query}"),
    ]

    assert [answer.status_code for answer in refused] == [401, 404, 404]
    assert httpx.get(f"{path}/cancel?{query}").status_code == 405
    assert text_of(service.read(url)) == PROMPT


def test_a_stop_needs_no_preflight_and_is_readable_across_origins(start_service: StartService) -> None:
    service = start_service(ALLOWED_ORIGINS="https://chat.example.com")
    url = service.stream_url(model="echo")
    path, _, query = url.partition("?")

    answer = httpx.post(f"{path}/cancel?{query}", headers={"Origin": "https://chat.example.com"}, content=b"")

    assert answer.status_code == 200
    assert answer.headers["Access-Control-Allow-Origin"] == "https://chat.example.com"


def test_while_redis_is_away_a_stop_still_lets_the_provider_go(
    start_service: StartService, redis: RedisServer, provider: ProviderServer, n8n: Receiver
) -> None:
    service = start_service(REDIS_URL=redis.url, **provider.openai_environ)
    url = service.stream_url(model="gpt-test-hold-n6-k3-i211", resumeUrl=n8n.url())
    with service.watch(url) as viewer:
        seen = [next(viewer) for _ in range(3)]
        gevent.sleep(0.1)
        redis.kill()

        answer = stop(url)
        wait_until(lambda: asked_of(provider, "gpt-test-hold-n6-k3-i211").client_left, timeout=1)
        redis.start()
        rest = list(viewer)

    (callback,) = n8n.wait_for(1, timeout=10)
    assert answer.status_code == 202
    assert [event.data for event in rest] == ["[DONE]"]
    assert (callback.json["status"], callback.json["answer"]) == ("cancelled", text_of(seen))


def test_while_redis_is_away_a_stop_of_what_has_ended_is_not_accepted(
    start_service: StartService, redis: RedisServer, provider: ProviderServer, n8n: Receiver
) -> None:
    service = start_service(REDIS_URL=redis.url, **provider.openai_environ)
    url = service.stream_url(model="gpt-test-hold-n6-k3-i212", resumeUrl=n8n.url())
    with service.watch(url) as viewer:
        seen = [next(viewer) for _ in range(3)]
        gevent.sleep(0.1)
        redis.kill()
        provider.release()
        seen += [next(viewer) for _ in range(3)]
        wait_until(lambda: asked_of(provider, "gpt-test-hold-n6-k3-i212").ended == "complete")
        gevent.sleep(0.1)

        answer = stop(url)
        redis.start()
        rest = list(viewer)

    (callback,) = n8n.wait_for(1, timeout=10)
    assert (answer.status_code, answer.json()["code"]) == (503, "store_unavailable")
    assert [event.data for event in rest] == ["[DONE]"]
    assert (callback.json["status"], callback.json["answer"]) == ("completed", text_of(seen))
    assert (stop(url).status_code, stop(url).json()["status"]) == (200, "completed")


# Who starts an answer, and who ends it by leaving


def test_an_immediate_session_runs_without_a_viewer(service: Service, n8n: Receiver) -> None:
    url = service.stream_url(model="gpt-test-hello-i220", resumeUrl=n8n.url(), start="immediate")

    (callback,) = n8n.wait_for(1)

    assert callback.json["status"] == "completed"
    assert text_of(service.read(url)) == callback.json["answer"] != ""


def test_an_immediate_session_whose_worker_was_lost_before_it_began_is_begun_by_another(
    start_service: StartService, redis_url: str, n8n: Receiver
) -> None:
    environ = {"REDIS_URL": redis_url, **LEASE}
    asked = Request(prompt="a b", requested_model="echo", model="echo", provider="echo", max_tokens=5, immediate=True)
    start_service(**environ)

    with closing(Store(make_config(**environ))) as lost:
        lost.create(str(uuid.uuid4()), "n8n", asked, n8n.url())

    (callback,) = n8n.wait_for(1)
    assert (callback.json["status"], callback.json["answer"]) == ("completed", "a b")


def test_a_session_that_wants_it_is_cancelled_when_its_last_viewer_has_left(
    pair: list[Service], provider: ProviderServer, n8n: Receiver
) -> None:
    model = "gpt-test-hold-n6-k3-i221"
    asked = {"onDisconnect": "cancel", "disconnectGraceSeconds": 1}
    url = pair[0].stream_url(model=model, resumeUrl=n8n.url(), **asked)
    with watch(on(pair[0], url)) as first:
        seen = [next(first) for _ in range(3)]
        second = gevent.spawn(pair[1].read, on(pair[1], url))
        wait_until(lambda: len(pair[1].lines("viewer.left", session=session_in(url))) == 0 and not second.dead)
        gevent.sleep(0.3)

    gevent.sleep(3)  # the first has left, the second watches on another worker
    watched = asked_of(provider, model).ended
    second.kill()
    left_at = time.time()

    (callback,) = n8n.wait_for(1, timeout=8)
    assert watched == ""
    assert 1 <= callback.at - left_at < 5
    assert (callback.json["status"], callback.json["answer"]) == ("cancelled", text_of(seen))
    assert asked_of(provider, model).client_left


def test_a_viewer_that_comes_back_in_time_ends_nothing(service: Service, provider: ProviderServer, n8n: Receiver) -> None:
    url = service.stream_url(
        model="gpt-test-hold-n6-k3-i222", resumeUrl=n8n.url(), onDisconnect="cancel", disconnectGraceSeconds=2
    )
    with service.watch(url) as viewer:
        seen = [next(viewer) for _ in range(3)]
    gevent.sleep(0.6)

    with service.watch(url, seen[-1].id) as viewer:
        gevent.sleep(3.4)
        provider.release()
        seen += list(viewer)

    (callback,) = n8n.wait_for(1)
    assert (callback.json["status"], callback.json["answer"]) == ("completed", text_of(seen))


# Viewers


def test_a_viewer_too_slow_for_its_buffer_is_dropped_alone_and_can_resume(
    start_service: StartService, provider: ProviderServer, n8n: Receiver
) -> None:
    service = start_service(SLOW_VIEWER_SECONDS="1", **provider.openai_environ)
    url = service.stream_url(model="gpt-test-big-b1500", resumeUrl=n8n.url())
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", service.port))
        path = url[url.index("/stream/") :]
        slow.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nAccept: text/event-stream\r\n\r\n".encode())
        head = slow.recv(512)

        whole = service.read(url)
        wait_until(lambda: [line for line in service.lines("viewer.left") if line.get("slow")], timeout=10)

    (callback,) = n8n.wait_for(1)
    rest = service.read(url, whole[0].id)
    assert head.startswith(b"HTTP/1.1 200")
    assert whole[-1].data == "[DONE]" and rest == whole[1:]
    assert text_of(whole) == callback.json["answer"] and len(callback.json["answer"]) > 1_000_000
    assert "Traceback" not in service.log


# Workers that are lost or stopped: more in tests/test_workers.py


def test_when_all_workers_were_gone_the_next_one_ends_what_they_left(
    start_service: StartService, redis_url: str, provider: ProviderServer, n8n: Receiver
) -> None:
    environ = {"REDIS_URL": redis_url, **LEASE, **provider.openai_environ}
    lost = start_service(**environ)
    said = lost.stream_url(model="gpt-test-hold-n6-k3-i230", resumeUrl=n8n.url("/said"))
    silent = lost.stream_url(model="gpt-test-hello-f2000-x1-i231", resumeUrl=n8n.url("/silent"), start="immediate")
    pending = lost.stream_url(model="gpt-test-hello-i232", resumeUrl=n8n.url("/pending"))
    with watch(said) as viewer:
        seen = [next(viewer) for _ in range(3)]
        gevent.sleep(0.1)
        os.killpg(lost.pid, signal.SIGKILL)
    provider.release()

    alive = start_service(**environ)
    began = time.monotonic()
    callbacks = [n8n.wait_for(1, path=path, timeout=10)[0] for path in ("/said", "/silent")]

    assert time.monotonic() - began < 2 * 1 + 3  # twice the lease, and a margin for a busy machine
    assert [callback.json["status"] for callback in callbacks] == ["failed", "completed"]
    assert callbacks[0].json["answer"] == text_of(seen)
    assert text_of(alive.read(on(alive, silent))) == callbacks[1].json["answer"]
    assert text_of(alive.read(on(alive, pending))) == n8n.wait_for(1, path="/pending")[0].json["answer"]


def test_a_worker_that_was_stopped_shows_nothing_new_before_redis_has_said_whose_the_session_is(
    start_service: StartService, redis: RedisServer, provider: ProviderServer, n8n: Receiver
) -> None:
    with Line(redis.port) as line:
        urls = f"redis://127.0.0.1:{line.port}", redis.url
        paused, alive = Pool(2).map(lambda url: start_service(REDIS_URL=url, **LEASE, **provider.openai_environ), urls)
        url = paused.stream_url(model="gpt-test-hold-n6-k3-i233", resumeUrl=n8n.url())
        with watch(on(paused, url)) as viewer:
            seen = [next(viewer) for _ in range(3)]
            gevent.sleep(0.1)
            os.killpg(paused.pid, signal.SIGSTOP)
            (callback,) = n8n.wait_for(1, timeout=10)
            provider.release()
            line.lead_to(None)  # it wakes up, the provider has gone on, and Redis cannot be asked

            os.killpg(paused.pid, signal.SIGCONT)
            got: list[Event] = []
            reading = gevent.spawn(lambda: got.extend(viewer))
            gevent.sleep(1.5)
            while_away = list(got)
            line.lead_to(redis.port)
            reading.get(timeout=15)

    assert while_away == []
    assert [json.loads(event.data)["code"] for event in got] == ["worker_lost"]
    assert callback.json["answer"] == text_of(seen)
    assert alive.read(on(alive, url)) == seen + got


# Redis that is away


def test_an_outage_longer_than_the_lease_ends_nothing_that_is_healthy(
    pair_on: Callable[[str], list[Service]], redis: RedisServer, provider: ProviderServer, n8n: Receiver
) -> None:
    owner, other = pair_on(redis.url)
    url = owner.stream_url(model="gpt-test-long-n130-d40-i240", resumeUrl=n8n.url())
    with watch(on(owner, url)) as viewer:
        got = [next(viewer) for _ in range(5)]
        redis.kill()
        away_since = time.monotonic()
        refused = other.init()
        got += [next(viewer) for _ in range(75)]  # three seconds and more: three leases
        away_for = time.monotonic() - away_since
        redis.start()
        got += list(viewer)

    (callback,) = n8n.wait_for(1, timeout=10)
    assert away_for > 2.5
    assert (refused.status_code, refused.headers["Content-Type"]) == (503, "application/problem+json")
    assert (refused.json()["code"], refused.headers["Retry-After"]) == ("store_unavailable", "2")
    assert [event.id for event in got[:-1]] == [f"1-{i}" for i in range(1, len(got))]
    assert text_of(got) == "".join(words(130))
    assert (callback.json["status"], callback.json["answer"]) == ("completed", text_of(got))
    assert other.read(on(other, url)) == got
    assert len(n8n.requests) == 1
    # An outage is one line when it begins and one when it is over.
    assert [len(owner.lines(name)) for name in ("store.away", "store.back")] == [1, 1]
    assert owner.lines("store.back")[0]["away_ms"] > 2_000


def test_the_end_is_shown_only_when_redis_has_it(
    start_service: StartService, redis: RedisServer, provider: ProviderServer, n8n: Receiver
) -> None:
    service = start_service(REDIS_URL=redis.url, **provider.openai_environ)
    url = service.stream_url(model="gpt-test-hold-n4-k2-i241", resumeUrl=n8n.url())
    got: list[Event] = []
    with watch(url) as viewer:
        got += [next(viewer) for _ in range(2)]
        redis.kill()
        provider.release()
        reading = gevent.spawn(lambda: got.extend(viewer))
        gevent.sleep(1)
        while_away = [event.data for event in got]
        redis.start()
        reading.get(timeout=10)

    (callback,) = n8n.wait_for(1, timeout=10)
    assert len(while_away) == 4 and "[DONE]" not in while_away
    assert got[-1].data == "[DONE]" and callback.json["answer"] == text_of(got)


def test_a_viewer_of_another_worker_gets_what_it_missed_when_redis_is_back(
    pair_on: Callable[[str], list[Service]], redis: RedisServer, provider: ProviderServer
) -> None:
    owner, other = pair_on(redis.url)
    url = owner.stream_url(model="gpt-test-long-n80-d30-i242")
    with watch(on(owner, url)) as viewer, watch(on(other, url)) as follower:
        got = [next(viewer) for _ in range(5)]
        followed = [next(follower) for _ in range(5)]
        redis.kill()
        got += [next(viewer) for _ in range(25)]
        redis.start()
        got += list(viewer)
        followed += list(follower)

    assert followed == got and got[-1].data == "[DONE]"


@pytest.mark.parametrize(
    ("settings", "level", "advised"),
    [
        ({"maxmemory-policy": "noeviction", "appendonly": "yes"}, "info", []),
        ({"maxmemory-policy": "noeviction", "appendonly": "no"}, "info", ["appendonly"]),
        ({"maxmemory-policy": "allkeys-lru", "appendonly": "no"}, "warning", ["maxmemory-policy", "appendonly"]),
    ],
)
def test_a_redis_that_would_lose_sessions_is_warned_of_at_start(
    start_service: StartService, redis: RedisServer, settings: dict[str, str], level: str, advised: list[str]
) -> None:
    with redis.client() as client:
        for name, value in settings.items():
            client.config_set(name, value)
        version = client.info("server")["redis_version"]

    service = start_service(REDIS_URL=redis.url)

    wait_until(lambda: service.lines("store.checked"))
    (line,) = service.lines("store.checked")
    assert (line["level"], line["version"]) == (level, version)
    assert (line["maxmemory_policy"], line["append_only"]) == (settings["maxmemory-policy"], settings["appendonly"] == "yes")
    assert [advice.split()[1] for advice in line.get("advice", [])] == advised


def test_a_redis_that_does_not_say_what_it_is_will_do(start_service: StartService, redis: RedisServer) -> None:
    with redis.client() as client:
        client.execute_command("ACL", "SETUSER", "default", "-info")

    service = start_service(REDIS_URL=redis.url)

    assert text_of(service.read(service.stream_url(model="echo", prompt="a b"))) == "a b"
    assert service.lines("store.checked") == [] and "Traceback" not in service.log


# Redis that has lost its data


def test_a_running_answer_survives_a_redis_that_starts_empty(
    pair_on: Callable[[str], list[Service]], redis: RedisServer, provider: ProviderServer, n8n: Receiver
) -> None:
    owner, other = pair_on(redis.url)
    talking = owner.stream_url(model="gpt-test-long-n100-d25-i250", resumeUrl=n8n.url("/talking"))
    silent = owner.stream_url(model="gpt-test-hold-n6-k3-i251", resumeUrl=n8n.url("/silent"))
    with watch(on(owner, talking)) as viewer, watch(on(other, talking)) as follower, watch(on(owner, silent)) as waiting:
        got = [next(viewer) for _ in range(5)]
        followed = [next(follower) for _ in range(5)]
        held = [next(waiting) for _ in range(3)]
        redis.empty()
        got += list(viewer)
        followed += list(follower)
        provider.release()
        held += list(waiting)

    (of_talking,) = n8n.wait_for(1, path="/talking", timeout=10)
    (of_silent,) = n8n.wait_for(1, path="/silent", timeout=10)
    assert followed == got and got[-1].data == held[-1].data == "[DONE]"
    assert [event.id for event in got[:-1]] == [f"1-{i}" for i in range(1, len(got))]
    assert text_of(got) == "".join(words(100))
    assert (of_talking.json["status"], of_talking.json["answer"]) == ("completed", text_of(got))
    assert (of_silent.json["status"], of_silent.json["answer"]) == ("completed", text_of(held))
    assert other.read(on(other, silent)) == held


def test_a_session_that_waits_for_its_viewer_survives_a_redis_that_starts_empty(
    pair_on: Callable[[str], list[Service]], redis: RedisServer, provider: ProviderServer, n8n: Receiver
) -> None:
    accepting, other = pair_on(redis.url)
    model = "gpt-test-hello-i252"
    url = accepting.stream_url(model=model, resumeUrl=n8n.url())

    redis.empty()
    events = other.read(on(other, url))  # comes before anybody could tell the store again: it is held, not refused

    (callback,) = n8n.wait_for(1, timeout=10)
    assert events[-1].data == "[DONE]" and callback.json["answer"] == text_of(events) != ""
    assert len(provider.requests(model)) == 1


def test_a_worker_that_leaves_tells_an_empty_redis_first_what_it_alone_knows(
    start_services: Callable[..., list[Service]], redis: RedisServer, n8n: Receiver
) -> None:
    leaving, staying = start_services(2, REDIS_URL=redis.url, SESSION_TTL_SECONDS="4", **LEASE)
    leaving.stream_url(model="echo", resumeUrl=n8n.url())

    redis.empty()
    leaving.stop()  # it has nothing else to do

    (callback,) = n8n.wait_for(1, timeout=10)
    assert callback.json["status"] == "expired"
    assert leaving.lines("store.lost_writes")
    wait_until(lambda: staying.lines("callback.attempted"))


def test_a_callback_that_is_owed_survives_a_redis_that_starts_empty(
    start_service: StartService, redis: RedisServer, provider: ProviderServer, n8n: Receiver
) -> None:
    service = start_service(REDIS_URL=redis.url, CALLBACK_SCHEDULE="0,1,1,1,1,1,1,1,1,1", **LEASE, **provider.openai_environ)
    n8n.down()
    url = service.stream_url(model="gpt-test-hello-i253", resumeUrl=n8n.url())
    events = service.read(url)
    wait_until(lambda: service.lines("callback.attempted"))

    redis.empty()
    n8n.up()

    (callback,) = n8n.wait_for(1, timeout=15)
    assert (callback.json["status"], callback.json["answer"]) == ("completed", text_of(events))
    assert service.read(url) == events


def test_a_callback_on_its_way_when_redis_loses_its_data_is_sent_once(
    start_service: StartService, redis: RedisServer, n8n: Receiver
) -> None:
    service = start_service(REDIS_URL=redis.url, **LEASE)
    n8n.answers([lambda _: (gevent.sleep(3), (200, {}, "{}"))[1]])
    service.read(service.stream_url(model="echo", prompt="a", resumeUrl=n8n.url()))
    n8n.wait_for(1)

    redis.empty()
    wait_until(lambda: service.lines("callback.attempted"))
    gevent.sleep(2)

    assert len(n8n.requests) == 1


def test_a_session_stopped_before_anybody_came_is_not_told_twice_by_a_redis_that_starts_empty(
    pair_on: Callable[[str], list[Service]], redis: RedisServer, n8n: Receiver
) -> None:
    accepting, other = pair_on(redis.url)
    url = accepting.stream_url(model="gpt-test-hello-i256", resumeUrl=n8n.url())
    stop(on(other, url))
    n8n.wait_for(1)
    wait_until(lambda: other.lines("callback.attempted"))

    redis.empty()
    wait_until(lambda: other.lines("recall.told"))
    events = other.read(on(other, url))

    assert [event.data for event in events] == ["[DONE]"]
    assert [callback.json["status"] for callback in n8n.requests] == ["cancelled"]


def test_a_viewer_is_told_when_redis_loses_a_session_together_with_the_worker_that_ran_it(
    pair_on: Callable[[str], list[Service]], redis: RedisServer
) -> None:
    owner, other = pair_on(redis.url)
    url = owner.stream_url(model="gpt-test-hold-n6-k3-i255")
    with watch(on(owner, url)) as viewer, watch(on(other, url)) as follower:
        seen = [next(viewer) for _ in range(3)]
        followed = [next(follower) for _ in range(3)]
        os.killpg(owner.pid, signal.SIGKILL)

        redis.empty()
        (last,) = list(follower)

    again = httpx.get(on(other, url), headers={**EVENT_STREAM, "Last-Event-ID": last.id}, timeout=30)
    fresh = httpx.get(on(other, url), headers=EVENT_STREAM, timeout=30)
    assert followed == seen
    assert (last.event, last.id, json.loads(last.data)["code"]) == ("error", seen[-1].id, "session_lost")
    assert (again.status_code, fresh.status_code) == (404, 404)


def test_a_session_that_expired_is_not_told_twice_by_a_redis_that_starts_empty(
    start_service: StartService, redis: RedisServer, n8n: Receiver
) -> None:
    service = start_service(REDIS_URL=redis.url, SESSION_TTL_SECONDS="1", **LEASE)
    url = service.stream_url(model="echo", resumeUrl=n8n.url())
    (callback,) = n8n.wait_for(1)
    wait_until(lambda: service.lines("callback.attempted"))

    redis.empty()
    wait_until(lambda: service.lines("recall.told"))
    gevent.sleep(1)

    assert callback.json["status"] == "expired" and len(n8n.requests) == 1
    assert '"expired"' in service.read(url)[-1].data


# A failover: a real replica, promoted without the last writes


@pytest.fixture
def failover(redis: RedisServer, tmp_path: Path) -> Iterator[tuple[Line, Callable[[], None], Callable[[], None]]]:
    """The line that services reach Redis by; `detach` promotes the replica, `switch` leads the line to it.

    What the master gets between the two is lost.
    """
    with RedisServer(tmp_path / "replica") as replica, Line(redis.port) as line:
        replica.follow(redis)
        yield line, replica.promote, lambda: line.lead_to(replica.port)


Failover = tuple[Line, Callable[[], None], Callable[[], None]]


def test_a_failover_without_the_last_events_leaves_no_gap(
    pair_on: Callable[[str], list[Service]], failover: Failover, provider: ProviderServer, n8n: Receiver
) -> None:
    line, detach, switch = failover
    owner, other = pair_on(f"redis://127.0.0.1:{line.port}")
    url = owner.stream_url(model="gpt-test-long-n100-d25-i260", resumeUrl=n8n.url())
    with watch(on(owner, url)) as viewer, watch(on(other, url)) as follower:
        got = [next(viewer) for _ in range(5)]
        followed = [next(follower) for _ in range(5)]
        gevent.sleep(0.1)
        detach()
        got += [next(viewer) for _ in range(20)]
        followed += [next(follower) for _ in range(20)]
        switch()
        got += list(viewer)
        followed += list(follower)

    (callback,) = n8n.wait_for(1, timeout=10)
    assert followed == got and got[-1].data == "[DONE]"
    assert [event.id for event in got[:-1]] == [f"1-{i}" for i in range(1, len(got))]
    assert text_of(got) == "".join(words(100))
    assert callback.json["answer"] == text_of(got)
    assert other.read(on(other, url)) == got
    assert len(n8n.requests) == 1


def test_a_failover_without_the_ending_makes_no_second_one(
    pair_on: Callable[[str], list[Service]], failover: Failover, provider: ProviderServer, n8n: Receiver
) -> None:
    line, detach, switch = failover
    owner, other = pair_on(f"redis://127.0.0.1:{line.port}")
    url = owner.stream_url(model="gpt-test-hold-n6-k3-i261", resumeUrl=n8n.url())
    with watch(on(owner, url)) as viewer:
        got = [next(viewer) for _ in range(3)]
        gevent.sleep(0.1)
        detach()
        provider.release()
        got += list(viewer)
    n8n.wait_for(1)
    wait_until(lambda: owner.lines("callback.attempted") or other.lines("callback.attempted"))

    switch()
    gevent.sleep(3)  # two leases and more

    assert got[-1].data == "[DONE]"
    assert other.read(on(other, url)) == got
    assert [callback.json["status"] for callback in n8n.requests] == ["completed"]


def test_a_failover_without_a_new_session_and_its_claim_loses_neither(
    pair_on: Callable[[str], list[Service]], failover: Failover, provider: ProviderServer, n8n: Receiver
) -> None:
    line, detach, switch = failover
    owner, other = pair_on(f"redis://127.0.0.1:{line.port}")
    claimed_later = owner.stream_url(model="gpt-test-hold-n6-k3-i262", resumeUrl=n8n.url("/claimed"))
    gevent.sleep(0.1)
    detach()
    fresh = owner.stream_url(model="gpt-test-hello-i263", resumeUrl=n8n.url("/fresh"))
    with watch(on(owner, claimed_later)) as viewer:
        got = [next(viewer) for _ in range(3)]
        switch()
        of_fresh = other.read(on(other, fresh))
        provider.release()
        got += list(viewer)

    (of_claimed,) = n8n.wait_for(1, path="/claimed", timeout=10)
    n8n.wait_for(1, path="/fresh", timeout=10)
    assert got[-1].data == of_fresh[-1].data == "[DONE]"
    assert of_claimed.json["answer"] == text_of(got)
    assert other.read(on(other, claimed_later)) == got
    assert len(provider.requests("gpt-test-hold-n6-k3-i262")) == len(provider.requests("gpt-test-hello-i263")) == 1
    assert len(n8n.requests) == 2


# Deploys


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGHUP])
def test_a_deploy_cuts_no_stream_that_can_finish(
    start_service: StartService, redis_url: str, provider: ProviderServer, n8n: Receiver, sig: signal.Signals
) -> None:
    service = start_service(REDIS_URL=redis_url, WEB_CONCURRENCY="2", DRAIN_SECONDS="20", **provider.openai_environ)
    urls = [
        service.stream_url(model=f"gpt-test-long-n60-d50-i{270 + i}", resumeUrl=n8n.url(f"/{i}"), start="immediate")
        for i in range(8)
    ]
    alone = service.stream_url(model="gpt-test-long-n60-d50-i280", resumeUrl=n8n.url("/alone"), start="immediate")
    n8n.answers([lambda _: (gevent.sleep(2), (200, {}, "{}"))[1]], path="/slow")
    reading = [gevent.spawn(service.read, url) for url in urls]
    provider.wait_for_open_streams(9)
    service.read(service.stream_url(model="echo", prompt="x", resumeUrl=n8n.url("/slow")))
    gevent.sleep(0.3)

    os.kill(service.pid, sig)
    events = [one.get(timeout=20) for one in reading]

    assert [one[-1].data for one in events] == ["[DONE]"] * 8
    assert [text_of(one) for one in events] == ["".join(words(60))] * 8
    assert all([event.id for event in one[:-1]] == [f"1-{i}" for i in range(1, len(one))] for one in events)
    for path in ("/alone", "/slow", *(f"/{i}" for i in range(8))):
        assert n8n.wait_for(1, path=path, timeout=10)[0].json["status"] == "completed"
    assert alone
    wait_until(lambda: len(service.lines("worker.drained")) == 2, timeout=20)
    assert [line["cut"] for line in service.lines("worker.drained")] == [0, 0]
    assert len(n8n.requests) == 10


def test_a_draining_worker_still_takes_who_comes_back_and_says_that_it_is_not_ready(
    start_service: StartService, redis_url: str, provider: ProviderServer
) -> None:
    service = start_service(REDIS_URL=redis_url, DRAIN_SECONDS="20", **provider.openai_environ)
    url = service.stream_url(model="gpt-test-hold-n6-k3-i281")
    with service.watch(url) as viewer:
        seen = [next(viewer) for _ in range(2)]
        os.kill(service.pid, signal.SIGTERM)
        gevent.sleep(1)

        ready = httpx.get(f"{service.url}/health/ready")
        with service.watch(url, seen[-1].id) as again:
            third = next(again)
            provider.release()
            rest = list(again)

    assert (ready.status_code, ready.json()["missing"]) == (503, ["draining"])
    assert third.id == "1-3" and rest[-1].data == "[DONE]"


def test_who_can_ask_another_replica_is_sent_there_by_a_worker_that_drains(client: FlaskClient) -> None:
    accepted = client.post("/init-stream", json={"n8nToken": n8n_token(), "resumeUrl": "http://127.0.0.1:9/none", "prompt": "a"})
    url = accepted.json["streamUrl"] if accepted.json else ""
    path = url[url.index("/stream/") :]
    headers = {**EVENT_STREAM, "X-Retry-Elsewhere": "1"}
    parts_of(client).background.draining = True

    sent_away = client.get(path, headers=headers)
    nameless = client.get(path.partition("?")[0], headers=headers)
    elsewhere_too = client.get(path, headers=EVENT_STREAM)

    assert (sent_away.status_code, sent_away.json and sent_away.json["code"]) == (503, "draining")
    assert (nameless.status_code, elsewhere_too.status_code) == (401, 200)
    assert elsewhere_too.text.endswith("data: [DONE]\n\n")


def test_while_old_workers_drain_new_connections_go_to_the_new_ones(
    start_service: StartService, redis_url: str, provider: ProviderServer
) -> None:
    service = start_service(REDIS_URL=redis_url, WEB_CONCURRENCY="2", DRAIN_SECONDS="20", **provider.openai_environ)
    url = service.stream_url(model="gpt-test-hold-n6-k3-i282")
    with service.watch(url) as viewer:
        next(viewer)
        os.kill(service.pid, signal.SIGHUP)
        wait_until(lambda: httpx.get(f"{service.url}/health/ready").status_code == 503, timeout=10)
        wait_until(lambda: httpx.get(f"{service.url}/health/ready").status_code == 200, timeout=10)
        gevent.sleep(1)

        ready = [httpx.get(f"{service.url}/health/ready").status_code for _ in range(30)]
        provider.release()
        list(viewer)

    assert ready == [200] * 30


def test_a_callback_that_hangs_beyond_the_drains_time_is_sent_again_by_the_next_worker(
    start_service: StartService, redis_url: str, n8n: Receiver
) -> None:
    environ = {"REDIS_URL": redis_url, "DRAIN_SECONDS": "1", "CALLBACK_SCHEDULE": "0,0.5,1,1", **LEASE}
    stopping = start_service(**environ)
    n8n.answers([HANG])
    stopping.read(stopping.stream_url(model="echo", prompt="a", resumeUrl=n8n.url()))
    n8n.wait_for(1)

    stopping.stop()
    start_service(**environ)
    first, second = n8n.wait_for(2)

    assert [line["callbacks_given_up"] for line in stopping.lines("worker.drained")] == [1]
    assert [callback.json["attempt"] for callback in (first, second)] == [1, 2]
    assert second.json["answer"] == "a" and first.headers["webhook-id"] == second.headers["webhook-id"]
    assert "Traceback" not in stopping.log


# Bad input


CURSORS = ("-1", "1", "1-", "-", "1-1-1", "0-0", "0-5", "1--1", "+1-1", "18446744073709551616-1", "9-9", "x" * 10_000, "1-\u0661")


def test_a_cursor_that_names_no_event_brings_the_whole_answer_on_every_worker(pair: list[Service]) -> None:
    url = pair[0].stream_url(model="echo", prompt="a b")
    whole = pair[0].read(on(pair[0], url))

    for service in pair:
        for cursor in CURSORS:
            by_header = httpx.get(on(service, url), headers={**EVENT_STREAM, "Last-Event-ID": cursor.encode()})
            assert (by_header.status_code, by_header.text.count("id: ")) == (200, len(whole)), cursor
            by_query = httpx.get(on(service, url), params={**_query(url), "last_event_id": cursor}, headers=EVENT_STREAM)
            if len(cursor) > 8_000:
                assert by_query.status_code == 414  # gunicorn's longest request line
            else:
                assert (by_query.status_code, by_query.text.count("id: ")) == (200, len(whole)), cursor


def _query(url: str) -> dict[str, str]:
    return dict(httpx.URL(url).params)


def test_a_future_cursor_of_a_running_answer_waits_for_the_ending(pair: list[Service], provider: ProviderServer) -> None:
    url = pair[0].stream_url(model="gpt-test-hold-n6-k3-i290")
    with watch(on(pair[0], url)) as viewer:
        next(viewer)
        waiting = [gevent.spawn(service.read, on(service, url), "1-4000") for service in pair]
        gevent.sleep(0.5)
        assert not any(one.dead for one in waiting)
        provider.release()
        whole = list(viewer)

    assert [one.get(timeout=10) for one in waiting] == [whole[-1:]] * 2


def test_another_sessions_cursor_and_token_bring_nothing_of_it(pair: list[Service]) -> None:
    mine = pair[0].stream_url(model="echo", prompt="mine only")
    other = pair[0].stream_url(model="echo", prompt="a b c d e f g h")
    last = pair[0].read(on(pair[0], other))[-1]
    pair[0].read(on(pair[0], mine))

    sent = pair[1].read(on(pair[1], mine), last.id)
    foreign = httpx.get(on(pair[1], other).partition("?")[0], params=_query(mine), headers=EVENT_STREAM)

    assert [event.data for event in sent] == ["[DONE]"]
    assert foreign.status_code == 404
