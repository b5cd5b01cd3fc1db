"""Whatever a provider does: the viewer is told in one event, n8n in one callback, and nobody more than is theirs to know."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.neighbours.provider import ProviderServer
from tests.neighbours.receiver import CUT, STARTING_UP, WRONG_METHOD, Receiver
from tests.service import Service, text_of, wait_until

StartService = Callable[..., Service]
BOTH = pytest.mark.parametrize("family", ["gpt", "claude"])


@BOTH
def test_usage_in_detail_reaches_n8n(service: Service, n8n: Receiver, family: str) -> None:
    service.read(service.stream_url(model=f"{family}-test-usage-details", resumeUrl=n8n.url(), prompt="one two three four"))

    (callback,) = n8n.wait_for(1)
    usage = callback.json["usage"]
    assert usage["source"] == "provider"
    assert (usage["input_tokens"], usage["cached_input_tokens"]) == (4, 2)
    assert usage["output_tokens"] == callback.json["output_tokens"] > 0


def test_without_the_providers_figures_usage_is_an_estimate_that_says_so(service: Service, n8n: Receiver) -> None:
    # Anthropic's message_delta always has them.
    service.read(service.stream_url(model="gpt-test-no-usage", resumeUrl=n8n.url(), prompt="12345678"))

    (callback,) = n8n.wait_for(1)
    assert (callback.json["usage"]["source"], callback.json["input_tokens"]) == ("estimated", 2)


@BOTH
def test_what_was_asked_for_is_what_the_provider_gets(service: Service, provider: ProviderServer, family: str) -> None:
    model = f"{family}-test-hello-i77"
    asked: dict[str, Any] = {
        "system": "Be brief.",
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
        "prompt": "And now?",
        "stop": ["END"],
        "max_tokens": 77,
    }

    service.read(service.stream_url(model=model, **asked))

    body = provider.requests(model)[-1].body
    turns = [*asked["messages"], {"role": "user", "content": "And now?"}]
    assert (body["model"], body["max_tokens"], body["stream"]) == (model, 77, True)
    if family == "gpt":
        assert body["messages"] == [{"role": "system", "content": "Be brief."}, *turns]
        assert (body["stop"], body["stream_options"]) == (["END"], {"include_usage": True})
    else:
        assert (body["system"], body["messages"], body["stop_sequences"]) == ("Be brief.", turns, ["END"])


def test_sampling_parameters_go_to_openai_and_are_warned_of_for_anthropic(service: Service, provider: ProviderServer) -> None:
    openai = service.init(model="gpt-test-hello-i78", temperature=0.5, top_p=0.9).json()
    anthropic = service.init(model="claude-test-hello-i78", temperature=0.5, top_p=0.9).json()

    events = service.read(openai["streamUrl"]) + service.read(anthropic["streamUrl"])

    body = provider.requests("gpt-test-hello-i78")[-1].body
    assert (body["temperature"], body["top_p"], openai["warnings"]) == (0.5, 0.9, [])
    assert anthropic["warnings"] == [f"{name} is not sent: anthropic does not take it" for name in ("temperature", "top_p")]
    assert not [event for event in events if event.event == "error"]


def test_an_answer_beyond_the_limit_ends_as_failed_and_keeps_what_fits(
    start_service: StartService, provider: ProviderServer, n8n: Receiver
) -> None:
    service = start_service(MAX_ANSWER_BYTES="1024", **provider.environ)

    events = service.read(service.stream_url(model="gpt-test-long-n1000", resumeUrl=n8n.url()))

    (callback,) = n8n.wait_for(1)
    assert json.loads(events[-1].data)["code"] == "answer_too_long"
    assert 0 < len(callback.json["answer"].encode()) <= 1024
    assert callback.json["answer"] == text_of(events)


def test_a_generation_beyond_its_time_ends_as_failed_and_the_provider_is_let_go(
    start_service: StartService, provider: ProviderServer, n8n: Receiver
) -> None:
    service = start_service(MAX_STREAM_SECONDS="1", **provider.environ)

    events = service.read(service.stream_url(model="gpt-test-hold-n9-k2-i79", resumeUrl=n8n.url()))

    (callback,) = n8n.wait_for(1)
    provider.wait_for_open_streams(0)
    assert json.loads(events[-1].data)["code"] == callback.json["error"]["code"] == "stream_timeout"
    assert callback.json["answer"] == text_of(events) != ""


def test_a_callback_is_tried_until_n8n_has_it(start_service: StartService, n8n: Receiver) -> None:
    service = start_service(CALLBACK_SCHEDULE="0,0.1,0.1,0.1,0.1,0.1")
    n8n.answers([STARTING_UP, (503, {"Retry-After": "0"}, "busy"), CUT, (429, {}, "")])

    service.read(service.stream_url(model="echo", prompt="a", resumeUrl=n8n.url()))

    attempts = n8n.wait_for(5)
    assert [attempt.json["attempt"] for attempt in attempts] == [1, 2, 3, 4, 5]
    assert len({attempt.headers["webhook-id"] for attempt in attempts}) == 1
    assert {attempt.json["answer"] for attempt in attempts} == {"a"}


def test_a_callback_that_can_never_arrive_is_a_dead_letter_with_its_reason(start_service: StartService, n8n: Receiver) -> None:
    service = start_service()
    n8n.always(WRONG_METHOD)

    service.read(service.stream_url(model="echo", prompt="a", resumeUrl=n8n.url("/w?signature=sss")))

    n8n.wait_for(1)
    wait_until(lambda: service.lines("callback.attempted"))
    (line,) = service.lines("callback.attempted")
    assert line["outcome"] == "dead" and "HTTP method to POST" in line["reason"]
    assert "signature" not in service.log
