"""The line between two parts, in a test's hand: a TCP proxy that can be cut, closed, and led somewhere else.

It lives in the test process (under gevent's monkey patching its threads are greenlets).
"""

import contextlib
import socket
import threading
from typing import Self

from tests.neighbours.http1 import HOST


class Line:
    """Takes connections on a port of its own and carries their bytes to `target`, a port of this machine.

    with Line(redis_port) as line:
        ...                       # redis://127.0.0.1:{line.port}
        line.lead_to(other_port)  # what was open is cut; new connections go there
    """

    def __init__(self, target: int) -> None:
        self._target: int | None = target
        self._listener = socket.create_server((HOST, 0), backlog=1024)
        self.port: int = self._listener.getsockname()[1]
        self._open: set[socket.socket] = set()
        self._closed = False

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        self._listener.close()
        self.cut()

    def lead_to(self, target: int | None) -> None:
        """Cuts what is open; new connections go to this port, or (None) are cut at once."""
        self._target = target
        self.cut()

    def cut(self) -> None:
        """Ends every connection, as a lost network would. New ones are taken."""
        for sock in list(self._open):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while not self._closed:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                if self._target is None:
                    raise ConnectionRefusedError
                far = socket.create_connection((HOST, self._target))
            except OSError:
                near.close()
                continue
            self._open |= {near, far}
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._carry, args=(source, sink), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        if sink in self._open and source in self._open:
            self._open -= {source, sink}  # whichever direction ends last closes both
        else:
            source.close()
            sink.close()
