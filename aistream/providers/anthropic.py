"""Anthropic's messages."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import anthropic
import msgspec

from aistream.config import Config
from aistream.events import End, Reasoning, Text, Usage
from aistream.providers import wire
from aistream.providers.base import Model, said
from aistream.session import Request

#: Anthropic's stop reasons in the words of the callback; others are passed on as they are.
_FINISH = {"end_turn": "stop", "stop_sequence": "stop", "max_tokens": "length", "tool_use": "tool_calls"}


class _Usage(msgspec.Struct):
    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_creation_input_tokens: int | None = None
    cache_read_input_tokens: int | None = None


class _Message(msgspec.Struct):
    model: str | None = None
    usage: _Usage | None = None


class _Delta(msgspec.Struct):
    text: str | None = None
    thinking: str | None = None
    stop_reason: str | None = None


class _Event(msgspec.Struct):
    type: str = ""
    message: _Message | None = None
    delta: _Delta | None = None
    usage: _Usage | None = None
    error: Any = None


_event = msgspec.json.Decoder(_Event)


class AnthropicProvider:
    """Streams messages through the official SDK's raw response."""

    # Removed in API version 2026-10-21, which the SDK sends since 2.0: a request that has them is answered 400, even with
    # their default values (platform.claude.com, Versions).
    ignores = frozenset({"temperature", "top_p"})

    def __init__(self, config: Config) -> None:
        self._config = config

    @cached_property
    def _client(self) -> anthropic.Anthropic:
        return anthropic.Anthropic(
            api_key=self._config.anthropic_api_key,
            base_url=self._config.anthropic_base_url,
            max_retries=0,
            timeout=wire.TIMEOUT,
            http_client=anthropic.DefaultHttpxClient(limits=wire.LIMITS, timeout=wire.TIMEOUT),
        )

    def warm_up(self) -> None:
        """Builds the client, and the headers that make it fork `uname` once."""
        self._client.default_headers  # noqa: B018  # a cached property: asking is the work

    def stream(self, request: Request, model: Model) -> Iterator[Text | Reasoning | Usage | End]:
        """See `Provider.stream`."""
        with wire.translated(anthropic.APIStatusError, anthropic.APIConnectionError, anthropic.APITimeoutError):
            create = self._client.messages.with_streaming_response.create
            # As for OpenAI: typed parameters are walked by their annotations, extra_body is merged as it is.
            body = _parameters(request)
            with create(
                model=request.model, max_tokens=request.max_tokens, messages=[], stream=True, extra_body=body
            ) as response:
                yield from _events(response.iter_bytes(), model)


def _parameters(request: Request) -> dict[str, Any]:
    # Anthropic knows no system role among the messages.
    turns = request.conversation()
    system = [request.system or "", *(m.content for m in turns if m.role == "system")]
    given = {
        "system": "\n\n".join(filter(None, system)) or None,
        "stop_sequences": list(request.stop) or None,
    }
    return {
        "model": request.model,
        "messages": [{"role": m.role, "content": m.content} for m in turns if m.role != "system"],
        "max_tokens": request.max_tokens,
        "stream": True,
    } | {name: value for name, value in given.items() if value is not None}


def _events(chunks: Iterator[bytes], model: Model) -> Iterator[Text | Reasoning | Usage | End]:
    stop_reason = None
    stopped = False
    started = _Usage()
    final: _Usage | None = None
    for batch in wire.server_events(chunks):
        text, reasoning = "", ""
        for server_event in batch:
            event = wire.decode(server_event.data, _event)
            match event.type:
                case "content_block_delta" if event.delta is not None:
                    text += event.delta.text or ""
                    reasoning += event.delta.thinking or ""
                case "message_start" if event.message is not None:
                    model.name = event.message.model or model.name
                    started = event.message.usage or started
                case "message_delta":
                    stop_reason = (event.delta.stop_reason if event.delta else None) or stop_reason
                    final = event.usage or final
                case "message_stop":
                    stopped = True
                case "error":
                    yield from said(text, reasoning)
                    raise wire.error_event(event.error)
        yield from said(text, reasoning)
    if not stopped:
        raise wire.truncated()
    # `output_tokens` of message_start is a placeholder: only message_delta's, which is cumulative, is a figure.
    if final is not None and final.output_tokens is not None:
        yield _usage(started, final)
    yield End(_FINISH.get(stop_reason or "", stop_reason or "stop"))


def _usage(started: _Usage, final: _Usage) -> Usage:
    def figure(name: str) -> int:
        return getattr(final, name) or getattr(started, name) or 0

    cached = figure("cache_read_input_tokens")
    return Usage(
        # Anthropic counts what it read from and wrote to its cache apart from the other input.
        input_tokens=figure("input_tokens") + figure("cache_creation_input_tokens") + cached,
        output_tokens=final.output_tokens or 0,
        cached_input_tokens=cached,
    )
