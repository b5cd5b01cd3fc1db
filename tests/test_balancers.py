"""Behind nginx and HAProxy, as real processes with the configuration of `deploy/`: streams pass, and replicas come and go.

What a replica sees and does is told by replicas of the test's own where the service itself would not say it.
"""

import base64
import contextlib
import hashlib
import os
import re
import signal
import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import httpx
import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from bench.chaos.plan import Watching
from bench.chaos.viewer import Viewer
from tests.browser import Browser, Pages, chromium, programs
from tests.conftest import missing
from tests.neighbours.balancers import DEPLOY, Balancer, HAProxy, Nginx, program
from tests.neighbours.http1 import HOST, Connection, Request, Server
from tests.neighbours.provider import ProviderServer
from tests.neighbours.receiver import Receiver
from tests.neighbours.scenarios import words
from tests.service import Service, n8n_token, session_in, text_of, wait_until, watch

StartServices = Callable[..., list[Service]]
EVENT_STREAM = {"Accept": "text/event-stream"}
#: EventSource.CLOSED.
CLOSED = 2
#: An id as a balancer makes one.
MADE = re.compile(r"[0-9a-f]{32}|[0-9a-f-]{36}")
#: Of a JSON Web Token, and of the parameter that carries it.
SECRETS = re.compile(r"eyJ|access_token|secret-of-a-client")
Start = Callable[..., Any]


@pytest.fixture
def start_balancer(tmp_path: Path) -> Iterator[Start]:
    """Starts balancers, each before these replicas; no line that one prints has a token in it."""
    started: list[Balancer] = []

    def start(kind: type[Balancer], *replicas: Any, **options: Any) -> Balancer:
        if program(kind.name) is None:
            missing(kind.name)
        balancer = kind(tmp_path / f"balancer-{len(started)}", [replica.port for replica in replicas], **options)
        started.append(balancer)
        balancer.start()
        return balancer

    yield start
    for balancer in started:
        balancer.stop()
        assert SECRETS.search(balancer.log) is None, balancer.log


BOTH = pytest.mark.parametrize("kind", [Nginx, HAProxy], ids=lambda kind: kind.name)


class Replica:
    """A replica that notes what it is asked, and answers as the test says: `ready`, and for all the rest `answer`."""

    def __init__(self) -> None:
        self.asked: list[Request] = []
        self.ready = True
        self.answer: Callable[[Connection, Request], None] = lambda connection, _: connection.reply(200, [], b"served")
        self._server = Server(self._handle)

    def __enter__(self) -> "Replica":
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop()

    @property
    def port(self) -> int:
        """Where it listens."""
        return self._server.port

    def down(self) -> None:
        """Refuses connections."""
        self._server.suspend()

    def up(self) -> None:
        """Is there again after `down`."""
        self._server.start()

    def _handle(self, connection: Connection, request: Request) -> None:
        if request.target == "/health/ready":
            connection.reply(200 if self.ready else 503, [], b"")
        elif request.target == "/health":
            connection.reply(200, [], b"")
        else:
            self.asked.append(request)
            self.answer(connection, request)


@pytest.fixture
def replicas() -> Iterator[list[Replica]]:
    """Two of them."""
    with Replica() as one, Replica() as other:
        yield [one, other]


def through(balancer: Balancer, url: str) -> str:
    """A stream's address, as browsers see it."""
    return balancer.url + url[url.index("/stream/") :]


def asked(replicas: list[Replica]) -> list[Request]:
    """What has reached any of them."""
    return [request for replica in replicas for request in replica.asked]


def hang_up(connection: Connection, _request: Request) -> None:
    """Takes the request, and breaks the line without an answer."""
    connection.reset()


# Streams


@BOTH
def test_each_event_passes_before_the_next_is_said(
    kind: type[Balancer], pair: list[Service], provider: ProviderServer, start_balancer: Start
) -> None:
    # What nginx does by itself, and not because the service asks for it in a header.
    deaf = {r"proxy_buffering off;": "proxy_buffering off; proxy_ignore_headers X-Accel-Buffering;"} if kind is Nginx else None
    balancer = start_balancer(kind, *pair, changes=deaf)
    model = "gpt-test-long-n12-d150-i800"

    at_once, first_at_once = 0, 0
    for _ in range(5):
        with watch(through(balancer, pair[0].stream_url(model=model))) as viewer:
            next(viewer)
            first_at_once += provider.requests(model)[-1].deltas == 1
    with watch(through(balancer, pair[0].stream_url(model=model))) as viewer:
        text = ""
        for event in viewer:
            text += event.data
            at_once += provider.requests(model)[-1].deltas == text.count(" ")

    assert viewer.response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert "Content-Encoding" not in viewer.response.headers
    assert text == "".join(words(12)) + "[DONE]"
    # On a busy machine some are late by themselves; a balancer that waits for more, if only for a little, makes all of them late.
    assert first_at_once >= 2 and at_once >= 4


@pytest.fixture(scope="module")
def lively(provider_process: ProviderServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service whose heart beats five times a second."""
    environ = {"HEARTBEAT_SECONDS": "0.2", **provider_process.openai_environ}
    service = Service(tmp_path_factory.mktemp("lively") / "log", environ)
    service.start()
    yield service
    service.kill()


@BOTH
def test_heartbeats_keep_a_silent_stream_open_for_longer_than_the_balancers_patience(
    kind: type[Balancer], lively: Service, provider: ProviderServer, start_balancer: Start
) -> None:
    balancer = start_balancer(kind, lively, changes={"65s": "700ms"})
    url = lively.stream_url(model="gpt-test-hold-n3-k1-i801")

    with httpx.stream("GET", through(balancer, url), headers=EVENT_STREAM, timeout=5) as response:
        heard, chunks = b"", response.iter_raw()
        while heard.count(b":\n") < 9:  # nearly two seconds
            heard += next(chunks)
        provider.release()
        heard += b"".join(chunks)

    assert heard.endswith(b"data: [DONE]\n\n")


@BOTH
def test_a_viewer_that_leaves_is_noticed_behind_a_balancer(
    kind: type[Balancer], pair: list[Service], provider: ProviderServer, start_balancer: Start
) -> None:
    balancer = start_balancer(kind, *pair)
    url = pair[0].stream_url(model="gpt-test-hold-n4-k2-i802")

    with watch(through(balancer, url)) as viewer:
        next(viewer)

    wait_until(lambda: [line for one in pair for line in one.lines("viewer.left", session=session_in(url), gone=True)])
    provider.release()


@BOTH
def test_a_long_cursor_passes(kind: type[Balancer], pair: list[Service], start_balancer: Start) -> None:
    balancer = start_balancer(kind, *pair)
    url = pair[0].stream_url(model="echo", prompt="a b c")

    with watch(through(balancer, url), "x" * 16_000) as viewer:
        events = list(viewer)

    assert text_of(events) == "a b c"


@BOTH
def test_a_reload_of_the_balancer_cuts_no_stream(
    kind: type[Balancer], pair: list[Service], provider: ProviderServer, start_balancer: Start
) -> None:
    balancer = start_balancer(kind, *pair)
    url = pair[0].stream_url(model="gpt-test-hold-n4-k2-i803")

    with watch(through(balancer, url)) as viewer:
        seen = [next(viewer)]
        balancer.reload()
        wait_until(lambda: re.search(r"gracefully shutting down|Loading success|reconfiguring", balancer.log))
        gevent.sleep(0.5)
        provider.release()
        seen += list(viewer)

    assert text_of(seen) == "".join(words(4)) and seen[-1].data == "[DONE]"
    assert httpx.get(f"{balancer.url}/health").status_code == 200


# Replicas that come and go


@BOTH
@pytest.mark.timeout(240)
def test_a_rolling_restart_of_two_replicas_under_200_streams_loses_none(
    kind: type[Balancer],
    start_services: StartServices,
    redis_url: str,
    provider: ProviderServer,
    n8n: Receiver,
    start_balancer: Start,
) -> None:
    environ = {
        "REDIS_URL": redis_url,
        "DRAIN_SECONDS": "30",
        "HEARTBEAT_SECONDS": "1",
        "SILENCE_SECONDS": "600",
        **provider.openai_environ,
    }
    services = start_services(2, **environ)
    crowd = Crowd(start_balancer(kind, *services), n8n)

    crowd.begin_to_come(10)
    for service in services:
        crowd.hold(200)
        os.kill(service.pid, signal.SIGTERM)
        crowd.wait_for_further(30)  # which come while it drains
        provider.release()
        wait_until(lambda service=service: service.ended, timeout=60)  # type: ignore[misc]
        crowd.wait_for_further(10)  # which come while it is not there
        service.start()
    crowd.disperse()

    assert crowd.faults == []
    assert crowd.seen == crowd.said and len(crowd.said) > 450
    callbacks = {received.path: received.json for received in n8n.wait_for(len(crowd.said), timeout=15)}
    assert len(n8n.requests) == len(callbacks) == len(crowd.said)
    assert {path: told["answer"] for path, told in callbacks.items()} == crowd.said
    assert {told["status"] for told in callbacks.values()} == {"completed"}
    assert len(provider.requests(HELD[0])) == 400
    assert len(provider.requests(BRIEF[0])) == len(crowd.said) - 400
    assert [line["cut"] for service in services for line in service.lines("worker.drained")] == [0, 0]


#: A model that says three words and holds, and one that is soon done; and what they say in all.
HELD = ("gpt-test-hold-n6-k3", "".join(words(6)))
BRIEF = ("gpt-test-long-n8-d100", "".join(words(8)))


class Crowd:
    """Chats: each an init through the balancer, and its stream, watched to its end as an EventSource does."""

    def __init__(self, balancer: Balancer, n8n: Receiver) -> None:
        #: What was not as it must be.
        self.faults: list[Any] = []
        #: What each chat's model says in all, and what its viewer has seen at the end, by the path of its callback.
        self.said: dict[str, str] = {}
        self.seen: dict[str, str] = {}
        self._balancer = balancer
        self._n8n = n8n
        self._coming = True
        self._chats: list[Any] = []
        self._viewers: list[Viewer] = []
        self._client = httpx.Client(trust_env=False, timeout=30, limits=httpx.Limits())

    def begin_to_come(self, count: int) -> None:
        """From now on so many at a time come, see a brief answer, and come again."""

        def come_again_and_again() -> None:
            while self._coming:
                self._chat(*BRIEF)

        self._chats += [gevent.spawn(come_again_and_again) for _ in range(count)]

    def hold(self, count: int) -> None:
        """Lets so many begin an answer that holds; returns when each has its first three words."""
        self._viewers = []
        for _ in range(count):
            self._chats.append(gevent.spawn(self._chat, *HELD))
            gevent.sleep(0.005)
        begun = "".join(words(3))  # in as many events or in fewer: what arrives at once is one
        wait_until(lambda: sum(viewer.text == begun for viewer in self._viewers) == count or self.faults, timeout=60)

    def wait_for_further(self, count: int) -> None:
        """Returns when so many more have seen their answer to its end."""
        before = len(self.seen)
        wait_until(lambda: len(self.seen) >= before + count or self.faults, timeout=60)

    def disperse(self) -> None:
        """Lets everybody see their answer to its end."""
        self._coming = False
        gevent.joinall(self._chats, raise_error=True)
        self._client.close()

    def _chat(self, model: str, says: str) -> None:
        number = len(self.said)
        path = f"/{number}"
        self.said[path] = says
        body = {"n8nToken": n8n_token(), "resumeUrl": self._n8n.url(path), "prompt": "x", "model": model}
        answer = self._client.post(f"{self._balancer.url}/init-stream", json=body)
        if answer.status_code != 200:
            self.faults.append((number, answer.status_code, answer.text))
            return
        url = answer.json()["streamUrl"]
        viewer = Viewer(url[url.index("/stream/") :], number, Watching(0, False, (), None, path), self._balancer.port)
        if says == HELD[1]:
            self._viewers.append(viewer)
        viewer.watch(until=float("inf"))
        self.seen[path] = viewer.text
        if viewer.outcome != "done" or viewer.flaws or viewer.undefined:
            self.faults.append((number, viewer.outcome, viewer.flaws, viewer.undefined, viewer.notes))


# Replicas that are not there


@BOTH
def test_a_stream_is_asked_of_another_replica_where_one_refuses_or_breaks_the_line(
    kind: type[Balancer], replicas: list[Replica], start_balancer: Start
) -> None:
    balancer = start_balancer(kind, *replicas)
    wait_until(lambda: httpx.get(f"{balancer.url}/health").status_code == 200)
    breaking, serving = replicas
    breaking.answer = hang_up

    broken = [httpx.get(f"{balancer.url}/stream/1", headers=EVENT_STREAM) for _ in range(4)]
    breaking.down()
    refused = [httpx.get(f"{balancer.url}/stream/2", headers=EVENT_STREAM) for _ in range(4)]

    assert [(answer.status_code, answer.text) for answer in broken + refused] == [(200, "served")] * 8
    assert breaking.asked and len(serving.asked) >= 8


@BOTH
def test_an_init_is_asked_of_another_replica_only_where_none_has_seen_it(
    kind: type[Balancer], replicas: list[Replica], start_balancer: Start
) -> None:
    balancer = start_balancer(kind, *replicas)
    for replica in replicas:
        replica.answer = hang_up

    lost = httpx.post(f"{balancer.url}/init-stream", json={})
    seen = len(asked(replicas))
    for replica in replicas:
        replica.answer = lambda connection, _: connection.reply(200, [], b"served")
    replicas[0].down()
    refused = [httpx.post(f"{balancer.url}/init-stream", json={}) for _ in range(4)]

    assert lost.status_code in (502, 503) and lost.json()["code"] == "service_away" and lost.headers["Retry-After"] == "2"
    assert seen == 1
    assert [answer.status_code for answer in refused] == [200] * 4


@BOTH
def test_a_killed_replica_is_left_alone(kind: type[Balancer], replicas: list[Replica], start_balancer: Start) -> None:
    balancer = start_balancer(kind, *replicas)
    replicas[0].down()
    httpx.get(f"{balancer.url}/stream/1")
    wait_until(lambda: httpx.get(f"{balancer.url}/stream/1").status_code == 200)
    wait_until(lambda: kind is Nginx or "ready/replica1 is DOWN" in balancer.log)

    for _ in range(10):
        httpx.get(f"{balancer.url}/stream/2")

    tried = [line["replica"] for line in balancer.lines if line["path"] == "/stream/2"]
    assert all("," not in one and one != f"{HOST}:{replicas[0].port}" for one in tried[:5]), tried
    replicas[0].up()
    wait_until(lambda: (httpx.get(f"{balancer.url}/stream/3"), any(one.target == "/stream/3" for one in replicas[0].asked))[1])


@BOTH
def test_where_no_replica_answers_an_event_source_comes_back_and_others_are_told(
    kind: type[Balancer], replicas: list[Replica], start_balancer: Start
) -> None:
    balancer = start_balancer(kind, *replicas)
    for replica in replicas:
        replica.down()

    viewer = httpx.get(f"{balancer.url}/stream/1?access_token=eyJ", headers=EVENT_STREAM)
    others = [httpx.get(f"{balancer.url}/stream/1"), httpx.post(f"{balancer.url}/init-stream", json={})]

    assert (viewer.status_code, viewer.headers["Content-Type"]) == (200, "text/event-stream")
    assert viewer.headers["Access-Control-Allow-Origin"] == "*" and viewer.headers["Cache-Control"] == "no-store"
    with watch(f"{balancer.url}/stream/1") as stream:
        assert list(stream) == []
    for answer in others:
        assert answer.status_code in (502, 503) and answer.headers["Content-Type"] == "application/problem+json"
        assert (answer.json()["code"], answer.headers["Retry-After"]) == ("service_away", "2")


def test_haproxy_asks_who_is_alive_where_nobody_is_ready(replicas: list[Replica], start_balancer: Start) -> None:
    for replica in replicas:
        replica.ready = False
        replica.answer = lambda connection, _: connection.reply(200, [], b"held")
    balancer = start_balancer(HAProxy, *replicas)
    wait_until(lambda: balancer.log.count("Server ready/") >= 2)

    unready = httpx.get(f"{balancer.url}/stream/1", headers=EVENT_STREAM)
    replicas[0].ready = True
    wait_until(lambda: "Server ready/replica1 is UP" in balancer.log)
    before = len(replicas[0].asked)
    ready = [httpx.get(f"{balancer.url}/stream/2", headers=EVENT_STREAM) for _ in range(4)]

    assert unready.text == "held" and {answer.text for answer in ready} == {"held"}
    assert len(replicas[0].asked) - before == 4


def test_nginx_is_told_by_a_replica_that_drains_to_ask_another_and_asks_the_last_one_all_the_same(
    replicas: list[Replica], start_balancer: Start
) -> None:
    def drains(connection: Connection, request: Request) -> None:
        elsewhere = "x-retry-elsewhere" in request.headers
        connection.reply(503 if elsewhere else 200, [], b"go elsewhere" if elsewhere else b"served by the last one")

    balancer = start_balancer(Nginx, *replicas)
    replicas[0].answer = drains
    one_drains = [httpx.get(f"{balancer.url}/stream/1", headers=EVENT_STREAM).text for _ in range(6)]
    replicas[1].answer = drains
    both_drain = [httpx.get(f"{balancer.url}/stream/2", headers=EVENT_STREAM) for _ in range(3)]

    assert one_drains == ["served"] * 6
    assert [(answer.status_code, answer.text) for answer in both_drain] == [(200, "served by the last one")] * 3


# What passes, and what does not


@BOTH
def test_a_replica_hears_who_asks_from_the_balancer_and_not_from_the_client(
    kind: type[Balancer], replicas: list[Replica], start_balancer: Start
) -> None:
    balancer = start_balancer(kind, *replicas)
    forged = {"X-Forwarded-For": "203.0.113.7", "Forwarded": "for=203.0.113.7", "X-Forwarded-Proto": "gopher"}

    httpx.get(f"{balancer.url}/health/x", headers=forged)

    (request,) = asked(replicas)
    assert (request.headers["x-forwarded-for"], request.headers["x-forwarded-proto"]) == (HOST, "http")
    assert "203.0.113.7" not in str(request.headers)


@BOTH
def test_a_request_id_is_kept_or_made(kind: type[Balancer], replicas: list[Replica], start_balancer: Start) -> None:
    balancer = start_balancer(kind, *replicas)

    for given in ("trace-4711", "no; such id", "x" * 129, None):
        httpx.get(f"{balancer.url}/stream/1", headers={"X-Request-ID": given} if given else {})

    ids = [request.headers["x-request-id"] for request in sorted(asked(replicas), key=lambda one: one.headers["x-request-id"])]
    made = [one for one in ids if one != "trace-4711"]
    assert len(made) == len(set(made)) == 3 and all(MADE.fullmatch(one) for one in made)
    wait_until(lambda: len(balancer.lines) == 4)
    assert sorted(line["request_id"] for line in balancer.lines) == sorted(ids)


@BOTH
def test_no_query_string_is_logged_whatever_becomes_of_the_request(
    kind: type[Balancer], replicas: list[Replica], start_balancer: Start
) -> None:
    balancer = start_balancer(kind, *replicas)
    query = "access_token=eyJsecret-of-a-client"

    httpx.get(f"{balancer.url}/stream/1?{query}", headers={"Referer": f"http://page/?{query}"})
    httpx.get(f"{balancer.url}/metrics?{query}")
    replicas[0].answer = replicas[1].answer = hang_up
    httpx.get(f"{balancer.url}/stream/2?{query}")
    for replica in replicas:
        replica.down()
    httpx.get(f"{balancer.url}/stream/3?{query}")
    for line in (f"GET /stream/4?{query}", f"GET /stream/5?{query} HTTP/1.1\r\nHost: x\r\nno header"):
        raw(balancer, line.encode() + b"\r\n\r\n")

    wait_until(lambda: {"/stream/1", "/metrics", "/stream/2", "/stream/3"} <= {line["path"] for line in balancer.lines})
    assert SECRETS.search(balancer.log) is None


@BOTH
def test_the_metrics_are_not_public_however_they_are_spelled(
    kind: type[Balancer], replicas: list[Replica], start_balancer: Start
) -> None:
    balancer = start_balancer(kind, *replicas)
    spellings = ("/metrics", "/metrics/", "//metrics", "/%6detrics", "/metrics?x=1", "/metric%73/", "http://x/metrics")

    answers = [raw(balancer, f"GET {one} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()) for one in spellings]

    assert [answer[9:12] for answer in answers] == [b"404"] * len(spellings)
    assert asked(replicas) == []


@BOTH
def test_a_body_may_be_as_large_as_the_service_takes_and_no_larger(
    kind: type[Balancer], replicas: list[Replica], start_balancer: Start
) -> None:
    balancer = start_balancer(kind, *replicas)

    largest = httpx.post(f"{balancer.url}/init-stream", content=b"x" * 262_144)
    larger = httpx.post(f"{balancer.url}/init-stream", content=b"x" * 262_145)

    assert largest.status_code == 200 and [len(request.body) for request in asked(replicas)] == [262_144]
    assert (larger.status_code, larger.json()["code"]) == (413, "body_too_large")


@BOTH
@pytest.mark.parametrize(
    "part", ["GET /stream/1 HTTP/1.1\r\nX", "POST /init-stream HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{"]
)
def test_a_request_that_does_not_come_to_its_end_is_cut_off_and_reaches_no_replica(
    kind: type[Balancer], replicas: list[Replica], start_balancer: Start, part: str
) -> None:
    patient = ("client_header_timeout", "client_body_timeout") if kind is Nginx else ("timeout http-request",)
    balancer = start_balancer(kind, *replicas, changes={f"{name} 10s": f"{name} 1s" for name in patient})

    answer = raw(balancer, part.encode())

    assert answer == b"" or answer[9:12] == b"408"
    assert asked(replicas) == []


def raw(balancer: Balancer, request: bytes) -> bytes:
    """What comes back for these bytes, until the balancer closes."""
    answer = b""
    with socket.create_connection((HOST, balancer.port), timeout=10) as sock:
        sock.sendall(request)
        with contextlib.suppress(ConnectionError):
            while data := sock.recv(65_536):
                answer += data
    return answer


# TLS


class Certificates:
    """A folder with the certificate and key of `localhost`, by a CA of the test's own, as certbot leaves them."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self._ca = trustme.CA()
        self._key = b""
        self.renew()

    def renew(self) -> None:
        """A new certificate with a new key."""
        issued = self._ca.issue_cert("localhost", HOST)
        (self.folder / "fullchain.pem").write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
        (self.folder / "privkey.pem").write_bytes(issued.private_key_pem.bytes())
        self.certificate = x509.load_pem_x509_certificate(issued.cert_chain_pems[0].bytes())

    @property
    def key_hash(self) -> str:
        """What Chromium is told to trust."""
        key = self.certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        return base64.b64encode(hashlib.sha256(key).digest()).decode()

    def shake_hands(self, balancer: Nginx, version: ssl.TLSVersion | None = None) -> ssl.SSLSocket:
        """A connection as a client makes it that trusts this CA and speaks HTTP/2; `version`: and no other TLS."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._ca.configure_trust(context)
        context.set_alpn_protocols(["h2", "http/1.1"])
        if version is not None:
            context.set_ciphers("DEFAULT:@SECLEVEL=0")  # old versions need it, or the client itself refuses them
            context.minimum_version = context.maximum_version = version
        sock = socket.create_connection((HOST, balancer.tls_port), timeout=10)
        return context.wrap_socket(sock, server_hostname="localhost")


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    """Of this test."""
    return Certificates(tmp_path / "certs")


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_http_2_is_spoken_over_tls_1_2_and_1_3(
    replicas: list[Replica], certificates: Certificates, start_balancer: Start, version: ssl.TLSVersion
) -> None:
    balancer = start_balancer(Nginx, *replicas, certs=certificates.folder)

    with certificates.shake_hands(balancer, version) as sock:
        spoken, protocol = sock.version(), sock.selected_alpn_protocol()

    assert (spoken, protocol) == (version.name.replace("_", "."), "h2")


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1 is deprecated")
def test_tls_1_1_is_refused(replicas: list[Replica], certificates: Certificates, start_balancer: Start) -> None:
    balancer = start_balancer(Nginx, *replicas, certs=certificates.folder)

    with pytest.raises(ssl.SSLError) as refused:
        certificates.shake_hands(balancer, ssl.TLSVersion.TLSv1_1)

    assert refused.value.reason == "TLSV1_ALERT_PROTOCOL_VERSION"


def test_https_says_that_it_is_there_to_stay_and_tells_the_service_so(
    replicas: list[Replica], certificates: Certificates, start_balancer: Start
) -> None:
    balancer = start_balancer(Nginx, *replicas, certs=certificates.folder)

    answers = [httpx.get(f"{balancer.tls_url}/{path}", verify=False) for path in ("stream/1", "metrics")]

    assert [answer.status_code for answer in answers] == [200, 404]
    assert [answer.headers["Strict-Transport-Security"] for answer in answers] == ["max-age=63072000"] * 2
    assert asked(replicas)[0].headers["x-forwarded-proto"] == "https"


def test_plain_http_leads_to_https_but_for_what_a_certificate_authority_asks(
    replicas: list[Replica], certificates: Certificates, start_balancer: Start
) -> None:
    balancer = start_balancer(Nginx, *replicas, certs=certificates.folder)
    challenge = balancer.acme / ".well-known" / "acme-challenge" / "token"
    challenge.parent.mkdir(parents=True)
    challenge.write_text("as the authority wants it")

    moved = httpx.post(f"http://localhost:{balancer.port}/init-stream?a=b%20c")
    proof = httpx.get(f"http://localhost:{balancer.port}/.well-known/acme-challenge/token")

    assert (moved.status_code, moved.headers["Location"]) == (308, "https://localhost/init-stream?a=b%20c")
    assert (proof.status_code, proof.text) == (200, "as the authority wants it")
    assert asked(replicas) == []


def test_a_new_certificate_is_served_after_a_reload_and_a_live_stream_goes_on(
    pair: list[Service], provider: ProviderServer, certificates: Certificates, start_balancer: Start
) -> None:
    balancer = start_balancer(Nginx, *pair, certs=certificates.folder)
    url = pair[0].stream_url(model="gpt-test-hold-n4-k2-i804")

    def served() -> bytes | None:
        with certificates.shake_hands(balancer) as sock:
            return sock.getpeercert(binary_form=True)

    with watch(balancer.tls_url + url[url.index("/stream/") :]) as viewer:
        seen, before = [next(viewer)], served()
        certificates.renew()
        balancer.reload()
        wait_until(lambda: served() == certificates.certificate.public_bytes(Encoding.DER))
        provider.release()
        seen += list(viewer)

    assert before != certificates.certificate.public_bytes(Encoding.DER)
    assert text_of(seen) == "".join(words(4)) and seen[-1].data == "[DONE]"


def test_over_http_2_a_page_watches_ten_streams_where_http_1_1_allows_six(
    pair: list[Service], provider: ProviderServer, certificates: Certificates, start_balancer: Start, tmp_path: Path
) -> None:
    found = programs()
    if found is None:
        missing("chromium with chromedriver")
    balancer = start_balancer(Nginx, *pair, certs=certificates.folder)
    model = "gpt-test-hold-n3-k1-i805"
    urls = [pair[0].stream_url(model=model) for _ in range(20)]
    paths = [url[url.index("/stream/") :] for url in urls]
    open_all = """(globalThis.sources = args[0].map((url) => {
        const source = new EventSource(url);
        source.text = "";
        source.onmessage = ({ data }) => data === "[DONE]" ? source.close() : source.text += data;
        return source;
    })).length"""
    heard = "sources.filter((source) => source.text.startsWith('word1')).length"

    flag = f"--ignore-certificate-errors-spki-list={certificates.key_hash}"
    with chromium(*found, tmp_path, flag) as chrome, Pages() as pages:
        browser = Browser(chrome)
        browser.open(pages.url("reader.html"))
        browser.value(open_all, [balancer.tls_url + path for path in paths[:10]])
        browser.wait_for(f"{heard} === 10")
        provider.wait_for_open_streams(10)
        provider.release()
        browser.wait_for(f"sources.every((source) => source.readyState === {CLOSED})")
        over_http_2 = browser.value("sources.map((source) => source.text)")
        browser.value(open_all, [pair[0].url + path for path in paths[10:]])
        browser.wait_for(f"{heard} === 6")
        gevent.sleep(0.5)
        over_http_1_1 = browser.value(heard)
        provider.release()
        complaints = browser.complaints

    assert over_http_2 == ["".join(words(3))] * 10
    assert over_http_1_1 == 6
    assert [line["protocol"] for line in balancer.lines if line["path"].startswith("/stream/")] == ["HTTP/2.0"] * 10
    assert complaints == []


# The files themselves


def test_haproxy_finds_nothing_wrong_with_its_file_as_it_is() -> None:
    if (found := program("haproxy")) is None:
        missing("haproxy")

    checked = subprocess.run([found, "-c", "-f", str(DEPLOY / "haproxy" / "haproxy.cfg")], capture_output=True, text=True)

    assert (checked.returncode, checked.stderr) == (0, ""), checked.stderr
