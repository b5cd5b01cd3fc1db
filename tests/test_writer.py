"""The log writer: many logs in one round trip, and each refusal told apart."""

from collections.abc import Callable, Iterator

import gevent
import pytest

from aistream.events import Cursor, Start, Text
from aistream.log import Log
from aistream.pulse import Pulse
from aistream.session import Claimed, Request
from aistream.store import Store
from aistream.writer import LogWriter, Storing
from tests.service import wait_until

MakeStore = Callable[..., Store]
#: A lease that is over at once: no test waits for anything but its end.
SHORT = {"LEASE_SECONDS": 0.2}
OVER = 0.25
ASKED = Request(prompt="p", requested_model="gpt-4", model="gpt-4", provider="openai", max_tokens=5)


class Writing:
    """A log writer at work on real sessions."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.writer = LogWriter(store, Pulse(hole=60))

    def begin(self, session_id: str) -> Storing:
        """A running session with nothing but its start."""
        self.store.create(session_id, "n8n", ASKED, "http://n8n/w")
        claimed = self.store.claim(session_id)
        assert isinstance(claimed, Claimed)
        log = Log(session_id)
        log.append(Cursor(1, 0), Start(session_id, "gpt-4", "openai"))
        return Storing(log, claimed, stored=1)

    def say(self, storing: Storing, *texts: str) -> None:
        """Appends texts to the log and hands them over."""
        for text in texts:
            storing.log.append(Cursor(1, len(storing.log)), Text(text))
        self.writer.touch(storing)

    def stored(self, storing: Storing) -> list[str]:
        """The texts that the store has."""
        entries = self.store.read({storing.log.session_id: None})[storing.log.session_id]
        return [event.text for _, event in entries if isinstance(event, Text)]


@pytest.fixture
def writing(make_store: MakeStore) -> Iterator[Writing]:
    """The writer with its loop running."""
    one = Writing(make_store(**SHORT))
    loop = gevent.spawn(one.writer.run)
    yield one
    loop.kill()


def test_what_was_handed_over_is_stored_in_order(writing: Writing) -> None:
    many = [writing.begin(f"session-{i}") for i in range(5)]

    for storing in many:
        writing.say(storing, "a", "b")
    for storing in many:
        writing.say(storing, "c")

    wait_until(lambda: all(storing.stored == 4 for storing in many))
    assert [writing.stored(storing) for storing in many] == [["a", "b", "c"]] * 5


def test_of_many_logs_in_one_flush_only_the_fenced_one_is_void(writing: Writing, make_store: MakeStore) -> None:
    before, lost, after = (writing.begin(name) for name in ("before", "lost", "after"))
    for storing in (before, lost, after):
        writing.say(storing, "seen")
    wait_until(lambda: lost.stored == 2)
    gevent.sleep(OVER)
    assert isinstance(make_store("other", **SHORT).claim("lost", "recover"), Claimed)

    for storing in (before, lost, after):
        writing.say(storing, "x")

    wait_until(lambda: before.stored == after.stored == 3 and lost.log.dropped)
    assert (before.log.dropped, after.log.dropped) == (False, False)
    assert writing.stored(before) == writing.stored(after) == ["seen", "x"]
    assert writing.stored(lost) == ["seen"]


def test_a_log_whose_entries_had_arrived_unheard_goes_on_behind_them(writing: Writing) -> None:
    storing = writing.begin("echo")
    writing.store.append([("echo", Cursor(1, 1), Text("a")), ("echo", Cursor(1, 2), Text("b"))])

    writing.say(storing, "a", "b", "c")

    wait_until(lambda: storing.stored == 4)
    assert writing.stored(storing) == ["a", "b", "c"] and not storing.log.dropped


def test_the_first_event_is_stored_before_the_log_has_it(writing: Writing) -> None:
    storing = writing.begin("first")

    first = writing.writer.write_first(storing, Cursor(1, 1), Text("a"))
    again = writing.writer.write_first(storing, Cursor(1, 1), Text("a"))

    assert first and again and not storing.log.dropped
    assert (writing.stored(storing), len(storing.log), storing.stored) == (["a"], 1, 2)


def test_the_first_event_of_a_lost_session_makes_the_log_void(writing: Writing, make_store: MakeStore) -> None:
    storing = writing.begin("gone")
    gevent.sleep(OVER)
    assert isinstance(make_store("other", **SHORT).claim("gone", "recover"), Claimed)

    assert writing.writer.write_first(storing, Cursor(1, 1), Text("a")) is False
    assert storing.log.dropped


def test_more_than_one_batch_is_stored_whole(writing: Writing) -> None:
    storing = writing.begin("long")

    writing.say(storing, *map(str, range(1200)))
    writing.writer.flush(storing)

    assert writing.stored(storing) == [str(i) for i in range(1200)]
