"""What of a provider's own error text may stand in the operator's log: the sentence, without what it gives away.

No prompt, answer, token or key stands in a log, and providers quote all of these: the key (whole or partly masked), the
organisation, the faulty field with its content. Taken out is what is known (`secrets`, `said`) and what looks like a key or an
id. In doubt a word goes; model names, parameter names, numbers and request ids stay, since they are what an operator needs.

Pure. The cost is bounded: a text is cut before it is read, and of what was said every ninth place is looked at. Measured with a
prompt of 200,000 characters: 6 ms of CPU for a sentence, 13 ms for 1 MB, up to 60 ms for texts made to be slow.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import chain

#: Characters of the result.
SHOWN = 300
#: Characters of the text that are read; of these the last ones are never shown, so that what the cut goes through (a key, a
#: quotation) is still recognised by its beginning.
READ = 8_192
MARGIN = 512
#: What stands where something was.
GONE = "[…]"
#: Characters in a row that make a quotation of something said.
QUOTED = 16

_Span = tuple[int, int]


def redacted(text: str, *, secrets: Iterable[str] = (), said: Iterable[str] = ()) -> str:
    """`text` as one line of at most SHOWN characters, `[…]` for what was taken out. Raises nothing.

    `secrets`: the configured keys, taken out wherever they occur, and where they are masked in the middle. `said`: the texts of
    the conversation; any QUOTED characters in a row that occur in one of them are taken out. White space and control characters
    count as one space, and escapes (JSON's, Python's, however often applied) as what they stand for, in all of these.
    """
    line = _folded(text[:READ])
    end = len(line) if len(text) <= READ else max(len(line) - MARGIN, 0)
    known = [secret for secret in map(_folded, secrets) if secret]
    spans = [*_known(line, known), *_masked(line, known), *_shaped(line), *_random(line)]
    shown = _without(line, end, [*spans, *_quoted(line, chain(known, said))])
    return shown if len(shown) <= SHOWN else shown[: SHOWN - 1] + "…"


# ---- One line, in which everything is written in one way ----

_ESCAPE = re.compile(
    r"""\\+(?:
        u(?P<u>[0-9a-fA-F]{4}) | U(?P<U>[0-9a-fA-F]{8}) | x(?P<x>[0-9a-fA-F]{2}(?:\\+x[0-9a-fA-F]{2})*) | [nrtbfva0]
    )?""",
    re.VERBOSE,
)
#: What is not one already for `str.split`: the other control characters, and those that are invisible or turn a line around.
_CONTROL = re.compile("[\0-\x1f\x7f-\x9f\xad\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]")


def _folded(text: str) -> str:
    """One line without backslashes, control characters and halves of characters."""
    if "\\" in text:
        text = _ESCAPE.sub(_meant, text)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return " ".join(_CONTROL.sub(" ", text).replace("\\", "").split())


def _meant(escape: re.Match[str]) -> str:
    """What an escape stands for; nothing for backslashes before any other character, so that the depth of escaping is all one."""
    if escape["x"]:
        data = bytes.fromhex(re.sub(r"\\+x", "", escape["x"]))
        try:
            return data.decode()  # the repr of bytes
        except UnicodeDecodeError:
            return data.decode("latin-1")
    number = int(escape["u"] or escape["U"] or "0", 16)
    if number:
        return chr(number) if number <= 0x10FFFF else ""
    return "" if escape[0].endswith("\\") else " "


# ---- What is known ----


def _known(line: str, secrets: list[str]) -> Iterator[_Span]:
    for secret in secrets:
        place = line.find(secret)
        while place >= 0:
            yield place, place + len(secret)
            place = line.find(secret, place + 1)


#: A word with a mask in it: stars, bullets, dots or an ellipsis.
_MASK = re.compile(r"(?<![\w.*•…-])([\w-]*)(?:\*{2,}|•{2,}|\.{2,}|…)[*•.…]*([\w-]*)")


def _masked(line: str, secrets: list[str]) -> Iterator[_Span]:
    """Words that begin or end as a secret does: `abcd…wxyz`."""
    for mask in _MASK.finditer(line):
        head, tail = mask[1], mask[2]
        for secret in secrets:
            if (len(head) > 2 and secret.startswith(head)) or (len(tail) > 2 and secret.endswith(tail)):
                yield mask.span()


def _quoted(line: str, texts: Iterable[str]) -> Iterator[_Span]:
    """The places of `line` that stand in one of the texts, QUOTED characters each."""
    half = QUOTED // 2
    halves = {line[place : place + half] for place in range(len(line) - half + 1)}
    found: set[str] = set()
    for text in texts:
        # Where a quotation begins within what looks like an escape, only the text as it is has its beginning.
        for written in {_folded(text), " ".join(text.split())} if "\\" in text else (_folded(text),):
            # Every quotation contains one of these pieces of half its length, wherever it begins.
            for place in range(0, len(written) - half + 1, half + 1):
                if written[place : place + half] in halves:
                    found.update(written[begin : begin + QUOTED] for begin in range(max(place - half, 0), place + 1))
    for place in range(len(line) - QUOTED + 1):
        if line[place : place + QUOTED] in found:
            yield place, place + QUOTED


# ---- What looks like a key or an id ----

#: What a key or an id goes on with, masked or not.
_REST = r"[\w*•.…+/=~-]"
#: No word (`user-defined`, `key-value`) goes on like this: with a digit, a capital or a mask in it.
_ODD = r"(?=[\w-]{0,100}(?:[\dA-Z*•…]|\.\.\.))"
_BEGIN = r"(?<![A-Za-z0-9])"
_ISSUED = r"(?:org|proj|project|user|team|acct|wrkspc|workspace|apikey|svcacct|cus)[-_]"
#: Where there is a group, it is what goes.
_SHAPES = [
    re.compile(pattern)
    for pattern in (
        # keys by their prefix: of OpenAI, Anthropic, OpenRouter, DeepSeek; of others; of Google, AWS, GitHub; JWTs
        rf"{_BEGIN}(?:sk|SK)[-_]{_REST}{{2,}}",
        rf"{_BEGIN}(?:key|pk|rk|ak|ek|gsk|xai|hf|fw|r8|nvapi|pplx|csk|tgp|sess|gh[a-z]|glpat|xox[a-z])[-_]{_ODD}{_REST}{{5,}}",
        rf"{_BEGIN}(?:AIza|ya29\.|github_pat_|eyJ){_REST}{{4,}}",
        rf"{_BEGIN}A[KS]IA[A-Z0-9*]{{8,}}",
        # organisations, projects, users and what else is issued an id
        rf"{_BEGIN}{_ISSUED}{_ODD}{_REST}{{5,}}",
        rf"{_BEGIN}{_ISSUED}[a-z0-9]{{16,}}",
        rf"{_BEGIN}[0-9a-fA-F]{{8}}-(?:[0-9a-fA-F]{{4}}-){{3}}[0-9a-fA-F]{{12}}",
        # what stands where a key stands
        r"(?i:\bbearer )(?!(?i:auth|authentication|authorization|tokens?|scheme|credentials?)\b|YOUR_)([^\s\"',;)]+)",
        r"(?i:\bbasic )((?=\w*[0-9=]|[a-z]+[A-Z])[A-Za-z0-9+/]{8,}={0,2})",
        r"(?i:\bkey provided: ?)(\S+)",
        r"(?i:(?:api[-_ ]?key|access[-_ ]?token|authorization|password|secret)[\"']? ?[:=] ?[\"']?)"
        r"((?=[^\s\"',;]*\d)[^\s\"',;]{6,})",
        # masked, whatever it was
        r"(?<![\w*-])[\w-]++\*{2,}[\w*-]++",
        r"(?<![\w*•-])[\w-]*+(?:\*{4,}|•{3,})[\w*•-]*",
        # addresses of people; names, passwords and queries in those of machines
        r"(?<![\w.+%-])[\w.+%-]++@[\w-]++(?:\.[\w-]++)+",
        r"://([^\s/?#\"'<>]+)@",
        r"://[^\s?#\"'<>]{0,1000}+[?#]([^\s\"'<>]+)",
        r"(?<=[\w/])\?([\w.%\[\]-]++=[^\s\"'<>]*)",
    )
]


def _shaped(line: str) -> Iterator[_Span]:
    for shape in _SHAPES:
        for match in shape.finditer(line):
            group = match.lastindex or 0
            yield match.start(group), match.start(group) + len(match[group].rstrip("."))  # the sentence's own full stop


#: Long enough to be a secret, in the letters of base64 in both its alphabets.
_WORD = re.compile(r"[A-Za-z0-9+/_=-]{20,}")
_PART = re.compile(r"[A-Za-z0-9]{7,}")
_REQUEST_ID = re.compile(rf"{_BEGIN}req[-_][A-Za-z0-9]{{1,40}}")
#: Where letters and digits, or small letters and capitals, meet.
_BORDER = re.compile(r"(?<=[A-Za-z])(?=[0-9])|(?<=[0-9])(?=[A-Za-z])|(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[a-z])")


def _random(line: str) -> Iterator[_Span]:
    """Long words that nobody made up: hex, base64 and the like. A request id is no secret, and the provider asks for it."""
    for word in _WORD.finditer(line):
        if any(map(_looks_random, _PART.findall(_REQUEST_ID.sub("", word[0])))):
            yield word.span()


def _looks_random(part: str) -> bool:
    """Whether it has more borders in it than a name (`DeepSeek`, `InternVL2`, `20250929`), or is long and has digits."""
    digits = sum(map(str.isdigit, part))
    borders = len(_BORDER.findall(part))
    if digits == 0:
        return len(part) >= 10 and borders / len(part) >= 0.35
    return digits < len(part) and (len(part) >= 20 or (borders >= 4 and borders / len(part) >= 0.4))


# ---- The result ----


def _without(line: str, end: int, spans: Iterable[_Span]) -> str:
    """`line` up to `end`, with GONE once for all that spans cover in a row."""
    pieces: list[str] = []
    place = 0
    for begin, stop in sorted(spans):
        if begin >= end:
            break
        if begin > place or not pieces:
            pieces += (line[place:begin], GONE)
        place = max(place, stop)
    return "".join([*pieces, line[place:end]])
