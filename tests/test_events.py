"""Events and their ids: as they stand in the log, on the wire and in a browser's Last-Event-ID."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aistream.events import MAX_UINT64, Cursor, End, Event, Failed, Reasoning, Start, Text, Usage, from_entry, is_ending, to_entry
from aistream.log import Log
from aistream.sse import json_frame, text_frame

#: No deadline: the machine may be busy with something else.
EXAMPLES = settings(deadline=None)
TEXT = st.text(max_size=20)
COUNT = st.integers(0, 10**9)
EVENTS = st.one_of(
    st.builds(Start, TEXT, TEXT, TEXT),
    st.builds(Text, TEXT),
    st.builds(Reasoning, TEXT),
    st.builds(Usage, COUNT, COUNT, COUNT, COUNT, TEXT),
    st.builds(End, TEXT),
    st.builds(Failed, TEXT, TEXT, st.booleans()),
)
UINT64 = st.integers(0, MAX_UINT64)


@pytest.mark.parametrize(
    ("text", "cursor"),
    [
        ("1-0", (1, 0)),
        ("0-0", (0, 0)),
        ("12-345", (12, 345)),
        (f"{MAX_UINT64}-{MAX_UINT64}", (MAX_UINT64, MAX_UINT64)),
        (f"{MAX_UINT64 + 1}-0", None),
        (f"0-{MAX_UINT64 + 1}", None),
        ("9" * 20 + "-1", None),
        ("0" * 20 + "1-1", None),
        (None, None),
        ("", None),
        ("1", None),
        ("1-", None),
        ("-1", None),
        ("1-2-3", None),
        ("-1-2", None),
        ("+1-2", None),
        ("1-+2", None),
        (" 1-2", None),
        ("1-2 ", None),
        ("1-2\n", None),
        ("1_0-2", None),
        ("0x1-0", None),
        ("1e3-0", None),
        ("١-٢", None),
        ("1\0-2", None),
        ("1" * 10_000 + "-1", None),
    ],
)
def test_a_cursor_is_two_unsigned_64_bit_numbers_or_nothing(text: str | None, cursor: tuple[int, int] | None) -> None:
    assert Cursor.parse(text) == cursor


@EXAMPLES
@given(UINT64, UINT64)
def test_a_cursor_survives_being_written_and_read(epoch: int, seq: int) -> None:
    assert Cursor.parse(str(Cursor(epoch, seq))) == Cursor(epoch, seq)


@EXAMPLES
@given(
    st.text(st.sampled_from("0123456789-٣ +\n"), max_size=45)
    | st.text(st.characters(exclude_categories=()))
    | st.tuples(st.integers(0, 2**70), st.integers(-1, 2**70)).map(lambda pair: f"{pair[0]}-{pair[1]}")
)
def test_whatever_a_client_sends_as_its_last_id_is_the_cursor_it_says_or_none(text: str) -> None:
    cursor = Cursor.parse(text)

    numbers = [int(part) for part in text.split("-")] if re.fullmatch("[0-9]{1,20}-[0-9]{1,20}", text) else []
    within = bool(numbers) and max(numbers) <= MAX_UINT64
    assert cursor == (tuple(numbers) if within else None)


def test_cursors_stand_in_the_order_of_redis_entry_ids() -> None:
    ordered = [Cursor(0, 9), Cursor(1, 0), Cursor(1, 2), Cursor(1, 10), Cursor(2, 0), Cursor(10, 0)]

    assert sorted(reversed(ordered)) == ordered


@EXAMPLES
@given(EVENTS)
def test_an_event_survives_the_log(event: Event) -> None:
    assert from_entry(*to_entry(event)) == event


@pytest.mark.parametrize(
    ("event", "name", "value"),
    [
        (Text(" a\r\n\0😀"), b"text", " a\r\n\0😀".encode()),
        (Text(""), b"text", b""),
        (Reasoning("hm"), b"reasoning", b"hm"),
        (End("stop"), b"end", {"type": "end", "finish_reason": "stop"}),
        (
            Failed("expired", "Late.", False),
            b"error",
            {"type": "error", "code": "expired", "message": "Late.", "retryable": False},
        ),
        (Start("s", "m", "p"), b"start", {"type": "start", "streamId": "s", "model": "m", "provider": "p"}),
    ],
)
def test_an_entry_is_bare_text_or_json_under_the_events_type(event: Event, name: bytes, value: bytes | dict[str, object]) -> None:
    found, written = to_entry(event)

    assert found == name
    assert (written if isinstance(value, bytes) else json.loads(written)) == value


@EXAMPLES
@given(EVENTS)
def test_only_an_end_and_a_failure_are_the_last_of_a_log(event: Event) -> None:
    assert is_ending(event) is isinstance(event, (End, Failed))


@pytest.fixture
def log() -> Log:
    """A log whose first worker was lost behind `1-2`, and which a second epoch ended."""
    log = Log("s-1")
    start = Start("s-1", "gpt-4o", "openai")
    said = [start, Text("a"), Text("b\n")]
    for cursor, event in zip([Cursor(1, 0), Cursor(1, 1), Cursor(1, 2)], said, strict=True):
        log.append(cursor, event)
    log.append(Cursor(2, 0), start)
    log.append(Cursor(2, 1), Failed("worker_lost", "Lost.", True))
    return log


@pytest.mark.parametrize(
    ("cursor", "position"),
    [
        (None, 0),
        (Cursor(1, 0), 1),
        (Cursor(1, 1), 2),
        (Cursor(1, 2), 3),
        (Cursor(1, 3), 3),
        (Cursor(1, 99), 3),
        (Cursor(2, 0), 4),
        (Cursor(2, 1), 5),
        (Cursor(2, 9), 13),
        (Cursor(3, 0), 0),
        (Cursor(0, 5), 0),
        (Cursor(MAX_UINT64, MAX_UINT64), 0),
    ],
)
def test_a_reader_goes_on_behind_its_cursor(log: Log, cursor: Cursor | None, position: int) -> None:
    """A cursor ahead of what a lost worker had stored goes on with the next epoch; an unknown epoch is no cursor."""
    assert log.position(cursor) == position


@pytest.mark.parametrize(
    ("cursor", "follows"),
    [
        (Cursor(2, 2), True),
        (Cursor(3, 0), True),
        (Cursor(9, 0), True),
        (Cursor(2, 1), False),
        (Cursor(2, 3), False),
        (Cursor(3, 1), False),
        (Cursor(1, 3), False),
    ],
)
def test_an_event_follows_without_a_gap_or_begins_a_later_epoch(log: Log, cursor: Cursor, follows: bool) -> None:
    assert log.follows(cursor) is follows


def test_an_empty_log_takes_only_the_first_event_of_an_epoch() -> None:
    assert [cursor for cursor in (Cursor(1, 0), Cursor(4, 0), Cursor(1, 1)) if Log("s").follows(cursor)] == [(1, 0), (4, 0)]


def test_a_logs_frames_are_those_of_its_events_from_any_position(log: Log) -> None:
    for position in range(len(log) + 1):
        texts = [text_frame(cursor, event) for cursor, event in zip(log.cursors, log.events, strict=True)]
        objects = [json_frame(cursor, event) for cursor, event in zip(log.cursors, log.events, strict=True)]

        assert log.frames("text", position) == (b"".join(texts[position:]), len(texts))
        assert log.frames("json", position) == (b"".join(objects[position:]), len(objects))


def test_a_log_knows_its_answer_and_its_last_event(log: Log) -> None:
    assert log.answer() == "ab\n"
    assert (log.last, log.ended) == (Cursor(2, 1), True)
