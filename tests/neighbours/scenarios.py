"""What a test model does, for both providers: a scenario is a function that yields steps.

The model's name chooses it: `gpt-test-<scenario>` or `claude-test-<scenario>` (any family, prefix and letter case),
then parameters, each a letter and a number: `gpt-test-long-n200-d20`. For every scenario:

    -d  milliseconds between two deltas (0)             -f  milliseconds before the first delta (0)
    -x  only the first x requests do it, the next ones that name the same model get `hello`
    -i  means nothing: makes a model's name, and so its requests and its -x count, a test's own

for every scenario that answers with an error status, the headers that both SDKs obey when they retry by themselves:

    -r  Retry-After in seconds                          -a  Retry-After as the date so many seconds from now
    -m  retry-after-ms                                  -y  x-should-retry: 0 false, 1 true

and where the scenario's docstring says so: -n deltas in all, -k deltas before it breaks, -s HTTP status, -b KiB. A new
scenario is one function here; `docs()` lists them all.
"""

import inspect
import json
import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import Any

SEPARATOR = "\u241e"
"""SYMBOL FOR RECORD SEPARATOR: cuts a prompt of `say` into the deltas that come back."""

HELLO = ("Hello", ",", " this", " is", " the", " test", " provider", ".")
THOUGHTS = ("Let me", " think", " about it.")
REASONING_TOKENS = 64
"""What `usage-details` says was spent on reasoning that nobody was shown."""

FOR_EVER = 3600.0
PING_SECONDS = 0.05


# Steps: what the model says ...


@dataclass(frozen=True, slots=True)
class Text:
    """One delta of the answer.

    escaped: non-ASCII as JSON escapes, as Python's `json.dumps` writes it. part: OpenAI's content is a list with one part
    of type text, and not a string.
    """

    text: str
    escaped: bool = False
    part: bool = False


@dataclass(frozen=True, slots=True)
class Reasoning:
    """One delta of what the model thinks aloud: a thinking block, and for OpenAI's wire, which has no word for it, `field`.

    field: `reasoning_content` (DeepSeek and those that came after), `reasoning` (OpenRouter, Groq, newer vLLM), or
    `content`: a list with one part of type thinking (Mistral).
    """

    text: str
    field: str = "reasoning_content"


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

    reason: stop, length, content_filter, tool_calls, refusal, or one that only one of the two knows, as it writes it.
    done=False: neither `[DONE]` nor `message_stop`.
    """

    reason: str = "stop"
    done: bool = True


# ... and what happens to it on the way.


@dataclass(frozen=True, slots=True)
class Noise:
    """What a client must skip: pings, unknown events, comments, unknown fields, a chunk without choices."""


@dataclass(frozen=True, slots=True)
class Ping:
    """One sign of life that is no content: OpenRouter's comment, Anthropic's event ping."""


@dataclass(frozen=True, slots=True)
class ErrorEvent:
    """An error in a stream that began with 200. Status 0: the provider's typical one (500, or overloaded: 529).

    finish: OpenAI's wire writes it as OpenRouter does, into a chunk whose finish_reason is error.
    """

    status: int = 0
    message: str = ""
    finish: bool = False


@dataclass(frozen=True, slots=True)
class Status:
    """An error instead of the stream; must be the first step.

    message: instead of the provider's usual one for this status. error: fields of OpenAI's `error` object that are not as
    usual either. body: this JSON instead of everything. headers: beside those of the provider and of -r, -a, -m and -y.
    """

    status: int
    message: str = ""
    error: dict[str, Any] = field(default_factory=dict)
    body: Any = None
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Page:
    """A page of HTML under status 200 instead of an answer; must be the first step."""

    html: str


@dataclass(frozen=True, slots=True)
class Headers:
    """Send the HTTP head now, and no event yet (it goes out by itself before the first event)."""


@dataclass(frozen=True, slots=True)
class Open:
    """Send what stands in front of the first delta now (it goes out by itself with that)."""


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
    Text | Reasoning | Refusal | ToolCall | ToolArguments | Finish | Noise | Ping
    | ErrorEvent | Status | Page | Headers | Open | Raw | Sleep | Hold | Shred | Cut | HangUp
)  # fmt: skip
Delta = Text | Reasoning | Refusal | ToolCall | ToolArguments


@dataclass(frozen=True, slots=True)
class Ask:
    """What the client asked for, the same for both providers.

    api: `openai` or `anthropic`. headers: lower-case names. usage: `plain`, `none` (every usage field is left out),
    `details` (with cached and reasoning tokens), or `each` (OpenAI: in every chunk). number: counts the requests, and
    makes the ids.
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

    def has(self, parameter: str) -> bool:
        """Whether the request sets this parameter; null, and a `stream` that is false, are as good as none."""
        return self.body.get(parameter) is not None and (parameter != "stream" or bool(self.body["stream"]))

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


def retry_headers(params: dict[str, int]) -> list[tuple[str, str]]:
    """The headers that -r, -a, -m and -y ask for."""
    headers = []
    if "r" in params:
        headers.append(("retry-after", str(params["r"])))
    if "a" in params:
        # Whole seconds, rounded up: never earlier than asked.
        headers.append(("retry-after", formatdate(math.ceil(time.time()) + params["a"], usegmt=True)))
    if "m" in params:
        headers.append(("retry-after-ms", str(params["m"])))
    if "y" in params:
        headers.append(("x-should-retry", "true" if params["y"] else "false"))
    return headers


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
        rows.append(f"{name:30}{defaults:15}{' '.join((inspect.getdoc(function) or '').split())}")
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


@scenario("hold", n=5, k=2, d=60)
def hold(ask: Ask) -> Iterator[Step]:
    """-n words, -d ms apart, but after -k of them it waits for `ProviderServer.release()`."""
    # Apart, since tests count them as events, and what arrives at once is one.
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


@scenario("reasoning-field")
def reasoning_field(ask: Ask) -> Iterator[Step]:
    """As `reasoning`, but OpenAI's wire has THOUGHTS in delta.reasoning, as OpenRouter, Groq and newer vLLM send them."""
    yield from (Reasoning(text, "reasoning") for text in THOUGHTS)
    yield from hello(ask)


@scenario("reasoning-parts")
def reasoning_parts(ask: Ask) -> Iterator[Step]:
    """As `reasoning`, but OpenAI's wire has content as lists, as Mistral: THOUGHTS as parts of type thinking, then the
    first piece of HELLO as a part of type text, the others as plain strings."""
    # BerriAI/litellm#16272 has such a stream of api.mistral.ai; NousResearch/hermes-agent#4748 the parts of type text
    yield from (Reasoning(text, "content") for text in THOUGHTS)
    for number, piece in enumerate(HELLO):
        yield Text(piece, part=number == 0)
    yield Finish()


@scenario("hidden-thoughts", t=600)
def hidden_thoughts(ask: Ask) -> Iterator[Step]:
    """Anthropic: a block of thinking without its thoughts (`display: omitted`), for -t ms, then HELLO. OpenAI: the opening, then
    nothing for -t ms, then HELLO."""
    yield Reasoning("") if ask.api == "anthropic" else Open()
    yield Sleep(ask.params["t"] / 1000)
    yield from hello(ask)


@scenario("whole")
def whole(ask: Ask) -> Iterator[Step]:
    """As `reasoning`, but in one piece of JSON, whatever was asked for: a server that does not stream."""
    return reasoning(ask)


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


@scenario("usage-each", usage="each", n=5, k=3)
def usage_each(ask: Ask) -> Iterator[Step]:
    """-n words with the usage so far in every chunk (Anthropic: only message_start has one), broken off after -k (k > n:
    complete) as by `truncated`."""
    # vllm-project/vllm#7262 shows the chunks, the first with 0 completion tokens
    yield Open()
    for word in words(ask.params["n"])[: ask.params["k"]]:
        yield Text(word)
    if ask.params["k"] > ask.params["n"]:
        yield Finish()


@scenario("pause-turn", k=3)
def pause_turn(ask: Ask) -> Iterator[Step]:
    """-k words, then finish_reason function_call / stop_reason pause_turn: an ending that is none of the usual ones."""
    yield from map(Text, words(ask.params["k"]))
    yield Finish("function_call" if ask.api == "openai" else "pause_turn")


@scenario("context-window", k=3)
def context_window(ask: Ask) -> Iterator[Step]:
    """-k words, then finish_reason length / stop_reason model_context_window_exceeded."""
    yield from map(Text, words(ask.params["k"]))
    yield Finish("length" if ask.api == "openai" else "model_context_window_exceeded")


@scenario("no-done", k=3)
def no_done(ask: Ask) -> Iterator[Step]:
    """-k words with finish reason and usage, but without [DONE] / message_stop."""
    yield from map(Text, words(ask.params["k"]))
    yield Finish(done=False)


# Answers that break; with -k0 all of them begin, and break before any content


@scenario("truncated", k=3)
def truncated(ask: Ask) -> Iterator[Step]:
    """-k words, then the clean end of the HTTP body: no finish reason, no end marker."""
    yield Open()
    yield from map(Text, words(ask.params["k"]))


@scenario("hangup", k=3)
def hangup(ask: Ask) -> Iterator[Step]:
    """-k words, then FIN inside the chunked body."""
    yield from map(Text, words(ask.params["k"]))
    yield HangUp()


@scenario("cut", k=3)
def cut(ask: Ask) -> Iterator[Step]:
    """-k words, then RST."""
    yield Open()
    yield from map(Text, words(ask.params["k"]))
    yield Cut()


@scenario("stall", k=3)
def stall(ask: Ask) -> Iterator[Step]:
    """-k words, then silence."""
    yield Open()
    yield from map(Text, words(ask.params["k"]))
    yield Sleep(FOR_EVER)


@scenario("garbage", k=3)
def garbage(ask: Ask) -> Iterator[Step]:
    """-k words, then an event whose data is not JSON, then the rest as if nothing had been."""
    yield Open()
    yield from map(Text, words(ask.params["k"]))
    yield Raw(b"event: content_block_delta\ndata: {not json\n\n" if ask.api == "anthropic" else b"data: {not json\n\n")
    yield Finish()


@scenario("error-event", k=3, s=0)
def error_event(ask: Ask) -> Iterator[Step]:
    """-k words, then an error event under status 200 (-s0: server_error / overloaded_error), then the clean end."""
    yield from map(Text, words(ask.params["k"]))
    yield ErrorEvent(ask.params["s"])


@scenario("finish-error", k=3, e=0)
def finish_error(ask: Ask) -> Iterator[Step]:
    """-k words, then finish_reason error, usage, [DONE]; -e1: as OpenRouter documents it, with an error beside choices, and
    nothing after it. Anthropic: an error event of type api_error."""
    # openrouter.ai/docs/api/reference/streaming, Handling Errors During Streaming
    yield from map(Text, words(ask.params["k"]))
    if ask.api == "anthropic" or ask.params["e"]:
        yield ErrorEvent(500, finish=True)
    else:
        yield Finish("error")


@scenario("pinging", k=0)
def pinging(ask: Ask) -> Iterator[Step]:
    """-k words, then for ever, every 50 ms, what is no content: comments `: OPENROUTER PROCESSING` / `event: ping`."""
    if ask.api == "anthropic":
        yield Open()  # its pings come after message_start, OpenRouter's comments before the first chunk
    yield from map(Text, words(ask.params["k"]))
    while True:
        yield Ping()
        yield Sleep(PING_SECONDS)


@scenario("html")
def html(ask: Ask) -> Iterator[Step]:
    """Status 200 with a login page: what a captive portal says, or an address that is not an API's."""
    yield Page("<!DOCTYPE html>\n<html><head><title>Sign in</title></head><body><form>Password</form></body></html>\n")


@scenario("status", s=500)
def status(ask: Ask) -> Iterator[Step]:
    """Status -s before the stream, the provider's error body (429 says Retry-After: 1, unless -r, -a or -m is given)."""
    said = ask.params["s"] != 429 or ask.params.keys() & {"r", "a", "m"}
    yield Status(ask.params["s"], headers=() if said else (("retry-after", "1"),))


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


@scenario("quoting", k=5)
def quoting(ask: Ask) -> Iterator[Step]:
    """-k words, then an error event whose message quotes them."""
    said = words(ask.params["k"])
    yield from map(Text, said)
    yield ErrorEvent(500, f"The answer was: {''.join(said)}")


# Requests that are refused


@scenario("quota")
def quota(ask: Ask) -> Iterator[Step]:
    """OpenAI: 429 insufficient_quota, which no waiting helps. Anthropic: 402 billing_error."""
    if ask.api == "anthropic":
        yield Status(402)
        return
    message = "You exceeded your current quota, please check your plan and billing details."
    yield Status(429, message, {"type": "insufficient_quota", "code": "insufficient_quota"})


@scenario("context-length")
def context_length(ask: Ask) -> Iterator[Step]:
    """400: the messages are too long for the model (context_length_exceeded / prompt is too long)."""
    if ask.api == "anthropic":
        yield Status(400, "prompt is too long: 210000 tokens > 200000 maximum")
        return
    message = "This model's maximum context length is 8192 tokens. However, your messages resulted in 9000 tokens."
    yield Status(400, message, {"param": "messages", "code": "context_length_exceeded"})


@scenario("filtered-input")
def filtered_input(ask: Ask) -> Iterator[Step]:
    """400: the prompt is against the rules (Azure's content_filter / Output blocked by content filtering policy)."""
    if ask.api == "anthropic":
        yield Status(400, "Output blocked by content filtering policy")
        return
    message = (
        "The response was filtered due to the prompt triggering Azure OpenAI's content management policy."
        " Please modify your prompt and retry."
    )
    # compl-ai/compl-ai#20
    result = {"violence": {"filtered": True, "severity": "medium"}, "jailbreak": {"filtered": False, "detected": False}}
    inner = {"code": "ResponsibleAIPolicyViolation", "content_filter_result": result}
    error = {"type": None, "param": "prompt", "code": "content_filter", "status": 400, "innererror": inner}
    yield Status(400, message, error)


@scenario("echoing")
def echoing(ask: Ask) -> Iterator[Step]:
    """400 with a message that quotes the last user message."""
    yield Status(400, f"The prompt was: {ask.prompt}")


# Parameters that are refused: what has none of them gets `hello`


def _extra(ask: Ask, name: str) -> dict[str, Any]:
    """What pydantic, and so Mistral, says of one field that it does not know."""
    msg = "Extra inputs are not permitted"
    return {"type": "extra_forbidden", "loc": ["body", name], "msg": msg, "input": ask.body[name]}


def _refusal(ask: Ask, name: str) -> Status:
    """How this parameter is refused: by Anthropic all alike; by OpenAI's wire as the one who refuses it says it."""
    if ask.api == "anthropic":
        return Status(400, f"{name}: Extra inputs are not permitted")
    message = f"Unsupported parameter: '{name}' is not supported with this model."
    error = {"param": name, "code": "unsupported_parameter"}
    match name:
        case "max_tokens":  # OpenHands/software-agent-sdk#1083
            message += " Use 'max_completion_tokens' instead."
        case "temperature":
            message = f"Unsupported value: 'temperature' does not support {ask.body[name]} with this model."
            message += " Only the default (1) value is supported."
            error["code"] = "unsupported_value"
        case "stream":  # lobehub/lobehub#9385
            message = "Your organization must be verified to stream this model. Please go to: "
            message += "https://platform.openai.com/settings/organization/general and click on Verify Organization."
            message += " If you just verified, it can take up to 15 minutes for access to propagate."
            error["code"] = "unsupported_value"
        case "stream_options":  # Mistral: cline/cline#582
            told = {"object": "error", "message": {"detail": [_extra(ask, name)]}, "type": "invalid_request_error"}
            return Status(422, body=told | {"param": None, "code": None})
    return Status(400, message, error)  # stop: huggingface/smolagents#1671, top_p: chatboxai/chatbox#2627


REFUSED = {
    "max_tokens": (),  # Anthropic's own, and required
    "max_completion_tokens": (),
    "temperature": ("temperature",),
    "top_p": ("top_p",),
    "stop": ("stop_sequences",),
    "stream_options": (),
    "reasoning_effort": ("thinking", "output_config"),
    "stream": (),
}
"""OpenAI's parameters that a scenario can refuse, and what Anthropic calls them."""


def _refusing(ask: Ask, *names: str) -> Iterator[Step]:
    """The refusal of the first of OpenAI's parameters `names` that the request has, or HELLO."""
    own = names if ask.api == "openai" else [other for name in names for other in REFUSED[name]]
    if had := [name for name in own if ask.has(name)]:
        yield _refusal(ask, had[0])
    else:
        yield from hello(ask)


@scenario("refuses-max-tokens")
def refuses_max_tokens(ask: Ask) -> Iterator[Step]:
    """Refuses max_tokens and names max_completion_tokens; Anthropic requires it: HELLO."""
    return _refusing(ask, "max_tokens")


@scenario("refuses-max-completion-tokens")
def refuses_max_completion_tokens(ask: Ask) -> Iterator[Step]:
    """Refuses max_completion_tokens; Anthropic: HELLO."""
    return _refusing(ask, "max_completion_tokens")


@scenario("refuses-temperature")
def refuses_temperature(ask: Ask) -> Iterator[Step]:
    """Refuses temperature (OpenAI: as an unsupported_value)."""
    return _refusing(ask, "temperature")


@scenario("refuses-top-p")
def refuses_top_p(ask: Ask) -> Iterator[Step]:
    """Refuses top_p."""
    return _refusing(ask, "top_p")


@scenario("refuses-stop")
def refuses_stop(ask: Ask) -> Iterator[Step]:
    """Refuses stop / stop_sequences."""
    return _refusing(ask, "stop")


@scenario("refuses-reasoning-effort")
def refuses_reasoning_effort(ask: Ask) -> Iterator[Step]:
    """Refuses reasoning_effort / thinking, then output_config."""
    return _refusing(ask, "reasoning_effort")


@scenario("refuses-stream-options")
def refuses_stream_options(ask: Ask) -> Iterator[Step]:
    """Refuses stream_options as Mistral does: 422, and `message` is an object; Anthropic: HELLO."""
    return _refusing(ask, "stream_options")


@scenario("refuses-stream")
def refuses_stream(ask: Ask) -> Iterator[Step]:
    """Refuses a stream to an organisation that is not verified, and answers whole; Anthropic: HELLO."""
    return _refusing(ask, "stream")


@scenario("refuses-all")
def refuses_all(ask: Ask) -> Iterator[Step]:
    """Refuses, one in each answer, max_tokens, temperature, top_p, stop, stream_options, reasoning_effort, stream."""
    return _refusing(ask, *(name for name in REFUSED if name != "max_completion_tokens"))


@scenario("refuses-extras")
def refuses_extras(ask: Ask) -> Iterator[Step]:
    """Refuses stream_options and max_completion_tokens in one answer, as Mistral: 422 {"detail":[…]}; Anthropic: HELLO."""
    had = [name for name in ("stream_options", "max_completion_tokens") if ask.api == "openai" and ask.has(name)]
    if had:
        yield Status(422, body={"detail": [_extra(ask, name) for name in had]})  # Gitlawb/openclaude#739
    else:
        yield from hello(ask)


@scenario("refuses-unrecognized")
def refuses_unrecognized(ask: Ask) -> Iterator[Step]:
    """Refuses max_completion_tokens, stream_options and reasoning_effort in one answer, as an older Azure does: 400 that
    names them in the message alone; Anthropic: HELLO."""
    names = ("max_completion_tokens", "stream_options", "reasoning_effort")
    had = [name for name in names if ask.api == "openai" and ask.has(name)]
    if had:
        plural = "s" if len(had) > 1 else ""
        yield Status(400, f"Unrecognized request argument{plural} supplied: {', '.join(had)}")  # openai/openai-python#1724
    else:
        yield from hello(ask)
