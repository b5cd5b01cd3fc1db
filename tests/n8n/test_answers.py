"""What n8n answers to a callback, and what aistream makes of it: the table of docs/n8n.md, against a real n8n."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from tests.n8n.client import Execution, N8n
from tests.n8n.conftest import StartChat
from tests.n8n.workflow import KEY, Chat
from tests.neighbours.provider import ProviderServer
from tests.neighbours.receiver import CUT, Reaction, Received, Receiver
from tests.service import Service, n8n_token

WAIT = "Wait for the answer"


def outcomes(attempts: list[dict[str, Any]]) -> list[tuple[int | None, str]]:
    """Status and outcome of each attempt."""
    return [(attempt["status"], attempt["outcome"]) for attempt in attempts]


def test_a_callback_that_is_too_early_is_tried_again(start_chat: StartChat) -> None:
    pause = {
        "name": "A slow node",
        "type": "n8n-nodes-base.wait",
        "typeVersion": 1.1,
        "parameters": {"resume": "timeInterval", "amount": 3, "unit": "seconds"},
    }
    chat = start_chat(lambda workflow: workflow.insert(pause, before=WAIT))

    chat.service.read(chat.stream_url())

    *early, last = outcomes(chat.attempts("delivered"))
    assert last == (200, "delivered")
    assert set(early) == {(409, "retry")}
    assert "has not reached its Wait node" in chat.attempts("delivered")[0]["reason"]
    assert chat.ended().last_node == "Use the answer"


@pytest.mark.parametrize("wrong", [{"httpMethod": "GET"}, {"options": {"webhookSuffix": "more"}}], ids=["GET", "suffix"])
def test_a_wait_node_that_listens_elsewhere_is_named_as_the_reason(
    start_chat: StartChat, provider: ProviderServer, wrong: dict[str, Any]
) -> None:
    chat = start_chat(lambda workflow: workflow.parameters(WAIT).update(wrong))

    with written_while_it_waits(chat, provider):
        pass

    (attempt,) = chat.attempts("dead")
    assert attempt["status"] == 404
    assert "POST" in attempt["reason"] and "suffix" in attempt["reason"]
    assert chat.waiting()


def test_a_wrong_key_is_final_and_leaves_the_execution_waiting(start_chat: StartChat, provider: ProviderServer) -> None:
    chat = start_chat(CALLBACK_HEADERS=f"{KEY[0]}: another-key")

    with written_while_it_waits(chat, provider):
        pass

    assert outcomes(chat.attempts("dead")) == [(403, "dead")]
    assert chat.waiting()


def test_a_dead_callback_is_delivered_when_its_cause_is_mended(
    start_chat: StartChat, start_service: Callable[..., Service], provider: ProviderServer, redis_url: str
) -> None:
    chat = start_chat(REDIS_URL=redis_url, CALLBACK_HEADERS=f"{KEY[0]}: another-key")
    with written_while_it_waits(chat, provider):
        pass
    (attempt,) = chat.attempts("dead")
    chat.service.stop()

    mended = start_service(REDIS_URL=redis_url, CALLBACK_HEADERS=": ".join(KEY), **provider.openai_environ)
    bearer = {"Authorization": f"Bearer {n8n_token()}"}
    answer = httpx.post(f"{mended.url}/callbacks/{attempt['session']}/redeliver", headers=bearer, timeout=10)

    assert answer.status_code == 202
    assert chat.ended().output("Use the answer")["streamId"] == attempt["session"]


def test_a_wrong_signature_is_final_and_leaves_the_execution_waiting(start_chat: StartChat, provider: ProviderServer) -> None:
    chat = start_chat(lambda workflow: workflow.say_resume_url("$execution.resumeUrl.slice(0, -1) + 'x'"))

    with written_while_it_waits(chat, provider):
        pass

    assert outcomes(chat.attempts("dead")) == [(401, "dead")]
    assert chat.waiting()


def test_a_wait_node_that_ignores_bots_takes_the_callback(start_chat: StartChat, provider: ProviderServer) -> None:
    chat = start_chat(lambda workflow: workflow.parameters(WAIT).update(options={"ignoreBots": True}))

    with written_while_it_waits(chat, provider):
        pass

    assert outcomes(chat.attempts("delivered")) == [(200, "delivered")]
    assert chat.ended().last_node == "Use the answer"


def test_nobody_is_left_to_tell_when_the_execution_was_deleted(start_chat: StartChat, provider: ProviderServer, n8n: N8n) -> None:
    chat = start_chat()

    with written_while_it_waits(chat, provider) as execution:
        n8n.delete_execution(execution.id)

    (attempt,) = chat.attempts("dead")
    assert (attempt["status"], attempt["reason"]) == (404, "the execution no longer waits")


def test_nobody_is_left_to_tell_when_somebody_else_woke_the_execution(start_chat: StartChat, provider: ProviderServer) -> None:
    chat = start_chat()

    with written_while_it_waits(chat, provider) as execution:
        httpx.post(execution.resume_url, json={}, headers=dict([KEY]), timeout=30).raise_for_status()
        chat.ended()

    (attempt,) = chat.attempts("dead")
    assert (attempt["status"], attempt["reason"]) == (409, "the execution no longer waits")


def test_a_callback_that_had_arrived_unheard_is_known_to_be_delivered(
    start_chat: StartChat, provider: ProviderServer, n8n: N8n
) -> None:
    with Receiver() as between:

        def forward(received: Received) -> Reaction:
            headers = {name: received.headers[name] for name in ("content-type", KEY[0].lower())}
            answer = httpx.post(f"{n8n.url}{received.target}", content=received.body, headers=headers, timeout=30)
            return answer.status_code, {"Content-Type": answer.headers["content-type"]}, answer.content

        def lose_the_answer(received: Received) -> Reaction:
            forward(received)
            return CUT

        between.answers([lose_the_answer])
        between.always(forward)
        chat = start_chat(RESUME_URL_REWRITE=f"{n8n.url}={between.origin}")

        with written_while_it_waits(chat, provider):
            pass

        attempts = chat.attempts("delivered")
    assert outcomes(attempts)[0] == (None, "retry")
    assert outcomes(attempts)[-1] == (409, "delivered")
    assert chat.ended().last_node == "Use the answer"


def test_a_callback_that_is_owed_outlives_n8n(start_chat: StartChat, provider: ProviderServer, n8n: N8n) -> None:
    chat = start_chat()
    try:
        with written_while_it_waits(chat, provider):
            n8n.kill()
        chat.attempts("retry")
    finally:
        n8n.start()

    *early, last = outcomes(chat.attempts("delivered", timeout=60))
    assert last == (200, "delivered")
    assert (None, "retry") in early and {outcome for _, outcome in early} == {"retry"}
    assert chat.ended().output("Use the answer")["answer"] != ""


@contextlib.contextmanager
def written_while_it_waits(chat: Chat, provider: ProviderServer) -> Iterator[Execution]:
    """An answer that is half written while its execution waits; it is finished, and the callback due, after the block."""
    with chat.service.watch(chat.stream_url(model="gpt-test-hold-k3")) as events:
        next(events)
        yield chat.waiting()
        provider.release()
        assert list(events)[-1].data == "[DONE]"
