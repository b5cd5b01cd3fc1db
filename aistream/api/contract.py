"""What the routes of the API promise, beside what their models say: who may call them, and what may come of it.

Tables only; `openapi` makes the document of them. A new code is a line in `errors.Code`, and one in `CODES`. Tests hold the
tables against the routes and the codes, and the document against thousands of generated requests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from aistream.api import client, health, init, operator, stream
from aistream.callback import USER_AGENT
from aistream.errors import Code

Json = dict[str, Any]

#: The operations that each kind of token opens.
_CALLER = ("initStream", "getSession", "listCallbacks", "redeliverCallback", "listModels")
_VIEWER = ("watchStream", "cancelStream")
_STORED = ("initStream", *_VIEWER, "getSession", "listCallbacks", "redeliverCallback", "getMetrics")


class Refusal(NamedTuple):
    """What a code says. `where`: the operations that it may come from; empty: none of the documented ones."""

    status: int
    where: tuple[str, ...]
    meaning: str


#: Every one there is; docs/http.md has the same with their statuses.
CODES: dict[Code, Refusal] = {
    "invalid_json": Refusal(400, ("initStream",), "the body is not a JSON object"),
    "invalid_request": Refusal(400, ("initStream", "listCallbacks"), "fields that cannot be used, each named in `errors`"),
    "malformed_http": Refusal(400, (), "the request is no HTTP, or its body has no end"),
    "unknown_model": Refusal(400, ("initStream",), "no provider serves this model"),
    "provider_not_configured": Refusal(400, ("initStream",), "the model's provider has no key"),
    "token_missing": Refusal(401, (*_CALLER, *_VIEWER, "getMetrics"), "there is no token"),
    "token_malformed": Refusal(401, (*_CALLER, *_VIEWER), "not a JWT, or a claim of the wrong type"),
    "token_expired": Refusal(401, (*_CALLER, *_VIEWER), "`exp` lies in the past"),
    "token_unsigned": Refusal(401, (*_CALLER, *_VIEWER), "`alg` is `none`"),
    "token_algorithm": Refusal(401, (*_CALLER, *_VIEWER), "another algorithm than the configured one"),
    "token_signature": Refusal(401, (*_CALLER, *_VIEWER), "signed with another secret"),
    "token_claim_missing": Refusal(401, (*_CALLER, *_VIEWER), "a required claim is not there"),
    "token_lifetime": Refusal(401, _CALLER, "`exp` lies further ahead than `JWT_MAX_LIFETIME_SECONDS`"),
    "token_not_yet_valid": Refusal(401, (*_CALLER, *_VIEWER), "`nbf` or `iat` lies in the future"),
    "token_audience": Refusal(401, (*_CALLER, *_VIEWER), "another `aud` than the configured one"),
    "token_issuer": Refusal(401, (*_CALLER, *_VIEWER), "another `iss` than the configured one"),
    "token_wrong_kind": Refusal(401, (*_CALLER, *_VIEWER, "getMetrics"), "a token for something else"),
    "not_found": Refusal(
        404,
        (*_VIEWER, "getSession", "redeliverCallback", "getMetrics"),
        "there is no such thing, or it belongs to somebody else",
    ),
    "method_not_allowed": Refusal(405, (), "the header `Allow` names the methods there are"),
    "request_timeout": Refusal(408, ("initStream",), "the body did not come within `REQUEST_SECONDS`"),
    "already_delivered": Refusal(409, ("redeliverCallback",), "the callback has arrived"),
    "not_ended": Refusal(409, ("redeliverCallback",), "the session has not ended yet"),
    "content_gone": Refusal(409, ("redeliverCallback",), "the answer is no longer kept"),
    "replay_over": Refusal(410, ("watchStream",), "the answer is complete and no longer kept for replay"),
    "session_lost": Refusal(410, ("watchStream",), "the session was lost together with the server that ran it"),
    "log_lost": Refusal(410, ("watchStream",), "a part of the answer was lost with its server"),
    "body_too_large": Refusal(413, ("initStream",), "larger than `MAX_BODY_BYTES`"),
    "address_too_long": Refusal(414, (), "more than 4,094 bytes of request line"),
    "unsupported_media_type": Refusal(415, ("initStream",), "the body is not JSON"),
    "expectation_failed": Refusal(417, (), "an `Expect` other than `100-continue`"),
    "idempotency_key_reused": Refusal(422, ("initStream",), "this `Idempotency-Key` was used for another request"),
    "rate_limited": Refusal(
        429,
        (*_CALLER, *_VIEWER, "getMetrics"),
        "more inits than a quota allows, or too many missing or bad tokens from this address",
    ),
    "too_many_pending": Refusal(429, ("initStream",), "more sessions of this `sub` wait for a viewer than may"),
    "too_many_viewers": Refusal(429, ("watchStream",), "as many viewers as there may be"),
    "head_too_large": Refusal(431, (), "more header fields, or longer ones, than are read"),
    "internal": Refusal(500, (), "our fault: it is in the log, under the `requestId`"),
    "transfer_coding_unknown": Refusal(501, (), "a transfer coding other than `chunked`"),
    "store_unavailable": Refusal(503, _STORED, "Redis cannot be asked now"),
    "overloaded": Refusal(503, ("initStream", "watchStream"), "this server has as much to do as it can carry"),
    "draining": Refusal(503, ("watchStream",), "to a balancer that has said by `X-Retry-Elsewhere` that it asks another worker"),
}


class Answer(NamedTuple):
    """A success of an operation. `model`: the type of its JSON, or the media type and schema of what is none."""

    text: str
    model: type | tuple[str, Json] | None = None
    headers: tuple[str, ...] = ()


class Operation(NamedTuple):
    """One route. Its description is the docstring of its view."""

    name: str
    route: str
    view: Callable[..., Any]
    tag: str
    summary: str
    answers: Mapping[int, Answer]
    parameters: tuple[str, ...] = ()
    security: tuple[str, ...] = ()
    more: str = ""


#: One event of a stream: 3.1 has no way to say that there are many (3.2's `itemSchema`), and tools take it so.
_EVENT: Json = {
    "type": "object",
    "description": "One event. Its `data` in JSON mode is that of `StreamEvent`.",
    "properties": {
        "id": {"type": "string", "description": "To come back with, as `Last-Event-ID`."},
        "event": {"type": "string", "enum": ["message", "error"]},
        "data": {"type": "string"},
        "retry": {"type": "integer"},
    },
    "required": ["data"],
}
_STREAM = """Text mode, the default, is what an `EventSource` with `onmessage` needs: the pieces of the answer, then `[DONE]`. \
JSON mode (`format=json`) has an object per event (schema StreamEvent), then `[DONE]`. A failure is `event: error` with `code`, \
`message` and `retryable`, and no `[DONE]`. Heartbeats are comments.

With `Accept: text/event-stream` a refusal that a person should see (410, 429, 503) is a 200 with `event: error`: a browser \
shows no other answer's body."""
_TEXT: Json = {"type": "string"}
_CODE = Answer("JavaScript", ("text/javascript", _TEXT), ("ETag",))

OPERATIONS = (
    Operation(
        "initStream",
        "POST /init-stream",
        init.init_stream,
        "Workflow",
        "Ask for an answer",
        {200: Answer("The address of the stream", init.InitAnswer, ("Idempotent-Replayed", "RateLimit", "RateLimit-Policy"))},
        ("IdempotencyKey",),
        ("n8nToken", ""),
    ),
    Operation(
        "watchStream",
        "GET /stream/{id}",
        stream.watch,
        "Browser",
        "Watch the answer being written",
        {
            200: Answer("Server-Sent Events", ("text/event-stream", _EVENT)),
            204: Answer("The viewer has seen the ending: an `EventSource` stops"),
        },
        ("id", "format", "last_event_id", "LastEventId"),
        ("viewerToken", "viewerTokenInUrl"),
        _STREAM,
    ),
    Operation(
        "cancelStream",
        "POST /stream/{id}/cancel",
        stream.cancel,
        "Browser",
        "Stop the answer",
        {
            200: Answer("It has ended", stream.CancelAnswer),
            202: Answer("It runs, and its ending follows", stream.CancelAnswer),
        },
        ("id",),
        ("viewerToken", "viewerTokenInUrl"),
    ),
    Operation(
        "getScript",
        "GET /aistream.js",
        client.script,
        "Browser",
        "Load the client as a script",
        {200: _CODE},
    ),
    Operation(
        "getModule",
        "GET /aistream.mjs",
        client.module,
        "Browser",
        "Load the client as a module",
        {200: _CODE},
    ),
    Operation(
        "getSession",
        "GET /sessions/{id}",
        operator.session,
        "Workflow",
        "See what became of a session",
        {200: Answer("The session", operator.SessionAnswer)},
        ("id",),
        ("n8nToken",),
    ),
    Operation(
        "listCallbacks",
        "GET /callbacks",
        operator.callbacks,
        "Workflow",
        "List callbacks that are owed or dead",
        {200: Answer("A page of callbacks", operator.CallbacksAnswer)},
        ("state", "limit", "after"),
        ("n8nToken",),
    ),
    Operation(
        "redeliverCallback",
        "POST /callbacks/{id}/redeliver",
        operator.redeliver,
        "Workflow",
        "Have a callback delivered again",
        {202: Answer("It is due now", operator.RedeliveryAnswer)},
        ("id",),
        ("n8nToken",),
    ),
    Operation(
        "listModels",
        "GET /models",
        operator.models,
        "Workflow",
        "List the models there are",
        {200: Answer("Models and providers", operator.ModelsAnswer)},
        (),
        ("n8nToken",),
    ),
    Operation(
        "getMetrics",
        "GET /metrics",
        operator.metrics,
        "Operator",
        "Read the metrics",
        {200: Answer("In Prometheus' text format", ("text/plain", _TEXT))},
        (),
        ("metricsToken", ""),
        "404 without `METRICS_TOKEN`; in DEV_MODE open without it.",
    ),
    Operation(
        "getHealth",
        "GET /health",
        health.alive,
        "Operator",
        "Should this process be restarted?",
        {200: Answer("It lives", health.Alive)},
    ),
    Operation(
        "getReadiness",
        "GET /health/ready",
        health.ready,
        "Operator",
        "Should it get traffic?",
        {200: Answer("It should", health.Readiness), 503: Answer("It should not", health.Readiness)},
    ),
)


def _parameter(name: str, place: str, text: str, schema: Json, *, required: bool = False) -> Json:
    return {"name": name, "in": place, "required": required, "description": text, "schema": schema}


PARAMETERS = {
    "id": _parameter(
        "id", "path", "The session's id: `streamId` of the init.", {"type": "string", "format": "uuid"}, required=True
    ),
    "format": _parameter("format", "query", "`json` for JSON mode; whatever else is text mode.", {"type": "string"}),
    "last_event_id": _parameter(
        "last_event_id", "query", "As the header `Last-Event-ID`, which wins: for clients that cannot set it.", {"type": "string"}
    ),
    "LastEventId": _parameter(
        "Last-Event-ID",
        "header",
        "The id of the last event seen, `<number>-<number>`: the stream goes on behind it. Whatever else counts as none.",
        {"type": "string"},
    ),
    "state": _parameter("state", "query", "Which callbacks.", {"type": "string", "enum": ["owed", "dead"]}, required=True),
    "limit": _parameter(
        "limit",
        "query",
        "Most callbacks of the page.",
        {"type": "integer", "minimum": 1, "maximum": operator.MAX_LIMIT, "default": 100},
    ),
    "after": _parameter(
        "after", "query", "`next` of the page before.", {"type": "string", "pattern": f"^({operator.AFTER.pattern})?$"}
    ),
    "IdempotencyKey": _parameter(
        "Idempotency-Key",
        "header",
        "Makes it safe to say again: for the same `sub` and body the answer is the same stream, with a fresh token.",
        {"type": "string", "minLength": 1, "maxLength": init.MAX_KEY_CHARS, "pattern": f"^{init.KEY.pattern}$"},
    ),
    "RequestId": _parameter(
        "X-Request-ID", "header", "Taken over into the answer and the log, if a log line can bear it.", {"type": "string"}
    ),
}


def _header(text: str, schema: Json, *, required: bool = True) -> Json:
    return {"description": text, "required": required, "schema": schema}


HEADERS = {
    "X-Request-ID": _header("The request's own id if it had one, or a new one.", {"type": "string"}),
    "Retry-After": _header("Seconds to wait.", {"type": "integer", "minimum": 0}),
    "RateLimit": _header(
        'What is left of each quota, and the seconds until it is whole again: `"init";r=11;t=30`. Not where an `Idempotency-Key` '
        "had begun the stream before.",
        _TEXT,
        required=False,
    ),
    "RateLimit-Policy": _header('The quotas: `"init";q=12;w=60` (draft-ietf-httpapi-ratelimit-headers).', _TEXT, required=False),
    "ETag": _header("Of the content, for `If-None-Match`: who has it gets 304.", _TEXT),
    "WWW-Authenticate": _header("RFC 6750.", {"type": "string", "pattern": "^Bearer"}),
    "Idempotent-Replayed": _header(
        "`true` where the `Idempotency-Key` had begun the stream before.", {"type": "string", "const": "true"}, required=False
    ),
}
#: What must come with a refusal of this status.
REQUIRED_HEADERS = {401: "WWW-Authenticate", 429: "Retry-After", 503: "Retry-After"}

WEBHOOK_HEADERS = [
    _parameter(name, "header", text, {"type": "string"}, required=required)
    for name, required, text in (
        ("webhook-id", True, "The same in all attempts: a receiver that must not act twice remembers it."),
        ("webhook-timestamp", True, "Seconds since 1970, of this attempt."),
        ("webhook-signature", False, "`v1,<base64>` of HMAC-SHA256 over `id.timestamp.body`; two while a secret is changed."),
        ("User-Agent", True, f"`{USER_AGENT}`"),
    )
]
WEBHOOK_ANSWERS = {
    "2XX": "Delivered, unless it is a page (`text/html`).",
    "3XX": "Dead: a redirect is not followed.",
    "4XX": "Dead. But 408, 425 and 429 are tried again, and of 404 and 409 n8n's words decide.",
    "5XX": "Tried again, by `CALLBACK_SCHEDULE` and `Retry-After`.",
}

SECURITY = {
    "n8nToken": {
        "type": "http",
        "scheme": "bearer",
        "bearerFormat": "JWT",
        "description": "Signed with `JWT_SECRET`, with `exp`; `sub` owns what it starts. POST /init-stream takes it in the body, "
        "as `n8nToken`, as well.",
    },
    "viewerToken": {
        "type": "http",
        "scheme": "bearer",
        "bearerFormat": "JWT",
        "description": "The token of the `streamUrl`, in the header.",
    },
    "viewerTokenInUrl": {
        "type": "apiKey",
        "in": "query",
        "name": "access_token",
        "description": "The same in the URL, as the `streamUrl` has it: an `EventSource` sends no header of its own.",
    },
    "metricsToken": {"type": "http", "scheme": "bearer", "description": "`METRICS_TOKEN`."},
}

_SESSION: Json = {"parameters": {"id": "$response.body#/streamId"}}
#: What the answer to init is good for.
LINKS = {
    "watch": {"operationId": "watchStream", **_SESSION, "description": "With the `access_token` of `streamUrl`."},
    "cancel": {"operationId": "cancelStream", **_SESSION, "description": "With the `access_token` of `streamUrl`."},
    "session": {"operationId": "getSession", **_SESSION, "description": "What becomes of it."},
}

TAGS = {
    "Workflow": "What n8n calls, with its own token.",
    "Browser": "What a page calls, with the token in the `streamUrl`.",
    "Operator": "Health and metrics.",
}
ABOUT = """Streams AI answers for n8n: a workflow asks and gets the address of a stream, a browser watches the words arrive, and \
the workflow gets the whole answer.

Every answer that is no success is RFC 9457 `application/problem+json` with `ok: false` and a stable `code`. Whatever fails on \
our side is 500 `internal`; an unknown path is 404 `not_found`, another method 405 `method_not_allowed`."""

_LEAST = {"resumeUrl": "http://n8n:5678/webhook-waiting/4711?signature=5f2b", "prompt": "Why is the sky blue?"}
#: Of the body of an init.
EXAMPLES = {
    "least": {"summary": "The least", "value": _LEAST},
    "chat": {
        "summary": "A turn of a chat",
        "value": {
            **_LEAST,
            "userId": "u-17",
            "chatId": 4711,
            "system": "Answer in one sentence.",
            "messages": [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hello! What is it?"}],
            "max_tokens": 500,
            "metadata": {"ticket": 12},
            "format": "json",
        },
    },
}
