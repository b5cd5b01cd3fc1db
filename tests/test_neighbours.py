"""The neighbours are what they claim to be: both real SDKs accept the provider's wire, and fail as they really fail.

What the SDKs make of each failure (openai 3.54.0, anthropic 2.12.0) is what aistream's providers are built on; when a
new version behaves differently, this is the file that says so.
"""

import contextlib
import json
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any

import anthropic
import gevent
import httpx2
import openai
import pytest
import requests

from tests.neighbours import receiver as n8n_says
from tests.neighbours import scenarios
from tests.neighbours.provider import ProviderServer, shred
from tests.neighbours.receiver import Answer, Receiver
from tests.neighbours.scenarios import HELLO, REASONING_TOKENS, SEPARATOR, THOUGHTS, words
from tests.neighbours.wires import FAKE_ANTHROPIC_KEY, FAKE_KEY, REFUSAL_EXPLANATION, SECRETS

BOTH = pytest.mark.parametrize("family", ["gpt", "claude"])


@dataclass
class Heard:
    """What an SDK made of one stream. input_tokens is everything that was put in, also where a cache had it."""

    pieces: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    reasoning_field: str = ""
    refusal: str = ""
    arguments: str = ""
    finish: str | None = None
    done: bool = False
    input_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None
    error: Exception | None = None

    @property
    def text(self) -> str:
        return "".join(self.pieces)


@dataclass
class Clients:
    """Both SDKs, pointed at the provider, without retries of their own."""

    openai: openai.OpenAI
    anthropic: anthropic.Anthropic

    def hear(self, model: str, prompt: str = "Say hello to me", **options: Any) -> Heard:
        """One whole stream of `model`; an exception, from the call or from the iteration, is in `error`."""
        heard = Heard()
        messages: Any = [{"role": "user", "content": prompt}]
        try:
            if model.startswith("gpt"):
                self._hear_openai(model, messages, options, heard)
            else:
                self._hear_anthropic(model, messages, options, heard)
        except Exception as error:
            heard.error = error
        return heard

    def that_retry(self, times: int) -> "Clients":
        """The same with so many retries of their own."""
        return Clients(self.openai.with_options(max_retries=times), self.anthropic.with_options(max_retries=times))

    def first(self, model: str) -> Any:
        """The first event of a stream of `model`, which is left then."""
        messages: Any = [{"role": "user", "content": "hi"}]
        if model.startswith("gpt"):
            with self.openai.chat.completions.create(model=model, messages=messages, stream=True) as chunks:
                return next(chunks)
        with self.anthropic.messages.create(model=model, messages=messages, stream=True, max_tokens=9) as events:
            return next(events)

    def _hear_openai(self, model: str, messages: Any, options: dict[str, Any], heard: Heard) -> None:
        asked = {"stream_options": {"include_usage": True}} | options
        with self.openai.chat.completions.create(model=model, messages=messages, stream=True, **asked) as stream:
            for chunk in stream:
                if chunk.usage is not None:
                    given, made = chunk.usage.prompt_tokens_details, chunk.usage.completion_tokens_details
                    heard.input_tokens, heard.output_tokens = chunk.usage.prompt_tokens, chunk.usage.completion_tokens
                    heard.cached_tokens = given.cached_tokens if given else None
                    heard.reasoning_tokens = made.reasoning_tokens if made else None
                for choice in chunk.choices:
                    heard.finish = choice.finish_reason or heard.finish
                    delta = choice.delta
                    content: Any = delta.content
                    if isinstance(content, list):
                        self._hear_parts(content, heard)
                    elif content is not None and delta.role is None and not hasattr(delta, "annotations"):
                        heard.pieces.append(content)
                    heard.refusal += delta.refusal or ""
                    for name in ("reasoning_content", "reasoning"):
                        if (thought := getattr(delta, name, None)) is not None:
                            heard.reasoning.append(thought)
                            heard.reasoning_field = name
                    for call in delta.tool_calls or []:
                        heard.arguments += (call.function and call.function.arguments) or ""
        heard.done = heard.finish is not None

    def _hear_parts(self, parts: list[Any], heard: Heard) -> None:
        for part in parts:
            if part["type"] == "thinking":
                heard.reasoning.append("".join(text["text"] for text in part["thinking"]))
                heard.reasoning_field = "content"
            else:
                heard.pieces.append(part["text"])

    def _hear_anthropic(self, model: str, messages: Any, options: dict[str, Any], heard: Heard) -> None:
        asked = {"max_tokens": 4096} | options
        with self.anthropic.messages.create(model=model, messages=messages, stream=True, **asked) as stream:
            for event in stream:
                if event.type == "content_block_delta":
                    if event.delta.type == "text_delta":
                        heard.pieces.append(event.delta.text)
                    elif event.delta.type == "thinking_delta":
                        heard.reasoning.append(event.delta.thinking)
                    elif event.delta.type == "input_json_delta":
                        heard.arguments += event.delta.partial_json
                elif event.type == "message_delta":
                    heard.finish = event.delta.stop_reason
                    if event.delta.stop_details is not None:
                        heard.refusal = event.delta.stop_details.explanation or ""
                    if (usage := getattr(event, "usage", None)) is not None:
                        heard.cached_tokens = usage.cache_read_input_tokens
                        heard.input_tokens = usage.input_tokens + usage.cache_read_input_tokens
                        heard.output_tokens = usage.output_tokens
                        details = usage.output_tokens_details
                        heard.reasoning_tokens = details.thinking_tokens if details else None
                elif event.type == "message_stop":
                    heard.done = True


def _post(provider: ProviderServer, model: str) -> requests.Response:
    """The answer to a small request as it comes over the wire; to be closed."""
    path = {"gpt": "/v1/chat/completions", "claude": "/v1/messages"}[model.split("-")[0]]
    body = {"model": model, "max_tokens": 9, "stream": True, "messages": [{"role": "user", "content": "hi"}]}
    headers = {"Authorization": "Bearer x", "anthropic-version": "2023-06-01"}
    return requests.post(provider.url + path, json=body, headers=headers, timeout=5, stream=True)


def _headers(heard: Heard) -> httpx2.Headers:
    """The headers of an error status."""
    assert isinstance(heard.error, openai.APIStatusError | anthropic.APIStatusError)
    return heard.error.response.headers


@pytest.fixture(scope="module")
def process() -> Iterator[ProviderServer]:
    with ProviderServer() as provider:
        yield provider


@pytest.fixture
def provider(process: ProviderServer) -> ProviderServer:
    process.reset()
    return process


@contextlib.contextmanager
def clients_of(provider: ProviderServer) -> Iterator[Clients]:
    """Both SDKs, pointed at this provider."""
    with (
        openai.OpenAI(api_key="sk-mine", base_url=provider.openai_url, max_retries=0) as first,
        anthropic.Anthropic(api_key="sk-ant-mine", base_url=provider.anthropic_url, max_retries=0) as second,
    ):
        yield Clients(first, second)


@pytest.fixture(scope="module")
def clients(process: ProviderServer) -> Iterator[Clients]:
    with clients_of(process) as clients:
        yield clients


@pytest.fixture
def n8n() -> Iterator[Receiver]:
    with Receiver() as receiver:
        yield receiver


# The provider: answers that are complete


@BOTH
def test_a_plain_answer_has_its_text_its_usage_and_its_ending(clients: Clients, provider: ProviderServer, family: str) -> None:
    heard = clients.hear(f"{family}-test-hello", "four words in all")

    assert heard.pieces == list(HELLO)
    assert heard.finish == {"gpt": "stop", "claude": "end_turn"}[family]
    assert heard.done and heard.error is None
    assert (heard.input_tokens, heard.output_tokens) == (4, len(HELLO))


@BOTH
def test_a_name_chooses_the_scenario_whatever_its_case_and_prefix(clients: Clients, family: str) -> None:
    heard = clients.hear(f"{family}-5/Vendor-TEST-Long-n3-i77")

    assert heard.pieces == ["word1 ", "word2 ", "word3 "]


@BOTH
def test_a_prompt_decides_the_deltas_that_come_back(clients: Clients, family: str) -> None:
    pieces = ["", " a", "\r", "\n", "", "x\u2028y", "naïve 😀", "\x00", "[DONE]", "data: z\n\n", " "]

    for scenario in ("say", "escaped", "bytes"):
        heard = clients.hear(f"{family}-test-{scenario}", SEPARATOR.join(pieces))

        assert heard.pieces == pieces
        assert heard.output_tokens == len(pieces)


@BOTH
def test_only_the_last_user_message_is_said_and_all_messages_are_counted(clients: Clients, family: str) -> None:
    turns: Any = [
        {"role": "user", "content": "one two"},
        {"role": "assistant", "content": "three"},
        {"role": "user", "content": [{"type": "text", "text": "four"}, {"type": "text", "text": " five"}]},
    ]

    system: Any = [{"role": "system", "content": "be brief"}] if family == "gpt" else "be brief"
    if family == "gpt":
        whole = clients.openai.chat.completions.create(model="gpt-test-say", messages=system + turns)
        text = whole.choices[0].message.content
        tokens = whole.usage.prompt_tokens if whole.usage else None
    else:
        message = clients.anthropic.messages.create(model="claude-test-say", max_tokens=9, system=system, messages=turns)
        text = "".join(block.text for block in message.content if block.type == "text")
        tokens = message.usage.input_tokens

    assert text == "four five"
    assert tokens == 7


@BOTH
def test_an_answer_that_is_not_streamed_is_whole(clients: Clients, family: str) -> None:
    messages: Any = [{"role": "user", "content": "hi"}]

    if family == "gpt":
        whole = clients.openai.chat.completions.create(model="gpt-test-length-n4", messages=messages)
        answer: tuple[Any, Any] = whole.choices[0].message.content, whole.choices[0].finish_reason
        tokens = whole.usage.completion_tokens if whole.usage else None
    else:
        message = clients.anthropic.messages.create(model="claude-test-length-n4", max_tokens=4, messages=messages)
        answer = getattr(message.content[0], "text", None), message.stop_reason
        tokens = message.usage.output_tokens

    assert answer == ("".join(words(4)), {"gpt": "length", "claude": "max_tokens"}[family])
    assert tokens == 4


def test_bytes_are_cut_inside_characters_inside_lines_and_between_newlines() -> None:
    event = "data: ä😀\n\n".encode()

    pieces = shred(event)

    assert b"".join(pieces) == event
    assert pieces[-2:] == [b"\n", b"\n"]
    assert [len(piece) for piece in pieces] == [
        6,
        1,
        2,
        1,
        1,
        1,
        1,
        1,
    ]  # "data: ", the two bytes of ä (the second with 1 of 4), …


@BOTH
def test_each_other_ending_is_told_apart(clients: Clients, family: str) -> None:
    length = clients.hear(f"{family}-test-length")
    tools = clients.hear(f"{family}-test-tool-calls")
    refusal = clients.hear(f"{family}-test-refusal")
    filtered = clients.hear(f"{family}-test-content-filter")
    empty = clients.hear(f"{family}-test-empty")
    paused = clients.hear(f"{family}-test-pause-turn-k1")
    full = clients.hear(f"{family}-test-context-window-k1")
    no_done = clients.hear(f"{family}-test-no-done")

    assert length.finish == {"gpt": "length", "claude": "max_tokens"}[family]
    assert (length.text, length.output_tokens) == ("".join(words(5)), 5)
    assert tools.finish == {"gpt": "tool_calls", "claude": "tool_use"}[family]
    assert tools.arguments == '{"city":"Bern"}'
    assert refusal.finish == {"gpt": "stop", "claude": "refusal"}[family]
    assert refusal.text == ""
    assert refusal.refusal == {"gpt": "I'm sorry, I can't help with that.", "claude": REFUSAL_EXPLANATION}[family]
    assert filtered.text == "".join(words(3))
    assert (filtered.finish == "content_filter") == (family == "gpt")
    assert (filtered.error is None) == (family == "gpt")
    assert (empty.text, empty.output_tokens, empty.done) == ("", 0, True)
    assert (paused.text, paused.finish) == ("word1 ", {"gpt": "function_call", "claude": "pause_turn"}[family])
    assert (full.text, full.finish) == ("word1 ", {"gpt": "length", "claude": "model_context_window_exceeded"}[family])
    assert (no_done.finish is not None, no_done.done) == (True, family == "gpt")


@BOTH
@pytest.mark.parametrize(
    ("scenario", "name"),
    [("reasoning", "reasoning_content"), ("reasoning-field", "reasoning"), ("reasoning-parts", "content")],
)
def test_reasoning_comes_apart_from_the_text(clients: Clients, family: str, scenario: str, name: str) -> None:
    heard = clients.hear(f"{family}-test-{scenario}")

    assert heard.reasoning == list(THOUGHTS)
    assert heard.reasoning_field == {"gpt": name, "claude": ""}[family]
    assert heard.pieces == list(HELLO)
    assert heard.output_tokens == len(THOUGHTS) + len(HELLO)


@pytest.mark.parametrize(
    ("scenario", "fields"),
    [
        ("reasoning", {"content": "".join(HELLO), "reasoning_content": "".join(THOUGHTS)}),
        ("reasoning-field", {"content": "".join(HELLO), "reasoning": "".join(THOUGHTS)}),
        (
            "reasoning-parts",
            {
                "content": [
                    {"type": "thinking", "thinking": [{"type": "text", "text": "".join(THOUGHTS)}]},
                    {"type": "text", "text": "".join(HELLO)},
                ]
            },
        ),
    ],
)
def test_reasoning_of_openai_is_apart_in_a_whole_answer_too(clients: Clients, scenario: str, fields: dict[str, Any]) -> None:
    messages: Any = [{"role": "user", "content": "hi"}]

    message = clients.openai.chat.completions.create(model=f"gpt-test-{scenario}", messages=messages).choices[0].message

    assert {name: getattr(message, name) for name in fields} == fields


@BOTH
def test_a_surrogate_pair_split_over_two_deltas_is_one_character_again(clients: Clients, family: str) -> None:
    heard = clients.hear(f"{family}-test-surrogates")

    assert len(heard.pieces) == 4
    assert heard.text.encode("utf-16", "surrogatepass").decode("utf-16") == "a 😀 b"


@BOTH
def test_unknown_events_do_not_disturb_the_text(clients: Clients, family: str) -> None:
    heard = clients.hear(f"{family}-test-unknown")

    assert heard.pieces == list(HELLO)
    assert heard.done and heard.error is None


@BOTH
def test_usage_can_be_missing_or_detailed(clients: Clients, family: str) -> None:
    missing = clients.hear(f"{family}-test-no-usage")
    detailed = clients.hear(f"{family}-test-usage-details", "five words are counted here")

    assert (missing.text, missing.input_tokens, missing.output_tokens) == ("".join(HELLO), None, None)
    assert (detailed.input_tokens, detailed.cached_tokens) == (5, 2)
    assert (detailed.output_tokens, detailed.reasoning_tokens) == (len(HELLO) + REASONING_TOKENS, REASONING_TOKENS)


def test_usage_can_come_in_every_chunk_of_openai_and_then_no_more(clients: Clients) -> None:
    broken = clients.hear("gpt-test-usage-each-k2", "three words here")
    complete = clients.hear("gpt-test-usage-each-n2-k3", "three words here", stream_options=openai.omit)
    nothing = clients.hear("gpt-test-usage-each-k0", "three words here")

    assert (broken.text, broken.finish, broken.error) == ("word1 word2 ", None, None)
    assert (broken.input_tokens, broken.output_tokens) == (3, 2)
    assert (complete.finish, complete.input_tokens, complete.output_tokens) == ("stop", 3, 2)
    assert (nothing.text, nothing.input_tokens, nothing.output_tokens) == ("", 3, 0)


def test_anthropic_that_breaks_off_has_told_its_input_alone(clients: Clients) -> None:
    broken = clients.hear("claude-test-usage-each-k2")
    complete = clients.hear("claude-test-usage-each-n2-k3")

    assert (broken.text, broken.finish, broken.output_tokens) == ("word1 word2 ", None, None)
    assert (complete.finish, complete.output_tokens) == ("end_turn", 2)


def test_openai_sends_usage_only_when_asked(clients: Clients) -> None:
    heard = clients.hear("gpt-test-hello", stream_options={})

    assert heard.done
    assert heard.input_tokens is None


@BOTH
def test_a_delta_can_be_as_large_as_100_kib(clients: Clients, family: str) -> None:
    heard = clients.hear(f"{family}-test-big")

    assert [len(piece) for piece in heard.pieces] == [100 * 1024]


@BOTH
def test_delays_stand_before_the_first_delta_and_between_the_others(clients: Clients, family: str) -> None:
    started = time.monotonic()

    heard = clients.hear(f"{family}-test-slow-n3-d30-f100")

    assert heard.text == "".join(words(3))
    assert 0.16 <= time.monotonic() - started < 2


# The provider: answers that break


@BOTH
def test_a_clean_end_without_a_finish_marker_raises_nothing(clients: Clients, provider: ProviderServer, family: str) -> None:
    heard = clients.hear(f"{family}-test-truncated-k2")

    assert heard.text == "".join(words(2))
    assert heard.error is None
    assert not heard.done and heard.finish is None
    assert provider.requests()[-1].ended == "broken"


@BOTH
@pytest.mark.parametrize("scenario", ["truncated", "hangup", "cut", "stall", "garbage", "error-event"])
def test_an_answer_can_break_before_its_first_word(
    clients: Clients, provider: ProviderServer, family: str, scenario: str
) -> None:
    model = f"{family}-test-{scenario}-k0"

    first = clients.first(model)
    heard = clients.hear(model, timeout=0.2)

    assert first.choices[0].delta.role == "assistant" if family == "gpt" else first.type == "message_start"
    assert (heard.text, heard.finish, heard.done) == ("", None, False)
    assert (heard.error is None) == (scenario == "truncated")
    assert provider.requests()[-1].deltas == 0


@BOTH
@pytest.mark.parametrize(("scenario", "raw"), [("hangup", httpx2.RemoteProtocolError), ("cut", httpx2.ReadError)])
def test_a_broken_connection_is_wrapped_by_openai_and_raw_from_anthropic(
    clients: Clients, family: str, scenario: str, raw: type[Exception]
) -> None:
    heard = clients.hear(f"{family}-test-{scenario}-k2")

    assert heard.text == "".join(words(2))
    if family == "gpt":
        assert type(heard.error) is openai.APIConnectionError
        assert type(heard.error.__cause__) is raw
    else:
        assert type(heard.error) is raw


@BOTH
def test_a_reset_before_the_answer_is_a_connection_error_of_the_sdk(clients: Clients, family: str) -> None:
    heard = clients.hear(f"{family}-test-reset")

    assert isinstance(heard.error, openai.APIConnectionError | anthropic.APIConnectionError)


def test_an_error_event_of_openai_has_no_status(clients: Clients) -> None:
    heard = clients.hear("gpt-test-error-event-k2")

    assert heard.text == "".join(words(2))
    assert type(heard.error) is openai.APIError
    assert heard.error.code == "server_error"
    assert FAKE_KEY in str(heard.error)


def test_an_error_event_of_anthropic_has_status_200_and_tells_its_type_in_the_body(clients: Clients) -> None:
    heard = clients.hear("claude-test-error-event-k2")

    assert heard.text == "".join(words(2))
    assert isinstance(heard.error, anthropic.APIStatusError)
    assert heard.error.status_code == 200
    assert isinstance(heard.error.body, dict)
    assert heard.error.body["error"]["type"] == "overloaded_error"


@BOTH
def test_an_event_that_is_no_json_is_a_value_error(clients: Clients, family: str) -> None:
    heard = clients.hear(f"{family}-test-garbage-k1")

    assert heard.text == "word1 "
    assert isinstance(heard.error, json.JSONDecodeError)


def test_a_finish_reason_can_say_that_openai_failed(clients: Clients) -> None:
    bare = clients.hear("gpt-test-finish-error-k2")
    told = clients.hear("gpt-test-finish-error-k2-e1")

    assert (bare.text, bare.finish, bare.error) == ("word1 word2 ", "error", None)
    assert bare.output_tokens == 2
    assert (told.text, told.finish, type(told.error)) == ("word1 word2 ", None, openai.APIError)
    assert "The server had an error" in str(told.error)


def test_anthropic_that_fails_has_an_error_of_the_api(clients: Clients) -> None:
    heard = clients.hear("claude-test-finish-error-k2")

    assert heard.text == "word1 word2 "
    assert isinstance(heard.error, anthropic.APIStatusError)
    assert isinstance(heard.error.body, dict)
    assert heard.error.body["error"]["type"] == "api_error"


@BOTH
def test_pings_keep_a_client_waiting_beyond_its_read_timeout(clients: Clients, provider: ProviderServer, family: str) -> None:
    with pytest.raises(gevent.Timeout), gevent.Timeout(0.5):
        clients.hear(f"{family}-test-pinging-k1", timeout=0.2)
    provider.wait_for_open_streams(0)

    (asked,) = provider.requests()
    assert asked.client_left and asked.deltas == 1


@BOTH
def test_pings_are_no_content(provider: ProviderServer, family: str) -> None:
    with _post(provider, f"{family}-test-pinging") as answer:
        lines = filter(None, answer.iter_lines(1))
        seen = [next(lines) for _ in range(4)]

    if family == "gpt":
        assert seen == [b": OPENROUTER PROCESSING"] * 4
    else:
        assert seen[0] == b"event: message_start"
        assert seen[2:] == [b"event: ping", b'data: {"type":"ping"}']


@BOTH
def test_a_page_of_html_is_an_empty_stream_for_both_sdks(clients: Clients, provider: ProviderServer, family: str) -> None:
    heard = clients.hear(f"{family}-test-html")
    with _post(provider, f"{family}-test-html") as answer:
        assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
        assert answer.status_code == 200

    assert (heard.text, heard.finish, heard.error) == ("", None, None)
    assert [asked.ended for asked in provider.requests()] == ["broken", "broken"]


@BOTH
@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 408, 409, 413, 422, 429, 500, 502, 503, 504, 529])
def test_a_status_before_the_stream_is_a_status_error_with_a_secret_inside(
    clients: Clients, provider: ProviderServer, family: str, status: int
) -> None:
    heard = clients.hear(f"{family}-test-status-s{status}")

    assert isinstance(heard.error, openai.APIStatusError | anthropic.APIStatusError)
    assert heard.error.status_code == status
    assert heard.error.response.headers.get("retry-after") == ("1" if status == 429 else None)
    everything = heard.error.response.text + str(heard.error.response.headers)
    assert any(secret in everything for secret in SECRETS)
    assert provider.requests()[-1].ended == "refused"


@BOTH
def test_what_a_status_says_about_retrying_is_in_its_headers(clients: Clients, family: str) -> None:
    seconds = _headers(clients.hear(f"{family}-test-status-s503-r7-y1"))
    milliseconds = _headers(clients.hear(f"{family}-test-status-s429-m250-y0"))
    date = _headers(clients.hear(f"{family}-test-quota-a90"))["retry-after"]

    assert (seconds["retry-after"], seconds["x-should-retry"]) == ("7", "true")
    assert (milliseconds["retry-after-ms"], milliseconds["x-should-retry"]) == ("250", "false")
    assert "retry-after" not in milliseconds
    assert 88 < parsedate_to_datetime(date).timestamp() - time.time() < 92


@BOTH
@pytest.mark.parametrize(
    ("scenario", "times"),
    [("status-s503-y0-x1", 1), ("status-s400-y1-m1-x1", 2), ("status-s529-m1-x2", 3)],
)
def test_both_sdks_obey_those_headers(clients: Clients, provider: ProviderServer, family: str, scenario: str, times: int) -> None:
    model = f"{family}-test-{scenario}"

    heard = clients.that_retry(2).hear(model)

    assert len(provider.requests(model)) == times
    assert (heard.error is None) == (times > 1)


def test_openai_does_not_wait_longer_than_two_minutes(clients: Clients, provider: ProviderServer) -> None:
    heard = clients.that_retry(2).hear("gpt-test-status-s429-r121-x1")

    assert isinstance(heard.error, openai.RateLimitError)
    assert len(provider.requests()) == 1


def test_openai_names_what_is_wrong_by_a_code(clients: Clients) -> None:
    quota = clients.hear("gpt-test-quota").error
    long = clients.hear("gpt-test-context-length").error
    filtered = clients.hear("gpt-test-filtered-input").error

    assert isinstance(quota, openai.RateLimitError)
    assert (quota.type, quota.code, quota.param) == ("insufficient_quota", "insufficient_quota", None)
    assert "retry-after" not in quota.response.headers
    assert isinstance(long, openai.BadRequestError)
    assert (long.type, long.code, long.param) == ("invalid_request_error", "context_length_exceeded", "messages")
    assert isinstance(filtered, openai.BadRequestError)
    assert (filtered.type, filtered.code, filtered.param) == (None, "content_filter", "prompt")


def test_anthropic_names_what_is_wrong_by_a_message(clients: Clients) -> None:
    quota = clients.hear("claude-test-quota").error
    long = clients.hear("claude-test-context-length").error
    filtered = clients.hear("claude-test-filtered-input").error

    assert isinstance(quota, anthropic.APIStatusError)
    assert (quota.status_code, quota.type) == (402, "billing_error")
    assert isinstance(long, anthropic.BadRequestError) and isinstance(filtered, anthropic.BadRequestError)
    assert "prompt is too long: 210000 tokens > 200000 maximum" in str(long)
    assert "Output blocked by content filtering policy" in str(filtered)


@BOTH
def test_a_model_can_fail_first_and_then_answer(clients: Clients, provider: ProviderServer, family: str) -> None:
    model = f"{family}-test-status-s503-x2"

    broken = [clients.hear(model).error, clients.hear(model).error]
    heard = clients.hear(model)

    assert all(isinstance(error, openai.InternalServerError | anthropic.APIStatusError) for error in broken)
    assert heard.pieces == list(HELLO)
    assert [asked.ended for asked in provider.requests(model)] == ["refused", "refused", "complete"]


@BOTH
@pytest.mark.parametrize(("scenario", "text"), [("silence", ""), ("no-answer", ""), ("stall-k1", "word1 ")])
def test_silence_is_broken_only_by_the_clients_own_timeout(
    clients: Clients, provider: ProviderServer, family: str, scenario: str, text: str
) -> None:
    heard = clients.hear(f"{family}-test-{scenario}", timeout=0.2)

    assert heard.text == text
    assert isinstance(heard.error, openai.APITimeoutError | anthropic.APITimeoutError | httpx2.ReadTimeout)
    provider.wait_for_open_streams(0)
    assert provider.requests()[-1].client_left


@BOTH
def test_a_careless_request_is_refused_as_the_real_provider_would(
    clients: Clients, provider: ProviderServer, family: str
) -> None:
    unknown = clients.hear(f"{family}-5")
    no_messages = requests.post(
        provider.url + {"gpt": "/v1/chat/completions", "claude": "/v1/messages"}[family],
        json={"model": f"{family}-test-hello", "messages": [], "stream": True},
        headers={"Authorization": "Bearer x", "anthropic-version": "2023-06-01"},
        timeout=5,
    )
    no_key = requests.post(no_messages.url, json={"model": f"{family}-test-hello"}, timeout=5)

    assert isinstance(unknown.error, openai.NotFoundError | anthropic.NotFoundError)
    assert (no_messages.status_code, no_key.status_code) == (400, 401)


def test_anthropic_wants_max_tokens_no_system_role_and_no_sampling_parameters(clients: Clients) -> None:
    old = {"anthropic-version": "2023-06-01"}
    system: Any = [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]

    too_few = clients.hear("claude-test-hello", max_tokens=0)
    warm = clients.hear("claude-test-hello", extra_body={"temperature": 1.0})  # 2.12.0 has no such keyword
    warm_of_old = clients.hear("claude-test-hello", extra_body={"temperature": 1.0}, extra_headers=old)
    too_warm_of_old = clients.hear("claude-test-hello", extra_body={"temperature": 1.5}, extra_headers=old)
    with pytest.raises(anthropic.BadRequestError, match="system"):
        clients.anthropic.messages.create(model="claude-test-hello", max_tokens=5, messages=system)

    assert isinstance(too_few.error, anthropic.BadRequestError)
    assert "temperature: Extra inputs are not permitted" in str(warm.error)
    assert warm_of_old.error is None
    assert isinstance(too_warm_of_old.error, anthropic.BadRequestError)


# The provider: parameters that it refuses

PARAMETERS: dict[str, Any] = {
    "max_tokens": 5,
    "max_completion_tokens": 5,
    "temperature": 0.5,
    "top_p": 0.9,
    "stop": ["x"],
    "stream_options": {"include_usage": True},
    "reasoning_effort": "low",
}


@pytest.mark.parametrize(
    ("parameter", "code"),
    [
        ("max_tokens", "unsupported_parameter"),
        ("max_completion_tokens", "unsupported_parameter"),
        ("temperature", "unsupported_value"),
        ("top_p", "unsupported_parameter"),
        ("stop", "unsupported_parameter"),
        ("reasoning_effort", "unsupported_parameter"),
    ],
)
def test_openai_refuses_one_parameter_and_answers_without_it(clients: Clients, parameter: str, code: str) -> None:
    model = f"gpt-test-refuses-{parameter.replace('_', '-')}"
    others = {name: value for name, value in PARAMETERS.items() if name != parameter}

    refused = clients.hear(model, **PARAMETERS).error
    heard = clients.hear(model, **others)

    assert isinstance(refused, openai.BadRequestError)
    assert (refused.type, refused.code, refused.param) == ("invalid_request_error", code, parameter)
    assert f"'{parameter}'" in str(refused)
    assert (heard.pieces, heard.finish, heard.output_tokens) == (list(HELLO), "stop", len(HELLO))


def test_openai_says_what_it_wants_instead(clients: Clients) -> None:
    limit = clients.hear("gpt-test-refuses-max-tokens", max_tokens=5).error
    warm = clients.hear("gpt-test-refuses-temperature", temperature=0.5).error

    assert "Use 'max_completion_tokens' instead." in str(limit)
    assert "'temperature' does not support 0.5 with this model. Only the default (1) value is supported." in str(warm)


def test_mistral_refuses_extras_with_an_object_for_a_message_which_openai_does_not_show(clients: Clients) -> None:
    refused = clients.hear("gpt-test-refuses-stream-options").error
    heard = clients.hear("gpt-test-refuses-stream-options", stream_options=openai.omit)

    assert isinstance(refused, openai.UnprocessableEntityError)
    assert str(refused) == "Error code: 422"
    assert isinstance(refused.body, dict)
    (detail,) = refused.body["message"]["detail"]
    assert (detail["type"], detail["loc"]) == ("extra_forbidden", ["body", "stream_options"])
    assert detail["input"] == {"include_usage": True}
    assert (heard.pieces, heard.output_tokens) == (list(HELLO), None)


def test_mistral_names_all_extras_at_once(clients: Clients) -> None:
    both = clients.hear("gpt-test-refuses-extras", **PARAMETERS).error
    one = clients.hear("gpt-test-refuses-extras").error
    none = clients.hear("gpt-test-refuses-extras", stream_options=openai.omit)

    assert isinstance(both, openai.UnprocessableEntityError) and isinstance(both.body, dict)
    assert [detail["loc"][1] for detail in both.body["detail"]] == ["stream_options", "max_completion_tokens"]
    assert isinstance(one, openai.UnprocessableEntityError) and isinstance(one.body, dict)
    assert [detail["loc"][1] for detail in one.body["detail"]] == ["stream_options"]
    assert none.pieces == list(HELLO)


def test_an_older_azure_names_what_it_does_not_know_in_a_sentence(clients: Clients) -> None:
    refused = clients.hear("gpt-test-refuses-unrecognized", **PARAMETERS).error
    one = clients.hear("gpt-test-refuses-unrecognized").error

    assert isinstance(refused, openai.BadRequestError)
    assert (refused.code, refused.param) == (None, None)
    expected = "Unrecognized request arguments supplied: max_completion_tokens, stream_options, reasoning_effort"
    assert expected in str(refused)
    assert "Unrecognized request argument supplied: stream_options" in str(one)


def test_a_stream_can_be_refused_and_a_whole_answer_given(clients: Clients) -> None:
    messages: Any = [{"role": "user", "content": "hi"}]

    refused = clients.hear("gpt-test-refuses-stream").error
    whole = clients.openai.chat.completions.create(model="gpt-test-refuses-stream", messages=messages)

    assert isinstance(refused, openai.BadRequestError)
    assert (refused.code, refused.param) == ("unsupported_value", "stream")
    assert "Your organization must be verified to stream this model." in str(refused)
    assert whole.choices[0].message.content == "".join(HELLO)


def test_everything_can_be_refused_one_after_the_other(clients: Clients) -> None:
    asked = PARAMETERS | {"model": "gpt-test-refuses-all", "messages": [{"role": "user", "content": "hi"}], "stream": True}
    refused = []

    for _ in range(7):
        with pytest.raises(openai.APIStatusError) as raised:
            clients.openai.chat.completions.create(**asked)
        refused.append(raised.value.param or "stream_options")  # which Mistral's form does not put there
        del asked[refused[-1]]
    whole = clients.openai.chat.completions.create(**asked)

    assert refused == ["max_tokens", "temperature", "top_p", "stop", "stream_options", "reasoning_effort", "stream"]
    assert whole.choices[0].message.content == "".join(HELLO)


ANTHROPIC_PARAMETERS: dict[str, Any] = {
    "temperature": 0.5,
    "top_p": 0.9,
    "stop_sequences": ["x"],
    "thinking": {"type": "adaptive"},
    "output_config": {"effort": "low"},
}


@pytest.mark.parametrize(
    ("scenario", "parameters"),
    [
        ("refuses-temperature", ["temperature"]),
        ("refuses-top-p", ["top_p"]),
        ("refuses-stop", ["stop_sequences"]),
        ("refuses-reasoning-effort", ["thinking", "output_config"]),
        ("refuses-all", ["temperature", "top_p", "stop_sequences", "thinking", "output_config"]),
        ("refuses-max-tokens", []),
        ("refuses-max-completion-tokens", []),
        ("refuses-stream-options", []),
        ("refuses-stream", []),
        ("refuses-extras", []),
        ("refuses-unrecognized", []),
    ],
)
def test_anthropic_refuses_its_own_parameters_and_answers_without_them(
    clients: Clients, scenario: str, parameters: list[str]
) -> None:
    asked = dict(ANTHROPIC_PARAMETERS)
    old = {"anthropic-version": "2023-06-01"}  # a newer one refuses the first two from everybody

    for parameter in parameters:
        refused = clients.hear(f"claude-test-{scenario}", extra_body=asked, extra_headers=old).error
        assert isinstance(refused, anthropic.BadRequestError)
        assert f"'{parameter}: Extra inputs are not permitted'" in str(refused)
        del asked[parameter]
    heard = clients.hear(f"claude-test-{scenario}", extra_body=asked, extra_headers=old)

    assert (heard.pieces, heard.finish, heard.output_tokens) == (list(HELLO), "end_turn", len(HELLO))


# The provider: what a test can see and control


@BOTH
def test_a_client_that_leaves_is_noticed_at_once_with_what_it_had_got(
    clients: Clients, provider: ProviderServer, family: str
) -> None:
    model = f"{family}-test-hold-n5-k2"
    heard: list[Heard] = []
    thread = threading.Thread(target=lambda: heard.append(clients.hear(model, timeout=0.3)))

    thread.start()
    provider.wait_for_open_streams(1)
    thread.join()
    provider.wait_for_open_streams(0)

    (asked,) = provider.requests(model)
    assert heard[0].text == "word1 word2 "
    assert asked.client_left and asked.deltas == 2
    assert asked.ended_at is not None and asked.ended_at - asked.started_at < 2


@BOTH
def test_a_model_that_holds_goes_on_when_it_is_released(clients: Clients, provider: ProviderServer, family: str) -> None:
    heard: list[Heard] = []
    thread = threading.Thread(target=lambda: heard.append(clients.hear(f"{family}-test-hold-n4-k1")))

    thread.start()
    until = time.monotonic() + 5
    while not any(asked.deltas == 1 for asked in provider.requests()) and time.monotonic() < until:
        time.sleep(0.01)
    provider.release()
    thread.join(timeout=5)

    assert heard[0].text == "".join(words(4))
    assert provider.requests()[0].ended == "complete"


@BOTH
def test_a_request_is_recorded_with_its_body_and_its_key(clients: Clients, provider: ProviderServer, family: str) -> None:
    clients.hear(f"{family}-test-hello", "what I asked", extra_body={"stop_sequences": ["x"]})

    (asked,) = provider.requests()
    assert asked.body["stop_sequences"] == ["x"]
    assert asked.body["messages"] == [{"role": "user", "content": "what I asked"}]
    assert asked.headers["authorization"] == {"gpt": "Bearer sk-mine", "claude": "Bearer sk-ant-mine"}[family]
    assert (asked.ended, asked.deltas) == ("complete", len(HELLO))


@BOTH
def test_requests_share_a_connection_as_with_the_real_providers(provider: ProviderServer, family: str) -> None:
    path = {"gpt": "/v1/chat/completions", "claude": "/v1/messages"}[family]
    body = {"model": f"{family}-test-hello", "max_tokens": 9, "stream": True}
    body["messages"] = [{"role": "user", "content": "hi"}]
    headers = {"Authorization": "Bearer x", "anthropic-version": "2023-06-01"}

    with requests.Session() as session:
        first = session.post(provider.url + path, json=body, headers=headers, timeout=5)
        second = session.post(provider.url + path, json=body, headers=headers, timeout=5)

    assert first.status_code == second.status_code == 200
    ports = {asked.client_port for asked in provider.requests()}
    assert len(provider.requests()) == 2 and len(ports) == 1


def test_both_sdks_can_list_the_models(clients: Clients) -> None:
    assert {model.id for model in clients.openai.models.list()} == {f"gpt-test-{name}" for name in scenarios.SCENARIOS}
    assert "claude-test-say" in {model.id for model in clients.anthropic.models.list()}


def test_the_list_of_models_wants_a_key_and_can_fail(clients: Clients, provider: ProviderServer) -> None:
    url = f"{provider.openai_url}/models"
    no_key = [requests.get(url, headers=headers, timeout=5) for headers in ({}, {"anthropic-version": "2023-06-01"})]

    provider.answer_models(503)
    with pytest.raises(openai.InternalServerError):
        clients.openai.models.list()
    with pytest.raises(anthropic.APIStatusError):
        clients.anthropic.models.list()
    provider.answer_models(0)
    with pytest.raises(openai.APITimeoutError):
        clients.openai.models.list(timeout=0.1)
    provider.reset()

    assert [answer.status_code for answer in no_key] == [401, 401]
    assert no_key[0].json()["error"]["code"] == "invalid_api_key"
    assert no_key[1].json()["error"]["type"] == "authentication_error"
    assert clients.openai.models.list().data


def test_hundred_streams_are_written_at_the_same_time(clients: Clients, provider: ProviderServer) -> None:
    heard: list[Heard] = []
    model = "gpt-test-hold-n3-k1"
    threads = [threading.Thread(target=lambda: heard.append(clients.hear(model))) for _ in range(100)]

    for thread in threads:
        thread.start()
    provider.wait_for_open_streams(100, timeout=10)
    until = time.monotonic() + 5
    while any(asked.deltas < 1 for asked in provider.requests(model)) and time.monotonic() < until:
        time.sleep(0.05)
    provider.release()
    for thread in threads:
        thread.join(timeout=10)

    assert [one.text for one in heard] == ["".join(words(3))] * 100


def test_the_provider_ends_when_its_input_is_closed() -> None:
    provider = ProviderServer()
    provider.start()
    port = int(provider.url.rpartition(":")[2])

    provider.stop()

    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=1)


def test_every_scenario_is_listed_with_what_it_does() -> None:
    lines = scenarios.docs().splitlines()

    assert [line.split()[0] for line in lines] == list(scenarios.SCENARIOS)
    assert all(len(line.split()) > 2 for line in lines)
    assert FAKE_ANTHROPIC_KEY in SECRETS


# The provider: over TLS


@pytest.fixture(scope="module")
def tls_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProviderServer]:
    with ProviderServer(tls=tmp_path_factory.mktemp("ca")) as provider:
        yield provider


@pytest.fixture
def tls(tls_process: ProviderServer) -> ProviderServer:
    tls_process.reset()
    return tls_process


@pytest.fixture(scope="module")
def tls_clients(tls_process: ProviderServer) -> Iterator[Clients]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", tls_process.environ["SSL_CERT_FILE"])
        with clients_of(tls_process) as clients:
            yield clients


@BOTH
def test_an_answer_comes_over_tls_where_its_ca_is_trusted(tls_clients: Clients, tls: ProviderServer, family: str) -> None:
    heard = tls_clients.hear(f"{family}-test-hello")

    assert tls.url.startswith("https://localhost:")
    assert (heard.pieces, heard.done, heard.error) == (list(HELLO), True, None)
    assert tls.requests()[-1].ended == "complete"


@BOTH
def test_a_ca_that_is_not_trusted_is_a_connection_error(
    tls: ProviderServer, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)

    with clients_of(tls) as clients:
        error = clients.hear(f"{family}-test-hello").error

    assert isinstance(error, openai.APIConnectionError | anthropic.APIConnectionError)
    assert isinstance(error.__cause__, httpx2.ConnectError)
    assert "CERTIFICATE_VERIFY_FAILED" in str(error.__cause__)
    assert tls.requests() == []


@BOTH
@pytest.mark.parametrize("scenario", ["hangup", "cut"])
def test_over_tls_a_reset_looks_like_a_hangup_to_both_sdks(tls_clients: Clients, family: str, scenario: str) -> None:
    heard = tls_clients.hear(f"{family}-test-{scenario}-k2")

    assert heard.text == "".join(words(2))
    assert type(heard.error) is {"gpt": openai.APIConnectionError, "claude": httpx2.RemoteProtocolError}[family]
    raw = heard.error.__cause__ if isinstance(heard.error, openai.APIConnectionError) else heard.error
    assert isinstance(raw, httpx2.RemoteProtocolError) and "incomplete chunked read" in str(raw)


@BOTH
def test_over_tls_a_client_that_leaves_is_noticed(tls_clients: Clients, tls: ProviderServer, family: str) -> None:
    heard = tls_clients.hear(f"{family}-test-stall-k1", timeout=0.2)
    tls.wait_for_open_streams(0)

    assert heard.text == "word1 "
    assert isinstance(heard.error, openai.APITimeoutError | httpx2.ReadTimeout)
    assert tls.requests()[-1].client_left


def ask_over_tls(provider: ProviderServer, model: str) -> ssl.SSLSocket:
    """A connection that tells an end without close_notify apart, with a request on it."""
    body = json.dumps({"model": model, "stream": True, "messages": [{"role": "user", "content": "hi"}]})
    head = f"POST /v1/chat/completions HTTP/1.1\r\nAuthorization: Bearer x\r\nContent-Length: {len(body)}\r\n\r\n"
    plain = socket.create_connection(("127.0.0.1", int(provider.url.rpartition(":")[2])), timeout=5)
    context = ssl.create_default_context(cafile=provider.ca)
    context.options &= ~ssl.OP_IGNORE_UNEXPECTED_EOF  # Python sets it, where OpenSSL knows it
    encrypted = context.wrap_socket(plain, server_hostname="127.0.0.1", suppress_ragged_eofs=False)
    encrypted.sendall((head + body).encode())
    return encrypted


def test_a_hangup_over_tls_says_no_close_notify(tls: ProviderServer) -> None:
    with ask_over_tls(tls, "gpt-test-hangup-k1") as encrypted, pytest.raises(ssl.SSLError, match=r"(?i)eof"):
        while encrypted.recv(65536):
            pass


def test_a_cut_over_tls_is_a_reset(tls: ProviderServer) -> None:
    encrypted = ask_over_tls(tls, "gpt-test-cut-k1")

    with socket.socket(fileno=encrypted.detach()) as plain, pytest.raises(ConnectionResetError):
        plain.settimeout(5)
        while plain.recv(65536):
            pass


# The receiver


def post(url: str, **body: Any) -> requests.Response:
    """One callback, on a connection of its own."""
    return requests.post(url, json=body, timeout=2, headers={"Connection": "close"})


def test_the_receiver_answers_as_n8n_and_keeps_the_request_byte_for_byte(n8n: Receiver) -> None:
    answer = post(n8n.url("/webhook-waiting/7?signature=ab%2Fcd&x="), answer="häl😀lo")

    (received,) = n8n.wait_for(1)
    assert (answer.status_code, answer.json()) == (200, {"message": "Workflow was started"})
    assert (received.method, received.target) == ("POST", "/webhook-waiting/7?signature=ab%2Fcd&x=")
    assert received.path == "/webhook-waiting/7"
    assert received.json == {"answer": "häl😀lo"}
    assert received.headers["content-type"] == "application/json"
    assert abs(received.at - time.time()) < 5


def test_a_script_is_followed_in_order_and_can_change_while_it_runs(n8n: Receiver) -> None:
    n8n.answers([n8n_says.RUNNING_ALREADY, (503, {"Retry-After": "3"}, "busy"), lambda received: Answer(299)])

    answers = [post(n8n.url()) for _ in range(4)]
    n8n.always(n8n_says.FINISHED_ALREADY)
    later = post(n8n.url())

    assert [answer.status_code for answer in answers] == [409, 503, 299, 200]
    assert answers[1].headers["Retry-After"] == "3"
    assert "is running already" in answers[0].text
    assert "has finished already" in later.text


def test_a_script_for_one_path_leaves_the_others_alone(n8n: Receiver) -> None:
    n8n.answers([Answer(500)], path="/a")

    statuses = [post(n8n.url(path)).status_code for path in ("/b", "/a?x=1", "/a")]

    assert statuses == [200, 500, 200]
    assert len(n8n.wait_for(2, path="/a")) == 2


def test_the_receiver_can_hang_cut_and_never_end(n8n: Receiver) -> None:
    n8n.answers([n8n_says.CUT, n8n_says.CUT_BODY, n8n_says.HANG, n8n_says.ENDLESS])

    with pytest.raises(requests.ConnectionError):
        post(n8n.url())
    with pytest.raises((requests.ConnectionError, requests.exceptions.ChunkedEncodingError)):
        post(n8n.url())
    with pytest.raises(requests.ReadTimeout):
        requests.post(n8n.url(), json={}, timeout=0.2)
    with requests.post(n8n.url(), json={}, timeout=2, stream=True) as endless:
        start = endless.raw.read(70_000)

    assert len(start) == 70_000
    assert len(n8n.requests) == 4


def test_the_receiver_can_be_down_and_come_back_at_the_same_address(n8n: Receiver) -> None:
    url = n8n.url()
    post(url)

    n8n.down()
    with pytest.raises(requests.ConnectionError, match="refused"):
        post(url)
    n8n.up()
    back = post(url)

    assert n8n.url() == url
    assert back.status_code == 200
    assert len(n8n.requests) == 2


def test_waiting_for_a_callback_that_does_not_come_fails_soon_and_says_what_came(n8n: Receiver) -> None:
    post(n8n.url("/only-this"))

    with pytest.raises(AssertionError, match=r"(?s)1 of 2 requests.*only-this"):
        n8n.wait_for(2, timeout=0.05)


def test_a_receiver_leaves_no_thread_behind() -> None:
    before = threading.active_count()

    with Receiver() as n8n, requests.Session() as session:
        n8n.answers([Answer(), n8n_says.HANG])
        session.post(n8n.url(), json={}, timeout=2)
        with pytest.raises(requests.ReadTimeout):
            session.post(n8n.url(), json={}, timeout=0.05)

    assert threading.active_count() == before
