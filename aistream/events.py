"""What a generation says: the same five events for every provider, and their two encodings.

Pure values. On the JSON wire an event is its tagged JSON object; in the log (a Redis Stream) an entry has one field, whose
name is the event's type and whose value is the bare text, or JSON for the rarer types: half the memory of stored SSE frames.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import msgspec

MAX_UINT64 = 2**64 - 1


class Cursor(NamedTuple):
    """The id of an event: log entry id, SSE id and resume position in one. Ordered as Redis orders its entry ids."""

    epoch: int
    seq: int

    def __str__(self) -> str:
        return f"{self.epoch}-{self.seq}"

    @classmethod
    def parse(cls, text: str | None) -> Cursor | None:
        """`<epoch>-<seq>`, two unsigned 64-bit numbers, or None for anything else: a bad cursor is no cursor."""
        match = _CURSOR.fullmatch(text) if text and len(text) <= 41 else None
        if match is None:
            return None
        epoch, seq = int(match[1]), int(match[2])
        return cls(epoch, seq) if epoch <= MAX_UINT64 and seq <= MAX_UINT64 else None


_CURSOR = re.compile(r"([0-9]{1,20})-([0-9]{1,20})")


class Start(msgspec.Struct, frozen=True, tag_field="type", tag="start", rename={"stream_id": "streamId"}):
    """The generation began. Stands as `<epoch>-0`, written by the claim itself."""

    stream_id: str
    model: str
    provider: str


class Text(msgspec.Struct, frozen=True, gc=False, tag_field="type", tag="text"):
    """A piece of the answer, as the provider wrote it."""

    text: str


class Reasoning(msgspec.Struct, frozen=True, gc=False, tag_field="type", tag="reasoning"):
    """What the model thinks aloud: never part of the answer."""

    text: str


class Usage(msgspec.Struct, frozen=True, tag_field="type", tag="usage"):
    """Tokens of the whole generation. `input_tokens` include the cached ones, `output_tokens` those of its reasoning.

    `source`: `provider`, where all figures are its own; `partial`: it has said a part; `estimated`: none. `estimated_by`: how
    the rest was estimated, `tiktoken` or `characters`.
    """

    input_tokens: int
    output_tokens: int
    cached_input_tokens: int = 0
    reasoning_tokens: int = 0
    source: str = "provider"
    estimated_by: str | None = None


class End(msgspec.Struct, frozen=True, tag_field="type", tag="end"):
    """The answer is complete as far as it goes: stop, length, content_filter, refusal, tool_calls, cancelled."""

    finish_reason: str


class Failed(msgspec.Struct, frozen=True, tag_field="type", tag="error"):
    """The answer did not come to its end. `code` is stable, `message` is safe to show."""

    code: str
    message: str
    retryable: bool


Ending = End | Failed
Event = Start | Text | Reasoning | Usage | Ending

_encode = msgspec.json.Encoder().encode
_BARE: dict[bytes, type[Text] | type[Reasoning]] = {b"text": Text, b"reasoning": Reasoning}
_TAGGED = msgspec.json.Decoder(Start | Usage | End | Failed)


def is_ending(event: Event) -> bool:
    """Whether `event` is the last of its log."""
    return isinstance(event, (End, Failed))


def to_json(event: Event) -> bytes:
    """`{"type": …}` as it stands on the JSON wire."""
    return _encode(event)


def to_entry(event: Event) -> tuple[bytes, bytes]:
    """The one field of the event's log entry: its name (the type) and its value."""
    if isinstance(event, Text):
        return b"text", event.text.encode()
    if isinstance(event, Reasoning):
        return b"reasoning", event.text.encode()
    tag: Any = type(event).__struct_config__.tag
    return str(tag).encode(), _encode(event)


def from_entry(name: bytes, value: bytes) -> Event:
    """The event of a log entry's field; the inverse of `to_entry`."""
    bare = _BARE.get(name)
    return bare(value.decode()) if bare is not None else _TAGGED.decode(value)
