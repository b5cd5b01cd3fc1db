"""The neighbours are what they claim to be: both real SDKs accept the provider's wire, and fail as they really fail.

What the SDKs make of each failure (openai 3.54.0, anthropic 2.12.0) is what aistream's providers are built on; when a
new version behaves differently, this is the file that says so.
"""

import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import anthropic
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
                    if delta.content is not None and delta.role is None and not hasattr(delta, "annotations"):
                        heard.pieces.append(delta.content)
                    heard.refusal += delta.refusal or ""
                    if (thought := getattr(delta, "reasoning_content", None)) is not None:
                        heard.reasoning.append(thought)
                    for call in delta.tool_calls or []:
                        heard.arguments += (call.function and call.function.arguments) or ""
        heard.done = heard.finish is not None

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


@pytest.fixture(scope="module")
def process() -> Iterator[ProviderServer]:
    with ProviderServer() as provider:
        yield provider


@pytest.fixture
def provider(process: ProviderServer) -> ProviderServer:
    process.reset()
    return process


@pytest.fixture(scope="module")
def clients(process: ProviderServer) -> Iterator[Clients]:
    with (
        openai.OpenAI(api_key="sk-mine", base_url=process.openai_url, max_retries=0) as first,
        anthropic.Anthropic(api_key="sk-ant-mine", base_url=process.anthropic_url, max_retries=0) as second,
    ):
        yield Clients(first, second)


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
    assert (no_done.finish is not None, no_done.done) == (True, family == "gpt")


@BOTH
def test_reasoning_comes_apart_from_the_text(clients: Clients, family: str) -> None:
    heard = clients.hear(f"{family}-test-reasoning")

    assert heard.reasoning == list(THOUGHTS)
    assert heard.pieces == list(HELLO)
    assert heard.output_tokens == len(THOUGHTS) + len(HELLO)


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
