"""The two places where bytes from outside come in: a provider's event stream, and the answers and addresses of callbacks."""

import itertools
import socket
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace

import gevent
import httpcore2._utils
import httpx
import msgspec
import pytest
from httpx_sse import EventSource
from hypothesis import given, settings
from hypothesis import strategies as st

from aistream.errors import ProviderFailed
from aistream.events import End
from aistream.providers import anthropic, failures, openai, transport, wire
from aistream.providers.base import Call
from aistream.session import Request

#: No deadline: the machine may be busy with something else.
EXAMPLES = settings(deadline=None)


class Heard(wire.Reading):
    """What is read, step by step."""

    def __init__(self) -> None:
        super().__init__(Call(Request("Hello", "m", "m", "openai"), "m"))
        self.steps: list[list[bytes]] = []

    def chunks(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        """Begins a step with each."""
        for chunk in chunks:
            self.steps.append([])
            yield chunk

    def take(self, data: bytes) -> None:
        """One event."""
        self.steps[-1].append(data)

    def end(self) -> End:
        """Whatever was said."""
        return End("stop")


def steps(chunks: Iterable[bytes]) -> list[list[bytes]]:
    """The data of the events of a stream that arrives in these chunks, step by step."""
    heard = Heard()
    body = SimpleNamespace(extensions={transport.BODY: heard.chunks(chunks)})
    response = SimpleNamespace(headers={"content-type": "text/event-stream"}, http_response=body)
    wire.read(response, heard, NotImplemented, NotImplemented)
    return heard.steps


def flat(chunks: Iterable[bytes]) -> list[bytes]:
    """The data of the events of a stream that arrives in these chunks."""
    return list(itertools.chain.from_iterable(steps(chunks)))


OPENAI = (
    'data: {"choices":[{"delta":{"content":"Grüße 😀"}}]}\n\n'
    ": OPENROUTER PROCESSING\n\n"
    'data: {"choices":[{"delta":{"content":"\\n\\n: x"}}]}\n\n'
    "data: [DONE]\n\n"
).encode()
ANTHROPIC = (
    b'event: message_start\ndata: {"type":"message_start"}\n\n'
    b'event: ping\ndata: {"type":"ping"}\n\n\n'
    b'event: content_block_delta\ndata: {"type":"content_block_delta","delta":{"text":"a"}}\n\n'
    b'id: 7\nretry: 5\nevent: error\ndata:{"type":"error"}\n\n'
)
LINES = b"\n\nevent\ndata\n\ndata: a\ndata: \ndata:  b\n\nevent: alone\n\n:\n:\ndata:x\n\nfield: y\ndata: z\n\ndata: cut off"

STREAMS = pytest.mark.parametrize(
    "stream",
    [
        OPENAI,
        ANTHROPIC,
        LINES,
        OPENAI.replace(b"\n", b"\r\n"),
        ANTHROPIC.replace(b"\n", b"\r\n"),
        LINES.replace(b"\n", b"\r\n"),
        ANTHROPIC.replace(b"\n", b"\r"),
        LINES.replace(b"\n", b"\r"),
    ],
    ids=["openai", "anthropic", "lines", "openai crlf", "anthropic crlf", "lines crlf", "anthropic cr", "lines cr"],
)


@STREAMS
def test_a_stream_cut_anywhere_has_the_events_of_the_uncut_one(stream: bytes) -> None:
    uncut = flat([stream])

    assert uncut != []
    for place in range(len(stream) + 1):
        assert flat([stream[:place], stream[place:]]) == uncut, f"cut at byte {place}"
    assert flat(stream[i : i + 1] for i in range(len(stream))) == uncut


@STREAMS
def test_empty_chunks_change_nothing(stream: bytes) -> None:
    assert flat([b"", *(part for i in range(len(stream)) for part in (stream[i : i + 1], b""))]) == flat([stream])


def test_the_events_are_those_that_stand_there() -> None:
    assert flat([ANTHROPIC]) == [
        b'{"type":"message_start"}',
        b'{"type":"ping"}',
        b'{"type":"content_block_delta","delta":{"text":"a"}}',
        b'{"type":"error"}',
    ]
    assert flat([LINES]) == [b"", b"a\n\n b", b"x", b"z"]


def test_each_step_gives_all_that_its_chunk_completed() -> None:
    chunks = [b"data: 1\n\ndata: 2\n\nda", b"ta: 3", b"\n", b"\ndata: 4\n\n"]

    assert steps(chunks) == [[b"1", b"2"], [], [], [b"3", b"4"]]


def test_an_event_that_the_end_cuts_off_is_none() -> None:
    assert flat([b"data: 1\n\ndata: 2\n"]) == [b"1"]
    assert flat([b"data: 1\n\ndata: 2"]) == [b"1"]


@EXAMPLES
@given(
    st.lists(st.sampled_from(["data: ", "data:", "event: ", ": ", "id: 1", "x", "é😀", "{", " ", "\u2028", "NL", "NL", "NLNL"])),
    st.sampled_from(["\n", "\r\n"]),
    st.lists(st.integers(1, 9), max_size=30),
)
def test_any_stream_in_any_pieces_is_read_as_an_independent_decoder_reads_it(parts: list[str], end: str, cuts: list[int]) -> None:
    stream = ("".join(parts) + "NLNL").replace("NL", end).encode()
    places = [0, *itertools.accumulate(cuts), len(stream)]
    response = httpx.Response(200, headers={"Content-Type": "text/event-stream; charset=utf-8"}, content=stream)

    events = flat(stream[begin:stop] for begin, stop in itertools.pairwise(places))

    expected = [event.data for event in EventSource(response).iter_sse() if event.data]
    assert [data.decode() for data in events if data] == expected


@pytest.mark.parametrize(
    ("reading", "word", "error"),
    [
        (openai._Reading, '{"choices":[{"delta":{"content":"the whole answer so far"}}]}', '{"error":%s}'),
        (
            anthropic._Reading,
            '{"type":"content_block_delta","delta":{"text":"the whole answer so far"}}',
            '{"type":"error","error":%s}',
        ),
    ],
    ids=["openai", "anthropic"],
)
def test_an_error_that_quotes_the_words_of_its_own_step_takes_none_of_them_into_the_log(
    reading: Callable[[Call], wire.Reading], word: str, error: str
) -> None:
    said: list[str] = []
    call = Call(Request("Hello", "m", "m", "openai"), "m", written=lambda: said)
    quoting = error % '{"message":"Flagged: the whole answer so far"}'
    body = SimpleNamespace(extensions={transport.BODY: [f"data: {word}\n\ndata: {quoting}\n\n".encode()]})
    response = SimpleNamespace(headers={"content-type": "text/event-stream"}, http_response=body)

    with pytest.raises(ProviderFailed) as failed:
        wire.read(response, reading(call), NotImplemented, lambda event: said.append(event.text))

    assert said == ["the whole answer so far"]
    assert failed.value.log_detail["provider_message"] == "Flagged: […]"


# ---- A provider's JSON ----


class Delta(msgspec.Struct):
    """What a provider's object is decoded into here."""

    text: str | None = None
    count: int = 0


DECODER = msgspec.json.Decoder(Delta)


@pytest.mark.parametrize(
    ("data", "delta"),
    [
        (b"{}", Delta()),
        (b'{"text":null,"unknown":{"a":[1]}}', Delta()),
        (b'{"text":"\\ud83d\\ude00\\u0000"}', Delta("😀\0")),
        (b'{"text":"\\ud83d"}', Delta("\ud83d")),
        (b'{"text":"\\ude00x","count":2}', Delta("\ude00x", 2)),
    ],
)
def test_a_providers_json_is_decoded_also_where_a_character_is_cut_in_half(data: bytes, delta: Delta) -> None:
    assert wire.decode(data, DECODER) == delta


@pytest.mark.parametrize("data", [b"", b"x", b"[1]", b"null", b'{"text":5}', b'{"text":"', b'{"text":"\xff"}', b"[" * 100_000])
def test_what_is_no_such_json_is_malformed(data: bytes) -> None:
    with pytest.raises(ProviderFailed) as failed:
        wire.decode(data, DECODER)

    assert (failed.value.code, failed.value.retryable) == ("upstream_malformed", True)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        ({"type": "overloaded_error", "message": "sk-secretsecret"}, "provider_overloaded", ["overloaded_error"]),
        ({"code": "insufficient_quota", "type": "insufficient_quota"}, "provider_quota", ["insufficient_quota"] * 2),
        ({"code": "rate_limit_exceeded", "type": "tokens"}, "provider_rate_limited", ["tokens", "rate_limit_exceeded"]),
        ({"type": "a new one, with org-1234"}, "provider_unavailable", []),
        ({"code": 429, "message": "upstream is busy"}, "provider_rate_limited", []),
        ({"type": ["x"], "code": None}, "provider_unavailable", []),
        (
            {"type": "invalid_request_error", "message": "prompt is too long: 1 > 0"},
            "context_length_exceeded",
            ["invalid_request_error"],
        ),
        ("text", "provider_unavailable", []),
        ([], "provider_unavailable", []),
        (None, "provider_unavailable", []),
    ],
)
def test_an_error_event_is_named_by_its_words_and_quoted_only_in_the_log(error: object, code: str, words: list[str]) -> None:
    failed = failures.error_event(error, Call(Request("Hello", "m", "m", "openai"), "m"))

    assert (failed.code, failed.log_detail["provider_error"]) == (code, words)
    assert "secret" not in failed.message + str(failed.log_detail)


def test_the_sdks_pool_tells_a_good_connection_from_a_closed_one_without_the_hub() -> None:
    ours, theirs = socket.socketpair()
    switches = gevent.get_hub().loop.iteration

    idle = httpcore2._utils.is_socket_readable(ours)
    theirs.send(b"x")
    waiting = httpcore2._utils.is_socket_readable(ours)
    ours.recv(1)
    theirs.close()
    closed = httpcore2._utils.is_socket_readable(ours)

    ours.close()
    assert (idle, waiting, closed) == (False, True, True)
    assert gevent.get_hub().loop.iteration == switches
