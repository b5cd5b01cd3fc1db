"""HTTP/1.1 as a client writes and reads it (RFC 9112): bytes in, bytes out, no connection.

As strict as h11, in whose place it stands under the SDKs, and with its results; `tests/test_transport.py` compares the two. It is
made for long answers in small chunks, one for each token.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple, Protocol

import httpx2

#: Bytes of a head, of a chunk's first line and of trailers, as httpcore2 2.16.2 has it.
MAX_HEAD = 100 * 1024

_CRLF = b"\r\n"
_HEX = b"0123456789abcdefABCDEF"
#: A size has at most 20 digits (h11 0.16.0).
_DIGITS = 20
_BLANK = re.compile(rb"\n\r?\n")
_NAME = rb"[-!#$%&'*+.^_`|~0-9a-zA-Z]+"
_VALUE = rb"(?:[^\x00\s]+(?:[ \t]+[^\x00\s]+)*)?"
_FIELD = re.compile(rb"(" + _NAME + rb"):[ \t]*(" + _VALUE + rb")[ \t]*")
_SENT_FIELD = re.compile(_NAME + rb": " + _VALUE)
_REQUEST_LINE = re.compile(_NAME + rb" [\x21-\x7e]+ HTTP/1\.1")
_STATUS_LINE = re.compile(rb"(HTTP/[0-9]\.[0-9]) ([0-9]{3})(?: ((?:[ \t]|[^\x00\s])*))?")
_SIZE_LINE = re.compile(rb"([0-9A-Fa-f]{1,20})(?:;.*)?[ \t]*")


# ---- The request ----


def request(asked: httpx2.Request) -> tuple[bytes, bool]:
    """All bytes of a request, and whether it is its connection's last one.

    Raises LocalProtocolError for one that cannot be sent as it stands.
    """
    lines = [b"%b %b HTTP/1.1" % (asked.method.encode("ascii"), asked.url.raw_path)]
    if not _REQUEST_LINE.fullmatch(lines[0]):
        raise httpx2.LocalProtocolError("illegal request line")
    hosts, chunked, close = 0, False, False
    length: int | None = None
    for name, value in asked.headers.raw:
        line = b"%b: %b" % (name, value)
        if not _SENT_FIELD.fullmatch(line):
            raise httpx2.LocalProtocolError("illegal header line")
        match name.lower():
            case b"host":
                hosts += 1
                lines.insert(1, line)  # first of all, as RFC 9110 7.2 wants it
                continue
            case b"content-length":
                length = _length(value, length, httpx2.LocalProtocolError)
            case b"transfer-encoding":
                chunked = _only_chunked(value, chunked, httpx2.LocalProtocolError)
            case b"connection":
                close = close or b"close" in _words(value)
        lines.append(line)
    if hosts != 1:
        raise httpx2.LocalProtocolError("expected one Host header")
    return _CRLF.join([*lines, b"", _framed(asked, length or 0, chunked)]), close


def _framed(asked: httpx2.Request, length: int, chunked: bool) -> bytes:
    assert isinstance(asked.stream, httpx2.SyncByteStream)  # nosec B101  # for mypy
    body = b"".join(asked.stream)
    if chunked:
        return b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if body else b"0\r\n\r\n"
    if len(body) != length:
        raise httpx2.LocalProtocolError(f"the body has {len(body)} bytes, and Content-Length says {length}")
    return body


# ---- The head of an answer ----


class Head(NamedTuple):
    """Status line and headers. `length` None: none is said. `close`: it is the connection's last answer."""

    version: bytes
    status: int
    reason: bytes
    headers: list[tuple[bytes, bytes]]
    chunked: bool
    length: int | None
    close: bool


def head_end(data: bytes, known: int = 0) -> tuple[int, int] | None:
    """Where the head in `data` ends, and where what follows it begins; None: not yet. `known`: bytes searched before.

    Raises RemoteProtocolError where it will be none: it is too long, or begins with what no head begins with.
    """
    if data and data[0] < 0x21:  # a TLS record, an empty line
        raise httpx2.RemoteProtocolError("illegal status line")
    found = _BLANK.search(data, max(0, known - 2))
    if found:
        return found.span()
    if len(data) > MAX_HEAD:
        raise httpx2.RemoteProtocolError("the head is too long")
    return None


def head(data: bytes) -> Head:
    """The head in these bytes, which end before its empty line. Raises RemoteProtocolError."""
    first, _, rest = data.replace(b"\r\n", b"\n").removesuffix(b"\r").partition(b"\n")
    status = _STATUS_LINE.fullmatch(first)
    if status is None or status[2] < b"100":
        raise httpx2.RemoteProtocolError("illegal status line")
    headers: list[tuple[bytes, bytes]] = []
    length: int | None = None
    chunked = False
    close = status[1] < b"HTTP/1.1"
    for name, value in _fields(rest):
        match name.lower():
            case b"content-length":
                known, length = length, _length(value, length, httpx2.RemoteProtocolError)
                if known is None:  # said again, it is left out
                    headers.append((name, value.partition(b",")[0].strip()))
                continue
            case b"transfer-encoding":
                chunked = _only_chunked(value, chunked, httpx2.RemoteProtocolError)
                value = value.lower()
            case b"connection":
                close = close or b"close" in _words(value)
        headers.append((name, value))
    return Head(status[1], int(status[2]), status[3] or b"", headers, chunked, length, close)


def _words(value: bytes) -> list[bytes]:
    """Of a header that is a list of them."""
    return [word.strip() for word in value.lower().split(b",")]


def _fields(text: bytes) -> list[tuple[bytes, bytes]]:
    if not text:
        return []
    if b"\n " in text or b"\n\t" in text:
        text = re.sub(rb"\n[ \t]+", b" ", text)  # a value that goes on in the next line
    fields = []
    for line in text.split(b"\n"):
        field = _FIELD.fullmatch(line)
        if field is None:
            raise httpx2.RemoteProtocolError("illegal header line")
        fields.append((field[1], field[2]))
    return fields


Refusal = Callable[[str], Exception]


def _length(value: bytes, known: int | None, refusal: Refusal) -> int:
    """The length that all values name, however often it is said."""
    lengths = {one.strip() for one in value.split(b",")}
    said = lengths.pop()
    if lengths or not said.isdigit() or len(said) > _DIGITS or known not in (None, int(said)):
        raise refusal("bad or conflicting Content-Length")
    return int(said)


def _only_chunked(value: bytes, known: bool, refusal: Refusal) -> bool:
    if known or value.lower() != b"chunked":
        raise refusal("Transfer-Encoding other than chunked")
    return True


# ---- The body of an answer ----


class Reader(Protocol):
    """Takes a body out of the bytes of a connection.

    `ended`: nothing more is to be fed. `fault`: what was wrong then, or `""`. `clean`: what comes next on the connection is the
    next answer.
    """

    ended: bool
    fault: str
    clean: bool

    def feed(self, data: bytes) -> bytes:
        """What these bytes have of the body, all of it in one piece; `b""` is the end of the connection."""
        ...


def reader(head: Head, method: str) -> Reader:
    """For the body that belongs to this head (RFC 9112 6.3)."""
    if head.status in (204, 304) or method == "HEAD":
        return Sized(0)
    if head.chunked:
        return Chunked()
    return UntilClose() if head.length is None else Sized(head.length)


class Sized:
    """A body with a Content-Length."""

    __slots__ = ("_left", "_length", "clean", "ended", "fault")

    def __init__(self, length: int) -> None:
        self._length = self._left = length
        self.ended = self.clean = not length
        self.fault = ""

    def feed(self, data: bytes) -> bytes:
        """See `Reader.feed`."""
        piece = data[: self._left]
        self._left -= len(piece)
        self.ended = not self._left or not data
        self.clean = not self._left and len(piece) == len(data)
        if not data:
            self.fault = f"the connection ended after {self._length - self._left} of {self._length} bytes of the body"
        return piece


class UntilClose:
    """A body that ends with its connection."""

    __slots__ = ("clean", "ended", "fault")

    def __init__(self) -> None:
        self.ended = self.clean = False
        self.fault = ""

    def feed(self, data: bytes) -> bytes:
        """See `Reader.feed`."""
        self.ended = not data
        return data


#: Sizes of chunks as they were written, which need not be judged again.
_known_sizes: dict[bytes, int] = {}
_KNOWN_SIZES = 4096


class Chunked:
    """A body in chunks (RFC 9112 7.1)."""

    __slots__ = ("_between", "_left", "_rest", "_step", "clean", "ended", "fault")

    def __init__(self) -> None:
        self.ended = self.clean = False
        self.fault = ""
        self._rest = b""
        self._left = 0
        #: The method that takes what stands at a position, and says where the next thing does; None: it is not there yet.
        self._step: Callable[[Chunked, bytes, int, list[bytes]], int | None] = Chunked._size
        #: Nothing of a chunk has been seen yet.
        self._between = True

    def feed(self, data: bytes) -> bytes:
        """See `Reader.feed`. What stands before a fault is given."""
        pieces: list[bytes] = []
        at = 0
        if self._between:
            # One whole chunk and nothing else: servers send a token so.
            end = data.find(_CRLF, 0, _DIGITS + 2)
            if _known_sizes.get(data[:end]) == len(data) - end - 4 and data.endswith(_CRLF):
                return data[end + 2 : -2]
            # Whole chunks: under load several arrive at once.
            while (end := data.find(_CRLF, at, at + _DIGITS + 2)) > at and not (size := data[at:end]).strip(_HEX):
                start, stop = end + 2, end + 2 + int(size, 16)
                if len(_known_sizes) < _KNOWN_SIZES and stop > start:
                    _known_sizes[size] = stop - start
                if stop == start or data[stop : stop + 2] != _CRLF:
                    break
                pieces.append(data[start:stop])
                at = stop + 2
            if at and at == len(data):
                return b"".join(pieces)
        if data:
            self._feed(self._rest + data, at, pieces)
        else:
            self._fail("the connection ended inside a chunked body")
        return b"".join(pieces)

    def _feed(self, data: bytes, at: int, pieces: list[bytes]) -> None:
        place: int | None
        while not self.ended and (place := self._step(self, data, at, pieces)) is not None:
            at = place
        self._rest = data[at:]
        if not self.ended and len(self._rest) > MAX_HEAD:
            self._fail("a line of a chunked body is too long")
        self.clean = self.ended and not self.fault and not self._rest
        self._between = self._step is Chunked._size and not self._rest

    def _fail(self, fault: str) -> None:
        self.ended, self.fault = True, fault

    def _size(self, data: bytes, at: int, _: list[bytes]) -> int | None:
        end = data.find(_CRLF, at)
        if end < 0:
            return None
        line = _SIZE_LINE.fullmatch(data, at, end)
        if line is None:
            self._fail("illegal size of a chunk")
            return at
        self._left = int(line[1], 16)
        self._step = Chunked._data if self._left else Chunked._trailers
        return end + 2

    def _data(self, data: bytes, at: int, pieces: list[bytes]) -> int | None:
        piece = data[at : at + self._left]
        if not piece:
            return None
        pieces.append(piece)
        self._left -= len(piece)
        if not self._left:
            self._step = Chunked._footer
        return at + len(piece)

    def _footer(self, data: bytes, at: int, _: list[bytes]) -> int | None:
        end = data[at : at + 2]
        if not _CRLF.startswith(end):
            self._fail("a chunk is longer than its size")
            return at
        if len(end) < 2:
            return None
        self._step = Chunked._size
        return at + 2

    def _trailers(self, data: bytes, at: int, _: list[bytes]) -> int | None:
        """They are judged, and left out."""
        for empty in (b"\n", _CRLF):
            if data.startswith(empty, at):
                self.ended = True
                return at + len(empty)
        found = _BLANK.search(data, at)
        if found is None:
            return None
        try:
            _fields(data[at : found.start()].replace(_CRLF, b"\n").removesuffix(b"\r"))
        except httpx2.RemoteProtocolError as error:
            self._fail(str(error))
        self.ended = True
        return found.end()
