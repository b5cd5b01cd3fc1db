"""Our transport under the SDKs, and httpx2's own, in whose place it stands: against real servers, the two come to the same."""

import contextlib
import gzip
import itertools
import socket
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import anthropic
import gevent
import httpcore2
import httpx2
import openai
import pytest
import trustme
from hypothesis import given, settings
from hypothesis import strategies as st

from aistream.providers import Providers, http1, transport, wire
from aistream.providers.transport import BODY, Body, Transport
from tests.conftest import make_config
from tests.neighbours.http1 import ClientGone, Connection, Request, Server
from tests.service import wait_until

EXAMPLES = settings(deadline=None, max_examples=60)
#: What each answer here says.
TEXT = b"Hello, this is the test provider."
CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
ONE_CHUNK = CHUNKED + b"%x\r\n%s\r\n0\r\n\r\n" % (len(TEXT), TEXT)
SIZED = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(TEXT), TEXT)
UNTIL_CLOSE = b"HTTP/1.1 200 OK\r\nX-A: b\r\n\r\n" + TEXT
CONTEXT = ssl.create_default_context()
#: Seconds between two pieces: the reader sees two reads.
PAUSE = 0.0005
MakeClient = Callable[..., httpx2.Client]


class Peer:
    """A server that answers every request with the pieces that it was last told, one send each, and then does `then`.

    `then`: keep, close or reset the connection; hold it, and say no more, until the client goes. `ports` and `requests` are those
    of all requests; `open` counts the connections. `at`: what it answers at some targets instead.
    """

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self._pieces: tuple[bytes, ...] = (SIZED,)
        self._then = "keep"
        self.at: dict[str, bytes] = {}
        self.ports: list[int] = []
        self.requests: list[Request] = []
        self.server = Server(self._handle, tls)

    def told(self, *pieces: bytes, then: str = "keep") -> None:
        """From now on it answers so."""
        self._pieces, self._then = pieces, then

    def _handle(self, connection: Connection, request: Request) -> None:
        then = self._then
        self.ports.append(connection.client_port)
        self.requests.append(request)
        for piece in [self.at[request.target]] if request.target in self.at else self._pieces:
            connection.send(piece)
            gevent.sleep(PAUSE)
        if then == "hold":
            connection.pause(60)
        elif then != "keep":
            connection.close() if then == "close" else connection.reset()
            raise ClientGone

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.server.port}"

    @property
    def open(self) -> int:
        """How many connections it has."""
        return sum(thread.is_alive() for thread, connection in self.server._threads.items() if connection is not None)


@pytest.fixture
def peer() -> Iterator[Peer]:
    """A server to ask."""
    one = Peer()
    with one.server:
        yield one


@pytest.fixture
def other() -> Iterator[Peer]:
    """Another server."""
    one = Peer()
    with one.server:
        yield one


@pytest.fixture
def make_client() -> Iterator[MakeClient]:
    """Builds clients on our transport, which end with the test; arguments are the transport's, but for `timeout`."""
    with contextlib.ExitStack() as clients:

        def make(context: ssl.SSLContext | None = None, timeout: Any = None, **limits: Any) -> httpx2.Client:
            ours = Transport(context or CONTEXT, **limits)
            return clients.enter_context(httpx2.Client(transport=ours, timeout=httpx2.Timeout(timeout), trust_env=False))

        yield make


@pytest.fixture
def client(make_client: MakeClient) -> httpx2.Client:
    """A client on our transport."""
    return make_client()


@contextlib.contextmanager
def both(**options: Any) -> Iterator[tuple[httpx2.Client, httpx2.Client]]:
    """A client on our transport and one on httpx2's own."""
    with (
        httpx2.Client(transport=Transport(CONTEXT), trust_env=False, **options) as ours,
        httpx2.Client(verify=CONTEXT, trust_env=False, **options) as theirs,
    ):
        yield ours, theirs


class Got(NamedTuple):
    """What comes of a request. `error`: the class of what was raised, and None otherwise."""

    error: type[Exception] | None
    head: Any = None
    body: bytes = b""


def got(client: httpx2.Client, url: str, method: str = "GET", **options: Any) -> Got:
    """What comes of this request."""
    head, body = None, b""
    try:
        with client.stream(method, url, **options) as response:
            head = response.status_code, response.headers.raw, response.http_version, response.reason_phrase
            for piece in response.iter_raw():
                body += piece
    except httpx2.HTTPError as error:
        return Got(type(error), head, body)
    return Got(None, head, body)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    """The pieces between these places."""
    edges = [0, *sorted({place for place in places if 0 < place < len(data)}), len(data)]
    return [data[start:stop] for start, stop in itertools.pairwise(edges)]


# ---- The same as httpx2's own, from any server ----

LINES = st.lists(
    st.sampled_from(
        [
            b"X-Empty:",
            b"X-Spaced: \t a  b \t",
            b"x-folded: a\r\n \t b\r\n  c",
            b"Connection: close",
            b"connection: x, Close",
            b"Set-Cookie: a=b",
            b"Set-Cookie: c=\xe4",
            b"Content-Encoding: identity",
        ]
    ),
    max_size=4,
)
EXTENSIONS = st.sampled_from([b"", b"", b";a", b';a="b;c"', b"  ", b" ;x=y", b"; x=y "])
TRAILERS = st.sampled_from([b"", b"", b"X-Sum: 1\r\n", b"X-Sum: 1\r\nX-Two:\r\n", b"no trailer\r\n"])


@st.composite
def bodies(draw: st.DrawFn) -> tuple[list[bytes], bytes]:
    """Lines that frame a body, and the body on the wire."""
    chunks = draw(st.lists(st.binary(min_size=1, max_size=40), max_size=6))
    body = b"".join(chunks)
    chunked = b"".join(b"%x%s\r\n%s\r\n" % (len(chunk), draw(EXTENSIONS), chunk) for chunk in chunks)
    chunked += b"0%s\r\n%s\r\n" % (draw(EXTENSIONS), draw(TRAILERS))
    length = b"Content-Length: %d" % len(body)
    return draw(
        st.sampled_from(
            [
                ([b"Transfer-Encoding: chunked"], chunked),
                ([b"transfer-encoding: CHUNKED", length], chunked),
                ([length], body),
                ([length, length], body),
                ([b"Content-Length: %d, %d" % (len(body), len(body))], body),
                ([length], body + b"and more"),
                ([b"Content-Length: %d" % (len(body) + 1)], body),
                ([], body),
            ]
        )
    )


@st.composite
def answers(draw: st.DrawFn) -> bytes:
    """An answer of a server on the wire."""
    interim = [b"", b"", b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 Early Hints\r\nLink: <a>\r\n\r\nHTTP/1.1 102 \r\n\r\n"]
    status = [
        b"HTTP/1.1 200 OK",
        b"HTTP/1.1 200",
        b"HTTP/1.0 200 OK",
        b"HTTP/1.1 204 No",
        b"HTTP/1.1 304 No",
        b"HTTP/1.1 529 \xe4 b",
    ]
    framing, body = draw(bodies())
    lines = draw(st.permutations([*draw(LINES), *framing]))
    end = draw(st.sampled_from([b"\r\n", b"\r\n", b"\n"]))
    head = end.join([draw(st.sampled_from(status)), *lines, b"", b""])
    return draw(st.sampled_from(interim)) + head + body


@EXAMPLES
@given(answers(), st.lists(st.integers(0, 400), max_size=6), st.sampled_from(["GET", "GET", "HEAD"]))
def test_any_answer_cut_anywhere_is_read_as_httpx2_reads_it(answer: bytes, places: list[int], method: str) -> None:
    peer = Peer()
    with peer.server, both() as (ours, theirs):
        peer.told(*cut(answer, places), then="close")

        assert got(ours, peer.url, method) == got(theirs, peer.url, method)
    assert peer.open == 0


@pytest.mark.parametrize("answer", [ONE_CHUNK, CHUNKED + b"1;a\r\nH\r\n2\r\nel\r\n0\r\nX-Sum: 1\r\n\r\n", SIZED, UNTIL_CLOSE])
def test_an_answer_that_ends_early_anywhere_comes_to_what_it_does_with_httpx2(peer: Peer, answer: bytes) -> None:
    with both() as (ours, theirs):
        for place in range(len(answer)):
            peer.told(answer[:place], then="close")

            mine = got(ours, peer.url)

            assert mine == got(theirs, peer.url), place
            assert mine.error is httpx2.RemoteProtocolError or answer is UNTIL_CLOSE


@pytest.mark.parametrize(
    "answer",
    [
        b"\r\n",
        b"\nHTTP/1.1 200 OK\r\n\r\n",
        b"\x15\x03\x01\x00\x02\x02\x28",
        b"<html>\r\n\r\n",
        b"HTTP/1.1 20 OK\r\n\r\n",
        b"HTTP/1.1 099 OK\r\n\r\n",
        b"HTTP/1.1  200 OK\r\n\r\n",
        b"HTTP/2 200 OK\r\n\r\n",
        b"http/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 O\0K\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n folded: a\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nno header\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX : a\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n: a\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: a\rb\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: a\0b\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: +1\r\n\r\na",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1_0\r\n\r\n0123456789",
        b"HTTP/1.1 200 OK\r\nContent-Length:\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1, 2\r\n\r\nab",
        b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nContent-Length: 5\r\n\r\nHello",
        b"HTTP/1.1 200 OK\r\nContent-Length: 111111111111111111111\r\n\r\nHello",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 204 No\r\nTransfer-Encoding: gzip\r\n\r\n",
        *(
            CHUNKED + rest
            for rest in [
                b"5\r\nHello\r\n-1\r\n",
                b"5\r\nHello\r\n+5\r\nHello\r\n0\r\n\r\n",
                b"0x5\r\nHello\r\n0\r\n\r\n",
                b" 5\r\nHello\r\n0\r\n\r\n",
                b"\r\n5\r\nHello\r\n0\r\n\r\n",
                b"5\nHello\r\n0\r\n\r\n",
                b"5;\n\r\nHello\r\n0\r\n\r\n",
                b"000000000000000000005\r\nHello\r\n0\r\n\r\n",
                b"00000000000000000005\r\nHello\r\n0\r\n\r\n",
                b"5\r\nHelloworld\r\n0\r\n\r\n",
                b"5\r\nHello\n0\r\n\r\n",
                b"5\r\nHel\r\n0\r\n\r\n",
                b"6\r\nHello\r\n0\r\n\r\n",
                b"5\r\nHello\r\n0\r\nno trailer\r\n\r\n",
                b"5\r\nHello\r\n0\r\nX: \0\r\n\r\n",
                b"5\r\nHello\r\nevent: x\r\n\r\n",
                b"5\r\nHello\r\n0\r\n\nrest",
                b"5\r\nHello\r\n0\r\nX: y\n\nrest",
            ]
        ),
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 300_000,
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 60_000 + b"\r\nContent-Length: 1\r\n\r\na",
        CHUNKED + b"5;" + b"x" * 300_000,
        CHUNKED + b"0\r\nX: " + b"x" * 300_000,
    ],
    ids=lambda answer: ascii(answer[-60:].decode("latin-1")),
)
@pytest.mark.parametrize("then", ["close", "reset"])
def test_nonsense_comes_to_what_it_does_with_httpx2(peer: Peer, answer: bytes, then: str) -> None:
    middle = len(answer) // 2
    for pieces in ([answer], [answer[:middle], answer[middle:]], [answer[:-3], answer[-3:]]):
        peer.told(*pieces, then=then)

        with both() as (ours, theirs):
            assert got(ours, peer.url) == got(theirs, peer.url)


def fed(reader: http1.Reader, pieces: list[bytes]) -> tuple[bytes, str, bool]:
    """What a reader makes of these pieces: the body, the fault, and whether the connection is clean."""
    body = b""
    for piece in pieces:
        if not reader.ended:
            body += reader.feed(piece)
    return body, reader.fault, reader.clean


@pytest.mark.parametrize(
    "data",
    [
        b"5\r\nHello\r\n1;a=b\r\n!\r\n0\r\n\r\n",
        b"5\r\nHello\r\nA\r\n 123456789\r\n0\r\nX: y\r\nZ:\r\n\r\n",
        b"5\r\nHello\r\nx\r\n",
    ],
)
def test_a_chunked_body_in_any_two_or_single_bytes_is_the_same(data: bytes) -> None:
    whole = fed(http1.Chunked(), [data])

    assert whole[0].startswith(b"Hello")
    for place in range(1, len(data)):
        assert fed(http1.Chunked(), [data[:place], data[place:]]) == whole, place
    assert fed(http1.Chunked(), [data[i : i + 1] for i in range(len(data))]) == whole


# ---- What is sent ----


@contextlib.contextmanager
def listening(family: int = socket.AF_INET, host: str = "127.0.0.1", backlog: int = 16) -> Iterator[tuple[socket.socket, int]]:
    """A socket that listens, and its port."""
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.bind((host, 0))
        listener.listen(backlog)
        yield listener, listener.getsockname()[1]


def sent(client: httpx2.Client, end: bytes, method: str = "POST", **options: Any) -> bytes | str:
    """The bytes of a request, which end so, or the name of what was raised: httpx2 lets some of h11's exceptions through."""
    with listening() as (listener, port):

        def answer() -> bytes:
            with listener.accept()[0] as sock:
                data = b""
                while not data.endswith(end) and (more := sock.recv(65536)):
                    data += more
                sock.sendall(SIZED)
                return data.replace(b":%d\r\n" % port, b":PORT\r\n")

        server = gevent.spawn(answer)
        try:
            client.request(method, f"http://127.0.0.1:{port}/a%20b/?c=d%2Fe#f", **options)
            return server.get(timeout=5)
        except Exception as error:
            return type(error).__name__
        finally:
            server.kill()


@pytest.mark.parametrize(
    ("end", "options"),
    [
        (b"\r\n\r\n", {"method": "GET"}),
        (b"\r\n\r\n", {"method": "GET", "headers": {"X": "", "Host": "another"}}),
        (b'"END"', {"json": "END"}),
        (b"END", {"content": "x" * 3_000_000 + "END", "headers": [(b"A", b"\xe4"), (b"a", b"b c")]}),
        (b"0\r\n\r\n", {"content": iter([b"Hello"])}),
        (b"0\r\n\r\n", {"content": iter([])}),
        (b"END", {"content": iter([b"Hello", b"END"]), "headers": {"Content-Length": "8"}}),
        (b"END", {"content": iter([b"Hello"]), "headers": {"Content-Length": "8"}}),
        (b"END", {"content": "Hello", "headers": {"Content-Length": "4"}}),
        (b"END", {"headers": {"X": "a\r\nY: b"}}),
        (b"END", {"headers": {"X y": "a"}}),
        (b"END", {"headers": {"X": " a"}}),
        (b"END", {"headers": [("Host", "a"), ("Host", "b")]}),
        (b"END", {"content": iter([b"a"]), "headers": {"Transfer-Encoding": "gzip"}}),
        (b"END", {"method": "GET IT"}),
    ],
)
def test_a_request_is_sent_or_refused_byte_for_byte_as_by_httpx2(end: bytes, options: dict[str, Any]) -> None:
    requests = []
    contents = itertools.tee(options["content"]) if isinstance(options.get("content"), Iterator) else None
    with both(timeout=5) as clients:
        for number, client in enumerate(clients):
            body = {"content": contents[number]} if contents else {}
            requests.append(sent(client, end, **{**options, **body}))

    assert requests[0] == requests[1]


def test_a_body_of_unknown_length_is_sent_in_chunks(client: httpx2.Client) -> None:
    data = sent(client, b"0\r\n\r\n", content=iter([b"Hello", b", you"]))

    assert isinstance(data, bytes) and data.endswith(b"Transfer-Encoding: chunked\r\n\r\na\r\nHello, you\r\n0\r\n\r\n")


def test_a_server_that_answers_before_it_has_read_all_is_heard(client: httpx2.Client) -> None:
    with listening() as (listener, port):

        def refuse() -> None:
            with listener.accept()[0] as sock:
                sock.sendall(b"HTTP/1.1 413 Too Large\r\nConnection: close\r\nContent-Length: 2\r\n\r\nno")
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(65536):
                    pass

        server = gevent.spawn(refuse)
        response = client.post(f"http://127.0.0.1:{port}/", content=b"x" * 5_000_000)
        server.get(timeout=5)

    assert (response.status_code, response.text) == (413, "no")


# ---- As it arrives ----


def test_all_that_one_recv_brings_is_one_piece() -> None:
    reader = http1.Chunked()

    pieces = [reader.feed(data) for data in [b"1\r\na\r\n", b"1\r\nb\r\n1\r\nc\r\n2\r\nd", b"e\r", b"\n1\r\nf\r\n0\r\n\r\n"]]

    assert pieces == [b"a", b"bcd", b"e", b"f"]
    assert (reader.ended, reader.fault, reader.clean) == (True, "", True)


def test_what_has_arrived_is_given_while_the_rest_is_not_there(client: httpx2.Client, peer: Peer) -> None:
    peer.told(CHUNKED + b"1\r\na\r\n", b"1\r\nb\r\n2\r\nc", then="hold")

    seen = b""
    with client.stream("GET", peer.url) as response:
        body = response.extensions[BODY]
        for piece in body:
            seen += piece
            if seen == b"abc":
                break

    assert isinstance(body, Body) and seen == b"abc"
    wait_until(lambda: peer.open == 0)


# ---- Connections that are kept ----


def ask(client: httpx2.Client, peer: Peer, path: str = "/") -> bytes:
    """The body of an answer."""
    return client.get(peer.url + path).content


@pytest.mark.parametrize("answer", [ONE_CHUNK, SIZED, b"HTTP/1.1 204 No\r\n\r\n", b"HTTP/1.1 100 Continue\r\n\r\n" + SIZED])
def test_a_connection_whose_answer_was_read_to_its_end_takes_the_next_request(
    client: httpx2.Client, peer: Peer, answer: bytes
) -> None:
    peer.told(answer)

    for _ in range(3):
        ask(client, peer)

    assert len(peer.ports) == 3 and len(set(peer.ports)) == 1


@pytest.mark.parametrize(
    "answer",
    [
        ONE_CHUNK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1),
        SIZED.replace(b"HTTP/1.1", b"HTTP/1.0"),
        SIZED + b"HTTP/1.1 200 OK\r\n\r\n",
        ONE_CHUNK + b"more",
        b"HTTP/1.1 204 No\r\n\r\nmore",
    ],
)
def test_a_connection_that_is_at_its_end_or_out_of_step_is_closed(client: httpx2.Client, peer: Peer, answer: bytes) -> None:
    peer.told(answer)

    for _ in range(2):
        ask(client, peer)

    assert len(set(peer.ports)) == 2
    wait_until(lambda: peer.open == 0)


def test_a_request_that_says_so_is_its_connections_last(client: httpx2.Client, peer: Peer) -> None:
    client.get(peer.url, headers={"Connection": "close"})
    client.get(peer.url)

    assert len(set(peer.ports)) == 2


@pytest.mark.parametrize("then", ["close", "reset"])
def test_a_kept_connection_that_the_server_has_closed_meanwhile_is_not_used(client: httpx2.Client, peer: Peer, then: str) -> None:
    peer.told(SIZED, then=then)
    ask(client, peer)
    wait_until(lambda: peer.open == 0)

    assert ask(client, peer) == TEXT
    assert len(set(peer.ports)) == 2


def test_a_kept_connection_on_which_the_server_says_something_unasked_is_not_used(client: httpx2.Client, peer: Peer) -> None:
    peer.told(SIZED, b"HTTP/1.1 408 Too slow\r\n\r\n")
    ask(client, peer)
    gevent.sleep(10 * PAUSE)

    assert ask(client, peer) == TEXT
    assert len(set(peer.ports)) == 2


def test_a_body_that_is_left_closes_its_connection(client: httpx2.Client, peer: Peer) -> None:
    peer.told(CHUNKED + b"5\r\nHello\r\n", then="hold")

    with client.stream("GET", peer.url) as response:
        body = response.extensions[BODY]
        assert next(iter(body)) == b"Hello"
        wait_until(lambda: peer.open == 1)

    wait_until(lambda: peer.open == 0)
    with pytest.raises(httpx2.StreamClosed):
        list(body)


def test_kept_connections_are_closed_in_time_without_any_request(make_client: MakeClient, peer: Peer) -> None:
    client = make_client(idle_seconds=0.05)
    for _ in range(2):
        peer.told(SIZED, then="keep")
        ask(client, peer)
        wait_until(lambda: peer.open == 0)

    assert len(set(peer.ports)) == 2


def at_once(client: httpx2.Client, peer: Peer, count: int) -> None:
    """So many requests at the same time, each on a connection of its own."""
    peer.told(CHUNKED + b"5\r\nHello\r\n", b"0\r\n\r\n")
    with contextlib.ExitStack() as stack:
        for response in [stack.enter_context(client.stream("GET", peer.url)) for _ in range(count)]:
            response.read()
            gevent.sleep(PAUSE)


def test_no_more_connections_wait_than_may_and_the_newest_are_used_first(make_client: MakeClient, peer: Peer) -> None:
    client = make_client(idle=2)
    at_once(client, peer, 4)
    ports = peer.ports[:]

    wait_until(lambda: peer.open == 2)
    ask(client, peer)

    assert peer.ports[-1] == ports[-1]


def test_each_of_several_kept_connections_has_its_own_time(make_client: MakeClient, peer: Peer) -> None:
    at_once(make_client(idle_seconds=0.05), peer, 4)

    assert len(set(peer.ports)) == 4
    wait_until(lambda: peer.open == 0)


def test_a_closed_transport_has_closed_what_waited_and_closes_what_is_in_use_at_its_end(
    client: httpx2.Client, peer: Peer, other: Peer
) -> None:
    ask(client, other)
    with client.stream("GET", peer.url) as response:
        client.close()
        wait_until(lambda: other.open == 0)

        assert response.read() == TEXT
    wait_until(lambda: peer.open == 0)


def test_who_finds_no_place_waits_in_turn_and_in_vain_for_no_longer_than_it_may(make_client: MakeClient, peer: Peer) -> None:
    client = make_client(connections=1, timeout=5)
    with client.stream("GET", peer.url):
        waiting = [gevent.spawn(ask, client, peer, f"/{number}") for number in range(4)]
        gevent.sleep(0)
        waiting[1].kill()
        with pytest.raises(httpx2.PoolTimeout):
            client.get(peer.url, timeout=httpx2.Timeout(5, pool=0.01))
    gevent.joinall(waiting)

    assert [greenlet.value for greenlet in waiting if greenlet is not waiting[1]] == [TEXT] * 3
    assert [request.target for request in peer.requests] == ["/", "/0", "/2", "/3"]
    assert ask(client, peer) == TEXT


def test_a_place_that_is_given_to_one_who_is_stopped_in_that_moment_goes_to_the_next(make_client: MakeClient, peer: Peer) -> None:
    client = make_client(connections=1, timeout=5)
    with client.stream("GET", peer.url) as response:
        waiting = [gevent.spawn(ask, client, peer) for _ in range(2)]
        gevent.sleep(0)
        response.read()
        waiting[0].kill(block=False)
    gevent.joinall(waiting)

    assert waiting[1].value == TEXT


def test_a_waiting_connection_of_another_server_makes_room(make_client: MakeClient, peer: Peer, other: Peer) -> None:
    client = make_client(connections=1, timeout=1)

    assert [ask(client, one) for one in (peer, other, peer, other)] == [TEXT] * 4
    with client.stream("GET", peer.url) as response:
        waiting = gevent.spawn(ask, client, other)
        gevent.sleep(0)
        response.read()
    assert waiting.get() == TEXT
    wait_until(lambda: (peer.open, other.open) == (0, 1))


def test_what_fails_gives_its_place_back(make_client: MakeClient, peer: Peer, free_port: int) -> None:
    client = make_client(connections=1, timeout=httpx2.Timeout(5, connect=0.1, pool=0.1))
    for _ in range(2):
        with pytest.raises(httpx2.ConnectError):
            client.get(f"http://127.0.0.1:{free_port}/")
        with pytest.raises(httpx2.ConnectTimeout):
            client.get(peer.url.replace("http:", "https:"))
        peer.told(b"nonsense\r\n\r\n")
        with pytest.raises(httpx2.RemoteProtocolError):
            client.get(peer.url)
        peer.told(SIZED)
        assert ask(client, peer) == TEXT


# ---- What may happen while a greenlet waits ----


class Thrown(BaseException):
    """Something that nobody knows."""


@pytest.mark.parametrize("answer", [b"HTTP/1.1 200", CHUNKED + b"5\r\nHello\r\n"], ids=["head", "body"])
def test_what_is_thrown_into_a_waiting_greenlet_goes_on_and_closes_the_connection(
    client: httpx2.Client, peer: Peer, answer: bytes
) -> None:
    peer.told(answer, then="hold")

    def read() -> BaseException | None:
        try:
            client.get(peer.url)
        except BaseException as error:
            return error
        return None

    for thrown in (Thrown(), gevent.Timeout(), gevent.GreenletExit()):
        reader = gevent.spawn(read)
        wait_until(lambda: len(peer.requests) and peer.open == 1)
        gevent.sleep(10 * PAUSE)
        reader.kill(thrown)
        assert reader.value is thrown
        wait_until(lambda: peer.open == 0)
    peer.told(SIZED)
    assert ask(client, peer) == TEXT


def test_a_timeout_around_a_request_is_no_error_of_the_transport(client: httpx2.Client, peer: Peer) -> None:
    peer.told(b"", then="hold")

    with gevent.Timeout(0.05) as over, pytest.raises(gevent.Timeout) as caught:
        client.get(peer.url)

    assert caught.value is over
    wait_until(lambda: peer.open == 0)


def test_a_body_that_another_greenlet_closes_is_a_read_error(client: httpx2.Client, peer: Peer) -> None:
    peer.told(CHUNKED + b"5\r\nHello\r\n", then="hold")
    request = client.build_request("GET", peer.url)
    response = client.send(request, stream=True)
    pieces: list[bytes] = []
    reader = gevent.spawn(lambda: got_of(response, pieces))
    wait_until(lambda: pieces == [b"Hello"])

    response.close()

    assert reader.get(timeout=5) is httpx2.ReadError
    wait_until(lambda: peer.open == 0)


def got_of(response: httpx2.Response, pieces: list[bytes]) -> type[Exception] | None:
    """Reads a body into `pieces`; what was raised."""
    try:
        pieces.extend(response.extensions[BODY])
    except httpx2.HTTPError as error:
        return type(error)
    return None


# ---- Times, and what cannot be reached ----


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\n", CHUNKED, CHUNKED + b"5\r\nHello\r\n"])
def test_silence_is_a_read_timeout(peer: Peer, answer: bytes) -> None:
    peer.told(answer, then="hold")

    with both(timeout=httpx2.Timeout(None, read=0.05)) as (ours, theirs):
        assert got(ours, peer.url) == got(theirs, peer.url)
        assert got(ours, peer.url).error is httpx2.ReadTimeout
    wait_until(lambda: peer.open == 0)


def test_without_a_timeout_for_reading_no_timer_is_started(
    client: httpx2.Client, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []
    start = gevent.Timeout.start
    monkeypatch.setattr(gevent.Timeout, "start", lambda timer: started.append(timer) or start(timer))
    peer.told(CHUNKED, *[b"1\r\na\r\n"] * 5, b"0\r\n\r\n")

    assert ask(client, peer) == b"aaaaa"
    assert started == []


def test_a_connection_that_nobody_accepts_is_a_connect_timeout() -> None:
    with listening(backlog=0) as (_, port), contextlib.ExitStack() as stack:
        for _ in range(3):  # the queue is full then, and the kernel leaves further ones without an answer
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(("127.0.0.1", port))

        with both(timeout=httpx2.Timeout(None, connect=0.1)) as clients:
            assert [got(client, f"http://127.0.0.1:{port}/").error for client in clients] == [httpx2.ConnectTimeout] * 2


def test_who_is_stopped_in_a_handshake_leaves_no_connection(client: httpx2.Client) -> None:
    with listening() as (listener, port):
        asking = gevent.spawn(got, client, f"https://127.0.0.1:{port}/")
        with listener.accept()[0] as sock:
            assert sock.recv(65536)

            asking.kill()

            assert sock.recv(65536) == b""


def test_a_handshake_that_nobody_answers_is_a_connect_timeout() -> None:
    with listening() as (_, port), both(timeout=httpx2.Timeout(None, connect=0.1)) as clients:
        assert [got(client, f"https://127.0.0.1:{port}/").error for client in clients] == [httpx2.ConnectTimeout] * 2


def test_a_server_that_takes_nothing_is_a_write_timeout() -> None:
    with listening() as (_, port), both(timeout=httpx2.Timeout(None, write=0.1)) as clients:
        errors = [got(one, f"http://127.0.0.1:{port}/", "POST", content=b"x" * 20_000_000).error for one in clients]

    assert errors == [httpx2.WriteTimeout] * 2


@pytest.mark.parametrize("answer", [b"", SIZED[:-5], ONE_CHUNK[:-20]])
def test_a_reset_is_what_it_is_with_httpx2(peer: Peer, answer: bytes) -> None:
    peer.told(answer, then="reset")

    with both() as (ours, theirs):
        assert got(ours, peer.url) == got(theirs, peer.url)
        assert got(ours, peer.url).error is httpx2.ReadError


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("ftp://127.0.0.1/", httpx2.UnsupportedProtocol),
        ("/nowhere", httpx2.UnsupportedProtocol),
        ("http://name.invalid/", httpx2.ConnectError),
        ("http://127.0.0.1:9/", httpx2.ConnectError),
        ("http://[::1]:9/", httpx2.ConnectError),
    ],
)
def test_what_cannot_be_reached_is_what_it_is_with_httpx2(url: str, error: type[Exception]) -> None:
    with both() as clients:
        assert [got(client, url).error for client in clients] == [error] * 2


def test_a_number_is_asked_of_nobody_and_a_name_of_the_resolver(
    client: httpx2.Client, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    resolver = gevent.get_hub().resolver
    getaddrinfo = resolver.getaddrinfo
    monkeypatch.setattr(resolver, "getaddrinfo", lambda *args, **kwargs: asked.append(args[0]) or getaddrinfo(*args, **kwargs))

    assert ask(client, peer) == TEXT and asked == []
    # A name may have several addresses; the peer has one of them.
    assert client.get(peer.url.replace("127.0.0.1", "localhost")).content == TEXT
    assert [*map(bytes, asked)] == [b"localhost"] if isinstance(asked[0], bytes) else asked == ["localhost"]


def test_an_address_of_ipv6_is_one(client: httpx2.Client) -> None:
    with listening(socket.AF_INET6, "::1") as (listener, port):

        def answer() -> bytes:
            with listener.accept()[0] as sock:
                data = sock.recv(65536)
                sock.sendall(SIZED)
                return data

        server = gevent.spawn(answer)

        assert client.get(f"http://[::1]:{port}/").content == TEXT
        assert b"Host: [::1]:%d\r\n" % port in server.get(timeout=5)


# ---- TLS ----


class Authority(NamedTuple):
    """Who is trusted: a CA, in a file and as a client's context."""

    ca: trustme.CA
    file: Path

    @property
    def context(self) -> ssl.SSLContext:
        """Of a client that trusts it alone."""
        return ssl.create_default_context(cafile=self.file)

    def server(self, *names: str) -> ssl.SSLContext:
        """Of a server that it has given a certificate."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.set_alpn_protocols(["h2", "http/1.1"])
        self.ca.issue_cert(*names).configure_cert(context)
        return context


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """A CA that nobody else knows."""
    ca, file = trustme.CA(), tmp_path_factory.mktemp("ca") / "ca.pem"
    ca.cert_pem.write_to_path(str(file))
    return Authority(ca, file)


@pytest.fixture
def secure(authority: Authority) -> Iterator[Peer]:
    """A server with TLS, whose name is localhost."""
    one = Peer(authority.server("localhost"))
    with one.server:
        yield one


def of(secure: Peer) -> str:
    """Where it is."""
    return f"https://localhost:{secure.server.port}/"


def test_an_answer_over_tls_is_read_and_its_connection_kept(make_client: MakeClient, secure: Peer, authority: Authority) -> None:
    client = make_client(authority.context)
    secure.told(CHUNKED + b"5\r\nHello\r\n", b"5\r\n wor", b"l\r\n", b"%x\r\n%s\r\n0\r\n\r\n" % (100_000, b"d" * 100_000))

    for _ in range(2):
        assert client.get(of(secure)).content == b"Hello worl" + b"d" * 100_000
    assert len(set(secure.ports)) == 1


def test_a_stranger_is_refused(secure: Peer) -> None:
    with both() as (ours, theirs):
        assert got(ours, of(secure)).error is got(theirs, of(secure)).error is httpx2.ConnectError


def test_a_wrong_name_is_refused(make_client: MakeClient, secure: Peer, authority: Authority) -> None:
    client = make_client(authority.context)

    assert got(client, of(secure).replace("localhost", "127.0.0.1")).error is httpx2.ConnectError
    assert got(client, of(secure)).body == TEXT


def test_a_server_without_tls_cannot_be_connected_to(client: httpx2.Client) -> None:
    with listening() as (listener, port):

        def answer() -> None:
            with listener.accept()[0] as sock:
                sock.recv(65536)
                sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        server = gevent.spawn(answer)
        assert got(client, f"https://127.0.0.1:{port}/").error is httpx2.ConnectError
        server.get(timeout=5)


@pytest.mark.parametrize("answer", [CHUNKED + b"5\r\nHello\r\n", SIZED[:-1], b"", UNTIL_CLOSE])
@pytest.mark.parametrize("then", ["close", "reset"])
def test_an_end_without_a_goodbye_is_over_tls_what_it_is_with_httpx2(
    secure: Peer, authority: Authority, answer: bytes, then: str
) -> None:
    secure.told(answer, then=then)
    context = authority.context
    with httpx2.Client(transport=Transport(context)) as ours, httpx2.Client(verify=context, trust_env=False) as theirs:
        mine = got(ours, of(secure))

        assert mine == got(theirs, of(secure))
        assert mine.error or answer == UNTIL_CLOSE


def test_a_kept_connection_over_tls_that_the_server_has_closed_meanwhile_is_not_used(
    make_client: MakeClient, secure: Peer, authority: Authority
) -> None:
    client = make_client(authority.context)
    secure.told(SIZED, then="close")

    for _ in range(2):
        assert client.get(of(secure)).content == TEXT
        wait_until(lambda: secure.open == 0)


# ---- Under the SDKs ----


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., httpx2.Client]]:
    """Builds the clients of a service with these variables, for the OpenAI SDK or for what `kind` says."""
    with contextlib.ExitStack() as clients:

        def make(kind: Any = openai.DefaultHttpxClient, **variables: str) -> httpx2.Client:
            for name, value in variables.items():
                monkeypatch.setenv(name, value)
            return clients.enter_context(wire.http_client(kind, "fast"))

        yield make


def is_ours(client: httpx2.Client, url: str) -> bool:
    """Whether an answer comes over our transport."""
    with client.stream("GET", url) as response:
        assert response.read() == TEXT
        return BODY in response.extensions


@pytest.mark.parametrize("kind", [openai.DefaultHttpxClient, anthropic.DefaultHttpxClient])
def test_the_sdks_clients_follow_redirects_as_they_did(environment: Callable[..., httpx2.Client], peer: Peer, kind: Any) -> None:
    client = environment(kind)
    peer.at["/v1"] = b"HTTP/1.1 307 Elsewhere\r\nLocation: /v2\r\nContent-Length: 4\r\n\r\nhere"

    response = client.post(peer.url + "/v1", content=b"question")

    assert (response.status_code, response.content) == (200, TEXT)
    assert [(request.target, request.body) for request in peer.requests] == [("/v1", b"question"), ("/v2", b"question")]
    assert len(set(peer.ports)) == 1


@pytest.mark.parametrize(("environ", "ours"), [({}, True), ({"PROVIDER_TRANSPORT": "httpx"}, False)])
@pytest.mark.parametrize("name", ["openai", "anthropic"])
def test_the_setting_chooses_the_transport(peer: Peer, name: str, environ: dict[str, str], ours: bool) -> None:
    key, url = f"{name.upper()}_API_KEY", f"{name.upper()}_BASE_URL"
    provider: Any = Providers(make_config(**{key: "k", url: peer.url}, **environ))[name]

    provider.warm_up()

    assert isinstance(provider._client._client._transport, Transport) == ours
    provider.close()


def test_an_authority_in_the_environment_is_trusted(
    environment: Callable[..., httpx2.Client], secure: Peer, authority: Authority
) -> None:
    assert is_ours(environment(SSL_CERT_FILE=str(authority.file)), of(secure))


@pytest.mark.parametrize("choice", ["fast", "httpx"])
def test_the_authorities_are_read_once_for_all_providers(monkeypatch: pytest.MonkeyPatch, choice: str) -> None:
    read: list[ssl.SSLContext] = []
    make = httpcore2.default_ssl_context
    monkeypatch.setattr(httpcore2, "default_ssl_context", lambda **trusted: read.append(make(**trusted)) or read[-1])
    transport._trust.cache_clear()

    providers = Providers(make_config(OPENAI_API_KEY="k", ANTHROPIC_API_KEY="k", PROVIDER_TRANSPORT=choice))
    providers.warm_up()
    providers.close()

    assert len(read) == 1


class Proxy:
    """A proxy of HTTP: CONNECT, and requests with a whole URL. `asked` are their targets."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.server = Server(self._handle)

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.server.port}"

    def _handle(self, connection: Connection, request: Request) -> None:
        self.asked.append(request.target)
        target = urlsplit(request.target if "://" in request.target else f"//{request.target}")
        with socket.create_connection((target.hostname or "", target.port or 80), timeout=5) as onward:
            if request.method == "CONNECT":
                connection.send(b"HTTP/1.1 200 Connected\r\n\r\n")
                back = gevent.spawn(_pump, onward, connection._socket)
                _pump(connection._socket, onward)
                back.join()
            else:
                onward.sendall(f"{request.method} {target.path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
                _pump(onward, connection._socket)
        raise ClientGone


def _pump(source: Any, target: Any) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    """A proxy."""
    one = Proxy()
    with one.server:
        yield one


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_a_proxy_for_http_is_used_but_for_whom_no_proxy_names(
    peer: Peer, proxy: Proxy, variable: str, environment: Callable[..., httpx2.Client]
) -> None:
    peer.told(SIZED.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"), then="close")

    assert not is_ours(environment(**{variable: proxy.url}), peer.url + "/a")
    assert proxy.asked == [peer.url + "/a"]
    assert is_ours(environment(**{variable: proxy.url, "NO_PROXY": "example.com,127.0.0.1"}), peer.url)
    assert len(proxy.asked) == 1


def test_a_proxy_for_https_gets_a_tunnel_and_http_goes_its_own_way(
    secure: Peer, peer: Peer, proxy: Proxy, authority: Authority, environment: Callable[..., httpx2.Client]
) -> None:
    secure.told(SIZED.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"), then="close")
    client = environment(HTTPS_PROXY=proxy.url, SSL_CERT_FILE=str(authority.file))

    assert not is_ours(client, of(secure))
    assert proxy.asked == [f"localhost:{secure.server.port}"]
    assert is_ours(client, peer.url)


def test_a_body_that_is_encoded_is_decoded(environment: Callable[..., httpx2.Client], peer: Peer) -> None:
    packed = gzip.compress(b'{"data":[{"id":"a-model","object":"model","created":1,"owned_by":"x"}],"object":"list"}')
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n"
    peer.told(head % len(packed) + packed[:20], packed[20:])
    sdk = openai.OpenAI(api_key="k", base_url=peer.url, max_retries=0, http_client=environment())

    assert [model.id for model in sdk.models.list().data] == ["a-model"]
