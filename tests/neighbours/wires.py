"""How OpenAI (chat completions) and Anthropic (messages) write the steps of a scenario down, byte for byte.

Every function that returns a list returns one SSE event per item; each becomes one HTTP chunk. What a token is, and so
the usage, is defined in one place: input = words of all messages, output = deltas written, plus REASONING_TOKENS and a
cache share where the scenario says `usage-details`. In `usage-each` OpenAI's wire says what it has come to in every chunk,
whether it was asked for or not. Anthropic's `message_start` says 1 output token, as the real one
writes a placeholder there.
"""

import json
import time
from dataclasses import dataclass, field
from typing import Any, Protocol

from tests.neighbours.scenarios import (
    REASONING_TOKENS,
    SCENARIOS,
    Ask,
    Delta,
    ErrorEvent,
    Finish,
    Reasoning,
    Refusal,
    Status,
    Text,
    ToolArguments,
    ToolCall,
)

FAKE_KEY = "sk-proj-FakeKeyThatMustNeverLeak0123456789"
FAKE_ORGANISATION = "org-FakeOrgThatMustNeverLeak"
FAKE_ANTHROPIC_KEY = "sk-ant-api03-FakeKeyThatMustNeverLeak0123456789"
FAKE_ANTHROPIC_ORGANISATION = "0bad0bad-1eaf-4bad-8bad-feedfacef00d"
SECRETS = (FAKE_KEY, FAKE_ORGANISATION, FAKE_ANTHROPIC_KEY, FAKE_ANTHROPIC_ORGANISATION)
"""Stand in the providers' error bodies and headers; none may reach a viewer, a callback or a log."""

REFUSAL_EXPLANATION = "This request was declined by the test provider."
TOOL_ID = "call_test0001"
SIGNATURE = "c2lnbmF0dXJlIG9mIHRoZSB0ZXN0IHByb3ZpZGVy"

Pairs = list[tuple[str, str]]
Fields = dict[str, Any]


@dataclass(slots=True)
class Whole:
    """A whole answer, collected from its deltas, for a client that did not ask for a stream."""

    text: str = ""
    reasoning: str = ""
    refusal: str = ""
    tool: str = ""
    arguments: str = ""
    deltas: int = 0
    finish: Finish = field(default_factory=Finish)
    reasoning_field: str = ""
    has_parts: bool = False

    def add(self, step: Delta) -> None:
        """Append one delta."""
        self.deltas += 1
        match step:
            case Text(text, _, part):
                self.text += text
                self.has_parts |= part
            case Reasoning(text, name):
                self.reasoning += text
                self.reasoning_field = name
            case Refusal(text):
                self.refusal += text
            case ToolCall(name):
                self.tool = name
            case ToolArguments(text):
                self.arguments += text


class Wire(Protocol):
    """One provider's format for one answer; it keeps what that format must remember between events."""

    def headers(self) -> Pairs:
        """What the provider sends beside the content type."""

    def opening(self) -> list[bytes]:
        """What stands in front of the first delta."""

    def delta(self, step: Delta, deltas: int) -> list[bytes]:
        """One delta, the one of this number."""

    def noise(self) -> list[bytes]:
        """Things that a client must skip."""

    def ping(self) -> list[bytes]:
        """A sign of life."""

    def finish(self, step: Finish, deltas: int) -> list[bytes]:
        """The end after `deltas` deltas."""

    def error_event(self, step: ErrorEvent) -> list[bytes]:
        """An error in mid-stream."""

    def whole(self, answer: Whole) -> Any:
        """The JSON of an answer that is not streamed."""

    def error(self, step: Status) -> tuple[Pairs, bytes]:
        """Headers and body of an error answer."""

    def fault(self) -> Status | None:
        """How the provider would refuse this request, or None."""


def to_json(value: Any, escaped: bool = False) -> bytes:
    """Compact JSON; UTF-8 as both providers send it, or all in ASCII escapes. Lone surrogates exist only as escapes."""
    if not escaped:
        try:
            return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
        except UnicodeEncodeError:
            pass
    return json.dumps(value, separators=(",", ":")).encode()


def _thinking(text: str) -> Fields:
    """Mistral's part of a content that is thought."""
    return {"type": "thinking", "thinking": [{"type": "text", "text": text}]}


def _proxy_page(status: int) -> tuple[Pairs, bytes]:
    """What the proxy in front of both providers says when it cannot reach them."""
    page = f"<html>\r\n<head><title>{status}</title></head>\r\n<body><center>cloudflare</center></body>\r\n</html>\r\n"
    return [("Content-Type", "text/html")], page.encode()


# status: (type, code, message); the sentences are the ones that users quote in issues of both SDKs
OPENAI_ERRORS: dict[int, tuple[str, str | None, str]] = {
    400: ("invalid_request_error", None, "We could not process this request (organization {org})."),
    401: ("invalid_request_error", "invalid_api_key", "Incorrect API key provided: {key}."),
    403: ("request_forbidden", "unsupported_country_region_territory", "Country, region, or territory not supported"),
    404: ("invalid_request_error", "model_not_found", "The model does not exist or {org} does not have access to it."),
    429: (
        "tokens",
        "rate_limit_exceeded",
        "Rate limit reached in organization {org} on tokens per min (TPM): Limit 30000, Used 29900, Requested 200."
        " Please try again in 1s.",
    ),
    500: (
        "server_error",
        "server_error",
        "The server had an error while processing your request. Sorry about that! (organization {org}, key {key})",
    ),
    503: ("service_unavailable_error", None, "The engine is currently overloaded, please try again later ({org})."),
}
ANTHROPIC_ERRORS: dict[int, tuple[str, str]] = {
    400: ("invalid_request_error", "We could not process this request (organization {org})."),
    401: ("authentication_error", "invalid x-api-key: {key}"),
    402: ("billing_error", "Your credit balance is too low to access the API (organization {org})."),
    403: ("permission_error", "Your API key {key} does not have permission to use the specified resource."),
    404: ("not_found_error", "model: not found for organization {org}"),
    413: ("request_too_large", "Request exceeds the maximum size"),
    429: (
        "rate_limit_error",
        "This request would exceed your organization's rate limit of 40,000 input tokens per minute (org: {org}).",
    ),
    500: ("api_error", "Internal server error (organization {org}, key {key})"),
    504: ("timeout_error", "Request timed out (organization {org})"),
    529: ("overloaded_error", "Overloaded (organization {org})"),
}


class OpenAIWire:
    """Chat completions: `data:` lines without event names, `[DONE]` at the end."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        options = ask.body.get("stream_options") or {}
        self._include_usage = bool(options.get("include_usage")) and ask.usage != "none"
        self._obfuscate = options.get("include_obfuscation", True)
        self._frame = {
            "id": f"chatcmpl-test{ask.number:06d}",
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": ask.model,
            "service_tier": "default",
            "system_fingerprint": "fp_test",
        }

    def _chunk(self, choices: list[Fields], usage: Fields | None = None, escaped: bool = False) -> bytes:
        chunk: Fields = self._frame | {"choices": choices}
        if self._include_usage or usage is not None:
            chunk["usage"] = usage  # null in every chunk but the last
        if self._obfuscate:
            chunk["obfuscation"] = "a1B2c3D4"
        return b"data: " + to_json(chunk, escaped) + b"\n\n"

    def _choice(self, delta: Fields, finish_reason: str | None = None) -> list[Fields]:
        return [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}]

    def headers(self) -> Pairs:
        """The request id and the organisation, as the real one sends them."""
        return [
            ("x-request-id", f"req_test{self._ask.number:06d}"),
            ("openai-organization", FAKE_ORGANISATION),
            ("openai-processing-ms", "12"),
        ]

    def opening(self) -> list[bytes]:
        """The chunk with the role; its content is empty, and it is not counted as a delta."""
        return [self._chunk(self._choice({"role": "assistant", "content": "", "refusal": None}), self._usage_so_far(0))]

    def delta(self, step: Delta, deltas: int) -> list[bytes]:
        """One chunk."""
        escaped = isinstance(step, Text) and step.escaped
        return [self._chunk(self._choice(self._fields(step)), self._usage_so_far(deltas), escaped)]

    def _fields(self, step: Delta) -> Fields:
        match step:
            case Text(text, _, part):
                return {"content": [{"type": "text", "text": text}] if part else text}
            case Reasoning(text, "content"):
                return {"content": [_thinking(text)]}
            case Reasoning(text, "reasoning"):
                return {"reasoning": text}
            case Reasoning(text, name):
                return {"content": None, name: text}
            case Refusal(text):
                return {"refusal": text}
            case ToolCall(name):
                call = {"id": TOOL_ID, "type": "function", "function": {"name": name, "arguments": ""}}
                return {"tool_calls": [{"index": 0} | call]}
            case ToolArguments(text):
                return {"tool_calls": [{"index": 0, "function": {"arguments": text}}]}

    def noise(self) -> list[bytes]:
        """OpenRouter's comment, Azure's chunk without choices, a choice with fields that nobody knows."""
        odd = self._choice({"content": "", "annotations": []})
        odd[0]["content_filter_results"] = {"hate": {"filtered": False, "severity": "safe"}}
        filters = {"prompt_filter_results": [{"prompt_index": 0, "content_filter_results": {}}]}
        return [
            b": OPENROUTER PROCESSING\n\n",
            b"data: " + to_json(self._frame | {"choices": [], "model": ""} | filters) + b"\n\n",
            self._chunk(odd),
        ]

    def ping(self) -> list[bytes]:
        """OpenRouter's comment."""
        return [b": OPENROUTER PROCESSING\n\n"]

    def _usage_so_far(self, deltas: int) -> Fields | None:
        return self._usage(deltas) if self._ask.usage == "each" else None

    def _usage(self, deltas: int) -> Fields:
        given, made, cached, reasoning = self._ask.input_tokens, deltas, 0, 0
        if self._ask.usage == "details":
            cached, reasoning = given // 2, REASONING_TOKENS
            made += reasoning
        return {
            "prompt_tokens": given,
            "completion_tokens": made,
            "total_tokens": given + made,
            "prompt_tokens_details": {"cached_tokens": cached, "audio_tokens": 0},
            "completion_tokens_details": {
                "reasoning_tokens": reasoning,
                "audio_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
        }

    def finish(self, step: Finish, deltas: int) -> list[bytes]:
        """The finish reason, a chunk with usage where it was asked for, [DONE]."""
        reason = "stop" if step.reason == "refusal" else step.reason
        events = [self._chunk(self._choice({}, reason), self._usage_so_far(deltas))]
        if self._include_usage:
            events.append(self._chunk([], self._usage(deltas)))
        return [*events, b"data: [DONE]\n\n"] if step.done else events

    def _error(self, status: int, message: str) -> Fields:
        kind, code, sentence = OPENAI_ERRORS.get(status, OPENAI_ERRORS[400 if status < 500 else 500])
        text = message or sentence.format(org=FAKE_ORGANISATION, key=FAKE_KEY)
        return {"error": {"message": text, "type": kind, "param": None, "code": code}}

    def error_event(self, step: ErrorEvent) -> list[bytes]:
        """`data: {"error": …}`, or OpenRouter's chunk with both error and choices."""
        error = self._error(step.status or 500, step.message)
        if step.finish:
            said = {"code": error["error"]["code"], "message": error["error"]["message"]}
            error = self._frame | {"error": said, "choices": self._choice({"content": ""}, "error")}
        return [b"data: " + to_json(error) + b"\n\n"]

    def whole(self, answer: Whole) -> Any:
        """A `chat.completion`."""
        message: Fields = {
            "role": "assistant",
            "content": answer.text if answer.text or not (answer.tool or answer.refusal) else None,
            "refusal": answer.refusal or None,
        }
        if answer.has_parts:
            message["content"] = [_thinking(answer.reasoning), {"type": "text", "text": answer.text}]
        elif answer.reasoning:
            message[answer.reasoning_field] = answer.reasoning
        if answer.tool:
            function = {"name": answer.tool, "arguments": answer.arguments}
            message["tool_calls"] = [{"id": TOOL_ID, "type": "function", "function": function}]
        reason = "stop" if answer.finish.reason == "refusal" else answer.finish.reason
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
        completion = self._frame | {"object": "chat.completion", "choices": [choice]}
        if self._ask.usage != "none":
            completion["usage"] = self._usage(answer.deltas)
        return completion

    def error(self, step: Status) -> tuple[Pairs, bytes]:
        """JSON, or the proxy's page for 502 and 504."""
        if step.status in (502, 504):
            return _proxy_page(step.status)
        error = self._error(step.status, step.message)
        error["error"] |= step.error
        return [("Content-Type", "application/json")], to_json(step.body or error)

    def fault(self) -> Status | None:
        """Only what a careless client would get wrong."""
        if len(self._ask.headers.get("authorization", "").split()) != 2:
            return Status(401, "You didn't provide an API key.")
        if not self._ask.body["messages"]:
            return Status(400, "Invalid 'messages': empty array. Expected an array with minimum length 1.")
        for message in self._ask.body["messages"]:
            if message.get("role") not in ("system", "developer", "user", "assistant", "tool"):
                return Status(400, f"Invalid value: '{message.get('role')}'.")
            if not isinstance(message.get("content"), str | list):
                return Status(400, "Invalid value for 'content': expected a string, got null.")
        return None


class AnthropicWire:
    """Messages: named events; content comes in blocks, of which one at a time is open."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._block = ""
        self._index = -1

    def _event(self, kind: str, escaped: bool = False, **fields: Any) -> bytes:
        return b"event: %s\ndata: %s\n\n" % (kind.encode(), to_json({"type": kind} | fields, escaped))

    def headers(self) -> Pairs:
        """The request id and the organisation, as the real one sends them."""
        return [
            ("request-id", f"req_test{self._ask.number:06d}"),
            ("anthropic-organization-id", FAKE_ANTHROPIC_ORGANISATION),
        ]

    def _input_usage(self) -> Fields:
        """What counts as input is the sum of three numbers here."""
        cached = self._ask.input_tokens // 2 if self._ask.usage == "details" else 0
        fresh = self._ask.input_tokens - cached
        return {"input_tokens": fresh, "cache_creation_input_tokens": 0, "cache_read_input_tokens": cached}

    def _usage(self, deltas: int) -> Fields:
        if self._ask.usage != "details":
            return self._input_usage() | {"output_tokens": deltas}
        details = {"output_tokens_details": {"thinking_tokens": REASONING_TOKENS}}
        return self._input_usage() | {"output_tokens": deltas + REASONING_TOKENS} | details

    def opening(self) -> list[bytes]:
        """message_start, whose output_tokens is a placeholder."""
        message: Fields = self._message([], None)
        if self._ask.usage != "none":
            message["usage"] = self._input_usage() | {"output_tokens": 1, "service_tier": "standard"}
        return [self._event("message_start", message=message)]

    def _message(self, content: list[Fields], stop_reason: str | None) -> Fields:
        return {
            "id": f"msg_test{self._ask.number:06d}",
            "type": "message",
            "role": "assistant",
            "model": self._ask.model,
            "content": content,
            "stop_reason": stop_reason,
            "stop_sequence": None,
        }

    def _open(self, kind: str, **fields: Any) -> list[bytes]:
        """The events that end the open block and begin one of this kind; none where it is open already."""
        if self._block == kind:
            return []
        events = self._close()
        self._block, self._index = kind, self._index + 1
        events.append(self._event("content_block_start", index=self._index, content_block={"type": kind} | fields))
        return [*events, self._event("ping")] if self._index == 0 else events

    def _close(self) -> list[bytes]:
        if not self._block:
            return []
        events = []
        if self._block == "thinking":
            events.append(self._block_delta(type="signature_delta", signature=SIGNATURE))
        self._block = ""
        return [*events, self._event("content_block_stop", index=self._index)]

    def _block_delta(self, escaped: bool = False, **delta: Any) -> bytes:
        return self._event("content_block_delta", escaped, index=self._index, delta=delta)

    def delta(self, step: Delta, deltas: int) -> list[bytes]:
        """One content_block_delta, in a block of its kind."""
        match step:
            case Text(text, escaped):
                return [*self._open("text", text=""), self._block_delta(escaped, type="text_delta", text=text)]
            case Reasoning(text):
                opened = self._open("thinking", thinking="", signature="")
                return [*opened, self._block_delta(type="thinking_delta", thinking=text)]
            case ToolCall(name):
                return self._open("tool_use", id=TOOL_ID.replace("call", "toolu"), name=name, input={})
            case ToolArguments(text):
                return [self._block_delta(type="input_json_delta", partial_json=text)]
            case Refusal():
                return []

    def noise(self) -> list[bytes]:
        """A ping, an event of a new type, a block and a delta of new types, fields that nobody knows."""
        events = [self._event("ping"), self._event("message_mood", mood="curious"), b": comment\n\n", *self._close()]
        self._index += 1
        block = {"type": "hologram", "points": []}
        return [
            *events,
            self._event("content_block_start", index=self._index, content_block=block),
            self._block_delta(type="hologram_delta", point=[1, 2, 3]),
            self._event("content_block_stop", index=self._index, colour="blue"),
        ]

    def ping(self) -> list[bytes]:
        """The event of that name."""
        return [self._event("ping")]

    def _stop_reason(self, reason: str) -> str:
        return {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}.get(reason, reason)

    def finish(self, step: Finish, deltas: int) -> list[bytes]:
        """message_delta with stop reason and the cumulative usage, message_stop."""
        delta: Fields = {"stop_reason": self._stop_reason(step.reason), "stop_sequence": None}
        if step.reason == "refusal":
            delta["stop_details"] = {"type": "refusal", "category": None, "explanation": REFUSAL_EXPLANATION}
        fields: Fields = {} if self._ask.usage == "none" else {"usage": self._usage(deltas)}
        events = [*self._close(), self._event("message_delta", delta=delta, **fields)]
        return [*events, self._event("message_stop")] if step.done else events

    def _error(self, status: int, message: str) -> Fields:
        kind, sentence = ANTHROPIC_ERRORS.get(status, ANTHROPIC_ERRORS[400 if status < 500 else 500])
        text = message or sentence.format(org=FAKE_ANTHROPIC_ORGANISATION, key=FAKE_ANTHROPIC_KEY)
        request_id = f"req_test{self._ask.number:06d}"
        return {"type": "error", "error": {"type": kind, "message": text}, "request_id": request_id}

    def error_event(self, step: ErrorEvent) -> list[bytes]:
        """`event: error`."""
        return [b"event: error\ndata: " + to_json(self._error(step.status or 529, step.message)) + b"\n\n"]

    def whole(self, answer: Whole) -> Any:
        """A message."""
        content: list[Fields] = []
        if answer.reasoning:
            content.append({"type": "thinking", "thinking": answer.reasoning, "signature": SIGNATURE})
        if answer.text:
            content.append({"type": "text", "text": answer.text})
        if answer.tool:
            call = {"id": TOOL_ID.replace("call", "toolu"), "name": answer.tool, "input": json.loads(answer.arguments)}
            content.append({"type": "tool_use"} | call)
        message = self._message(content, self._stop_reason(answer.finish.reason))
        if self._ask.usage != "none":
            message["usage"] = self._usage(answer.deltas)
        return message

    def error(self, step: Status) -> tuple[Pairs, bytes]:
        """JSON, or the proxy's page for 502 and 503."""
        if step.status in (502, 503):
            return _proxy_page(step.status)
        return [("Content-Type", "application/json")], to_json(step.body or self._error(step.status, step.message))

    def fault(self) -> Status | None:
        """Only what a careless client would get wrong."""
        headers, body = self._ask.headers, self._ask.body
        if not (headers.get("x-api-key") or headers.get("authorization")):  # the SDK: Bearer since 2.0, before x-api-key
            return Status(401, "x-api-key header is required")
        if "anthropic-version" not in headers:
            return Status(400, "anthropic-version: header is required")
        for name in ("temperature", "top_p", "top_k"):
            # gone since API version 2026-10-21, which the SDK sends since 2.0.0 (platform.claude.com, Versions)
            if headers["anthropic-version"] >= "2026-10-21" and name in body:
                return Status(400, f"{name}: Extra inputs are not permitted")
        if not body["messages"]:
            return Status(400, "messages: at least one message is required")
        if not isinstance(body.get("max_tokens"), int) or body["max_tokens"] < 1:
            return Status(400, "max_tokens: Field required")
        if not 0 <= (body.get("temperature") or 0) <= 1:
            return Status(400, "temperature: Input should be less than or equal to 1")
        for number, message in enumerate(body["messages"]):
            if message.get("role") not in ("user", "assistant"):  # only the newest models take `system` here
                said = f'messages: Unexpected role "{message.get("role")}". Use the top-level `system` parameter.'
                return Status(400, said)
            if not message.get("content"):
                return Status(400, f"messages.{number}: all messages must have non-empty content")
        return None


def models(api: str) -> Fields:
    """The list of `GET /v1/models` in the format of `api`."""
    if api == "openai":
        names = [f"gpt-test-{name}" for name in SCENARIOS]
        return {
            "object": "list",
            "data": [{"id": name, "object": "model", "created": 1700000000, "owned_by": "test"} for name in names],
        }
    names = [f"claude-test-{name}" for name in SCENARIOS]
    made = "2025-01-01T00:00:00Z"
    data = [{"type": "model", "id": name, "display_name": name, "created_at": made} for name in names]
    return {"data": data, "has_more": False, "first_id": names[0], "last_id": names[-1]}
