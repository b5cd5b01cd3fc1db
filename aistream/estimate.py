"""How many tokens a text is, where the provider gave no figures: a stopped or cut answer is billed too.

tiktoken counts if its encoding is at hand: in its cache (TIKTOKEN_CACHE_DIR) or in a plugin (a module of the namespace package
`tiktoken_ext`). Else four characters are a token. A running service never downloads an encoding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

#: Characters of a token by the rule of thumb (OpenAI's help, "What are tokens and how to count them?": English). Measured
#: against o200k_base: Python within 2 %, English up to 18 % and German 25 % too many, Chinese 63 % too few.
CHARACTERS = 4
#: Characters that are encoded; of a longer text its beginning, and the rest is taken to be like it. Nothing else runs
#: meanwhile: 100,000 characters in o200k_base are 5 ms of CPU in English, 6 ms in Python, 16 ms in Chinese, 47 ms at worst
#: (random ideographs; long runs of one character are no worse).
ENCODED = 100_000


class Estimator:
    """Counts tokens by one of tiktoken's encodings (`o200k_base`) once `load` has found it, by characters until then.

    `method`: `tiktoken` or `characters`. `reason`: why it is not tiktoken; empty where it is, and before `load`.
    """

    def __init__(self, encoding: str) -> None:
        self.method = "characters"
        self.reason = ""
        self._name = encoding
        self._encode: Callable[[str], list[int]] | None = None

    def load(self) -> None:
        """Loads the encoding if it is at hand. For a worker's start, after gevent's patch; raises nothing.

        Costs a process 0.4 to 0.7 s, in which nothing else runs, and 90 MB with o200k_base (cl100k_base: 0.3 s, 50 MB); 30 ms and
        7 MB where there is none. Until then tiktoken is not even imported.
        """
        try:
            self._encode = _at_hand(self._name)
        except BaseException as error:
            if not _is_a_fault(error):
                raise
            self.reason = f"{type(error).__name__.strip('_')}: {error}".partition("\n")[0]
        else:
            self.method, self.reason = "tiktoken", ""

    def tokens(self, text: str) -> int:
        """How many tokens `text` is, at least 1 unless it is empty. Raises nothing; special tokens count as the text they are."""
        if self._encode is None:
            return -(-len(text) // CHARACTERS)
        try:
            counted = len(self._encode(text[:ENCODED]))
        except BaseException as error:
            if not _is_a_fault(error):
                raise
            return -(-len(text) // CHARACTERS)
        return counted if len(text) <= ENCODED else -(-counted * len(text) // ENCODED)


def _is_a_fault(error: BaseException) -> bool:
    """Of tiktoken or a plugin, which is anybody's code. Rust's panics are BaseExceptions, of a class that nobody can import."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


class _NotAtHand(Exception):
    """The encoding would have to be downloaded, or its file is not what it should be."""


def _at_hand(name: str) -> Callable[[str], list[int]]:
    import tiktoken.load

    with _offline(tiktoken.load):
        encoding = tiktoken.get_encoding(name)
    for byte in range(256):
        encoding.encode_single_token(bytes([byte]))  # raises KeyError, where a text with that byte would be a panic
    return encoding.encode_ordinary


@contextmanager
def _offline(loader: Any) -> Iterator[None]:
    """tiktoken's loader without its network. tiktoken 0.14.0 looks both functions up at each call.

    It deletes a cached file whose hash is wrong, to download it again; here that file stays, it may be a copy under way.
    """
    read_file, check_hash = loader.read_file, loader.check_hash

    def from_disk(path: str) -> bytes:
        if "://" in path:
            raise _NotAtHand(f"{path} is not in the cache")
        content: bytes = read_file(path)
        return content

    def checked(data: bytes, expected: str) -> bool:
        if not check_hash(data, expected):
            raise _NotAtHand("the file in the cache is not the encoding's: its hash is another")
        return True

    loader.read_file, loader.check_hash = from_disk, checked
    try:
        yield
    finally:
        loader.read_file, loader.check_hash = read_file, check_hash
