"""The workflows and browsers of a load, one process: `python -m bench.load.viewers` reads a job from stdin and prints what came.

Each stream is a POST /init-stream with a token signed as n8n signs it, and a GET of its streamUrl, both on connections of their
own, as n8n and a browser would. A stream is well only if every token came, in order, none twice, and then `[DONE]`; what else
becomes of it is counted as failed, with what was wrong.
"""

from __future__ import annotations

import base64
import hmac
import json
import resource
import select
import socket
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from bench.load import STAMP_NS, STAMPS

HOST = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Job:
    """What is asked for. Times are seconds, after `begin` (on the monotonic clock) where they are points.

    `per_second`: new streams; `at_once`: most that are open. `until`: what has not ended by then has failed. `window`: latency
    is kept, and tokens and bytes are counted, of what arrives in it. `view_port`: where it is watched (0: where its URL says).
    """

    init_port: int
    model: str
    streams: int
    tokens: int
    per_second: float
    at_once: int
    begin: float
    until: float
    window: tuple[float, float]
    secret: str
    resume_url: str
    view_port: int = 0
    body: dict[str, Any] = field(default_factory=dict)


class Wrong(Exception):
    """A stream is not what it should be."""


class Stream:
    """One session, from its init to its `[DONE]`."""

    __slots__ = ("began", "data", "host", "number", "opened", "path", "rest", "seen", "sock", "speaking", "text")

    def __init__(self, number: int, port: int) -> None:
        self.number = number
        self.path = ""
        self.host = port
        self.seen = 0
        self.began = time.monotonic()
        self.opened = 0.0
        self.connect(port)

    def connect(self, port: int) -> None:
        """A new connection, not waited for."""
        self.host = port
        self.data = self.rest = self.text = b""
        #: The head of the response is behind us.
        self.speaking = False
        self.sock = socket.socket()
        self.sock.setblocking(False)
        self.sock.connect_ex((HOST, port))


class Viewers:
    """All streams of one job, on one epoll."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._open: dict[int, Stream] = {}
        self._epoll = select.epoll()
        self._begun = 0
        self._window = (job.begin + job.window[0], job.begin + job.window[1])
        self._late: list[int] = []
        self._first: list[int] = []
        self._init: list[float] = []
        self._wrong: Counter[str] = Counter()
        self._ok = self._tokens = self._window_tokens = self._window_bytes = self._window_reads = self._most = 0

    def run(self) -> dict[str, Any]:
        """Does the job; returns what came of it."""
        job = self._job
        while self._begun < job.streams or self._open:
            now = time.monotonic()
            if now > job.begin + job.until:
                break
            rest = self._begin_due(now)
            for number, event in self._epoll.poll(rest):
                self._ready(self._open[number], event)
        for stream in list(self._open.values()):
            self._end(stream, "not finished in time")
        if self._begun < job.streams:
            self._wrong["never begun"] += job.streams - self._begun
        return self._result()

    def _begin_due(self, now: float) -> float:
        """Begins what is due; gives seconds until the next is."""
        job = self._job
        while self._begun < job.streams and len(self._open) < job.at_once:
            rest = job.begin + self._begun / job.per_second - now
            if rest > 0:
                return rest
            self._register(Stream(self._begun, job.init_port))
            self._begun += 1
            self._most = max(self._most, len(self._open))
        return 0.2

    def _register(self, stream: Stream) -> None:
        number = stream.sock.fileno()
        self._open[number] = stream
        self._epoll.register(number, select.EPOLLOUT)

    def _ready(self, stream: Stream, event: int) -> None:
        try:
            if event & select.EPOLLOUT:
                stream.sock.sendall(self._request(stream))
                self._epoll.modify(stream.sock.fileno(), select.EPOLLIN)
            elif not (data := stream.sock.recv(262_144)):
                raise Wrong("the line broke")
            elif stream.path:
                self._watched(stream, data)
            else:
                self._accepted(stream, data)
        except BlockingIOError:
            return
        except Wrong as wrong:
            self._end(stream, str(wrong))
        except (OSError, ValueError, KeyError) as error:
            self._end(stream, f"{type(error).__name__}: {error}")

    def _request(self, stream: Stream) -> bytes:
        host = f"Host: {HOST}:{stream.host}\r\n"
        if stream.path:
            stream.opened = time.monotonic()
            return f"GET {stream.path} HTTP/1.1\r\n{host}Accept: text/event-stream\r\nConnection: keep-alive\r\n\r\n".encode()
        job = self._job
        user = f"user-{stream.number}"
        asked = {
            "n8nToken": signed({"sub": user, "exp": int(time.time()) + 3600}, job.secret),
            "resumeUrl": f"{job.resume_url}/{stream.number}",
            "prompt": "Tell me about streaming.",
            "userId": user,
            "chatId": f"chat-{stream.number}",
            "model": job.model,
            "max_tokens": 4096,
            **job.body,
        }
        body = json.dumps(asked)
        kind = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        return f"POST /init-stream HTTP/1.1\r\n{host}{kind}Connection: close\r\n\r\n{body}".encode()

    def _accepted(self, stream: Stream, data: bytes) -> None:
        stream.data += data
        head, found, body = stream.data.partition(b"\r\n\r\n")
        if not found or b"\r\n" not in head:
            return
        if b" 200 " not in head[:16]:
            raise Wrong(f"init: {head[:40].decode(errors='replace').splitlines()[0]}")
        try:
            url = urlsplit(json.loads(body)["streamUrl"])
        except json.JSONDecodeError:
            return  # there is more to come
        self._init.append(time.monotonic() - stream.began)
        stream.path = f"{url.path}?{url.query}"
        self._forget(stream)
        stream.connect(self._job.view_port or url.port or 80)
        self._register(stream)

    def _watched(self, stream: Stream, data: bytes) -> None:
        now = time.monotonic_ns()
        if self._window[0] <= now / 1e9 < self._window[1]:
            self._window_bytes += len(data)
            self._window_reads += 1
        if not stream.speaking:
            head, found, data = (stream.data + data).partition(b"\r\n\r\n")
            if not found:
                stream.data = head
                return
            if b" 200 " not in head[:16] or b"chunked" not in head.lower():
                raise Wrong(f"stream: {head[:40].decode(errors='replace').splitlines()[0]}")
            stream.speaking, stream.data = True, b""
        text, over = self._unchunked(stream, data)
        blocks = (stream.rest + text).split(b"\n\n")
        stream.rest = blocks.pop()
        for block in blocks:
            self._event(stream, block, now)
            if stream.sock.fileno() < 0:
                return
        if over:
            raise Wrong("it ended without [DONE]")

    def _unchunked(self, stream: Stream, data: bytes) -> tuple[bytes, bool]:
        """The body in it, and whether that ends here."""
        data = stream.data + data if stream.data else data
        whole, at = b"", 0
        while (end := data.find(b"\r\n", at)) >= 0:
            size = int(data[at:end], 16)
            if not size:
                return whole, True
            if len(data) < end + size + 4:
                break
            whole += data[end + 2 : end + 2 + size]
            at = end + size + 4
        stream.data = data[at:]
        return whole, False

    def _event(self, stream: Stream, block: bytes, now: int) -> None:
        for line in block.split(b"\n"):
            if line.startswith(b"data: "):
                if line == b"data: [DONE]":
                    missing = self._job.tokens - stream.seen
                    self._end(stream, f"[DONE], {missing} tokens too early" if missing else "")
                    return
                *whole, stream.text = (stream.text + line[6:]).split(b" ")
                for token in whole:
                    self._token(stream, token, now)
            elif line.startswith(b"event: error"):
                raise Wrong(block.decode(errors="replace")[:200])

    def _token(self, stream: Stream, token: bytes, now: int) -> None:
        stamp, number, *own = token.split(b".")
        if int(number) != stream.seen:
            raise Wrong(f"token {int(number)} came where {stream.seen} was due")
        stream.seen += 1
        self._tokens += 1
        late = (now // STAMP_NS - int(stamp)) % STAMPS
        if own:
            self._first.append((now - int(stream.opened * 1e9)) // STAMP_NS - int(own[0]))
        if self._window[0] <= now / 1e9 < self._window[1]:
            self._window_tokens += 1
            self._late.append(late)

    def _forget(self, stream: Stream) -> None:
        del self._open[stream.sock.fileno()]
        stream.sock.close()

    def _end(self, stream: Stream, wrong: str) -> None:
        self._forget(stream)
        if wrong:
            self._wrong[wrong] += 1
        else:
            self._ok += 1

    def _result(self) -> dict[str, Any]:
        used = resource.getrusage(resource.RUSAGE_SELF)
        return {
            "ok": self._ok,
            "failed": self._job.streams - self._ok,
            "wrong": dict(self._wrong.most_common(5)),
            "most_open": self._most,
            "tokens": self._tokens,
            "window_tokens": self._window_tokens,
            "window_bytes": self._window_bytes,
            "window_reads": self._window_reads,
            "latency_ms": percentiles([late * STAMP_NS / 1e6 for late in self._late]),
            "first_token_ms": percentiles([first * STAMP_NS / 1e6 for first in self._first]),
            "init_ms": percentiles([seconds * 1000 for seconds in self._init]),
            "cpu": used.ru_utime + used.ru_stime,
            "seconds": time.monotonic() - self._job.begin,
        }


def percentiles(values: list[float]) -> dict[str, float]:
    """The 50th and 99th percentile and the largest of these, or zeros where there are none."""
    values = sorted(values) or [0.0]
    last = len(values) - 1
    return {name: values[round(last * share)] for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))}


def signed(claims: dict[str, Any], secret: str) -> str:
    """A JWT, HS256. By hand: a library would be most of what a viewer costs."""
    said = b".".join(_base64(json.dumps(part).encode()) for part in ({"alg": "HS256", "typ": "JWT"}, claims))
    return (said + b"." + _base64(hmac.digest(secret.encode(), said, "sha256"))).decode()


def _base64(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


if __name__ == "__main__":
    json.dump(Viewers(Job(**json.load(sys.stdin))).run(), sys.stdout)
