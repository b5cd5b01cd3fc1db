"""OpenAI's chat completions, and whatever speaks their language under OPENAI_BASE_URL."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

import msgspec
import openai

from aistream.config import Config
from aistream.events import End, Reasoning, Text, Usage
from aistream.providers import wire
from aistream.providers.base import Model, said
from aistream.session import Request


class _Delta(msgspec.Struct):
    content: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    finish_reason: str | None = None


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _CompletionDetails(msgspec.Struct):
    reasoning_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _PromptDetails | None = None
    completion_tokens_details: _CompletionDetails | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    model: str | None = None
    usage: _Usage | None = None
    error: Any = None


_chunk = msgspec.json.Decoder(_Chunk)


class OpenAIProvider:
    """Streams chat completions through the official SDK's raw response."""

    ignores: frozenset[str] = frozenset()

    def __init__(self, config: Config) -> None:
        self._config = config
        # `max_tokens` is refused by the newer models; the newer name is unknown to most compatible servers.
        official = urlsplit(config.openai_base_url).hostname == "api.openai.com"
        self._limit_name = "max_completion_tokens" if official else "max_tokens"

    @cached_property
    def _client(self) -> openai.OpenAI:
        return openai.OpenAI(
            api_key=self._config.openai_api_key,
            base_url=self._config.openai_base_url,
            max_retries=0,
            timeout=wire.TIMEOUT,
            http_client=openai.DefaultHttpxClient(limits=wire.LIMITS, timeout=wire.TIMEOUT),
        )

    def warm_up(self) -> None:
        """Builds the client, and the headers that make it fork `uname` once."""
        self._client.default_headers  # noqa: B018  # a cached property: asking is the work

    def stream(self, request: Request, model: Model) -> Iterator[Text | Reasoning | Usage | End]:
        """See `Provider.stream`."""
        with wire.translated(openai.APIStatusError, openai.APIConnectionError, openai.APITimeoutError):
            create = self._client.chat.completions.with_streaming_response.create
            # All in extra_body, which is merged over the rest: the SDK walks typed parameters by their annotations, for a
            # quarter of a request's CPU.
            with create(model=request.model, messages=[], stream=True, extra_body=self._parameters(request)) as response:
                yield from _events(response.iter_bytes(), model)

    def _parameters(self, request: Request) -> dict[str, Any]:
        system = [{"role": "system", "content": request.system}] if request.system else []
        parameters: dict[str, Any] = {
            "model": request.model,
            "messages": [*system, *({"role": m.role, "content": m.content} for m in request.conversation())],
            "stream": True,
            "stream_options": {"include_usage": True},
            self._limit_name: request.max_tokens,
        }
        given = {"temperature": request.temperature, "top_p": request.top_p, "stop": list(request.stop) or None}
        return parameters | {name: value for name, value in given.items() if value is not None}


def _events(chunks: Iterator[bytes], model: Model) -> Iterator[Text | Reasoning | Usage | End]:
    finish_reason = None
    refused = False
    usage: _Usage | None = None
    for batch in wire.server_events(chunks):
        text, reasoning = "", ""
        for event in batch:
            if event.data == b"[DONE]":
                continue  # not every compatible server sends it: the finish reason is the mark of an end
            chunk = wire.decode(event.data, _chunk)
            if chunk.error is not None:
                yield from said(text, reasoning)
                raise wire.error_event(chunk.error)
            if chunk.model:
                model.name = chunk.model
            usage = chunk.usage or usage
            for choice in chunk.choices[:1]:
                finish_reason = choice.finish_reason or finish_reason
                if choice.delta is not None:
                    text += choice.delta.content or choice.delta.refusal or ""
                    refused = refused or bool(choice.delta.refusal)
                    reasoning += choice.delta.reasoning_content or ""
        yield from said(text, reasoning)
    if finish_reason is None:
        raise wire.truncated()
    if usage is not None:
        yield _usage(usage)
    yield End("refusal" if refused else finish_reason)


def _usage(usage: _Usage) -> Usage:
    prompt, completion = usage.prompt_tokens_details, usage.completion_tokens_details
    return Usage(
        input_tokens=usage.prompt_tokens,
        output_tokens=usage.completion_tokens,
        cached_input_tokens=(prompt.cached_tokens or 0) if prompt else 0,
        reasoning_tokens=(completion.reasoning_tokens or 0) if completion else 0,
    )
