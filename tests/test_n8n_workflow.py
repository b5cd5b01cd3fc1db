"""n8n/workflow.json as a file: whole, explained, without secrets, and in step with what the service takes and tells."""

import json
import re
from typing import Any

import pytest

from aistream.api.init import InitRequest
from aistream.config import Config
from tests.service import ROOT
from tests.test_callback import sent, session

TEXT = (ROOT / "n8n" / "workflow.json").read_text()
WORKFLOW = json.loads(TEXT)
STICKY = "n8n-nodes-base.stickyNote"
NODES = {node["name"]: node for node in WORKFLOW["nodes"] if node["type"] != STICKY}
LINKS = [
    (source, link["node"]) for source, outputs in WORKFLOW["connections"].items() for links in outputs["main"] for link in links
]
SECONDS = {"seconds": 1, "minutes": 60, "hours": 3600, "days": 86400}
DEFAULTS = Config.from_env({"DEV_MODE": "true", "JWT_SECRET": "x" * 32})


def the_node(kind: str) -> dict[str, Any]:
    """The only node of a type."""
    (found,) = [node for node in NODES.values() if node["type"] == f"n8n-nodes-base.{kind}"]
    return dict(found)


@pytest.mark.parametrize("name", NODES)
def test_every_node_has_a_note_that_the_canvas_shows(name: str) -> None:
    node = NODES[name]

    assert node["notes"].strip() and node["notesInFlow"] is True
    assert node["type"].partition(".")[2].lower() != name.replace(" ", "").lower()


def test_names_and_ids_are_unique() -> None:
    assert len({node["name"] for node in WORKFLOW["nodes"]}) == len(WORKFLOW["nodes"])
    assert len({node["id"] for node in WORKFLOW["nodes"]}) == len(WORKFLOW["nodes"])
    assert the_node("webhook")["webhookId"] != the_node("wait")["webhookId"]


def test_every_connection_and_every_expression_leads_to_a_node_that_exists() -> None:
    asked = set(re.findall(r"\$\('([^']+)'\)", TEXT))

    assert {name for link in LINKS for name in link} | asked <= set(NODES)
    assert {target for _, target in LINKS} == set(NODES) - {"Browser asks"}


def test_no_way_out_of_a_node_is_left_open() -> None:
    switch = the_node("switch")
    ways = WORKFLOW["connections"]

    assert the_node("httpRequest")["onError"] == "continueErrorOutput"
    assert len(ways["Open the stream"]["main"]) == 2
    assert switch["parameters"]["options"]["fallbackOutput"] == "extra"
    assert len(ways[switch["name"]]["main"]) == len(switch["parameters"]["rules"]["values"]) + 1
    assert all(links for outputs in ways.values() for links in outputs["main"])


def test_nothing_of_an_installation_is_in_it() -> None:
    def keys(value: Any) -> set[str]:
        if isinstance(value, dict):
            return set(value).union(*map(keys, value.values()))
        return set().union(*map(keys, value)) if isinstance(value, list) else set()

    assert keys(WORKFLOW) & {"credentials", "meta", "versionId", "shared", "staticData"} == set()
    assert WORKFLOW["pinData"] == {} and WORKFLOW["active"] is False
    assert set(re.findall(r"https?://[^/\"` ]+", TEXT)) == {"http://aistream:8000"}
    assert re.findall(r"eyJ|whsec_|[Bb]earer|[0-9a-f]{40}", TEXT) == []


def test_the_wait_node_takes_a_post_and_outlasts_every_answer() -> None:
    wait = the_node("wait")["parameters"]

    limit = wait["resumeAmount"] * SECONDS[wait["resumeUnit"]]
    assert (wait["resume"], wait["httpMethod"], wait["incomingAuthentication"]) == ("webhook", "POST", "headerAuth")
    assert wait["limitWaitTime"] is True and wait["limitType"] == "afterTimeInterval"
    assert limit >= 120  # n8n looks at the limits once a minute
    assert limit > DEFAULTS.session_ttl_seconds + DEFAULTS.max_stream_seconds
    assert "webhookSuffix" not in wait["options"]


def test_the_browser_is_answered_before_the_wait() -> None:
    assert ("Open the stream", "Give the browser its stream") in LINKS
    assert ("Give the browser its stream", the_node("wait")["name"]) in LINKS
    assert (the_node("webhook")["parameters"]["httpMethod"], the_node("webhook")["parameters"]["responseMode"]) == (
        "POST",
        "responseNode",
    )


def test_the_token_has_the_claims_that_the_service_demands() -> None:
    signing = the_node("jwt")["parameters"]

    assert signing["useJson"] is True and "claims" not in signing
    assert re.findall(r"(\w+):", signing["claimsJson"]) == ["sub", "iat", "exp"]


def test_an_init_that_is_tried_again_says_that_it_is_the_same() -> None:
    node = the_node("httpRequest")

    (header,) = node["parameters"]["headerParameters"]["parameters"]
    assert node["retryOnFail"] is True
    assert header["name"] == "Idempotency-Key" and "$execution.id" in header["value"]


def test_the_workflow_asks_with_fields_that_the_service_knows() -> None:
    asked = re.findall(r"^  (\w+):", the_node("httpRequest")["parameters"]["jsonBody"], re.MULTILINE)

    assert asked == ["n8nToken", "resumeUrl", "prompt", "model", "max_tokens", "userId", "chatId"]
    assert set(asked) <= set(InitRequest.model_fields)


def test_the_workflow_uses_fields_that_a_callback_has() -> None:
    used = set(re.findall(r"\$json\.body\??\.(\w+)", TEXT))
    assert used >= {"status", "answer", "userId", "chatId", "input_tokens", "output_tokens", "error"}
    assert used <= set(sent(session()))
