"""POST /init-stream, and what all routes share: problems, CORS and health. Asked through Flask's own test client."""

import json
import re
import shutil
import subprocess
import time
import uuid
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
from flask.testing import FlaskClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from werkzeug.test import TestResponse

from aistream import __version__
from aistream.session import Message, Request, Route
from tests.conftest import MakeClient, missing, parts_of
from tests.neighbours.receiver import Receiver
from tests.service import PROMPT, Service, n8n_token, wait_until

#: Stands in whatever must not come back in an answer to a bad request.
PRIVATE = "xPRIVATEx"
RESUME_URL = "http://n8n.test:5678/webhook-waiting/1?signature=ab"


def asked(**body: Any) -> dict[str, Any]:
    """The least that init needs, with these fields on top."""
    return {"n8nToken": n8n_token(), "resumeUrl": RESUME_URL, "prompt": PROMPT, **body}


def init(client: FlaskClient, **body: Any) -> TestResponse:
    """Asks for a stream."""
    return client.post("/init-stream", json=asked(**body))


def send(client: FlaskClient, raw: bytes, **headers: str) -> TestResponse:
    """Sends this body, with a good token in the header."""
    headers = {"Authorization": f"Bearer {n8n_token()}", "Content-Type": "application/json", **headers}
    return client.post("/init-stream", data=raw, headers=headers)


def accepted(answer: TestResponse) -> dict[str, Any]:
    """The body of an answer that is a success."""
    assert answer.status_code == 200, answer.text
    return dict(answer.json or {})


def stored(client: FlaskClient, answer: TestResponse) -> Request:
    """What the store holds of an accepted init."""
    stored = parts_of(client).store.pending(accepted(answer)["streamId"])
    request = stored.request if stored else None
    assert request is not None
    return request


def problem(answer: TestResponse, status: int, code: str) -> dict[str, Any]:
    """The body of an answer that is a problem, as every problem is."""
    body = dict(answer.json or {})
    assert (answer.status_code, body["status"], body["code"]) == (status, status, code), answer.text
    assert (answer.mimetype, body["ok"], body["type"]) == ("application/problem+json", False, "about:blank")
    assert (answer.headers["Cache-Control"], answer.headers["X-Content-Type-Options"]) == ("no-store", "nosniff")
    assert body["title"] and body["detail"].endswith(".") and body["requestId"] == answer.headers["X-Request-ID"]
    assert set(body) <= {"ok", "type", "title", "status", "code", "detail", "requestId", "errors"}
    assert PRIVATE not in answer.text and "eyJ" not in answer.text
    return body


def named(answer: TestResponse, code: str = "invalid_request") -> dict[str, str]:
    """The faulty fields of a refused body, each with what is said of it."""
    body = problem(answer, 400, code)
    assert body["detail"] == "; ".join(f"{error['field']}: {error['message']}" for error in body["errors"]) + "."
    return {error["field"]: error["message"] for error in body["errors"]}


# ---- What is accepted ----


def test_an_accepted_init_answers_with_the_address_of_its_stream(make_client: MakeClient) -> None:
    client = make_client(BASE_URL="https://ai.test/chat")

    body = accepted(init(client))

    url = urlsplit(body["streamUrl"])
    ((token,),) = parse_qs(url.query).values()
    assert (body["ok"], body["warnings"]) == (True, [])
    assert str(uuid.UUID(body["streamId"])) == body["streamId"]
    assert f"{url.scheme}://{url.netloc}{url.path}" == f"https://ai.test/chat/stream/{body['streamId']}"
    assert parts_of(client).tokens.verify_viewer(token) == body["streamId"]
    assert set(body) == {"ok", "streamUrl", "streamId", "expiresAt", "warnings"}


@pytest.mark.parametrize(("environ", "seconds"), [({}, 60), ({"SESSION_TTL_SECONDS": "5"}, 5)])
def test_it_says_until_when_somebody_must_have_come(make_client: MakeClient, environ: dict[str, str], seconds: int) -> None:
    expires_at = datetime.fromisoformat(accepted(init(make_client(**environ)))["expiresAt"]).timestamp()

    assert expires_at == pytest.approx(time.time() + seconds, abs=2)


def test_the_least_that_is_needed_has_defaults_for_all_the_rest(client: FlaskClient) -> None:
    assert stored(client, init(client)) == Request(prompt=PROMPT, requested_model="echo", model="echo", provider="echo")


def test_the_default_model_is_gpt_4_where_there_is_a_key(make_client: MakeClient) -> None:
    client = make_client(OPENAI_API_KEY="k")

    request = stored(client, init(client))

    assert (request.requested_model, request.model, request.provider) == ("gpt-4", "gpt-4", "openai")


def test_all_optional_fields_are_kept_as_they_are(make_client: MakeClient) -> None:
    client = make_client(OPENAI_API_KEY="k")
    turns = [{"role": "system", "content": ""}, {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]

    answer = init(
        client,
        userId="u-1",
        chatId=7,
        model="gpt-4o",
        max_tokens=1,
        messages=turns,
        system="Be short.",
        temperature=0,
        top_p=1,
        stop=["a", "\n"],
        metadata={"a": [1, None, {"ü": "\0"}]},
        format="text",
    )

    assert accepted(answer)["warnings"] == []
    assert "format" not in accepted(answer)["streamUrl"]
    assert stored(client, answer) == Request(
        prompt=PROMPT,
        requested_model="gpt-4o",
        model="gpt-4o",
        provider="openai",
        max_tokens=1,
        messages=(Message("system", ""), Message("user", "1+1?"), Message("assistant", "2")),
        system="Be short.",
        temperature=0.0,
        top_p=1.0,
        stop=("a", "\n"),
        user_id="u-1",
        chat_id=7,
        metadata={"a": [1, None, {"ü": "\0"}]},
    )


def test_null_is_as_good_as_absent(client: FlaskClient) -> None:
    optional = set(FIELDS.split()) - {"resumeUrl", "prompt"}

    answer = init(client, **dict.fromkeys(optional))

    assert accepted(answer)["warnings"] == []
    assert stored(client, answer) == stored(client, init(client))


@pytest.mark.parametrize("content_type", ["application/json", "application/json; charset=utf-8", "application/vnd.n8n+json", ""])
def test_json_may_come_under_any_of_its_names_or_none(client: FlaskClient, content_type: str) -> None:
    accepted(send(client, json.dumps(asked()).encode(), **{"Content-Type": content_type}))


def test_text_is_kept_to_the_character(client: FlaskClient) -> None:
    text = " a\r\nb\u2028\x7f 😀\ufeff \\u0000 [DONE]\n"

    answer = init(client, prompt=text, system=text, stop=text, messages=[{"role": "user", "content": text}])

    request = stored(client, answer)
    assert [request.prompt, request.system, *request.stop, request.messages[0].content] == [text] * 4


def test_a_whole_number_may_be_written_with_a_point(client: FlaskClient) -> None:
    assert stored(client, send(client, json.dumps(asked()).encode()[:-1] + b', "max_tokens": 500.0}')).max_tokens == 500


def test_of_a_key_that_comes_twice_the_last_counts(client: FlaskClient) -> None:
    answer = send(client, b'{"prompt":"one","resumeUrl":"http://n8n.test/1","prompt":"two"}')

    assert stored(client, answer).prompt == "two"


def test_the_token_may_come_in_the_header_which_then_wins(client: FlaskClient) -> None:
    good, old = {"Authorization": f"Bearer {n8n_token()}"}, {"Authorization": f"bearer  {n8n_token(exp=1)}"}

    accepted(client.post("/init-stream", json=asked(n8nToken=None), headers=good))
    accepted(client.post("/init-stream", json=asked(n8nToken=n8n_token(exp=1)), headers=good))
    problem(client.post("/init-stream", json=asked(), headers=old), 401, "token_expired")


def test_a_header_of_another_scheme_does_not_hide_the_bodys_token(client: FlaskClient) -> None:
    accepted(client.post("/init-stream", json=asked(), headers={"Authorization": "Basic YTpi"}))


def test_json_mode_stands_in_the_stream_url(client: FlaskClient) -> None:
    assert accepted(init(client, format="json"))["streamUrl"].endswith("&format=json")


def test_unknown_fields_are_ignored_and_listed(client: FlaskClient) -> None:
    unknown = {"maxTokens": 5, "k" * 300: 1, "\0\n": {}}

    body = accepted(send(client, json.dumps(asked(**unknown)).encode()))

    assert body["warnings"] == [
        "maxTokens is unknown and was ignored",
        "k" * 100 + " is unknown and was ignored",
        "\0\n is unknown and was ignored",
    ]
    assert len(accepted(init(client, **dict.fromkeys(map(str, range(1000)))))["warnings"]) == 50


@pytest.mark.parametrize(("model", "unused"), [("echo", True), ("claude-x", True), ("gpt-x", False)])
def test_what_a_provider_does_not_take_is_listed(make_client: MakeClient, model: str, unused: bool) -> None:
    client = make_client(OPENAI_API_KEY="k", ANTHROPIC_API_KEY="k")

    body = accepted(init(client, model=model, temperature=1, top_p=0.5))

    assert [warning.split(" ")[0] for warning in body["warnings"]] == (["temperature", "top_p"] if unused else [])


@pytest.mark.parametrize(
    ("body", "grace"),
    [
        ({}, None),
        ({"onDisconnect": "continue"}, None),
        ({"onDisconnect": "cancel"}, 30),
        ({"onDisconnect": "cancel", "disconnectGraceSeconds": 1}, 1),
        ({"onDisconnect": "cancel", "disconnectGraceSeconds": 3600}, 3600),
    ],
)
def test_an_answer_outlives_its_viewers_unless_its_workflow_wants_it_otherwise(
    client: FlaskClient, body: dict[str, Any], grace: float | None
) -> None:
    answer = init(client, **body)

    assert accepted(answer)["warnings"] == []
    assert stored(client, answer).disconnect_grace == grace


def test_a_session_that_starts_immediately_waits_for_nobody(client: FlaskClient) -> None:
    answer = init(client, start="immediate")

    assert accepted(answer)["warnings"] == []
    assert accepted(answer)["expiresAt"] is None
    assert stored(client, answer).immediate
    assert not stored(client, init(client, start="connect")).immediate


def test_a_grace_period_that_has_no_effect_is_told(client: FlaskClient) -> None:
    body = accepted(init(client, disconnectGraceSeconds=5))

    assert body["warnings"] == ['disconnectGraceSeconds has no effect without "onDisconnect": "cancel"']


def test_user_chat_and_metadata_reach_n8n_in_the_types_they_came_in(client: FlaskClient, n8n: Receiver) -> None:
    values = ["u-1", "", 7, 0, -1, 7.0, 0.1, 1.5e300, 2**63, 10**30, None]
    resume_urls = [n8n.url(f"/w/{number}") for number in range(len(values))]

    for value, resume_url in zip(values, resume_urls, strict=True):
        body = accepted(init(client, resumeUrl=resume_url, userId=value, chatId=value, metadata={"a": [value, True]}))
        client.get(body["streamUrl"]).close()

    n8n.wait_for(len(values))
    for number, value in enumerate(values):
        (callback,) = n8n.wait_for(1, path=f"/w/{number}")
        echoed = [callback.json["userId"], callback.json["chatId"], callback.json["metadata"]["a"][0]]
        assert [(type(one), one) for one in echoed] == [(type(value), value)] * 3
        assert callback.json["prompt"] == callback.json["answer"] == PROMPT


def test_a_resume_url_is_called_byte_for_byte(client: FlaskClient, n8n: Receiver) -> None:
    target = "/webhook-waiting/7/a%2fb%7E/..;x/.?signature=0aF%2fz&y='~(%20)*&&z="

    client.get(accepted(init(client, resumeUrl=n8n.url(target)))["streamUrl"]).close()

    (callback,) = n8n.wait_for(1)
    assert callback.target == target


# ---- What is refused: fields ----

LONG = {"prompt": "x" * 200_001, "url": "http://n8n.test/" + "x" * 2_048}


@pytest.mark.parametrize(
    ("body", "field", "message"),
    [
        ({"prompt": ""}, "prompt", "at least 1 character"),
        ({"prompt": None}, "prompt", "expected text"),
        ({"prompt": [PRIVATE]}, "prompt", "expected text"),
        ({"prompt": f"{PRIVATE}\0"}, "prompt", "without the character NUL"),
        ({"prompt": LONG["prompt"]}, "prompt", "has 200001 characters: expected at most 200000 (MAX_PROMPT_CHARS)"),
        ({"resumeUrl": ""}, "resumeUrl", "at least 1 character"),
        ({"resumeUrl": None}, "resumeUrl", "expected text"),
        ({"resumeUrl": LONG["url"]}, "resumeUrl", "at most 2048 characters"),
        ({"userId": True}, "userId", "expected text of at most 512 characters, or a number"),
        ({"userId": [PRIVATE]}, "userId", "expected text of at most 512 characters, or a number"),
        ({"userId": PRIVATE * 60}, "userId", "expected text of at most 512 characters, or a number"),
        ({"userId": "\0"}, "userId", "expected text of at most 512 characters, or a number"),
        ({"chatId": {"a": PRIVATE}}, "chatId", "expected text of at most 512 characters, or a number"),
        ({"chatId": False}, "chatId", "expected text of at most 512 characters, or a number"),
        ({"model": ""}, "model", "at least 1 character"),
        ({"model": 4}, "model", "expected text"),
        ({"model": PRIVATE * 30}, "model", "at most 200 characters"),
        ({"model": "echo\0"}, "model", "without the character NUL"),
        ({"max_tokens": 0}, "max_tokens", "expected greater than or equal to 1"),
        ({"max_tokens": 1_000_001}, "max_tokens", "expected less than or equal to 1000000"),
        ({"max_tokens": 10**30}, "max_tokens", "expected less than or equal to 1000000"),
        ({"max_tokens": 1.5}, "max_tokens", "expected a whole number"),
        ({"max_tokens": "100"}, "max_tokens", "expected a whole number"),
        ({"max_tokens": True}, "max_tokens", "expected a whole number"),
        ({"messages": {}}, "messages", "expected a list"),
        ({"messages": PRIVATE}, "messages", "expected a list"),
        ({"messages": [{"role": "user", "content": ""}] * 201}, "messages", "at most 200"),
        ({"messages": [PRIVATE]}, "messages[0]", "expected a JSON object"),
        ({"messages": [{"role": PRIVATE, "content": "x"}]}, "messages[0].role", "expected 'user', 'assistant' or 'system'"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "is missing: it is required"),
        ({"messages": [{"role": "user", "content": [PRIVATE]}]}, "messages[0].content", "expected text"),
        ({"messages": [{"role": "user", "content": "\0"}]}, "messages[0].content", "without the character NUL"),
        ({"messages": [{"role": "user", "content": LONG["prompt"]}]}, "messages", "expected at most 200000 (MAX_PROMPT_CHARS)"),
        ({"system": 5}, "system", "expected text"),
        ({"system": "\0"}, "system", "without the character NUL"),
        ({"temperature": 2.1}, "temperature", "expected less than or equal to 2"),
        ({"temperature": -0.1}, "temperature", "expected greater than or equal to 0"),
        ({"temperature": "1"}, "temperature", "expected a number"),
        ({"temperature": True}, "temperature", "expected a number"),
        ({"top_p": 1.1}, "top_p", "expected less than or equal to 1"),
        ({"stop": 5}, "stop", "expected text, or a list of at most 4 texts, each of 1 to 200 characters"),
        ({"stop": ""}, "stop", "expected text, or a list of at most 4 texts, each of 1 to 200 characters"),
        ({"stop": ["a"] * 5}, "stop", "expected text, or a list of at most 4 texts, each of 1 to 200 characters"),
        ({"stop": [PRIVATE, 5]}, "stop", "expected text, or a list of at most 4 texts, each of 1 to 200 characters"),
        ({"stop": [PRIVATE * 30]}, "stop", "expected text, or a list of at most 4 texts, each of 1 to 200 characters"),
        ({"metadata": [PRIVATE]}, "metadata", "expected a JSON object"),
        ({"metadata": {"a": "x" * 16_384}}, "metadata", "is too large: expected at most 16384 bytes of JSON"),
        ({"format": PRIVATE}, "format", "expected 'text' or 'json'"),
        ({"start": PRIVATE}, "start", "expected 'connect' or 'immediate'"),
        ({"start": True}, "start", "expected 'connect' or 'immediate'"),
        ({"onDisconnect": PRIVATE}, "onDisconnect", "expected 'continue' or 'cancel'"),
        ({"disconnectGraceSeconds": 0.9}, "disconnectGraceSeconds", "expected greater than or equal to 1"),
        ({"disconnectGraceSeconds": 3_601}, "disconnectGraceSeconds", "expected less than or equal to 3600"),
        ({"disconnectGraceSeconds": "30"}, "disconnectGraceSeconds", "expected a number"),
    ],
    ids=lambda value: str(value)[:40].replace("\0", "NUL"),
)
def test_a_bad_field_is_named_with_what_was_expected(client: FlaskClient, body: dict[str, Any], field: str, message: str) -> None:
    found = named(init(client, **body))

    assert list(found) == [field]
    assert message in found[field]


@pytest.mark.parametrize("field", ["prompt", "resumeUrl"])
def test_a_required_field_that_is_missing_is_named(client: FlaskClient, field: str) -> None:
    body = asked()
    del body[field]

    assert named(client.post("/init-stream", json=body)) == {field: "is missing: it is required"}


def test_several_faults_are_all_named_at_once(client: FlaskClient) -> None:
    turns = [{}, {"role": 1}]

    found = named(
        init(client, prompt=5, resumeUrl=f"ftp://{PRIVATE}", model="unheard-of", max_tokens=0, stop=[""], messages=turns)
    )

    assert set(found) == {
        "prompt",
        "resumeUrl",
        "model",
        "max_tokens",
        "stop",
        "messages[0].role",
        "messages[0].content",
        "messages[1].role",
        "messages[1].content",
    }


@pytest.mark.parametrize("stop", ["\0", ["a", "b\0"]], ids=["text", "list"])
def test_nul_in_stop_is_refused_like_nul_in_any_other_text(client: FlaskClient, stop: object) -> None:
    assert list(named(init(client, stop=stop))) == ["stop"]


def test_a_system_prompt_that_is_too_long_is_named_itself(client: FlaskClient) -> None:
    assert list(named(init(client, system=LONG["prompt"]))) == ["system"]


@pytest.mark.parametrize("body", [{"prompt": ""}, {"prompt": "\0"}, {"model": "x" * 201}, {"messages": [{}] * 201}], ids=list)
def test_every_sentence_says_what_was_expected(client: FlaskClient, body: dict[str, Any]) -> None:
    (message,) = named(init(client, **body)).values()

    assert "expected" in message


def test_the_faults_of_a_body_are_told_to_callers_only(client: FlaskClient) -> None:
    answer = init(client, n8nToken=n8n_token(exp=1), prompt=5, model="unheard-of")

    assert "errors" not in problem(answer, 401, "token_expired")


@pytest.mark.parametrize("token", [5, True, None, [], {"a": PRIVATE}, ""])
def test_a_token_that_is_no_text_is_no_token(client: FlaskClient, token: object) -> None:
    problem(init(client, n8nToken=token), 401, "token_missing")


# ---- What is refused: bodies ----


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b" ",
        PRIVATE.encode(),
        b"{",
        b'{"prompt": "' + PRIVATE.encode(),
        b'{"prompt": "a"} ' + PRIVATE.encode(),
        b"{'prompt': 'a'}",
        b'{"prompt": NaN}',
        b'{"prompt": Infinity}',
        b'{"prompt": "\xff"}',
        b'{"prompt": "\xed\xa0\x80"}',
        '{"prompt": "a"}'.encode("utf-16"),
        b"[]",
        b'["a"]',
        b"5",
        b"null",
        b'"text"',
        b"[" * 100_000,
        b'{"a":' * 40_000,
        b'{"metadata":' + b'{"a":' * 300 + b"1" + b"}" * 301,
        b'{"max_tokens": ' + b"9" * 5_000 + b"}",
        b'{"userId": -' + b"9" * 5_000 + b"}",
        rb'{"prompt": "\ud800"}',
        rb'{"prompt": "\ude00"}',
        rb'{"prompt": "\ud800\ud800"}',
        rb'{"system": "a\ud83d"}',
        rb'{"userId": "\ud83dx"}',
        rb'{"metadata": {"\ud800": 1}}',
        rb'{"\ud800": 1}',
        rb'{"prompt": "\x"}',
        b'{"prompt": "a\nb"}',
        b'{"prompt": "\0"}',
    ],
    ids=lambda raw: repr(raw[:40]),
)
def test_a_body_that_is_no_json_object_is_told_so(client: FlaskClient, raw: bytes) -> None:
    problem(send(client, raw), 400, "invalid_json")


@pytest.mark.parametrize("field", ["userId", "max_tokens", "temperature"])
def test_a_number_beyond_all_bounds_is_refused(client: FlaskClient, field: str) -> None:
    body = json.dumps(asked(**{field: "NUMBER"})).replace('"NUMBER"', "1e400").encode()

    assert list(named(send(client, body))) == [field]


def test_metadata_with_a_number_beyond_all_bounds_is_refused_not_changed(client: FlaskClient) -> None:
    """It becomes infinite when it is read, and JSON has no way to write that: it would reach n8n as null."""
    body = json.dumps(asked(metadata={"a": ["NUMBER"]})).replace('"NUMBER"', "-1e400").encode()

    assert list(named(send(client, body))) == ["metadata"]


@pytest.mark.parametrize(
    "content_type",
    [
        "text/plain",
        "text/json",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "json",
    ],
)
def test_another_content_type_is_told_what_was_expected(client: FlaskClient, content_type: str) -> None:
    body = problem(send(client, b"{}", **{"Content-Type": content_type}), 415, "unsupported_media_type")

    assert body["detail"] == f"The body is {content_type.split(';')[0]}: expected application/json."


def test_a_body_that_is_too_large_is_told_the_limit(make_client: MakeClient) -> None:
    client = make_client(MAX_BODY_BYTES="2048")

    answer = send(client, json.dumps(asked(prompt=PRIVATE * 300)).encode())

    assert problem(answer, 413, "body_too_large")["detail"] == "The body is larger than 2048 bytes (MAX_BODY_BYTES)."
    accepted(send(client, json.dumps(asked()).encode().ljust(2048)))


def test_a_chunked_body_that_is_too_large_is_told_the_limit(service: Service) -> None:
    chunks = (b" " * 10_000 for _ in range(30))

    answer = httpx.post(f"{service.url}/init-stream", content=chunks, headers={"Content-Type": "application/json"})

    assert (answer.status_code, answer.headers["Content-Type"]) == (413, "application/problem+json")
    assert answer.json()["code"] == "body_too_large"


def test_a_chunked_body_within_the_limit_is_read(service: Service) -> None:
    body = json.dumps(asked()).encode()

    answer = httpx.post(
        f"{service.url}/init-stream",
        content=(body[i : i + 7] for i in range(0, len(body), 7)),
        headers={"Content-Type": "application/json"},
    )

    assert (answer.status_code, answer.json()["ok"]) == (200, True)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**40), 10**40)
    | st.floats()
    | st.text(st.characters(exclude_categories=()), max_size=10).map(lambda text: PRIVATE + text),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = (
    "resumeUrl prompt userId chatId model max_tokens messages system temperature top_p stop metadata format"
    " start onDisconnect disconnectGraceSeconds fallbackModels reasoning_effort"
)
EXAMPLES = settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])


def assert_no_accident(answer: TestResponse) -> None:
    """A success, or a problem that is the sender's and quotes nothing."""
    assert answer.status_code < 500, answer.text
    if answer.status_code != 200:
        problem(answer, answer.status_code, (answer.json or {})["code"])


@EXAMPLES
@given(body=st.dictionaries(st.sampled_from(FIELDS.split()), JSON, min_size=1))
def test_no_value_of_any_field_is_an_accident(client: FlaskClient, body: dict[str, Any]) -> None:
    assert_no_accident(send(client, json.dumps(asked(**body)).encode()))


@EXAMPLES
@given(field=st.sampled_from(FIELDS.split()), value=JSON)
def test_a_fault_names_the_field_that_has_it_and_no_other(client: FlaskClient, field: str, value: object) -> None:
    answer = send(client, json.dumps(asked(**{field: value})).encode())

    if answer.status_code == 400 and (answer.json or {})["code"] != "invalid_json":
        named_fields = {error["field"] for error in (answer.json or {})["errors"]}
        assert {re.split(r"[.\[]", name)[0] for name in named_fields} == {field}


GOOD_TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=20)
GOOD = st.fixed_dictionaries(
    {"prompt": GOOD_TEXT.map(lambda text: text or "?")},
    optional={
        "userId": GOOD_TEXT | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False, allow_infinity=False) | st.none(),
        "max_tokens": st.integers(1, 1_000_000) | st.integers(1, 1_000_000).map(float) | st.none(),
        "messages": st.lists(
            st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]), "content": GOOD_TEXT}), max_size=3
        ),
        "system": GOOD_TEXT,
        "temperature": st.floats(0, 2),
        "top_p": st.floats(0, 1),
        "stop": GOOD_TEXT.map(lambda text: text or "?") | st.lists(GOOD_TEXT.map(lambda text: text or "?"), max_size=4),
        "metadata": st.dictionaries(GOOD_TEXT, GOOD_TEXT | st.lists(st.integers()), max_size=3),
        "fallbackModels": st.lists(st.just("echo"), max_size=5),
        "disconnectGraceSeconds": st.floats(1, 3_600),
        "format": st.sampled_from(["text", "json", None]),
        "unknown": GOOD_TEXT,
    },
)


@EXAMPLES
@given(body=GOOD)
def test_a_good_body_is_accepted_whatever_it_says(client: FlaskClient, body: dict[str, Any]) -> None:
    accepted(send(client, json.dumps(asked(**body)).encode()))


@EXAMPLES
@given(messages=st.lists(st.dictionaries(st.sampled_from(["role", "content"]), JSON | st.just("user"))) | JSON, turn=JSON)
def test_no_turn_of_a_conversation_is_an_accident(client: FlaskClient, messages: object, turn: object) -> None:
    assert_no_accident(send(client, json.dumps(asked(messages=messages)).encode()))
    assert_no_accident(send(client, json.dumps(asked(messages=[turn])).encode()))


@EXAMPLES
@given(start=st.sampled_from([b"", b"{", b'{"prompt":', b'{"prompt":"', b"[", b'"\\u']), rest=st.binary(max_size=50))
def test_no_bytes_are_an_accident(client: FlaskClient, start: bytes, rest: bytes) -> None:
    assert_no_accident(send(client, start + rest))


@EXAMPLES
@given(start=st.integers(0, 400), length=st.integers(0, 5), put=st.binary(max_size=5))
def test_no_damage_to_a_good_body_is_an_accident(client: FlaskClient, start: int, length: int, put: bytes) -> None:
    body = json.dumps(asked(messages=[{"role": "user", "content": "ü"}], metadata={"a": [1.5]}, stop=["\n"])).encode()

    assert_no_accident(send(client, body[:start] + put + body[start + length :]))


# ---- Idempotency-Key ----


def again(client: FlaskClient, key: str, **body: Any) -> TestResponse:
    """Asks for a stream with an Idempotency-Key."""
    return client.post("/init-stream", json=asked(**body), headers={"Idempotency-Key": key})


def test_the_same_key_and_body_give_the_same_stream_with_a_fresh_token(client: FlaskClient) -> None:
    first = again(client, "execution-7", n8nToken=n8n_token(exp=int(time.time()) + 100), metadata={"a": 1, "b": [2]})
    time.sleep(1.1)  # a token made in the same second is the same token
    second = again(client, "execution-7", n8nToken=n8n_token(exp=int(time.time()) + 200), metadata={"b": [2], "a": 1})

    one, two = accepted(first), accepted(second)
    assert (one["streamId"], one["expiresAt"]) == (two["streamId"], two["expiresAt"])
    assert one["streamUrl"] != two["streamUrl"] and one["streamUrl"].split("?")[0] == two["streamUrl"].split("?")[0]
    assert ("Idempotent-Replayed" in first.headers, second.headers["Idempotent-Replayed"]) == (False, "true")


@pytest.mark.parametrize("change", [{"prompt": "Other"}, {"resumeUrl": RESUME_URL + "c"}, {"chatId": 1}, {"unknown": True}])
def test_the_same_key_with_another_body_is_refused_and_changes_nothing(client: FlaskClient, change: dict[str, Any]) -> None:
    first = accepted(again(client, "k"))

    refused = again(client, "k", **change)

    body = problem(refused, 422, "idempotency_key_reused")
    assert "needs a key of its own" in body["detail"]
    assert accepted(again(client, "k"))["streamId"] == first["streamId"]


def test_a_key_belongs_to_the_subject_that_used_it(client: FlaskClient) -> None:
    ids = {accepted(again(client, "k", n8nToken=n8n_token(sub=sub)))["streamId"] for sub in ("a", "b", "b", "")}

    assert len(ids) == 3


def test_without_a_key_and_with_other_keys_every_init_is_a_new_stream(client: FlaskClient) -> None:
    answers = [init(client), init(client), again(client, "a"), again(client, "b"), again(client, "A")]

    assert len({accepted(answer)["streamId"] for answer in answers}) == 5


def test_a_key_that_came_back_with_an_ended_stream_gives_that_stream(client: FlaskClient) -> None:
    first = accepted(again(client, "k", model="echo"))
    watched = client.get(first["streamUrl"]).text

    second = accepted(again(client, "k", model="echo"))

    assert client.get(second["streamUrl"]).text == watched and "[DONE]" in watched


@pytest.mark.parametrize("key", ["", " ", "a" * 256, "é", "a\tb", " a"])
def test_a_key_that_cannot_be_used_is_named(client: FlaskClient, key: str) -> None:
    refused = client.post("/init-stream", json=asked(), environ_overrides={"HTTP_IDEMPOTENCY_KEY": key})

    assert named(refused) == {"Idempotency-Key": "expected 1 to 255 visible ASCII characters, such as a UUID"}


def test_a_refused_init_leaves_its_key_free(client: FlaskClient) -> None:
    problem(again(client, "k", prompt=""), 400, "invalid_request")

    accepted(again(client, "k", prompt=PROMPT))


# ---- resumeUrl ----


@pytest.mark.parametrize(
    "url",
    [
        "http://n8n.test:5678/webhook-waiting/1?signature=ab",
        "HTTPS://N8N.TEST/x",
        "http://n8n.test",
        "http://n8n:/x",
        "http://[::1]:5678/x",
        "http://[2001:db8::1]/x",
        "http://127.0.0.1:1/x?a=%2f&b='",
    ],
)
def test_in_dev_mode_any_http_url_may_be_resumed(client: FlaskClient, url: str) -> None:
    accepted(init(client, resumeUrl=url))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("n8n", "is not an http URL"),
        ("/webhook-waiting/1", "is not an http URL"),
        ("//n8n/1", "is not an http URL"),
        ("ftp://n8n/1", "is not an http URL"),
        ("file:///etc/passwd", "is not an http URL"),
        ("gopher://n8n:6379/_SET", "is not an http URL"),
        ("http:///1", "is not an http URL"),
        ("http://n8n:99999/1", "is not an http URL"),
        ("http://n8n:port/1", "is not an http URL"),
        ("http://[::1/1", "is not an http URL"),
        ("http://me:xPRIVATEx@n8n/1", "has a user name or a fragment"),
        ("http://@n8n/1", "has a user name or a fragment"),
        ("http://n8n/1#xPRIVATEx", "has a user name or a fragment"),
        ("http://n8n/1#", "has a user name or a fragment"),
        (" http://n8n/1", "has characters that no URL may have"),
        ("http://n8n/1 ", "has characters that no URL may have"),
        ("http://n8n/a b", "has characters that no URL may have"),
        ("http://n8n/1\r\nHost: xPRIVATEx", "has characters that no URL may have"),
        ("http://n8n/\t1", "has characters that no URL may have"),
        ("http://n8n/\0", "has characters that no URL may have"),
        ("http://n8n/é", "has characters that no URL may have"),
        ("http://n8n。test/1", "has characters that no URL may have"),
        ("http://n8n\\@evil.test/1", "has characters that no URL may have"),
    ],
)
def test_a_resume_url_that_is_none_is_told_why(client: FlaskClient, url: str, message: str) -> None:
    found = named(init(client, resumeUrl=url))

    assert list(found) == ["resumeUrl"]
    assert found["resumeUrl"].startswith(message)
    assert "expected n8n's $execution.resumeUrl" in found["resumeUrl"]


@pytest.mark.parametrize("host", ["a..b", "x" * 64, ".", "-.test.."])
def test_a_host_that_no_name_service_can_be_asked_for_is_refused_at_once(client: FlaskClient, host: str) -> None:
    assert list(named(init(client, resumeUrl=f"http://{host}/1"))) == ["resumeUrl"]


ALLOWED = "http://n8n.test:5678,https://N8N.example.test,http://[::1]:5678"


@pytest.mark.parametrize(
    "url",
    [
        "http://n8n.test:5678/webhook-waiting/1?signature=ab",
        "HTTP://N8N.Test:5678",
        "https://n8n.example.test/1",
        "https://n8n.example.test:443/1",
        "http://[::1]:5678/1",
    ],
)
def test_a_resume_url_of_an_allowed_origin_is_accepted(make_client: MakeClient, url: str) -> None:
    accepted(init(make_client(RESUME_URL_ALLOWED_ORIGINS=ALLOWED), resumeUrl=url))


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("https://n8n.test:5678/1", "https://n8n.test:5678"),
        ("http://n8n.test/1", "http://n8n.test"),
        ("http://n8n.test:5679/1", "http://n8n.test:5679"),
        ("http://n8n.test.:5678/1", "http://n8n.test.:5678"),
        ("http://n8n.test.evil.test:5678/1", "http://n8n.test.evil.test:5678"),
        ("http://evil.test/http://n8n.test:5678/1", "http://evil.test"),
        ("http://evil.test/?http://n8n.test:5678", "http://evil.test"),
        ("http://[::2]:5678/1", "http://[::2]:5678"),
        ("http://127.0.0.1:8000/health?xPRIVATEx", "http://127.0.0.1:8000"),
        ("http://169.254.169.254/latest", "http://169.254.169.254"),
    ],
)
def test_a_resume_url_of_another_origin_is_told_the_setting(make_client: MakeClient, url: str, origin: str) -> None:
    found = named(init(make_client(RESUME_URL_ALLOWED_ORIGINS=ALLOWED), resumeUrl=url))

    assert found == {
        "resumeUrl": f"has the origin {origin}, which is not among RESUME_URL_ALLOWED_ORIGINS of the service's configuration"
    }


# ---- The model ----


@pytest.mark.parametrize(
    ("asked_for", "provider", "model"),
    [
        ("gpt-4o", "openai", "gpt-4o"),
        ("GPT-4o-Mini", "openai", "GPT-4o-Mini"),
        ("chatgpt-4o-latest", "openai", "chatgpt-4o-latest"),
        ("o3", "openai", "o3"),
        ("O4-mini", "openai", "O4-mini"),
        ("ft:gpt-4o:me::1", "openai", "ft:gpt-4o:me::1"),
        ("claude-3-5-sonnet", "anthropic", "claude-3-5-sonnet"),
        ("Claude-Sonnet-4-5", "anthropic", "Claude-Sonnet-4-5"),
        ("openai/llama-3", "openai", "llama-3"),
        ("OpenAI/org/model:free", "openai", "org/model:free"),
        ("ANTHROPIC/custom", "anthropic", "custom"),
        ("openai/claude-3", "openai", "claude-3"),
        ("echo", "echo", "echo"),
        ("ECHO", "echo", "ECHO"),
        ("echo/anything", "echo", "anything"),
    ],
)
def test_a_models_name_tells_its_provider(make_client: MakeClient, asked_for: str, provider: str, model: str) -> None:
    client = make_client(OPENAI_API_KEY="k", ANTHROPIC_API_KEY="k")

    request = stored(client, init(client, model=asked_for))

    assert (request.requested_model, request.provider, request.model) == (asked_for, provider, model)


@pytest.mark.parametrize("model", ["llama-3", "mistral/large", "openai/", "/gpt-4", "gpt4", "oo", "xecho", "echo2", " gpt-4"])
def test_a_model_of_no_known_provider_is_told_what_would_help(make_client: MakeClient, model: str) -> None:
    client = make_client(OPENAI_API_KEY="k", ANTHROPIC_API_KEY="k")

    found = named(init(client, model=model), "unknown_model")

    assert list(found) == ["model"]
    assert "a prefix such as openai/" in found["model"] and "DEFAULT_PROVIDER" in found["model"]


@pytest.mark.parametrize("provider", ["openai", "anthropic", "echo"])
def test_the_default_provider_takes_what_no_other_does(make_client: MakeClient, provider: str) -> None:
    client = make_client(OPENAI_API_KEY="k", ANTHROPIC_API_KEY="k", DEFAULT_PROVIDER=provider)

    request, other = stored(client, init(client, model="Llama-3")), stored(client, init(client, model="claude-x"))

    assert (request.provider, request.model) == (provider, "Llama-3")
    assert other.provider == "anthropic"


@pytest.mark.parametrize(
    ("environ", "model", "variable"),
    [
        ({}, "gpt-4", "OPENAI_API_KEY"),
        ({}, "claude-x", "ANTHROPIC_API_KEY"),
        ({"OPENAI_API_KEY": "k"}, "anthropic/x", "ANTHROPIC_API_KEY"),
        ({"ANTHROPIC_API_KEY": "k"}, "OPENAI/x", "OPENAI_API_KEY"),
        ({"DEFAULT_PROVIDER": "openai"}, "llama-3", "OPENAI_API_KEY"),
        ({"DEFAULT_MODEL": "gpt-4"}, None, "OPENAI_API_KEY"),
    ],
)
def test_a_provider_without_a_key_is_told_the_setting(
    make_client: MakeClient, environ: dict[str, str], model: str | None, variable: str
) -> None:
    found = named(init(make_client(**environ), model=model), "provider_not_configured")

    assert found["model"].endswith(f"is not configured on this service: set {variable}")


MODELS = """
[ollama]
base_url = "http://127.0.0.1:11434/v1"
limits = { max_tokens = 100 }

[Fast]
base_url = "https://api.mistral.test/v1"
key_variable = "MISTRAL_API_KEY"
model = "mistral-small"
models = ["mistral-small", "org/mistral-large"]

[old]
base_url = "http://claude.test"
api = "anthropic"
anthropic_version = "2023-06-01"
"""


@pytest.fixture
def with_aliases(make_client: MakeClient, tmp_path: Path) -> FlaskClient:
    """A client of an app with these aliases, and both built-in providers."""
    (tmp_path / "models.toml").write_text(MODELS)
    keys = {"OPENAI_API_KEY": "k", "ANTHROPIC_API_KEY": "k", "MISTRAL_API_KEY": "k"}
    return make_client(MODELS_FILE=str(tmp_path / "models.toml"), **keys)


@pytest.mark.parametrize(
    ("asked_for", "provider", "model"),
    [
        ("ollama/llama3.2:1b", "ollama", "llama3.2:1b"),
        ("OLLAMA/Qwen3", "ollama", "Qwen3"),
        ("fast", "fast", "mistral-small"),
        ("FAST", "fast", "mistral-small"),
        ("fast/org/mistral-large", "fast", "org/mistral-large"),
        ("old/gpt-4", "old", "gpt-4"),
        ("openai/ollama/x", "openai", "ollama/x"),
        ("gpt-4o", "openai", "gpt-4o"),
    ],
)
def test_an_alias_is_a_prefix_or_a_name_of_its_own(with_aliases: FlaskClient, asked_for: str, provider: str, model: str) -> None:
    request = stored(with_aliases, init(with_aliases, model=asked_for))

    assert (request.requested_model, request.provider, request.model) == (asked_for, provider, model)


@pytest.mark.parametrize("model", ["ollama", "fast/", "fast/mistral-tiny", "fast/Mistral-small"])
def test_what_an_alias_does_not_offer_is_unknown(with_aliases: FlaskClient, model: str) -> None:
    assert list(named(init(with_aliases, model=model), "unknown_model")) == ["model"]


def test_an_alias_without_its_key_is_told_the_variable(make_client: MakeClient, tmp_path: Path) -> None:
    (tmp_path / "models.toml").write_text(MODELS)
    client = make_client(MODELS_FILE=str(tmp_path / "models.toml"))

    assert named(init(client, model="fast"), "provider_not_configured")["model"].endswith("set MISTRAL_API_KEY")


def test_fallback_models_are_kept_with_where_they_lead(with_aliases: FlaskClient) -> None:
    answer = init(with_aliases, model="gpt-4o", fallbackModels=["claude-x", "fast", "ollama/a"], reasoning_effort="high")

    request = stored(with_aliases, answer)

    assert request.fallbacks == (Route("anthropic", "claude-x"), Route("fast", "mistral-small"), Route("ollama", "a"))
    assert (request.routes[0], request.reasoning_effort) == (Route("openai", "gpt-4o"), "high")


@pytest.mark.parametrize(
    ("body", "faults"),
    [
        ({"fallbackModels": ["claude-x", "nobodys"]}, {"fallbackModels[1]": "no provider is known"}),
        ({"fallbackModels": ["a"] * 6}, {"fallbackModels": "at most 5"}),
        ({"fallbackModels": "claude-x"}, {"fallbackModels": "expected a list"}),
        ({"fallbackModels": [""]}, {"fallbackModels[0]": "at least 1 character"}),
        ({"fallbackModels": [7, "nobodys"]}, {"fallbackModels[0]": "expected text", "fallbackModels[1]": "no provider is known"}),
        ({"model": "nobodys", "fallbackModels": ["x"]}, {"model": "no provider is known", "fallbackModels[0]": "no provider"}),
        ({"reasoning_effort": "hard"}, {"reasoning_effort": "expected 'none', 'minimal', 'low'"}),
        ({"reasoning_effort": 3}, {"reasoning_effort": "expected 'none'"}),
    ],
)
def test_faults_of_fallbacks_and_effort_are_named(
    with_aliases: FlaskClient, body: dict[str, Any], faults: dict[str, str]
) -> None:
    answer = init(with_aliases, **{"model": "gpt-4o", **body})

    found = {error["field"]: error["message"] for error in (answer.json or {})["errors"]}
    assert answer.status_code == 400 and list(found) == list(faults)
    assert all(part in found[field] for field, part in faults.items())


def test_init_warns_of_what_a_model_or_a_fallback_does_not_get(with_aliases: FlaskClient) -> None:
    asked_for = {"temperature": 1.5, "top_p": 0.5, "max_tokens": 500}

    def warnings(model: str, *fallbacks: str) -> list[str]:
        return list(accepted(init(with_aliases, model=model, fallbackModels=fallbacks, **asked_for))["warnings"])

    limited = "max_tokens is 500: limited to 100 for ollama"
    unsent = [f"{name} is not sent: anthropic does not take it" for name in ("temperature", "top_p")]
    assert warnings("gpt-4o") == []
    assert warnings("ollama/a") == [limited]
    assert warnings("gpt-4o", "claude-x", "ollama/a", "claude-y") == [*unsent, limited]
    assert warnings("old/claude-2") == ["temperature is 1.5: old takes 0 to 1, so it is sent as 1"]


def test_outside_dev_mode_there_is_no_echo(make_client: MakeClient) -> None:
    client = make_client(DEV_MODE="false", BASE_URL="https://ai.test", RESUME_URL_ALLOWED_ORIGINS="http://n8n.test:5678")

    assert "DEV_MODE only" in named(init(client, model="echo"), "provider_not_configured")["model"]


# ---- Problems on all routes ----


@pytest.mark.parametrize(
    ("method", "path", "status", "code", "allow"),
    [
        ("GET", "/init-stream", 405, "method_not_allowed", {"POST", "OPTIONS"}),
        ("PUT", "/init-stream", 405, "method_not_allowed", {"POST", "OPTIONS"}),
        ("POST", "/health", 405, "method_not_allowed", {"GET", "HEAD", "OPTIONS"}),
        ("DELETE", "/stream/6b84af1a-3299-4de7-9473-23c993710c18", 405, "method_not_allowed", {"GET", "HEAD", "OPTIONS"}),
        ("GET", "/nowhere", 404, "not_found", set()),
        ("GET", "/stream/", 404, "not_found", set()),
        ("GET", "/init-stream/more", 404, "not_found", set()),
        ("GET", "/%ff%00", 404, "not_found", set()),
    ],
)
def test_a_wrong_method_or_path_is_a_problem_too(
    client: FlaskClient, method: str, path: str, status: int, code: str, allow: set[str]
) -> None:
    answer = client.open(path, method=method)

    problem(answer, status, code)
    assert {one for one in answer.headers.get("Allow", "").split(", ") if one} == allow


@pytest.mark.parametrize("path", ["/init-stream/", "/health/", "/health/ready/"])
def test_a_slash_too_many_does_no_harm(client: FlaskClient, path: str) -> None:
    answer = client.open(path, method="POST" if "init" in path else "GET", json=asked() if "init" in path else None)

    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("given_id", "taken"), [("abc-1.2:3/4+5=", True), ("", False), ("a b", False), ("x" * 129, False), ('"', False)]
)
def test_a_request_id_is_taken_over_where_a_log_line_can_bear_it(client: FlaskClient, given_id: str, taken: bool) -> None:
    answer = client.get("/nowhere", headers={"X-Request-ID": given_id})

    request_id = problem(answer, 404, "not_found")["requestId"]
    assert (request_id == given_id) is taken
    assert taken or re.fullmatch("[0-9a-f]{32}", request_id)


# ---- CORS ----

PAGE = "https://chat.test"
CLOSED = {"DEV_MODE": "false", "BASE_URL": "https://ai.test", "RESUME_URL_ALLOWED_ORIGINS": "http://n8n.test:5678"}


def allowed_origin(answer: TestResponse) -> str | None:
    """The origin that may read the answer; whoever asks, caches must know that it depends on the origin."""
    assert "Origin" in answer.headers["Vary"]
    assert "Access-Control-Allow-Credentials" not in answer.headers
    return answer.headers.get("Access-Control-Allow-Origin")


def test_an_allowed_page_may_read_answers_and_errors(make_client: MakeClient) -> None:
    client = make_client(**CLOSED, ALLOWED_ORIGINS=f"{PAGE},https://other.test:8443")
    answers = [
        client.get("/health", headers={"Origin": PAGE}),
        client.get("/nowhere", headers={"Origin": PAGE}),
        client.get(f"/stream/{uuid.uuid4()}", headers={"Origin": PAGE}),
        client.put("/health", headers={"Origin": PAGE}),
    ]

    assert [answer.status_code for answer in answers] == [200, 404, 401, 405]
    assert [allowed_origin(answer) for answer in answers] == [PAGE] * 4
    assert answers[0].headers["Access-Control-Expose-Headers"] == "Retry-After, X-Request-ID"
    assert allowed_origin(client.get("/health", headers={"Origin": "https://other.test:8443"})) == "https://other.test:8443"


@pytest.mark.parametrize(
    "origin",
    [
        "https://chat.test.evil.test",
        "https://evil.test",
        "http://chat.test",
        "https://chat.test:8443",
        "https://xchat.test",
        "https://chatxtest",
        "https://sub.chat.test",
        "http://localhost:3000",
        "http://127.0.0.1:8000",
        "null",
        "*",
    ],
)
def test_another_page_may_read_nothing(make_client: MakeClient, origin: str) -> None:
    client = make_client(**CLOSED, ALLOWED_ORIGINS=PAGE)

    for path in ("/health", "/nowhere"):
        assert allowed_origin(client.get(path, headers={"Origin": origin})) is None
    assert allowed_origin(client.options("/health", headers={"Origin": origin, "Access-Control-Request-Method": "GET"})) is None


def test_without_allowed_origins_no_page_may_read_anything(make_client: MakeClient) -> None:
    assert allowed_origin(make_client(**CLOSED).get("/health", headers={"Origin": PAGE})) is None


@pytest.mark.parametrize("origins", [PAGE, f"{PAGE},https://other.test"])
def test_who_is_no_page_is_not_told_the_allowed_origins(make_client: MakeClient, origins: str) -> None:
    assert allowed_origin(make_client(**CLOSED, ALLOWED_ORIGINS=origins).get("/health")) is None


def test_an_allowed_origin_may_be_an_ipv6_address(make_client: MakeClient) -> None:
    client = make_client(**CLOSED, ALLOWED_ORIGINS="http://[fd00::5]:3000")

    assert allowed_origin(client.get("/health", headers={"Origin": "http://[fd00::5]:3000"})) == "http://[fd00::5]:3000"
    assert allowed_origin(client.get("/health", headers={"Origin": "http://f:3000"})) is None


@pytest.mark.parametrize("path", ["/stream/6b84af1a-3299-4de7-9473-23c993710c18", "/health"])
def test_a_preflight_is_answered_with_what_a_page_may_send(make_client: MakeClient, path: str) -> None:
    client = make_client(**CLOSED, ALLOWED_ORIGINS=PAGE)
    headers = "last-event-id, authorization, cache-control, content-type, x-other"

    answer = client.options(
        path,
        headers={"Origin": PAGE, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": headers},
    )

    assert (answer.status_code, allowed_origin(answer)) == (200, PAGE)
    assert answer.headers["Access-Control-Allow-Headers"] == "authorization, cache-control, content-type, last-event-id"
    assert answer.headers["Access-Control-Allow-Methods"] == "GET, POST"
    assert answer.headers["Access-Control-Max-Age"] == "600"


@pytest.mark.parametrize("path", ["/init-stream", "/sessions/x", "/callbacks", "/callbacks/x/redeliver", "/models", "/metrics"])
def test_what_takes_n8ns_token_is_for_no_page(make_client: MakeClient, path: str) -> None:
    client = make_client(**CLOSED, ALLOWED_ORIGINS=PAGE)
    asked = {"Origin": PAGE, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}

    answers = [client.options(path, headers=asked), client.post(path, headers={"Origin": PAGE})]

    assert [name for answer in answers for name, _ in answer.headers if name.startswith("Access-Control-")] == []


def test_an_answer_that_a_page_may_read_it_may_embed_and_no_other(make_client: MakeClient) -> None:
    client = make_client(**CLOSED, ALLOWED_ORIGINS=PAGE)

    policies = [
        client.get(path, headers={"Origin": origin} if origin else {}).headers["Cross-Origin-Resource-Policy"]
        for path in ("/health", "/stream/x", "/nowhere")
        for origin in (PAGE, "https://evil.test", None)
    ]

    assert policies == ["cross-origin", "same-origin", "same-origin"] * 3


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        ("http://localhost", True),
        ("http://localhost:3000", True),
        ("https://localhost:8443", True),
        ("http://127.0.0.1:65535", True),
        ("http://[::1]:5173", True),
        (PAGE, True),
        ("http://localhost.evil.test:3000", False),
        ("http://localhost:3000.evil.test", False),
        ("http://evil.test/http://localhost:3000", False),
        ("http://127.0.0.2:3000", False),
        ("http://127x0y0z1", False),
        ("http://[::2]:3000", False),
        ("https://evil.test", False),
        ("null", False),
        ("file://", False),
    ],
)
def test_in_dev_mode_any_port_of_this_machine_may_read_too(make_client: MakeClient, origin: str, allowed: bool) -> None:
    client = make_client(ALLOWED_ORIGINS=PAGE)

    assert allowed_origin(client.get("/health", headers={"Origin": origin})) == (origin if allowed else None)


# ---- Health ----


def test_a_living_service_says_so_and_its_version(client: FlaskClient) -> None:
    answer = client.get("/health")

    assert (answer.status_code, answer.json) == (200, {"ok": True, "status": "alive", "version": __version__})
    assert answer.headers["Cache-Control"] == "no-store"


def test_a_service_is_ready_until_it_drains(client: FlaskClient) -> None:
    ready = client.get("/health/ready")
    parts_of(client).background.draining = True
    draining = client.get("/health/ready")

    assert (ready.status_code, ready.json) == (200, {"ok": True, "status": "ready", "missing": []})
    assert (draining.status_code, draining.json) == (503, {"ok": False, "status": "not ready", "missing": ["draining"]})


@pytest.fixture
def mortal_redis(tmp_path: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A Redis on `r.sock` that a test may kill."""
    program = shutil.which("redis-server") or shutil.which("valkey-server")
    if program is None:
        missing("redis-server")
        return
    command = [program, "--port", "0", "--unixsocket", str(tmp_path / "r.sock"), "--save", "", "--dir", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    wait_until((tmp_path / "r.sock").exists)
    yield process
    process.kill()
    process.wait()


def test_without_its_redis_a_service_lives_is_not_ready_and_takes_no_init(
    make_client: MakeClient, mortal_redis: "subprocess.Popen[bytes]", tmp_path: Path
) -> None:
    client = make_client(REDIS_URL=f"unix://{tmp_path}/r.sock")
    ready, first = client.get("/health/ready"), init(client)

    mortal_redis.kill()
    mortal_redis.wait()
    alive, unready, second = client.get("/health"), client.get("/health/ready"), init(client, prompt=PRIVATE)

    assert [answer.status_code for answer in (ready, first, alive)] == [200, 200, 200]
    assert (unready.status_code, unready.json) == (503, {"ok": False, "status": "not ready", "missing": ["redis"]})
    problem(second, 503, "store_unavailable")
    assert second.headers["Retry-After"] == "2"
