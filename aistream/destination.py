"""Where a callback may go: a resumeUrl with its origin rewritten where that is configured, if it is allowed then.

The rewriting comes first, then the check, at init and again before each attempt: a dead letter that is delivered again goes
by today's configuration. Addresses are checked by the sender when it connects (`outbound`). Pure: nothing is resolved here.
"""

from __future__ import annotations

import ipaddress
from contextlib import suppress
from urllib.parse import urlsplit

from aistream.config import Config
from aistream.errors import DestinationRefused
from aistream.parse import origin_of

_AS_IT_IS = "expected n8n's $execution.resumeUrl"

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address

#: Never a callback's goal, whatever is configured: link-local (with the clouds' metadata services), "this network",
#: multicast, broadcast, a NAT64 whose layout is anybody's (RFC 8215), and the metadata addresses outside all these: AWS over
#: IPv6, Alibaba, Oracle.
_NEVER = [
    ipaddress.ip_network(net)
    for net in (
        *("169.254.0.0/16", "fe80::/10", "0.0.0.0/8", "::/128", "224.0.0.0/4", "240.0.0.0/4", "ff00::/8"),
        *("64:ff9b:1::/48", "fd00:ec2::/32", "100.100.100.200/32", "192.0.0.192/32"),
    )
]
#: Only for origins that are listed: private networks (RFC 1918, RFC 4193), carriers' (RFC 6598) and site-local (RFC 3879).
_PRIVATE = [
    ipaddress.ip_network(net)
    for net in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7", "fec0::/10")
]
#: IPv6 networks that lead to an IPv4 address, and how far from the right it stands: IPv4-compatible (RFC 4291), IPv4-translated
#: (RFC 7915), NAT64 (RFC 6052), 6to4 (RFC 3056). IPv4-mapped (RFC 4291) and Teredo (RFC 4380) are known to the library.
_LEADS_TO_IPV4 = [
    (ipaddress.IPv6Network(net), shift)
    for net, shift in (("::/96", 0), ("::ffff:0:0:0/96", 0), ("64:ff9b::/96", 0), ("2002::/16", 80))
]


class Destinations:
    """Where callbacks may go by one configuration."""

    def __init__(self, config: Config) -> None:
        self._rewrite = dict(config.resume_url_rewrite)
        self._allowed = frozenset(config.resume_url_allowed_origins)
        self._any = config.dev_mode and not self._allowed

    def of(self, resume_url: str) -> str:
        """The URL to call, path and query byte for byte as given. Raises DestinationRefused with what the author may do."""
        given = _checked_origin(resume_url)
        origin = self._rewrite.get(given, given)
        if not self._any and origin not in self._allowed:
            made = "" if origin == given else f", which RESUME_URL_REWRITE makes {origin}"
            raise DestinationRefused(
                f"has the origin {given}{made}, which is not among RESUME_URL_ALLOWED_ORIGINS of the service's configuration"
            )
        host = urlsplit(origin).hostname or ""
        with suppress(ValueError):  # a name: its addresses are checked when they are connected to
            self.check_address(host, origin)
        return resume_url if origin == given else origin + _after_origin(resume_url)

    def check_address(self, address: str, origin: str) -> None:
        """Raises DestinationRefused for an address that no callback to this origin may go to; ValueError for what is none.

        An address that another one leads to (IPv4-mapped, NAT64, 6to4, Teredo and others) is as good as that one.
        """
        ip = ipaddress.ip_address(address.partition("%")[0])
        for one in (ip, *_embedded(ip)):
            if _within(one, _NEVER):
                raise DestinationRefused("leads to an address that no callback may go to")
            if origin not in self._allowed and _within(one, _PRIVATE):
                raise DestinationRefused(f"leads to a private address: expected {origin} among RESUME_URL_ALLOWED_ORIGINS")


def _checked_origin(url: str) -> str:
    try:
        parts = urlsplit(url)
        origin = origin_of(url)
        (parts.hostname or "").encode("idna")  # as the resolver will: an empty or overlong label is a ValueError
    except ValueError:
        raise DestinationRefused(f"is not an http URL: {_AS_IT_IS}") from None
    if not url.isascii() or any(c <= " " or c == "\x7f" or c == "\\" for c in url):
        raise DestinationRefused(f"has characters that no URL may have: {_AS_IT_IS} as it is")
    if "@" in parts.netloc or "#" in url:
        raise DestinationRefused(f"has a user name or a fragment: {_AS_IT_IS} as it is")
    return origin


def _after_origin(url: str) -> str:
    return url[url.index("//") + 2 + len(urlsplit(url).netloc) :]


def _within(ip: _Address, networks: list[ipaddress.IPv4Network | ipaddress.IPv6Network]) -> bool:
    return any(ip in network for network in networks if network.version == ip.version)


def _embedded(ip: _Address) -> list[ipaddress.IPv4Address]:
    """The IPv4 addresses that an IPv6 address leads to."""
    if isinstance(ip, ipaddress.IPv4Address) or int(ip) <= 1:  # `::` and `::1` are what they are
        return []
    found = [ip.ipv4_mapped] if ip.ipv4_mapped else list(ip.teredo or ())
    return found + [ipaddress.IPv4Address(int(ip) >> shift & 0xFFFFFFFF) for network, shift in _LEADS_TO_IPV4 if ip in network]
