"""The models: which provider serves a name, and one way to run any of them.

Every call of an SDK and every exception of one stays inside this package. What leaves it are `aistream.events` and
`ProviderFailed`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from aistream.config import Config
from aistream.errors import Fault, InvalidRequest
from aistream.providers.base import Provider
from aistream.providers.echo import EchoProvider

#: Which names belong to whom, where no prefix says so. Matched without regard to case.
_PATTERNS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"(gpt|chatgpt)-|o[0-9]|ft:", re.IGNORECASE), "openai"),
    (re.compile(r"claude-", re.IGNORECASE), "anthropic"),
    (re.compile(r"echo\Z", re.IGNORECASE), "echo"),
)
_KEYS = {"openai": "OPENAI_API_KEY", "anthropic": "ANTHROPIC_API_KEY"}

#: What the demo page offers of a configured provider.
_SHOWN = {
    "openai": ("gpt-4o-mini", "gpt-4o", "gpt-4"),
    "anthropic": ("claude-haiku-4-5", "claude-sonnet-4-5"),
    "echo": ("echo",),
}


class Route(NamedTuple):
    """Where a model's name leads: the provider, and the name that it is asked for."""

    provider: str
    model: str


class Providers:
    """The configured providers. One SDK client each per process: a new one costs 41 ms of CPU."""

    def __init__(self, config: Config) -> None:
        self._default = config.default_provider
        self._providers: dict[str, Provider] = {}
        # An SDK is imported only where it is configured: the two take seconds to load and 60 MB to hold.
        if config.openai_api_key:
            from aistream.providers.openai import OpenAIProvider

            self._providers["openai"] = OpenAIProvider(config)
        if config.anthropic_api_key:
            from aistream.providers.anthropic import AnthropicProvider

            self._providers["anthropic"] = AnthropicProvider(config)
        if config.dev_mode:
            self._providers["echo"] = EchoProvider()

    def __getitem__(self, name: str) -> Provider:
        return self._providers[name]

    def route(self, model: str) -> Route:
        """Who serves `model`: an explicit prefix (`openai/…`), the name's own look, or DEFAULT_PROVIDER.

        Raises InvalidRequest `unknown_model` or `provider_not_configured`, so that init can say it to the author.
        """
        prefix, slash, rest = model.partition("/")
        if slash and rest and prefix.lower() in (*_KEYS, "echo"):
            return self._configured(prefix.lower(), rest)
        provider = self._by_look(model)
        if provider is None:
            raise _fault(
                "unknown_model",
                "no provider is known for this model: expected a name such as gpt-4o or claude-sonnet-4-5, a prefix such as "
                "openai/, or DEFAULT_PROVIDER in the service's configuration",
            )
        return self._configured(provider, model)

    def _configured(self, provider: str, model: str) -> Route:
        if provider not in self._providers:
            remedy = f"set {_KEYS[provider]}" if provider in _KEYS else "the echo model exists in DEV_MODE only"
            raise _fault("provider_not_configured", f"the provider {provider} is not configured on this service: {remedy}")
        return Route(provider, model)

    def _by_look(self, model: str) -> str | None:
        for pattern, provider in _PATTERNS:
            if pattern.match(model):
                return provider
        return self._default or None

    def warm_up(self) -> None:
        """Builds the SDK clients now: the first request of a process would fork `uname` and load the CA bundle."""
        for provider in self._providers.values():
            provider.warm_up()

    def shown(self) -> Iterable[Route]:
        """Models of the configured providers for a person to choose from."""
        return [Route(provider, model) for provider in self._providers for model in _SHOWN[provider]]


def _fault(code: str, message: str) -> InvalidRequest:
    return InvalidRequest.naming(Fault("model", message), code=code)
