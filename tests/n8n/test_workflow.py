"""The workflow that authors import, from the page's request to the node that uses the answer."""

import httpx

from tests.n8n.client import N8n
from tests.n8n.conftest import StartChat
from tests.n8n.workflow import Workflow
from tests.neighbours.provider import ProviderServer
from tests.neighbours.receiver import CUT, Reaction, Received, Receiver
from tests.service import text_of


def test_a_page_streams_the_answer_and_the_workflow_goes_on_with_it(start_chat: StartChat) -> None:
    chat = start_chat()

    events = chat.service.read(chat.stream_url())

    used = chat.ended().output("Use the answer")
    assert events[-1].data == "[DONE]"
    assert used["answer"] == text_of(events) == "Hello, this is the test provider."
    assert (used["userId"], used["chatId"], used["model"]) == ("user_123", "chat_456", "gpt-test-hello")
    assert used["input_tokens"] > 0 and used["output_tokens"] > 0


def test_what_a_page_leaves_out_is_left_to_the_service(start_chat: StartChat) -> None:
    chat = start_chat(DEFAULT_MODEL="echo")

    streamed = text_of(chat.service.read(chat.ask_exactly({"prompt": "Nothing else"}).json()["streamUrl"]))

    used = chat.ended().output("Use the answer")
    assert used["answer"] == streamed == "Nothing else"
    assert (used["userId"], used["chatId"], used["model"]) == (None, None, "echo")


def test_the_user_and_the_chat_keep_their_types(start_chat: StartChat) -> None:
    chat = start_chat()

    chat.service.read(chat.stream_url(userId=7, chatId="7"))

    used = chat.ended().output("Use the answer")
    assert (used["userId"], used["chatId"]) == (7, "7")


def test_a_page_of_another_origin_may_ask(start_chat: StartChat, n8n: N8n) -> None:
    chat = start_chat()

    allowed = n8n.preflight(chat.path, "https://page.example.com").headers
    answered = chat.ask().headers

    assert allowed["access-control-allow-origin"] == "https://page.example.com"
    assert "content-type" in allowed["access-control-allow-headers"]
    assert answered["access-control-allow-origin"] == "http://localhost:3000"


def test_a_page_of_an_origin_that_is_not_listed_may_not_ask(start_chat: StartChat, n8n: N8n) -> None:
    chat = start_chat(lambda workflow: workflow.parameters("Browser asks")["options"].update(allowedOrigins="https://a.example"))

    allowed = n8n.preflight(chat.path, "https://b.example").headers

    assert allowed["access-control-allow-origin"] == "https://a.example"


def test_an_answer_that_breaks_off_takes_the_branch_that_has_the_part_and_the_reason(start_chat: StartChat) -> None:
    chat = start_chat()

    events = chat.service.read(chat.stream_url(model="gpt-test-cut-k3"))

    execution = chat.ended()
    told = execution.output("The answer is not whole")
    assert (told["status"], told["code"], told["retryable"]) == ("failed", "upstream_disconnected", True)
    assert told["partial_answer"] == text_of(events) != ""
    assert (told["userId"], told["chatId"]) == ("user_123", "chat_456")
    assert execution.last_node == "The answer is not whole"


def test_a_provider_that_refuses_is_told_by_its_code(start_chat: StartChat) -> None:
    chat = start_chat()

    chat.service.read(chat.stream_url(model="gpt-test-status-s401"))

    told = chat.ended().output("The answer is not whole")
    assert (told["status"], told["code"], told["partial_answer"]) == ("failed", "provider_auth_failed", "")


def test_a_stream_that_is_stopped_takes_the_branch_with_the_part(start_chat: StartChat, provider: ProviderServer) -> None:
    chat = start_chat()
    url = chat.stream_url(model="gpt-test-hold-k3")

    with chat.service.watch(url) as events:
        provider.wait_for_open_streams(1)
        chat.waiting()
        httpx.post(url.replace("?", "/cancel?"), timeout=10)
        streamed = text_of(list(events))

    told = chat.ended().output("The answer is not whole")
    assert (told["status"], told["code"], told["partial_answer"]) == ("cancelled", "cancelled", streamed)
    assert streamed != ""


def test_a_stream_that_nobody_opens_takes_the_branch_of_what_is_not_whole(start_chat: StartChat) -> None:
    chat = start_chat(SESSION_TTL_SECONDS="1")

    chat.ask()

    told = chat.ended().output("The answer is not whole")
    assert (told["status"], told["code"], told["partial_answer"]) == ("expired", "expired", "")


def test_a_wait_that_reaches_its_limit_takes_a_branch_of_its_own(start_chat: StartChat) -> None:
    def shortly(workflow: Workflow) -> None:
        # n8n looks at the limits once a minute: it may take 60 s all the same.
        workflow.parameters("Wait for the answer").update(resumeAmount=1, resumeUnit="seconds")

    chat = start_chat(shortly)

    stream_id = chat.ask().json()["streamId"]

    execution = chat.ended(timeout=90)
    assert execution.last_node == "No callback came"
    assert execution.output("No callback came") == {
        "status": "no_callback",
        "streamId": stream_id,
        "userId": "user_123",
        "chatId": "chat_456",
    }


def test_a_page_that_asks_wrongly_is_told_what_is_wrong(start_chat: StartChat) -> None:
    chat = start_chat()

    answer = chat.ask(prompt=None, max_tokens="many")

    told = answer.json()
    assert answer.status_code == 400 and answer.headers["content-type"].startswith("application/json")
    assert (told["ok"], told["error"]["code"], told["error"]["retryable"]) == (False, "invalid_request", False)
    assert "prompt" in told["error"]["message"] and "max_tokens" in told["error"]["message"]
    assert (chat.ended().status, chat.ended().last_node) == ("error", "Mark as failed")


def test_a_refusal_that_is_not_the_pages_fault_is_told_without_its_reason(start_chat: StartChat) -> None:
    chat = start_chat(JWT_SECRET="another-secret-than-the-one-in-the-credential")

    answer = chat.ask()

    told = {"code": "token_signature", "message": "The chat is not available at the moment.", "retryable": False}
    assert (answer.status_code, answer.json()) == (502, {"ok": False, "error": told})
    assert "JWT_SECRET" in chat.ended().output("Whose fault is it?")["reason"]


def test_a_resume_url_that_the_service_does_not_take_is_no_fault_of_the_page(start_chat: StartChat) -> None:
    chat = start_chat(RESUME_URL_ALLOWED_ORIGINS="http://n8n:5678")

    answer = chat.ask()

    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "invalid_request")
    assert "RESUME_URL_ALLOWED_ORIGINS" not in answer.text
    assert "RESUME_URL_ALLOWED_ORIGINS" in chat.ended().output("Whose fault is it?")["reason"]


def test_a_service_that_is_not_there_is_told_clearly(start_chat: StartChat) -> None:
    chat = start_chat()
    chat.service.kill()

    answer = chat.ask()

    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["retryable"]) == (502, "stream_unavailable", True)


def test_an_init_whose_answer_was_lost_is_asked_again_and_makes_no_second_stream(start_chat: StartChat) -> None:
    given: list[str] = []

    def lose_the_first_answer(received: Received) -> Reaction:
        headers = {name: received.headers[name] for name in ("content-type", "idempotency-key")}
        answer = httpx.post(f"{chat.service.url}{received.target}", content=received.body, headers=headers, timeout=10)
        given.append(answer.json()["streamId"])
        return CUT if len(given) == 1 else (answer.status_code, {"Content-Type": "application/json"}, answer.content)

    with Receiver() as between:
        between.always(lose_the_first_answer)
        chat = start_chat(lambda workflow: workflow.parameters("Open the stream").update(url=between.url("/init-stream")))

        answer = chat.ask()

    assert given == [answer.json()["streamId"]] * 2
