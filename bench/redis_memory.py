"""What a session costs Redis, by the size of its answer: `python -m bench.redis_memory`. Prints a table for docs/operations.md.

Sessions are made by the service's own store on a Redis of its own, with a prompt of 1 KiB and answers in pieces of four bytes, as
models write them. What a session costs is the growth of `used_memory` over all of them, index entries and the allocator's
rounding included; its parts are what `MEMORY USAGE` says of its keys.
"""

from gevent import monkey

monkey.patch_all()

import tempfile
from contextlib import closing
from pathlib import Path

from aistream.config import Config
from aistream.events import Cursor, End, Text, Usage
from aistream.scripts import content_key, log_key, session_key
from aistream.session import Outcome, Request
from aistream.store import Store
from tests.neighbours.redis import RedisServer

SESSIONS = 200
PIECE = "abc "
ID = "{:08d}-0000-4000-8000-000000000000"
KEYS = log_key, content_key, session_key
ASKED = Request(prompt="p" * 1024, requested_model="gpt-4o", model="gpt-4o", provider="openai", user_id="u", chat_id="c")
DONE = Outcome(End("stop"), "gpt-4o-2024-08-06", Usage(250, 1000), first_token_ms=400)
RESUME_URL = "http://n8n:5678/webhook-waiting/1234567?signature=" + "ab" * 32


def run_to_its_end(store: Store, session_id: str, pieces: int) -> None:
    """A session whose answer has so many pieces, and whose callback is delivered."""
    store.create(session_id, "n8n", ASKED, RESUME_URL)
    store.claim(session_id)
    for first in range(1, pieces + 1, 5000):
        store.append([(session_id, Cursor(1, seq), Text(PIECE)) for seq in range(first, min(first + 5000, pieces + 1))])
    store.finish(session_id, 1, pieces + 1, pieces + 1, End("stop"), PIECE * pieces, DONE)
    taken = store.outbox.take(session_id)
    assert taken is not None
    store.outbox.settle(session_id, taken.attempt, "delivered")


def cost(server: RedisServer, kilobytes: int, sessions: int = SESSIONS) -> tuple[float, int, int, int]:
    """Bytes that a session with so large an answer takes: in all, its log, its prompt and answer, its tombstone."""
    pieces = kilobytes * 1024 // len(PIECE)
    config = Config.from_env({"DEV_MODE": "true", "JWT_SECRET": "x" * 32, "REDIS_URL": server.url})
    with closing(Store(config)) as store, closing(server.client()) as client:
        client.flushall()
        run_to_its_end(store, "the-first-one", pieces)  # it pays for the scripts, too
        before = client.info("memory")["used_memory"]
        for number in range(sessions):
            run_to_its_end(store, ID.format(number), pieces)
        whole = (client.info("memory")["used_memory"] - before) / sessions
        log, content, head = (int(client.memory_usage(key(ID.format(0)), samples=0) or 0) for key in KEYS)
    return whole, log, content, head


def main() -> None:
    """Prints the table."""
    with tempfile.TemporaryDirectory() as folder, RedisServer(Path(folder) / "redis") as server:
        with closing(server.client()) as client:
            print(f"Redis {client.info('server')['redis_version']}, {SESSIONS} sessions of each size\n")
        print("| answer | events | a session, until its replay is over | its log | its prompt and answer | its tombstone |")
        print("|---:|---:|---:|---:|---:|---:|")
        for kilobytes in (1, 4, 16, 64, 256):
            parts = [f"{size / 1024:.1f} KiB" for size in cost(server, kilobytes)]
            print(f"| {kilobytes} KiB | {kilobytes * 1024 // len(PIECE):,} | {' | '.join(parts)} |", flush=True)


if __name__ == "__main__":
    main()
