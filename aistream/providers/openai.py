"""OpenAI's chat completions, and whatever speaks their language under another base URL."""

from __future__ import annotations

from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

import msgspec
import openai

from aistream.endpoints import Endpoint
from aistream.events import End, Usage
from aistream.providers import failures, wire
from aistream.providers.adaptation import Adaptations
from aistream.providers.base import Call, Say, limited, parameters, say_whole
from aistream.providers.translation import translated
from aistream.session import Request

#: Finish reasons in the words of the callback; others are passed on as they are.
_FINISH = {"function_call": "tool_calls"}
#: Finish reasons of an answer that broke off: OpenRouter's, vLLM's, DeepSeek's.
_BROKEN = frozenset({"error", "abort", "insufficient_system_resource"})
#: Each is the other's newer or older name. `max_tokens` is refused by OpenAI's newer models; the newer name is unknown to most
#: compatible servers.
_LIMITS = ("max_completion_tokens", "max_tokens")


class _Part(msgspec.Struct):
    """Mistral's content, where its models think: a list of these."""

    type: str = ""
    text: str | None = None
    thinking: list[_Part] | str | None = None


class _Delta(msgspec.Struct):
    content: str | list[_Part] | None = None
    refusal: str | None = None
    #: DeepSeek, llama.cpp and older vLLM; `reasoning`: OpenRouter, Groq, Ollama and newer vLLM.
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    message: _Delta | None = None
    finish_reason: str | None = None


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _CompletionDetails(msgspec.Struct):
    reasoning_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _PromptDetails | None = None
    completion_tokens_details: _CompletionDetails | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None
    model: str | None = None
    usage: _Usage | None = None
    error: Any = None


_chunk = msgspec.json.Decoder(_Chunk)


class OpenAIProvider:
    """Streams chat completions through the official SDK's raw response."""

    def __init__(self, endpoint: Endpoint, adaptations: Adaptations, transport: str = "fast") -> None:
        """`transport`: see PROVIDER_TRANSPORT."""
        self.endpoint = endpoint
        self._transport = transport
        self._adaptations = adaptations
        official = urlsplit(endpoint.base_url).hostname == "api.openai.com"
        self._limits = _LIMITS if official else _LIMITS[::-1]

    @cached_property
    def _client(self) -> openai.OpenAI:
        return openai.OpenAI(
            api_key=self.endpoint.key or "none",  # the SDK wants one also for a server that wants none
            base_url=self.endpoint.base_url,
            max_retries=0,
            timeout=wire.TIMEOUT,
            http_client=wire.http_client(openai.DefaultHttpxClient, self._transport),
        )

    def warm_up(self) -> None:
        """Builds the client, and the headers that make it fork `uname` once."""
        self._client.default_headers  # noqa: B018  # a cached property: asking is the work

    def close(self) -> None:
        """See `Provider.close`."""
        if "_client" in self.__dict__:
            self._client.close()

    def warnings(self, request: Request) -> list[str]:
        """See `Provider.warnings`."""
        return limited(request, self.endpoint)

    def models(self, timeout: float) -> list[str]:
        """See `Provider.models`."""
        call = Call(Request("", "", "", self.endpoint.name), "", self.endpoint.key)
        with translated(call, openai.APIStatusError, openai.APIConnectionError):
            return [model.id for model in self._client.models.list(timeout=timeout).data]

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
        system = [{"role": "system", "content": request.system}] if request.system else []
        limit = next((name for name in self._limits if name not in refused), "")
        given = {
            limit: asked.max_tokens,
            "temperature": asked.temperature,
            "top_p": asked.top_p,
            "stop": list(asked.stop) or None,
            "reasoning_effort": asked.reasoning_effort,
            "stream": True,
            "stream_options": None if "stream" in refused else {"include_usage": True},
        }
        return {
            **{name: value for name, value in asked.extra.items() if name not in refused},
            "model": model,
            "messages": [*system, *({"role": m.role, "content": m.content} for m in request.conversation())],
        } | {name: value for name, value in given.items() if name and value is not None and name not in refused}

    def _answer(self, body: dict[str, Any], call: Call, say: Say) -> End:
        streamed = "stream" in body
        # An organisation that is not verified may not stream some models: then the whole answer is waited for.
        call.whole = not streamed
        kind = openai.Stream if streamed else None
        with (
            translated(call, openai.APIStatusError, openai.APIConnectionError),
            wire.posted(self._client, "/chat/completions", {**body, "stream": streamed}, kind) as response,
        ):
            return wire.read(response, _Reading(call), _whole, say)


class _Reading(wire.Reading):
    """An answer in chunks of a chat completion."""

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self._finish_reason: str | None = None
        self._refused = False

    def take(self, data: bytes) -> None:
        """See `wire.Reading.take`."""
        if data == b"[DONE]":
            return  # not every compatible server sends it: the finish reason is the mark of an end
        chunk = wire.decode(data, _chunk)
        if chunk.error is not None:
            self.error = chunk.error
            return
        if chunk.model:
            self.call.model = chunk.model
        if chunk.usage is not None:  # the last chunk's; some servers send what it is so far with each
            self.call.usage = _usage(chunk.usage)
        if chunk.choices:
            choice = chunk.choices[0]
            self._finish_reason = choice.finish_reason or self._finish_reason
            delta = choice.delta
            if delta is not None:
                if type(delta.content) is str:
                    self.text += delta.content
                self._take_rest(delta)

    def _take_rest(self, delta: _Delta) -> None:
        """All but plain content."""
        if isinstance(delta.content, list):
            thought, word = _parts(delta.content)
            self.reasoning += thought
            self.text += word
        if delta.refusal:
            self.text += delta.refusal if not delta.content else ""
            self._refused = True
        self.reasoning += delta.reasoning_content or delta.reasoning or ""

    def end(self) -> End:
        """See `wire.Reading.end`."""
        return _end(self._finish_reason, self._refused)


def _whole(body: bytes, call: Call, say: Say) -> End:
    answer = wire.decode(body, _chunk)
    if answer.error is not None:
        raise failures.error_event(answer.error, call)
    if not answer.choices or (message := answer.choices[0].message) is None:
        raise failures.failed(failures.MALFORMED, content_type="application/json")
    call.model = answer.model or call.model
    call.usage = _usage(answer.usage) if answer.usage is not None else None
    thought, word = _parts(message.content)
    say_whole(say, thought or message.reasoning_content or message.reasoning or "", word or message.refusal or "")
    return _end(answer.choices[0].finish_reason, bool(message.refusal))


def _end(finish_reason: str | None, refused: bool) -> End:
    if finish_reason is None:
        # The SDK raises nothing where a stream just ends.
        raise failures.failed(failures.TRUNCATED)
    if finish_reason in _BROKEN:
        raise failures.failed(failures.UNAVAILABLE, finish_reason=finish_reason)
    return End("refusal" if refused else _FINISH.get(finish_reason, finish_reason))


def _parts(content: str | list[_Part] | None) -> tuple[str, str]:
    """What was thought and what was said."""
    if not isinstance(content, list):
        return "", content or ""
    thought, word = "", ""
    for part in content:
        if part.thinking:
            thought += part.thinking if isinstance(part.thinking, str) else _parts(part.thinking)[1]
        word += part.text or ""
    return thought, word


def _usage(usage: _Usage) -> Usage:
    prompt, completion = usage.prompt_tokens_details, usage.completion_tokens_details
    return Usage(
        input_tokens=usage.prompt_tokens or 0,
        output_tokens=usage.completion_tokens or 0,
        cached_input_tokens=(prompt.cached_tokens or 0) if prompt else 0,
        reasoning_tokens=(completion.reasoning_tokens or 0) if completion else 0,
    )
