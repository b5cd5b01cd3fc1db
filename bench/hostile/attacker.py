"""Carries one attack out: `python -m bench.hostile.attacker` reads it from stdin, and prints what came of it when that closes."""

from __future__ import annotations

import ctypes
import heapq
import json
import os
import re
import select
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from typing import Any

from bench.hostile.attacks import Attack
from tests.service import ROOT

_STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")
#: Seconds between two looks at stdin and at what may be opened.
_NAP = 0.01
#: Connections that an attack has opened when it is under way.
UNDER_WAY = 10


class Line:
    """One connection."""

    __slots__ = ("answered", "first", "left", "sock")

    def __init__(self, port: int, first: bytes) -> None:
        self.first = self.left = first
        self.answered = False
        self.sock = socket.socket()
        self.sock.setblocking(False)
        self.sock.connect_ex(("127.0.0.1", port))


class Attacker:
    """All connections of one attack, on one epoll."""

    def __init__(self, job: dict[str, Any]) -> None:
        self._job = job
        self._first = [data.encode("latin1") for data in job["first"]]
        self._drip = job["drip"].encode("latin1")
        self._epoll = select.epoll()
        self._lines: dict[int, Line] = {}
        self._due: list[tuple[float, int, Line]] = []
        self._opened = self._let_go = self._held = 0
        self._answers: Counter[str] = Counter()

    def run(self) -> dict[str, Any]:
        """Attacks until stdin closes. Gives how many connections were opened, were ended by the service, and are left."""
        self._epoll.register(sys.stdin.fileno(), select.EPOLLIN | select.EPOLLHUP)
        self._began = time.monotonic()
        said = False
        while True:
            self._open()
            if not said and self._opened >= UNDER_WAY:
                said = True
                print(flush=True)
            for number, event in self._epoll.poll(_NAP):
                if number == sys.stdin.fileno():
                    return {
                        **{"opened": self._opened, "let_go": self._let_go, "held": self._held},
                        **{"left": len(self._lines), "answers": dict(self._answers)},
                    }
                if number in self._lines:
                    self._ready(self._lines[number], event)
            now = time.monotonic()
            while self._due and self._due[0][0] <= now:
                line = heapq.heappop(self._due)[2]
                if line.sock.fileno() >= 0:
                    self._say(line, self._drip)
                    self._later(line)

    def _open(self) -> None:
        job = self._job
        allowed = (time.monotonic() - self._began) * job["per_second"] + 1
        while len(self._lines) < job["connections"] and self._opened < min(allowed, job["total"] or allowed):
            line = Line(job["port"], self._first[self._opened % len(self._first)])
            self._opened += 1
            self._lines[line.sock.fileno()] = line
            self._held = max(self._held, len(self._lines))
            self._epoll.register(line.sock.fileno(), select.EPOLLOUT)

    def _ready(self, line: Line, event: int) -> None:
        if event & select.EPOLLOUT:
            if line.left:
                self._say(line, line.left)
            if line.sock.fileno() >= 0 and not line.left:
                self._spoken(line)
            return
        try:
            data = line.sock.recv(65_536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            for status in _STATUS.findall(data):
                self._answers[status.decode()] += 1
            if self._job["vanishes"] and not line.answered:
                hear_nothing(line.sock)
                self._epoll.modify(line.sock.fileno(), select.EPOLLHUP)
            line.answered = True
        else:
            self._close(line)

    def _spoken(self, line: Line) -> None:
        job = self._job
        if not line.first and not job["listens"]:
            self._close(line)
            return
        self._epoll.modify(line.sock.fileno(), select.EPOLLIN if job["listens"] else select.EPOLLHUP)
        if self._drip:
            self._later(line)

    def _say(self, line: Line, data: bytes) -> None:
        try:
            sent = line.sock.send(data)
        except BlockingIOError:
            return
        except OSError:
            # It may have been answered before it has said all.
            line.left = b""
            return
        line.left = data[sent:] if line.left else b""

    def _later(self, line: Line) -> None:
        heapq.heappush(self._due, (time.monotonic() + self._job["every"], id(line), line))

    def _close(self, line: Line) -> None:
        del self._lines[line.sock.fileno()]
        line.sock.close()
        self._let_go += 1


def hear_nothing(sock: socket.socket) -> None:
    """From here on the kernel throws away what comes for this connection, unacknowledged: a filter that takes no packet."""
    drop = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0))  # BPF_RET 0
    program = struct.pack("HL", 1, ctypes.addressof(drop))
    sock.setsockopt(socket.SOL_SOCKET, 26, program)  # SO_ATTACH_FILTER


def start(attack: Attack, port: int, path: str = "") -> subprocess.Popen[str]:
    """A process that attacks what listens there, until it is asked what came of it. Returns when the attack is under way."""
    command = [sys.executable, "-m", "bench.hostile.attacker"]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin
    process.stdin.write(json.dumps(attack.job(port, path)) + "\n")
    process.stdin.flush()
    assert process.stdout
    process.stdout.readline()
    return process


def end(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Ends the attack and gives what came of it."""
    return dict(json.loads(process.communicate()[0]))


if __name__ == "__main__":
    os.nice(10)
    json.dump(Attacker(json.loads(sys.stdin.readline())).run(), sys.stdout)
