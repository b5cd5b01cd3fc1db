"""What the kernel allows against what is configured: the arithmetic, the words, and services that really run out."""

import json
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import gevent
import httpx
import pytest

from aistream.delivery import SENDERS
from aistream.kernel_limits import RESERVE, Demand, demand, raise_descriptors, shortages, streams_within
from tests.conftest import make_config
from tests.neighbours.provider import ProviderServer
from tests.neighbours.receiver import Receiver
from tests.service import ROOT, SECRET, Service, n8n_token, wait_until

DEFAULT = Demand(20_000, {"api.openai.com": 10_000})
#: With so many descriptors a worker keeps 80 for itself and carries 40 streams. (Fewer than about 130 could all be taken by the
#: hundred connections that are kept for a next request to the provider.)
FEW = 160


# ---- What is asked for ----


def test_a_worker_is_to_carry_as_many_streams_as_its_providers_have_places() -> None:
    assert demand(make_config(OPENAI_API_KEY="k", ANTHROPIC_API_KEY="k")) == Demand(
        20_000, {"api.openai.com": 10_000, "api.anthropic.com": 10_000}
    )
    assert demand(make_config(OPENAI_API_KEY="k", PROVIDER_CONCURRENCY="70"), 500) == Demand(500, {"api.openai.com": 70})
    assert demand(make_config()).places == {}


def test_aliases_on_one_server_share_its_address(tmp_path: Path) -> None:
    file = tmp_path / "models.toml"
    table = '[{}]\nbase_url = "http://gpu:8000/v1"\nlimits.concurrency = {}\n'
    file.write_text(table.format("small", 30) + table.format("large", 4))

    assert demand(make_config(MODELS_FILE=str(file), OPENAI_API_KEY="k", PROVIDER_CONCURRENCY="9")).places == {
        "api.openai.com": 9,
        "gpu:8000": 34,
    }


def test_the_reserve_is_what_redis_the_callbacks_and_the_process_may_take() -> None:
    assert demand(make_config()).reserve == RESERVE == 50 + SENDERS + 50
    assert demand(make_config(REDIS_POOL_SIZE="120")).reserve == 120 + SENDERS + 50


# ---- What a limit carries ----


@pytest.mark.parametrize(("limit", "streams"), [(128, 32), (256, 64), (600, 150), (1_024, 362), (4_096, 1_898), (20_300, 10_000)])
def test_a_stream_takes_two_descriptors_beside_the_reserve(limit: int, streams: int) -> None:
    assert streams_within(limit) == streams


@pytest.mark.parametrize("streams", [1, 32, 75, 149, 150, 151, 10_000])
def test_what_is_needed_is_the_smallest_limit_that_carries_it(streams: int) -> None:
    needed = Demand(20_000, {"x": streams}).needed

    assert streams_within(needed) == streams
    assert streams_within(needed - 1) == streams - 1


@pytest.mark.parametrize("places", [0, 1, 100, 1_000, 20_000, 50_000])
@pytest.mark.parametrize("limit", [32, 128, 600, 1_024, 4_096, 20_000, 40_300, 1_048_576])
def test_the_connections_of_a_worker_never_take_more_than_there_is(limit: int, places: int) -> None:
    asked = Demand(20_000, {"x": places})

    connections, lines = asked.connections_within(limit), asked.lines_within(limit)

    assert 1 <= lines <= connections <= 20_000
    assert lines + min(lines, places) <= limit - min(RESERVE, (limit + 1) // 2)
    if limit >= asked.wanted:
        assert connections == 20_000


def test_fewer_places_than_a_limit_carries_leave_room_for_connections_without_an_answer() -> None:
    assert Demand(20_000, {"x": 10_000}).lines_within(4_096) == 1_898
    assert Demand(20_000, {"x": 1_000}).lines_within(4_096) == 2_796


@pytest.mark.parametrize(
    ("connections", "limit", "lines"), [(20_000, 1_048_576, 19_970), (20_000, 4_096, 1_898), (100, 4_096, 75), (5, 4_096, 3)]
)
def test_a_few_connections_are_kept_for_inits_and_health_checks(connections: int, limit: int, lines: int) -> None:
    asked = Demand(connections, {"x": 10_000})

    assert asked.lines_within(limit) == lines < asked.connections_within(limit)


def test_a_worker_is_to_carry_no_more_streams_than_it_may(tmp_path: Path) -> None:
    asked = demand(make_config(OPENAI_API_KEY="k", ANTHROPIC_API_KEY="k", MAX_STREAMS_PER_WORKER="1000"))

    assert (asked.streams, asked.needed) == (1_000, 2_300)


# ---- What is said ----


def proc(folder: Path, somaxconn: str = "4096", ports: str = "32768\t60999") -> Path:
    """A /proc/sys with these two files."""
    for name, text in (("net/core/somaxconn", somaxconn), ("net/ipv4/ip_local_port_range", ports)):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(text + "\n")
    return folder


@pytest.mark.parametrize("limit", [20_300, 524_288, 1_048_576])
def test_nothing_is_said_where_the_kernel_allows_what_is_configured(tmp_path: Path, limit: int) -> None:
    assert shortages(DEFAULT, limit, backlog=4_096, workers=2, proc=proc(tmp_path)) == []


def test_too_few_descriptors_are_told_with_what_they_carry_what_is_needed_and_how_to_get_it(tmp_path: Path) -> None:
    (short,) = shortages(DEFAULT, 4_096, backlog=4_096, workers=2, proc=proc(tmp_path))

    advice = "\n".join(short.facts.pop("advice"))
    assert (short.event, short.warns) == ("descriptors.short", True)
    assert short.facts == {"limit": 4_096, "carries_streams": 1_898, "needed": 20_300, "for_streams": 10_000}
    assert all(remedy in advice for remedy in ("LimitNOFILE=20300", "nofile=20300", "nofile: 20300", "ulimit -n 20300"))
    assert "PROVIDER_CONCURRENCY" in advice


def test_fewer_places_need_fewer_descriptors(tmp_path: Path) -> None:
    asked = DEFAULT._replace(places={"api.openai.com": 1_898})

    assert shortages(asked, 4_096, backlog=4_096, workers=2, proc=proc(tmp_path)) == []


def test_a_backlog_that_the_kernel_cuts_is_told_with_its_sysctl(tmp_path: Path) -> None:
    (short,) = shortages(DEFAULT, 65_536, backlog=4_096, workers=1, proc=proc(tmp_path, somaxconn="128"))

    advice = "\n".join(short.facts.pop("advice"))
    assert (short.event, short.warns, short.facts) == ("backlog.short", True, {"limit": 128, "needed": 4_096})
    assert "sysctl -w net.core.somaxconn=4096" in advice


def test_local_ports_are_told_where_all_workers_together_need_more_of_them_for_one_provider(tmp_path: Path) -> None:
    (short,) = shortages(DEFAULT, 65_536, backlog=4_096, workers=3, proc=proc(tmp_path))

    advice = "\n".join(short.facts.pop("advice"))
    assert (short.event, short.warns) == ("ports.short", False)
    assert short.facts == {"limit": 28_232, "provider": "api.openai.com", "for_streams": 30_000}
    assert 'sysctl -w net.ipv4.ip_local_port_range="1024 65535"' in advice


def test_ports_count_only_where_they_are_the_narrower_limit(tmp_path: Path) -> None:
    said = shortages(DEFAULT, 4_096, backlog=4_096, workers=4, proc=proc(tmp_path))

    assert [short.event for short in said] == ["descriptors.short"]


def test_no_sysctl_is_advised_where_all_ports_are_in_use_already(tmp_path: Path) -> None:
    (short,) = shortages(DEFAULT, 65_536, backlog=4_096, workers=7, proc=proc(tmp_path, ports="1024 65535"))

    assert short.facts["limit"] == 64_512 and not any("sysctl" in line for line in short.facts["advice"])


@pytest.mark.parametrize("somaxconn", ["", "unknown"])
def test_where_proc_says_nothing_nothing_is_said(tmp_path: Path, somaxconn: str) -> None:
    assert shortages(DEFAULT, 65_536, backlog=4_096, workers=9, proc=tmp_path / "none") == []
    assert shortages(DEFAULT, 65_536, backlog=4_096, workers=9, proc=proc(tmp_path, somaxconn, ports="")) == []


# ---- What is raised ----


@pytest.mark.parametrize(
    ("soft", "hard", "becomes"),
    [(1_024, 524_288, (30_300, 524_288)), (1_024, 4_096, (4_096, 4_096)), (65_536, 524_288, (65_536, 524_288))],
    ids=["as far as is useful", "to the hard limit", "never lowered"],
)
def test_the_soft_limit_is_raised_and_the_hard_one_left(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, becomes: tuple[int, int]
) -> None:
    now = [(soft, hard)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: now[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: now.append(limits))

    assert raise_descriptors(DEFAULT.wanted) == becomes[0]
    assert now[-1] == becomes


def test_a_kernel_that_refuses_leaves_the_limit_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(resource, "getrlimit", lambda _: (1_024, 524_288))
    monkeypatch.setattr(resource, "setrlimit", refuse)

    assert raise_descriptors(30_300) == 1_024


def test_no_limit_at_all_carries_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    assert raise_descriptors(30_300) == 30_300


def test_what_flask_run_loads_raises_the_limit_and_says_nothing() -> None:
    script = f'ulimit -Sn {FEW} && ulimit -Hn 256 && exec "$0" -c "import wsgi; print(open(\'/proc/self/limits\').read())"'
    environ = {"DEV_MODE": "true", "JWT_SECRET": SECRET, "PYTHON_DOTENV_DISABLED": "true"}

    loaded = subprocess.run(
        ["sh", "-c", script, sys.executable], cwd=ROOT, env=environ, capture_output=True, text=True, check=True
    )

    (line,) = (line for line in loaded.stdout.splitlines() if line.startswith("Max open files"))
    assert line.split()[3:5] == ["256", "256"]
    assert (loaded.stdout.partition("\n")[0].split()[0], loaded.stderr) == ("Limit", "")


# ---- Services that have too few ----


def test_a_service_says_once_what_its_hard_limit_lacks_however_many_workers_it_has(tmp_path: Path, redis_url: str) -> None:
    environ = {"DEV_MODE": "", "BASE_URL": "https://ai.test", "RESUME_URL_ALLOWED_ORIGINS": "https://n8n.test"}
    environ |= {"OPENAI_API_KEY": "k", "REDIS_URL": redis_url, "WEB_CONCURRENCY": "2", "LEASE_SECONDS": "1"}
    service = Service(tmp_path / "log", environ, f"-Sn 64 && ulimit -Hn {FEW}")

    try:
        service.start()
        wait_until(lambda: service.lines("descriptors.short") and len(service.lines("store.checked")) == 2)
        service.stop()  # both have served by then
    finally:
        service.kill()

    (line,) = service.lines("descriptors.short")
    assert line["level"] == "warning"
    assert {"limit": FEW, "carries_streams": 40, "needed": 20_300, "for_streams": 10_000}.items() <= line.items()


@pytest.fixture(scope="module")
def shared_few(provider_process: ProviderServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The process behind `few`."""
    environ = {**provider_process.openai_environ, "PROVIDER_RETRIES": "0", "LOG_LEVEL": "debug"}
    service = Service(tmp_path_factory.mktemp("few") / "log", environ, f"-n {FEW}")
    service.start()
    yield service
    service.kill()


@pytest.fixture
def few(shared_few: Service, provider: ProviderServer) -> Service:
    """A service with few file descriptors."""
    return shared_few


def test_a_developer_is_told_at_debug_alone(few: Service) -> None:
    assert [line["level"] for line in few.lines("descriptors.short")] == ["debug"]


def test_a_viewer_beyond_the_descriptors_is_told_so_and_neither_an_init_nor_a_health_check_waits(
    few: Service, provider: ProviderServer, n8n: Receiver
) -> None:
    urls = [few.stream_url(model="gpt-test-hold-n4-k2-i71", resumeUrl=n8n.url()) for _ in range(52)]
    reading = {url: gevent.spawn(few.read, url) for url in urls}
    provider.wait_for_open_streams(40, timeout=10)
    wait_until(lambda: sum(reader.ready() for reader in reading.values()) == 12)
    alive, ready = few.get("/health"), few.get("/health/ready")
    asked = few.init(resumeUrl=n8n.url(), model="echo")

    def over() -> bool:
        provider.release()
        return all(reader.ready() for reader in reading.values())

    refused = [url for url, reader in reading.items() if reader.ready()]
    told = [event for url in refused for event in reading[url].get()]
    wait_until(over, timeout=20)
    reading |= {url: gevent.spawn(few.read, url) for url in refused}
    wait_until(over, timeout=20)

    assert [event.event for event in told] == ["error"] * 12
    assert {tuple(json.loads(event.data).items())[::2] for event in told} == {(("code", "overloaded"), ("retryable", True))}
    assert [answer.status_code for answer in (alive, ready, asked)] == [200, 200, 200]
    assert [reader.get()[-1].data for reader in reading.values()] == ["[DONE]"] * 52
    assert {callback.json["status"] for callback in n8n.wait_for(52, timeout=10)} == {"completed"}
    assert "Traceback" not in few.log


def test_a_worker_without_a_free_descriptor_fails_cleanly_says_so_once_and_recovers(
    few: Service, provider: ProviderServer, n8n: Receiver
) -> None:
    # Answers that wait for no viewer are not bounded by the connections that a worker takes.
    body = {"n8nToken": n8n_token(), "prompt": "a", "model": "gpt-test-hold-n4-k2-i72", "start": "immediate"}
    with httpx.Client(trust_env=False) as client:
        for number in range(170):
            asked = client.post(f"{few.url}/init-stream", json={**body, "resumeUrl": n8n.url(f"/{number}")})
            assert asked.status_code == 200
        asking = [gevent.spawn(httpx.get, f"{few.url}/health", timeout=20) for _ in range(3)]
        wait_until(lambda: few.lines("descriptors.exhausted"))
        alive = client.get(f"{few.url}/health").status_code

    def endings() -> dict[str, tuple[str, str]]:
        # An attempt that finds no descriptor is made again.
        provider.release()
        told = {callback.path: callback.json for callback in n8n.requests}
        return {path: (one["status"], (one["error"] or {}).get("code", "")) for path, one in told.items()}

    wait_until(lambda: len(endings()) == 170, timeout=20)

    ended = Counter(endings().values())
    assert alive == 200 and [one.get(timeout=5).status_code for one in asking] == [200] * 3
    assert set(ended) == {("completed", ""), ("failed", "provider_unavailable")}
    # All but what the process itself has (19, of which the metrics' files are five), and what callbacks have at a time (20).
    assert ended["completed", ""] > FEW - 19 - 20
    assert len(few.lines("descriptors.exhausted")) == 1 and "Traceback" not in few.log
    assert [line for line in few.log.splitlines() if '"level":"error"' in line] == []
    assert few.read(few.stream_url(model="gpt-test-hello-i73"))[-1].data == "[DONE]"
