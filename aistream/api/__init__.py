"""What all routes share: the parts they work with, request ids, CORS, and problem+json for whatever is not a success."""

from __future__ import annotations

import re
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, cast

import msgspec
from flask import Flask, Response, current_app, g, request
from flask_cors import CORS
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

from aistream import metrics
from aistream.background import Background
from aistream.config import LOOPBACK_ORIGIN, Config
from aistream.delivery import Delivery
from aistream.destination import Destinations
from aistream.errors import Code, NotFound, Problem
from aistream.generation import Generations
from aistream.providers import Providers
from aistream.store import Store
from aistream.telemetry import log as lines
from aistream.tokens import Tokens
from aistream.viewing import Viewing

#: Request ids are taken over only if they are harmless in a log line.
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:+/=-]{1,128}")
#: W3C Trace Context: version 00, the trace's id, the caller's span, flags. Neither id may be all zeros.
_TRACEPARENT = re.compile(r"00-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
#: What METRICS_PORT serves, and what is asked every few seconds for as long as the service lives: its lines are at debug.
_FOR_MACHINES = {"health.alive", "health.ready", "operator.metrics"}
#: For pages is whatever an allowed one may be shown: all but what takes n8n's token or an operator's, which no page should hold.
_FOR_PAGES = r"/(?!(?:init-stream|sessions|callbacks|models|metrics)(?:/|\Z))"

#: What becomes of werkzeug's own errors.
_KNOWN: dict[int, tuple[Code, str]] = {
    404: ("not_found", "Not found"),
    405: ("method_not_allowed", "Method not allowed"),
    413: ("body_too_large", "The request is too large"),
    415: ("unsupported_media_type", "Not JSON"),
}


#: Of every answer that is a success; clients of the original service look at it.
Ok = Annotated[bool, msgspec.Meta(extra_json_schema={"const": True})]
NotOk = Annotated[bool, msgspec.Meta(extra_json_schema={"const": False})]


class FaultyField(msgspec.Struct, frozen=True):
    """A field that cannot be used, and what was expected of it."""

    field: str
    message: str


class ProblemAnswer(msgspec.Struct, frozen=True, kw_only=True, rename={"request_id": "requestId"}):
    """RFC 9457, with `ok: false` for clients of the original service, a stable `code`, and every faulty field by name."""

    ok: NotOk = False
    type: Annotated[str, msgspec.Meta(extra_json_schema={"const": "about:blank"})] = "about:blank"
    title: str
    status: int
    code: str
    detail: str
    request_id: str | None
    errors: list[FaultyField] | msgspec.UnsetType = msgspec.UNSET


@dataclass(frozen=True, slots=True)
class Parts:
    """What the routes of one app work with."""

    config: Config
    store: Store
    providers: Providers
    tokens: Tokens
    destinations: Destinations
    generations: Generations
    viewing: Viewing
    delivery: Delivery
    background: Background


def parts() -> Parts:
    """The parts of the app that serves this request."""
    return cast(Parts, current_app.extensions["aistream"])


def json_response(value: Any, status: int = 200, mimetype: str = "application/json") -> Response:
    """A response that nobody may keep: what we say is about one session or one moment."""
    response = Response(msgspec.json.encode(value), status, mimetype=mimetype)
    response.headers["Cache-Control"] = "no-store"
    return response


def problem(error: Problem) -> Response:
    """What a caller is told of an error."""
    metrics.problem_told(error.code)
    if error.limit:
        metrics.limited(error.limit)
    tell(code=error.code)
    answer = ProblemAnswer(
        title=error.title,
        status=error.status,
        code=error.code,
        detail=error.detail,
        request_id=g.get("request_id"),
        errors=[FaultyField(fault.field, fault.message) for fault in error.faults] or msgspec.UNSET,
    )
    response = json_response(answer, error.status, "application/problem+json")
    response.headers.extend(error.headers)
    return response


def as_page(response: Response) -> Response:
    """The response as a page of our own: whatever it needs comes from here, and nobody frames it."""
    response.headers["Content-Security-Policy"] = "default-src 'self'; base-uri 'none'; frame-ancestors 'none'"
    return response


def tell(**facts: Any) -> None:
    """Adds to this request's line. `event`: its name, in place of request.finished; None where another line tells of it."""
    g.setdefault("facts", {}).update(facts)


def bearer() -> str | None:
    """The token of `Authorization: Bearer …`, if there is one."""
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None


def on_metrics_port() -> bool:
    """Whether this request came in on METRICS_PORT: by the socket it came on, never by what it says of itself."""
    port, sock = parts().config.metrics_port, request.environ.get("gunicorn.socket")
    with suppress(OSError):
        return bool(port and sock and sock.getsockname()[1:2] == (port,))
    return False


def normal_id(session_id: str) -> str:
    """The id as we write it, or `""` for what is none: no other text may become part of a key."""
    try:
        return str(uuid.UUID(session_id))
    except ValueError:
        return ""


def init_app(app: Flask, config: Config) -> None:
    """Gives an app what all its routes share."""
    app.config["MAX_CONTENT_LENGTH"] = config.max_body_bytes
    app.url_map.strict_slashes = False
    app.after_request(_finish_headers)  # the last to look at an answer, since it was the first to be registered
    origins = [*map(re.escape, config.allowed_origins), *([LOOPBACK_ORIGIN] if config.dev_mode else [])]
    CORS(
        app,
        resources=_FOR_PAGES,
        # Compiled, since flask-cors takes a string with brackets (an IPv6 address) for a regular expression.
        origins=[re.compile(rf"{one}\Z", re.IGNORECASE) for one in origins],
        always_send=False,  # who sends no Origin is no page: it is not told the list
        allow_headers=["Authorization", "Cache-Control", "Content-Type", "Last-Event-ID"],
        expose_headers=["Retry-After", "X-Request-ID"],
        methods=["GET", "POST"],
        max_age=600,
    )
    app.before_request(_begin)
    app.teardown_request(_end)
    app.after_request(_write_line)  # runs first: of these the last one does
    app.register_error_handler(Problem, problem)
    app.register_error_handler(HTTPException, _http_error)
    app.register_error_handler(Exception, _unexpected)


def _begin() -> None:
    # gunicorn starts the loops itself, after fork; under `flask run` the first request does.
    g.began = time.monotonic()
    background = parts().background
    background.start()
    background.requests += 1
    given = request.headers.get("X-Request-ID", "")
    g.request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
    traced = _TRACEPARENT.fullmatch(request.headers.get("traceparent", ""))
    if traced:
        tell(trace_id=traced[1])
    if on_metrics_port() and request.endpoint not in _FOR_MACHINES:
        raise NotFound("Not found.")


def _end(_error: BaseException | None) -> None:
    parts().background.requests -= 1


def _finish_headers(response: Response) -> Response:
    route = request.url_rule.rule if request.url_rule else ""
    metrics.request_answered(request.method, route, response.status_code, time.monotonic() - g.get("began", time.monotonic()))
    # The answer depends on who asks, also where the origin was refused or there was none.
    response.vary.add("Origin")
    response.headers["X-Request-ID"] = g.get("request_id", "")
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Referrer-Policy"] = "no-referrer"
    # No other page may embed what it may not read, but for what a route lets everybody embed.
    shared = "Access-Control-Allow-Origin" in response.headers
    response.headers.setdefault("Cross-Origin-Resource-Policy", "cross-origin" if shared else "same-origin")
    return response


def _write_line(response: Response) -> Response:
    """One line for each request, with its route and not its path: what a client wrote there may be anything."""
    facts = {"event": "request.finished", **g.get("facts", {})}
    event = facts.pop("event")
    if event is not None:
        (lines.debug if request.endpoint in _FOR_MACHINES else lines.info)(
            event,
            **facts,
            method=request.method,
            route=request.url_rule and request.url_rule.rule,
            status=response.status_code,
            duration_ms=round((time.monotonic() - g.get("began", time.monotonic())) * 1000, 1),
            request_id=g.get("request_id"),
        )
    return response


def _http_error(error: HTTPException) -> Response:
    status = error.code or 500
    code, title = _KNOWN.get(status, ("invalid_request" if status < 500 else "internal", error.name))
    detail = title + "."
    if isinstance(error, RequestEntityTooLarge):
        detail = f"The body is larger than {current_app.config['MAX_CONTENT_LENGTH']} bytes (MAX_BODY_BYTES)."
    answer = problem(Problem(detail, status=status, code=code, title=title))
    allowed = getattr(error, "valid_methods", None)
    if allowed:
        answer.headers["Allow"] = ", ".join(allowed)
    return answer


def _unexpected(error: Exception) -> Response:
    lines.error("request.broke", route=request.url_rule and request.url_rule.rule, request_id=g.get("request_id"), error=error)
    return problem(Problem("The error was logged under the request's id."))
