"""Lets the tests run in several processes side by side (pytest-xdist) while each of them is patched by gevent.

A worker's main thread waits for the next test from a thread that was there before the patch: with gevent's own primitives that
wait looks like one that can never end.
"""

import os
from typing import Any

from execnet.gateway_base import ExecModel
from gevent import monkey


class RealEvent:
    """threading.Event between threads of the system: what xdist's queue of tests, and execnet's end, ask of one.

    Set and cleared under their own locks.
    """

    def __init__(self) -> None:
        self._set = False
        #: Held while it is not set, and by whoever passes.
        self._gate: Any = monkey.get_original("_thread", "allocate_lock")()
        self._gate.acquire()

    def set(self) -> None:
        """Lets `wait` return."""
        if not self._set:
            self._set = True
            self._gate.release()

    def clear(self) -> None:
        """Has `wait` wait again."""
        if self._set:
            self._set = False
            self._gate.acquire()

    def is_set(self) -> bool:
        """Whether `wait` returns at once."""
        return self._set

    def wait(self, timeout: float | None = None) -> bool:
        """Whether it is set, once it is, or after so many seconds."""
        passes: bool = self._gate.acquire(timeout=-1 if timeout is None else timeout)
        if passes:
            self._gate.release()
        return passes


def use_real_threads() -> None:
    """Gives a worker of xdist what it waits with. In a run of one process it does nothing."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        lock = monkey.get_original("_thread", "RLock")
        for model in ExecModel.__subclasses__():
            model.Event = lambda _self: RealEvent()
            model.RLock = lambda _self: lock()
