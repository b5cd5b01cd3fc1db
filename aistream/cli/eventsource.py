"""What an EventSource makes of the bytes of a stream (WHATWG HTML, 9.2.6). Pure.

Bytes may be cut anywhere. A message counts when its blank line has come: one that a lost connection has cut off is as if it had
never been sent, and comes again after the id before it.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_BOM = b"\xef\xbb\xbf"
_END_OF_LINE = re.compile(rb"[\r\n]")


class Message(NamedTuple):
    """One event. `id`: the last id that the stream has said by then, `""` for none."""

    id: str
    event: str
    data: str


class Decoder:
    """Decodes one connection's stream; `last_id` is what it was resumed with."""

    def __init__(self, last_id: str = "") -> None:
        self._id = last_id
        self._event = ""
        self._data: list[str] = []
        #: The beginning of a line.
        self._rest = b""
        self._begun = False
        #: The line before ended in CR: an LF belongs to that.
        self._after_cr = False

    def feed(self, data: bytes) -> list[Message]:
        """The messages that these bytes complete."""
        found = []
        position = 0
        while match := _END_OF_LINE.search(data, position):
            end = match.start()
            line, self._rest = self._rest + data[position:end], b""
            position = end + 1
            second_half = self._after_cr and not line and data[end] == 10
            self._after_cr = data[end] == 13
            if not second_half and (message := self._line(line)):
                found.append(message)
        if position < len(data):
            self._rest += data[position:]
            self._after_cr = False
        return found

    def _line(self, line: bytes) -> Message | None:
        if not self._begun:
            self._begun = True
            line = line.removeprefix(_BOM)
        if not line:
            return self._dispatch()
        name, _, value = line.decode("utf-8", "replace").partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
        elif name == "event":
            self._event = value
        elif name == "id" and "\0" not in value:
            self._id = value
        return None

    def _dispatch(self) -> Message | None:
        event, data, self._event, self._data = self._event or "message", self._data, "", []
        return Message(self._id, event, "\n".join(data)) if data else None
