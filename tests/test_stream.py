"""GET /stream/<id>: who may watch, what a viewer gets, and what it is told when there is nothing to watch."""

import socket
import time
from collections.abc import Callable
from urllib.parse import urlsplit

import gevent
import httpx
import jwt
import pytest

from tests.neighbours.provider import ProviderServer
from tests.neighbours.receiver import HANG, Receiver
from tests.service import SECRET, Event, Service, n8n_token, session_in, text_of, wait_until, watch

StartService = Callable[..., Service]
EVENT_STREAM = {"Accept": "text/event-stream"}


def viewer_token(secret: str, **claims: object) -> str:
    """A token as in a streamUrl, unless the claims say otherwise."""
    body = {"sub": "00000000-0000-4000-8000-000000000000", "exp": 9_000_000_000, "aud": "aistream-viewer", **claims}
    return jwt.encode(body, secret, "HS256", headers={"typ": "aistream-viewer+jwt"})


def sse(url: str, last_id: str | None = None) -> bytes:
    """The raw bytes of a whole stream."""
    headers = {**EVENT_STREAM, **({"Last-Event-ID": last_id} if last_id else {})}
    return httpx.get(url, headers=headers, timeout=30).content


def test_text_mode_is_what_a_plain_eventsource_needs(service: Service) -> None:
    url = service.stream_url(model="echo", prompt="one two")

    answer = httpx.get(url, headers=EVENT_STREAM)

    assert answer.content == b"retry: 2000\nid: 1-1\ndata: one \n\nid: 1-2\ndata: two\n\nid: 1-4\ndata: [DONE]\n\n"
    assert answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["Cache-Control"] == "no-store, no-transform"
    assert answer.headers["X-Accel-Buffering"] == "no"
    assert answer.headers["Referrer-Policy"] == "no-referrer"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_whoever_only_checks_the_link_starts_nothing(service: Service) -> None:
    url = service.stream_url(model="echo", prompt="one two")

    checked = httpx.head(url, headers=EVENT_STREAM)
    bad = httpx.head(url.split("?")[0])

    session = httpx.get(f"{service.url}/sessions/{session_in(url)}", headers={"Authorization": f"Bearer {n8n_token()}"}).json()
    assert (checked.status_code, checked.headers["Content-Type"], bad.status_code) == (
        200,
        "text/event-stream; charset=utf-8",
        401,
    )
    assert session["status"] == "pending"


def test_json_mode_says_everything_as_objects(service: Service) -> None:
    url = service.stream_url(model="echo", prompt="one", format="json")

    body = sse(url).decode()

    session = url.split("/stream/")[1].split("?")[0]
    assert "format=json" in url
    assert body == (
        "retry: 2000\n"
        f'id: 1-0\ndata: {{"type":"start","streamId":"{session}","model":"echo","provider":"echo"}}\n\n'
        'id: 1-1\ndata: {"type":"text","text":"one"}\n\n'
        'id: 1-2\ndata: {"type":"usage","input_tokens":1,"output_tokens":1,"cached_input_tokens":0,"reasoning_tokens":0,'
        '"source":"provider","estimated_by":null}\n\n'
        'data: {"type":"end","finish_reason":"stop"}\n\n'
        "id: 1-3\ndata: [DONE]\n\n"
    )


def test_reasoning_is_shown_in_json_mode_and_is_never_part_of_the_answer(service: Service, n8n: Receiver) -> None:
    url = service.stream_url(model="gpt-test-reasoning", resumeUrl=n8n.url())

    events = service.read(url + "&format=json")

    (callback,) = n8n.wait_for(1)
    said = [event.data for event in events if '"reasoning"' in event.data]
    assert said
    assert callback.json["answer"] and callback.json["answer"] == text_of(service.read(url))


@pytest.mark.parametrize("by", ["header", "query"])
def test_a_viewer_goes_on_after_the_last_id_it_has(service: Service, by: str) -> None:
    url = service.stream_url(model="echo", prompt="a b c d")
    whole = service.read(url)

    rest = service.read(url, "1-2") if by == "header" else service.read(url + "&last_event_id=1-2")

    assert rest == whole[2:]


def test_the_header_wins_over_the_query(service: Service) -> None:
    url = service.stream_url(model="echo", prompt="a b c d")
    whole = service.read(url)

    assert service.read(url + "&last_event_id=1-1", "1-3") == whole[3:]


@pytest.mark.parametrize("cursor", ["-1", "abc", "1", "1-", "1-2-3", "99999999999999999999999-1", "x" * 5000, "1-１", "7-3"])
def test_a_cursor_that_is_none_brings_the_whole_answer(service: Service, cursor: str) -> None:
    url = service.stream_url(model="echo", prompt="a b")
    whole = service.read(url)

    headers = {**EVENT_STREAM, "Last-Event-ID": cursor.encode("utf-8")}
    body = httpx.get(url, headers=headers).text

    assert body.count("id: ") == len(whole)


def test_a_cursor_beyond_the_last_event_brings_the_ending_alone(service: Service) -> None:
    url = service.stream_url(model="echo", prompt="a b")
    whole = service.read(url)

    assert service.read(url, "1-4000") == whole[-1:]


def test_who_has_seen_the_ending_is_told_to_stop(service: Service) -> None:
    url = service.stream_url(model="echo", prompt="a b")
    last = service.read(url)[-1]

    answer = httpx.get(url, headers={**EVENT_STREAM, "Last-Event-ID": last.id})

    assert (answer.status_code, answer.content) == (204, b"")


def test_a_second_viewer_gets_the_whole_text_while_it_is_being_written(service: Service, provider: ProviderServer) -> None:
    model = "gpt-test-hold-n6-k3-i2"
    url = service.stream_url(model=model)

    with service.watch(url) as first:
        seen = [next(first) for _ in range(3)]
        with service.watch(url) as second:
            caught_up = [next(second) for _ in range(3)]
            provider.release()
            rest_of_first, rest_of_second = list(first), list(second)

    assert caught_up == seen
    assert rest_of_first == rest_of_second and rest_of_first[-1].data == "[DONE]"
    assert len(provider.requests(model)) == 1


def test_a_reload_in_mid_stream_goes_on_at_the_exact_character(service: Service, provider: ProviderServer) -> None:
    url = service.stream_url(model="gpt-test-hold-n8-k4-i3")
    with service.watch(url) as first:
        seen = [next(first) for _ in range(4)]

    with service.watch(url, seen[1].id) as again:
        repeated = [next(again) for _ in range(2)]
        provider.release()
        rest = list(again)

    assert repeated == seen[2:]
    assert text_of(seen + rest) == text_of(service.read(url))


def test_the_generation_goes_on_when_the_viewer_is_gone(service: Service, provider: ProviderServer, n8n: Receiver) -> None:
    url = service.stream_url(model="gpt-test-hold-n5-k2-i4", resumeUrl=n8n.url())
    with service.watch(url) as viewer:
        next(viewer)

    provider.release()

    (callback,) = n8n.wait_for(1)
    assert callback.json["status"] == "completed"
    assert text_of(service.read(url)) == callback.json["answer"]


@pytest.mark.parametrize(
    ("token", "code"),
    [
        ("", "token_missing"),
        ("nonsense", "token_malformed"),
        (viewer_token(SECRET, exp=1), "token_expired"),
        (viewer_token("y" * 40), "token_signature"),
        (viewer_token(SECRET, aud="another"), "token_audience"),
        (n8n_token(), "token_wrong_kind"),
    ],
)
def test_without_a_good_token_there_is_401_before_anything_else(service: Service, token: str, code: str) -> None:
    url = service.stream_url(model="echo").split("?")[0]

    answer = httpx.get(f"{url}?access_token={token}", headers=EVENT_STREAM)

    assert (answer.status_code, answer.headers["Content-Type"]) == (401, "application/problem+json")
    assert (answer.json()["code"], answer.json()["ok"]) == (code, False)


def test_the_token_may_come_in_the_header(service: Service) -> None:
    url, token = service.stream_url(model="echo", prompt="a").split("?access_token=")

    with watch(url, Authorization=f"Bearer {token}") as events:
        assert text_of(list(events)) == "a"


def test_the_headers_token_wins_over_the_one_in_the_url(service: Service) -> None:
    url, token = service.stream_url(model="echo", prompt="a").split("?access_token=")
    bad = viewer_token("y" * 40)

    good_header = httpx.get(f"{url}?access_token={bad}", headers={"Authorization": f"Bearer {token}"})
    bad_header = httpx.get(f"{url}?access_token={token}", headers={"Authorization": f"Bearer {bad}"})
    no_token = httpx.get(f"{url}?access_token={token}", headers={"Authorization": "Basic eDp5"})
    cookie = httpx.get(url, headers={"Cookie": f"access_token={token}"})

    assert [one.status_code for one in (good_header, bad_header, no_token, cookie)] == [200, 401, 200, 401]


def test_the_token_in_the_header_stops_an_answer_as_well(service: Service) -> None:
    url, token = service.stream_url(model="echo", prompt="a").split("?access_token=")

    answer = httpx.post(f"{url}/cancel", headers={"Authorization": f"Bearer {token}"})

    assert (answer.status_code, answer.json()["status"]) == (200, "cancelled")


@pytest.mark.parametrize("other", ["another session", "no session", "no uuid", "a key's end"])
def test_a_token_opens_its_own_stream_and_no_other(service: Service, other: str) -> None:
    token = service.stream_url(model="echo").split("?access_token=")[1]
    ids = {
        "another session": service.stream_url(model="echo").split("/stream/")[1].split("?")[0],
        "no session": "00000000-0000-4000-8000-000000000000",
        "no uuid": "..%2F..%2Fetc",
        "a key's end": "x%0d%0aid:1",
    }

    answer = httpx.get(f"{service.url}/stream/{ids[other]}?access_token={token}", headers=EVENT_STREAM)

    assert answer.status_code == 404
    assert answer.headers["Content-Type"] == "application/problem+json"


def test_a_session_that_a_young_store_does_not_know_is_held_then_lost_and_from_then_on_not_found(
    start_service: StartService, redis_url: str
) -> None:
    service = start_service(REDIS_URL=redis_url, LEASE_SECONDS="1")
    session = "0a9cb0f8-0bc8-4d9c-a8be-0f7d3ee9cfb8"
    token = viewer_token(SECRET, sub=session)
    url = f"{service.url}/stream/{session}?access_token={token}"

    plain = httpx.get(url)
    (held,) = service.read(url)

    assert (plain.status_code, plain.json()["code"]) == (503, "store_unavailable")
    assert held.event == "error" and '"code":"session_lost"' in held.data
    assert httpx.get(url, headers=EVENT_STREAM).status_code == httpx.get(url).status_code == 404


def test_a_session_nobody_came_for_expires_and_both_sides_are_told(start_service: StartService, n8n: Receiver) -> None:
    service = start_service(SESSION_TTL_SECONDS="1")
    url = service.stream_url(model="echo", prompt="late", resumeUrl=n8n.url(), userId="u")

    (callback,) = n8n.wait_for(1, timeout=5)
    (event,) = service.read(url)
    again = httpx.get(url, headers={**EVENT_STREAM, "Last-Event-ID": event.id})

    assert (callback.json["status"], callback.json["error"]["code"]) == ("expired", "expired")
    assert (callback.json["answer"], callback.json["input_tokens"], callback.json["output_tokens"]) == ("", 0, 0)
    assert (callback.json["userId"], callback.json["prompt"]) == ("u", "late")
    assert event.event == "error" and '"code":"expired"' in event.data
    assert again.status_code == 204


def test_after_the_replay_a_browser_gets_the_reason_and_others_410(start_service: StartService, n8n: Receiver) -> None:
    service = start_service(REPLAY_SECONDS="1")
    url = service.stream_url(model="echo", prompt="a", resumeUrl=n8n.url())
    last = service.read(url)[-1]
    n8n.wait_for(1)
    wait_until(lambda: service.lines("callback.attempted"))
    time.sleep(1.2)

    (event,) = service.read(url)
    plain = httpx.get(url)

    assert event == Event(last.id, "error", event.data) and '"code":"replay_over"' in event.data
    assert (plain.status_code, plain.json()["code"]) == (410, "replay_over")
    assert httpx.get(url, headers={**EVENT_STREAM, "Last-Event-ID": event.id}).status_code == 204


def test_a_viewer_too_many_waits_with_heartbeats_for_a_place(start_service: StartService, provider: ProviderServer) -> None:
    service = start_service(MAX_VIEWERS_PER_SESSION="1", **provider.openai_environ)
    url = service.stream_url(model="gpt-test-hold-n4-k2-i5")

    with service.watch(url) as first:
        next(first)
        waiting = gevent.spawn(sse, url)
        refused = httpx.get(url)
        gevent.sleep(1.2)
        assert not waiting.dead
    provider.release()

    body = waiting.get(timeout=10)
    assert (refused.status_code, refused.json()["code"]) == (429, "too_many_viewers")
    assert body.startswith(b"retry: 2000\n:\n") and body.endswith(b"data: [DONE]\n\n")


def test_a_silent_stream_beats_from_the_first_byte_on(start_service: StartService, provider: ProviderServer) -> None:
    service = start_service(HEARTBEAT_SECONDS="0.3", **provider.openai_environ)
    url = service.stream_url(model="gpt-test-hello-f1500")

    began = time.monotonic()
    body = sse(url)
    lasted = time.monotonic() - began

    before_text, _, after = body.partition(b"id: ")
    assert before_text.startswith(b"retry: 2000\n")
    assert set(before_text.removeprefix(b"retry: 2000\n").split(b"\n")) == {b":", b""}
    assert 3 <= before_text.count(b":\n") <= lasted / 0.3
    assert after.endswith(b"data: [DONE]\n\n")


def test_a_viewer_that_left_is_noticed_at_once(service: Service, provider: ProviderServer) -> None:
    url = service.stream_url(model="gpt-test-hold-n4-k1-i6")
    before = len(service.lines("viewer.left"))

    with service.watch(url) as viewer:
        next(viewer)
    began = time.monotonic()
    wait_until(lambda: len(service.lines("viewer.left")) > before, timeout=5)

    # Heartbeats come every 15 s: only the watcher on the socket can have told.
    assert time.monotonic() - began < 5 and service.lines("viewer.left")[-1]["gone"] is True
    provider.release()


def raw(url: str, version: str, read: Callable[[socket.socket], bytes]) -> bytes:
    """What a client with a small buffer gets, head and all, by this version of HTTP; `read` reads it."""
    address = urlsplit(url)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect((address.hostname, address.port))
        asked = f"GET {address.path}?{address.query} HTTP/{version}\r\nHost: x\r\nConnection: close\r\n"
        client.sendall(f"{asked}Accept: text/event-stream\r\n\r\n".encode())
        return read(client)


def to_the_end(client: socket.socket) -> bytes:
    """All that comes."""
    return b"".join(iter(lambda: client.recv(65_536), b""))


def unchunked(body: bytes) -> bytes:
    """The body that these chunks carry (RFC 9112 7.1). Each chunk must be whole."""
    whole, rest = b"", body
    while True:
        size, _, rest = rest.partition(b"\r\n")
        count = int(size, 16)
        assert rest[count : count + 2] == b"\r\n"
        if not count:
            assert rest == b"\r\n"
            return whole
        whole, rest = whole + rest[:count], rest[count + 2 :]


def test_a_client_that_takes_its_time_gets_each_byte_once(service: Service, n8n: Receiver) -> None:
    # More than all buffers on the way hold.
    url = service.stream_url(model="gpt-test-big-b1500-i401", resumeUrl=n8n.url())

    def slowly(client: socket.socket) -> bytes:
        got = client.recv(4096)
        gevent.sleep(2.5)  # it stands still
        while piece := client.recv(4096):
            got += piece
        return got

    reading = gevent.spawn(raw, url, "1.1", slowly)
    beside = service.read(url)
    head, _, body = reading.get(timeout=60).partition(b"\r\n\r\n")

    (callback,) = n8n.wait_for(1)
    assert b"transfer-encoding: chunked" in head.lower()
    assert unchunked(body) == sse(url)
    assert text_of(beside) == callback.json["answer"]


def test_a_client_of_http_1_0_gets_the_same_bytes_without_chunks(service: Service) -> None:
    url = service.stream_url(model="gpt-test-long-n20-d20-i402")

    head, _, body = raw(url, "1.0", to_the_end).partition(b"\r\n\r\n")

    assert b"transfer-encoding" not in head.lower()
    assert body == sse(url)


def test_a_receiver_that_hangs_delays_neither_streams_nor_other_callbacks(service: Service, n8n: Receiver) -> None:
    n8n.answers([HANG], path="/hangs")
    service.read(service.stream_url(model="echo", prompt="a", resumeUrl=n8n.url("/hangs")))
    n8n.wait_for(1, path="/hangs")

    service.read(service.stream_url(model="echo", prompt="b", resumeUrl=n8n.url("/other")))

    (other,) = n8n.wait_for(1, path="/other", timeout=2)
    assert other.json["answer"] == "b"
