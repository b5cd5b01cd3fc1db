"""The real neighbours that tests run against, and the guards that nothing is left behind."""

from gevent import monkey

monkey.patch_all()

from tests import side_by_side

side_by_side.use_real_threads()

import dataclasses
import gc
import os
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NoReturn

import gevent
import hypothesis  # noqa: F401  # its plugin would import it at the end, when gc.freeze() hides what it looks for
import pytest
import redis
from flask.testing import FlaskClient
from selenium.webdriver import Chrome

from aistream.api import Parts
from aistream.app import create_app
from aistream.config import Config
from aistream.store import Store
from tests import doc_blocks
from tests.browser import chromium, programs
from tests.leaks import leaks
from tests.neighbours.provider import ProviderServer
from tests.neighbours.receiver import Receiver
from tests.service import SECRET, Service

# Nothing here speaks TLS, and httpx reads all certificate authorities for each of its clients: 30 ms in which this whole process,
# neighbours included, stands still.
os.environ.pop("SSL_CERT_FILE", None)
os.environ["SSL_CERT_DIR"] = os.devnull

MakeClient = Callable[..., FlaskClient]
UNDER_CI = os.environ.get("CI") == "true"


def missing(what: str) -> NoReturn:
    """A neighbour that is not on this machine: a failure under CI, one clear line elsewhere."""
    message = f"{what} is not on this machine: `make test` installs it"
    if UNDER_CI:
        pytest.fail(message)
    pytest.skip(message)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Fails a test, or its tear-down, when what was printed in this process has a secret: the same net as under a `Service`.

    What a test took with capsys or capfd is its own to look at; under -s there is nothing to look at.
    """
    report = yield
    if report.when != "setup" and report.passed:
        found = leaks(report.capstdout + report.capstderr, [SECRET])
        if found:
            report.outcome = "failed"
            report.longrepr = "\n".join(["this process has printed what nobody may see:", *found[:20]])
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """After a run of test_doc_blocks.py: how much of the documentation's code was run."""
    reports = [report for kind in terminalreporter.stats.values() for report in kind if isinstance(report, pytest.TestReport)]
    if any("test_doc_blocks" in report.nodeid for report in reports):
        terminalreporter.write_line(doc_blocks.summary() + ": `python -m tests.doc_blocks` lists why")


@contextmanager
def running_redis(folder: Path) -> Iterator[str]:
    """A private Redis on a unix socket in this folder; gives its URL."""
    path = f"{sys.prefix}/bin:{os.environ['PATH']}"  # `make test` may have put one into the venv
    program = shutil.which("redis-server", path=path) or shutil.which("valkey-server", path=path)
    if program is None:
        missing("redis-server")
    sock = folder / "redis.sock"
    command = [program, "--port", "0", "--unixsocket", str(sock), "--save", "", "--maxmemory-policy", "noeviction"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([*command, "--dir", str(folder)], stdout=log, stderr=log)
    try:
        until = time.monotonic() + 10
        while not sock.exists():
            assert process.poll() is None and time.monotonic() < until, (folder / "log").read_text()
            time.sleep(0.02)
        yield f"unix://{sock}"
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The private Redis that all tests share, one after the other."""
    with running_redis(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture
def redis_url(redis_server: str) -> Iterator[str]:
    """The private Redis, empty; afterwards no key may be without a time to live."""
    client = redis.Redis.from_url(redis_server)
    client.flushall()
    yield redis_server
    try:
        assert_every_key_expires(client.execute_command)
    finally:
        client.close()


def assert_every_key_expires(call: Callable[..., Any]) -> None:
    """The zsets are trimmed instead: a member is removed with its session."""
    # The type first: a service may empty the zset, and so remove it, between the two questions.
    assert [key for key in call("KEYS", "*") if call("TYPE", key) not in (b"zset", b"none") and call("TTL", key) == -1] == []


@pytest.fixture(scope="session")
def provider_process() -> Iterator[ProviderServer]:
    """The process behind `provider`."""
    with ProviderServer() as server:
        yield server


@pytest.fixture
def provider(provider_process: ProviderServer) -> ProviderServer:
    """OpenAI and Anthropic; it has forgotten earlier tests."""
    provider_process.reset()
    return provider_process


@pytest.fixture
def n8n() -> Iterator[Receiver]:
    """The receiver of callbacks."""
    with Receiver() as receiver:
        yield receiver


@pytest.fixture
def config() -> Config:
    """A DEV_MODE configuration on the embedded store."""
    return make_config()


def make_config(**environ: str | float) -> Config:
    """A DEV_MODE configuration, with these variables on top; a number goes in as it is, even below what the setting allows."""
    given = {name: value for name, value in environ.items() if isinstance(value, str)}
    seconds: dict[str, Any] = {name.lower(): value for name, value in environ.items() if not isinstance(value, str)}
    config = Config.from_env({"DEV_MODE": "true", "JWT_SECRET": SECRET, **given}, lambda path: Path(path).read_text())
    return dataclasses.replace(config, **seconds)


@pytest.fixture(params=["embedded", "redis"])
def store_url(request: pytest.FixtureRequest) -> str:
    """Both stores, one after the other."""
    return str(request.getfixturevalue("redis_url")) if request.param == "redis" else ""


@pytest.fixture
def make_store(store_url: str) -> Iterator[Callable[..., Store]]:
    """Builds stores of several workers over one and the same Redis."""
    stores: list[Store] = []

    def make(worker: str = "worker-1", **environ: str | float) -> Store:
        config = make_config(REDIS_URL=store_url, **environ)
        shared = stores[0].connections if stores and not store_url else None
        stores.append(Store(config, worker=worker, connections=shared))
        return stores[-1]

    yield make
    if stores and not store_url:
        assert_every_key_expires(stores[0].connections.call)
    for store in stores:
        store.close()


@pytest.fixture
def start_services(tmp_path: Path) -> Iterator[Callable[..., list[Service]]]:
    """Starts so many replicas with these variables, side by side; each ends with the test."""
    services: list[Service] = []

    def start(count: int, **environ: str) -> list[Service]:
        started = [Service(tmp_path / f"service-{len(services) + i}.log", environ) for i in range(count)]
        services.extend(started)
        for service in started:
            service.spawn()
        for service in started:
            service.wait()
        return started

    yield start
    for service in services:
        service.kill()  # how one ends in order has tests of its own


@pytest.fixture
def start_service(start_services: Callable[..., list[Service]]) -> Callable[..., Service]:
    """Starts gunicorn with these variables; each service ends with the test."""
    return lambda **environ: start_services(1, **environ)[0]


@pytest.fixture
def pair_on(start_services: Callable[..., list[Service]], provider: ProviderServer) -> Callable[[str], list[Service]]:
    """Starts two replicas over one Redis, with a short lease."""
    return lambda redis_url: start_services(2, REDIS_URL=redis_url, LEASE_SECONDS="1", **provider.openai_environ)


@pytest.fixture
def own_pair(pair_on: Callable[[str], list[Service]], redis_url: str) -> list[Service]:
    """Two replicas over the private Redis, which the test may hurt."""
    return pair_on(redis_url)


@pytest.fixture(scope="session")
def shared_pair(
    provider_process: ProviderServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[list[Service], str]]:
    """The processes behind `pair`, and their Redis: no other test may empty it."""
    with running_redis(tmp_path_factory.mktemp("redis-of-pair")) as url:
        environ = {"REDIS_URL": url, "LEASE_SECONDS": "1", **provider_process.openai_environ}
        folder = tmp_path_factory.mktemp("pair")
        services = [Service(folder / f"service-{i}.log", environ) for i in range(2)]
        try:
            for service in services:
                service.spawn()
            for service in services:
                service.wait()
            yield services, url
        finally:
            for service in services:
                service.kill()


@pytest.fixture
def pair(shared_pair: tuple[list[Service], str], provider: ProviderServer) -> Iterator[list[Service]]:
    """Two replicas like `own_pair`; shared by all tests that leave them and their Redis as they were."""
    services, url = shared_pair
    yield services
    with closing(redis.Redis.from_url(url)) as client:
        assert_every_key_expires(client.execute_command)


@pytest.fixture(scope="session")
def shared_service(provider_process: ProviderServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The process behind `service`."""
    environ = {**provider_process.environ, "MAX_VIEWERS_PER_SESSION": "1000"}
    service = Service(tmp_path_factory.mktemp("service") / "log", environ)
    service.start()
    yield service
    service.stop()


@pytest.fixture
def service(shared_service: Service, provider: ProviderServer) -> Service:
    """A gunicorn in DEV_MODE on the embedded store, with both providers; shared by all tests that need no other."""
    return shared_service


@pytest.fixture
def make_client() -> Iterator[MakeClient]:
    """Builds clients of apps with these variables on top of a DEV_MODE configuration; their loops end with the test."""
    clients: list[FlaskClient] = []

    def make(**environ: str) -> FlaskClient:
        clients.append(create_app(make_config(**environ)).test_client())
        return clients[-1]

    yield make
    for client in clients:
        parts_of(client).background.stop()


@pytest.fixture
def client(make_client: MakeClient) -> FlaskClient:
    """A client of an app in DEV_MODE, with the echo provider alone."""
    return make_client()


def parts_of(client: FlaskClient) -> Parts:
    """What the client's app works with."""
    parts = client.application.extensions["aistream"]
    assert isinstance(parts, Parts)
    return parts


@pytest.fixture
def session_id() -> str:
    """A fresh session's id."""
    return str(uuid.uuid4())


@pytest.fixture
def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.fixture(scope="session")
def chrome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    """One Chromium for all tests; what a test opens in it, it closes."""
    found = programs()
    if found is None:
        missing("chromium with chromedriver")
        return
    with chromium(*found, tmp_path_factory.mktemp("chromium")) as chrome:
        yield chrome


@pytest.fixture(autouse=True)
def no_greenlet_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test starts in this process has ended when the test has."""
    # Set up before the other fixtures, so that it is torn down after them; session fixtures may start what they keep.
    with nothing_left_running():
        yield


@contextmanager
def nothing_left_running() -> Iterator[None]:
    """Whatever is started within has ended two seconds later."""
    # What is older is frozen: it is not looked through again, which took a quarter of a second for each test.
    gc.collect()
    gc.freeze()
    yield
    until = time.monotonic() + 2
    while left := _greenlets():
        if time.monotonic() > until:
            pytest.fail(f"greenlets left behind: {left}")
        gevent.sleep(0.01)


def _greenlets() -> list[gevent.Greenlet]:  # type: ignore[type-arg]  # of whatever signature
    return [one for one in gc.get_objects() if isinstance(one, gevent.Greenlet) and not one.dead]
