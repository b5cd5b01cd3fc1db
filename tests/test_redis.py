"""Redis as production has it: behind TLS and passwords, with a user of few rights, failing over by its Sentinels.

Real servers, Sentinels and certificates. What an outage, an empty Redis or a lost tail comes to is in tests/test_survival.py.
"""

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import gevent
import pytest
import redis
from gevent.pool import Pool

from aistream.errors import StoreUnavailable
from aistream.session import Request
from aistream.store import Store
from bench.redis_memory import cost
from tests.conftest import make_config, missing
from tests.neighbours.provider import ProviderServer
from tests.neighbours.receiver import WRONG_METHOD, Receiver
from tests.neighbours.redis import Locks, RedisServer, Sentinels, program, speaks_tls
from tests.service import ROOT, Service, on, session_in, text_of, wait_until, watch

StartServices = Callable[..., list[Service]]


@pytest.fixture(scope="module", autouse=True)
def a_redis_is_there() -> None:
    """Else all of this is skipped."""
    if program() is None:
        missing("redis-server")


@pytest.fixture(scope="module")
def locks(tmp_path_factory: pytest.TempPathFactory) -> Locks:
    """A password, and certificates for this machine, by its address alone."""
    if not speaks_tls():
        missing("a redis-server that was built with TLS")
    return Locks.make(tmp_path_factory.mktemp("tls"), "127.0.0.1")


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory, locks: Locks) -> Iterator[RedisServer]:
    """A Redis behind them."""
    with RedisServer(tmp_path_factory.mktemp("locked"), locks=locks) as server:
        yield server


def opened(**environ: str) -> "closing[Store]":
    """A store with these variables, closed with the block."""
    return closing(Store(make_config(**environ)))


# TLS


def test_fifty_streams_over_tls_are_exact_on_their_own_worker_and_on_another(
    start_services: StartServices, locked: RedisServer, locks: Locks, provider: ProviderServer, n8n: Receiver
) -> None:
    here, there = start_services(2, REDIS_URL=locked.url, **locks.environ, **provider.openai_environ)
    urls = [here.stream_url(model=f"gpt-test-long-n30-d20-i{i}", resumeUrl=n8n.url(f"/{i}")) for i in range(50)]
    crowd = Pool(100)

    reading = [crowd.spawn(here.read, url) for url in urls]
    following = [crowd.spawn(there.read, on(there, url)) for url in urls]
    events, others = ([one.get(timeout=30) for one in greenlets] for greenlets in (reading, following))

    answers = [n8n.wait_for(1, path=f"/{i}")[0].json["answer"] for i in range(50)]
    assert [text_of(one) for one in events] == answers and all(answers)
    assert others == events
    assert [line for service in (here, there) for line in service.lines("store.away")] == []


def test_over_tls_a_connection_that_redis_has_closed_is_replaced_unnoticed(locked: RedisServer, locks: Locks) -> None:
    with opened(REDIS_URL=locked.url, **locks.environ) as store, closing(locked.client()) as killer:
        store.ping()
        killer.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")

        store.ping()


def test_over_tls_an_answer_that_came_too_late_is_not_the_next_commands(locked: RedisServer, locks: Locks) -> None:
    with opened(REDIS_URL=locked.url, **locks.environ) as store:
        call = store.connections.call
        store.ping()
        asking = gevent.spawn(call, "EVAL", "for i = 1, 3e7 do end return 'late'", 0)
        gevent.sleep(0.01)

        asking.kill()

        assert call("ECHO", "mine") == b"mine"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"REDIS_CA_FILE": ""}, "CERTIFICATE_VERIFY_FAILED"),
        ({"REDIS_CA_FILE": "other"}, "CERTIFICATE_VERIFY_FAILED"),
        ({"REDIS_URL": "rediss://:of-redis@localhost:{port}"}, "Hostname mismatch"),
        ({"REDIS_CERT_FILE": "", "REDIS_KEY_FILE": ""}, ""),
        ({"REDIS_URL": "redis://:of-redis@127.0.0.1:{port}"}, ""),
        ({"REDIS_URL": "rediss://:wrong@127.0.0.1:{port}"}, "invalid username-password pair"),
        ({"REDIS_URL": "rediss://127.0.0.1:{port}"}, "Authentication required"),
    ],
    ids=[
        "the-systems-authorities",
        "another-authority",
        "another-name",
        "no-certificate",
        "no-tls",
        "wrong-password",
        "no-password",
    ],
)
def test_a_lock_that_does_not_open_is_away_with_its_reason(
    locked: RedisServer, locks: Locks, tmp_path: Path, change: dict[str, str], reason: str
) -> None:
    environ = {"REDIS_URL": locked.url, **locks.environ, **change}
    environ["REDIS_URL"] = environ["REDIS_URL"].format(port=locked.port)
    if environ["REDIS_CA_FILE"] == "other":
        environ |= Locks.make(tmp_path, "127.0.0.1").environ
    if environ["REDIS_URL"].startswith("redis:"):
        environ = {"REDIS_URL": environ["REDIS_URL"]}

    with opened(**environ) as store, pytest.raises(StoreUnavailable) as away:
        store.ping()

    assert reason in str(away.value.__cause__)


# The pool


def test_no_more_connections_are_opened_than_the_pool_has(redis_url: str) -> None:
    with opened(REDIS_URL=redis_url, REDIS_POOL_SIZE="3") as store, closing(redis.Redis.from_url(redis_url)) as observer:
        crowd, others = Pool(20), len(observer.client_list())

        asking = [crowd.spawn(store.connections.call, "ECHO", "x" * 200_000) for _ in range(20)]
        answers = [one.get(timeout=10) for one in asking]

        assert {len(answer) for answer in answers} == {200_000}
        assert len(observer.client_list()) == others + 3


# A user of few rights


def rule() -> str:
    """The user of docs/operations.md, as the page has it."""
    section = (ROOT / "docs" / "operations.md").read_text().partition("\n## Redis\n")[2].partition("\n## ")[0]
    (found,) = re.findall(r"^(ACL SETUSER aistream (?:.*\\\n)*.*)$", section, re.MULTILINE)
    return " ".join(found.replace("\\\n", " ").split())


def commands_of_the_service(known: set[str]) -> set[str]:
    """Every command that a script or the store's modules name, and what a new connection says."""
    sources = ROOT / "aistream"
    scripts = "".join(path.read_text() for path in (sources / "lua").glob("*.lua"))
    modules = "".join((sources / f"{name}.py").read_text() for name in ("store", "outbox", "scripts", "connections"))
    named = set(re.findall(r"redis\.call\('([A-Z]+)'", scripts)) | set(re.findall(r'["(\\n]([A-Z]{3,})(?:"|\\r)', modules))
    said_by_redis, said_to_sentinels = {"readonly"}, {"sentinel"}
    return {name.lower() for name in named} & known - said_by_redis - said_to_sentinels | {"select"}


def test_the_user_of_the_docs_may_use_exactly_the_commands_that_the_service_uses(redis_url: str) -> None:
    with opened(REDIS_URL=redis_url) as store:
        known = {name.decode() for name in store.connections.call("COMMAND", "LIST")}

    allowed = set(re.findall(r"\+([a-z|]+)", rule()))

    assert allowed - known == set()
    assert allowed == commands_of_the_service(known)
    assert re.findall(r"[~&%]\S+", rule()) == ["~aistream:{0}:*"]


def test_a_user_with_these_rights_and_no_more_can_do_all_that_the_service_does(
    start_services: StartServices, tmp_path: Path, provider: ProviderServer, n8n: Receiver
) -> None:
    with RedisServer(tmp_path / "redis") as server, closing(server.client()) as admin:
        admin.execute_command(*rule().replace("PASSWORD", "of-the-user").split())
        url = server.url.replace("redis://", "redis://aistream:of-the-user@")
        here, there = start_services(2, REDIS_URL=url, LEASE_SECONDS="1", SESSION_TTL_SECONDS="2", **provider.openai_environ)
        n8n.answers([WRONG_METHOD], path="/dead")
        held = here.stream_url(model="gpt-test-hold-n6-k3-i301", resumeUrl=n8n.url("/held"), onDisconnect="cancel")
        dead = here.stream_url(model="echo", resumeUrl=n8n.url("/dead"))
        here.init(resumeUrl=n8n.url("/expired"))
        with watch(on(there, held)) as viewer:
            seen = [next(viewer) for _ in range(3)]
            here.read(dead)
            wait_until(lambda: here.get("/callbacks?state=dead").json()["callbacks"])
            here.post(f"/callbacks/{session_in(dead)}/redeliver")
            n8n.wait_for(2, path="/dead")
            n8n.wait_for(1, path="/expired")
            gevent.sleep(0.1)

            admin.flushall()  # the running session is written anew

            wait_until(lambda: there.get(f"/sessions/{session_in(held)}").status_code == 200)
            path, _, query = on(here, held).partition("?")
            here.post(f"{path.removeprefix(here.url)}/cancel?{query}", token=query.partition("=")[2])
            seen += list(viewer)
        (callback,) = n8n.wait_for(1, path="/held")
        metrics = here.get("/metrics")

        denied = admin.execute_command("ACL", "LOG")
        assert denied == []
        assert (callback.json["status"], callback.json["answer"]) == ("cancelled", text_of(seen))
        assert metrics.status_code == 200
        assert [line for service in (here, there) for line in service.lines("background.failed")] == []
        with opened(REDIS_URL=url) as store, pytest.raises(redis.exceptions.NoPermissionError):
            store.connections.call("KEYS", "*")
        with opened(REDIS_URL=url) as store, pytest.raises(redis.exceptions.NoPermissionError):
            store.connections.call("GET", "another:key")
        assert [line["maxmemory_policy"] for line in here.lines("store.checked")] == ["noeviction"]


# Sentinels


def test_a_master_that_is_killed_in_mid_stream_is_replaced_unnoticed_by_the_viewer(
    start_services: StartServices, tmp_path: Path, locks: Locks, provider: ProviderServer, n8n: Receiver
) -> None:
    with (
        RedisServer(tmp_path / "master", locks=locks) as master,
        RedisServer(tmp_path / "replica", locks=locks) as replica,
    ):
        replica.follow(master)
        with Sentinels(tmp_path / "sentinels", master, locks) as sentinels:
            owner, other = start_services(2, **sentinels.environ, LEASE_SECONDS="1", **provider.openai_environ)
            url = owner.stream_url(model="gpt-test-long-n120-d30-i310", resumeUrl=n8n.url("/watched"))
            with watch(on(owner, url)) as viewer, watch(on(other, url)) as follower:
                got = [next(viewer) for _ in range(5)]
                followed = [next(follower) for _ in range(5)]

                master.kill()
                sentinels.kill(0)
                refused = owner.init()
                following = gevent.spawn(lambda: [*followed, *follower])
                got += list(viewer)
                followed = following.get(timeout=15)
            (watched,) = n8n.wait_for(1, path="/watched", timeout=15)
            wait_until(lambda: owner.init().status_code == 200)
            later = owner.stream_url(model="gpt-test-hello-i311", resumeUrl=n8n.url("/later"))
            events = other.read(on(other, later))

            (of_later,) = n8n.wait_for(1, path="/later")
            assert (refused.status_code, refused.json()["code"]) == (503, "store_unavailable")
            assert [bool(line["reason"]) for line in owner.lines("store.away")] == [True]
            assert [event.id for event in got[:-1]] == [f"1-{i}" for i in range(1, len(got))] and got[-1].data == "[DONE]"
            assert followed == got
            assert (watched.json["status"], watched.json["answer"]) == ("completed", text_of(got))
            assert text_of(events) == of_later.json["answer"]
            assert sentinels.master_port(1) == replica.port
            assert len(provider.requests("gpt-test-long-n120-d30-i310")) == 1


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RedisServer, Sentinels]]:
    """A master, and Sentinels that take a minute to believe that it is gone."""
    folder = tmp_path_factory.mktemp("watched")
    with RedisServer(folder / "master") as master, RedisServer(folder / "replica") as replica:
        replica.follow(master)
        with Sentinels(folder / "sentinels", master, down_after_ms=60_000) as sentinels:
            yield master, sentinels


def test_a_server_that_is_master_no_more_is_not_taken_for_one(watched: tuple[RedisServer, Sentinels]) -> None:
    master, sentinels = watched
    with opened(**sentinels.environ) as before, opened(**sentinels.environ) as after, closing(master.client()) as admin:
        before.ping()
        admin.replicaof("127.0.0.1", "1")  # behind the Sentinels' back: they still call it the master

        for store in (before, after):
            with pytest.raises(StoreUnavailable):
                store.create("session", "n8n", Request("p", "echo", "echo", "echo"), "http://n8n/w")
        admin.execute_command("REPLICAOF", "NO", "ONE")

        for store in (before, after):
            store.ping()


def test_sentinels_that_do_not_answer_or_do_not_know_the_master_are_passed_over(
    watched: tuple[RedisServer, Sentinels], free_port: int
) -> None:
    master, sentinels = watched
    url, password = sentinels.environ["REDIS_URL"], sentinels.environ["REDIS_SENTINEL_PASSWORD"]
    first = url.replace("sentinel://", f"sentinel://127.0.0.1:{free_port},127.0.0.1:{master.port},")

    with opened(REDIS_URL=first, REDIS_SENTINEL_PASSWORD=password) as store:
        store.ping()


@pytest.mark.parametrize("change", [("/aistream", "/other"), ("password", "")], ids=["another-name", "no-password"])
def test_where_no_sentinel_tells_the_master_redis_is_away(
    watched: tuple[RedisServer, Sentinels], change: tuple[str, str]
) -> None:
    environ = watched[1].environ
    environ["REDIS_URL"] = environ["REDIS_URL"].replace(*change)
    if change[0] == "password":
        del environ["REDIS_SENTINEL_PASSWORD"]

    with opened(**environ) as store, pytest.raises(StoreUnavailable) as away:
        store.ping()

    assert str(away.value.__cause__) == "no Sentinel says where the master is"


# What it needs


def test_a_session_costs_redis_what_the_docs_say(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    (told,) = re.findall(r"^\| 4 KiB \| 1,024 \| (.*) KiB \| (.*) KiB \| (.*) KiB \| (.*) KiB \|$", page, re.MULTILINE)

    with RedisServer(tmp_path / "redis") as server:
        found = cost(server, kilobytes=4, sessions=20)

    # The allocator's rounding and the size of Redis's tables differ between versions.
    assert [size / 1024 for size in found] == pytest.approx([float(size) for size in told], rel=0.3)


# What its disk does not have


def test_a_redis_whose_last_second_never_reached_its_disk_is_told_it_again(
    start_services: StartServices, tmp_path: Path, provider: ProviderServer, n8n: Receiver
) -> None:
    with RedisServer(tmp_path / "redis") as server:
        owner, other = start_services(2, REDIS_URL=server.url, LEASE_SECONDS="1", **provider.openai_environ)
        ends = owner.stream_url(model="gpt-test-hold-n6-k3-i320", resumeUrl=n8n.url("/ends"))
        with watch(on(owner, ends)) as viewer:
            seen = [next(viewer) for _ in range(3)]
            gevent.sleep(0.2)
            (file,) = (server.folder / "appendonlydir").glob("*.incr.aof")
            on_disk = file.stat().st_size
            provider.release()
            seen += list(viewer)
        n8n.wait_for(1, path="/ends")
        fresh = owner.stream_url(model="gpt-test-hello-i321", resumeUrl=n8n.url("/fresh"))
        wait_until(lambda: owner.lines("callback.attempted") or other.lines("callback.attempted"))

        server.kill()
        os.truncate(file, on_disk)  # as after a power cut within appendfsync's second
        server.start()

        of_fresh = other.read(on(other, fresh))
        n8n.wait_for(1, path="/fresh")
        assert text_of(of_fresh) != "" and other.read(on(other, ends)) == seen
        time.sleep(2)  # two leases: a lost ending would be made again
        assert sorted(one.path for one in n8n.requests) == ["/ends", "/fresh"]
