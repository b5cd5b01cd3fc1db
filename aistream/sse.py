"""Server-Sent Events as docs/http.md has them: two stateless encoders, and the cutter that makes stateless enough.

Text mode carries the answer in bare `data:` lines, which a plain EventSource's `onmessage` gets; JSON mode carries every
event as an object. The encoders keep no state, so that every worker sends the same bytes for the same event. What needs
memory between two events (a CR whose LF may follow, half a surrogate pair, text that reads `[DONE]`) is settled once, by
the generation's `Cutter`, before an event gets its id.
"""

from __future__ import annotations

from typing import Literal

from aistream.events import Cursor, End, Event, Failed, Start, Text, to_json

Mode = Literal["text", "json"]

#: Milliseconds a browser waits before it reconnects. A line in front of the first event, not a block of its own: four of
#: twelve decoders make an empty message of a block without data.
PREAMBLE = b"retry: 2000\n"
#: One comment line without a blank line, for the same reason. Any number of them may stand in front of an event.
HEARTBEAT = b":\n"
DONE = "[DONE]"


def visible(text: str) -> str:
    """What text mode can carry of `text`: CRLF and CR become LF (SSE ends a line at each), NUL is removed (Firefox drops it)."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text.replace("\0", "") if "\0" in text else text


def text_frame(cursor: Cursor, event: Event) -> bytes:
    """The event as text mode sends it, or `b""` where text mode says nothing.

    `data: ` with the space: a decoder strips one, so a token that starts with a space would lose it. Lines are those of
    LF alone (never `splitlines()`: U+2028 is text).
    """
    if isinstance(event, Text):
        text = event.text
        if "\r" in text or "\0" in text:
            text = visible(text)
        if not text:
            return b""
        lines = text.replace("\n", "\ndata: ") if "\n" in text else text
        return f"id: {cursor[0]}-{cursor[1]}\ndata: {lines}\n\n".encode()
    if isinstance(event, End):
        return _done(cursor)
    if isinstance(event, Failed):
        return error_frame(event, str(cursor))
    return b""


def json_frame(cursor: Cursor, event: Event) -> bytes:
    """The event as JSON mode sends it: an unnamed event with a `{"type": …}` object."""
    if isinstance(event, Failed):
        return error_frame(event, str(cursor), typed=True)
    if isinstance(event, End):
        # Without an id of its own: only [DONE] carries the ending's, so a line cut between the two brings both again.
        body = b'{"type":"cancelled"}' if event.finish_reason == "cancelled" else to_json(event)
        return b"data: " + body + b"\n\n" + _done(cursor)
    if isinstance(event, Start) and cursor.epoch > 1:
        return b""  # the session's generation was run once more: for a viewer it began once
    return b"id: %d-%d\ndata: %b\n\n" % (cursor[0], cursor[1], to_json(event))


def error_frame(failed: Failed, event_id: str | None, *, typed: bool = False) -> bytes:
    """`event: error`: fires a browser's `onerror` with the JSON in `.data`. Never followed by `[DONE]`."""
    body = to_json(failed)
    if not typed:
        body = b"{" + body.removeprefix(b'{"type":"error",')
    id_line = f"id: {event_id}\n".encode() if event_id else b""
    return id_line + b"event: error\ndata: " + body + b"\n\n"


def _done(cursor: Cursor) -> bytes:
    return f"id: {cursor}\ndata: {DONE}\n\n".encode()


ENCODERS = {"text": text_frame, "json": json_frame}


class Cutter:
    """Cuts one generation's text into pieces that the stateless encoders carry exactly.

    Joined, the pieces are the provider's text (lone halves of surrogate pairs become U+FFFD). One per kind of text.
    """

    __slots__ = ("_held",)

    def __init__(self) -> None:
        self._held = ""

    def lets_pass(self, text: str) -> bool:
        """Whether `text` is its own and only piece: nearly every token's is."""
        return not self._held and text.isascii() and text[-1:] not in "\r" and text[0] not in "[\0"

    def feed(self, text: str) -> list[str]:
        """The pieces that `text` completes; a trailing CR or high surrogate is held back until more comes."""
        if self._held:
            text, self._held = self._held + text, ""
        if not text:
            return []
        last = text[-1]
        if last == "\r" or "\ud800" <= last <= "\udbff":
            text, self._held = text[:-1], last
        return _pieces(text)

    def end(self) -> list[str]:
        """What was still held back."""
        text, self._held = self._held, ""
        return _pieces(text)


def _pieces(text: str) -> list[str]:
    if not text:
        return []
    try:
        text.encode()
    except UnicodeEncodeError:
        # A provider that writes one character as two JSON escapes, in one delta or over two, sends surrogates.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if text[0] in "[\0" and visible(text) == DONE:
        # Nobody may end a viewer's stream by having a model say so.
        cut = text.index("[") + 1
        return [text[:cut], text[cut:]]
    return [text]
