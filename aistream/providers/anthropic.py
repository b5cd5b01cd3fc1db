"""Anthropic's messages."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import anthropic
import msgspec

from aistream.endpoints import Endpoint
from aistream.events import End, Usage
from aistream.providers import failures, wire
from aistream.providers.adaptation import Adaptations
from aistream.providers.base import Call, Say, limited, parameters, say_whole
from aistream.providers.translation import translated
from aistream.session import Message, Request

#: Anthropic's stop reasons in the words of the callback; others are passed on as they are.
_FINISH = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
}
#: From this version of the API on there is no temperature and no top_p: a request that has them is answered 400, even with
#: their default values (platform.claude.com, Versions).
_NO_SAMPLING = "2026-10-21"
#: Blocks of thought (anthropic 2.12.0, `raw_content_block_start_event.py`).
_THINKING = ("thinking", "redacted_thinking")
#: The effort of OpenAI's words in Anthropic's (anthropic 2.12.0, `output_config_param.py`).
_EFFORT = {"minimal": "low"}


class _Thinking(msgspec.Struct):
    thinking_tokens: int | None = None


class _Usage(msgspec.Struct):
    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_creation_input_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    output_tokens_details: _Thinking | None = None


class _Block(msgspec.Struct):
    type: str = ""
    text: str | None = None
    thinking: str | None = None


class _Message(msgspec.Struct):
    model: str | None = None
    usage: _Usage | None = None
    content: list[_Block] | None = None
    stop_reason: str | None = None
    error: Any = None


class _Delta(msgspec.Struct):
    text: str | None = None
    thinking: str | None = None
    stop_reason: str | None = None


class _Event(msgspec.Struct):
    type: str = ""
    message: _Message | None = None
    content_block: _Block | None = None
    delta: _Delta | None = None
    usage: _Usage | None = None
    error: Any = None


_event = msgspec.json.Decoder(_Event)
_message = msgspec.json.Decoder(_Message)


class AnthropicProvider:
    """Streams messages through the official SDK's raw response."""

    def __init__(self, endpoint: Endpoint, adaptations: Adaptations, transport: str = "fast") -> None:
        """`transport`: see PROVIDER_TRANSPORT."""
        self.endpoint = endpoint
        self._transport = transport
        self._adaptations = adaptations

    @cached_property
    def _client(self) -> anthropic.Anthropic:
        version = self.endpoint.anthropic_version
        return anthropic.Anthropic(
            api_key=self.endpoint.key or "none",
            base_url=self.endpoint.base_url,
            max_retries=0,
            timeout=wire.TIMEOUT,
            default_headers={"anthropic-version": version} if version else None,
            http_client=wire.http_client(anthropic.DefaultHttpxClient, self._transport),
        )

    @property
    def _samples(self) -> bool:
        version = self.endpoint.anthropic_version
        return bool(version) and version < _NO_SAMPLING

    def warm_up(self) -> None:
        """Builds the client, and the headers that make it fork `uname` once."""
        self._client.default_headers  # noqa: B018  # a cached property: asking is the work

    def close(self) -> None:
        """See `Provider.close`."""
        if "_client" in self.__dict__:
            self._client.close()

    def warnings(self, request: Request) -> list[str]:
        """See `Provider.warnings`."""
        found = limited(request, self.endpoint)
        if not self._samples:
            unsent = [name for name in ("temperature", "top_p") if getattr(request, name) is not None]
            found += [f"{name} is not sent: {self.endpoint.name} does not take it" for name in unsent]
        elif (request.temperature or 0) > 1:
            found.append(f"temperature is {request.temperature:g}: {self.endpoint.name} takes 0 to 1, so it is sent as 1")
        return found

    def models(self, timeout: float) -> list[str]:
        """See `Provider.models`."""
        call = Call(Request("", "", "", self.endpoint.name), "", self.endpoint.key)
        with translated(call, anthropic.APIStatusError, anthropic.APIConnectionError):
            return [model.id for model in self._client.models.list(limit=1000, timeout=timeout).data]

    def answer(self, request: Request, model: str, call: Call, say: Say) -> End:
        """See `Provider.answer`."""
        return self._adaptations.adapted(
            self.endpoint,
            model,
            call,
            lambda refused: self._body(request, model, refused),
            lambda body: self._answer(body, call, say),
        )

    def _body(self, request: Request, model: str, refused: frozenset[str]) -> dict[str, Any]:
        asked = parameters(request, self.endpoint)
        turns = request.conversation()
        # No system role among the messages: it stands apart.
        system = [request.system or "", *(turn.content for turn in turns if turn.role == "system")]
        given: dict[str, Any] = {
            "system": "\n\n".join(filter(None, system)) or None,
            "stop_sequences": list(asked.stop) or None,
            **_thinking(asked.reasoning_effort),
        }
        if self._samples:
            # OpenAI's range ends at 2, Anthropic's at 1.
            given["temperature"] = None if asked.temperature is None else min(asked.temperature, 1.0)
            given["top_p"] = asked.top_p
        return {
            **{name: value for name, value in asked.extra.items() if name not in refused},
            "model": model,
            "messages": _merged(turns),
            "max_tokens": asked.max_tokens,
            "stream": True,
        } | {name: value for name, value in given.items() if value is not None and name not in refused}

    def _answer(self, body: dict[str, Any], call: Call, say: Say) -> End:
        with (
            translated(call, anthropic.APIStatusError, anthropic.APIConnectionError),
            wire.posted(self._client, "/v1/messages", body, anthropic.Stream) as response,
        ):
            return wire.read(response, _Reading(call), _whole, say)


def _merged(turns: list[Message]) -> list[dict[str, str]]:
    """User and assistant in turns: successive ones of a role are one, and a blank one, which Anthropic refuses, is none.

    The last one, the prompt, stays as it is.
    """
    merged: list[dict[str, str]] = []
    for turn in [*(turn for turn in turns[:-1] if turn.role != "system" and turn.content.strip()), turns[-1]]:
        if merged and merged[-1]["role"] == turn.role:
            merged[-1]["content"] += "\n\n" + turn.content
        else:
            merged.append({"role": turn.role, "content": turn.content})
    return merged


def _thinking(effort: str | None) -> dict[str, Any]:
    """Anthropic's words for OpenAI's reasoning_effort. Without one, the model's own default holds.

    `display`: what is thought is shown as it is, in summary; some models leave it out otherwise (anthropic 2.12.0,
    `thinking_config_adaptive_param.py`).
    """
    if effort is None:
        return {}
    if effort == "none":
        return {"thinking": {"type": "disabled"}}
    return {
        "thinking": {"type": "adaptive", "display": "summarized"},
        "output_config": {"effort": _EFFORT.get(effort, effort)},
    }


class _Reading(wire.Reading):
    """An answer in events of a message."""

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self._stop_reason: str | None = None
        self._stopped = False
        self._started = _Usage()

    def take(self, data: bytes) -> None:
        """See `wire.Reading.take`."""
        event = wire.decode(data, _event)
        match event.type:
            case "content_block_delta" if event.delta is not None:
                self.text += event.delta.text or ""
                self.reasoning += event.delta.thinking or ""
            case "content_block_start" if event.content_block is not None:
                # Some models do not show their thoughts: then nothing but pings follows until they write.
                self.call.thinks = self.call.thinks or event.content_block.type in _THINKING
            case "message_start" if event.message is not None:
                self._start(event.message)
            case "message_delta":
                self._stop_reason = (event.delta.stop_reason if event.delta else None) or self._stop_reason
                if event.usage is not None and event.usage.output_tokens is not None:
                    self.call.usage = _usage(self._started, event.usage)
            case "message_stop":
                self._stopped = True
            case "error":
                if failures.filtered(event.error):
                    # OpenAI ends such an answer with this finish reason; Anthropic has an error event for it.
                    self.ending = End("content_filter")
                else:
                    self.error = event.error or {}

    def _start(self, message: _Message) -> None:
        self.call.model = message.model or self.call.model
        self._started = message.usage or self._started
        # Its `output_tokens` is a placeholder: only message_delta's, which is cumulative, is a figure.
        self.call.input = _usage(self._started, _Usage()) if message.usage is not None else None

    def end(self) -> End:
        """See `wire.Reading.end`."""
        if not self._stopped:
            raise failures.failed(failures.TRUNCATED)
        return _end(self._stop_reason)


def _whole(body: bytes, call: Call, say: Say) -> End:
    """The answer of a server that does not stream."""
    message = wire.decode(body, _message)
    if message.error is not None:
        raise failures.error_event(message.error, call)
    if message.content is None or message.stop_reason is None:
        raise failures.failed(failures.MALFORMED, content_type="application/json")
    call.model = message.model or call.model
    call.usage = _usage(_Usage(), message.usage) if message.usage is not None else None
    say_whole(
        say, "".join(block.thinking or "" for block in message.content), "".join(block.text or "" for block in message.content)
    )
    return _end(message.stop_reason)


def _end(stop_reason: str | None) -> End:
    return End(_FINISH.get(stop_reason or "", stop_reason or "stop"))


def _usage(started: _Usage, final: _Usage) -> Usage:
    def figure(name: str) -> int:
        return getattr(final, name) or getattr(started, name) or 0

    cached = figure("cache_read_input_tokens")
    details = final.output_tokens_details
    return Usage(
        # Anthropic counts what it read from and wrote to its cache apart from the other input.
        input_tokens=figure("input_tokens") + figure("cache_creation_input_tokens") + cached,
        output_tokens=final.output_tokens or 0,
        cached_input_tokens=cached,
        reasoning_tokens=(details.thinking_tokens or 0) if details else 0,
    )
