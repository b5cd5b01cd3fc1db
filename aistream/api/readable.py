"""An OpenAPI document as a person reads it: every reference resolved, every schema a line or a table. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from markupsafe import Markup, escape

Json = dict[str, Any]

_NAMES = {"integer": "whole number", "string": "text", "array": "list", "boolean": "true or false"}
#: JSON Schema's bounds of one thing: the least, the most, and what they count.
_BOUNDS = (("minimum", "maximum", ""), ("minLength", "maxLength", " characters"), ("minItems", "maxItems", " items"))


class Field(NamedTuple):
    """A row of a table: a field, a parameter or a header. `kind` is HTML."""

    name: str
    kind: Markup
    required: bool
    text: Markup
    place: str = ""


class Answer(NamedTuple):
    """An answer of an operation. `kinds`: its media types, each with what is in it."""

    status: str
    text: Markup
    kinds: list[tuple[str, Markup]]
    headers: list[Field]


class Operation(NamedTuple):
    """An operation, or a callback, whose `path` is an expression."""

    id: str
    method: str
    path: str
    summary: str
    text: Markup
    tokens: list[str]
    fields: list[Field]
    body: Markup | None
    examples: list[Json]
    answers: list[Answer]
    callbacks: list[Operation]


def read(document: Json) -> Json:
    """What the page shows of a document."""
    operations: dict[str, list[Operation]] = {tag["name"]: [] for tag in document["tags"]}
    for path, methods in document["paths"].items():
        for method, one in methods.items():
            operations[one["tags"][0]].append(_operation(document, method, path, one))
    return {
        "info": {**document["info"], "description": prose(document["info"]["description"])},
        "server": document["servers"][0]["url"],
        "groups": [(tag["name"], prose(tag["description"]), operations[tag["name"]]) for tag in document["tags"]],
        "tokens": {name: prose(one["description"]) for name, one in document["components"]["securitySchemes"].items()},
        "schemas": [
            (name, prose(schema.get("description", "")), list(_fields(schema)), kind(schema))
            for name, schema in document["components"]["schemas"].items()
        ],
    }


def prose(text: str) -> Markup:
    """The little Markdown that our descriptions have: paragraphs, lists and code."""
    blocks = []
    for block in re.split(r"\n\s*\n", text.strip()):
        lines = block.splitlines()
        if all(line.startswith("- ") for line in lines):
            blocks.append(
                Markup("<ul>{}</ul>").format(Markup("").join(Markup("<li>{}</li>").format(_code(x[2:])) for x in lines))
            )
        else:
            blocks.append(Markup("<p>{}</p>").format(_code(block)))
    return Markup("\n").join(blocks)


def kind(schema: Json) -> Markup:
    """What a value may be, in a few words."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return Markup('<a href="#schema-{0}">{0}</a>').format(name)
    for joined in ("anyOf", "oneOf", "allOf"):
        if joined in schema:
            # Of what an answer narrows, only the reference says something new.
            parts = schema[joined][:1] if joined == "allOf" else schema[joined]
            return Markup(" or ").join(map(kind, parts))
    if "const" in schema or "enum" in schema:
        values = schema.get("enum", [schema.get("const")])
        return Markup(" | ").join(Markup("<code>{}</code>").format(_json(value)) for value in values)
    if schema.get("type") == "array":
        return Markup("list of ") + kind(schema["items"]) + _bounds(schema) if "items" in schema else Markup("list")
    name = str(schema.get("type", "anything"))
    return Markup("{}{}").format(_NAMES.get(name, name), _bounds(schema))


def _operation(document: Json, method: str, path: str, one: Json) -> Operation:
    parameters = [_resolved(document, parameter) for parameter in one.get("parameters", [])]
    content = one.get("requestBody", {}).get("content", {}).get("application/json")
    return Operation(
        id=one.get("operationId", "callback"),
        method=method.upper(),
        path=path,
        summary=one["summary"],
        text=prose(one["description"]),
        tokens=[name for requirement in one.get("security", []) for name in requirement],
        fields=[_field(parameter["name"], parameter) for parameter in parameters],
        body=kind(content["schema"]) if content else None,
        examples=list(content.get("examples", {}).values()) if content else [],
        answers=[_answer(document, status, answer) for status, answer in one["responses"].items()],
        callbacks=[
            _operation(document, callback_method, expression, item)
            for callback in one.get("callbacks", {}).values()
            for expression, methods in callback.items()
            for callback_method, item in methods.items()
        ],
    )


def _answer(document: Json, status: str, answer: Json) -> Answer:
    headers = {name: _resolved(document, header) for name, header in answer.get("headers", {}).items()}
    return Answer(
        status,
        prose(answer["description"]),
        [(media_type, kind(content["schema"])) for media_type, content in answer.get("content", {}).items()],
        [_field(name, header) for name, header in headers.items()],
    )


def _fields(schema: Json) -> Iterator[Field]:
    for name, field in schema.get("properties", {}).items():
        yield Field(name, kind(field), name in schema.get("required", []), prose(field.get("description", "")))


def _field(name: str, one: Json) -> Field:
    return Field(name, kind(one["schema"]), one["required"], prose(one["description"]), one.get("in", ""))


def _resolved(document: Json, part: Json) -> Json:
    found: Json = document
    for name in part["$ref"].removeprefix("#/").split("/") if "$ref" in part else ():
        found = found[name]
    return found if "$ref" in part else part


def _code(text: str) -> Markup:
    """The text with what stands between backticks as code."""
    pieces = re.split(r"`([^`]*)`", text)
    return Markup("").join(Markup("<code>{}</code>").format(one) if i % 2 else escape(one) for i, one in enumerate(pieces))


def _bounds(schema: Json) -> str:
    return "".join(
        f", {_span(schema.get(least), schema.get(most))}{unit}"
        for least, most, unit in _BOUNDS
        if least in schema or most in schema
    )


def _span(least: float | None, most: float | None) -> str:
    if most is None:
        return f"at least {least:,}"
    return f"at most {most:,}" if least is None else f"{least:,} to {most:,}"


def _json(value: object) -> str:
    return str(value) if isinstance(value, str) else str(value).lower()
