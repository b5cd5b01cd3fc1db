"""What became of a session: GET /sessions, GET /callbacks, redelivery, the metrics, and the same from the shell."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient
from gevent.pool import Pool
from werkzeug.test import TestResponse

from aistream.store import Store
from tests.conftest import MakeClient, make_config, parts_of
from tests.neighbours.provider import ProviderServer
from tests.neighbours.receiver import FINISHED_ALREADY, WRONG_METHOD, Answer, Receiver
from tests.service import ROOT, SECRET, Service, n8n_token, wait_until
from tests.test_callbacks import dead, ended

UNKNOWN = "6b84af1a-3299-4de7-9473-23c993710c18"


def ask(client: FlaskClient, path: str, method: str = "GET", **claims: Any) -> TestResponse:
    """Asks with a token of n8n's, with these claims."""
    return client.open(path, method=method, headers={"Authorization": f"Bearer {n8n_token(**claims)}"})


def session_of(service: Service, stream_url: str) -> dict[str, Any]:
    """What the service says of a stream's session."""
    answer = service.get("/sessions/" + stream_url.split("/stream/")[1].split("?")[0])
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


# ---- GET /sessions/<id> ----


def test_a_session_is_told_from_its_first_second_to_its_delivery(
    service: Service, provider: ProviderServer, n8n: Receiver
) -> None:
    url = service.stream_url(model="gpt-test-hello", resumeUrl=n8n.url("/w?signature=xyz"), prompt="Say hello", metadata={"a": 1})
    pending = session_of(service, url)

    service.read(url)
    wait_until(lambda: (session_of(service, url)["callback"] or {}).get("state") == "delivered")

    done, (callback,) = session_of(service, url), n8n.requests
    assert (pending["status"], pending["usage"], pending["callback"], pending["error"]) == ("pending", None, None, None)
    assert pending["timings"]["created_at"] and pending["timings"]["ended_at"] is None
    assert (done["status"], done["finish_reason"], done["provider"]) == ("completed", "stop", "openai")
    for field in ("usage", "timings", "model", "streamId"):
        assert done[field] == callback.json[field]
    (attempt,) = done["callback"]["history"]
    assert (attempt["attempt"], attempt["outcome"], attempt["status"], attempt["reason"]) == (1, "delivered", 200, "")
    assert done["callback"] | {"history": [], "settled_at": ""} == {
        "state": "delivered",
        "origin": n8n.origin,
        "attempts": 1,
        "attempting": False,
        "next_at": None,
        "settled_at": "",
        "last_answer": "",
        "history": [],
    }
    for private in ("Say hello", callback.json["answer"], "signature", "/w"):
        assert private not in json.dumps(done)


def test_a_callback_that_waits_says_what_n8n_answered_and_when_it_goes_on(service: Service, n8n: Receiver) -> None:
    n8n.always(Answer(503))
    url = service.stream_url(model="gpt-test-status-s401", resumeUrl=n8n.url())

    service.read(url)
    wait_until(lambda: len(session_of(service, url)["callback"]["history"]) >= 2)

    told = session_of(service, url)
    assert (told["status"], told["error"]["code"]) == ("failed", "provider_auth_failed")
    assert (told["callback"]["state"], told["callback"]["last_answer"]) == ("owed", "n8n answered 503")
    assert [one["attempt"] for one in told["callback"]["history"]][:2] == [1, 2]
    n8n.always(Answer(200))


def test_a_session_exists_for_its_own_subject_alone(make_client: MakeClient) -> None:
    client = make_client()
    mine = ended(parts_of(client).store, subject="a")

    answers = [ask(client, f"/sessions/{mine}", sub=sub) for sub in ("a", "b", "")]
    unknown = [ask(client, f"/sessions/{one}", sub="a") for one in (UNKNOWN, "no-id", "..")]

    assert [answer.status_code for answer in answers] == [200, 404, 404]
    assert [answer.status_code for answer in unknown] == [404, 404, 404]
    assert len({answer.json["detail"] for answer in [*answers[1:], *unknown[:2]] if answer.json}) == 1


@pytest.mark.parametrize("path", ["/sessions/" + UNKNOWN, "/callbacks?state=dead", f"/callbacks/{UNKNOWN}/redeliver"])
def test_without_a_good_token_nothing_is_told(client: FlaskClient, path: str) -> None:
    method = "POST" if path.endswith("redeliver") else "GET"
    viewer = parts_of(client).tokens.sign_viewer(UNKNOWN, int(time.time()) + 60)

    answers = [
        client.open(path, method=method),
        client.open(path, method=method, headers={"Authorization": "Bearer x.y.z"}),
        client.open(path, method=method, headers={"Authorization": f"Bearer {viewer}"}),
        ask(client, path, method, exp=1),
    ]

    assert [answer.status_code for answer in answers] == [401] * 4
    codes = ["token_missing", "token_malformed", "token_wrong_kind", "token_expired"]
    assert [answer.json and answer.json["code"] for answer in answers] == codes


# ---- GET /callbacks ----


def test_the_callers_callbacks_are_listed_by_state_and_page(client: FlaskClient) -> None:
    store = parts_of(client).store
    letters, owed = [], ended(store, subject="a")
    for _ in range(3):
        letters.append(dead(store, subject="a"))
        time.sleep(0.002)
    dead(store, subject="b")

    first = ask(client, "/callbacks?state=dead&limit=2", sub="a").json or {}
    second = ask(client, f"/callbacks?state=dead&limit=2&after={first['next']}", sub="a").json or {}
    waiting = ask(client, "/callbacks?state=owed", sub="a").json or {}

    assert [one["streamId"] for one in first["callbacks"] + second["callbacks"]] == letters
    assert second["next"] is None and first["callbacks"][0]["callback"]["last_answer"] == "n8n answered 410"
    assert [one["streamId"] for one in waiting["callbacks"]] == [owed]


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("", "state"),
        ("state=delivered", "state"),
        ("state=dead&limit=0", "limit"),
        ("state=dead&limit=1001", "limit"),
        ("state=dead&limit=x", "limit"),
        ("state=dead&after=x", "after"),
        ("state=dead&after=1-2", "after"),
    ],
)
def test_a_query_that_cannot_be_used_is_named(client: FlaskClient, query: str, field: str) -> None:
    answer = ask(client, "/callbacks?" + query)

    assert answer.status_code == 400
    assert [error["field"] for error in (answer.json or {})["errors"]] == [field]


# ---- POST /callbacks/<id>/redeliver ----


def test_a_dead_letter_is_delivered_when_its_author_has_mended_the_workflow(service: Service, n8n: Receiver) -> None:
    n8n.answers([WRONG_METHOD])
    url = service.stream_url(model="echo", prompt="again", resumeUrl=n8n.url())
    service.read(url)
    wait_until(lambda: session_of(service, url)["callback"]["state"] == "dead")
    session_id = session_of(service, url)["streamId"]
    listed = service.get("/callbacks?state=dead").json()["callbacks"]

    answer = service.post(f"/callbacks/{session_id}/redeliver")

    first, second = n8n.wait_for(2)
    assert (answer.status_code, answer.json()) == (202, {"ok": True, "streamId": session_id, "callback": "owed"})
    assert "HTTP method to POST" in next(one for one in listed if one["streamId"] == session_id)["callback"]["last_answer"]
    assert (first.headers["webhook-id"], second.json["attempt"], second.json["answer"]) == (
        second.headers["webhook-id"],
        2,
        "again",
    )
    wait_until(lambda: session_of(service, url)["callback"]["state"] == "delivered")
    refused = service.post(f"/callbacks/{session_id}/redeliver")
    assert (refused.status_code, refused.json()["code"]) == (409, "already_delivered")


def test_what_cannot_be_delivered_again_is_a_conflict_or_unknown(client: FlaskClient) -> None:
    store = parts_of(client).store
    foreign, gone = dead(store, subject="b"), dead(store, subject="a")
    store.connections.call("DEL", f"aistream:{{0}}:content:{gone}")
    pending = (client.post("/init-stream", json=init_body("a")).json or {})["streamId"]

    answers = [ask(client, f"/callbacks/{one}/redeliver", "POST", sub="a") for one in (foreign, UNKNOWN, "x", gone, pending)]

    codes = ["not_found", "not_found", "not_found", "content_gone", "not_ended"]
    assert [(answer.json or {})["code"] for answer in answers] == codes
    assert [answer.status_code for answer in answers] == [404, 404, 404, 409, 409]


def init_body(subject: str) -> dict[str, Any]:
    """The least that init needs."""
    return {"n8nToken": n8n_token(sub=subject), "resumeUrl": "http://n8n.test/1", "prompt": "Hello"}


# ---- GET /metrics ----


def test_metrics_count_the_attempts_of_all_workers(start_service: Callable[..., Service], redis_url: str, n8n: Receiver) -> None:
    service = start_service(
        REDIS_URL=redis_url, WEB_CONCURRENCY="2", METRICS_TOKEN="m" * 16, CALLBACK_SCHEDULE="0,0,3600", LEASE_SECONDS="1"
    )
    n8n.answers([Answer(503), FINISHED_ALREADY])
    for number in range(8):
        service.read(service.stream_url(model="echo", prompt="a", resumeUrl=n8n.url(f"/{number}")))
    wait_until(lambda: len(service.lines("callback.attempted")) == 9)

    scrapes = [service.get("/metrics", "m" * 16) for _ in range(6)]

    assert {answer.headers["Content-Type"].split(";")[0] for answer in scrapes} == {"text/plain"}
    for answer in scrapes:  # whichever worker was asked
        counted = dict(re.findall(r"^(aistream_callback\S+) (\S+)$", answer.text, re.MULTILINE))
        attempts = {
            outcome: counted[f'aistream_callback_attempts_total{{outcome="{outcome}"}}']
            for outcome in ("delivered", "retry", "dead")
        }
        assert attempts == {"delivered": "7.0", "retry": "1.0", "dead": "1.0"}
        assert (counted["aistream_callback_attempt_seconds_count"], counted["aistream_callback_delivery_seconds_count"]) == (
            "9.0",
            "7.0",
        )
        assert (counted["aistream_callbacks_owed"], counted["aistream_callbacks_dead"]) == ("0.0", "1.0")
    folder = next(iter(metrics_folders(service.pid)))
    service.stop()
    assert not os.path.exists(folder)


def test_a_service_removes_the_metrics_of_masters_that_were_killed(start_services: Callable[..., list[Service]]) -> None:
    killed, alive = start_services(2)
    pids = killed.pid, alive.pid
    killed.kill()
    left = [len(metrics_folders(pid)) for pid in pids]

    start_services(1)

    assert left == [1, 1]
    assert [len(metrics_folders(pid)) for pid in pids] == [0, 1]


def test_metrics_go_where_the_operator_wants_them(start_service: Callable[..., Service], tmp_path: Path) -> None:
    (tmp_path / "metrics").mkdir()

    service = start_service(PROMETHEUS_MULTIPROC_DIR=str(tmp_path / "metrics"), LEASE_SECONDS="1")
    pid = service.pid
    service.stop()

    assert list((tmp_path / "metrics").glob("*.db")) and metrics_folders(pid) == set()


def metrics_folders(pid: int) -> set[str]:
    """Where the service's workers share their metrics."""
    made: set[str] = set()
    for parent in ("/dev/shm", "/tmp"):
        made |= {f"{parent}/{name}" for name in os.listdir(parent) if name.startswith(f"aistream-metrics-{pid}-")}
    return made


def test_metrics_are_for_who_has_their_token_and_off_without_one(make_client: MakeClient) -> None:
    required = {"DEV_MODE": "", "BASE_URL": "https://ai.test", "RESUME_URL_ALLOWED_ORIGINS": "http://n8n:5678"}
    off, on, dev = make_client(**required), make_client(**required, METRICS_TOKEN="m" * 16), make_client()

    answers = [
        off.get("/metrics"),
        on.get("/metrics"),
        on.get("/metrics", headers={"Authorization": "Bearer " + "n" * 16}),
        ask(on, "/metrics"),
        on.get("/metrics", headers={"Authorization": "Bearer " + "m" * 16}),
        dev.get("/metrics"),
    ]

    assert [answer.status_code for answer in answers] == [404, 401, 401, 401, 200, 200]
    assert "METRICS_TOKEN" in (answers[0].json or {})["detail"]


# ---- The shell ----


def shell(*args: str, **environ: str) -> "subprocess.CompletedProcess[str]":
    """Runs `aistream callbacks …`."""
    required = {
        "PATH": os.environ["PATH"],
        "JWT_SECRET": SECRET,
        "DEV_MODE": "true",
        "PYTHON_DOTENV_DISABLED": "true",
        "COLUMNS": "200",
    }
    command = [sys.executable, "-m", "aistream", "callbacks", *args]
    return subprocess.run(command, cwd=ROOT, env={**required, **environ}, capture_output=True, text=True, timeout=60)


def shells(*calls: tuple[str, ...], **environ: str) -> "list[subprocess.CompletedProcess[str]]":
    """Runs several, none of which changes anything, at the same time: most of what each takes is Python's own start."""
    return Pool(len(calls)).map(lambda args: shell(*args, **environ), calls)


@pytest.fixture
def store(redis_url: str) -> Store:
    """A store on the private Redis."""
    return Store(make_config(REDIS_URL=redis_url))


def test_the_shell_lists_what_is_owed_and_dead_in_a_table(store: Store, redis_url: str) -> None:
    letter, owed = dead(store, subject="somebody"), ended(store, subject="else")

    table, letters = shells(("list",), ("list", "--state", "dead", "--json"), REDIS_URL=redis_url)

    head, first, second, total = table.stdout.splitlines()
    assert head.split() == ["session", "callback", "ended", "attempts", "next", "origin", "answer", "last", "answer"]
    assert first.split()[:2] == [owed, "owed"] and "http://one:1" in first
    assert second.split()[:2] == [letter, "dead"] and second.endswith("n8n answered 410")
    assert total == "1 owed, 1 dead; 2 shown"
    (line,) = letters.stdout.splitlines()
    assert (json.loads(line)["streamId"], json.loads(line)["callback"]["state"]) == (letter, "dead")


def test_the_shell_shows_a_session_with_every_attempt(store: Store, redis_url: str) -> None:
    letter = dead(store, subject="somebody")

    shown, unknown, whole = shells(("show", letter), ("show", UNKNOWN), ("show", letter, "--json"), REDIS_URL=redis_url)

    for part in (letter, "somebody", "completed", "dead to http://one:1, 1 attempts", "n8n answered 410", "gone", "7 ms"):
        assert part in shown.stdout
    assert (unknown.returncode, unknown.stderr.strip()) == (1, f"{UNKNOWN} is not known (any more)")
    assert json.loads(whole.stdout)["streamId"] == letter


def test_the_shell_has_dead_letters_delivered_again(
    start_service: Callable[..., Service], store: Store, redis_url: str, n8n: Receiver
) -> None:
    letters = [dead(store, url=n8n.url(f"/{number}"), subject=f"s{number}") for number in range(3)]

    one = shell("redeliver", letters[0], UNKNOWN, REDIS_URL=redis_url)
    everything = shell("redeliver", "--all", REDIS_URL=redis_url)
    nothing = shell("redeliver", "--all", REDIS_URL=redis_url)

    start_service(REDIS_URL=redis_url)  # the workers send it
    assert (one.returncode, one.stdout.splitlines()) == (
        1,
        [
            f"{letters[0]} due now: the workers send it at their next look, within a second",
            f"{UNKNOWN} is not known (any more)",
        ],
    )
    assert (everything.returncode, everything.stdout) == (0, "2 of 2 dead letters are due now\n")
    assert (nothing.returncode, nothing.stdout) == (0, "there are no dead letters\n")
    assert {received.path for received in n8n.wait_for(3)} == {"/0", "/1", "/2"}


def test_the_shell_says_what_keeps_it_from_working(free_port: int) -> None:
    away_url = f"redis://127.0.0.1:{free_port}"
    away, neither = shells(("list",), ("redeliver",), REDIS_URL=away_url)
    embedded, wrong = shell("list"), shell("list", PORT="x")

    assert [one.returncode for one in (embedded, away, wrong, neither)] == [1, 1, 1, 2]
    assert "REDIS_URL is not set" in embedded.stderr and "Redis cannot be reached" in away.stderr
    assert "PORT is 'x'" in wrong.stderr and "--all for every dead letter" in neither.stderr
    assert not [one for one in (embedded, away, wrong, neither) if "Traceback" in one.stderr]
