"""Where a callback may go: the resumeUrl's origin, rewritten and then checked, and the address that it leads to."""

import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aistream.config import Config
from aistream.destination import Destinations
from aistream.errors import DestinationRefused
from aistream.outbound import Outbound, SendFailed
from aistream.parse import origin_of
from tests.conftest import make_config
from tests.neighbours.receiver import Receiver
from tests.service import SECRET

RESUME_URL = "http://localhost:5678/webhook-waiting/7?signature=ab%2fcd&a='b'"

# ---- The origin ----


def production(**environ: str) -> Destinations:
    """As outside DEV_MODE: only what is allowed."""
    required = {"JWT_SECRET": SECRET, "BASE_URL": "https://ai.test", "RESUME_URL_ALLOWED_ORIGINS": "http://n8n:5678"}
    return Destinations(Config.from_env({**required, **environ}))


def why_not(destinations: Destinations, url: str) -> str:
    """The reason for which a resumeUrl is refused."""
    with pytest.raises(DestinationRefused) as refused:
        destinations.of(url)
    return str(refused.value)


def test_the_origin_is_rewritten_first_and_then_checked_and_nothing_else_changes() -> None:
    destinations = production(RESUME_URL_REWRITE="http://localhost:5678=http://n8n:5678")

    assert destinations.of(RESUME_URL) == "http://n8n:5678/webhook-waiting/7?signature=ab%2fcd&a='b'"
    assert destinations.of("http://n8n:5678/x") == "http://n8n:5678/x"
    assert destinations.of("HTTP://LocalHost:5678") == "http://n8n:5678"
    assert destinations.of("http://localhost:5678?signature=http://localhost:5678") == (
        "http://n8n:5678?signature=http://localhost:5678"
    )


def test_what_is_rewritten_to_an_origin_that_is_not_allowed_is_refused_by_both_names() -> None:
    destinations = production(RESUME_URL_REWRITE="http://localhost:5678=http://other:5678")

    assert why_not(destinations, RESUME_URL) == (
        "has the origin http://localhost:5678, which RESUME_URL_REWRITE makes http://other:5678, which is not among "
        "RESUME_URL_ALLOWED_ORIGINS of the service's configuration"
    )


@settings(deadline=None)
@given(st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="\\#"), max_size=40))
def test_whatever_follows_the_origin_is_kept_byte_for_byte(tail: str) -> None:
    destinations = production(RESUME_URL_REWRITE="http://localhost:5678=http://n8n:5678")

    assert destinations.of("http://localhost:5678/" + tail) == "http://n8n:5678/" + tail


@pytest.mark.parametrize(
    "url", ["http://localhost:5678/1", "http://n8n:5679/1", "https://n8n:5678/1", "http://n8n.evil.test:5678/1"]
)
def test_outside_dev_mode_only_what_is_listed_is_allowed(url: str) -> None:
    assert f"has the origin {origin_of(url)}, which is not among RESUME_URL_ALLOWED_ORIGINS" in why_not(production(), url)


# ---- The address ----

NEVER = {
    "the metadata service of most clouds": "169.254.169.254",
    "link-local": "169.254.0.1",
    "the end of link-local": "169.254.255.255",
    "link-local IPv6": "fe80::1",
    "with a zone": "fe80::1%eth0",
    "the end of link-local IPv6": "febf::ffff",
    "AWS over IPv6": "fd00:ec2::254",
    "Alibaba Cloud": "100.100.100.200",
    "Oracle Cloud Classic": "192.0.0.192",
    "this host": "0.0.0.0",
    "this network": "0.1.2.3",
    "unspecified": "::",
    "multicast": "224.0.0.1",
    "the end of multicast": "239.255.255.255",
    "multicast IPv6": "ff02::1",
    "reserved": "240.0.0.1",
    "broadcast": "255.255.255.255",
    "mapped": "::ffff:169.254.169.254",
    "mapped, in hex": "::ffff:a9fe:a9fe",
    "mapped this host": "::ffff:0.0.0.0",
    "IPv4-compatible": "::169.254.169.254",
    "IPv4-translated": "::ffff:0:169.254.169.254",
    "NAT64": "64:ff9b::a9fe:a9fe",
    "NAT64 of whatever layout": "64:ff9b:1::1",
    "6to4": "2002:a9fe:a9fe::1",
    "Teredo, whose client is written inverted": "2001:0:5f5f:5f5f:0:0:5601:5601",
    "mapped metadata of Alibaba": "::ffff:100.100.100.200",
}


@pytest.mark.parametrize("what", NEVER)
@pytest.mark.parametrize("origin", ["http://n8n:5678", "http://other"])
def test_a_callback_never_goes_to(what: str, origin: str) -> None:
    with pytest.raises(DestinationRefused) as refused:
        production().check_address(NEVER[what], origin)

    assert str(refused.value) == "leads to an address that no callback may go to"


PRIVATE = (
    "10.0.0.5 172.16.0.1 172.31.255.255 192.168.1.2 100.64.0.1 fd00::5 fec0::1 ::ffff:10.0.0.5 64:ff9b::10.0.0.5 2002:a00:5::"
)
PUBLIC = (
    "127.0.0.1 ::1 93.184.216.34 2606:2800:220:1::1 169.253.255.255 169.255.0.1 1.0.0.0 223.255.255.255 172.32.0.1 ::ffff:8.8.8.8"
)


@pytest.mark.parametrize("address", PRIVATE.split())
def test_a_private_address_is_for_listed_origins_only(address: str) -> None:
    listed, anywhere = make_config(RESUME_URL_ALLOWED_ORIGINS="http://n8n:5678"), make_config()

    Destinations(listed).check_address(address, "http://n8n:5678")
    for config in (listed, anywhere):
        with pytest.raises(DestinationRefused, match="private address: expected http://x among RESUME_URL_ALLOWED_ORIGINS"):
            Destinations(config).check_address(address, "http://x")


@pytest.mark.parametrize("address", PUBLIC.split())
@pytest.mark.parametrize("origin", ["http://n8n:5678", "http://x"])
def test_a_public_address_and_this_machine_are_for_every_allowed_origin(address: str, origin: str) -> None:
    production().check_address(address, origin)


@pytest.mark.parametrize(
    "host", ["169.254.169.254", "[::ffff:169.254.169.254]", "0.0.0.0", "[::]", "[64:ff9b::a9fe:a9fe]", "10.1.2.3"]
)
def test_an_address_that_is_written_out_is_refused_at_init(host: str) -> None:
    assert why_not(Destinations(make_config()), f"http://{host}/latest/meta-data").startswith("leads to ")


# ---- The connection ----


@pytest.fixture
def make_outbound() -> Iterator[Callable[..., Outbound]]:
    """Builds senders by a DEV_MODE configuration."""
    made: list[Outbound] = []

    def make(**environ: str) -> Outbound:
        made.append(Outbound(Destinations(make_config(**environ)), pool_size=1))
        return made[-1]

    yield make
    for outbound in made:
        outbound.close()


@pytest.mark.parametrize(
    "host", ["169.254.169.254", "[::ffff:169.254.169.254]", "2852039166", "0xA9FEA9FE", "0251.254.169.254", "0"]
)
def test_a_forbidden_address_is_refused_however_it_is_written(make_outbound: Callable[..., Outbound], host: str) -> None:
    with pytest.raises(DestinationRefused):
        make_outbound().post(f"http://{host}/latest/meta-data", b"{}", {})


@pytest.mark.parametrize("host", ["a..b", "x" * 64, ".", "[v1.a]", "*"])
def test_a_host_that_cannot_be_reached_fails_as_not_sent(make_outbound: Callable[..., Outbound], host: str) -> None:
    with pytest.raises(SendFailed) as failed:
        make_outbound().post(f"http://{host}/", b"{}", {})

    assert failed.value.sent is False


def test_a_name_that_leads_elsewhere_by_the_time_it_is_connected_to_gains_nothing(
    make_outbound: Callable[..., Outbound], n8n: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The name service is the attacker's, and no part of this machine: its answers are made up here.
    answers: list[list[str]] = [["127.0.0.1"], ["169.254.169.254"], ["169.254.169.254", "127.0.0.1"]]
    asked: list[str] = []

    real = socket.getaddrinfo

    def getaddrinfo(host: str, port: int, *args: Any, **kwargs: Any) -> list[Any]:
        if host != "rebinding.test":
            return list(real(host, port, *args, **kwargs))
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in answers.pop(0)]

    url = n8n.url("/w").replace("127.0.0.1", "rebinding.test")
    first = make_outbound()
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)

    assert first.post(url, b"1", {}).status == 200
    assert first.post(url, b"2", {}).status == 200  # on the connection that was checked
    with pytest.raises(DestinationRefused):
        make_outbound().post(url, b"3", {})
    assert make_outbound().post(url, b"4", {}).status == 200  # the bad address is passed over
    assert [received.body for received in n8n.requests] == [b"1", b"2", b"4"]
    assert asked == ["rebinding.test"] * 3


def test_neither_proxies_nor_passwords_nor_redirects_lead_a_callback_elsewhere(
    make_outbound: Callable[..., Outbound], n8n: Receiver, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    with Receiver() as elsewhere:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, elsewhere.origin)
        (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret\n")
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        n8n.answers([(307, {"Location": elsewhere.url("/stolen"), "Set-Cookie": "a=b"}, "")])

        answers = [make_outbound().post(n8n.url("/w"), b"{}", {}).status for _ in range(2)]

        assert (answers, elsewhere.requests) == ([307, 200], [])
        assert not {"authorization", "cookie"} & {name for received in n8n.requests for name in received.headers}


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("7", 7),
        ("0", 0),
        ("9" * 400, 999_999_999),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0),
        ("Thu, 31 Dec 9999 23:59:59 GMT", "far"),
        ("soon", None),
        ("-1", None),
        ("", None),
        ("1.5", None),
    ],
)
def test_retry_after_is_a_number_or_a_date(
    make_outbound: Callable[..., Outbound], n8n: Receiver, header: str, seconds: float | str | None
) -> None:
    n8n.answers([(503, {"Retry-After": header}, "busy")])

    said = make_outbound().post(n8n.url(), b"{}", {}).retry_after

    assert said == seconds or (seconds == "far" and said is not None and said > 1e9)
