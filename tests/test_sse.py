"""The wire of a stream: what the two encoders write, and that any text, however it comes, arrives as it was."""

import json
import re
from collections.abc import Iterable, Iterator
from itertools import pairwise

import httpx
import msgspec
import pytest
from httpx_sse import EventSource, ServerSentEvent
from hypothesis import given, settings
from hypothesis import strategies as st

from aistream.events import Cursor, End, Event, Failed, Reasoning, Start, Text, Usage
from aistream.sse import DONE, HEARTBEAT, PREAMBLE, Cutter, error_frame, json_frame, text_frame, visible

AT = Cursor(1, 7)
FAILED = Failed("provider_overloaded", "The model provider is overloaded.", True)

#: No deadline: the machine may be busy with something else.
EXAMPLES = settings(max_examples=200, deadline=None)
#: What a provider may send in one go: pieces of everything that means something to SSE, to the cutter or to a decoder.
CHUNKS = st.lists(
    st.sampled_from(
        [
            *(DONE, "[", "DONE]", "]", "\r", "\n", "\r\n", "\0", " ", "\u2028", "\x85", "\ufeff", "\ud83d", "\ude00", "😀", "a"),
            *("data: ", "data:", ":x", "id: 1-9", "event: error", "retry: 1"),
        ]
    )
    | st.text(st.characters(exclude_categories=()), max_size=4),
    max_size=4,
).map("".join)
#: The places where a network may cut a stream.
CUTS = st.lists(st.integers(1, 40), max_size=20)


def cut(text: str, *more: str) -> list[str]:
    """The pieces that a cutter makes of these chunks."""
    cutter = Cutter()
    return [piece for chunk in (text, *more) for piece in cutter.feed(chunk)] + cutter.end()


def whole(text: str) -> str:
    """The text with pairs of surrogates joined and lone ones replaced."""
    paired = re.sub(
        "([\ud800-\udbff])([\udc00-\udfff])",
        lambda pair: chr(0x10000 + (ord(pair[1]) - 0xD800) * 0x400 + ord(pair[2]) - 0xDC00),
        text,
    )
    return re.sub("[\ud800-\udfff]", "\ufffd", paired)


def decoded(stream: bytes, cuts: Iterable[int] = ()) -> list[ServerSentEvent]:
    """What an independent decoder makes of a stream that arrives in pieces of these sizes."""

    def pieces() -> Iterator[bytes]:
        start = 0
        for size in cuts:
            yield stream[start : start + size]
            start += size
        yield stream[start:]

    response = httpx.Response(200, headers={"Content-Type": "text/event-stream; charset=utf-8"}, content=pieces())
    return list(EventSource(response).iter_sse())


@pytest.mark.parametrize(
    ("event", "frame"),
    [
        (Text("Hello"), b"id: 1-7\ndata: Hello\n\n"),
        (Text(" world "), b"id: 1-7\ndata:  world \n\n"),
        (Text("a\nb"), b"id: 1-7\ndata: a\ndata: b\n\n"),
        (Text("\n"), b"id: 1-7\ndata: \ndata: \n\n"),
        (Text("a\r\nb\rc\r"), b"id: 1-7\ndata: a\ndata: b\ndata: c\ndata: \n\n"),
        (Text("a\0b"), b"id: 1-7\ndata: ab\n\n"),
        (Text("\0"), b""),
        (Text(""), b""),
        (Text("x\u2028y\x85z\x0b\x1c"), "id: 1-7\ndata: x\u2028y\x85z\x0b\x1c\n\n".encode()),
        (Text("data: :x\n:y"), b"id: 1-7\ndata: data: :x\ndata: :y\n\n"),
        (Reasoning("hm"), b""),
        (Start("s", "gpt-4o", "openai"), b""),
        (Usage(1, 2), b""),
        (End("stop"), b"id: 1-7\ndata: [DONE]\n\n"),
        (End("cancelled"), b"id: 1-7\ndata: [DONE]\n\n"),
        (
            FAILED,
            b"id: 1-7\nevent: error\n"
            b'data: {"code":"provider_overloaded","message":"The model provider is overloaded.","retryable":true}\n\n',
        ),
    ],
)
def test_text_mode_writes_an_event_as_bare_lines(event: Event, frame: bytes) -> None:
    assert text_frame(AT, event) == frame


@pytest.mark.parametrize(
    ("event", "frame"),
    [
        (Text("a\r\n\0b"), rb'id: 1-7|data: {"type":"text","text":"a\r\n\u0000b"}||'),
        (Text(DONE), b'id: 1-7|data: {"type":"text","text":"[DONE]"}||'),
        (Reasoning("hm"), b'id: 1-7|data: {"type":"reasoning","text":"hm"}||'),
        (
            Start("s-1", "gpt-4o", "openai"),
            b'id: 1-7|data: {"type":"start","streamId":"s-1","model":"gpt-4o","provider":"openai"}||',
        ),
        (
            Usage(3, 4, 1, 2, "estimated", "tiktoken"),
            b'id: 1-7|data: {"type":"usage","input_tokens":3,"output_tokens":4,"cached_input_tokens":1,"reasoning_tokens":2,'
            b'"source":"estimated","estimated_by":"tiktoken"}||',
        ),
        (End("length"), b'data: {"type":"end","finish_reason":"length"}||id: 1-7|data: [DONE]||'),
        (End("cancelled"), b'data: {"type":"cancelled"}||id: 1-7|data: [DONE]||'),
        (
            FAILED,
            b'id: 1-7|event: error|data: {"type":"error","code":"provider_overloaded",'
            b'"message":"The model provider is overloaded.","retryable":true}||',
        ),
    ],
)
def test_json_mode_writes_an_event_as_a_typed_object(event: Event, frame: bytes) -> None:
    assert json_frame(AT, event) == frame.replace(b"|", b"\n")


def test_the_start_of_a_second_run_is_not_told_to_a_viewer() -> None:
    start = Start("s-1", "gpt-4o", "openai")

    assert json_frame(Cursor(1, 0), start) != b""
    assert json_frame(Cursor(2, 0), start) == b""


def test_a_refusal_without_an_id_writes_no_id_line() -> None:
    assert error_frame(FAILED, None).startswith(b"event: error\ndata: {")


def test_preamble_and_heartbeats_are_no_events_to_a_decoder() -> None:
    stream = PREAMBLE + HEARTBEAT * 3 + text_frame(Cursor(1, 1), Text("a")) + HEARTBEAT + text_frame(Cursor(1, 2), Text("b"))

    events = decoded(stream)

    assert [(event.id, event.event, event.data) for event in events] == [("1-1", "message", "a"), ("1-2", "message", "b")]
    assert events[0].retry == 2000


@pytest.mark.parametrize(
    ("chunks", "pieces"),
    [
        (["Hello", " world"], ["Hello", " world"]),
        (["", "a", ""], ["a"]),
        (["a\r", "\nb"], ["a", "\r\nb"]),
        (["a\r", "b"], ["a", "\rb"]),
        (["a\r"], ["a", "\r"]),
        (["\r", "\r", "\n"], ["\r", "\r\n"]),
        (["\ud83d", "\ude00"], ["😀"]),
        (["\ud83d\ude00"], ["😀"]),
        (["x\ud83d", "y"], ["x", "\ufffdy"]),
        (["\ude00"], ["\ufffd"]),
        (["\ud83d"], ["\ufffd"]),
        ([DONE], ["[", "DONE]"]),
        (["[DO", "NE]"], ["[DO", "NE]"]),
        (["\0[DO\0NE]"], ["\0[", "DO\0NE]"]),
        (["[DONE]\n"], ["[DONE]\n"]),
        (["[DONE]\r", "x"], ["[", "DONE]", "\rx"]),
        ([" [DONE]"], [" [DONE]"]),
    ],
)
def test_the_cutter_cuts_where_a_frame_could_not_carry_the_text(chunks: list[str], pieces: list[str]) -> None:
    assert cut(*chunks) == pieces


@EXAMPLES
@given(st.lists(CHUNKS, min_size=1, max_size=6))
def test_joined_the_pieces_are_the_text(chunks: list[str]) -> None:
    assert "".join(cut(*chunks)) == whole("".join(chunks))


@EXAMPLES
@given(st.lists(CHUNKS, min_size=1, max_size=6))
def test_no_piece_reads_done_is_empty_or_parts_a_cr_from_its_lf(chunks: list[str]) -> None:
    pieces = cut(*chunks)

    assert DONE not in [visible(piece) for piece in pieces]
    assert "" not in pieces
    assert [pair for pair in pairwise(pieces) if pair[0][-1] == "\r" and pair[1][0] == "\n"] == []
    assert "".join(map(visible, pieces)) == visible("".join(pieces))


@EXAMPLES
@given(st.lists(CHUNKS, min_size=1, max_size=6), CUTS)
def test_text_mode_carries_any_text_through_any_cuts(chunks: list[str], cuts: list[int]) -> None:
    pieces = cut(*chunks)
    frames = [text_frame(Cursor(1, seq), Text(piece)) for seq, piece in enumerate(pieces, 1)]
    ending = text_frame(Cursor(1, len(pieces) + 1), End("stop"))

    *events, done = decoded(PREAMBLE + b"".join(frames) + HEARTBEAT + ending, cuts)

    assert "".join(event.data for event in events) == visible(whole("".join(chunks)))
    assert {event.event for event in events} <= {"message"}
    assert [event.id for event in events] == [f"1-{seq}" for seq, frame in enumerate(frames, 1) if frame]
    assert (done.event, done.data, done.id) == ("message", DONE, f"1-{len(pieces) + 1}")


@EXAMPLES
@given(st.lists(CHUNKS, min_size=1, max_size=6), CUTS)
def test_json_mode_carries_any_text_exactly_through_any_cuts(chunks: list[str], cuts: list[int]) -> None:
    frames = [json_frame(Cursor(1, seq), Text(piece)) for seq, piece in enumerate(cut(*chunks), 1)]
    ending = json_frame(Cursor(1, 99), End("stop"))

    *events, end, done = decoded(PREAMBLE + b"".join(frames) + ending, cuts)

    assert "".join(json.loads(event.data)["text"] for event in events) == whole("".join(chunks))
    assert json.loads(end.data) == {"type": "end", "finish_reason": "stop"}
    assert (done.data, done.id) == (DONE, "1-99")


ANY = st.text(st.characters(exclude_categories=("Cs",)), max_size=12) | st.sampled_from([DONE, "\r", "\n\n", "\0", "data: x"])
COUNT = st.integers(0, 10**9)
EVENTS = st.one_of(
    st.builds(Start, ANY, ANY, ANY),
    st.builds(Text, ANY),
    st.builds(Reasoning, ANY),
    st.builds(Usage, COUNT, COUNT, COUNT, COUNT, st.sampled_from(["provider", "partial", "estimated"]), st.none() | ANY),
    st.builds(Failed, ANY, ANY, st.booleans()),
)


@EXAMPLES
@given(st.lists(EVENTS, min_size=1, max_size=6), CUTS)
def test_json_mode_carries_any_event_exactly_through_any_cuts(events: list[Event], cuts: list[int]) -> None:
    frames = [json_frame(Cursor(1, seq), event) for seq, event in enumerate(events, 1)]

    read = decoded(PREAMBLE + HEARTBEAT.join(frames), cuts)

    assert [msgspec.json.decode(one.data, type=Start | Text | Reasoning | Usage | Failed) for one in read] == events
    assert [one.id for one in read] == [f"1-{seq}" for seq in range(1, len(events) + 1)]
    assert [one.event for one in read] == ["error" if isinstance(event, Failed) else "message" for event in events]


@EXAMPLES
@given(st.builds(Failed, ANY, ANY, st.booleans()), CUTS)
def test_text_mode_carries_any_failure_exactly_through_any_cuts(failed: Failed, cuts: list[int]) -> None:
    (read,) = decoded(text_frame(AT, failed), cuts)

    assert json.loads(read.data) == {"code": failed.code, "message": failed.message, "retryable": failed.retryable}
    assert (read.event, read.id) == ("error", "1-7")
