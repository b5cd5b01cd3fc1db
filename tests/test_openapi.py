"""The OpenAPI document: it is valid, current, complete, and what the service does."""

import ast
import json
import os
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import httpx
import jsonschema_rs
import pytest
from flask.testing import FlaskClient
from openapi_spec_validator import OpenAPIV31SpecValidator

from aistream import errors
from aistream.api.contract import CODES, EXAMPLES, OPERATIONS
from aistream.api.openapi import document
from aistream.tokens import Tokens
from tests.conftest import MakeClient, make_config
from tests.neighbours.receiver import Receiver
from tests.service import ROOT, Service, n8n_token, wait_until
from tests.test_layering import MODULES

DOCUMENT = document(make_config())
CASES = 2_000


def schema(name: str) -> jsonschema_rs.Draft202012Validator:
    """What holds values against a schema of the document."""
    named = {"$ref": f"#/components/schemas/{name}", "components": DOCUMENT["components"]}
    return jsonschema_rs.Draft202012Validator(named, validate_formats=True)


# ---- The document ----


def test_the_document_is_valid_openapi() -> None:
    assert [error.message for error in OpenAPIV31SpecValidator(DOCUMENT).iter_errors()] == []


def keywords(schema: Any) -> set[str]:
    """Every keyword in a schema and below it; the names of properties are none."""
    if isinstance(schema, list):
        return set().union(*map(keywords, schema))
    if not isinstance(schema, dict):
        return set()
    below = [*schema.get("properties", {}).values(), *(value for name, value in schema.items() if name != "properties")]
    return set(schema) | keywords(below)


def test_a_schema_has_no_keyword_that_json_schema_does_not_know() -> None:
    # It would be allowed, and say nothing: pydantic writes `ge` for `minimum` where a check stands in front of the bound.
    known = "$ref additionalProperties anyOf const description enum format items maxItems maxLength maximum minItems minLength"
    known += " minimum oneOf pattern properties required title type"

    found = set().union(*map(keywords, DOCUMENT["components"]["schemas"].values()))

    assert found - set(known.split()) == set()


def test_the_documents_examples_are_what_its_schemas_say() -> None:
    found = [list(schema("InitRequest").iter_errors(example["value"])) for example in EXAMPLES.values()]

    assert found == [[], []]


def test_the_document_in_the_repository_is_current() -> None:
    kept = (ROOT / "docs" / "openapi.json").read_text()

    assert json.loads(kept) == DOCUMENT, "make openapi writes it anew"


def test_the_shell_prints_the_document_of_its_configuration(tmp_path: Path) -> None:
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "DEV_MODE": "true", "JWT_SECRET": "s" * 32}
    environ |= {"PORT": "8123", "MAX_PROMPT_CHARS": "77"}

    run = subprocess.run(
        [sys.executable, "-m", "aistream", "openapi"], cwd=tmp_path, env=environ, capture_output=True, timeout=60
    )

    shown = json.loads(run.stdout)
    assert shown["servers"] == [{"url": "http://127.0.0.1:8123"}]
    assert shown["components"]["schemas"]["InitRequest"]["properties"]["prompt"]["maxLength"] == 77


def test_the_document_and_its_page_are_served_in_dev_mode_only(make_client: MakeClient) -> None:
    dev = make_client()
    production = make_client(DEV_MODE="", BASE_URL="https://ai.test", RESUME_URL_ALLOWED_ORIGINS="http://n8n:5678")

    assert dev.get("/openapi.json").json == DOCUMENT
    assert [dev.get("/docs").status_code, *(production.get(path).status_code for path in ("/docs", "/openapi.json"))] == [
        200,
        404,
        404,
    ]


def test_every_route_is_an_operation_and_every_operation_a_route(client: FlaskClient) -> None:
    pages = {"demo", "openapi"}
    routes = {
        (method, re.sub(r"<[^>]+>", "{id}", rule.rule))
        for rule in client.application.url_map.iter_rules()
        if rule.endpoint.partition(".")[0] not in pages or rule.endpoint == "openapi.served"
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
    }

    assert routes == {(method.upper(), path) for path, methods in DOCUMENT["paths"].items() for method in methods}


def test_an_operations_description_is_its_views_own() -> None:
    told = {one["operationId"]: one["description"] for methods in DOCUMENT["paths"].values() for one in methods.values()}

    assert [one.name for one in OPERATIONS if not told[one.name].startswith(str(one.view.__doc__).split("\n")[0])] == []


# ---- Codes ----


def test_every_code_of_an_error_is_in_the_document_and_no_other() -> None:
    # mypy holds each place that raises a problem to the type.
    assert set(CODES) == set(get_args(errors.Code))
    assert DOCUMENT["components"]["schemas"]["ProblemAnswer"]["properties"]["code"]["enum"] == list(CODES)


def test_every_code_is_one_that_the_source_raises() -> None:
    listed = {id(node) for node in ast.walk(MODULES["errors"]) if isinstance(node, ast.Subscript) for node in ast.walk(node)}
    said = {
        node.value
        for name, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and name != "api.contract" and id(node) not in listed
    }

    assert set(CODES) - said == set()


def test_every_code_stands_with_its_status_in_the_http_page_and_no_other() -> None:
    section = (ROOT / "docs" / "http.md").read_text().partition("\n## Errors\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.+`) \| (\d{3})", section, re.MULTILINE)

    told = {code: int(status) for codes, status in rows for code in re.findall(r"`(\w+)`", codes)}
    assert told == {text: code.status for text, code in CODES.items()}


@pytest.mark.parametrize("refusal", errors._REFUSALS)
def test_a_refused_viewers_code_has_the_documents_status(refusal: str) -> None:
    assert errors.Refused(refusal).status == CODES[refusal].status


# ---- What the service does ----


def test_every_event_of_json_mode_is_one_of_the_document(service: Service) -> None:
    answered = service.read(service.stream_url(prompt="one two", model="echo", format="json"))
    failed = service.read(service.stream_url(model="gpt-test-cut-k3", format="json"))
    url = service.stream_url(prompt="one", model="echo", format="json")
    httpx.post(url.replace("?", "/cancel?"), timeout=10)
    cancelled = service.read(url)

    said = [json.loads(event.data) for event in (*answered, *failed, *cancelled) if event.data != "[DONE]"]
    assert [list(schema("StreamEvent").iter_errors(event)) for event in said] == [[]] * len(said)
    assert {event["type"] for event in said} >= {"start", "text", "usage", "end", "error", "cancelled"}


def test_a_callback_is_what_the_document_says(service: Service, n8n: Receiver) -> None:
    service.read(service.stream_url(resumeUrl=n8n.url(), model="echo", userId=4.5, metadata={"a": [1]}))
    wait_until(lambda: n8n.requests)

    assert list(schema("Payload").iter_errors(n8n.requests[0].json)) == []


@pytest.mark.timeout(300)  # 20 s on a machine that has nothing else to do
def test_two_thousand_generated_requests_find_nothing_that_the_document_does_not_promise(
    start_service: Callable[..., Service], redis_url: str, n8n: Receiver, tmp_path: Path
) -> None:
    service = start_service(
        **{"REDIS_URL": redis_url, "METRICS_TOKEN": "m" * 32, "MAX_PROMPT_CHARS": "500"},
        **{"CALLBACK_SCHEDULE": "0", "LEASE_SECONDS": "1"},
        # Hundreds of them come without a token, from one address.
        UNAUTHORIZED_RATE_LIMIT="off",
    )
    document_file, report_file = tmp_path / "openapi.json", tmp_path / "report.json"
    document_file.write_bytes(httpx.get(f"{service.url}/openapi.json", timeout=10).content)
    environ = {**os.environ, "AISTREAM_CASES": json.dumps(given(service, n8n))}
    program = "import schemathesis.cli; schemathesis.cli.schemathesis()"
    options = ["--config-file", str(ROOT / "tests" / "schemathesis.toml"), "run", str(document_file), "--url", service.url]

    run = subprocess.run(
        [sys.executable, "-c", program, *options, "--report", "json", "--report-json-path", str(report_file)],
        env=environ,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )

    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads(report_file.read_text())
    assert (report["failures"], report["errors"], [*filter(None, report["warnings"].values())]) == ([], [], [])
    assert {phase: one["status"] for phase, one in report["phases"].items()} == dict.fromkeys(
        ("examples", "coverage", "fuzzing", "stateful"), "success"
    )
    assert report["operations"]["tested"] == len(OPERATIONS) + 1
    assert report["test_cases"]["generated"] >= CASES and report["test_cases"]["errored"] == 0
    assert service.lines("request.broke") == []


def given(service: Service, n8n: Receiver) -> dict[str, Any]:
    """What schemathesis' requests are made good with: tokens, and sessions in each state that one may be asked for in."""
    nobody = "http://127.0.0.1:9/none"
    asked: list[dict[str, Any]] = [{"start": "immediate"}, {"start": "immediate", "resumeUrl": nobody}, {}]
    sessions = [service.init(**{"resumeUrl": n8n.url(), "prompt": "one two three", **body}).json()["streamId"] for body in asked]
    for session_id, state in zip(sessions, ("delivered", "dead"), strict=False):
        wait_until(lambda path=f"/sessions/{session_id}", state=state: (callback(service, path) or {}).get("state") == state)
    unknown = str(uuid.uuid4())
    signs = Tokens(make_config(), time.time)
    tokens = {session_id: signs.sign_viewer(session_id, int(time.time()) + 600) for session_id in (*sessions, unknown)}
    # While the store is young it says of an unknown session that it may have been lost: 503, to be asked again.
    wait_until(lambda: service.post(f"/stream/{unknown}/cancel", tokens[unknown]).status_code == 404)
    return {"sessions": tokens, "resume_url": n8n.url(), "n8n_token": n8n_token(), "metrics_token": "m" * 32}


def callback(service: Service, path: str) -> Any:
    """Where a session's callback stands."""
    return service.get(path).json()["callback"]
