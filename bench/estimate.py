"""What tiktoken costs a worker, and what it gains over counting characters: `python -m bench.estimate [encoding]`.

Time and memory of loading the encoding (default: TOKEN_ENCODING's, o200k_base), CPU per 100,000 characters, and how far four
characters a token are off. The encoding must be at hand (TIKTOKEN_CACHE_DIR): nothing is downloaded. One process, a few seconds.
"""

from __future__ import annotations

import resource
import sys
import time
from typing import NamedTuple

from aistream.config import settings
from aistream.estimate import ENCODED, Estimator

#: What is repeated to fill 100,000 characters.
TEXTS = {
    "English": "The answer survives a reload, a phone that sleeps, and a worker that is killed in the middle of a sentence. ",
    "German": "Die Antwort übersteht ein Neuladen, ein schlafendes Telefon und einen mitten im Satz beendeten Prozess. ",
    "Python": "def answer(prompt: str, *, limit: int = 4096) -> Iterator[str]:\n    yield from model.stream(prompt)[:limit]\n\n",
    "Chinese": "即使页面重新加载、手机休眠或者工作进程在句子中间被终止，答案也会保留下来。",  # noqa: RUF001
}


class Cost(NamedTuple):
    """ms of CPU per 100,000 characters, and how far the rule of thumb is off (0.18: 18 % too many tokens)."""

    ms: float
    off: float


class Measured(NamedTuple):
    """Loading in seconds and MiB of this process, and the texts."""

    seconds: float
    mebibytes: float
    texts: dict[str, Cost]


def measure(encoding: str) -> Measured:
    """Loads the encoding and counts. Raises LookupError where it is not at hand."""
    estimator, by_characters = Estimator(encoding), Estimator(encoding)
    began, before = time.perf_counter(), _peak()
    estimator.load()
    seconds = time.perf_counter() - began
    if estimator.method != "tiktoken":
        raise LookupError(estimator.reason)
    held = _peak() - before
    return Measured(seconds, held, {name: _cost(estimator, by_characters, text) for name, text in TEXTS.items()})


def _cost(estimator: Estimator, by_characters: Estimator, text: str) -> Cost:
    whole = (text * (ENCODED // len(text) + 1))[:ENCODED]
    began = time.process_time()
    counted = estimator.tokens(whole)
    return Cost((time.process_time() - began) * 1000, by_characters.tokens(whole) / counted - 1)


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(argv: list[str]) -> int:
    """Prints what was measured."""
    encoding = argv[0] if argv else settings()["TOKEN_ENCODING"].default
    try:
        measured = measure(encoding)
    except LookupError as missing:
        print(f"{encoding} is not at hand ({missing}). docs/providers.md says how to get it.", file=sys.stderr)
        return 1
    print(f"{encoding}: loaded in {measured.seconds:.2f} s, {measured.mebibytes:.0f} MiB")
    for name, cost in measured.texts.items():
        print(f"  {name:8} {cost.ms:5.1f} ms for {ENCODED:,} characters; four characters a token: {cost.off:+.0%}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
