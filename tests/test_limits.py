"""How much may be asked, by whom: what counts, what the refused are told, and that nobody else notices."""

import dataclasses
import json
import re
import uuid
from collections.abc import Callable
from typing import Any

import gevent
import httpx
import pytest
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from aistream import limits, viewing
from aistream.errors import Limited, Overloaded
from aistream.events import Usage
from aistream.session import EXPIRED, Accepted, Claimed, Finished, IdempotencyKey, Outcome, Quota, Quotas, Request, State
from aistream.store import Store
from tests.conftest import MakeClient, parts_of
from tests.neighbours.provider import ProviderServer
from tests.neighbours.receiver import Receiver
from tests.service import Service, n8n_token, wait_until

MakeStore = Callable[..., Store]
StartService = Callable[..., Service]

ASKED = Request(prompt="Hello", requested_model="echo", model="echo", provider="echo")
AT_ONCE = Request(prompt="Hello", requested_model="echo", model="echo", provider="echo", immediate=True)
NOWHERE = "redis://127.0.0.1:1"
#: No window ends while a test runs.
FEW = {"INIT_RATE_LIMIT": "4/hour", "USER_RATE_LIMIT": "2/hour"}


def init(client: FlaskClient, *, sub: str = "n8n", key: str | None = None, **body: Any) -> TestResponse:
    """Asks for a stream."""
    asked = {"n8nToken": n8n_token(sub=sub), "resumeUrl": "http://127.0.0.1:9/none", "prompt": "Hello", **body}
    return client.post("/init-stream", json=asked, headers={"Idempotency-Key": key} if key else {})


def left(answer: TestResponse) -> dict[str, int]:
    """What the header RateLimit says is left, by quota."""
    found = re.findall(r'"(\w+)";r=(\d+);t=([1-9]\d*)(?:, |$)', answer.headers.get("RateLimit", ""))
    assert ", ".join(f'"{name}";r={amount};t={seconds}' for name, amount, seconds in found) == answer.headers.get("RateLimit", "")
    return {name: int(amount) for name, amount, _ in found}


def refused(answer: TestResponse, status: int, code: str) -> str:
    """What a refused one is told, which must be a problem that may pass."""
    body = answer.get_json()
    assert (answer.status_code, body["code"], body["ok"], body["status"]) == (status, code, False, status), answer.text
    assert answer.mimetype == "application/problem+json" and body["detail"] and body["requestId"]
    assert int(answer.headers["Retry-After"]) >= 1
    return str(body["detail"])


def counted(client: FlaskClient, limit: str) -> float:
    """How often a limit has refused in this process, as the metrics have it."""
    found = re.search(rf'^aistream_limited_total{{limit="{limit}"}} (\S+)$', client.get("/metrics").text, re.MULTILINE)
    return float(found[1]) if found else 0.0


# ---- Inits ----


def test_an_init_is_told_what_is_left_of_its_quotas(make_client: MakeClient, store_url: str) -> None:
    client = make_client(REDIS_URL=store_url, INIT_RATE_LIMIT="4/hour", USER_RATE_LIMIT="2 per 5 minutes")

    first, second, third = init(client, userId="a"), init(client, userId=7), init(client)

    assert first.headers["RateLimit-Policy"] == second.headers["RateLimit-Policy"] == '"init";q=4;w=3600, "user";q=2;w=300'
    assert third.headers["RateLimit-Policy"] == '"init";q=4;w=3600'
    assert [left(one) for one in (first, second, third)] == [{"init": 3, "user": 1}, {"init": 2, "user": 1}, {"init": 1}]


def test_a_user_who_asks_too_much_is_refused_alone(make_client: MakeClient, store_url: str) -> None:
    client = make_client(REDIS_URL=store_url, INIT_RATE_LIMIT="4/hour", USER_RATE_LIMIT="1/hour")
    before = counted(client, "user")

    first, *again = [init(client, userId=7) for _ in range(3)]
    others = [init(client, userId="b"), init(client), init(client, userId=""), init(client, sub="other", userId=7)]

    for answer in again:
        assert refused(answer, 429, "rate_limited") == "The limit of 1 inits within 3600 s is used up (USER_RATE_LIMIT)."
        assert left(answer) == {"init": 3, "user": 0}  # what one quota refuses takes nothing from another
        assert int(answer.headers["Retry-After"]) >= int(answer.headers["RateLimit"].rpartition("t=")[2])
    assert [one.status_code for one in (first, *others)] == [200] * 5
    assert counted(client, "user") == before + 2


def test_a_user_is_the_same_as_text_and_as_number(make_client: MakeClient) -> None:
    client = make_client(USER_RATE_LIMIT="1/hour")

    answers = [init(client, userId=7), init(client, userId="7")]

    assert [one.status_code for one in answers] == [200, 429]


def test_a_subject_has_a_quota_of_its_own_for_all_its_users(make_client: MakeClient, store_url: str) -> None:
    client = make_client(REDIS_URL=store_url, **FEW)

    mine = [init(client, userId=number) for number in range(5)]
    other = init(client, sub="other", userId=1)

    assert [one.status_code for one in mine] == [200, 200, 200, 200, 429]
    assert "INIT_RATE_LIMIT" in refused(mine[-1], 429, "rate_limited")
    assert left(mine[-1]) == {"init": 0, "user": 2}
    assert other.status_code == 200


def test_workers_count_together(make_client: MakeClient, redis_url: str) -> None:
    clients = [make_client(REDIS_URL=redis_url, **FEW) for _ in range(2)]

    answers = [init(clients[number % 2], userId=number) for number in range(5)]

    assert [one.status_code for one in answers] == [200, 200, 200, 200, 429]


def test_what_is_invalid_or_was_said_before_does_not_count(make_client: MakeClient, store_url: str) -> None:
    client = make_client(REDIS_URL=store_url, **FEW)
    first = init(client, userId="a", key="one")

    invalid = [init(client, userId="a", prompt=5), init(client, userId="a", model="unknown"), init(client, sub="", userId=[])]
    reused = init(client, userId="a", key="one", prompt="Other")
    second = init(client, userId="a", key="two")
    replayed = [init(client, userId="a", key=key) for key in ("one", "two") * 3]

    assert left(first) == {"init": 3, "user": 1} and left(second) == {"init": 2, "user": 0}
    assert [one.status_code for one in invalid] == [400, 400, 400] and reused.status_code == 422
    assert [(one.status_code, one.headers["Idempotent-Replayed"], left(one)) for one in replayed] == [(200, "true", {})] * 6


def test_what_was_refused_may_be_said_again_when_its_window_is_over(make_client: MakeClient, store_url: str) -> None:
    client = make_client(REDIS_URL=store_url, USER_RATE_LIMIT="1/second")
    answers = [init(client, userId="a"), init(client, userId="a", key="one")]

    def accepted() -> bool:
        answers.append(init(client, userId="a", key="one"))
        return answers[-1].status_code == 200

    wait_until(accepted)

    assert [one.status_code for one in answers[:2]] == [200, 429]
    assert "Idempotent-Replayed" not in answers[-1].headers  # it had begun nothing


@pytest.mark.parametrize("off", ["", "off"])
def test_a_rate_can_be_switched_off(make_client: MakeClient, off: str) -> None:
    client = make_client(INIT_RATE_LIMIT=off, USER_RATE_LIMIT=off)

    answers = [init(client, userId="a") for _ in range(70)]

    assert {one.status_code for one in answers} == {200}
    assert {("RateLimit" in one.headers, "RateLimit-Policy" in one.headers) for one in answers} == {(False, False)}


def test_an_init_that_nothing_can_count_is_refused_with_the_store_and_counted_as_that(make_client: MakeClient) -> None:
    client, other = make_client(REDIS_URL=NOWHERE), make_client()
    before = counted(other, "store")

    answers = [init(client, userId="a") for _ in range(2)]

    assert all(refused(one, 503, "store_unavailable") for one in answers)
    assert counted(other, "store") == before + 2


# ---- Pending sessions ----


def create(store: Store, request: Request = ASKED, *, sub: str = "n8n", key: IdempotencyKey | None = None) -> Accepted:
    """A new session of this subject."""
    accepted = store.create(str(uuid.uuid4()), sub, request, "http://n8n/w", key)
    assert accepted is not None
    return accepted


def stop(store: Store, accepted: Accepted) -> None:
    """Ends a pending session."""
    store.cancel(accepted.id)
    outcome = Outcome(EXPIRED, "echo", Usage(0, 0))
    assert isinstance(store.finish(accepted.id, 0, 0, 0, EXPIRED, "", outcome), Finished)


def claim(store: Store, accepted: Accepted) -> None:
    """Begins a pending session."""
    assert isinstance(store.claim(accepted.id), Claimed)


@pytest.mark.parametrize("leave", [claim, stop])
def test_a_subject_has_so_many_pending_sessions_until_one_is_begun_or_ends(
    make_store: MakeStore, leave: Callable[[Store, Accepted], None]
) -> None:
    store, other = make_store("one", MAX_PENDING_SESSIONS="2"), make_store("other", MAX_PENDING_SESSIONS="2")
    first, _ = create(store), create(other)

    with pytest.raises(Limited) as full:
        create(store)
    create(store, sub="other")
    leave(other, first)
    create(store)

    assert (full.value.status, full.value.code, full.value.limit) == (429, "too_many_pending", "pending")
    assert 1 <= int(full.value.headers["Retry-After"]) <= 60
    with pytest.raises(Limited):
        create(store)


def test_a_pending_session_counts_no_longer_than_its_deadline(make_store: MakeStore) -> None:
    store = make_store(MAX_PENDING_SESSIONS="1", SESSION_TTL_SECONDS=0.3)
    create(store)

    gevent.sleep(0.35)

    create(store)


def test_a_pending_session_that_is_asked_for_again_is_given(make_store: MakeStore) -> None:
    store, key = make_store(MAX_PENDING_SESSIONS="1"), IdempotencyKey("name", "body")
    first = create(store, key=key)

    assert create(store, key=key) == first
    assert store.create(first.id, "n8n", ASKED, "http://n8n/w") is not None


def test_a_session_that_the_store_lost_is_pending_again_and_never_refused(make_store: MakeStore) -> None:
    store = make_store(MAX_PENDING_SESSIONS="2")
    lost = [create(store), create(store)]
    store.connections.call("FLUSHALL")
    create(store)

    for accepted in lost:
        store.create_again(accepted)

    assert [store.pending(accepted.id) is not None for accepted in lost] == [True, True]
    with pytest.raises(Limited):
        create(store)


def test_what_limits_leave_in_the_store_expires_and_names_nobody(make_store: MakeStore) -> None:
    store, quota = make_store(), Quota("user", "digest", 5, 60)

    store.create(str(uuid.uuid4()), "a-subject", ASKED, "http://n8n/w", quotas=Quotas(quota))

    keys = [key for pattern in ("*:pending:*", "*:limit:*") for key in store.connections.call("KEYS", pattern)]
    assert len(keys) == 2 and b"a-subject" not in b"".join(keys)
    assert all(0 < store.connections.call("PTTL", key) <= 60_000 for key in keys)


def test_an_init_too_many_is_told_when_the_first_one_will_have_gone(make_client: MakeClient) -> None:
    client = make_client(MAX_PENDING_SESSIONS="1")

    first, second = init(client), init(client, userId="a")

    assert first.status_code == 200
    assert "MAX_PENDING_SESSIONS" in refused(second, 429, "too_many_pending")
    assert left(second) == {"init": 29_999, "user": 60}


# ---- Running answers ----


def test_a_full_worker_takes_no_init_and_holds_a_browser_until_there_is_room(
    start_service: StartService, provider: ProviderServer, n8n: Receiver
) -> None:
    service = start_service(MAX_STREAMS_PER_WORKER="2", **provider.openai_environ)
    urls = [service.stream_url(model="gpt-test-hold-n4-k2-i81", resumeUrl=n8n.url()) for _ in range(3)]
    running = [gevent.spawn(service.read, url) for url in urls[:2]]
    provider.wait_for_open_streams(2)

    asked = [service.init(), service.init(start="immediate")]
    plain = httpx.get(urls[2])
    held = gevent.spawn(service.read, urls[2])
    with service.watch(urls[0]) as second_viewer:
        attached = next(second_viewer)
    alive = service.get("/health/ready")
    gevent.sleep(0.6)
    waiting = not held.ready()
    provider.release()
    wait_until(lambda: provider.release() or held.ready())

    for answer in (*asked, plain):
        assert (answer.status_code, answer.json()["code"], answer.headers["Retry-After"]) == (503, "overloaded", "2")
    assert (attached.id, alive.status_code, waiting) == ("1-1", 200, True)
    assert [reader.get(timeout=5)[-1].data for reader in (*running, held)] == ["[DONE]"] * 3
    assert {callback.json["status"] for callback in n8n.wait_for(3)} == {"completed"}
    assert service.init().status_code == 200
    assert 'aistream_limited_total{limit="streams"} 3.0' in service.get("/metrics").text


def test_viewers_that_come_at_the_same_moment_begin_no_more_than_may_run(
    start_service: StartService, provider: ProviderServer
) -> None:
    service = start_service(MAX_STREAMS_PER_WORKER="3", **provider.openai_environ)
    urls = [service.stream_url(model="gpt-test-hold-n4-k2-i82") for _ in range(20)]

    answers = [gevent.spawn(httpx.get, url, timeout=30) for url in urls]
    wait_until(lambda: sum(one.ready() for one in answers) == 17)
    refusals = [one.get() for one in answers if one.ready()]
    provider.wait_for_open_streams(3)
    wait_until(lambda: provider.release() or all(one.ready() for one in answers))

    assert {(one.status_code, one.json()["code"]) for one in refusals} == {(503, "overloaded")}
    assert sum(one.get().status_code == 200 for one in answers) == 3


def test_a_browser_for_whom_there_is_no_room_in_time_gets_the_reason(
    make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(viewing, "HOLD", 0.6)
    client = make_client()
    url = init(client).get_json()["streamUrl"]
    fill(client)

    answer = client.get(url[url.index("/stream/") :], headers={"Accept": "text/event-stream"})

    text = answer.text
    assert answer.status_code == 200 and text.startswith("retry: 2000\n:\n") and "event: error\n" in text
    told = json.loads(text.rpartition("data: ")[2])
    assert (told["code"], told["retryable"]) == ("overloaded", True)


def test_an_init_that_is_said_again_to_a_full_worker_gets_the_stream_that_it_began(make_client: MakeClient) -> None:
    client = make_client()
    first = init(client, key="k")
    fill(client)

    again, new, other = init(client, key="k"), init(client, key="another"), init(client, key="k", prompt="Something else")

    assert (again.status_code, again.get_json()["streamId"]) == (200, first.get_json()["streamId"])
    assert [(one.status_code, one.get_json()["code"]) for one in (new, other)] == [
        (503, "overloaded"),
        (422, "idempotency_key_reused"),
    ]


def fill(client: FlaskClient) -> None:
    """Leaves its app no room for another answer."""
    generations = parts_of(client).generations
    generations.config = dataclasses.replace(generations.config, max_streams_per_worker=0)


def test_a_full_worker_still_takes_over_what_others_have_left(make_client: MakeClient, redis_url: str) -> None:
    client = make_client(REDIS_URL=redis_url)
    store, generations = parts_of(client).store, parts_of(client).generations
    lost, late, waits_for_nobody = (create(store, request) for request in (ASKED, ASKED, AT_ONCE))
    other = Store(dataclasses.replace(parts_of(client).config, lease_seconds=0.1), worker="lost")
    claim(other, lost)
    other.close()
    fill(client)

    def taken_over() -> bool:
        generations.recover(lost.id)  # its lease may have to lapse first
        return store.standing([lost.id])[lost.id][0] is State.COMPLETED

    with pytest.raises(Overloaded):
        generations.claim(late.id)
    with pytest.raises(Overloaded):
        generations.accept(str(uuid.uuid4()), "n8n", ASKED, "http://n8n/w")
    wait_until(taken_over)
    generations.expire(waits_for_nobody.id)
    wait_until(lambda: not generations.running)

    assert {name: state for name, (state, _) in store.standing([late.id, waits_for_nobody.id]).items()} == {
        late.id: State.PENDING,
        waits_for_nobody.id: State.COMPLETED,
    }


# ---- Viewers ----


def test_a_worker_has_so_many_open_streams_those_that_are_held_included(
    start_service: StartService, provider: ProviderServer
) -> None:
    service = start_service(MAX_VIEWERS_PER_WORKER="2", MAX_VIEWERS_PER_SESSION="1", **provider.openai_environ)
    url, other = (service.stream_url(model="gpt-test-hold-n4-k2-i83") for _ in range(2))

    with service.watch(url) as first, service.watch(url) as held:
        next(first)
        (told,) = service.read(other)
        plain = httpx.get(other)
        answers = [service.get("/health"), service.get("/health/ready"), service.init()]
        provider.release()
        seen = list(first)[-1], list(held)[-1]
    came_again = gevent.spawn(service.read, other)
    wait_until(lambda: provider.release() or came_again.ready())

    assert (told.event, json.loads(told.data)["code"], json.loads(told.data)["retryable"]) == ("error", "overloaded", True)
    assert (plain.status_code, plain.json()["code"], plain.headers["Retry-After"]) == (503, "overloaded", "2")
    assert [one.status_code for one in answers] == [200, 200, 200]
    assert [event.data for event in (*seen, came_again.get()[-1])] == ["[DONE]"] * 3
    assert 'aistream_limited_total{limit="viewers"} 2.0' in service.get("/metrics").text


# ---- Bad tokens ----


def knock(client: FlaskClient, address: str = "127.0.0.1", forwarded: str = "") -> TestResponse:
    """Asks for a stream with a bad token, from this address."""
    headers = {"X-Forwarded-For": forwarded} if forwarded else {}
    return client.get(f"/stream/{uuid.uuid4()}?access_token=bad", environ_base={"REMOTE_ADDR": address}, headers=headers)


def test_an_address_with_too_many_bad_tokens_is_told_to_wait_and_costs_no_question_to_redis(make_client: MakeClient) -> None:
    client, other = make_client(UNAUTHORIZED_RATE_LIMIT="2/hour", REDIS_URL=NOWHERE), make_client()
    before = counted(other, "unauthorized")

    answers = [knock(client), init(client, n8nToken=None), client.get("/models"), client.post(f"/stream/{uuid.uuid4()}/cancel")]
    elsewhere = knock(client, "192.0.2.2")

    assert [one.status_code for one in (*answers, elsewhere)] == [401, 401, 429, 429, 401]
    assert all(0 < int(one.headers["Retry-After"]) <= 3_600 for one in answers[2:])
    assert counted(other, "unauthorized") == before + 2


def test_a_valid_token_is_never_refused_for_the_bad_ones_of_its_address(make_client: MakeClient) -> None:
    client = make_client(UNAUTHORIZED_RATE_LIMIT="2/hour")
    bad = [init(client, n8nToken="bad") for _ in range(4)]

    asked = init(client)
    url = asked.get_json()["streamUrl"]
    watched = client.get(url[url.index("/stream/") :], headers={"Accept": "text/event-stream"})

    assert [one.status_code for one in bad] == [401, 401, 429, 429]
    assert "UNAUTHORIZED_RATE_LIMIT" in refused(bad[-1], 429, "rate_limited")
    assert asked.status_code == 200
    assert watched.status_code == 200 and "[DONE]" in watched.text


def test_an_address_may_fail_again_when_its_window_is_over(make_client: MakeClient) -> None:
    client = make_client(UNAUTHORIZED_RATE_LIMIT="1/second")

    first = [knock(client).status_code for _ in range(2)]

    assert first == [401, 429]
    wait_until(lambda: knock(client).status_code == 401)


def test_without_a_limit_of_failures_each_one_is_told_its_reason(make_client: MakeClient) -> None:
    client = make_client(UNAUTHORIZED_RATE_LIMIT="off")

    assert {knock(client).status_code for _ in range(130)} == {401}


def test_a_forwarded_address_is_not_believed_unless_a_proxy_is_trusted(make_client: MakeClient) -> None:
    client = make_client(UNAUTHORIZED_RATE_LIMIT="2/hour")

    answers = [knock(client, forwarded=f"203.0.113.{number}").status_code for number in range(3)]

    assert answers == [401, 401, 429]


def test_behind_a_trusted_proxy_the_address_is_the_one_that_it_added_whatever_the_client_forged(make_client: MakeClient) -> None:
    client = make_client(UNAUTHORIZED_RATE_LIMIT="2/hour", TRUSTED_PROXIES="1")

    forged = [knock(client, forwarded=f"203.0.113.{number}, 198.51.100.1").status_code for number in range(3)]
    other = knock(client, forwarded="203.0.113.0, 198.51.100.2").status_code

    assert (forged, other) == ([401, 401, 429], 401)


def test_behind_two_proxies_the_first_ones_word_counts(make_client: MakeClient) -> None:
    client = make_client(UNAUTHORIZED_RATE_LIMIT="1/hour", TRUSTED_PROXIES="2")

    chains = ["198.51.100.1, 10.0.0.1", "203.0.113.9, 198.51.100.1, 10.0.0.2", "198.51.100.2, 10.0.0.1"]

    assert [knock(client, forwarded=chain).status_code for chain in chains] == [401, 429, 401]


def test_failures_are_remembered_of_so_many_addresses_and_the_latest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "ADDRESSES", 3)
    failures = limits.Failures(1, 60)

    waits = [failures.count(f"192.0.2.{number}", now=10) for number in (1, 2, 3, 1, 4, 5)]
    again = [failures.count(f"192.0.2.{number}", now=20) for number in (1, 5, 2, 4)]

    assert waits == [0, 0, 0, 60, 0, 0] and len(failures) == 3
    assert again == [50, 50, 0, 0]  # two have been forgotten meanwhile


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::"),
        ("2001:DB8:1:2::1", "2001:db8:1:2::"),
        ("fe80::1%eth0", "fe80::"),
        ("unknown", "unknown"),
        ("x" * 10_000, "x" * 64),
        ("", ""),
    ],
)
def test_an_ipv6_address_stands_for_its_network(address: str, network: str) -> None:
    assert limits.network_of(address) == network
