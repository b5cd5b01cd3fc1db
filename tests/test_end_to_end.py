"""One answer from init to callback, over real sockets, with both providers."""

import httpx
import pytest
from gevent.pool import Pool

from tests.neighbours.provider import ProviderServer
from tests.neighbours.receiver import Receiver
from tests.service import Service, n8n_token, text_of

SEED_FIELDS = {"userId", "chatId", "prompt", "answer", "input_tokens", "output_tokens"}


@pytest.mark.parametrize("model", ["gpt-test-hello", "claude-test-hello"])
def test_an_answer_is_streamed_and_then_delivered_to_n8n(service: Service, n8n: Receiver, model: str) -> None:
    url = service.stream_url(model=model, resumeUrl=n8n.url("/w/1?signature=ab"), userId="u", chatId=7, prompt="Say hello")

    events = service.read(url)

    (callback,) = n8n.wait_for(1)
    assert events[-1].data == "[DONE]"
    assert callback.target == "/w/1?signature=ab"
    assert callback.json["answer"] == text_of(events) != ""
    assert set(callback.json) >= SEED_FIELDS
    assert (callback.json["userId"], callback.json["chatId"], callback.json["prompt"]) == ("u", 7, "Say hello")
    assert (callback.json["input_tokens"], callback.json["usage"]["source"]) == (2, "provider")
    assert callback.json["output_tokens"] > 0
    assert (callback.json["status"], callback.json["finish_reason"], callback.json["error"]) == ("completed", "stop", None)


def test_a_hundred_first_connects_start_one_generation_and_all_get_the_whole_text(
    service: Service, provider: ProviderServer, n8n: Receiver
) -> None:
    model = "gpt-test-long-n100-d5-i1"
    url = service.stream_url(model=model, resumeUrl=n8n.url())

    answers = Pool(100).map(lambda _: text_of(service.read(url)), range(100))

    (callback,) = n8n.wait_for(1)
    assert len(provider.requests(model)) == 1
    assert set(answers) == {callback.json["answer"]} != {""}


def test_twenty_inits_with_one_key_start_one_answer_and_owe_one_callback(
    service: Service, provider: ProviderServer, n8n: Receiver
) -> None:
    model = "gpt-test-hello-i301"
    asked = {"resumeUrl": n8n.url(), "prompt": "Hello", "model": model, "start": "immediate"}

    def init(number: int) -> httpx.Response:
        headers = {"Idempotency-Key": "execution-7", "Authorization": f"Bearer {n8n_token(jti=str(number))}"}
        return httpx.post(f"{service.url}/init-stream", json=asked, headers=headers, timeout=10)

    answers = Pool(20).map(init, range(20))

    (callback,) = n8n.wait_for(1)
    assert {answer.json()["streamId"] for answer in answers} == {callback.json["streamId"]}
    assert sum("Idempotent-Replayed" not in answer.headers for answer in answers) == 1
    assert len(provider.requests(model)) == 1 and len(n8n.requests) == 1
