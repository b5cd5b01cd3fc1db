"""What comes of everything that a provider may do: the rows of the matrix test, and the table in docs/providers.md.

`python -m tests.matrix` writes the table anew; `tests/test_matrix.py` runs every row against the service, and holds the page
to this data.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.neighbours.scenarios import HELLO, THOUGHTS, words
from tests.service import ROOT

PAGE = ROOT / "docs" / "providers.md"
FAMILIES = {"openai": "gpt", "anthropic": "claude"}
#: How the service of the matrix is set up: as by default, but faster.
ENVIRON = {
    "FIRST_TOKEN_SECONDS": "1.5",
    "SILENCE_SECONDS": "1.5",
    "MAX_STREAM_SECONDS": "5",
    "MAX_ANSWER_BYTES": "1024",
    "PROVIDER_BACKOFF_SECONDS": "0.02",
}
#: Requests of a model that fails and fails.
TRIES = 3
#: The public codes of failures, and whether the same request may succeed later.
RETRYABLE = {
    "provider_rejected": False,
    "context_length_exceeded": False,
    "content_filtered": False,
    "provider_auth_failed": False,
    "provider_quota": False,
    "model_not_found": False,
    "provider_timeout": True,
    "provider_rate_limited": True,
    "provider_overloaded": True,
    "provider_unavailable": True,
    "upstream_disconnected": True,
    "upstream_truncated": True,
    "upstream_malformed": True,
    "first_token_timeout": True,
    "silence_timeout": True,
    "stream_timeout": True,
    "answer_too_long": False,
}

WHOLE = "".join(HELLO)
THOUGHT = "".join(THOUGHTS)


@dataclass(frozen=True, slots=True)
class Expect:
    """What comes of a row with one provider.

    `reason`: the finish reason of a completed answer, or a code of RETRYABLE. `answer` None: the beginning of one, as far as it
    fits. `source`: of the usage; None where nothing but an estimate of nothing is left. `requests`: to providers.
    `attempts`: by outcome, as the metrics have them; where it is empty, it follows from `reason` and `requests`. `adapted`:
    parameters that were left out after a refusal. `warnings`: in the callback. `provider`: the one that answered, if it was
    the fallback's.
    """

    reason: str
    answer: str | None = WHOLE
    reasoning: str = ""
    source: str = "provider"
    requests: int = 1
    attempts: Mapping[str, int] = field(default_factory=dict)
    retries: int = 0
    adapted: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    fell_back: bool = False
    told_by_fallback: bool = False

    @property
    def failed(self) -> bool:
        """Whether it is a failure."""
        return self.reason in RETRYABLE

    @property
    def outcomes(self) -> Mapping[str, int]:
        """Attempts by outcome."""
        if self.attempts:
            return self.attempts
        own = {"stream_timeout": "stopped", "answer_too_long": "stopped"}.get(self.reason, self.reason)
        return {own if self.failed else "answered": 1}


@dataclass(frozen=True, slots=True)
class Row:
    """One thing that a provider does. `ask`: fields of init. `fallback`: what the other provider does, if it is asked."""

    what: str
    scenario: str
    openai: Expect
    anthropic: Expect
    ask: Mapping[str, Any] = field(default_factory=dict)
    fallback: str = ""

    def expect(self, family: str) -> Expect:
        """For this provider."""
        return self.openai if family == "openai" else self.anthropic


def both(what: str, scenario: str, expect: Expect, **ask: Any) -> Row:
    """A row in which the providers come to the same."""
    return Row(what, scenario, expect, expect, ask)


def none(code: str, **other: Any) -> Expect:
    """A failure before the first token, at once. A request that was turned away has used nothing."""
    return Expect(code, "", **other)


def tried(code: str, **other: Any) -> Expect:
    """A failure before the first token, after all retries."""
    return none(code, requests=TRIES, retries=TRIES - 1, attempts={code: TRIES}, **other)


def begun(code: str) -> dict[str, Expect]:
    """The same, of an answer that had begun. Anthropic has said what the input was."""
    return {"openai": tried(code, source="estimated"), "anthropic": tried(code, source="partial")}


def part(code: str, count: int = 3) -> dict[str, Expect]:
    """A failure after so many words. Anthropic has said what the input was."""
    text = "".join(words(count))
    return {"openai": Expect(code, text, source="estimated"), "anthropic": Expect(code, text, source="partial")}


def again(*before: str) -> Expect:
    """An answer after attempts with these outcomes."""
    counts = {code: before.count(code) for code in before}
    return Expect("stop", requests=len(before) + 1, retries=len(before), attempts={**counts, "answered": 1})


def adapted(*parameters: str, **other: Any) -> Expect:
    """An answer after a refusal of these parameters."""
    return replace(Expect("stop", requests=2, adapted=parameters), **other)


def fallen(*before: str) -> Expect:
    """An answer of the fallback."""
    counts = {code: before.count(code) for code in before}
    return Expect(
        "stop", requests=len(before) + 1, retries=len(before) - 1, attempts=counts, fell_back=True, told_by_fallback=True
    )


HELLO_ = Expect("stop")
THREE = "".join(words(3))

ROWS: list[Row] = [
    # ---- Endings ----
    both("a complete answer", "hello", HELLO_),
    both("pieces cut inside characters and lines", "bytes", Expect("stop", "Grüße, 😀!"), prompt="Grüße, 😀!"),
    both("comments, pings, unknown events and fields in between", "unknown", HELLO_),
    both("the length is used up", "length", Expect("length", "".join(words(5)))),
    Row("the context window is used up", "context-window", Expect("length", THREE), Expect("length", THREE)),
    Row(
        "a content filter stops the answer",
        "content-filter",
        Expect("content_filter", THREE),
        Expect("content_filter", THREE, source="partial"),
    ),
    Row("a refusal", "refusal", Expect("refusal", "I'm sorry, I can't help with that."), Expect("refusal", "")),
    both("a tool call", "tool-calls", Expect("tool_calls", "")),
    Row(
        "an ending of one provider alone (`function_call`, `pause_turn`)",
        "pause-turn",
        Expect("tool_calls", THREE),
        Expect("pause_turn", THREE),
    ),
    both("no text at all", "empty", Expect("stop", "")),
    both("thoughts (`reasoning_content`, a thinking block)", "reasoning", Expect("stop", reasoning=THOUGHT)),
    both("thoughts (`reasoning`)", "reasoning-field", Expect("stop", reasoning=THOUGHT)),
    both("thoughts (Mistral's parts)", "reasoning-parts", Expect("stop", reasoning=THOUGHT)),
    both("half a character in each of two deltas", "surrogates", Expect("stop", "a 😀 b")),
    both("usage with cached and reasoning tokens", "usage-details", HELLO_),
    both("no usage", "no-usage", Expect("stop", source="estimated")),
    Row(
        "finish reason and usage, but no `[DONE]` / `message_stop`",
        "no-done",
        Expect("stop", THREE),
        Expect("upstream_truncated", THREE, source="partial"),
    ),
    # ---- Statuses instead of an answer ----
    both("400", "status-s400", none("provider_rejected")),
    both("401", "status-s401", none("provider_auth_failed")),
    both("402", "status-s402", none("provider_quota")),
    both("403", "status-s403", none("provider_auth_failed")),
    both("404", "status-s404", none("model_not_found")),
    both("408", "status-s408", tried("provider_timeout")),
    both("409", "status-s409", tried("provider_unavailable")),
    both("413", "status-s413", none("provider_rejected")),
    both("422", "status-s422", none("provider_rejected")),
    both("429 with a short `retry-after-ms`, always", "status-s429-m20", tried("provider_rate_limited")),
    both("429 with `Retry-After: 60`", "status-s429-r60", none("provider_rate_limited")),
    both("500", "status-s500", tried("provider_unavailable")),
    both("502, a proxy's page", "status-s502", tried("provider_unavailable")),
    both("503", "status-s503", tried("provider_unavailable")),
    both("504", "status-s504", tried("provider_timeout")),
    both("529", "status-s529", tried("provider_overloaded")),
    both("500 with `x-should-retry: false`", "status-s500-y0", none("provider_unavailable")),
    both("the quota is used up (429 `insufficient_quota`, 402)", "quota", none("provider_quota")),
    both("the conversation is too long for the model", "context-length", none("context_length_exceeded")),
    both("the prompt is against the rules", "filtered-input", none("content_filtered")),
    both("200 with a page of HTML", "html", tried("upstream_malformed", source="estimated")),
    both("a reset before any answer", "reset", tried("provider_unavailable")),
    # ---- Once or twice, then an answer ----
    both("500 once", "status-s500-x1", again("provider_unavailable")),
    both("529, then 529, then an answer", "status-s529-x2", again("provider_overloaded", "provider_overloaded")),
    both("429 once, `Retry-After: 1`", "status-s429-r1-x1", again("provider_rate_limited")),
    both("503 once, `Retry-After` as a date", "status-s503-a1-x1", again("provider_unavailable")),
    both("400 once with `x-should-retry: true`", "status-s400-y1-x1", again("provider_rejected")),
    both("a reset once", "reset-x1", again("provider_unavailable")),
    both("an error event before the first token, once", "error-event-k0-s500-x1", again("provider_unavailable")),
    both("the stream ends before the first token, once", "truncated-k0-x1", again("upstream_truncated")),
    both("the connection breaks before the first token, once", "cut-k0-x1", again("upstream_disconnected")),
    # ---- Breaks before the first token, always ----
    Row("an error event before the first token", "error-event-k0-s500", **begun("provider_unavailable")),
    Row("the stream ends before the first token", "truncated-k0", **begun("upstream_truncated")),
    Row("FIN inside the body before the first token", "hangup-k0", **begun("upstream_disconnected")),
    Row("a reset after the headers", "cut-k0", **begun("upstream_disconnected")),
    Row("nonsense before the first token", "garbage-k0", **begun("upstream_malformed")),
    # ---- Breaks after the first token: nothing is retried ----
    Row("the stream ends after 1 word", "truncated-k1", **part("upstream_truncated", 1)),
    Row("the stream ends after 3 words", "truncated-k3", **part("upstream_truncated")),
    Row("FIN inside the body after 3 words", "hangup-k3", **part("upstream_disconnected")),
    Row("a reset after 1 word", "cut-k1", **part("upstream_disconnected", 1)),
    Row("a reset after 3 words", "cut-k3", **part("upstream_disconnected")),
    Row("nonsense after 3 words", "garbage-k3", **part("upstream_malformed")),
    Row("an error event after 3 words (500)", "error-event-k3-s500", **part("provider_unavailable")),
    Row("an error event after 3 words (429)", "error-event-k3-s429", **part("provider_rate_limited")),
    Row(
        "an error event after 3 words (Anthropic: 529)",
        "error-event-k3-s0",
        part("provider_unavailable")["openai"],
        part("provider_overloaded")["anthropic"],
    ),
    Row(
        "finish reason `error`, an `api_error` event",
        "finish-error",
        Expect("provider_unavailable", THREE, source="partial"),
        part("provider_unavailable")["anthropic"],
    ),
    Row("an error beside the choices, as OpenRouter", "finish-error-e1", **part("provider_unavailable")),
    Row(
        "usage so far in each chunk, then the stream ends", "usage-each", *[replace(part("upstream_truncated")["anthropic"])] * 2
    ),
    # ---- Silence ----
    both("no answer, not even headers", "no-answer", none("first_token_timeout", source="estimated")),
    both("headers, then nothing", "silence", none("first_token_timeout", source="estimated")),
    Row(
        "keep-alives, and no token",
        "pinging",
        none("first_token_timeout", source="estimated"),
        none("first_token_timeout", source="partial"),
    ),
    Row("silence after 3 words", "stall-k3", **part("silence_timeout")),
    Row("keep-alives after 2 words, until MAX_STREAM_SECONDS", "pinging-k2", **part("stream_timeout", 2)),
    Row(
        "an answer beyond MAX_ANSWER_BYTES",
        "long-n300-d2",  # in pieces: what the provider says behind the limit has not arrived yet
        Expect("answer_too_long", None, source="estimated"),
        Expect("answer_too_long", None, source="partial"),
    ),
    # ---- Parameters ----
    Row("refuses `max_tokens`", "refuses-max-tokens", adapted("max_tokens"), HELLO_),
    Row(
        "refuses one thing after the other",
        "refuses-all",
        adapted("max_tokens", "stream_options", "stream", requests=4, warnings=("one piece",)),
        HELLO_,
    ),
    Row(
        "refuses `temperature`",
        "refuses-temperature",
        adapted("temperature", warnings=("temperature",)),
        HELLO_,
        {"temperature": 0.5},
    ),
    Row("refuses `top_p`", "refuses-top-p", adapted("top_p", warnings=("top_p",)), HELLO_, {"top_p": 0.5}),
    Row(
        "refuses `stop`",
        "refuses-stop",
        adapted("stop", warnings=("stop",)),
        adapted("stop_sequences", warnings=("stop",)),
        {"stop": "END"},
    ),
    Row(
        "refuses `reasoning_effort` / `thinking` and `output_config`",
        "refuses-reasoning-effort",
        adapted("reasoning_effort", warnings=("reasoning_effort",)),
        adapted("thinking", "output_config", requests=3, warnings=("reasoning_effort",)),
        {"reasoning_effort": "high"},
    ),
    Row(
        "refuses `stream_options` (422, Mistral's form): no usage",
        "refuses-stream-options",
        adapted("stream_options", source="estimated"),
        HELLO_,
    ),
    Row("refuses what it does not know (422)", "refuses-extras", adapted("stream_options", source="estimated"), HELLO_),
    Row(
        "refuses parameters in words alone",
        "refuses-unrecognized",
        adapted("stream_options", "reasoning_effort", source="estimated", warnings=("reasoning_effort",)),
        HELLO_,
        {"reasoning_effort": "low"},
    ),
    Row("refuses to stream: one call, sent in pieces", "refuses-stream", adapted("stream", warnings=("one piece",)), HELLO_),
    # ---- Fallbacks ----
    Row(
        "500 and 500 and 500, then the fallback answers",
        "status-s500",
        *[fallen(*["provider_unavailable"] * TRIES)] * 2,
        fallback="hello",
    ),
    Row("404, then the fallback answers", "status-s404", *[fallen("model_not_found")] * 2, fallback="hello"),
    Row(
        "a long Retry-After, then the fallback answers",
        "status-s429-r60",
        *[fallen("provider_rate_limited")] * 2,
        fallback="hello",
    ),
    Row("silence, then the fallback answers", "silence", *[fallen("first_token_timeout")] * 2, fallback="hello"),
    Row(
        "401, and the fallback 529",
        "status-s401",
        *[
            none(
                "provider_overloaded",
                requests=1 + TRIES,
                attempts={"provider_auth_failed": 1},
                fell_back=True,
                told_by_fallback=True,
            )
        ]
        * 2,
        fallback="status-s529",
    ),
    Row("a break after 3 words: the fallback is not asked", "cut-k3", **part("upstream_disconnected"), fallback="hello"),
]


def cells() -> Iterator[tuple[int, str]]:
    """Every row with every provider."""
    for number in range(len(ROWS)):
        for family in FAMILIES:
            yield number, family


# ---- The table ----

HEAD = """| the provider | | viewers see | n8n gets | usage | requests | counted |
|---|---|---|---|---|---|---|
"""
BEGIN, END = "<!-- matrix: written by `python -m tests.matrix` -->", "<!-- matrix ends -->"
#: The rows stand under these headings, from the first row of each on.
SECTIONS = {
    "a complete answer": "Endings",
    "400": "A status instead of an answer",
    "500 once": "A failure before the first token, and then an answer",
    "an error event before the first token": "Breaks before the first token, always",
    "the stream ends after 1 word": "Breaks after the first token: nothing is retried, nothing spliced",
    "no answer, not even headers": "Silence, and too much",
    "refuses `max_tokens`": "Parameters that the model does not take",
    "500 and 500 and 500, then the fallback answers": "Fallbacks (`fallbackModels`)",
}


def table() -> str:
    """The matrix as Markdown."""
    lines: list[str] = []
    for row in ROWS:
        if row.what in SECTIONS:
            lines += ["", f"### {SECTIONS[row.what]}", "", *HEAD.splitlines()]
        if row.openai == row.anthropic:
            lines.append(f"| {row.what} | both | {_told(row.openai)} |")
        else:
            lines.append(f"| {row.what} | OpenAI | {_told(row.openai)} |")
            lines.append(f"| | Anthropic | {_told(row.anthropic)} |")
    return "\n".join(lines).lstrip("\n") + "\n"


def _told(expect: Expect) -> str:
    text = "as much as fits" if expect.answer is None else "the text" if expect.answer else "nothing"
    text += " (`reasoning` apart)" if expect.reasoning else ""
    if expect.failed:
        retry = "retryable" if RETRYABLE[expect.reason] else "not retryable"
        seen, got = f"{text}, `event: error`", f"`failed`: `{expect.reason}`, {retry}"
    else:
        seen, got = f"{text}, `[DONE]`", f"`completed`: `{expect.reason}`"
    counted = [f"{count} × `{outcome}`" if count > 1 else f"`{outcome}`" for outcome, count in expect.outcomes.items()]
    counted += [f"{expect.retries} retr{'y' if expect.retries == 1 else 'ies'}"] if expect.retries else []
    counted += [f"without `{name}`" for name in expect.adapted]
    counted += ["fallback"] if expect.fell_back else []
    return " | ".join([seen, got, expect.source, str(expect.requests), ", ".join(counted)])


def page(text: str) -> str:
    """The page with the table of this data."""
    return re.sub(f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _: f"{BEGIN}\n\n{table()}\n{END}", text, flags=re.DOTALL)


def main(path: Path = PAGE) -> None:
    """Writes the table into the page."""
    path.write_text(page(path.read_text()))


if __name__ == "__main__":
    main()
