"""What became of a session and of its callback, for workflows and for people; and the metrics.

With n8n's own token in the header: a token's `sub` sees what it started, and nothing else exists for it.
"""

from __future__ import annotations

import hmac
import re
from contextlib import suppress
from typing import Annotated, Any

import gevent
import msgspec
from flask import Blueprint, Response, request

from aistream.api import Ok, bearer, json_response, normal_id, on_metrics_port, parts, tell
from aistream.callback import Description, description, one_of
from aistream.config import Config
from aistream.endpoints import Defaults
from aistream.errors import Code, Conflict, Fault, InvalidRequest, NotFound, StoreUnavailable, Unauthorized
from aistream.metrics import exposition
from aistream.outbox import Redelivery
from aistream.providers import Listing
from aistream.session import Counts
from aistream.tokens import Caller

bp = Blueprint("operator", __name__)

#: Most callbacks of one page.
MAX_LIMIT = 1_000
#: Seconds that the store has to answer a scrape: less than Prometheus waits by itself (10).
PATIENCE = 2.0
#: A cursor of such a page: when the callback became what it is, and its session.
AFTER = re.compile(r"([0-9]{1,15})-([0-9a-f-]{36})")

_NOT_REDELIVERED: dict[Redelivery, tuple[Code, str]] = {
    "not_ended": ("not_ended", "The session has not ended yet: its callback follows the ending."),
    "delivered": (
        "already_delivered",
        "The callback has been delivered. A second one could resume another Wait node of the same execution.",
    ),
    "gone": ("content_gone", "The answer is no longer kept, so there is nothing left to deliver."),
}


class SessionAnswer(Description, frozen=True, kw_only=True):
    """A session as its owner may look at it: never prompt, answer or resumeUrl."""

    ok: Ok = True


class CallbacksAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """A page of callbacks. `next`: what to give as `after` for the page behind it; it may be there with a short or empty page."""

    ok: Ok = True
    callbacks: list[Description]
    next: str | None


class RedeliveryAnswer(msgspec.Struct, frozen=True, kw_only=True, rename={"stream_id": "streamId"}):
    """The callback is due now, with its whole schedule before it."""

    ok: Ok = True
    stream_id: str
    callback: Annotated[str, one_of("owed")] = "owed"


class ModelOffer(msgspec.Struct, frozen=True):
    """A model. `id`: what an init names; `model`: what the provider calls it."""

    id: str
    provider: str
    model: str


class ProviderState(msgspec.Struct, frozen=True):
    """How a provider stands. `configured`: its key is there; `error`: the code of why it could not be asked for its models."""

    name: str
    configured: bool
    error: str | None
    defaults: dict[str, Any]
    limits: dict[str, Any]


class ModelsAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What an init may name as its model. `default`: what it gets that names none."""

    ok: Ok = True
    default: str
    models: list[ModelOffer]
    providers: list[ProviderState]


@bp.get("/sessions/<session_id>")
def session(session_id: str) -> Response:
    """State, times, tokens, and the callback with its attempts. Never prompt, answer or resumeUrl."""
    caller = _caller()
    record = parts().store.outbox.record(normal_id(session_id))
    if record is None or record.subject != caller.subject:
        raise NotFound("There is no such session, or it is no longer kept.")
    tell(session=record.id)
    return json_response(SessionAnswer(**msgspec.structs.asdict(description(record))))


@bp.get("/callbacks")
def callbacks() -> Response:
    """The caller's callbacks that are owed or dead, oldest first, a page at a time."""
    caller = _caller()
    faults = []
    state, limit, after = request.args.get("state"), request.args.get("limit", "100"), request.args.get("after")
    if state not in ("owed", "dead"):
        faults.append(Fault("state", "expected owed or dead"))
    if not re.fullmatch(r"[0-9]{1,4}", limit) or not 1 <= int(limit) <= MAX_LIMIT:
        faults.append(Fault("limit", f"expected a whole number from 1 to {MAX_LIMIT}"))
    cursor = AFTER.fullmatch(after) if after else None
    if after and not cursor:
        faults.append(Fault("after", "expected next of the page before"))
    if faults:
        raise InvalidRequest.naming(*faults)
    page = parts().store.outbox.callbacks(
        "dead" if state == "dead" else "owed",
        caller.subject,
        (int(cursor[1]), cursor[2]) if cursor else None,
        int(limit),
    )
    following = f"{page.after[0]}-{page.after[1]}" if page.after else None
    return json_response(CallbacksAnswer(callbacks=[description(record) for record in page.callbacks], next=following))


@bp.post("/callbacks/<session_id>/redeliver")
def redeliver(session_id: str) -> Response:
    """Has a dead callback, or one that is still owed, attempted now, with its whole schedule before it. Idempotent."""
    caller = _caller()
    session_id = normal_id(session_id)
    outcome = parts().store.outbox.redeliver(session_id, caller.subject)
    if outcome == "missing":
        raise NotFound("There is no such session, or it is no longer kept.")
    if outcome in _NOT_REDELIVERED:
        code, detail = _NOT_REDELIVERED[outcome]
        raise Conflict(detail, code=code)
    tell(event="callback.redelivered", session=session_id, found=outcome)
    record = parts().store.outbox.record(session_id)
    if record is not None and record.callback is not None:
        parts().delivery.wake(session_id, record.callback.origin)
    return json_response(RedeliveryAnswer(stream_id=session_id), 202)


@bp.get("/models")
def models() -> Response:
    """What an init may name as its model: of every provider what MODELS_FILE names, else what its server lists."""
    _caller()
    listings = parts().providers.listing()
    return json_response(
        ModelsAnswer(
            default=parts().config.default_model,
            models=[ModelOffer(name, listing.endpoint.name, model) for listing in listings for name, model in listing.routes],
            providers=[_provider(listing) for listing in listings],
        )
    )


def _provider(listing: Listing) -> ProviderState:
    """How a provider stands. Its address is the operator's own business."""
    endpoint = listing.endpoint
    return ProviderState(
        name=endpoint.name,
        configured=listing.usable,
        error=listing.error or None,
        defaults=endpoint.defaults.model_dump(include=set(Defaults.model_fields), exclude_none=True),
        limits=endpoint.limits.model_dump(exclude_none=True),
    )


@bp.get("/metrics")
def metrics() -> Response:
    """For Prometheus. All workers' counts, whichever of them is asked; without the store's own where that is away."""
    if not on_metrics_port():
        _allow_scrape(parts().config)
    counts: Counts | None = None
    with suppress(StoreUnavailable), gevent.Timeout(PATIENCE, StoreUnavailable("no answer in time")):
        counts = parts().store.outbox.counts()
    meter = parts().background.meter
    meter.note()  # of this worker the newest
    text, content_type = exposition(counts, meter.facts)
    response = Response(text, content_type=content_type)
    response.headers["Cache-Control"] = "no-store"
    return response


def _allow_scrape(config: Config) -> None:
    if not config.metrics_token and not config.dev_mode:
        raise NotFound("Metrics are switched off here: METRICS_TOKEN is not set.")
    given = bearer() or ""
    if config.metrics_token and not hmac.compare_digest(given.encode(), config.metrics_token.encode()):
        code: Code = "token_wrong_kind" if given else "token_missing"
        raise Unauthorized("Expected METRICS_TOKEN in the header Authorization: Bearer.", code=code)


def _caller() -> Caller:
    return parts().tokens.verify_caller(bearer())
