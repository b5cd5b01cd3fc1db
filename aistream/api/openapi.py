"""The OpenAPI 3.1 document, made from what the routes themselves work with: their models, docstrings, limits and codes."""

from __future__ import annotations

import inspect
from http import HTTPStatus

import msgspec
from flask import Blueprint, Response, render_template

from aistream import __version__
from aistream.api import ProblemAnswer, as_page, json_response, parts
from aistream.api.contract import (
    ABOUT,
    CODES,
    EXAMPLES,
    HEADERS,
    LINKS,
    OPERATIONS,
    PARAMETERS,
    REQUIRED_HEADERS,
    SECURITY,
    TAGS,
    WEBHOOK_ANSWERS,
    WEBHOOK_HEADERS,
    Answer,
    Json,
    Operation,
)
from aistream.api.init import InitRequest
from aistream.api.readable import read
from aistream.callback import Payload
from aistream.config import Config
from aistream.events import End, Failed, Reasoning, Start, Text, Usage

bp = Blueprint("openapi", __name__)

_REFERENCE = "#/components/schemas/{name}"
#: What JSON mode sends; where an answer was cancelled, in place of its end, the last.
_EVENTS = (Start, Text, Reasoning, Usage, End, Failed)
_CANCELLED: Json = {
    "title": "Cancelled",
    "description": "Somebody has stopped the answer.",
    "type": "object",
    "properties": {"type": {"const": "cancelled"}},
    "required": ["type"],
}


@bp.get("/openapi.json")
def served() -> Response:
    """This document, in DEV_MODE only: docs/openapi.json has it for everybody else."""
    return json_response(document(parts().config))


@bp.get("/docs")
def page() -> Response:
    """The document for people: one page that asks nobody for anything."""
    return as_page(Response(render_template("openapi.html", **read(document(parts().config)))))


_ALL = (
    *OPERATIONS,
    Operation(
        "getDocument",
        "GET /openapi.json",
        served,
        "Operator",
        "Read this document",
        {200: Answer("OpenAPI 3.1", ("application/json", {"type": "object"}))},
    ),
)


def document(config: Config) -> Json:
    """The document for a service with this configuration: its address and limits stand in it, and no secret."""
    paths: Json = {}
    for operation in _ALL:
        method, path = operation.route.split()
        paths.setdefault(path, {})[method.lower()] = _operation(operation)
    return {
        "openapi": "3.1.1",
        "info": {"title": "aistream", "version": __version__, "description": ABOUT},
        "servers": [{"url": config.base_url}],
        "tags": [{"name": name, "description": text} for name, text in TAGS.items()],
        "paths": paths,
        "components": {
            "schemas": _schemas(config),
            "parameters": PARAMETERS,
            "headers": HEADERS,
            "securitySchemes": SECURITY,
        },
    }


def _operation(operation: Operation) -> Json:
    answers = {str(status): _answer(answer) for status, answer in operation.answers.items()}
    found: Json = {
        "operationId": operation.name,
        "tags": [operation.tag],
        "summary": operation.summary,
        "description": "\n\n".join(filter(None, [inspect.getdoc(operation.view), operation.more])),
        "parameters": [{"$ref": f"#/components/parameters/{name}"} for name in (*operation.parameters, "RequestId")],
        "responses": answers | _problems(operation.name),
    }
    if operation.security:
        # An empty requirement: the token may come in another way, or there may be none.
        found["security"] = [{name: []} if name else {} for name in operation.security]
    if operation.name == "initStream":
        asked = {"schema": _reference(InitRequest), "examples": EXAMPLES}
        found["requestBody"] = {"required": True, "content": {"application/json": asked}}
        found["responses"]["200"]["links"] = LINKS
        found["callbacks"] = {"ended": {"{$request.body#/resumeUrl}": {"post": _callback()}}}
    return found


def _answer(answer: Answer) -> Json:
    found: Json = {"description": answer.text, "headers": _named_headers("X-Request-ID", *answer.headers)}
    if isinstance(answer.model, tuple):
        media_type, schema = answer.model
        found["content"] = {media_type: {"schema": schema}}
    elif answer.model:
        found["content"] = {"application/json": {"schema": _reference(answer.model)}}
    return found


def _problems(name: str) -> Json:
    """What an operation may refuse with, by status."""
    found: Json = {}
    for status in sorted({code.status for code in CODES.values()}):
        codes = {text: code.meaning for text, code in CODES.items() if code.status == status and name in code.where}
        if codes:
            more = [REQUIRED_HEADERS[status]] if status in REQUIRED_HEADERS else []
            lines = "\n".join(f"- `{text}`: {meaning}" for text, meaning in codes.items())
            narrowed = {"properties": {"status": {"const": status}, "code": {"enum": list(codes)}}}
            found[str(status)] = {
                "description": f"{HTTPStatus(status).phrase}\n\n{lines}",
                "headers": _named_headers("X-Request-ID", *more),
                "content": {"application/problem+json": {"schema": {"allOf": [_reference(ProblemAnswer), narrowed]}}},
            }
    return found


def _callback() -> Json:
    return {
        "summary": "The answer is complete, or has ended otherwise",
        "description": "Sent on every ending, at least once. Signed by Standard Webhooks 1.0 where `CALLBACK_SECRET` is set; "
        "`CALLBACK_HEADERS` come on top.",
        "parameters": WEBHOOK_HEADERS,
        "requestBody": {"required": True, "content": {"application/json": {"schema": _reference(Payload)}}},
        "responses": {status: {"description": text} for status, text in WEBHOOK_ANSWERS.items()},
    }


def _schemas(config: Config) -> Json:
    answers = [answer.model for one in OPERATIONS for answer in one.answers.values() if isinstance(answer.model, type)]
    written = [*answers, ProblemAnswer, Payload, *_EVENTS]
    _, schemas = msgspec.json.schema_components(written, ref_template=_REFERENCE)
    for schema in schemas.values():
        _as_written(schema)
    schemas["ProblemAnswer"]["properties"]["code"]["enum"] = list(CODES)
    schemas["Cancelled"] = _CANCELLED
    schemas["StreamEvent"] = {
        "title": "StreamEvent",
        "description": "An event's `data` in JSON mode.",
        "oneOf": [*map(_reference, _EVENTS), {"$ref": _REFERENCE.format(name="Cancelled")}],
    }
    return dict(sorted((schemas | _request_schemas(config)).items()))


def _as_written(schema: Json) -> None:
    """What we write has all its fields, also those that have a default in our code."""
    schema["description"] = inspect.cleandoc(schema.get("description", ""))
    for name, field in schema.get("properties", {}).items():
        if "default" in field:
            del field["default"]
            schema["required"] = [*schema.get("required", []), name]


def _request_schemas(config: Config) -> Json:
    schema = InitRequest.model_json_schema(ref_template=_REFERENCE.format(name="{model}"))
    schemas = {**schema.pop("$defs"), "InitRequest": schema}
    for one in schemas.values():
        for field in one["properties"].values():
            field.pop("title", None)
            field.pop("default", None)
    schema["properties"]["prompt"]["maxLength"] = config.max_prompt_chars
    return schemas


def _reference(model: type) -> Json:
    return {"$ref": _REFERENCE.format(name=model.__name__)}


def _named_headers(*names: str) -> Json:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}
