"""How another server is reached, step by step, so that a failure can be told by its step: name, connection, TLS, HTTP.

No proxies, no redirects. Errors are told in words, and never with a URL's query.
"""

from __future__ import annotations

import http.client
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from email.utils import parsedate_to_datetime
from typing import NamedTuple
from urllib.parse import urlsplit

import gevent

from aistream.errors import AistreamError

#: Seconds for each step.
TIMEOUT = 5.0
MAX_BODY = 65_536


class Unreachable(Exception):
    """The step that failed, in words, and what mends it."""

    def __init__(self, found: str, mend: str) -> None:
        super().__init__(found)
        self.found = found
        self.mend = mend


class Answer(NamedTuple):
    """An HTTP answer; header names in lower case. `address`: who gave it; `ahead`: by how many seconds its Date is."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    address: str
    ahead: float | None


def addresses(host: str, port: int) -> list[str]:
    """What the name leads to. Raises Unreachable."""
    over = gevent.Timeout(TIMEOUT)
    try:
        with over:
            host.encode("idna")
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except gevent.Timeout as timeout:
        if timeout is not over:
            raise
        raise Unreachable(
            f"the name {host} is not resolved within {TIMEOUT:g} s", "look at the DNS servers of this machine"
        ) from None
    except (OSError, UnicodeError):
        raise Unreachable(
            f"the name {host} has no address", "correct the name, or the DNS of this machine or container"
        ) from None
    return list(dict.fromkeys(str(one[4][0]) for one in found))


def connect(host: str, port: int, allowed: Callable[[str], object] = lambda _: None) -> tuple[socket.socket, str]:
    """A connection to the first address that takes one, and that address. `allowed` raises for those that are none."""
    refused: AistreamError | Unreachable = Unreachable(
        f"the name {host} has no address", "correct the name, or this machine's DNS"
    )
    for address in addresses(host, port):
        try:
            allowed(address)
            return socket.create_connection((address, port), TIMEOUT), address
        except OSError as error:
            refused = _unconnected(error, host, port)
        except AistreamError as error:
            refused = error
    raise refused


def _unconnected(error: OSError, host: str, port: int) -> Unreachable:
    where = f"{host}:{port}"
    if isinstance(error, TimeoutError):
        return Unreachable(f"{where} takes no connection within {TIMEOUT:g} s", "look at firewalls and networks in between")
    if isinstance(error, ConnectionRefusedError):
        return Unreachable(f"{where} refuses connections", "start what should listen there, or correct the address")
    return Unreachable(
        f"{where} cannot be reached: {error.strerror or 'no connection'}", "look at routes and networks in between"
    )


def secured(sock: socket.socket, host: str, context: ssl.SSLContext, trust: str) -> ssl.SSLSocket:
    """TLS over a connection. `trust`: what mends a certificate that is not trusted. Raises Unreachable, and closes then."""
    try:
        return context.wrap_socket(sock, server_hostname=host)
    except ssl.SSLCertVerificationError as error:
        sock.close()
        raise Unreachable(f"the certificate of {host} is not accepted: {error.verify_message}", trust) from None
    except (ssl.SSLError, OSError) as error:
        sock.close()
        said = getattr(error, "reason", None) or "no handshake"
        raise Unreachable(f"{host} does not speak TLS as expected: {said}", "correct http:// or https://, or the port") from None


def ask(
    url: str,
    *,
    method: str = "GET",
    headers: Mapping[str, str] | None = None,
    context: ssl.SSLContext | None = None,
    trust: str = "",
    allowed: Callable[[str], object] = lambda _: None,
) -> Answer:
    """The answer to one request, whatever its status. Raises Unreachable, and whatever `allowed` raises."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    tls = parts.scheme == "https"
    port = parts.port or (443 if tls else 80)
    sock, address = connect(host, port, allowed)
    if tls:
        sock = secured(sock, host, context or ssl.create_default_context(), trust)
    line = http.client.HTTPConnection(host, parts.port or port, timeout=TIMEOUT)
    line.sock = sock
    over = gevent.Timeout(TIMEOUT)
    try:
        with over:
            asked_at = time.time()
            host_header = parts.netloc.rpartition("@")[2]
            own = {"Host": host_header, "User-Agent": "Mozilla/5.0 (compatible; aistream-doctor)", "Accept": "*/*"}
            line.putrequest(method, (parts.path or "/") + (f"?{parts.query}" if parts.query else ""), True, True)
            for name, value in {**own, **(headers or {})}.items():
                line.putheader(name, value)
            line.endheaders()
            response = line.getresponse()
            answered_at = time.time()
            body = response.read(MAX_BODY)
    except (gevent.Timeout, TimeoutError) as error:
        if isinstance(error, gevent.Timeout) and error is not over:
            raise
        raise Unreachable(
            f"{host}:{port} does not answer within {TIMEOUT:g} s", "look at whether it is overloaded or hangs"
        ) from None
    except (http.client.HTTPException, OSError, ValueError):
        raise Unreachable(
            f"what answers at {host}:{port} does not speak HTTP", "correct http:// or https://, or the port"
        ) from None
    finally:
        line.close()
    told = {name.lower(): value for name, value in response.getheaders()}
    return Answer(response.status, told, body, address, ahead(told.get("date", ""), asked_at, answered_at))


def ahead(date: str, asked_at: float, answered_at: float) -> float | None:
    """By how many seconds this Date is ahead of our clock; None where it is none. It has whole seconds, cut off."""
    try:
        at = parsedate_to_datetime(date).timestamp()
    except (ValueError, TypeError, IndexError):
        return None
    # Exact to a second: anything between the question and the answer is no difference.
    if asked_at - 1 <= at <= answered_at:
        return 0.0
    return at + 0.5 - (asked_at + answered_at) / 2
