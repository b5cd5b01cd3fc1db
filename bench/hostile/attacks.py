"""The attacks: what their connections say, and how slowly."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

HOST = "Host: aistream.test\r\n"
STREAM = "/stream/11111111-1111-4111-8111-111111111111"


@dataclass(frozen=True, slots=True)
class Attack:
    """So many connections at the same time, `per_second` new ones at most; whoever is let go comes again.

    Each says one of `first` (in turn), then `drip` every `every` seconds. `listens`: it reads what it is answered, and is done
    with the answer's end. `vanishes`: after the first answer it neither takes nor says anything, as a phone out of reach.
    `total`: no more connections than that, 0: until it is stopped.
    """

    name: str
    connections: int
    first: list[bytes] = field(default_factory=lambda: [b""])
    drip: bytes = b""
    every: float = 1.0
    per_second: float = 2_000
    listens: bool = True
    vanishes: bool = False
    total: int = 0

    def job(self, port: int, path: str) -> dict[str, Any]:
        """For the attacker's process. `path`: of a stream that may be watched."""
        job = asdict(self) | {"port": port, "drip": self.drip.decode("latin1")}
        job["first"] = [data.replace(b"{path}", path.encode()).decode("latin1") for data in self.first]
        return job


def get(path: str, fields: str = "") -> bytes:
    """A GET that closes its connection."""
    return f"GET {path} HTTP/1.1\r\n{HOST}Connection: close\r\n{fields}\r\n".encode("latin1")


def post(body: bytes, fields: str = "", length: int | None = None) -> bytes:
    """A POST of this body, which says that it has `length` bytes (None: as many as it has, -1: nothing)."""
    size = len(body) if length is None else length
    measured = "" if size < 0 else f"Content-Length: {size}\r\n"
    kind = "Content-Type: application/json\r\nConnection: close\r\n"
    return f"POST /init-stream HTTP/1.1\r\n{HOST}{kind}{measured}{fields}\r\n".encode("latin1") + body


def _chunked(body: bytes) -> bytes:
    return post(body, "Transfer-Encoding: chunked\r\n", -1)


#: A token of the right form that nobody has signed.
FORGED = "eyJhbGciOiJIUzI1NiIsInR5cCI6ImFpc3RyZWFtLXZpZXdlcitqd3QifQ.eyJzdWIiOiJ4IiwiZXhwIjo0MTAyNDQ0ODAwfQ." + "A" * 43

#: Heads that are too much, or no HTTP.
HEADS: dict[str, bytes] = {
    "many fields": get("/health", "".join(f"X-{i}: a\r\n" for i in range(100))),
    "a long field": get("/health", f"X-A: {'a' * 17_000}\r\n"),
    "a megabyte": get("/health", "".join(f"X-{i}: {'a' * 16_000}\r\n" for i in range(64))),
    "cookies": get("/health", f"Cookie: {'; '.join(f'a{i}=b' for i in range(3_000))}\r\n"),
    "a long line": get("/" + "a" * 9_000),
    "an endless line": b"GET /" + b"a" * 500_000,
    "a folded field": get("/health", "X-A: a\r\n b\r\n"),
    "NUL": get("/health", "X-A: a\0b\r\n"),
    "bare line feeds": b"GET /health HTTP/1.1\nHost: x\n\n",
    "a blank in a name": get("/health", "X-A : a\r\n"),
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00" + bytes(range(256)) + b"\r\n\r\n",
    "another version": b"GET /health?access_token=canary HTTP/9.9\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "an unknown expectation": get("/health", "Expect: miracles\r\n"),
}
#: Bodies that are not what they say, or say too much.
BODIES: dict[str, bytes] = {
    "two lengths": post(b"abc", "Content-Length: 4\r\n"),
    "length and chunks": post(b"0\r\n\r\n", "Transfer-Encoding: chunked\r\n"),
    "an unknown coding": post(b"abc", "Transfer-Encoding: xchunked\r\n", -1),
    "a chunk without size": _chunked(b"zz\r\nabc\r\n0\r\n\r\n"),
    "a chunk that is longer": _chunked(b"3\r\nabcX\r\n0\r\n\r\n"),
    "a long line of a chunk": _chunked(b"3;" + b"a" * 30_000),
    "fields of a request behind chunks": _chunked(b"0\r\nHost: y\r\n\r\n"),
    "chunks without end": _chunked((b"1000\r\n" + b"a" * 4_096 + b"\r\n") * 200),
    "a negative length": post(b"abc", "Content-Length: -5\r\n", -1),
    "a length beyond all bounds": post(b"abc", length=10**20),
    "deep JSON": post(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "a number of 200,000 digits": post(b'{"userId":' + b"9" * 200_000 + b"}"),
    "many keys": post(json.dumps(dict.fromkeys(map(str, range(20_000)), 0)).encode()),
    "compressed zeros": post(gzip.compress(bytes(10_000_000)), "Content-Encoding: gzip\r\n"),
    "another Idempotency-Key each time, no token": post(b'{"prompt":"a"}', "Idempotency-Key: 7f3a\r\n"),
}


def attacks(scale: float) -> list[Attack]:
    """All attacks; `scale`: the part of their connections that is made."""

    def many(count: int) -> int:
        return max(10, int(count * scale))

    make: Callable[..., Attack] = Attack
    slow_body = post(b"{", length=200_000)
    return [
        make("slow heads", many(5_000), [b"GET /health HTTP/1.1\r\nX-A: "], b"a", every=2),
        make("slow bodies", many(1_000), [slow_body], b" ", every=2),
        make("connected, silent", many(5_000)),
        make("answered, then silent", many(5_000), [b"GET /health HTTP/1.1\r\n" + HOST.encode() + b"\r\n"], per_second=500),
        make("viewers that read nothing", many(200), [get("{path}")], listens=False, per_second=200),
        make("viewers out of reach", many(200), [get("{path}")], vanishes=True, per_second=200),
        make("streams without a token", 100, [get(STREAM), get(f"{STREAM}?access_token={FORGED}")], total=many(10_000)),
        make("connections that end at once", 100, listens=False, total=many(10_000)),
        make("floods of heads", 50, list(HEADS.values())),
        make("bodies that are none", 50, list(BODIES.values())),
        make("pipelined requests", 50, [(b"GET /health HTTP/1.1\r\n" + HOST.encode() + b"\r\n") * 99 + get("/health")]),
    ]
