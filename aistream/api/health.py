"""GET /health (should this process be restarted?) and GET /health/ready (should it get traffic?)."""

from __future__ import annotations

import gevent
from flask import Blueprint, Response

from aistream import __version__
from aistream.api import json_response, parts
from aistream.errors import StoreUnavailable

bp = Blueprint("health", __name__)

#: Seconds that Redis has to answer: less than a balancer's own limit.
PATIENCE = 2.0


@bp.get("/health")
def alive() -> Response:
    """Alive: asks nobody."""
    return json_response({"ok": True, "status": "alive", "version": __version__})


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
    return json_response(
        {"ok": not missing, "status": "not ready" if missing else "ready", "missing": missing}, 503 if missing else 200
    )
