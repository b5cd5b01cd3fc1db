"""What is kept of a session, where and how long: looked for in all of a real Redis, in its file, and in the service's log."""

import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from aistream import recall as recalling
from aistream.events import Cursor, End, Usage
from aistream.log import Log
from aistream.outbox import Page
from aistream.recall import Recall, Told
from aistream.scripts import keys_of
from aistream.session import Claimed, Finished, Missing, Outcome, Request
from aistream.store import Store
from tests.conftest import make_config, missing
from tests.neighbours.provider import ProviderServer
from tests.neighbours.receiver import Receiver
from tests.neighbours.redis import RedisServer, program
from tests.neighbours.scenarios import THOUGHTS
from tests.service import Service, n8n_token, wait_until

MakeStore = Callable[..., Store]
ASKED = Request(prompt="p", requested_model="echo", model="echo", provider="echo")
DONE = Outcome(End("stop"), "echo", Usage(1, 1))


def everything(client: "redis.Redis") -> str:
    """All keys of a Redis with all that they hold."""
    read: dict[bytes, Callable[[Any], Any]] = {
        b"hash": client.hgetall,
        b"stream": client.xrange,
        b"zset": lambda key: client.zrange(key, 0, -1, withscores=True),
        b"list": lambda key: client.lrange(key, 0, -1),
        b"string": client.get,
        b"none": lambda _: None,  # it has just run out
    }
    return repr([(key, read[client.type(key)](key)) for key in client.scan_iter(count=1000)])


def on_disk(server: RedisServer) -> str:
    """What stands in the append-only file."""
    return "".join(path.read_text(errors="replace") for path in (server.folder / "appendonlydir").iterdir())


def test_texts_go_with_the_replay_and_tokens_are_never_kept(
    start_service: Callable[..., Service], tmp_path: Path, provider: ProviderServer, n8n: Receiver
) -> None:
    if program() is None:
        missing("redis-server")
    with RedisServer(tmp_path / "redis") as server, closing(server.client()) as client:
        client.config_set("rdbcompression", "no")  # so that the rewritten file can be read, too
        times = {"REPLAY_SECONDS": "2", "TOMBSTONE_SECONDS": "2"}
        service = start_service(REDIS_URL=server.url, **times, **provider.openai_environ)
        token, key = n8n_token(sub="kept-subject"), "canary-idempotency"
        asked = {
            "n8nToken": token,
            "resumeUrl": n8n.url("/kept-path") + "?signature=canary-signature",
            "model": "echo",
            "prompt": "canary-prompt and-answer",
            "system": "canary-system",
            "messages": [{"role": "user", "content": "canary-message"}],
            "userId": "canary-user",
            "chatId": "canary-chat",
            "metadata": {"canary-metadata": 1},
        }
        answer = httpx.post(f"{service.url}/init-stream", json=asked, headers={"Idempotency-Key": key}, timeout=10)
        thinking = service.stream_url(model="gpt-test-reasoning-i401", resumeUrl=n8n.url("/thinking"))
        texts = ["signature", "prompt", "system", "message", "user", "chat", "metadata"]
        texts = [*(f"canary-{text}" for text in texts), " and-answer", THOUGHTS[-1]]
        never = [token, answer.json()["streamUrl"].partition("access_token=")[2], key]

        for url in (answer.json()["streamUrl"], thinking):
            service.read(url)
        for path in ("/kept-path", "/thinking"):
            n8n.wait_for(1, path=path)
        at_first, file_at_first = everything(client), on_disk(server)
        wait_until(lambda: ":content:" not in everything(client) and ":log:" not in everything(client), timeout=6)
        then = everything(client)
        client.bgrewriteaof()
        wait_until(lambda: not client.info("persistence")["aof_rewrite_in_progress"])
        file_then = on_disk(server)
        wait_until(lambda: ":session:" not in everything(client), timeout=6)
        at_last = {stored.decode().split(":")[2] for stored in client.scan_iter()}

        assert [text for text in texts if text not in at_first or text not in file_at_first] == []
        assert [text for text in texts if text in then or text in file_then] == []
        assert "kept-subject" in then and n8n.origin in then
        assert [text for text in never if text in at_first + file_at_first + then] == []
        assert [text for text in [*texts, *never, "kept-path"] if text in service.log] == []
        assert at_last == {"tick", "init", "limit"}


def ended(store: Store, session_id: str) -> Claimed:
    store.create(session_id, "n8n", ASKED, "http://n8n/w")
    claimed = store.claim(session_id)
    assert isinstance(claimed, Claimed)
    assert isinstance(store.finish(session_id, 1, 1, 1, End("stop"), "answer", DONE), Finished)
    store.outbox.take(session_id)
    return claimed


@pytest.mark.parametrize(("schedule", "seconds"), [("0,1", 86_400), ("0,86400", 216_000)])
def test_what_is_owed_is_kept_for_a_day_or_two_and_a_half_schedules(
    make_store: MakeStore, session_id: str, schedule: str, seconds: int
) -> None:
    store = make_store(CALLBACK_SCHEDULE=schedule)
    ended(store, session_id)

    times = [store.connections.call("TTL", key) for key in keys_of(session_id)]

    assert [seconds - 5 <= left <= seconds for left in times] == [True] * 3


def test_a_tombstone_goes_after_its_time(make_store: MakeStore, session_id: str) -> None:
    store = make_store(REPLAY_SECONDS="1", TOMBSTONE_SECONDS="1")
    ended(store, session_id)

    store.outbox.settle(session_id, 1, "delivered")
    time.sleep(1.1)
    tombstone = store.outbox.record(session_id)
    time.sleep(1.0)

    assert tombstone is not None and tombstone.state == "completed"
    assert isinstance(store.claim(session_id), Missing)
    assert store.outbox.record(session_id) is None


def test_a_dead_letter_goes_after_its_time_with_its_texts(make_store: MakeStore, session_id: str) -> None:
    store = make_store(DEAD_LETTER_SECONDS="1", REPLAY_SECONDS="1")
    ended(store, session_id)

    store.outbox.settle(session_id, 1, "dead", last_answer="n8n answered 410")
    kept = store.outbox.callbacks("dead").callbacks
    time.sleep(2.1)

    assert [letter.id for letter in kept] == [session_id]
    assert store.outbox.callbacks("dead") == Page([], None)
    assert store.outbox.counts().dead == 0
    assert store.connections.call("KEYS", "*") == []


def test_a_worker_forgets_an_ending_soon_after_its_callback_was_settled(
    make_store: MakeStore, session_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recalling, "SETTLED", 0.2)
    monkeypatch.setattr(recalling, "PERIOD", 0.0)
    store = make_store()
    recall = Recall(make_config(), store)
    claimed = ended(store, session_id)
    log = Log(session_id)
    log.append(Cursor(1, 1), End("stop"))
    recall.ended(Told(claimed.accepted, claimed, log, End("stop"), DONE))
    store.outbox.settle(session_id, 1, "delivered")
    recall.attempted(session_id, 1, "delivered")

    recall.step()
    at_once = len(recall)
    time.sleep(0.25)
    recall.step()

    assert (at_once, len(recall)) == (1, 0)
