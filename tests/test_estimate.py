"""How many tokens a text is: by a real tiktoken with a small encoding of our own, and without any at hand."""

import hashlib
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aistream.estimate import ENCODED, Estimator
from bench.estimate import main
from tests.service import ROOT

ENCODINGS = ROOT / "tests" / "encodings"
O200K = "https://openaipublic.blob.core.windows.net/encodings/o200k_base.tiktoken"
#: No deadline: the machine may be busy with something else. The fixture holds nothing that an example could change.
EXAMPLES = settings(deadline=None)


@pytest.fixture(scope="module", autouse=True)
def plugin() -> Iterator[None]:
    """tiktoken with our plugin, as if this process had not asked it for any encoding yet."""
    from tiktoken import registry

    def forget() -> None:
        registry.ENCODINGS.clear()
        registry.ENCODING_CONSTRUCTORS = None
        registry._available_plugin_modules.cache_clear()

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ENCODINGS)
        forget()
        yield
    forget()


def loaded(encoding: str) -> Estimator:
    """An estimator that a worker has started with."""
    estimator = Estimator(encoding)
    estimator.load()
    return estimator


def run(script: str, cache: Path) -> str:
    """What a new process prints that runs this, with o200k_base looked for in `cache`; it must say nothing else."""
    # urllib3, under the package's other modules, binds a socket; what counts is what connects or asks for an address.
    guard = """
import sys
opened = []
sys.addaudithook(lambda event, args: opened.append(event) if event in ("socket.connect", "socket.getaddrinfo") else None)
from aistream.estimate import Estimator
"""
    process = subprocess.run(
        [sys.executable, "-c", guard + script],
        cwd=ROOT,
        env=os.environ | {"TIKTOKEN_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert process.stderr == ""
    return process.stdout


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("", 0),
        ("token", 1),
        (" token token", 2),
        ("token token", 2),
        ("taken", 4),
        ("é", 2),
        ("😀", 4),
        ("\0\r\n", 3),
        ("<|endoftext|>", 12),  # a special token, spelled out: `en` is one
        ("\ud83d", 3),  # half a character is counted as U+FFFD
        ("\ude00token", 4),
        ("\ud83d\ude00", 4),
    ],
)
def test_an_encoding_of_a_plugin_counts_every_text(text: str, tokens: int) -> None:
    estimator = loaded("aistream_test")

    assert (estimator.method, estimator.reason, estimator.tokens(text)) == ("tiktoken", "", tokens)


@pytest.mark.parametrize(
    ("text", "tokens"), [("", 0), ("a", 1), ("abcd", 1), ("abcde", 2), ("😀" * 8, 2), ("\ud83d", 1), ("<|endoftext|>", 4)]
)
def test_without_an_encoding_four_characters_are_a_token(text: str, tokens: int) -> None:
    estimator = Estimator("aistream_test")

    assert (estimator.method, estimator.tokens(text)) == ("characters", tokens)


@pytest.mark.parametrize(
    ("encoding", "reason"),
    [
        ("o300k_base", "ValueError: Unknown encoding o300k_base."),
        ("", "ValueError: Unknown encoding ."),
        ("aistream_raises", "RuntimeError: this plugin is broken"),
        ("aistream_letters", r"KeyError: b'\x00'"),
        (
            "aistream_twice",
            "PanicException: Encoder and decoder must be of equal length. Encoder length: 257, decoder length: 256.",
        ),
    ],
)
def test_an_encoding_that_cannot_be_used_leaves_the_characters_and_a_reason(encoding: str, reason: str) -> None:
    estimator = loaded(encoding)

    assert (estimator.method, estimator.reason) == ("characters", reason)
    assert estimator.tokens("abcde") == 2


def test_a_text_that_an_encoding_panics_over_is_counted_by_its_characters() -> None:
    estimator = loaded("aistream_panics")

    assert (estimator.method, estimator.tokens("abc"), estimator.tokens("x" * 60)) == ("tiktoken", 3, 15)


def test_what_is_no_fault_of_the_encodings_goes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: str) -> list[int]:
        raise KeyboardInterrupt

    estimator = loaded("aistream_test")
    monkeypatch.setattr(estimator, "_encode", interrupted)

    with pytest.raises(KeyboardInterrupt):
        estimator.tokens("text")


def test_an_encoding_that_would_have_to_be_downloaded_is_done_without(tmp_path: Path) -> None:
    script = "e = Estimator('o200k_base'); e.load(); print(e.method, e.reason, e.tokens('abcde'), opened)"

    assert run(script, tmp_path / "cache") == f"characters NotAtHand: {O200K} is not in the cache 2 []\n"
    assert not (tmp_path / "cache").exists()


def test_a_spoiled_file_in_the_cache_stays_and_is_not_downloaded_again(tmp_path: Path) -> None:
    file = tmp_path / hashlib.sha1(O200K.encode()).hexdigest()
    file.write_bytes(b"IQ== 0\nIg==")

    said = run("e = Estimator('o200k_base'); e.load(); print(e.method, e.reason, opened)", tmp_path)

    assert said == "characters NotAtHand: the file in the cache is not the encoding's: its hash is another []\n"
    assert file.read_bytes() == b"IQ== 0\nIg==" and list(tmp_path.iterdir()) == [file]


def test_loading_under_gevent_leaves_its_patch_and_tiktokens_loader_as_they_were(tmp_path: Path) -> None:
    script = """
from gevent import monkey
monkey.patch_all()
import socket, ssl, threading
before = [socket.socket, ssl.SSLContext, threading.Thread.start, threading.RLock]
Estimator("o200k_base").load()
import tiktoken.load
after = [socket.socket, ssl.SSLContext, threading.Thread.start, threading.RLock]
print(before == after, monkey.is_object_patched("socket", "socket"))
print(tiktoken.load.read_file.__module__, tiktoken.load.check_hash.__module__, "requests" in sys.modules, opened)
"""

    assert run(script, tmp_path) == "True True\ntiktoken.load tiktoken.load False []\n"


def test_tiktoken_is_imported_by_loading_only(tmp_path: Path) -> None:
    script = """
estimator = Estimator("o200k_base")
estimator.tokens("text")
print("tiktoken" in sys.modules)
estimator.load()
print("tiktoken" in sys.modules)
"""

    assert run(script, tmp_path) == "False\nTrue\n"


@EXAMPLES
@given(st.text(max_size=200), st.text(max_size=50))
def test_by_characters_a_longer_text_never_has_fewer_tokens(text: str, more: str) -> None:
    estimator = Estimator("aistream_test")

    assert estimator.tokens(text) <= estimator.tokens(text + more) <= estimator.tokens(text) + estimator.tokens(more)


@EXAMPLES
@given(st.text(st.characters(), max_size=200), st.text("token", min_size=1, max_size=20))
def test_by_an_encoding_one_more_word_is_counted_on_top(text: str, word: str) -> None:
    estimator = loaded("aistream_test")

    assert estimator.tokens(f"{text} {word}") == estimator.tokens(text) + estimator.tokens(f" {word}")


@EXAMPLES
@given(st.text(st.characters(exclude_categories=())))
def test_any_text_has_between_one_token_and_one_for_each_byte(text: str) -> None:
    most = len(text.encode("utf-8", "surrogatepass"))

    assert min(most, 1) <= loaded("aistream_test").tokens(text) <= most


@EXAMPLES
@given(st.integers(ENCODED - 3, 30 * ENCODED), st.integers(0, 30 * ENCODED))
def test_a_longer_text_of_the_same_kind_has_more_tokens_in_proportion(length: int, more: int) -> None:
    estimator = loaded("aistream_test")
    text = " token" * (-(-(length + more) // 6))

    shorter, longer = estimator.tokens(text[:length]), estimator.tokens(text[: length + more])

    assert shorter <= longer
    assert math.isclose(longer / (length + more), 1 / 6, rel_tol=0.001)


@pytest.mark.parametrize("kind", ["a", "^", " ", "\n", "字", "😀", "é", "token", "\ud83d", "aA1 "])
def test_no_text_is_too_large(kind: str) -> None:
    text = kind * (20 * ENCODED // len(kind))

    assert loaded("aistream_test").tokens(text) == 20 * loaded("aistream_test").tokens(text[:ENCODED])


def test_the_bench_measures_an_encoding_that_is_at_hand_and_asks_for_another(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["aistream_test"]) == 0
    measured = capsys.readouterr().out.splitlines()
    assert main(["no_such_encoding"]) == 1

    assert measured[0].startswith("aistream_test: loaded in ") and len(measured) == 5
    assert all("ms for 100,000 characters" in line for line in measured[1:])
    assert "no_such_encoding is not at hand" in capsys.readouterr().err
