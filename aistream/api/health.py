"""GET /health (should this process be restarted?) and GET /health/ready (should it get traffic?)."""

from __future__ import annotations

from typing import Annotated

import gevent
import msgspec
from flask import Blueprint, Response

from aistream import __version__
from aistream.api import Ok, json_response, parts
from aistream.callback import one_of
from aistream.errors import StoreUnavailable

bp = Blueprint("health", __name__)

#: Seconds that Redis has to answer: less than a balancer's own limit.
PATIENCE = 2.0


class Alive(msgspec.Struct, frozen=True, kw_only=True):
    """The process lives, and which version it is."""

    ok: Ok = True
    status: Annotated[str, one_of("alive")] = "alive"
    version: str


class Readiness(msgspec.Struct, frozen=True):
    """Whether it may get traffic, and else what is missing."""

    ok: bool
    status: Annotated[str, one_of("ready", "not ready")]
    missing: list[Annotated[str, one_of("redis", "draining")]]


@bp.get("/health")
def alive() -> Response:
    """Alive: asks nobody."""
    return json_response(Alive(version=__version__))


@bp.get("/health/ready")
def ready() -> Response:
    """Ready for traffic; 503 names what is missing."""
    missing = []
    try:
        with gevent.Timeout(PATIENCE, StoreUnavailable("no answer in time")):
            parts().store.ping()
    except StoreUnavailable:
        missing.append("redis")
    if parts().background.draining:
        missing.append("draining")
    readiness = Readiness(not missing, "not ready" if missing else "ready", missing)
    return json_response(readiness, 503 if missing else 200)
