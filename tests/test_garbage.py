"""What sessions leave behind: little for the garbage collector, which looks through everything but seldom."""

import gc
import warnings
import weakref
from collections.abc import Iterator

import gevent
import pytest

from aistream import garbage
from aistream.app import create_app
from aistream.config import Config
from aistream.session import Request
from tests.service import wait_until


@pytest.fixture
def collector() -> Iterator[None]:
    """The garbage collector, as it was before."""
    thresholds = gc.get_threshold()
    yield
    with warnings.catch_warnings():
        # What comes to light is of all tests before these, frozen while it was in use: no matter of these two.
        warnings.simplefilter("ignore", ResourceWarning)
        gc.unfreeze()
        gc.collect()
    gc.set_threshold(*thresholds)
    gc.enable()


class Loop:
    """Something that refers to itself."""

    def __init__(self) -> None:
        self.itself = self


def test_a_generation_is_freed_when_it_is_over_without_the_garbage_collector(config: Config, collector: None) -> None:
    parts = create_app(config).extensions["aistream"]
    asked = Request("one two", "echo", "echo", "echo", immediate=True)
    parts.generations.accept("first", "n8n", asked, "http://127.0.0.1:9/none")
    wait_until(lambda: not parts.generations.running)  # the store has loaded its scripts by then, each with an exception
    gc.disable()

    parts.generations.accept("a-session", "n8n", asked, "http://127.0.0.1:9/none")
    generation = weakref.ref(parts.generations.running["a-session"])

    wait_until(lambda: not parts.generations.running and generation() is None)


def test_old_garbage_is_looked_for_from_time_to_time(collector: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(garbage, "REST", 0.05)
    garbage.settle()
    old = weakref.ref(Loop())
    loop = gevent.spawn(garbage.run)

    wait_until(lambda: old() is None)

    loop.kill()
    assert gc.get_freeze_count() > 0
