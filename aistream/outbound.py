"""The one sender of callbacks: to the origins that are allowed, and to nothing that a URL may try to reach instead.

No redirects, no proxies from the environment, at most 64 KiB of an answer read. The address is checked when it is connected
to, so that a name which resolves differently the second time gains nothing.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import requests
import urllib3
from requests.adapters import HTTPAdapter
from requests.structures import CaseInsensitiveDict
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.util.connection import create_connection

from aistream.callback import Answer

#: Seconds to connect, and between two pieces of the answer: a saturated n8n holds its 200 for a while.
TIMEOUT = (5.0, 30.0)
MAX_ANSWER_BYTES = 64 * 1024

#: Never a callback's goal, whatever is configured: link-local (with the clouds' metadata services), "this network",
#: multicast, and the metadata addresses outside them: AWS over IPv6, Alibaba, Oracle, and link-local through NAT64.
_REFUSED = [
    ipaddress.ip_network(net)
    for net in (
        *("169.254.0.0/16", "fe80::/10", "0.0.0.0/8", "::/128", "224.0.0.0/4", "ff00::/8", "fd00:ec2::/32"),
        *("100.100.100.200/32", "192.0.0.192/32", "64:ff9b::a9fe:0/112"),
    )
]


#: Carries the target past urllib3; never sent.
_TARGET = ":target"


class SendFailed(Exception):
    """No answer came. `sent`: the request was on its way, so that it may have arrived all the same."""

    def __init__(self, reason: str, *, sent: bool) -> None:
        super().__init__(reason)
        self.reason = reason
        self.sent = sent


class ForbiddenAddress(OSError):
    """The name leads to an address that no callback may go to."""


class Outbound:
    """Sends callbacks. Safe to use from many greenlets; connections are kept for the next one."""

    def __init__(self, pool_size: int) -> None:
        # Not blocking: whoever calls bounds the number of senders, and urllib3's blocking pool can deadlock (gevent#1957).
        self._adapter = _Adapter(pool_connections=pool_size, pool_maxsize=pool_size, pool_block=False, max_retries=0)

    def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> Answer:
        """POSTs and gives the answer, whatever its status. Raises SendFailed."""
        # By the adapter itself: a requests.Session would follow redirects, take proxies and passwords from the environment,
        # keep cookies and write the URL anew, all of which a callback must not have.
        asked = requests.PreparedRequest()
        asked.method, asked.url, asked.body = "POST", url, body
        asked.headers = CaseInsensitiveDict({**headers, "Content-Length": str(len(body)), "Accept": "*/*", _TARGET: _target(url)})
        try:
            with self._adapter.send(asked, stream=True, timeout=TIMEOUT) as response:
                return Answer(
                    status=response.status_code,
                    content_type=response.headers.get("Content-Type", ""),
                    body=_beginning(response),
                    retry_after=_seconds(response.headers.get("Retry-After")),
                )
        except requests.ConnectTimeout as error:
            raise SendFailed("connecting timed out", sent=False) from error
        except requests.Timeout as error:
            raise SendFailed("no answer in time", sent=True) from error
        except requests.exceptions.InvalidURL as error:
            raise SendFailed("the address cannot be used", sent=False) from error
        except requests.RequestException as error:
            reason, sent = _what_broke(error)
            raise SendFailed(reason, sent=sent) from error

    def close(self) -> None:
        """Closes the kept connections."""
        self._adapter.close()


def _target(url: str) -> str:
    parts = urlsplit(url)
    return (parts.path or "/") + (f"?{parts.query}" if "?" in url else "")


def _beginning(response: requests.Response) -> str:
    """The first 64 KiB of the answer's body; what cannot be read is as good as empty: the status has arrived."""
    read = b""
    try:
        for piece in response.iter_content(8192):
            read += piece
            if len(read) >= MAX_ANSWER_BYTES:
                break
    except requests.RequestException:
        pass
    return read[:MAX_ANSWER_BYTES].decode("utf-8", "replace")


def _seconds(retry_after: str | None) -> float | None:
    return float(retry_after) if retry_after and retry_after.isascii() and retry_after.isdigit() else None


def _what_broke(error: requests.RequestException) -> tuple[str, bool]:
    cause: Any = error.args[0] if error.args else error
    cause = getattr(cause, "reason", cause)
    if isinstance(cause, urllib3.exceptions.NewConnectionError):
        refused = isinstance(cause.__cause__, ForbiddenAddress)
        return ("the address is not allowed" if refused else "could not connect"), False
    return "the connection broke", True


class _Checked(HTTPConnection):
    """urllib3's connection, which resolves the name and connects only to addresses that are allowed."""

    @property
    def is_connected(self) -> bool:
        """Whether a kept connection is still good: in one system call, where urllib3's poll() goes through gevent's hub."""
        sock: Any = self.sock
        if isinstance(sock, ssl.SSLSocket) or sock is None:
            return super().is_connected
        try:
            sock._sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False  # closed, or bytes that nobody asked for

    def request(self, method: str, url: str, body: Any = None, headers: Any = None, **options: Any) -> None:
        """Sends the target as it was given: urllib3 has written its escapes anew."""
        headers = dict(headers or {})
        super().request(method, headers.pop(_TARGET, url), body, headers, **options)

    def _new_conn(self) -> socket.socket:
        try:
            host = self.host.strip("[]")
            host.encode("idna")  # as the resolver does, where gevent would print what it raises
            found = socket.getaddrinfo(host, self.port, type=socket.SOCK_STREAM)
            error: OSError = OSError("the name has no address")
            for *_, address in found:
                try:
                    check_address(str(address[0]))
                    return create_connection(
                        (str(address[0]), int(address[1])), self.timeout, self.source_address, self.socket_options
                    )
                except OSError as failed:
                    error = failed
            raise error
        except TimeoutError as error:
            raise urllib3.exceptions.ConnectTimeoutError(self, "connecting timed out") from error
        except (OSError, UnicodeError) as error:
            raise urllib3.exceptions.NewConnectionError(self, "could not connect") from error


def check_address(address: str) -> None:
    """Raises ForbiddenAddress for an address that no callback may go to, also in its IPv4-mapped form."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    ip = getattr(ip, "ipv4_mapped", None) or ip
    if any(ip in network for network in _REFUSED if network.version == ip.version):
        raise ForbiddenAddress("this address is not allowed")


class _CheckedTLS(_Checked, HTTPSConnection):
    """HTTPS to a checked address; the certificate is checked against the URL's name."""


class _CheckedHTTPPool(HTTPConnectionPool):
    ConnectionCls = _Checked


class _CheckedHTTPSPool(HTTPSConnectionPool):
    ConnectionCls = _CheckedTLS


class _Adapter(HTTPAdapter):
    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = {"http": _CheckedHTTPPool, "https": _CheckedHTTPSPool}
