"""What a test model does, for both providers: a scenario is a function that yields steps.

The model's name chooses it: `gpt-test-<scenario>` or `claude-test-<scenario>` (any family, prefix and letter case),
then parameters, each a letter and a number: `gpt-test-long-n200-d20`. For every scenario:

    -d  milliseconds between two deltas (0)             -f  milliseconds before the first delta (0)
    -x  only the first x requests do it, the next ones that name the same model get `hello`
    -i  means nothing: makes a model's name, and so its requests and its -x count, a test's own

and where the scenario's docstring says so: -n deltas in all, -k deltas before it breaks, -s HTTP status, -r Retry-After
in seconds, -b KiB. A new scenario is one function here; `docs()` lists them all.
"""

import inspect
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

SEPARATOR = "\u241e"
"""SYMBOL FOR RECORD SEPARATOR: cuts a prompt of `say` into the deltas that come back."""

HELLO = ("Hello", ",", " this", " is", " the", " test", " provider", ".")
THOUGHTS = ("Let me", " think", " about it.")
REASONING_TOKENS = 64
"""What `usage-details` says was spent on reasoning that nobody was shown."""

FOR_EVER = 3600.0


# Steps: what the model says ...


@dataclass(frozen=True, slots=True)
class Text:
    """One delta of the answer. `escaped`: non-ASCII as JSON escapes, as Python's `json.dumps` writes it."""

    text: str
    escaped: bool = False


@dataclass(frozen=True, slots=True)
class Reasoning:
    """One delta of what the model thinks aloud (`reasoning_content`, or a thinking block)."""

    text: str


@dataclass(frozen=True, slots=True)
class Refusal:
    """One delta of OpenAI's `delta.refusal`; at Anthropic a refusal is a stop reason, and this writes nothing."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    """The start of a tool call; its arguments follow."""

    name: str


@dataclass(frozen=True, slots=True)
class ToolArguments:
    """A piece of the JSON of the last tool call's arguments."""

    text: str


@dataclass(frozen=True, slots=True)
class Finish:
    """The provider's own ending: finish reason, usage, end marker.

    reason: stop, length, content_filter, tool_calls or refusal. done=False: neither `[DONE]` nor `message_stop`.
    """

    reason: str = "stop"
    done: bool = True


# ... and what happens to it on the way.


@dataclass(frozen=True, slots=True)
class Noise:
    """What a client must skip: pings, unknown events, comments, unknown fields, a chunk without choices."""


@dataclass(frozen=True, slots=True)
class ErrorEvent:
    """An error in a stream that began with 200. Status 0: the provider's typical one (500, or overloaded: 529)."""

    status: int = 0
    message: str = ""


@dataclass(frozen=True, slots=True)
class Status:
    """An error instead of the stream; must be the first step. retry_after in seconds, None: no such header."""

    status: int
    retry_after: int | None = None


@dataclass(frozen=True, slots=True)
class Headers:
    """Send the HTTP head now, and no event yet (it goes out by itself before the first event)."""


@dataclass(frozen=True, slots=True)
class Raw:
    """These bytes as they are, as one HTTP chunk."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Sleep:
    """Say nothing for a while (a client that leaves is noticed)."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Hold:
    """Wait until the test calls `ProviderServer.release()`."""


@dataclass(frozen=True, slots=True)
class Shred:
    """From here on cut every write inside characters, inside lines and between newlines."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Reset the connection (RST)."""


@dataclass(frozen=True, slots=True)
class HangUp:
    """Close the connection (FIN) inside the body, without the last HTTP chunk."""


Step = (
    Text | Reasoning | Refusal | ToolCall | ToolArguments | Finish | Noise
    | ErrorEvent | Status | Headers | Raw | Sleep | Hold | Shred | Cut | HangUp
)  # fmt: skip
Delta = Text | Reasoning | Refusal | ToolCall | ToolArguments


@dataclass(frozen=True, slots=True)
class Ask:
    """What the client asked for, the same for both providers.

    api: `openai` or `anthropic`. headers: lower-case names. usage: `plain`, `none` (every usage field is left out), or
    `details` (with cached and reasoning tokens). number: counts the requests, and makes the ids.
    """

    api: str
    model: str
    texts: tuple[str, ...]
    headers: dict[str, str]
    body: dict[str, Any]
    params: dict[str, int]
    usage: str
    number: int

    @property
    def prompt(self) -> str:
        """The text of the last user message."""
        users = [m for m in self.body["messages"] if m.get("role") == "user"]
        return _text(users[-1].get("content")) if users else ""

    @property
    def input_tokens(self) -> int:
        """The words (`str.split()`) of all messages and of `system`: that is what a token is here."""
        return sum(len(text.split()) for text in self.texts)


def _text(content: Any) -> str:
    """The text of a message's content: a string, or parts of which those of type text count."""
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def all_texts(body: dict[str, Any]) -> tuple[str, ...]:
    """The texts of all messages, and of Anthropic's `system`."""
    return (_text(body.get("system")), *(_text(message.get("content")) for message in body["messages"]))


def words(count: int) -> list[str]:
    """`word1 `, `word2 `, …: the deltas of the scenarios that are made of words."""
    return [f"word{number} " for number in range(1, count + 1)]


Scenario = Callable[[Ask], Iterator[Step]]
SCENARIOS: dict[str, Scenario] = {}
DEFAULTS: dict[str, dict[str, int]] = {}
USAGE: dict[str, str] = {}
_NAME = re.compile(r"(?:.*[-/])?test-(?P<name>[a-z-]+?)(?P<params>(?:-[a-z]\d+)*)", re.IGNORECASE)


def scenario(name: str, usage: str = "plain", **defaults: int) -> Callable[[Scenario], Scenario]:
    """Register a scenario under `name`; `defaults` are its parameters, `usage` is as in Ask."""

    def register(function: Scenario) -> Scenario:
        SCENARIOS[name], DEFAULTS[name], USAGE[name] = function, defaults, usage
        return function

    return register


def parse(model: str) -> tuple[str, dict[str, int]] | None:
    """Scenario and parameters that a model's name asks for, or None when there is no such model."""
    match = _NAME.fullmatch(model)
    if match is None or (name := match["name"].lower()) not in SCENARIOS:
        return None
    given = {part[0].lower(): int(part[1:]) for part in match["params"].split("-") if part}
    return name, {"d": 0, "f": 0} | DEFAULTS[name] | given


def docs() -> str:
    """All scenarios, one line each: name, parameters with their defaults, what happens."""
    rows = []
    for name, function in SCENARIOS.items():
        defaults = " ".join(f"-{key}{value}" for key, value in DEFAULTS[name].items())
        rows.append(f"{name:15}{defaults:15}{' '.join((inspect.getdoc(function) or '').split())}")
    return "\n".join(rows)


# Answers that are complete


@scenario("hello")
def hello(ask: Ask) -> Iterator[Step]:
    """HELLO, usage, stop."""
    yield from map(Text, HELLO)
    yield Finish()


@scenario("say")
def say(ask: Ask) -> Iterator[Step]:
    """The last user message comes back, one delta for each piece between U+241E (a piece may be empty)."""
    yield from map(Text, ask.prompt.split(SEPARATOR))
    yield Finish()


@scenario("escaped")
def escaped(ask: Ask) -> Iterator[Step]:
    """As `say`, with all non-ASCII as JSON escapes."""
    for piece in ask.prompt.split(SEPARATOR):
        yield Text(piece, escaped=True)
    yield Finish()


@scenario("bytes")
def bytes_(ask: Ask) -> Iterator[Step]:
    """As `say`, but each multi-byte character and each SSE line is split over separate writes (0.3 ms apart)."""
    yield Shred()
    yield from say(ask)


@scenario("deltas")
def deltas(ask: Ask) -> Iterator[Step]:
    """The last user message is a JSON list of texts, one delta each: so NUL and half an emoji get through a prompt."""
    yield from map(Text, json.loads(ask.prompt))
    yield Finish()


@scenario("long", n=200)
def long(ask: Ask) -> Iterator[Step]:
    """-n words."""
    yield from map(Text, words(ask.params["n"]))
    yield Finish()


@scenario("slow", n=20, d=100)
def slow(ask: Ask) -> Iterator[Step]:
    """-n words, -d ms apart."""
    return long(ask)


@scenario("hold", n=5, k=2)
def hold(ask: Ask) -> Iterator[Step]:
    """-n words, but after -k of them it waits for `ProviderServer.release()`."""
    for number, word in enumerate(words(ask.params["n"])):
        if number == ask.params["k"]:
            yield Hold()
        yield Text(word)
    yield Finish()


@scenario("big", b=100)
def big(ask: Ask) -> Iterator[Step]:
    """One delta of -b KiB."""
    yield Text("0123456789abcdef" * 64 * ask.params["b"])
    yield Finish()


@scenario("empty")
def empty(ask: Ask) -> Iterator[Step]:
    """No delta at all, usage, stop."""
    yield Finish()


@scenario("length", n=5)
def length(ask: Ask) -> Iterator[Step]:
    """-n words, then finish_reason length / stop_reason max_tokens."""
    yield from map(Text, words(ask.params["n"]))
    yield Finish("length")


@scenario("refusal")
def refusal(ask: Ask) -> Iterator[Step]:
    """OpenAI: delta.refusal with empty content, finish stop. Anthropic: no text, stop_reason refusal."""
    if ask.api == "openai":
        yield from map(Refusal, ("I'm sorry,", " I can't help", " with that."))
    yield Finish("refusal")


@scenario("content-filter", k=3)
def content_filter(ask: Ask) -> Iterator[Step]:
    """-k words, then finish_reason content_filter / an error event `Output blocked by content filtering policy`."""
    yield from map(Text, words(ask.params["k"]))
    if ask.api == "openai":
        yield Finish("content_filter")
    else:
        yield ErrorEvent(400, "Output blocked by content filtering policy")


@scenario("tool-calls")
def tool_calls(ask: Ask) -> Iterator[Step]:
    """A call of get_weather {"city":"Bern"} in two pieces, finish tool_calls / tool_use."""
    yield ToolCall("get_weather")
    yield from map(ToolArguments, ('{"city":', '"Bern"}'))
    yield Finish("tool_calls")


@scenario("reasoning")
def reasoning(ask: Ask) -> Iterator[Step]:
    """THOUGHTS as reasoning_content / a thinking block, then HELLO."""
    yield from map(Reasoning, THOUGHTS)
    yield from hello(ask)


@scenario("surrogates")
def surrogates(ask: Ask) -> Iterator[Step]:
    r"""An emoji as the JSON escapes \ud83d and \ude00 in two successive deltas, "a " and " b" around them."""
    yield from map(Text, ("a ", "\ud83d", "\ude00", " b"))
    yield Finish()


@scenario("unknown")
def unknown(ask: Ask) -> Iterator[Step]:
    """HELLO among comments, pings, unknown events and fields, a chunk with empty choices."""
    for piece in HELLO:
        yield Noise()
        yield Text(piece)
    yield Noise()
    yield Finish()


@scenario("no-usage", usage="none")
def no_usage(ask: Ask) -> Iterator[Step]:
    """HELLO and stop; include_usage is ignored, Anthropic's usage objects are missing."""
    yield from map(Text, HELLO)
    yield Finish()


@scenario("usage-details", usage="details")
def usage_details(ask: Ask) -> Iterator[Step]:
    """HELLO, and usage with cached (half of the input, rounded down) and REASONING_TOKENS (added to the output)."""
    yield from map(Text, HELLO)
    yield Finish()


@scenario("no-done", k=3)
def no_done(ask: Ask) -> Iterator[Step]:
    """-k words with finish reason and usage, but without [DONE] / message_stop."""
    yield from map(Text, words(ask.params["k"]))
    yield Finish(done=False)


# Answers that break


@scenario("truncated", k=3)
def truncated(ask: Ask) -> Iterator[Step]:
    """-k words, then the clean end of the HTTP body: no finish reason, no end marker."""
    yield from map(Text, words(ask.params["k"]))


@scenario("hangup", k=3)
def hangup(ask: Ask) -> Iterator[Step]:
    """-k words, then FIN inside the chunked body."""
    yield from map(Text, words(ask.params["k"]))
    yield HangUp()


@scenario("cut", k=3)
def cut(ask: Ask) -> Iterator[Step]:
    """-k words, then RST."""
    yield from map(Text, words(ask.params["k"]))
    yield Cut()


@scenario("stall", k=3)
def stall(ask: Ask) -> Iterator[Step]:
    """-k words, then silence."""
    yield from map(Text, words(ask.params["k"]))
    yield Sleep(FOR_EVER)


@scenario("garbage", k=3)
def garbage(ask: Ask) -> Iterator[Step]:
    """-k words, then an event whose data is not JSON, then the rest as if nothing had been."""
    yield from map(Text, words(ask.params["k"]))
    yield Raw(b"event: content_block_delta\ndata: {not json\n\n" if ask.api == "anthropic" else b"data: {not json\n\n")
    yield Finish()


@scenario("error-event", k=3, s=0)
def error_event(ask: Ask) -> Iterator[Step]:
    """-k words, then an error event under status 200 (-s0: server_error / overloaded_error), then the clean end."""
    yield from map(Text, words(ask.params["k"]))
    yield ErrorEvent(ask.params["s"])


@scenario("status", s=500)
def status(ask: Ask) -> Iterator[Step]:
    """Status -s before the stream, the provider's error body; Retry-After -r (429: 1 unless given)."""
    yield Status(ask.params["s"], ask.params.get("r", 1 if ask.params["s"] == 429 else None))


@scenario("silence")
def silence(ask: Ask) -> Iterator[Step]:
    """HTTP headers, then nothing."""
    yield Headers()
    yield Sleep(FOR_EVER)


@scenario("no-answer")
def no_answer(ask: Ask) -> Iterator[Step]:
    """Not even headers."""
    yield Sleep(FOR_EVER)


@scenario("reset")
def reset(ask: Ask) -> Iterator[Step]:
    """RST before any answer."""
    yield Cut()
