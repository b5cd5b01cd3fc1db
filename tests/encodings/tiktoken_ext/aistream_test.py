"""A plugin of tiktoken with encodings that are small enough to count by hand, and some that do not work."""

from collections.abc import Callable
from typing import Any

_BYTES = {bytes([byte]): byte for byte in range(256)}
_MERGES = (b"to", b"ke", b"toke", b"token", b" token", b"en")
#: Words with the space in front of them, and single characters.
_PATTERN = r" ?[a-z]+|[\s\S]"


def _encoding(name: str, ranks: dict[bytes, int], pattern: str = _PATTERN) -> dict[str, Any]:
    end = max(ranks.values(), default=0) + 1
    return {"name": name, "pat_str": pattern, "mergeable_ranks": ranks, "special_tokens": {"<|endoftext|>": end}}


def _small() -> dict[str, Any]:
    return _encoding("aistream_test", _BYTES | {merge: 256 + rank for rank, merge in enumerate(_MERGES)})


def _letters_only() -> dict[str, Any]:
    return _encoding("aistream_letters", {bytes([byte]): byte for byte in range(97, 123)})


def _panics() -> dict[str, Any]:
    """Its pattern gives up on a run of x."""
    return _encoding("aistream_panics", _BYTES, r"(?:(?:x|xx)(?!z))+y|[\s\S]")


def _twice() -> dict[str, Any]:
    """Gives one number to two tokens, at which tiktoken panics."""
    return _encoding("aistream_twice", _BYTES | {b"token": 0})


def _raises() -> dict[str, Any]:
    raise RuntimeError("this plugin is broken")


ENCODING_CONSTRUCTORS: dict[str, Callable[[], dict[str, Any]]] = {
    "aistream_test": _small,
    "aistream_letters": _letters_only,
    "aistream_panics": _panics,
    "aistream_twice": _twice,
    "aistream_raises": _raises,
}
