"""The way to an answer: retries, fallbacks, one budget of time, parameters that adapt, and places with a provider.

With the real SDKs against the scenario server, in this process. What viewers and n8n get of it is in tests/test_matrix.py.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aistream.asking import PATIENCE, Asking, next_wait, watch_period
from aistream.endpoints import Endpoint
from aistream.errors import ProviderFailed
from aistream.events import End, Reasoning, Text, Usage
from aistream.providers import Providers
from aistream.providers import adaptation as adaptation_module
from aistream.providers.adaptation import Adaptations
from aistream.providers.bulkhead import Bulkhead
from aistream.providers.openai import OpenAIProvider
from aistream.session import Message, Request, Route
from tests.conftest import make_config
from tests.neighbours.provider import ProviderServer
from tests.neighbours.scenarios import HELLO, THOUGHTS
from tests.service import wait_until

WHOLE = "".join(HELLO)
BOTH = pytest.mark.parametrize("family", ["gpt", "claude"])
PROVIDERS = {"gpt": "openai", "claude": "anthropic"}
Ask = Callable[..., Asking]


@pytest.fixture
def ask(provider: ProviderServer, tmp_path: Path) -> Iterator[Ask]:
    """Makes the way to an answer of this model; `environ` on top of a configuration with short waits, `models` the file's text.

    Those with the same `environ` and `models` share their providers, as a worker's generations do.
    """
    known: dict[str, Providers] = {}
    watches: list[gevent.Greenlet] = []  # type: ignore[type-arg]  # of whatever signature

    def make(model: str, environ: dict[str, str] | None = None, models: str = "", **asked: Any) -> Asking:
        (tmp_path / "models.toml").write_text(models)
        config = make_config(
            **{
                **provider.environ,
                "PROVIDER_BACKOFF_SECONDS": "0.01",
                "MODELS_FILE": str(tmp_path / "models.toml"),
                **(environ or {}),
            }
        )
        providers = known.setdefault(repr((environ, models)), Providers(config))
        route = providers.route(model)
        fallbacks = tuple(providers.route(name) for name in asked.pop("fallbackModels", []))
        request = Request("Hello", model, route.model, route.provider, fallbacks=fallbacks, **asked)
        asking = Asking(config, providers, request, "a-session", list)

        def watch() -> None:
            while True:
                gevent.sleep(watch_period(config))
                asking.check(time.monotonic())

        watches.append(gevent.spawn(watch))
        return asking

    yield make
    gevent.killall(watches)
    for providers in known.values():
        providers.close()


Said = Text | Reasoning | Usage


def text(asking: Asking) -> str:
    """The whole answer. Raises ProviderFailed."""
    said: list[Said] = []
    asking.answer(said.append)
    return "".join(event.text for event in said if isinstance(event, Text))


def failure(asking: Asking) -> ProviderFailed:
    """How it failed."""
    with pytest.raises(ProviderFailed) as failed:
        text(asking)
    return failed.value


# ---- When the same model is asked again (pure) ----


def failed(again: bool = True, retry_after: float | None = None) -> ProviderFailed:
    """A failure before the first token."""
    return ProviderFailed("code", "message", retryable=True, again=again, retry_after=retry_after)


@given(st.integers(0, 9), st.floats(0, 1), st.floats(0.01, 5))
def test_waits_double_and_vary_by_a_fifth(retries: int, dice: float, backoff: float) -> None:
    wait = next_wait(failed(), retries, allowed=10, backoff=backoff, left=1e9, dice=dice)

    assert wait is not None and 0.8 * backoff * 2**retries <= wait * 1.0001 and wait <= 1.2001 * backoff * 2**retries


def test_what_another_try_cannot_mend_is_not_tried_again() -> None:
    assert next_wait(failed(again=False), 0, allowed=2, backoff=0.5, left=60, dice=0.5) is None


@pytest.mark.parametrize(
    ("retries", "allowed", "waits"), [(0, 0, False), (0, 1, True), (1, 1, False), (1, 2, True), (2, 2, False)]
)
def test_there_are_so_many_retries_and_no_more(retries: int, allowed: int, waits: bool) -> None:
    assert (next_wait(failed(), retries, allowed=allowed, backoff=0.5, left=60, dice=0.5) is not None) == waits


@pytest.mark.parametrize(
    ("retry_after", "wait"),
    [(None, 0.5), (0.0, 0.5), (0.2, 0.5), (3.0, 3.0), (PATIENCE, PATIENCE), (PATIENCE + 0.1, None)],
)
def test_the_providers_retry_after_is_a_lower_bound_up_to_ten_seconds(retry_after: float | None, wait: float | None) -> None:
    assert next_wait(failed(retry_after=retry_after), 0, allowed=2, backoff=0.5, left=60, dice=0.5) == wait


def test_no_wait_goes_beyond_the_budget() -> None:
    assert next_wait(failed(retry_after=5), 0, allowed=2, backoff=0.5, left=4.9, dice=0.5) is None


# ---- Retries and fallbacks ----


@BOTH
def test_a_model_that_fails_first_is_asked_again_until_it_answers(ask: Ask, provider: ProviderServer, family: str) -> None:
    model = f"{family}-test-status-s529-x2-i300"
    asking = ask(model)

    assert text(asking) == WHOLE
    assert (asking.requests, len(provider.requests(model))) == (3, 3)
    assert not asking.left_out()


@BOTH
def test_fallbacks_are_asked_in_their_order_across_providers(ask: Ask, provider: ProviderServer, family: str) -> None:
    other = "claude" if family == "gpt" else "gpt"
    names = [
        f"{family}-test-status-s404-i301",
        f"{other}-test-status-s401-i301",
        f"{family}-test-hello-i301",
        f"{other}-test-hello-i301",
    ]
    asking = ask(names[0], fallbackModels=names[1:])

    assert text(asking) == WHOLE
    assert (asking.route, asking.call.model) == (Route(PROVIDERS[family], names[2]), names[2])
    assert [asked.model for asked in provider.requests()] == names[:3]


def test_of_several_failures_the_last_one_that_another_try_might_mend_is_told(ask: Ask) -> None:
    retryable = ask("gpt-test-status-s404", fallbackModels=["claude-test-status-s529", "gpt-test-status-s401"])
    final = ask("gpt-test-status-s404", fallbackModels=["claude-test-status-s401"])

    assert failure(retryable).code == "provider_overloaded"
    assert (retryable.route.provider, retryable.requests) == ("anthropic", 5)
    assert failure(final).code == "model_not_found" and final.route.provider == "openai"


def test_all_attempts_together_stay_within_one_budget(ask: Ask, provider: ProviderServer) -> None:
    # Each is silent, and would be waited for: the first for 0.3 s, the second for the 0.2 s that are left, the third not at all.
    environ = {"FIRST_TOKEN_SECONDS": "0.3", "FIRST_TOKEN_BUDGET_SECONDS": "0.5"}
    names = [f"gpt-test-silence-i30{number}" for number in range(2, 6)]
    asking = ask(names[0], environ, fallbackModels=names[1:])

    began = time.monotonic()
    assert failure(asking).code == "first_token_timeout"
    took = time.monotonic() - began
    assert [asked.model for asked in provider.requests()] == names[:2]
    assert took >= 0.45


def test_a_model_that_thinks_first_is_waited_for_longer(ask: Ask) -> None:
    environ = {"FIRST_TOKEN_SECONDS": "0.2", "REASONING_FIRST_TOKEN_SECONDS": "5"}

    assert failure(ask("gpt-test-slow-n2-f600", environ)).code == "first_token_timeout"
    assert text(ask("gpt-test-slow-n2-f600", environ, reasoning_effort="high")) == "word1 word2 "
    assert text(ask("openai/o3-test-slow-n2-f600", environ)) == "word1 word2 "


def test_anthropic_that_says_that_it_thinks_is_waited_for_longer(ask: Ask) -> None:
    environ = {"FIRST_TOKEN_SECONDS": "0.2", "REASONING_FIRST_TOKEN_SECONDS": "5"}

    assert text(ask("claude-test-hidden-thoughts", environ)) == WHOLE
    assert failure(ask("gpt-test-hidden-thoughts", environ)).code == "first_token_timeout"
    environ["REASONING_FIRST_TOKEN_SECONDS"] = "0.3"
    assert failure(ask("claude-test-hidden-thoughts", environ)).code == "first_token_timeout"


def test_an_answer_in_one_piece_may_take_its_time(ask: Ask) -> None:
    environ = {"FIRST_TOKEN_SECONDS": "0.2"}

    assert text(ask("gpt-test-refuses-stream-f600", environ)) == WHOLE


def test_silence_is_judged_by_bytes_in_mid_answer_and_by_tokens_before_it(ask: Ask) -> None:
    environ = {"FIRST_TOKEN_SECONDS": "0.4", "SILENCE_SECONDS": "0.4"}
    answers = {
        model: gevent.spawn(text, ask(f"claude-test-{model}", environ)) for model in ("pinging-k2", "pinging-k0", "stall-k2")
    }

    gevent.sleep(1.2)

    assert not answers["pinging-k2"].ready()
    answers.pop("pinging-k2").kill()
    assert {model: answer.exception.code for model, answer in answers.items()} == {
        "pinging-k0": "first_token_timeout",
        "stall-k2": "silence_timeout",
    }


@BOTH
def test_once_a_token_was_said_nothing_is_retried_or_spliced(ask: Ask, provider: ProviderServer, family: str) -> None:
    model = f"{family}-test-cut-k1-x1-i306"
    asking = ask(model, fallbackModels=["gpt-test-hello-i306"])

    said: list[Said] = []
    with pytest.raises(ProviderFailed) as failed:
        asking.answer(said.append)

    assert (said, failed.value.code) == ([Text("word1 ")], "upstream_disconnected")
    assert [asked.model for asked in provider.requests()] == [model]


def test_a_thought_is_a_token_too(ask: Ask, provider: ProviderServer) -> None:
    # Whoever has seen a model think would see another begin anew.
    said: list[Said] = []
    asking = ask("gpt-test-reasoning-d300-i307", {"SILENCE_SECONDS": "0.1"})
    with pytest.raises(ProviderFailed) as failed:
        asking.answer(said.append)

    assert failed.value.code == "silence_timeout" and isinstance(said[0], Reasoning)
    assert len(provider.requests("gpt-test-reasoning-d300-i307")) == 1


def test_a_stop_takes_effect_in_the_middle_of_a_back_off(ask: Ask, provider: ProviderServer) -> None:
    asking = ask("gpt-test-status-s500-i308", {"PROVIDER_BACKOFF_SECONDS": "9"})
    generation = gevent.spawn(text, asking)
    wait_until(lambda: provider.requests("gpt-test-status-s500-i308"))
    gevent.sleep(0.1)

    generation.kill(timeout=0.5)

    assert generation.dead and isinstance(generation.value, gevent.GreenletExit)
    assert len(provider.requests("gpt-test-status-s500-i308")) == 1


@BOTH
def test_a_stop_lets_the_provider_go_in_mid_answer(ask: Ask, provider: ProviderServer, family: str) -> None:
    generation = gevent.spawn(text, ask(f"{family}-test-hold-k1-i309"))
    provider.wait_for_open_streams(1)

    generation.kill()

    provider.wait_for_open_streams(0)
    assert provider.requests(f"{family}-test-hold-k1-i309")[0].ended == "client_left"


# ---- Parameters ----


def test_what_a_model_refuses_is_remembered_for_it_and_for_its_server(ask: Ask, provider: ProviderServer) -> None:
    models = f'[again]\nbase_url = "{provider.openai_url}"\n[elsewhere]\nbase_url = "{provider.openai_url}/"\n'
    name = "gpt-test-refuses-temperature-i310"

    first = ask(f"again/{name}", models=models, temperature=0.0)
    assert text(first) == WHOLE
    second = ask(f"elsewhere/{name}", models=models, temperature=0.5)
    assert text(second) == WHOLE
    other = ask(f"again/{name}1", models=models, temperature=0.5)
    assert text(other) == WHOLE

    assert (first.requests, second.requests, other.requests) == (2, 1, 2)
    assert ["temperature" in asked.body for asked in provider.requests()] == [True, False, False, True, False]
    assert first.left_out() == second.left_out() == [f"temperature was not sent: {name} does not take it"]


def test_what_was_learned_is_forgotten_after_an_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adaptation_module, "FORGET", 0.05)
    adaptations = Adaptations()

    assert adaptations.learn("http://a", "m", ["stop"]) == {"stop"}
    assert adaptations.learn("http://a", "m", ["top_p"]) == {"stop", "top_p"} == adaptations.of("http://a", "m")
    assert adaptations.of("http://b", "m") == frozenset() == adaptations.of("http://a", "n")
    gevent.sleep(0.06)
    assert adaptations.of("http://a", "m") == frozenset()


def test_of_many_models_the_oldest_lessons_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adaptation_module, "MODELS", 2)
    adaptations = Adaptations()

    for name in "abc":
        adaptations.learn("http://a", name, ["stop"])

    assert [bool(adaptations.of("http://a", name)) for name in "abc"] == [False, True, True]


def test_everything_that_can_be_left_out_is_left_out_one_after_the_other(ask: Ask, provider: ProviderServer) -> None:
    asking = ask("gpt-test-refuses-all-i311", temperature=0.5, top_p=0.5, stop=("END",), reasoning_effort="low", max_tokens=7)

    assert text(asking) == WHOLE
    last = provider.requests("gpt-test-refuses-all-i311")[-1].body
    assert set(last) == {"model", "messages", "max_completion_tokens", "stream"}
    assert (last["max_completion_tokens"], last["stream"]) == (7, False)
    assert len(asking.left_out()) == 5  # and that it came in one piece


def test_a_limit_has_the_name_that_the_server_takes(ask: Ask, provider: ProviderServer) -> None:
    assert text(ask("gpt-test-refuses-max-completion-tokens-i312")) == WHOLE
    assert text(ask("gpt-test-refuses-max-tokens-i312")) == WHOLE

    assert [[name for name in asked.body if name.startswith("max_")] for asked in provider.requests()] == [
        ["max_tokens"],
        ["max_tokens"],
        ["max_completion_tokens"],
    ]


@pytest.mark.parametrize(
    ("url", "name"), [("https://api.openai.com/v1", "max_completion_tokens"), ("https://openrouter.ai/api/v1", "max_tokens")]
)
def test_openai_itself_gets_the_newer_name_of_the_limit_and_others_the_older(url: str, name: str) -> None:
    # Nothing is sent: there is no api.openai.com here.
    provider = OpenAIProvider(Endpoint(name="x", api="openai", base_url=url, key="k"), Adaptations())

    body = provider._body(Request("Hello", "m", "m", "x"), "m", frozenset())

    assert [field for field in body if field.startswith("max_")] == [name] and body[name] == 4096


def test_a_parameter_of_the_file_that_is_refused_is_left_out_too(ask: Ask, provider: ProviderServer) -> None:
    models = f'[mine]\nbase_url = "{provider.openai_url}"\ndefaults = {{ temperature = 0.5, top_k = 3 }}'
    asking = ask("mine/gpt-test-refuses-temperature-i313", models=models)

    assert text(asking) == WHOLE
    assert [asked.body.get("top_k") for asked in provider.requests()] == [3, 3]
    assert asking.left_out() == []  # nobody asked for it


def test_defaults_and_limits_of_the_file_hold_for_what_a_request_leaves_open(ask: Ask, provider: ProviderServer) -> None:
    models = (
        f'[mine]\nbase_url = "{provider.openai_url}"\n'
        'defaults = { temperature = 0.5, max_tokens = 50, stop = ["X"], reasoning_effort = "low" }\nlimits = { max_tokens = 60 }'
    )

    assert text(ask("mine/gpt-test-hello-i314", models=models)) == WHOLE
    assert text(ask("mine/gpt-test-hello-i314", models=models, max_tokens=100, temperature=0.0, stop=("Y",))) == WHOLE

    kept = ("max_tokens", "temperature", "stop", "reasoning_effort")
    assert [tuple(asked.body[name] for name in kept) for asked in provider.requests()] == [
        (50, 0.5, ["X"], "low"),
        (60, 0.0, ["Y"], "low"),
    ]


TURNS = (
    Message("system", "Be kind."),
    Message("assistant", "Hi, what can I do?"),
    Message("user", "First"),
    Message("user", "Second"),
    Message("assistant", " "),
    Message("system", "Be short."),
)


def test_anthropic_gets_its_system_apart_and_successive_turns_of_a_role_as_one(ask: Ask, provider: ProviderServer) -> None:
    assert text(ask("claude-test-hello-i315", system="You are a test.", messages=TURNS)) == WHOLE

    body = provider.requests("claude-test-hello-i315")[-1].body
    assert body["system"] == "You are a test.\n\nBe kind.\n\nBe short."
    assert body["messages"] == [
        {"role": "assistant", "content": "Hi, what can I do?"},
        {"role": "user", "content": "First\n\nSecond\n\nHello"},
    ]
    assert body["max_tokens"] == 4096


def test_openai_gets_the_turns_as_they_are(ask: Ask, provider: ProviderServer) -> None:
    assert text(ask("gpt-test-hello-i316", system="You are a test.", messages=TURNS)) == WHOLE

    body = provider.requests("gpt-test-hello-i316")[-1].body
    roles = ["system", *(turn.role for turn in TURNS), "user"]
    assert [message["role"] for message in body["messages"]] == roles


@pytest.mark.parametrize(
    ("effort", "thinking", "sent"),
    [
        (None, None, None),
        ("none", {"type": "disabled"}, None),
        ("minimal", {"type": "adaptive", "display": "summarized"}, {"effort": "low"}),
        ("high", {"type": "adaptive", "display": "summarized"}, {"effort": "high"}),
    ],
)
def test_reasoning_effort_is_passed_on_in_the_providers_words(
    ask: Ask, provider: ProviderServer, effort: str | None, thinking: object, sent: object
) -> None:
    assert text(ask("gpt-test-hello-i317", reasoning_effort=effort)) == WHOLE
    assert text(ask("claude-test-hello-i317", reasoning_effort=effort)) == WHOLE

    openai, anthropic = provider.requests()
    assert openai.body.get("reasoning_effort") == effort
    assert (anthropic.body.get("thinking"), anthropic.body.get("output_config")) == (thinking, sent)


@pytest.mark.parametrize(
    ("version", "temperature", "sent"), [("", 0.5, None), ("2023-06-01", 0.5, 0.5), ("2023-06-01", 1.7, 1.0)]
)
def test_anthropics_temperature_ends_at_one_where_its_api_still_has_it(
    ask: Ask, provider: ProviderServer, version: str, temperature: float, sent: float | None
) -> None:
    asking = ask("claude-test-hello-i318", {"ANTHROPIC_VERSION": version}, temperature=temperature, top_p=0.5)

    assert text(asking) == WHOLE
    asked = provider.requests()[-1]
    assert asked.body.get("temperature") == sent
    assert ("top_p" in asked.body) == bool(version)
    assert not version or asked.headers["anthropic-version"] == version


def test_anthropic_may_refuse_a_temperature_all_the_same(ask: Ask, provider: ProviderServer) -> None:
    asking = ask("claude-test-refuses-temperature-i319", {"ANTHROPIC_VERSION": "2023-06-01"}, temperature=0.5)

    assert text(asking) == WHOLE
    assert ["temperature" in asked.body for asked in provider.requests()] == [True, False]
    assert asking.left_out() == ["temperature was not sent: claude-test-refuses-temperature-i319 does not take it"]


@BOTH
def test_a_server_that_does_not_stream_whatever_it_is_asked_is_understood(ask: Ask, family: str) -> None:
    events: list[Said] = []
    ending = ask(f"{family}-test-whole").answer(events.append)

    usage = [event for event in events if isinstance(event, Usage)]
    assert ending == End("stop") and len(usage) == 1 and usage[0].source == "provider"
    texts = [event.text for event in events if isinstance(event, (Text, Reasoning))]
    assert "".join(texts) == "".join(THOUGHTS) + WHOLE and max(map(len, texts)) <= 64


# ---- Places ----


def test_places_are_given_in_the_order_in_which_they_were_asked_for() -> None:
    bulkhead = Bulkhead(places=2, queue=10, seconds=5)
    order: list[int] = []

    def run(number: int) -> None:
        bulkhead.enter()
        order.append(number)
        gevent.sleep(0.01)
        bulkhead.leave()

    gevent.joinall([gevent.spawn(run, number) for number in range(8)], raise_error=True)

    assert order == list(range(8)) and (bulkhead.running, bulkhead.waiting) == (0, 0)


def test_whoever_finds_the_queue_full_or_waits_too_long_is_turned_away() -> None:
    bulkhead = Bulkhead(places=1, queue=1, seconds=0.1)
    bulkhead.enter()
    waiting = gevent.spawn(bulkhead.enter)
    gevent.sleep(0)

    with pytest.raises(ProviderFailed) as full:
        bulkhead.enter()
    with pytest.raises(ProviderFailed) as late:
        waiting.get()

    assert [(one.value.code, one.value.retryable, one.value.again) for one in (full, late)] == [("overloaded", True, False)] * 2
    assert (bulkhead.running, bulkhead.waiting) == (1, 0)


@pytest.mark.parametrize("just_then", [False, True])
def test_whoever_is_stopped_while_it_waits_takes_no_place(just_then: bool) -> None:
    bulkhead = Bulkhead(places=1, queue=5, seconds=5)
    bulkhead.enter()
    first, second = gevent.spawn(bulkhead.enter), gevent.spawn(bulkhead.enter)
    gevent.sleep(0)

    first.kill(block=not just_then)
    bulkhead.leave()  # just then: to the one that is stopped before it knows

    second.get(timeout=1)
    assert (bulkhead.running, bulkhead.waiting) == (1, 0)


def test_a_full_provider_makes_the_next_wait_and_says_how_long(ask: Ask, provider: ProviderServer) -> None:
    models = "[openai]\nlimits = { concurrency = 1, queue = 1 }"
    first = gevent.spawn(text, ask("gpt-test-hold-k1-n2-i320", models=models))
    provider.wait_for_open_streams(1)
    second_asking = ask("gpt-test-hello-i320", models=models)
    second = gevent.spawn(text, second_asking)
    gevent.sleep(0.2)

    third = failure(ask("gpt-test-hello-i320", models=models))
    provider.release()

    assert (first.get(timeout=5), second.get(timeout=5), third.code) == ("word1 word2 ", WHOLE, "overloaded")
    assert second_asking.queued >= 0.2


def test_a_full_provider_is_a_reason_to_ask_the_fallback(ask: Ask, provider: ProviderServer) -> None:
    models = "[openai]\nlimits = { concurrency = 1, queue = 0 }"
    first = gevent.spawn(text, ask("gpt-test-hold-k1-n2-i321", models=models))
    provider.wait_for_open_streams(1)

    assert text(ask("gpt-test-hello-i321", models=models, fallbackModels=["claude-test-hello-i321"])) == WHOLE
    both = ask("claude-test-status-s401-i321", models=models, fallbackModels=["gpt-test-hello-i321"])
    assert failure(both).code == "overloaded"
    assert (both.route, both.call.model, both.requests) == (Route("openai", "gpt-test-hello-i321"), "gpt-test-hello-i321", 1)

    provider.release()
    assert first.get(timeout=5) == "word1 word2 "
    asked = [asked.model for asked in provider.requests()]
    assert asked == ["gpt-test-hold-k1-n2-i321", "claude-test-hello-i321", "claude-test-status-s401-i321"]


def test_a_place_is_given_back_however_it_ends(ask: Ask, provider: ProviderServer) -> None:
    models = "[openai]\nlimits = { concurrency = 1, queue = 0 }"
    for model in itertools.islice(itertools.cycle(["gpt-test-status-s400", "gpt-test-cut-k1", "gpt-test-hello"]), 6):
        try:
            text(ask(model, models=models))
        except ProviderFailed as failed:
            assert failed.code != "overloaded"


def test_a_session_older_than_the_configuration_fails_in_words(ask: Ask) -> None:
    asking = ask("gpt-test-hello")
    asking._request = Request("Hello", "gone/x", "x", "gone")

    assert failure(Asking(asking._config, asking._providers, asking._request, "s", list)).code == "provider_not_configured"
