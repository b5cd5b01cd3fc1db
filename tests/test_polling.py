"""The hub's polls: a busy one asks less often, one that is not is left alone."""

from collections.abc import Iterator

import gevent
import pytest
from gevent.hub import get_hub

from aistream.polling import INTERVAL, STAYS, WINDOW, Polling


class Counted(Polling):
    """One that says how often its hub has polled."""

    polls = 0

    def _before_poll(self) -> None:
        super()._before_poll()
        self.polls += 1


@pytest.fixture
def polling() -> Iterator[Counted]:
    """This hub's, at work."""
    one = Counted()
    one.start()
    yield one
    one.stop()


def polls_under(polling: Counted, wake_ups: int, seconds: float = 0.4) -> int:
    """How often the hub polls while timers would wake it so many times a second."""
    loop = get_hub().loop
    timers = [loop.timer(i / wake_ups) for i in range(int(seconds * wake_ups))]
    for timer in timers:
        timer.start(lambda: None)
    before = polling.polls
    gevent.sleep(seconds)
    for timer in timers:
        timer.close()
    return polling.polls - before


def test_a_busy_hub_polls_once_a_millisecond(polling: Counted) -> None:
    polls = polls_under(polling, 8000)

    # It takes one window to tell.
    assert polls < 0.4 / INTERVAL + 8000 * WINDOW


def test_a_hub_that_is_not_busy_is_left_alone(polling: Counted) -> None:
    polls_under(polling, 8000)
    was_busy = polling.busy

    polls_under(polling, int(0.4 * STAYS / WINDOW))

    assert was_busy and not polling.busy


def test_what_is_to_be_done_is_done_before_the_pause(polling: Counted) -> None:
    polls_under(polling, 8000)
    done: list[int] = []

    get_hub().loop.run_callback(lambda: done.append(polling.polls))
    before = polling.polls
    gevent.sleep(2 * INTERVAL)

    assert done == [before] and polling.polls > before
