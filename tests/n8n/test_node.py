"""The community node of n8n/n8n-nodes-aistream: one node instead of five, in a real n8n."""

import json
from collections.abc import Callable
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


@pytest.fixture
def start_chat(n8n: N8n, start_service: Callable[..., Service], provider: ProviderServer) -> Callable[..., Chat]:
    """Publishes the node's example for a service with these variables."""

    def start(**environ: str) -> Chat:
        service = start_service(**{"CALLBACK_SECRET": SIGNED, **provider.openai_environ, **environ})
        data = {"baseUrl": service.url, "jwtSecret": SECRET, "algorithm": "HS256", "subject": "n8n", "callbackSecret": SIGNED}
        credential = n8n.credential("AiStream", "aiStreamApi", {"audience": "", "issuer": "", **data})
        workflow = Workflow(EXAMPLE)
        workflow["AiStream"].update(type=TYPES[workflow["AiStream"]["type"]], credentials={"aiStreamApi": credential})
        workflow.parameters("AiStream").update(model="={{ $json.body.model }}")
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
    assert (told["status"], told["error"]["code"]) == ("failed", "provider_unavailable")
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
