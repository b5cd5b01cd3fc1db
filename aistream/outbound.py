"""The one sender of callbacks: to allowed addresses, and to nothing that a URL may try to reach instead.

No redirects, no proxies from the environment, at most 64 KiB of an answer read. The address is checked when it is connected
to, so that a name which resolves differently the second time gains nothing.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Mapping
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import gevent
import requests
import urllib3
from requests.adapters import HTTPAdapter
from requests.structures import CaseInsensitiveDict
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.util.connection import create_connection

from aistream.callback import Answer
from aistream.destination import Destinations
from aistream.errors import DestinationRefused
from aistream.parse import origin_of
from aistream.retry_after import retry_after
from aistream.sockets import PEEK

#: Seconds to connect, and between two pieces of the answer: a saturated n8n holds its 200 for a while.
TIMEOUT = (5.0, 30.0)
MAX_ANSWER_BYTES = 64 * 1024
#: Seconds to read that: whatever it says, the status is known by then.
READING = 5.0

#: Carries the target past urllib3; never sent.
_TARGET = ":target"


class SendFailed(Exception):
    """No answer came. `sent`: the request was on its way, so that it may have arrived all the same."""

    def __init__(self, reason: str, *, sent: bool) -> None:
        super().__init__(reason)
        self.reason = reason
        self.sent = sent


class Outbound:
    """Sends callbacks. Safe to use from many greenlets; connections are kept for the next one."""

    def __init__(self, destinations: Destinations, pool_size: int) -> None:
        # Not blocking: whoever calls bounds the number of senders, and urllib3's blocking pool can deadlock (gevent#1957).
        self._adapter = HTTPAdapter(pool_connections=pool_size, pool_maxsize=pool_size, pool_block=False, max_retries=0)
        self._adapter.poolmanager.pool_classes_by_scheme = {
            "http": partial(_CheckedHTTPPool, destinations),
            "https": partial(_CheckedHTTPSPool, destinations),
        }

    def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> Answer:
        """POSTs and gives the answer, whatever its status. Raises SendFailed, and DestinationRefused for a bad address."""
        # By the adapter itself: a requests.Session would follow redirects, take proxies and passwords from the environment,
        # keep cookies and write the URL anew, all of which a callback must not have.
        asked = requests.PreparedRequest()
        asked.method, asked.url, asked.body = "POST", url, body
        asked.headers = CaseInsensitiveDict({**headers, "Content-Length": str(len(body)), "Accept": "*/*", _TARGET: _target(url)})
        try:
            with self._adapter.send(asked, stream=True, timeout=TIMEOUT) as response:
                said, broken = _beginning(response)
                return Answer(
                    status=response.status_code,
                    content_type=response.headers.get("Content-Type", ""),
                    body=said,
                    retry_after=retry_after(response.headers.get("Retry-After"), time.time()),
                    broken=broken,
                )
        except requests.ConnectTimeout as error:
            raise SendFailed("connecting timed out", sent=False) from error
        except requests.Timeout as error:
            raise SendFailed("no answer in time", sent=True) from error
        except requests.exceptions.InvalidURL as error:
            raise SendFailed("the address cannot be used", sent=False) from error
        except requests.RequestException as error:
            cause = _cause(error)
            if isinstance(cause.__cause__, DestinationRefused):
                raise cause.__cause__ from error
            unsent = isinstance(cause, urllib3.exceptions.NewConnectionError)
            raise SendFailed("could not connect" if unsent else "the connection broke", sent=not unsent) from error

    def close(self) -> None:
        """Closes the kept connections."""
        self._adapter.close()


def _target(url: str) -> str:
    parts = urlsplit(url)
    return (parts.path or "/") + (f"?{parts.query}" if "?" in url else "")


def _beginning(response: requests.Response) -> tuple[str, bool]:
    """The first 64 KiB of the answer's body, and whether it broke off before that. Its status has arrived in any case."""
    read, broken = b"", True
    timer = gevent.Timeout.start_new(READING)
    try:
        for piece in response.iter_content(1024):
            read += piece
            if len(read) >= MAX_ANSWER_BYTES:
                break
        broken = False
    except requests.RequestException:
        pass
    except gevent.Timeout as over:
        if over is not timer:
            raise
    finally:
        timer.close()
    return read[:MAX_ANSWER_BYTES].decode("utf-8", "replace"), broken


def _cause(error: requests.RequestException) -> BaseException:
    cause: Any = error.args[0] if error.args else error
    cause = getattr(cause, "reason", cause)
    return cause if isinstance(cause, BaseException) else error


class _Checked(HTTPConnection):
    """urllib3's connection, which resolves the name and connects only to addresses that are allowed."""

    scheme = "http"

    def __init__(self, destinations: Destinations, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._destinations = destinations

    @property
    def is_connected(self) -> bool:
        """Whether a kept connection is still good: in one system call, where urllib3's poll() goes through gevent's hub."""
        sock: Any = self.sock
        if isinstance(sock, ssl.SSLSocket) or sock is None:
            return super().is_connected
        try:
            sock._sock.recv(1, PEEK)
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
            origin = origin_of(f"{self.scheme}://{f'[{host}]' if ':' in host else host}:{self.port}")
            error: Exception = OSError("the name has no address")
            for *_, address in found:
                try:
                    self._destinations.check_address(str(address[0]), origin)
                    return create_connection(
                        (str(address[0]), int(address[1])), self.timeout, self.source_address, self.socket_options
                    )
                except (OSError, DestinationRefused) as failed:
                    error = failed
            raise error
        except TimeoutError as error:
            raise urllib3.exceptions.ConnectTimeoutError(self, "connecting timed out") from error
        except (OSError, UnicodeError, DestinationRefused) as error:
            raise urllib3.exceptions.NewConnectionError(self, "could not connect") from error


class _CheckedTLS(_Checked, HTTPSConnection):
    """HTTPS to a checked address; the certificate is checked against the URL's name."""

    scheme = "https"


class _CheckedHTTPPool(HTTPConnectionPool):
    def __init__(self, destinations: Destinations, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ConnectionCls = partial(_Checked, destinations)  # type: ignore[assignment]  # called, and nothing else


class _CheckedHTTPSPool(HTTPSConnectionPool):
    def __init__(self, destinations: Destinations, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ConnectionCls = partial(_CheckedTLS, destinations)  # type: ignore[assignment]
