"""Texts that a careless encoder, decoder or splitter spoils, as the deltas in which a provider sends them.

What must arrive is computed here from the whole answer, by other means than the service's, which works delta by delta.
"""

import json
import re
from dataclasses import dataclass

from tests.neighbours.scenarios import SEPARATOR

_PAIR = re.compile("([\ud800-\udbff])([\udc00-\udfff])")
_LONE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Nasty:
    """One answer. `by` is the provider's scenario: how the deltas get there, and how the provider writes them."""

    name: str
    deltas: tuple[str, ...]
    by: str = "say"

    @property
    def answer(self) -> str:
        """What n8n and JSON mode get: the provider's text. Halves of a character are one, or nothing that has a name."""
        return _LONE.sub("\ufffd", _PAIR.sub(_character, "".join(self.deltas)))

    @property
    def in_text_mode(self) -> str:
        """What text mode can carry of it: a line ends in LF however it ended before, and there is no NUL."""
        return re.sub("\r\n|\r", "\n", self.answer).replace("\0", "")

    @property
    def prompt(self) -> str:
        """What makes the provider say it."""
        return json.dumps(self.deltas) if self.by == "deltas" else SEPARATOR.join(self.deltas)

    def model(self, family: str) -> str:
        """The model, of the family `gpt` or `claude`, that says it."""
        return f"{family}-test-{self.by}"


def _character(pair: re.Match[str]) -> str:
    high, low = map(ord, pair.groups())
    return chr(0x10000 + (high - 0xD800) * 0x400 + (low - 0xDC00))


def _nasty(name: str, *deltas: str, by: str = "say") -> Nasty:
    return Nasty(name, deltas, by)


def _of_bytes(line: str, size: int) -> str:
    """`line`, numbered and repeated, to at least `size` bytes."""
    count = size // len(line.encode()) + 1
    return "".join(f"{number} {line}" for number in range(count))


CODE = """Here you are:

```python
def f(x):
    if x:
\t\treturn "a  b"   # two spaces after this

    return None
```

- one
  - two
"""

NASTY = (
    _nasty("plain words", "Hello", ",", " world", "."),
    # Spaces: SSE strips one after the colon.
    _nasty("leading spaces", " one", "  two", "   three"),
    _nasty("trailing spaces", "one ", "two  ", "three   "),
    _nasty("only spaces", "   "),
    _nasty("chunks of one space", "a", " ", "b", " ", " "),
    _nasty("tabs", "\ta", "\t", "b\t", "\n\t\tc"),
    # Lines: SSE ends one at LF, CR and CRLF; a careless splitter also elsewhere.
    _nasty("blank lines", "one\n\n\ntwo", "\n\n", "three\n\n"),
    _nasty("only newlines", "\n", "\n\n", "\n"),
    _nasty("one newline", "\n"),
    _nasty("newlines around", "\n\none\n", "\ntwo", "\n"),
    _nasty("spaces around newlines", " \n ", " \n", "\n "),
    _nasty("CR alone", "one\rtwo\r", "\rthree"),
    _nasty("only CR", "\r"),
    _nasty("CRLF", "one\r\ntwo\r\n\r\nthree"),
    _nasty("CRLF split between two chunks", "one\r", "\ntwo\r", "\n", "\r", "\nthree"),
    _nasty("CRLF split around an empty chunk", "one\r", "", "\ntwo"),
    _nasty("CR at the very end", "one\r"),
    _nasty("CRLF at the very end, split", "one\r", "\n"),
    _nasty("CR before CRLF", "one\r", "\r", "\ntwo\r\r\n"),
    _nasty("LF before CR", "one\n\rtwo\n", "\rthree"),
    _nasty("line and paragraph separators", "one\u2028two\u2029", "\u2028", "three\u2029\u2029"),
    _nasty("next line", "one\u0085two", "\u0085", "three\u0085"),
    _nasty("vertical tab and form feed", "one\x0btwo\x0c", "\x0b", "\x0cthree"),
    _nasty("information separators", "one\x1ctwo\x1dthree\x1efour\x1f", "\x1c\x1d"),
    # Characters
    _nasty("emoji", "smile 😀", "😀😀", " é ☕ ", "𝔘𝔫𝔦"),
    _nasty("emoji split over TCP reads", "smile 😀", "é", "漢字 ", "👩‍👩‍👧", "\u2028", "end 😀", by="bytes"),
    _nasty("emoji as JSON escapes", "smile 😀", "é\u2028", "👍🏽", by="escaped"),
    _nasty("zero width joiners", "👩‍👩‍👧‍👦", "👩", "\u200d", "👧", "🏳️‍🌈", "e\u0301 é"),
    _nasty("surrogate pair split over two deltas", "a ", "\ud83d", "\ude00", " b", by="deltas"),
    _nasty("surrogate pair split around an empty delta", "a \ud83d", "", "\ude00 b\ud83d", "\ude00", by="deltas"),
    _nasty("half a surrogate pair", "\ude00 a \ud83d b", "\ud83d", "\ud83d", "\ude00", "c", "\ude00", by="deltas"),
    _nasty("half a surrogate pair and CR at the very end", "a\ud83d", "\r", "\ud83d", by="deltas"),
    _nasty("NUL alone", "\0", by="deltas"),
    _nasty("NUL inside", "a\0b", "\0", "\0c\0", "d", by="deltas"),
    _nasty("NUL within CRLF", "one\r\0\ntwo\r", "\0", "\nthree", "\0\r", "\n\0", by="deltas"),
    _nasty("byte order marks", "\ufeffone", "\ufeff", " two\ufeffthree", "\ufeff four"),
    _nasty("control characters", "".join(map(chr, range(1, 9))), "\x0e\x1b[31mred\x1b[0m", "\x7f\x80\x9f"),
    _nasty("noncharacters", "\ufffe\uffff", "\ufdd0", "\U0010ffff", "\ue000\ufffd"),
    _nasty("right to left", "שלום", " עולם", "\u202eolleh\u202c ", "مرحبا", "\u2067x\u2069\u200f"),
    # What reads like the protocol
    _nasty("[DONE] as a chunk", "one", "[DONE]", "two"),
    _nasty("[DONE] as the whole answer", "[DONE]"),
    _nasty("[DONE] split", "[DO", "NE]", "[", "DONE]", "[DONE", "]"),
    _nasty("[DONE] many times", "[DONE]", "[DONE][DONE]", "\n[DONE]\n", "[DONE]", "[DONE]\n"),
    _nasty("[DONE] with CR", "[DONE]\r", "[DONE]", "\r\n[DONE]\r", "\n[DONE]"),
    _nasty("[DONE] with NUL inside", "[DO\0NE]", "\0[DONE]", "[DONE]\0", "\0[\0DONE]\0", "[", "\0", "DONE]", by="deltas"),
    _nasty("data:", "data:", "data:", "\ndata:\n"),
    _nasty("data: x", "data: x", "\ndata: y\n\n", "data: [DONE]\n\n"),
    _nasty("a comment", ":x", ":", "\n:\n", ": y\n\n"),
    _nasty("an id", "id: 5", "\nid: 6\n\n", "id"),
    _nasty("an error event", "event: error", "\nevent: error\ndata: {}\n\n", 'event: error\ndata: {"code":"x"}\n\n'),
    _nasty("retry", "retry: 1", "\nretry: 1\n\n"),
    # Shapes
    _nasty("empty chunks between", "", "one", "", "", "two", ""),
    _nasty("only empty chunks", "", ""),
    _nasty("100 KB in one chunk", "0123456789abcde " * 6_400),
    _nasty("100 KB of lines in one chunk", _of_bytes("naïve café ☕ 😀\r\n", 100 * 1024)),
    _nasty("a code block", *re.findall(r".{1,7}", CODE, re.DOTALL)),
    _nasty("JSON", '{"type":"text","text":"\\u0000\\n\\r"}', '{"a": ["b\\"", 1e3, null]}', "\\", '"', "\\ud83d"),
    _nasty("HTML", "<script>alert(1)</script>", "&lt;&amp;", "<!--", "</pre>", "<img src=x onerror=alert(1)>"),
)

BY_NAME = {nasty.name: nasty for nasty in NASTY}


def differences(got: dict[str, str], expected: dict[str, str]) -> list[str]:
    """One line for each name whose texts differ, with the place; pytest's own diff of 100 KB takes minutes."""
    return [
        f"{name}: {_first_difference(got.get(name, ''), expected.get(name, ''))}"
        for name in {**expected, **got}
        if got.get(name) != expected.get(name)
    ]


def _first_difference(got: str, expected: str) -> str:
    pairs = enumerate(zip(got, expected, strict=False))
    same = next((place for place, (one, other) in pairs if one != other), min(len(got), len(expected)))
    here = slice(max(0, same - 20), same + 40)
    return f"after {same} of {len(expected)} characters {got[here]!a} instead of {expected[here]!a}"
