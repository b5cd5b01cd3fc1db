"""Providers as a service meets them: what viewers see while it waits, stops, places, lists of models, TLS, and what is billed."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import httpx
import pytest

from tests.neighbours.provider import ProviderServer
from tests.neighbours.receiver import CUT, STARTING_UP, Receiver
from tests.neighbours.scenarios import HELLO, THOUGHTS
from tests.service import PROMPT, ROOT, Service, n8n_token, text_of, wait_until

WHOLE = "".join(HELLO)
BOTH = pytest.mark.parametrize("family", ["gpt", "claude"])
#: An alias with one place and a queue of one, and one whose server is not there.
MODELS = """
[narrow]
base_url = "{openai}"
key_variable = "OPENAI_API_KEY"
model = "gpt-test-hello"
limits = {{ concurrency = 1, queue = 1, queue_seconds = 20 }}

[named]
base_url = "{openai}"
models = ["gpt-test-hello", "gpt-test-long"]
defaults = {{ temperature = 0.5, top_k = 3 }}

[gone]
base_url = "http://127.0.0.1:9/v1"
model = "a-model"

[keyless]
base_url = "{openai}"
key_variable = "A_KEY_THAT_IS_NOT_SET"
"""


@pytest.fixture(scope="module")
def aliased_service(provider_process: ProviderServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The process behind `aliased`."""
    folder = tmp_path_factory.mktemp("aliased")
    (folder / "models.toml").write_text(MODELS.format(openai=provider_process.openai_url))
    service = Service(
        folder / "log",
        {
            **provider_process.environ,
            "MODELS_FILE": str(folder / "models.toml"),
            "HEARTBEAT_SECONDS": "0.2",
            "PROVIDER_BACKOFF_SECONDS": "1",
            "TOKEN_ENCODING": "aistream_test",
            "PYTHONPATH": str(ROOT / "tests" / "encodings"),
        },
    )
    service.start()
    yield service
    service.kill()  # callbacks to nobody would be waited for


@pytest.fixture
def aliased(aliased_service: Service, provider: ProviderServer) -> Service:
    """A service with aliases, a longer back-off, fast heartbeats, and an encoding at hand; shared by the tests of this module."""
    return aliased_service


def stop(url: str) -> None:
    """Presses stop."""
    assert httpx.post(url.replace("?", "/cancel?"), timeout=10).status_code == 202


def raw_of(url: str) -> tuple[int, str]:
    """How many heartbeats stand before the first event of a stream, and what follows: nothing else may."""
    raw = httpx.get(url, headers={"Accept": "text/event-stream"}, timeout=10).text
    parts = re.fullmatch(r"retry: 2000\n((?::\n)*)(id: 1-1\ndata: Hello.*)", raw, re.DOTALL)
    assert parts is not None, raw
    return parts[1].count(":"), parts[2]


# ---- Before the first token ----


def test_viewers_get_heartbeats_alone_until_a_model_begins(aliased: Service) -> None:
    url = aliased.stream_url(model="gpt-test-status-s503-x1-i400")

    heartbeats, answer = raw_of(url)

    assert heartbeats >= 2 and answer.endswith("data: [DONE]\n\n")


@BOTH
def test_a_stop_in_the_middle_of_a_back_off_ends_it_at_once(
    aliased: Service, provider: ProviderServer, n8n: Receiver, family: str
) -> None:
    model = f"{family}-test-status-s500-i401"
    url = aliased.stream_url(model=model, resumeUrl=n8n.url())
    with aliased.watch(url) as events:
        wait_until(lambda: any(line["model"] == model for line in aliased.lines("provider.failed")))
        stop(url)
        assert [event.data for event in events] == ["[DONE]"]

    (callback,) = n8n.wait_for(1)
    assert (callback.json["status"], callback.json["answer"], callback.json["provider_requests"]) == ("cancelled", "", 1)
    assert len(provider.requests(model)) == 1
    assert (callback.json["usage"]["input_tokens"], callback.json["usage"]["source"]) == (0, "provider")


# ---- Places ----


def test_who_waits_for_a_place_is_running_and_its_callback_says_how_long(
    aliased: Service, provider: ProviderServer, n8n: Receiver
) -> None:
    first = aliased.stream_url(model="narrow/gpt-test-hold-k1-n2-i402", resumeUrl=n8n.url("/first"))
    second = aliased.stream_url(model="narrow", resumeUrl=n8n.url("/second"))
    third = aliased.stream_url(model="narrow", resumeUrl=n8n.url("/third"))
    with aliased.watch(first) as one:
        next(one)
        waiting = gevent.spawn(raw_of, second)
        gevent.sleep(0.6)
        stream_id = second.split("/stream/")[1].split("?")[0]
        state = aliased.get(f"/sessions/{stream_id}").json()["status"]
        (refused,) = aliased.read(third)
        provider.release()
        list(one)

    assert state == "running"
    heartbeats, answer = waiting.get(timeout=10)
    assert heartbeats >= 2 and answer.endswith("data: [DONE]\n\n")
    (callback,) = n8n.wait_for(1, path="/second")
    assert callback.json["answer"] == WHOLE
    assert 500 <= callback.json["timings"]["queued_ms"] <= callback.json["timings"]["time_to_first_token_ms"]
    (turned_away,) = n8n.wait_for(1, path="/third")
    assert json.loads(refused.data)["code"] == turned_away.json["error"]["code"] == "overloaded"
    assert turned_away.json["provider_requests"] == turned_away.json["input_tokens"] == 0


def test_a_stop_takes_effect_in_the_queue_too(aliased: Service, provider: ProviderServer, n8n: Receiver) -> None:
    first = aliased.stream_url(model="narrow/gpt-test-hold-k1-n2-i403")
    second = aliased.stream_url(model="narrow", resumeUrl=n8n.url("/second"))
    with aliased.watch(first) as one:
        next(one)
        waiting = gevent.spawn(aliased.read, second)
        gevent.sleep(0.3)
        stop(second)

        assert [event.data for event in waiting.get(timeout=5)] == ["[DONE]"]
        (callback,) = n8n.wait_for(1, path="/second")
        assert (callback.json["status"], callback.json["provider_requests"]) == ("cancelled", 0)
        assert callback.json["timings"]["queued_ms"] >= 200
        provider.release()
        list(one)


# ---- Which models there are ----


def models(service: Service) -> dict[str, Any]:
    """The answer of GET /models."""
    answer = service.get("/models")
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def test_the_list_of_models_has_what_servers_list_and_what_the_file_names(aliased: Service) -> None:
    listed = models(aliased)

    ids = {model["id"]: (model["provider"], model["model"]) for model in listed["models"]}
    assert ids["gpt-test-hello"] == ("openai", "gpt-test-hello")
    assert ids["claude-test-hello"] == ("anthropic", "claude-test-hello")
    assert ids["narrow"] == ("narrow", "gpt-test-hello") and ids["gone"] == ("gone", "a-model")
    assert ids["narrow/gpt-test-cut"] == ("narrow", "gpt-test-cut") and ids["echo"] == ("echo", "echo")
    assert [name for name, (provider, _) in ids.items() if provider == "named"] == ["named/gpt-test-hello", "named/gpt-test-long"]
    providers = {provider["name"]: provider for provider in listed["providers"]}
    assert [(name, one["configured"], one["error"]) for name, one in providers.items()] == [
        ("openai", True, None),
        ("anthropic", True, None),
        ("narrow", True, None),
        ("named", True, None),
        ("gone", True, "provider_unavailable"),
        ("keyless", False, None),
        ("echo", True, None),
    ]
    assert providers["narrow"]["limits"] == {"concurrency": 1, "queue": 1, "queue_seconds": 20.0}
    assert providers["named"]["defaults"] == {"temperature": 0.5}


def test_every_listed_model_can_be_asked_for(aliased: Service) -> None:
    listed = [model for model in models(aliased)["models"] if model["model"] in ("gpt-test-hello", "claude-test-hello", "echo")]

    for model in listed:
        events = aliased.read(aliased.stream_url(model=model["id"]))
        assert text_of(events) == (PROMPT if model["provider"] == "echo" else WHOLE)
    assert len(listed) == 5


def test_the_list_of_models_is_for_n8n_alone(aliased: Service) -> None:
    stream_url = aliased.stream_url(model="echo")
    viewer = stream_url.split("access_token=")[1]

    answers = [httpx.get(f"{aliased.url}/models"), aliased.get("/models", viewer), aliased.get("/models", n8n_token(exp=1))]

    assert [answer.status_code for answer in answers] == [401, 401, 401]


def test_a_server_that_does_not_list_its_models_delays_the_list_for_a_moment_alone(
    start_service: Callable[..., Service], provider: ProviderServer
) -> None:
    provider.answer_models(500)
    service = start_service(**provider.openai_environ, DEV_MODE="true")

    failed = models(service)
    provider.reset()
    again = models(service)

    states = [[(one["name"], one["error"]) for one in listed["providers"]] for listed in (failed, again)]
    assert states == [[("openai", "provider_unavailable"), ("anthropic", None), ("echo", None)]] * 2
    wait_until(lambda: not any(one["error"] for one in models(service)["providers"]), timeout=15)


def test_a_server_that_is_none_of_models_is_told_apart(
    start_service: Callable[..., Service], n8n: Receiver, tmp_path: Path
) -> None:
    answers = {
        "html": STARTING_UP,
        "other": (200, {"Content-Type": "application/json"}, '{"message":"Workflow was started"}'),
        "list": (200, {"Content-Type": "application/json"}, '["gpt-4"]'),
        "odd": (200, {"Content-Type": "application/json"}, '{"data":[{"name":"gpt-4"}, 7]}'),
        "cut": CUT,
    }
    for name, answer in answers.items():
        n8n.answers([answer] * 4, path=f"/{name}/models")
        n8n.answers([answer] * 4, path=f"/{name}/v1/models")
    tables = [f'[{name}]\nbase_url = "{n8n.url(f"/{name}")}"\nmodel = "m"' for name in answers]
    tables += [f'[{name}-claude]\nbase_url = "{n8n.url(f"/{name}")}"\napi = "anthropic"\nmodel = "m"' for name in answers]
    (tmp_path / "models.toml").write_text("\n".join(tables))
    service = start_service(MODELS_FILE=str(tmp_path / "models.toml"))

    listed = models(service)

    errors = {one["name"]: one["error"] for one in listed["providers"] if one["name"].partition("-")[0] in answers}
    assert errors == {
        f"{name}{family}": "provider_unavailable" if name == "cut" else "upstream_malformed"
        for family in ("", "-claude")
        for name in answers
    }
    assert {model["id"] for model in listed["models"]} == {*errors, "echo"}
    assert len(service.lines("provider.not_listed")) == len(errors)


# ---- TLS ----


@pytest.fixture(scope="module")
def over_tls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProviderServer]:
    """The provider with a certificate of a CA of its own."""
    with ProviderServer(tls=tmp_path_factory.mktemp("ca")) as server:
        yield server


def test_both_providers_are_asked_over_tls_where_their_ca_is_trusted(
    start_service: Callable[..., Service], over_tls: ProviderServer, n8n: Receiver
) -> None:
    service = start_service(**over_tls.environ, PROVIDER_BACKOFF_SECONDS="0.05")

    seen = {}
    for model in ("gpt-test-hello", "claude-test-hello", "gpt-test-cut-k2", "claude-test-cut-k2", "gpt-test-status-s503-x1"):
        events = service.read(service.stream_url(model=model, resumeUrl=n8n.url(f"/{model}")))
        (callback,) = n8n.wait_for(1, path=f"/{model}")
        seen[model] = text_of(events), callback.json["status"], (callback.json["error"] or {}).get("code")

    cut = ("word1 word2 ", "failed", "upstream_disconnected")
    assert seen == {
        "gpt-test-hello": (WHOLE, "completed", None),
        "claude-test-hello": (WHOLE, "completed", None),
        "gpt-test-cut-k2": cut,
        "claude-test-cut-k2": cut,
        "gpt-test-status-s503-x1": (WHOLE, "completed", None),
    }


def test_a_certificate_of_a_stranger_is_not_accepted(start_service: Callable[..., Service], over_tls: ProviderServer) -> None:
    environ = {name: value for name, value in over_tls.environ.items() if name != "SSL_CERT_FILE"}
    service = start_service(**environ, PROVIDER_RETRIES="0")
    over_tls.reset()

    codes = [
        json.loads(service.read(service.stream_url(model=f"{family}-test-hello"))[-1].data)["code"]
        for family in ("gpt", "claude")
    ]

    assert codes == ["provider_unavailable"] * 2
    assert [line["causes"] for line in service.lines("provider.failed")] == [["APIConnectionError", "ConnectError"]] * 2
    assert over_tls.requests() == []


# ---- What is billed ----


@BOTH
def test_what_a_stopped_answer_has_used_is_counted_by_tiktoken(
    aliased: Service, provider: ProviderServer, n8n: Receiver, family: str
) -> None:
    url = aliased.stream_url(model=f"{family}-test-hold-k2-n9-i404", resumeUrl=n8n.url(), prompt="token token")
    with aliased.watch(url) as events:
        text = ""
        while len(text.split()) < 2:  # in one event or in two
            text += next(events).data
        stop(url)
        text += text_of(list(events))

    (callback,) = n8n.wait_for(1)
    usage = callback.json["usage"]
    assert (callback.json["answer"], usage["estimated_by"]) == (text, "tiktoken")
    # By the encoding of the tests: "token" and " token"; Anthropic has said that it counts words.
    assert (usage["source"], usage["input_tokens"]) == (("estimated", 2) if family == "gpt" else ("partial", 2))
    assert usage["output_tokens"] == callback.json["output_tokens"] > len(text) / 4


@BOTH
def test_thoughts_are_billed_and_never_part_of_the_answer(
    aliased: Service, provider: ProviderServer, n8n: Receiver, family: str
) -> None:
    url = aliased.stream_url(model=f"{family}-test-reasoning-d300-i405", resumeUrl=n8n.url(), format="json")
    with aliased.watch(url) as events:
        thought = ""
        for event in events:
            body = json.loads(event.data)
            thought += body["text"] if body["type"] == "reasoning" else ""
            if thought == "".join(THOUGHTS):
                break
        stop(url)
        list(events)

    (callback,) = n8n.wait_for(1)
    usage = callback.json["usage"]
    assert callback.json["answer"] == "" and thought not in callback.json["prompt"]
    assert usage["reasoning_tokens"] == usage["output_tokens"] > 0


def test_the_start_says_how_tokens_are_estimated(aliased: Service, start_service: Callable[..., Service], tmp_path: Path) -> None:
    without = start_service(LOG_LEVEL="debug", TIKTOKEN_CACHE_DIR=str(tmp_path))

    assert [line["method"] for line in aliased.lines("tokens.estimated_by")] == ["tiktoken"]
    (line,) = without.lines("tokens.estimated_by")
    assert (line["level"], line["method"]) == ("debug", "characters") and "not in the cache" in line["reason"]


# ---- What is said ----


def test_what_a_provider_quotes_of_the_conversation_or_of_a_key_is_not_logged(aliased: Service) -> None:
    secret = "a canary in the prompt, of some length"

    aliased.read(aliased.stream_url(model="gpt-test-status-s401-i406", prompt=secret))
    aliased.read(aliased.stream_url(model="claude-test-echoing-i406", prompt=secret))

    for family in ("gpt", "claude"):
        aliased.read(aliased.stream_url(model=f"{family}-test-quoting-i406"))

    lines = [line for line in aliased.lines("provider.failed") if line["model"].endswith("-i406")]
    assert {"Incorrect API key provided: […].", "The prompt was: […]", "The answer was: […]"} == {
        line.get("provider_message") for line in lines
    }
    assert "canary" not in aliased.log and "word3" not in aliased.log
    assert all(line["provider_request"].startswith("req_test") for line in lines if "provider_status" in line)


def test_what_was_tried_is_told_in_the_log_line_by_line(aliased: Service) -> None:
    names = ["gpt-test-status-s404-i407", "claude-test-status-s403-i407", "gpt-test-hello-i407"]
    url = aliased.stream_url(model=names[0], fallbackModels=names[1:])

    aliased.read(url)

    stream_id = url.split("/stream/")[1].split("?")[0]
    lines = [json.loads(line) for line in aliased.log.splitlines() if stream_id in line and "provider." in line]
    assert [(line["event"], line["model"], line.get("code")) for line in lines] == [
        ("provider.failed", names[0], "model_not_found"),
        ("provider.fallback", names[1], None),
        ("provider.failed", names[1], "provider_auth_failed"),
        ("provider.fallback", names[2], None),
    ]
