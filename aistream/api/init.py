"""POST /init-stream: n8n asks for an answer and gets the address of its stream."""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
import uuid
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import msgspec
import pydantic_core
from flask import Blueprint, Response, request
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError
from werkzeug.exceptions import RequestEntityTooLarge

from aistream import limits, metrics
from aistream.api import Ok, bearer, json_response, parts, tell
from aistream.callback import Time, timestamp
from aistream.config import Config
from aistream.endpoints import Effort
from aistream.errors import DestinationRefused, Fault, InvalidRequest, Problem, StoreUnavailable
from aistream.session import IdempotencyKey, Message, Request
from aistream.tokens import Caller

bp = Blueprint("init", __name__)

MAX_MESSAGES = 200
MAX_FALLBACKS = 5
MAX_METADATA_CHARS = 16_384
MAX_URL_CHARS = 2_048
#: As long as Stripe's.
MAX_KEY_CHARS = 255
#: An Idempotency-Key: visible ASCII, with spaces inside.
KEY = re.compile(rf"[!-~]([ -~]{{0,{MAX_KEY_CHARS - 2}}}[!-~])?")
#: Seconds without a viewer after which `"onDisconnect": "cancel"` cancels: a reload, or a tunnel, is no farewell.
DISCONNECT_GRACE = 30.0


def _no_nul(text: str) -> str:
    if "\0" in text:
        raise ValueError("expected text without the character NUL")
    return text


def _whole(value: Any) -> Any:
    """JSON has one kind of number: 500.0 is as whole as 500."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


#: Our own check, which says what is wrong; the OpenAPI document has it as a pattern.
_WHOLE_TEXT = (AfterValidator(_no_nul), Field(json_schema_extra={"pattern": "^[^\\u0000]*$"}))
Text = Annotated[str, *_WHOLE_TEXT]
Name = Annotated[str, StringConstraints(max_length=512), *_WHOLE_TEXT]
Model = Annotated[str, StringConstraints(min_length=1, max_length=200), *_WHOLE_TEXT]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=200), *_WHOLE_TEXT]
Prompt = Annotated[str, StringConstraints(min_length=1), *_WHOLE_TEXT]
#: What resumeUrl is, before it is asked where it leads.
_HTTP_URL: dict[str, Any] = {"format": "uri", "pattern": "^[Hh][Tt][Tt][Pp][Ss]?://"}
#: Echoed in the type it came in. JSON has no NaN, and `true` is no number.
Echoed = Name | int | float | None


class Turn(BaseModel):
    """One earlier turn of the conversation."""

    model_config = ConfigDict(strict=True, extra="ignore")

    role: Literal["user", "assistant", "system"]
    content: Text


# camelCase lives in what is asked and answered and in the callback's payload, nowhere else.
class InitRequest(BaseModel):
    """The body of POST /init-stream. `null` is as good as absent; unknown fields are ignored, and named in `warnings`."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, use_attribute_docstrings=True)

    n8nToken: str | None = None
    """n8n's JWT, where it does not come as `Authorization: Bearer`, which then wins."""
    resumeUrl: Annotated[str, StringConstraints(min_length=1, max_length=MAX_URL_CHARS), Field(json_schema_extra=_HTTP_URL)]
    """Where the callback goes: `{{ $execution.resumeUrl }}`. Its origin must be among `RESUME_URL_ALLOWED_ORIGINS`."""
    prompt: Prompt
    """The last turn of the user."""
    userId: Echoed = None
    """Echoed in the callback, in the type it came in."""
    chatId: Echoed = None
    """Echoed in the callback, in the type it came in."""
    model: Model | None = None
    """`DEFAULT_MODEL` where it is missing. `GET /models` lists what there is."""
    fallbackModels: Annotated[list[Model], Field(max_length=MAX_FALLBACKS)] | None = None
    """Asked in this order when `model` has failed before its first token."""
    max_tokens: Annotated[int, Field(ge=1, le=1_000_000), BeforeValidator(_whole)] | None = None
    """4096 where it is missing, or what the provider's defaults say."""
    messages: Annotated[list[Turn], Field(max_length=MAX_MESSAGES)] | None = None
    """The earlier turns. With `system` at most `MAX_PROMPT_CHARS` characters."""
    system: Text | None = None
    """Instructions for the model."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    """Where one of these comes, the answer ends before it."""
    reasoning_effort: Effort | None = None
    """How hard the model is to think."""
    metadata: dict[str, Any] | None = None
    """Echoed in the callback. At most 16 KiB of JSON."""
    format: Literal["text", "json"] | None = None
    """Goes into the `streamUrl`."""
    start: Literal["connect", "immediate"] | None = None
    """`connect`, the default: the first viewer starts the answer. `immediate`: it starts at once."""
    onDisconnect: Literal["continue", "cancel"] | None = None
    """`continue`, the default: the answer goes on without viewers. `cancel`: it is stopped when the last has left."""
    disconnectGraceSeconds: Annotated[float, Field(ge=1, le=3_600)] | None = None
    """How long after that; 30 where it is missing."""


class InitAnswer(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """`expiresAt`: until then the first viewer must have come; `null` where the session waits for nobody.

    `warnings`: unknown fields, and what the model is not sent.
    """

    ok: Ok = True
    stream_url: Annotated[str, msgspec.Meta(extra_json_schema={"format": "uri"})]
    stream_id: Annotated[str, msgspec.Meta(extra_json_schema={"format": "uuid"})]
    expires_at: Time | None
    warnings: list[str]


@bp.post("/init-stream")
def init_stream() -> Response:
    """Creates a session and answers with its stream's address; with an Idempotency-Key that was used before, the same again."""
    body = read_body(request.get_data(cache=False))
    # Who asks is settled before what is asked: the faults of a body are told to callers only.
    caller = parts().tokens.verify_caller(_token(body))
    try:
        answer, replayed = accept(body, caller, _key(body, caller))
    except StoreUnavailable:
        metrics.limited("store")
        raise
    response = json_response(answer)
    if replayed:
        response.headers["Idempotent-Replayed"] = "true"
    return response


def _key(body: dict[str, Any], caller: Caller) -> IdempotencyKey | None:
    """The Idempotency-Key of this request, if it has one: scoped to the caller, and bound to all of the body but the token."""
    given = request.headers.get("Idempotency-Key")
    if given is None:
        return None
    if not KEY.fullmatch(given):
        expected = f"expected 1 to {MAX_KEY_CHARS} visible ASCII characters, such as a UUID"
        raise InvalidRequest.naming(Fault("Idempotency-Key", expected))
    asked = {name: value for name, value in body.items() if name != "n8nToken"}
    return IdempotencyKey(
        name=hashlib.sha256(json.dumps([caller.subject, given]).encode()).hexdigest(),
        body=hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest(),
    )


def read_body(raw: bytes) -> dict[str, Any]:
    """The request's JSON object. Raises InvalidRequest for whatever is none, with the place where it stops being JSON."""
    kind = request.mimetype
    if kind and kind != "application/json" and not kind.endswith("+json"):
        raise Problem(
            f"The body is {kind}: expected application/json.",
            status=415,
            code="unsupported_media_type",
            title="Not JSON",
        )
    if request.content_length is None and len(raw) >= parts().config.max_body_bytes:
        raise RequestEntityTooLarge  # werkzeug cuts a chunked body at the limit, and says nothing
    try:
        body = pydantic_core.from_json(raw, allow_inf_nan=False, cache_strings="none")
    except ValueError as error:
        # jiter's messages name a kind of fault and a place, and quote nothing.
        raise InvalidRequest(f"The body is not valid JSON: {error}.", code="invalid_json") from None
    if not isinstance(body, dict):
        raise InvalidRequest(
            'The body is not a JSON object: expected {"n8nToken": …, "resumeUrl": …, "prompt": …}.', code="invalid_json"
        )
    return body


def _token(body: dict[str, Any]) -> str | None:
    """The header's token if there is one, else the body's.

    A header that holds no JWT (a key for a proxy on the way, say) does not hide the body's token. A `n8nToken` that is no
    text is no token.
    """
    header, inside = bearer(), body.get("n8nToken")
    if header is not None and (header.count(".") == 2 or inside is None):
        return header
    return inside if isinstance(inside, str) else None


def accept(body: dict[str, Any], caller: Caller, key: IdempotencyKey | None = None) -> tuple[InitAnswer, bool]:
    """Checks what is asked, stores the session, and gives the answer to init, and whether `key` had begun it before.

    Raises InvalidRequest, Limited, StoreUnavailable, and a 422 where `key` was used for another body.
    """
    config = parts().config
    asked = _checked(body, config)
    asked_of_model = _request(asked, config)
    fresh_id = str(uuid.uuid4())
    quotas = limits.quotas(config, caller.subject, asked.userId)
    accepted = parts().generations.accept(fresh_id, caller.subject, asked_of_model, asked.resumeUrl, key, quotas)
    if accepted is None:
        raise Problem(
            "This Idempotency-Key was used for another request: a new request needs a key of its own.",
            status=422,
            code="idempotency_key_reused",
            title="The Idempotency-Key belongs to another request",
        )
    session_id = accepted.id
    if session_id == fresh_id:
        tell(event="session.accepted", session=session_id, provider=asked_of_model.provider, model=asked_of_model.model)
    else:
        tell(session=session_id, replayed=True)
    # As long as the session can be watched: a reconnect with the same URL must find its token good.
    expires_at = math.ceil(
        time.time() + config.session_ttl_seconds + config.max_stream_seconds + config.keep_seconds + config.replay_seconds
    )
    token = parts().tokens.sign_viewer(session_id, expires_at)
    answer = InitAnswer(
        stream_url=f"{config.base_url}/stream/{session_id}?access_token={token}"
        + ("&format=json" if asked.format == "json" else ""),
        stream_id=session_id,
        expires_at=None if asked_of_model.immediate else timestamp(accepted.deadline),
        warnings=[
            *(f"{name} is unknown and was ignored" for name in _unknown(body)),
            *_limits_of_providers(asked_of_model),
            *(
                ['disconnectGraceSeconds has no effect without "onDisconnect": "cancel"']
                if asked.disconnectGraceSeconds is not None and asked.onDisconnect != "cancel"
                else []
            ),
        ],
    )
    return answer, session_id != fresh_id


def _request(asked: InitRequest, config: Config) -> Request:
    model = asked.model or config.default_model
    route = parts().providers.route(model)
    stop = [asked.stop] if isinstance(asked.stop, str) else asked.stop or []
    return Request(
        prompt=asked.prompt,
        requested_model=model,
        model=route.model,
        provider=route.provider,
        max_tokens=asked.max_tokens,
        fallbacks=tuple(parts().providers.route(name) for name in asked.fallbackModels or []),
        reasoning_effort=asked.reasoning_effort,
        messages=tuple(Message(turn.role, turn.content) for turn in asked.messages or []),
        system=asked.system,
        temperature=asked.temperature,
        top_p=asked.top_p,
        stop=tuple(stop),
        user_id=asked.userId,
        chat_id=asked.chatId,
        metadata=asked.metadata,
        disconnect_grace=(asked.disconnectGraceSeconds or DISCONNECT_GRACE) if asked.onDisconnect == "cancel" else None,
        immediate=asked.start == "immediate",
    )


def _checked(body: dict[str, Any], config: Config) -> InitRequest:
    """The body as it is meant. Raises InvalidRequest that names all faults at once."""
    faults: list[Fault] = []
    asked = None
    try:
        asked = InitRequest.model_validate(body)
    except ValidationError as error:
        faults += _named(error)
    named = {fault.field for fault in faults}
    faults += [fault for fault in _further(body, config) if fault.field not in named]
    named |= {fault.field for fault in faults}
    unrouted = list(_unrouted(body, named, config))
    if len(unrouted) == 1 and not faults:
        raise unrouted[0]
    faults += [fault for error in unrouted for fault in error.faults]
    if faults or asked is None:
        raise InvalidRequest.naming(*faults)
    return asked


def _unrouted(body: dict[str, Any], named: set[str], config: Config) -> Iterator[InvalidRequest]:
    """The models that no provider serves."""
    names = {"model": body.get("model") or config.default_model}
    fallbacks = body.get("fallbackModels")
    if isinstance(fallbacks, list) and "fallbackModels" not in named:
        names |= {f"fallbackModels[{number}]": name for number, name in enumerate(fallbacks)}
    for field, name in names.items():
        if isinstance(name, str) and field not in named:
            try:
                parts().providers.route(name, field)
            except InvalidRequest as error:
                yield error


def _further(body: dict[str, Any], config: Config) -> Iterator[Fault]:
    """What types alone do not say."""
    prompt, url = body.get("prompt"), body.get("resumeUrl")
    if isinstance(prompt, str) and len(prompt) > config.max_prompt_chars:
        yield Fault("prompt", f"has {len(prompt)} characters: expected at most {config.max_prompt_chars} (MAX_PROMPT_CHARS)")
    history = sum(len(text) for text in _history(body))
    if history > config.max_prompt_chars:
        yield Fault(
            "messages" if body.get("messages") else "system",
            f"has {history} characters in system and messages: expected at most {config.max_prompt_chars} (MAX_PROMPT_CHARS)",
        )
    if body.get("metadata") is not None:
        written = pydantic_core.to_json(body["metadata"], inf_nan_mode="constants")
        if len(written) > MAX_METADATA_CHARS:
            yield Fault("metadata", f"is too large: expected at most {MAX_METADATA_CHARS} bytes of JSON")
        elif not _finite(written):
            yield Fault("metadata", "has a number beyond all bounds: expected finite numbers")
    if isinstance(url, str) and url:
        try:
            parts().destinations.of(url)
        except DestinationRefused as refused:
            yield Fault("resumeUrl", str(refused))


def _finite(written: bytes) -> bool:
    # 1e400 is read as infinite and would be written as null.
    try:
        pydantic_core.from_json(written, allow_inf_nan=False)
    except ValueError:
        return False
    return True


def _history(body: dict[str, Any]) -> Iterator[str]:
    turns = body.get("messages")
    contents = [turn.get("content") for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    return (text for text in [body.get("system"), *contents] if isinstance(text, str))


#: pydantic's name of a fault -> what was expected; where it is missing pydantic's own sentence is good enough.
_EXPECTED = {
    "missing": "is missing: it is required",
    "string_type": "expected text",
    "int_type": "expected a whole number",
    "float_type": "expected a number",
    "dict_type": "expected a JSON object",
    "list_type": "expected a list",
    "model_type": "expected a JSON object",
    "model_attributes_type": "expected a JSON object",
    "string_unicode": "expected valid Unicode text",
    "finite_number": "expected a finite number",
}
#: Fields that take more than one type: pydantic would report each alternative as a fault of its own.
_ALTERNATIVES = {
    "userId": "expected text of at most 512 characters, or a number",
    "chatId": "expected text of at most 512 characters, or a number",
    "stop": "expected text, or a list of at most 4 texts, each of 1 to 200 characters",
}


def _named(error: ValidationError) -> list[Fault]:
    faults: dict[str, str] = {}
    for one in error.errors(include_url=False, include_input=False, include_context=True):
        top = str(one["loc"][0])
        if top in _ALTERNATIVES:
            faults[top] = _ALTERNATIVES[top]
            continue
        field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in one["loc"]).removeprefix(".")
        message = _EXPECTED.get(one["type"]) or one["msg"].removeprefix("Value error, ").removesuffix(" after validation")
        faults.setdefault(field, re.sub(r"^(Input should be|String should have|List should have)", "expected", message))
    return [Fault(field, message[:1].lower() + message[1:]) for field, message in faults.items()]


def _limits_of_providers(asked: Request) -> list[str]:
    """What of the request does not go to one of the models that may be asked."""
    providers = dict.fromkeys(route.provider for route in asked.routes)
    return [warning for name in providers for warning in parts().providers[name].warnings(asked)]


def _unknown(body: dict[str, Any]) -> list[str]:
    known = set(InitRequest.model_fields)
    return [name[:100] for name in body if name not in known][:50]
