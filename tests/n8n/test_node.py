"""The community node of n8n/n8n-nodes-aistream: one node instead of five, in a real n8n."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.n8n.client import N8n
from tests.n8n.workflow import Chat, Workflow
from tests.neighbours.provider import ProviderServer
from tests.service import ROOT, SECRET, Service, text_of

EXAMPLE: dict[str, Any] = json.loads((ROOT / "n8n" / "n8n-nodes-aistream" / "examples" / "chat.json").read_text())
#: What the node is called when it comes from N8N_CUSTOM_EXTENSIONS, and not as an installed package.
TYPES = {"n8n-nodes-aistream.aiStream": "CUSTOM.aiStream"}
COMPLETED, NOT_COMPLETED = (links[0]["node"] for links in EXAMPLE["connections"]["AiStream"]["main"])
SIGNED = "whsec_c2VjcmV0LW9mLXRoZS10ZXN0cy13aXRoLWVub3VnaC1ieXRlcw=="
ANOTHER = "whsec_YW5vdGhlci1zZWNyZXQtdGhhbi10aGUtb25lLWluLXRoZS1ub2Rl"


def by_name(name: str) -> dict[str, Any]:
    """The field Model, when the author has typed a name in."""
    return {"__rl": True, "mode": "name", "value": name}


@pytest.fixture
def start_chat(n8n: N8n, start_service: Callable[..., Service], provider: ProviderServer) -> Callable[..., Chat]:
    """Publishes the node's example for a service with these variables, after `change` has been at it."""

    def start(change: Callable[[Workflow], object] = lambda workflow: None, **environ: str) -> Chat:
        service = start_service(**{"CALLBACK_SECRET": SIGNED, **provider.openai_environ, **environ})
        data = {"baseUrl": service.url, "jwtSecret": SECRET, "algorithm": "HS256", "subject": "n8n", "callbackSecret": SIGNED}
        credential = n8n.credential("AiStream", "aiStreamApi", {"audience": "", "issuer": "", **data})
        workflow = Workflow(EXAMPLE)
        workflow["AiStream"].update(type=TYPES[workflow["AiStream"]["type"]], credentials={"aiStreamApi": credential})
        workflow.parameters("AiStream").update(model=by_name("={{ $json.body.model }}"))
        change(workflow)
        return Chat(n8n, service, workflow)

    return start


def test_the_node_streams_the_answer_and_gives_out_the_callback(start_chat: Callable[..., Chat]) -> None:
    chat = start_chat()

    events = chat.service.read(chat.stream_url())

    told = chat.ended().output(COMPLETED)
    assert told["answer"] == text_of(events) == "Hello, this is the test provider."
    assert (told["status"], told["userId"], told["chatId"]) == ("completed", "user_123", "chat_456")
    assert told["output_tokens"] > 0


def test_the_node_gives_a_failed_answer_out_on_its_other_output(start_chat: Callable[..., Chat]) -> None:
    chat = start_chat()

    events = chat.service.read(chat.stream_url(model="gpt-test-cut-k3"))

    told = chat.ended().output(NOT_COMPLETED)
    assert (told["status"], told["error"]["code"]) == ("failed", "upstream_disconnected")
    assert told["answer"] == text_of(events) != ""


def test_the_node_refuses_a_callback_that_another_secret_signed_and_waits_on(start_chat: Callable[..., Chat]) -> None:
    chat = start_chat(CALLBACK_SECRET=ANOTHER)

    chat.service.read(chat.stream_url())

    assert chat.attempts("dead")[-1]["status"] == 401
    assert chat.waiting()


def test_the_node_tells_the_page_that_it_asked_wrongly(start_chat: Callable[..., Chat]) -> None:
    chat = start_chat()

    answer = chat.ask(prompt="")

    assert answer.headers["content-type"].startswith("application/json")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_request")
    assert chat.ended().status == "error"


@pytest.mark.parametrize("version", [1, 1.1])
@pytest.mark.parametrize("model", ["gpt-test-hello", "={{ $json.body.model }}"])
def test_a_workflow_with_the_model_as_plain_text_runs_as_ever(
    start_chat: Callable[..., Chat], version: float, model: str
) -> None:
    def change(workflow: Workflow) -> None:
        workflow["AiStream"].update(typeVersion=version)
        workflow.parameters("AiStream").update(model=model)

    chat = start_chat(change)

    chat.service.read(chat.stream_url())

    assert chat.ended().output(COMPLETED)["requested_model"] == "gpt-test-hello"


def test_the_author_chooses_among_the_models_that_the_service_lists(
    start_chat: Callable[..., Chat], n8n: N8n, provider: ProviderServer, tmp_path: Path
) -> None:
    (tmp_path / "models.toml").write_text(
        f'[fast]\nbase_url = "{provider.openai_url}"\nmodel = "gpt-test-hello"\n'
        f'[big]\nbase_url = "{provider.openai_url}"\nmodels = ["gpt-test-long", "gpt-test-short"]\n'
    )
    nodes = []

    def change(workflow: Workflow) -> None:
        chosen = {"__rl": True, "mode": "list", "value": "fast", "cachedResultName": "fast"}
        workflow.parameters("AiStream").update(model=chosen)
        nodes.append(workflow["AiStream"])

    chat = start_chat(change, MODELS_FILE=str(tmp_path / "models.toml"))

    offered = n8n.offered(nodes[0], "model", "searchModels")
    assert {"fast", "big/gpt-test-long", "gpt-test-hello"} <= set(offered) and offered == sorted(offered)
    assert n8n.offered(nodes[0], "model", "searchModels", "BIG/") == ["big/gpt-test-long", "big/gpt-test-short"]
    chat.service.read(chat.stream_url())
    told = chat.ended().output(COMPLETED)
    assert (told["requested_model"], told["provider"], told["model"]) == ("fast", "fast", "gpt-test-hello")


def test_a_fallback_model_answers_and_the_callback_says_so(start_chat: Callable[..., Chat], provider: ProviderServer) -> None:
    def change(workflow: Workflow) -> None:
        workflow.parameters("AiStream")["options"].update(fallbackModels=[" gpt-test-hello-i7 ", ""], reasoningEffort="high")

    chat = start_chat(change)

    events = chat.service.read(chat.stream_url(model="gpt-test-status-s404-i7"))

    told = chat.ended().output(COMPLETED)
    assert told["answer"] == text_of(events) == "Hello, this is the test provider."
    assert (told["requested_model"], told["model"]) == ("gpt-test-status-s404-i7", "gpt-test-hello-i7")
    assert (told["provider_requests"], told["warnings"], told["usage"]["estimated_by"]) == (2, [], None)
    assert [asked.body["reasoning_effort"] for asked in provider.requests("gpt-test-hello-i7")] == ["high"]
