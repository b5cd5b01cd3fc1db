"""Lets the tests run in several processes side by side (pytest-xdist) while each of them is patched by gevent.

A worker's main thread waits for the next test from a thread that was there before the patch: with gevent's own primitives that
wait looks like one that can never end.
"""

import os
from typing import Any

from execnet.gateway_base import ExecModel
from gevent import monkey


class RealEvent:
    """threading.Event between threads of the system: what xdist's queue of tests asks of one. Set and cleared under its lock."""

    def __init__(self) -> None:
        self._closed: Any = monkey.get_original("_thread", "allocate_lock")()
        self._closed.acquire()

    def set(self) -> None:
        """Lets `wait` return."""
        if self._closed.locked():
            self._closed.release()

    def clear(self) -> None:
        """Has `wait` wait again."""
        self._closed.acquire(blocking=False)

    def wait(self) -> None:
        """Returns once it is set."""
        with self._closed:
            pass


def use_real_threads() -> None:
    """Gives a worker of xdist what it waits with. In a run of one process it does nothing."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        lock = monkey.get_original("_thread", "RLock")
        for model in ExecModel.__subclasses__():
            model.Event = lambda _self: RealEvent()
            model.RLock = lambda _self: lock()
