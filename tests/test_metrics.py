"""The metrics: what is counted, of which workers, where they are served, and what Prometheus and the dashboard make of them."""

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from aistream import metrics, shared_metrics
from aistream.events import Usage
from aistream.tally import Tally
from tests.conftest import MakeClient, missing, parts_of, running_redis
from tests.neighbours.provider import ProviderServer
from tests.neighbours.receiver import Answer, Receiver
from tests.neighbours.redis import RedisServer
from tests.service import ROOT, Service, wait_until

DEPLOY = ROOT / "deploy"
ALERTS = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"][0]["rules"]
#: What Prometheus itself says of a target.
OF_PROMETHEUS = {"up", "scrape_duration_seconds", "ALERTS"}


class Page:
    """One scrape."""

    def __init__(self, text: str) -> None:
        self.families: dict[str, Metric] = {family.name: family for family in text_string_to_metric_families(text)}
        self.samples = [sample for family in self.families.values() for sample in family.samples]

    def all(self, name: str, **labels: str) -> list[float]:
        """The values of this name's samples that have these labels."""
        return [one.value for one in self.samples if one.name == name and one.labels.items() >= labels.items()]

    def __call__(self, name: str, **labels: str) -> float:
        """Their sum."""
        return sum(self.all(name, **labels))


class Watched(Service):
    """A service with a METRICS_PORT."""

    def __init__(self, log: Path, **environ: str) -> None:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self.metrics_port = int(sock.getsockname()[1])
        super().__init__(log, {"METRICS_PORT": str(self.metrics_port), "LEASE_SECONDS": "1", **environ})

    def inside(self, path: str, **headers: str) -> httpx.Response:
        """GET on METRICS_PORT."""
        return httpx.get(f"http://127.0.0.1:{self.metrics_port}{path}", headers=headers, timeout=10, verify=False)

    def scrape(self) -> Page:
        """The metrics."""
        answer = self.inside("/metrics")
        assert answer.status_code == 200, answer.text
        return Page(answer.text)

    @property
    def workers(self) -> set[int]:
        """The pids of its workers, as its metrics have them."""
        return {int(one.labels["pid"]) for one in self.scrape().samples if one.name == "process_open_fds"}


@contextlib.contextmanager
def watched(folder: Path, **environ: str) -> Iterator[Watched]:
    """One that runs."""
    service = Watched(folder / "watched.log", **environ)
    service.start()
    try:
        yield service
    finally:
        service.kill()


# ---- What is counted ----


@pytest.fixture(scope="module")
def busy(provider_process: ProviderServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """Two workers that have seen whatever there is a metric of: answers, failures, viewers of all kinds, callbacks."""
    folder = tmp_path_factory.mktemp("busy")
    (folder / "models.toml").write_text("[openai.limits]\nconcurrency = 1\n")
    environ = provider_process.openai_environ | {
        "WEB_CONCURRENCY": "2",
        "MODELS_FILE": str(folder / "models.toml"),
        "MAX_VIEWERS_PER_SESSION": "1",
        "CALLBACK_SCHEDULE": "0,600",
        "PROVIDER_BACKOFF_SECONDS": "0",
        "SILENCE_SECONDS": "4",
    }
    with (
        running_redis(folder) as url,
        watched(folder, REDIS_URL=url, **environ) as service,
        Receiver() as n8n,
    ):
        n8n.answers([Answer(410)], path="/dead")
        n8n.answers([Answer(503)], path="/owed")
        _make_busy(service, n8n)
        yield service


def _make_busy(service: Watched, n8n: Receiver) -> None:
    for number in range(4):
        service.read(service.stream_url(model="gpt-test-hello", resumeUrl=n8n.url(f"/{number}")))
    service.read(service.stream_url(model="gpt-test-status-s401", resumeUrl=n8n.url("/dead")))
    service.read(service.stream_url(model="gpt-test-status-s429-x1", resumeUrl=n8n.url("/owed")))
    service.read(service.stream_url(model="gpt-test-status-s401-i1", fallbackModels=["echo"], resumeUrl=n8n.url("/4")))
    service.read(service.stream_url(model="gpt-test-refuses-temperature", temperature=0.5, resumeUrl=n8n.url("/5")))
    service.read(service.stream_url(model="gpt-test-long-n2-d1200", resumeUrl=n8n.url("/6")))
    # Three, of which two are on one worker, which has one place.
    held, *others = (service.stream_url(model=f"gpt-test-long-n30-d25-i{i}", resumeUrl=n8n.url(f"/{7 + i}")) for i in range(3))
    with service.watch(held) as viewer, service.watch(others[0]) as one, service.watch(others[1]) as another:
        first = next(viewer)
        # On one worker of two there is no room: who is not told so reads along on the other.
        for _ in range(12):
            with contextlib.closing(socket.create_connection(("127.0.0.1", service.port))) as sock:
                path = held.partition(f":{service.port}")[2]
                sock.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nAccept: application/json\r\n\r\n".encode())
                sock.recv(100)
        list(one), list(another)
    service.read(held, first.id)
    n8n.wait_for(12, timeout=20)
    wait_until(lambda: len(service.lines("callback.attempted")) == 12)
    # What stands on the worker that is not asked is a second old.
    wait_until(lambda: not any(map(service.scrape(), ("aistream_sessions_running", "aistream_viewers", "aistream_connections"))))


def test_what_happened_is_counted_once_whichever_worker_is_asked(busy: Watched) -> None:
    pages = [busy.scrape() for _ in range(4)]

    for page in pages:
        assert (page("aistream_workers"), page("aistream_workers_started_total"), page("aistream_store_up")) == (2, 2, 1)
        assert (page("aistream_sessions_accepted_total"), page("aistream_sessions_ended_total")) == (12, 12)
        assert page("aistream_sessions_ended_total", state="failed", reason="provider_auth_failed", provider="openai") == 1
        assert page("gen_ai_server_request_duration_seconds_count") == 12
        assert page("gen_ai_server_request_duration_seconds_count", error_type="provider_auth_failed") == 1
        assert page("gen_ai_server_time_to_first_token_seconds_count") == 11
        assert page("aistream_provider_attempts_total", provider="openai", outcome="provider_rate_limited") == 1
        assert (page("aistream_provider_retries_total"), page("aistream_provider_fallbacks_total", provider="openai")) == (1, 1)
        assert page("aistream_callback_attempts_total", outcome="delivered") == 10
        assert (page("aistream_callbacks_owed"), page("aistream_callbacks_dead"), page("aistream_sessions_open")) == (1, 1, 0)
        assert page("aistream_viewers_left_total") == page("aistream_viewers_joined_total") >= 12
        assert page("aistream_viewers_joined_total", resumed="true") == 1
        assert page("aistream_viewers_refused_total", code="too_many_viewers") >= 1
        assert page("aistream_problems_total", code="too_many_viewers") >= 1
        assert page("http_server_request_duration_seconds_count", http_route="/init-stream") == 12
        assert page("aistream_redis_seconds_count", kind="append") > 10 and page("aistream_log_events_total") > 10
        assert page("aistream_provider_queue_seconds_count", provider="openai") >= 1
        assert 0.1 < page("aistream_session_longest_gap_seconds_sum", provider="openai") < 10
        assert (page("aistream_sessions_running"), page("aistream_viewers"), page("aistream_log_backlog_events")) == (0, 0, 0)


def test_tokens_are_those_that_n8n_is_told(busy: Watched) -> None:
    page = busy.scrape()

    for kind in ("input", "output"):
        assert page("gen_ai_client_token_usage_sum", gen_ai_token_type=kind) == page("aistream_tokens_total", kind=kind) > 5
    assert page("gen_ai_client_token_usage_count", gen_ai_request_model="gpt-test-hello", gen_ai_token_type="output") == 4


def test_what_each_worker_has_is_told_by_its_pid(busy: Watched) -> None:
    page = busy.scrape()

    for name in ("process_resident_memory_bytes", "process_open_fds", "process_max_fds", "aistream_connections_limit"):
        values = page.all(name)
        assert len(values) == 2 and min(values) > 5, name
    assert all(abs(time.time() - started) < 120 for started in page.all("process_start_time_seconds"))
    assert page("process_cpu_seconds_total") > 0.5


def test_the_page_and_its_documentation_have_the_same_metrics(busy: Watched) -> None:
    served = set(busy.scrape().families)
    section = (ROOT / "docs" / "operations.md").read_text().partition("\n## Metrics\n")[2].partition("\n## ")[0]
    told = {name.removesuffix("_total") for name in re.findall(r"^\| `([a-z]\w+)", section, re.MULTILINE)}

    assert len(served) > 50
    assert told ^ served == set()


def test_a_model_is_a_label_once_it_has_answered_and_only_so_many_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_models", set())
    labels = []
    for number in range(metrics.MODELS + 10):
        metrics.provider_asked("test", f"made-up-{number}", "provider_invalid_request", 1.0)
        metrics.provider_began("test", f"real-{number}", 1.0)
        metrics.provider_asked("test", f"real-{number}", "answered", 1.0)

    for family in metrics._REGISTRY.collect():
        labels += [
            one.labels.get("gen_ai_request_model") for one in family.samples if one.labels.get("gen_ai_provider_name") == "test"
        ]
    assert {*labels} == {"other", *(f"real-{number}" for number in range(metrics.MODELS))}


def test_a_tally_and_a_histogram_of_prometheus_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds, tally = (0.0, 0.001, 0.0011, 0.25, 4.0, 99.0), Tally(metrics.HUB)
    tallied = metrics._Histogram("tallied", "Of this test.", buckets=metrics.HUB, registry=None)
    observed = metrics._Histogram("tallied", "Of this test.", buckets=metrics.HUB, registry=None)

    for one in seconds:
        tally.add(one)
        observed.observe(one)
    tallied.add(tally)
    tallied.add(tally)

    assert samples(tallied) == samples(observed)


def samples(histogram: metrics._Histogram) -> list[tuple[str, dict[str, str], float]]:
    """Without when it was made."""
    return [
        (one.name, one.labels, one.value) for family in histogram.collect() for one in family.samples if "created" not in one.name
    ]


# ---- Workers that come and go ----


def test_a_killed_worker_leaves_its_counts_and_no_ghost(tmp_path: Path, redis_url: str, provider: ProviderServer) -> None:
    with watched(tmp_path, REDIS_URL=redis_url, WEB_CONCURRENCY="2", **provider.openai_environ) as service:
        for _ in range(6):
            service.read(service.stream_url(model="gpt-test-hello"))
        before = service.scrape()
        files = set(os.listdir(folder_of(service)))
        held = service.stream_url(model="gpt-test-hold", start="immediate")
        with service.watch(held) as viewer:
            next(viewer)
            wait_until(lambda: service.scrape()("aistream_viewers") == 1 and service.scrape()("aistream_sessions_running") == 1)
            owner = next(
                int(one.labels["pid"]) for one in service.scrape().samples if one.name == "aistream_connections" and one.value
            )
            os.kill(owner, signal.SIGKILL)
            wait_until(
                lambda: service.scrape()("aistream_workers_started_total") == 3 and owner not in service.workers, timeout=30
            )
        provider.release()
        after = service.scrape()

        assert before("aistream_sessions_accepted_total") == 6 and after("aistream_sessions_accepted_total") == 7
        assert after("gen_ai_server_time_to_first_token_seconds_count") >= 6
        assert [after(name) for name in ("aistream_workers_started_total", "aistream_workers")] == [3, 2]
        assert (after("aistream_viewers"), after("aistream_connections")) == (0, 0)
        names = os.listdir(folder_of(service))
        assert not [name for name in names if f"_{owner}." in name]
        assert len(names) == len(files) + 2 + (0 if "lock" in files else 1) and "counter_dead.db" in names


def folder_of(service: Service) -> Path:
    """Where its workers share their metrics."""
    (found,) = [path for parent in ("/dev/shm", "/tmp") for path in Path(parent).glob(f"aistream-metrics-{service.pid}-*")]
    return found


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of metrics that the operator has named."""
    monkeypatch.setenv(shared_metrics.VARIABLE, str(tmp_path))
    return tmp_path


def write_as(folder: Path, pid: int, value: float) -> None:
    """What a worker leaves."""
    script = f"""
import prometheus_client.values as values
from prometheus_client import Counter, Gauge, Histogram, CollectorRegistry
values.ValueClass = value_class = values.MultiProcessValue(lambda: {pid})
import prometheus_client.metrics as m
registry = CollectorRegistry()
Counter("c", "says", registry=registry).inc({value})
Histogram("h", "says", buckets=(1, 2), registry=registry).observe({value})
Gauge("g", "says", multiprocess_mode="livesum", registry=registry).set({value})
"""
    subprocess.run([sys.executable, "-c", script], env={**os.environ, shared_metrics.VARIABLE: str(folder)}, check=True)


def test_the_counts_of_the_dead_are_one_file_each_however_many_they_are(folder: Path) -> None:
    dead = 4_000_000  # beyond what Linux gives
    write_as(folder, dead, 1.0)
    write_as(folder, dead + 1, 2.0)
    write_as(folder, os.getpid(), 4.0)
    (folder / f"counter_{dead + 2}.db").write_bytes(b"")  # killed while it made its file

    shared_metrics.bury(dead)
    write_as(folder, dead + 3, 8.0)
    shared_metrics.bury(dead + 3)

    page = collected(folder)
    names = sorted(path.name for path in folder.iterdir())
    mine = os.getpid()
    assert names == sorted(
        [
            *(f"{kind}_{mine}.db" for kind in ("counter", "histogram", "gauge_livesum")),
            "counter_dead.db",
            "histogram_dead.db",
            "lock",
        ]
    )
    assert (page("c_total"), page("h_count"), page("h_sum"), page("g")) == (15, 4, 15, 4)
    assert page("h_bucket", le="1.0") == 1


def collected(folder: Path) -> Page:
    """All that is in the folder."""
    script = """
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
registry = CollectorRegistry()
MultiProcessCollector(registry)
print(generate_latest(registry).decode())
"""
    environ = {**os.environ, shared_metrics.VARIABLE: str(folder)}
    found = subprocess.run([sys.executable, "-c", script], env=environ, capture_output=True, text=True, check=True)
    return Page(found.stdout)


def test_whoever_buries_the_dead_imports_nothing_that_gevent_patches(folder: Path) -> None:
    write_as(folder, 4_000_000, 1.0)
    script = """
import sys
from aistream import shared_metrics
shared_metrics.bury(4_000_000)
print(sorted({"prometheus_client", "ssl", "http.client", "gevent"} & set(sys.modules)))
"""

    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env={**os.environ}, capture_output=True, text=True, check=True
    )

    assert (done.stdout, done.stderr) == ("[]\n", "") and (folder / "counter_dead.db").exists()


def test_counts_are_not_moved_while_somebody_reads_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_metrics, "PATIENCE", 0.05)
    write_as(folder, 4_000_000, 1.0)

    with shared_metrics.undisturbed():
        shared_metrics.bury(4_000_000)
        meanwhile = (folder / "counter_4000000.db").exists()
    shared_metrics.bury(4_000_001)

    assert meanwhile
    assert not (folder / "counter_4000000.db").exists() and (folder / "counter_dead.db").exists()
    with (folder / "lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nobody has kept it


def test_a_drain_is_told_while_it_lasts_and_what_it_cut_afterwards(tmp_path: Path, provider: ProviderServer) -> None:
    with watched(tmp_path, DRAIN_SECONDS="2", **provider.openai_environ) as service:
        before = service.scrape()
        with service.watch(service.stream_url(model="gpt-test-hold")) as viewer:
            next(viewer)
            (worker,) = service.workers
            os.kill(worker, signal.SIGTERM)
            wait_until(lambda: service.scrape()("aistream_drain_started_timestamp_seconds") > 0)
            during = service.scrape()
            list(viewer)
        wait_until(lambda: service.scrape()("aistream_workers_started_total") == 2 and worker not in service.workers, timeout=30)
        after = service.scrape()

        assert abs(during("aistream_drain_started_timestamp_seconds") - time.time()) < 60
        assert during("aistream_config", setting="drain_seconds") == 2
        assert [page("aistream_drain_started_timestamp_seconds") for page in (before, after)] == [0, 0]
        assert [page("aistream_drain_cut_sessions_total") for page in (before, after)] == [0, 1]
        assert (
            after("aistream_sessions_ended_total", state="failed", reason="shutting_down") == after("aistream_drains_total") == 1
        )


# ---- Where they are served ----


def test_the_metrics_port_has_the_metrics_and_health_and_nothing_else(busy: Watched) -> None:
    allowed = [busy.inside(path).status_code for path in ("/metrics", "/health", "/health/ready")]
    refused = [
        busy.inside("/models", Authorization="Bearer x"),
        busy.inside("/"),
        busy.inside("/nothing"),
        busy.inside("/models", Host=f"127.0.0.1:{busy.port}"),
        httpx.post(f"http://127.0.0.1:{busy.metrics_port}/init-stream", json={}, verify=False),
    ]

    assert allowed == [200, 200, 200]
    assert [answer.status_code for answer in refused] == [404] * 5
    assert {answer.json()["code"] for answer in refused} == {"not_found"}


def test_a_host_header_opens_no_metrics_on_the_public_port(tmp_path: Path) -> None:
    with watched(
        tmp_path,
        DEV_MODE="false",
        BASE_URL="https://ai.test",
        RESUME_URL_ALLOWED_ORIGINS="http://n8n:5678",
        OPENAI_API_KEY="k",
    ) as service:
        lies = {"Host": f"127.0.0.1:{service.metrics_port}", "X-Forwarded-Port": str(service.metrics_port)}
        public = httpx.get(f"{service.url}/metrics", headers=lies, verify=False)

        assert (public.status_code, service.inside("/metrics").status_code) == (404, 200)


def test_a_worker_that_is_full_still_answers_on_the_metrics_port(tmp_path: Path) -> None:
    with watched(tmp_path, GUNICORN_CMD_ARGS="--worker-connections 4") as service, contextlib.ExitStack() as open_sockets:
        for _ in range(4):
            sock = open_sockets.enter_context(socket.create_connection(("127.0.0.1", service.port)))
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n")
        wait_until(lambda: service.scrape()("aistream_connections") == 4)
        with pytest.raises(httpx.TimeoutException):
            httpx.get(f"{service.url}/health", timeout=0.5, verify=False)

        answers = [service.inside(path) for path in ("/health", "/health/ready", "/metrics")]

        assert [answer.status_code for answer in answers] == [200, 200, 200]
        assert Page(answers[2].text)("aistream_connections_limit") == 4


def test_while_redis_is_away_the_metrics_say_so(tmp_path: Path) -> None:
    with RedisServer(tmp_path) as redis, watched(tmp_path, REDIS_URL=redis.url) as service:
        before = service.scrape()
        redis.kill()
        wait_until(lambda: service.scrape()("aistream_store_away") == 1)
        away = service.scrape()
        redis.start()
        wait_until(lambda: service.scrape()("aistream_store_away") == 0)
        after = service.scrape()

        assert [page("aistream_store_up") for page in (before, away, after)] == [1, 0, 1]
        assert "aistream_callbacks_owed" in before.families and "aistream_callbacks_owed" not in away.families
        assert away("aistream_redis_errors_total", reason="connection") >= 1
        assert (after("aistream_store_outages_total"), after("aistream_store_away_seconds_total") > 0) == (1, True)


def test_a_metrics_port_of_its_own_in_dev_mode_is_on_this_machine(make_client: MakeClient) -> None:
    client = make_client(METRICS_PORT="9464")

    answer = client.get("/metrics", headers={"Host": "127.0.0.1:9464"})

    assert answer.status_code == 200 and parts_of(client).config.metrics_port == 9464
    assert client.get("/models").status_code == 401  # a client without a socket is no Prometheus


# ---- Prometheus, alerts, dashboard ----


def program(name: str) -> str:
    """Debian's package prometheus has both."""
    found = shutil.which(name)
    if found is None:
        missing(name)
    return found


def promtool(*command: str) -> str:
    """What it says; it must not complain."""
    checked = subprocess.run(
        [program("promtool"), *command], cwd=DEPLOY / "prometheus", capture_output=True, text=True, timeout=60
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    return checked.stdout


def test_prometheus_accepts_its_configuration_and_the_alerts() -> None:
    assert "1 rule files found" in promtool("check", "config", "prometheus.yml")
    assert f"{len(ALERTS)} rules found" in promtool("check", "rules", "--lint-fatal", "alerts.yml")


def test_every_alert_fires_when_it_must_and_not_when_it_must_not() -> None:
    promtool("test", "rules", "alerts_test.yml")

    tried = yaml.safe_load((DEPLOY / "prometheus" / "alerts_test.yml").read_text())["tests"]
    wanted = [(one["alertname"], bool(one["exp_alerts"])) for test in tried for one in test["alert_rule_test"]]
    assert {name for name, fires in wanted if fires} == {rule["alert"] for rule in ALERTS}
    # A test that expects one of two series' alerts expects the other not to fire.
    quiet = {name for name, fires in wanted if not fires} | {"AistreamProviderFailing", "AistreamWorkersRestarting"}
    assert quiet == {rule["alert"] for rule in ALERTS}


def test_every_alert_has_its_paragraph_and_says_where() -> None:
    section = (ROOT / "docs" / "operations.md").read_text().partition("\n## Alerts\n")[2].partition("\n## ")[0]
    told = dict(re.findall(r"^### (\w+)\n+(.+?)(?=\n### |\Z)", section, re.MULTILINE | re.DOTALL))

    assert list(told) == [rule["alert"] for rule in ALERTS]
    for rule in ALERTS:
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert set(rule["annotations"]) == {"summary", "description", "runbook"}
        assert rule["annotations"]["runbook"] == f"docs/operations.md#{rule['alert'].lower()}"
        assert "**Means:**" in told[rule["alert"]] and "**Do:**" in told[rule["alert"]]


@pytest.fixture(scope="module")
def prometheus(busy: Watched, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Prometheus that has scraped the busy service, and judges the alerts."""
    folder = tmp_path_factory.mktemp("prometheus")
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(DEPLOY / "prometheus" / "alerts.yml")],
        "scrape_configs": [{"job_name": "aistream", "static_configs": [{"targets": [f"127.0.0.1:{busy.metrics_port}"]}]}],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{sock.getsockname()[1]}"
    command = [program("prometheus"), f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, f"--web.listen-address={address}", "--no-storage.tsdb.wal-compression"], stdout=log, stderr=log
        )
    try:
        url = f"http://{address}"
        wait_until(lambda: len(_asked(url, 'count_over_time(up{job="aistream"}[1m]) > 1')) == 1, timeout=20)
        yield url
    finally:
        process.terminate()
        process.wait(10)


def _asked(url: str, query: str) -> list[dict[str, Any]]:
    try:
        answer = httpx.get(f"{url}/api/v1/query", params={"query": query}, timeout=10, verify=False).json()
    except (httpx.TransportError, ValueError):
        return []
    assert answer["status"] == "success", (query, answer)
    return list(answer["data"]["result"])


def dashboard() -> dict[str, Any]:
    """Grafana's."""
    return dict(json.loads((DEPLOY / "grafana" / "dashboards" / "aistream.json").read_text()))


def expressions() -> dict[str, str]:
    """Whatever is asked of Prometheus, with Grafana's variables filled in: who asks -> the query."""
    found = {f"alert {rule['alert']}": rule["expr"] for rule in ALERTS}
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", []):
            found[f"panel {panel['title']} ({panel['id']}) {target['refId']}"] = target["expr"]
    found["annotations"] = dashboard()["annotations"]["list"][0]["expr"]
    return {who: expr.replace("$__rate_interval", "1m").replace("$instance", ".*") for who, expr in found.items()}


def names_in(expr: str) -> set[str]:
    """The metrics that an expression names."""
    bare = re.sub(r'"[^"]*"', "", expr)
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]|\b(by|on|without|ignoring|group_left|group_right)\s*\([^)]*\)", " ", bare)
    words = re.findall(r"[a-zA-Z_:][a-zA-Z0-9_:]*(?!\w)(?!\s*\()", bare)
    return {word for word in words if word not in {"and", "or", "unless", "by", "on", "bool"}}


def test_every_query_of_the_dashboard_and_of_the_alerts_is_understood_and_names_what_there_is(
    busy: Watched, prometheus: str
) -> None:
    scraped = {sample.name for sample in busy.scrape().samples}
    found = expressions()

    unknown = {who: names_in(expr) - scraped - OF_PROMETHEUS for who, expr in found.items()}
    for expr in found.values():
        _asked(prometheus, expr)

    assert {who: names for who, names in unknown.items() if names} == {}
    assert all(map(names_in, found.values())) and len(found) > 80


def test_panels_show_what_happened(prometheus: str) -> None:
    found = expressions()
    # Of what is counted, Prometheus sees the increase between two scrapes: there was none.
    standing = [who for who, expr in found.items() if who.startswith("panel") and not re.search(r"rate\(|increase\(|> 0\)", expr)]

    silent = [who for who in standing if not _asked(prometheus, found[who])]

    assert len(standing) > 20 and silent == []


def test_of_a_service_that_works_nothing_is_told_at_once(prometheus: str) -> None:
    # What has to hold for minutes may be pending: this machine may well be slow.
    firing = [one["metric"]["alertname"] for one in _asked(prometheus, 'ALERTS{alertstate="firing"}')]

    assert firing == []


def test_the_dashboard_is_one_that_grafana_can_lay_out() -> None:
    panels = dashboard()["panels"]
    cells = [
        (column, line)
        for panel in panels
        for column in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for line in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]

    assert len(cells) == len(set(cells)) and max(column for column, _ in cells) < 24
    assert len({panel["id"] for panel in panels}) == len(panels)
    rows = ["Are answers fine?", "Do callbacks arrive?", "Providers", "Viewers", "Redis", "Workers"]
    assert [panel["title"] for panel in panels if panel["type"] == "row"] == rows
    assert all(target["datasource"]["uid"] == "${datasource}" for panel in panels for target in panel.get("targets", []))


def test_every_metric_stands_on_the_dashboard(busy: Watched) -> None:
    shown = set().union(*(names_in(expr) for who, expr in expressions().items() if not who.startswith("alert")))
    shown = {re.sub(r"_(bucket|sum|count|total)$", "", name) for name in shown}

    assert set(busy.scrape().families) - shown == set()


def test_grafana_is_given_the_dashboard_and_its_data_source() -> None:
    folder = DEPLOY / "grafana" / "provisioning"
    (source,) = yaml.safe_load((folder / "datasources" / "prometheus.yml").read_text())["datasources"]
    (files,) = yaml.safe_load((folder / "dashboards" / "aistream.yml").read_text())["providers"]

    assert (source["type"], source["url"], source["isDefault"]) == ("prometheus", "http://prometheus:9090", True)
    scraped = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == scraped and files["type"] == "file"


# ---- One ending, in numbers ----


def test_a_mean_time_per_token_leaves_the_first_one_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_models", {"m"})
    before = _sums("mean-test")

    metrics.generation_ended("mean-test", "m", "", Usage(3, 11), seconds=3.0, first_token=1.0, gap=0.5)
    metrics.generation_ended("mean-test", "m", "provider_overloaded", Usage(3, 5), seconds=2.0, first_token=1.0, gap=0.5)
    metrics.generation_ended("mean-test", "m", "", Usage(3, 1), seconds=2.0, first_token=2.0, gap=0.0)

    after = _sums("mean-test")
    assert before == {}
    assert after["gen_ai_server_time_per_output_token_seconds_sum"] == pytest.approx(0.2)
    assert after["gen_ai_server_time_to_first_token_seconds_sum"] == 4.0
    assert after["gen_ai_client_token_usage_sum"] == 26


def _sums(provider: str) -> dict[str, float]:
    sums: dict[str, float] = {}
    for family in metrics._REGISTRY.collect():
        for one in family.samples:
            if one.name.endswith("_sum") and provider in one.labels.values():
                sums[one.name] = sums.get(one.name, 0.0) + one.value
    return sums
