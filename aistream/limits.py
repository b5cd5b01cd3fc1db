"""Who may ask how much: rates of inits, failed tokens by address, and the client's address itself.

An init's rates are counted in the step that creates its session (`lua/create.lua`): no round trip of their own, and nothing that
could be away by itself. Flask-Limiter, on a storage that costs nothing, takes more CPU than all of that: docs/security.md has
the difference. Failed tokens are counted in this process: a flood of them must not become one of questions to Redis.
"""

from __future__ import annotations

import hashlib
import ipaddress
import math
import time
from functools import partial
from typing import Any

from flask import Flask, Response, g, request
from werkzeug.middleware.proxy_fix import ProxyFix

from aistream.api import problem
from aistream.config import Config
from aistream.errors import Limited, Unauthorized
from aistream.session import Quota, Quotas

#: Addresses whose failures a worker remembers at most. Beyond that the one that has failed least lately is forgotten.
ADDRESSES = 10_000


def init_app(app: Flask, config: Config) -> None:
    """Gives an app its limits, and the address of the client behind so many proxies as are trusted."""
    if config.trusted_proxies:
        trusted = ProxyFix(app.wsgi_app, x_for=config.trusted_proxies, x_proto=0, x_host=0, x_port=0, x_prefix=0)
        app.wsgi_app = trusted  # type: ignore[method-assign]  # Flask's documented way
    if config.unauthorized_rate_limit:
        app.register_error_handler(Unauthorized, partial(_unauthorized, Failures(*config.unauthorized_rate_limit)))
    app.after_request(_tell_quotas)


def quotas(config: Config, subject: str, user_id: Any) -> Quotas:
    """What an init of this caller counts against. They are told in the answer to the request at hand, whatever it comes to."""
    of = []
    if config.init_rate_limit:
        of.append(Quota("init", _digest(subject, ""), *config.init_rate_limit))
    if config.user_rate_limit and user_id not in (None, ""):
        of.append(Quota("user", _digest(subject, str(user_id)), *config.user_rate_limit))
    counted = g.quotas = Quotas(*of)
    return counted


class Failures:
    """Counts failures by address. Not safe across threads; greenlets are fine."""

    def __init__(self, amount: int, seconds: int) -> None:
        """More than `amount` within `seconds`, from the first on, are too many."""
        self._amount = amount
        self._window = seconds
        #: By address: how many, and when their window ends. In the order of their last failure.
        self._seen: dict[str, tuple[int, float]] = {}

    def __len__(self) -> int:
        return len(self._seen)

    def count(self, address: str, now: float) -> float:
        """Notes one more. Gives the seconds for which the address has failed too often, 0 where it has not. `now`: seconds."""
        network = network_of(address)
        failed, until = self._seen.pop(network, (0, 0.0))
        if now >= until:
            failed, until = 0, now + self._window
        if len(self._seen) >= ADDRESSES:
            del self._seen[next(iter(self._seen))]
        self._seen[network] = failed + 1, until
        return until - now if failed >= self._amount else 0.0


def network_of(address: str) -> str:
    """Whom an address stands for: of IPv6 the /64, of which every customer has a whole one."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:  # whatever a proxy has put there
        return address[:64]
    if isinstance(parsed, ipaddress.IPv4Address):
        return address
    if parsed.ipv4_mapped:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.IPv6Address(int(parsed) >> 64 << 64))


def _unauthorized(failures: Failures, error: Unauthorized) -> Response:
    wait = failures.count(request.remote_addr or "", time.monotonic())
    if not wait:
        return problem(error)
    detail = "There were too many requests with a missing or bad token from this address (UNAUTHORIZED_RATE_LIMIT)."
    return problem(Limited(detail, limit="unauthorized", retry_after=wait))


def _tell_quotas(response: Response) -> Response:
    """The header fields of draft-ietf-httpapi-ratelimit-headers-11."""
    told: Quotas | None = g.get("quotas")
    if told is not None and told.left:
        policies = [f'"{of.name}";q={of.amount};w={of.seconds}' for of in told.of]
        standing = [
            f'"{of.name}";r={left.amount};t={math.ceil(left.seconds)}' for of, left in zip(told.of, told.left, strict=True)
        ]
        response.headers.add("RateLimit-Policy", ", ".join(policies))
        response.headers.add("RateLimit", ", ".join(standing))
    return response


def _digest(subject: str, user: str) -> str:
    return hashlib.sha256(f"{len(subject)} {subject}{user}".encode()).hexdigest()[:32]
