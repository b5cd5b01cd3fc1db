"""The provider and n8n of a load, one process: `python -m bench.load.provider` prints its port, and ends when its stdin does.

The model's name says how an answer is written: `gpt-bench-n200-r20-d50-b1` has 200 tokens at 20 a second, the first after
50 ms and a random part of the pace (so that streams do not beat in step), and `b` tokens go out in one write, each as an event
and an HTTP chunk of its own. The first token's text has a third number: how long the provider itself took, in stamps.

    POST /v1/chat/completions    OpenAI's chat completions, as their API writes a stream
    POST /resume/<k>             takes a callback; a second one of the same number is counted as double
    GET  /stats                  what happened since it was last asked, as JSON
"""

from __future__ import annotations

import heapq
import json
import random
import re
import resource
import select
import socket
import sys
import time
from typing import NamedTuple

from bench.load import STAMP_NS, STAMPS

_MODEL = re.compile(r"-n(\d+)-r([\d.]+)-d(\d+)-b(\d+)$")
_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nCache-Control: no-cache\r\n"
    b"x-request-id: req_bench\r\nTransfer-Encoding: chunked\r\n\r\n"
)
#: OpenAI pads each chunk to hide its length; with it a chunk has the 330 bytes of a real one.
_PADDING = "q8ZfKx2LmWvT0aBcD"
#: Seconds that it sleeps at least: beyond 4,000 tokens a second, each would be a wake-up of its own core.
_NAP = 0.000_25


class Asked(NamedTuple):
    """What a model's name asks for. `pace`: seconds between two tokens; `delay`: seconds before the first."""

    tokens: int
    pace: float
    delay: float
    batch: int

    @classmethod
    def of(cls, model: str) -> Asked:
        """Raises ValueError where the name says nothing."""
        found = _MODEL.search(model)
        if found is None:
            raise ValueError(model)
        tokens, rate, delay, batch = found.groups()
        return cls(int(tokens), 1 / float(rate), int(delay) / 1000, int(batch))


class Stats:
    """What happened since it was last asked. `late`: tokens that went out over 10 ms after their time."""

    def __init__(self) -> None:
        self.tokens = self.late = self.bytes = self.requests = self.broken = 0
        self.callbacks: set[str] = set()
        self.doubles = self.unfinished = 0
        self._cpu = _cpu()

    def json(self) -> bytes:
        """For GET /stats."""
        told = {name: value for name, value in vars(self).items() if isinstance(value, int)}
        return json.dumps({**told, "callbacks": len(self.callbacks), "cpu": _cpu() - self._cpu}).encode()


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


class Connection:
    """One client. Between two requests, or while an answer is being written."""

    __slots__ = ("asked", "began", "due", "epilogue", "front", "pending", "rear", "received", "sent", "sock")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.received = b""
        self.pending = b""
        self.asked: Asked | None = None
        self.sent = 0
        self.due = self.began = 0.0
        self.front = self.rear = self.epilogue = b""


class Provider:
    """All connections, on one epoll."""

    def __init__(self, port: int = 0) -> None:
        self._listener = socket.create_server(("127.0.0.1", port), backlog=4096)
        self._listener.setblocking(False)
        self.port = self._listener.getsockname()[1]
        self._epoll = select.epoll()
        self._epoll.register(self._listener.fileno(), select.EPOLLIN)
        self._connections: dict[int, Connection] = {}
        self._heap: list[tuple[float, int, Connection]] = []
        self._stats = Stats()

    def run(self, until: int) -> None:
        """Serves until this descriptor can be read."""
        self._epoll.register(until, select.EPOLLIN)
        waiting, clock, heap = [self._epoll.fileno()], time.monotonic, self._heap
        while True:
            rest = heap[0][0] - clock() if heap else 60.0
            if rest > 0:
                # epoll's own timeout has whole milliseconds: at 4,000 tokens a second, four would go out together.
                select.select(waiting, [], [], max(rest, _NAP))
            for number, _ in self._epoll.poll(0):
                if number == until:
                    return
                if number == self._listener.fileno():
                    self._accept()
                else:
                    self._ready(self._connections[number])
            now = clock()
            while heap and heap[0][0] <= now:
                connection = heapq.heappop(heap)[2]
                if connection.sock.fileno() >= 0:
                    self._write(connection, now)

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                return
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._connections[sock.fileno()] = Connection(sock)
            self._epoll.register(sock.fileno(), select.EPOLLIN)

    def _ready(self, connection: Connection) -> None:
        if connection.pending:
            self._send(connection, b"")
        try:
            data = connection.sock.recv(65_536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._close(connection)
            return
        connection.received += data
        head, found, rest = connection.received.partition(b"\r\n\r\n")
        if not found:
            return
        length = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
        if len(rest) >= (size := int(length[1]) if length else 0):
            connection.received = rest[size:]
            method, path, _ = head.split(b" ", 2)
            self._request(connection, method.decode(), path.decode(), rest[:size])

    def _request(self, connection: Connection, method: str, path: str, body: bytes) -> None:
        stats = self._stats
        if path.startswith("/resume/"):
            stats.doubles += path in stats.callbacks
            stats.callbacks.add(path)
            stats.unfinished += json.loads(body)["status"] != "completed"
            self._answer(connection, b'{"message":"Workflow was started"}')
        elif method == "GET":
            self._answer(connection, stats.json())
            self._stats = Stats()
        else:
            stats.requests += 1
            self._begin(connection, json.loads(body)["model"])

    def _answer(self, connection: Connection, body: bytes) -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json; charset=utf-8\r\nContent-Length: %d\r\n\r\n" % len(body)
        self._send(connection, head + body)

    def _begin(self, connection: Connection, model: str) -> None:
        asked = connection.asked = Asked.of(model)
        now = time.monotonic()
        about = {
            "id": f"chatcmpl-{random.getrandbits(128):032x}",
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": model,
            "service_tier": "default",
            "system_fingerprint": "fp_44709d6fcb",
        }
        padding = _PADDING[: 4 + random.randrange(len(_PADDING) - 4)]

        def chunk(delta: dict[str, str], reason: str | None = None) -> bytes:
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
            return _event({**about, "choices": [choice], "usage": None, "obfuscation": padding})

        front, rear = chunk({"content": "\0"}).split(b"\\u0000")
        connection.front, connection.rear = front, rear
        used = {"prompt_tokens": 12, "completion_tokens": asked.tokens, "total_tokens": asked.tokens + 12}
        connection.epilogue = b"".join(
            map(_chunked, [chunk({}, "stop"), _event({**about, "choices": [], "usage": used}), b"data: [DONE]\n\n"])
        )
        connection.sent, connection.began = 0, now
        connection.due = now + asked.delay + random.random() * asked.pace * asked.batch
        self._send(connection, _HEAD + _chunked(chunk({"role": "assistant", "content": ""})))
        heapq.heappush(self._heap, (connection.due, id(connection), connection))

    def _write(self, connection: Connection, now: float) -> None:
        asked, stats, sent = connection.asked, self._stats, connection.sent
        assert asked is not None
        until = min(sent + asked.batch, asked.tokens)
        data = b""
        front, rear = connection.front, connection.rear
        size = len(front) + len(rear)
        for number in range(sent, until):
            stamp = time.monotonic_ns() // STAMP_NS % STAMPS
            text = b"%d.%d " % (stamp, number) if number else b"%d.0.%d " % (stamp, (now - connection.began) * 1e9 / STAMP_NS)
            data += b"%x\r\n%b%b%b\r\n" % (size + len(text), front, text, rear)
        stats.tokens += until - sent
        stats.bytes += len(data)
        if now - connection.due > 0.01:
            stats.late += until - sent
        connection.sent = until
        if until == asked.tokens:
            connection.asked = None
            self._send(connection, data + connection.epilogue + b"0\r\n\r\n")
        else:
            connection.due += asked.pace * asked.batch
            self._send(connection, data)
            heapq.heappush(self._heap, (connection.due, id(connection), connection))

    def _send(self, connection: Connection, data: bytes) -> None:
        waited = bool(connection.pending)
        data = connection.pending + data
        try:
            connection.pending = data[connection.sock.send(data) :]
        except BlockingIOError:
            connection.pending = data
        except OSError:
            self._close(connection)
            return
        if bool(connection.pending) != waited:
            wanted = select.EPOLLIN | (select.EPOLLOUT if connection.pending else 0)
            self._epoll.modify(connection.sock.fileno(), wanted)

    def _close(self, connection: Connection) -> None:
        if connection.sock.fileno() >= 0:
            self._stats.broken += connection.asked is not None
            del self._connections[connection.sock.fileno()]
            connection.sock.close()  # takes it out of the epoll


def _event(value: object) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


def _chunked(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


if __name__ == "__main__":
    provider = Provider()
    print(provider.port, flush=True)
    provider.run(sys.stdin.fileno())
