"""How a greenlet waits for a token: `python -m bench.waiting [SECONDS]` (five, twice for each way; needs two cores).

A child process writes tokens into socket pairs, each at an even pace; this one reads them, in four ways, and nothing else is
done with them:

    recv      the socket's own `recv`, which tries first and raises where nothing has arrived
    wait      gevent's wait, then the recv: what `providers/transport.py` does
    watcher   one watcher for all waits, whose callback switches to the greenlet
    pump      no greenlet: the watcher's callback in the hub receives by itself

CPU per token, user and system. What the pump gains over the wait is all that could be won by taking generations out of their
greenlets.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

from gevent import monkey

if not monkey.is_module_patched("socket"):
    monkey.patch_all()

import gevent
from gevent.hub import get_hub

STREAMS, RATE = 200, 20.0
TOKEN = b"x" * 330


def write(ends: list[socket.socket], seconds: float) -> None:
    """One token into each, `RATE` times a second, evenly spread over time."""
    sleep = monkey.get_original("time", "sleep")
    pause = 1 / (RATE * len(ends))
    began = time.monotonic()
    for number in range(int(seconds / pause)):
        ends[number % len(ends)].send(TOKEN)
        ahead = began + number * pause - time.monotonic()
        if ahead > 0:
            sleep(ahead)


class Reader:
    """Reads one socket to its end; `tokens` counts what came for all."""

    tokens = 0

    def __init__(self, sock: Any) -> None:
        self.sock = sock
        self.plain = sock._sock

    def heard(self, data: bytes) -> bool:
        """Counts; False at the end."""
        Reader.tokens += len(data) // len(TOKEN)
        return bool(data)

    def recv(self) -> None:
        """See the module."""
        while self.heard(self.sock.recv(65_536)):
            pass

    def wait(self) -> None:
        """See the module."""
        while True:
            self.sock._wait(self.sock._read_event)
            if not self.heard(self.plain.recv(65_536)):
                return

    def watcher(self) -> None:
        """See the module."""
        hub = get_hub()
        watcher = hub.loop.io(self.sock.fileno(), 1)
        watcher.start(gevent.getcurrent().switch)
        switch = hub.switch
        while True:
            switch()
            if not self.heard(self.plain.recv(65_536)):
                break
        watcher.stop()
        watcher.close()

    def pump(self) -> None:
        """See the module."""
        done = gevent.event.Event()
        watcher = get_hub().loop.io(self.sock.fileno(), 1)

        def readable() -> None:
            if not self.heard(self.plain.recv(65_536)):
                watcher.stop()
                watcher.close()
                done.set()

        watcher.start(readable)
        done.wait()


WAYS: dict[str, Callable[[Reader], None]] = {
    "recv": Reader.recv,
    "wait": Reader.wait,
    "watcher": Reader.watcher,
    "pump": Reader.pump,
}


def measure(way: str, seconds: float, streams: int = STREAMS) -> float:
    """CPU per token of reading in this way, in µs."""
    pairs = [socket.socketpair() for _ in range(streams)]
    cores = sorted(os.sched_getaffinity(0))
    child = os.fork()
    if not child:
        os.sched_setaffinity(0, {cores[-1]})
        write([end for _, end in pairs], seconds)
        os._exit(0)
    os.sched_setaffinity(0, {cores[0]})
    try:
        for _, end in pairs:
            end.close()
        Reader.tokens = 0
        began = time.process_time()
        gevent.joinall([gevent.spawn(WAYS[way], Reader(sock)) for sock, _ in pairs], raise_error=True)
        spent = time.process_time() - began
    finally:
        os.waitpid(child, 0)
        os.sched_setaffinity(0, set(cores))
        for sock, _ in pairs:
            sock.close()
    return spent / Reader.tokens * 1e6


def main() -> None:
    """Measures each way twice, in turns, and prints the better of the two: what else runs on the machine only adds."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 5.0
    best = {way: min(measure(way, seconds), measure(way, seconds)) for way in WAYS}
    print(f"{STREAMS} sockets, {RATE:g} tokens a second each; CPU per token, and beside that of wait")
    for way, spent in best.items():
        print(f"  {way:8} {spent:6.1f} µs  {spent - best['wait']:+6.1f}")


if __name__ == "__main__":
    main()
