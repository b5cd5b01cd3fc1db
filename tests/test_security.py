"""Rows of the checklist in docs/security.md that no other test shows."""

import re
import tomllib
import uuid

import httpx
import pytest
from flask.testing import FlaskClient

from aistream.api import normal_id
from tests.service import ROOT, Service, n8n_token

#: A header that n8n, a browser or a proxy sends, each with a value that no answer may repeat.
SENT = {
    name: "canary"
    for name in (
        *("Accept-Language", "Cookie", "From", "Idempotency-Key", "Last-Event-ID", "Origin", "Referer", "User-Agent"),
        *("X-Forwarded-Host", "X-Forwarded-Proto", "X-Forwarded-Prefix", "X-Original-URL", "X-Any"),
    )
}


def test_a_streams_id_is_128_random_bits(client: FlaskClient) -> None:
    body = {"n8nToken": n8n_token(), "resumeUrl": "http://127.0.0.1:9/none", "prompt": "a"}

    ids = [client.post("/init-stream", json=body).json["streamId"] for _ in range(3)]

    assert len(set(ids)) == 3 and {uuid.UUID(one).version for one in ids} == {4}


def test_no_header_of_an_answer_repeats_what_a_request_says(service: Service) -> None:
    url = service.stream_url(prompt="canary", metadata={"a": "canary"})
    body = {"n8nToken": "canary", "prompt": "canary"}

    answers = [
        httpx.get(url, headers=SENT),
        httpx.get(f"{service.url}/stream/canary?access_token=canary&format=canary", headers=SENT),
        httpx.post(f"{service.url}/init-stream?canary", json=body, headers=SENT),
        httpx.post(f"{service.url}/init-stream", json={**body, "n8nToken": n8n_token()}, headers=SENT),
        httpx.get(f"{service.url}/canary", headers={**SENT, "Host": "canary.test"}),
        httpx.get(f"{service.url}/health/", headers={**SENT, "X-Request-ID": "canary\tcanary"}),
    ]

    assert [answer.url for answer in answers if "canary" in str(answer.headers)] == []


@pytest.mark.parametrize("path", ["/health", "/nowhere", "/stream/x", "/stream", "/init-stream", "a stream"])
def test_no_answer_is_compressed_guessed_kept_or_passed_on_in_a_referer(service: Service, path: str) -> None:
    address = service.stream_url(prompt="a b") if path == "a stream" else service.url + path

    answer = httpx.get(address, headers={"Accept-Encoding": "gzip, deflate, br", "Accept": "text/event-stream"})

    assert answer.headers["X-Content-Type-Options"] == "nosniff" and answer.headers["Referrer-Policy"] == "no-referrer"
    assert "no-store" in answer.headers["Cache-Control"]
    assert not {"Content-Encoding", "Set-Cookie"} & {name.title() for name in answer.headers}
    if path == "a stream":
        assert answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        assert answer.headers["Cache-Control"] == "no-store, no-transform" and answer.headers["X-Accel-Buffering"] == "no"


def test_no_script_in_redis_makes_code_of_what_it_is_given() -> None:
    scripts = {path.name: path.read_text() for path in (ROOT / "aistream" / "lua").glob("*.lua")}

    assert len(scripts) > 10
    assert [
        name for name, text in scripts.items() if re.search(r"\b(loadstring|load|dofile|require|setfenv|debug)\b\s*[\(.]", text)
    ] == []


@pytest.mark.parametrize("given", ["", "*", "{0}", "x:y", "../..", "1" * 31, "g" * 32, "é" * 32])
def test_what_is_no_uuid_never_becomes_part_of_a_key(client: FlaskClient, given: str) -> None:
    assert normal_id(given) == ""
    assert client.get(f"/sessions/{given}", headers={"Authorization": f"Bearer {n8n_token()}"}).status_code == 404


@pytest.mark.parametrize("written", ["{}", "{{{}}}", "urn:uuid:{}"])
def test_a_uuid_has_one_form_in_a_key_however_it_is_written(written: str) -> None:
    one = uuid.uuid4()

    assert normal_id(written.format(one)) == normal_id(written.format(one.hex.upper())) == str(one)


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
def test_the_lock_files_pin_every_requirement_with_its_hash(name: str) -> None:
    text = re.sub(r" *#.*", "", (ROOT / name).read_text()).replace("\\\n", "")
    requirements = [line for line in text.splitlines() if line.strip()]
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())

    unpinned = [
        line for line in requirements if not re.match(r"[\w.-]+(\[[\w,-]+\])?==\S+( ;[^-]+)? +--hash=sha256:[0-9a-f]{64}", line)
    ]
    direct = {re.split(r"[\[=]", one)[0].lower() for one in declared["project"]["dependencies"]}

    assert unpinned == [] and direct - {line.split("==")[0].split("[")[0] for line in requirements} == set()
