"""The models: which provider serves a name, and one way to run any of them.

Every call of an SDK and every exception of one stays inside this package. What leaves it are `aistream.events` and
`ProviderFailed`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from typing import NamedTuple

from gevent.pool import Pool

from aistream.config import Config
from aistream.endpoints import Endpoint
from aistream.errors import Code, Fault, InvalidRequest, ProviderFailed
from aistream.events import End
from aistream.providers import failures
from aistream.providers.adaptation import Adaptations
from aistream.providers.base import Call, Provider, Say
from aistream.providers.bulkhead import Bulkhead
from aistream.providers.echo import EchoProvider
from aistream.session import Request, Route
from aistream.telemetry import log as lines

#: Which names belong to whom, where no prefix says so. Matched without regard to case.
_PATTERNS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"(gpt|chatgpt)-|o[0-9]|ft:", re.IGNORECASE), "openai"),
    (re.compile(r"claude-", re.IGNORECASE), "anthropic"),
    (re.compile(r"echo\Z", re.IGNORECASE), "echo"),
)
#: OpenAI's models that are no chat completions, among the names that look like theirs.
_NO_CHAT = re.compile(r"-(audio|image|instruct|realtime|transcribe|tts|search)\b", re.IGNORECASE)
#: Models that think before they write their first token, where their name tells it.
_THINKS = re.compile(r"(.*/)?(o[0-9]|gpt-[5-9]|.*(reason|think|magistral|qwq|-r1\b))", re.IGNORECASE)
#: Seconds for which the servers' lists of models are kept, those of servers that could not be asked, and for which one of them
#: is waited for.
LISTED = 300.0
UNLISTED = 2.0
LISTING = 5.0

#: What the demo page offers of a configured provider.
_SHOWN = {
    "openai": ("gpt-4o-mini", "gpt-4o", "gpt-4"),
    "anthropic": ("claude-haiku-4-5", "claude-sonnet-4-5"),
    "echo": ("echo",),
}


class Listing(NamedTuple):
    """What one provider has. `error`: the code of why it could not be asked, or `""`. `usable`: its key is there."""

    endpoint: Endpoint
    usable: bool
    routes: tuple[tuple[str, str], ...]
    error: str


class Served(NamedTuple):
    """A provider, and the places that it has."""

    provider: Provider
    bulkhead: Bulkhead


class Providers:
    """The configured providers. One SDK client each per process: a new one costs 41 ms of CPU."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._endpoints = {endpoint.name: endpoint for endpoint in config.endpoints}
        adaptations = Adaptations()
        self._served: dict[str, Served] = {}
        for endpoint in config.endpoints:
            if endpoint.usable:
                self._served[endpoint.name] = self._serve(_provider(endpoint, adaptations, config.provider_transport))
        if config.dev_mode:
            self._served["echo"] = self._serve(EchoProvider())
        self._listed: tuple[float, list[Listing]] | None = None

    def _serve(self, provider: Provider) -> Served:
        config, limits = self._config, provider.endpoint.limits
        return Served(
            provider,
            Bulkhead(
                limits.concurrency or config.provider_concurrency,
                config.provider_queue if limits.queue is None else limits.queue,
                config.provider_queue_seconds if limits.queue_seconds is None else limits.queue_seconds,
            ),
        )

    def __getitem__(self, name: str) -> Provider:
        return self._served[name].provider

    def bulkhead(self, name: str) -> Bulkhead:
        """The places of this provider."""
        return self._served[name].bulkhead

    def bulkheads(self) -> list[tuple[str, Bulkhead]]:
        """The places of all providers, by name."""
        return [(name, served.bulkhead) for name, served in self._served.items()]

    def secret(self, name: str) -> str:
        """The key of this provider, if there is one."""
        return self._endpoints[name].key if name in self._endpoints else ""

    def known(self, name: str) -> bool:
        """Whether there is such a provider; a session may be older than the configuration."""
        return name in self._served

    def answer(self, route: Route, request: Request, call: Call, say: Say) -> End:
        """The answer of this model: see `Provider.answer`."""
        return self[route.provider].answer(request, route.model, call, say)

    def first_token_seconds(self, route: Route, request: Request) -> float:
        """How long this model may take for its first token."""
        limits = self[route.provider].endpoint.limits
        if limits.first_token_seconds is not None:
            return limits.first_token_seconds
        effort = request.reasoning_effort or self[route.provider].endpoint.defaults.reasoning_effort
        thinks = effort not in ("none", "minimal") if effort else _THINKS.match(route.model)
        return self._config.reasoning_first_token_seconds if thinks else self._config.first_token_seconds

    def silence_seconds(self, provider: str) -> float:
        """How long this provider may be silent in mid-answer."""
        seconds = self[provider].endpoint.limits.silence_seconds
        return self._config.silence_seconds if seconds is None else seconds

    def route(self, model: str, field: str = "model") -> Route:
        """Who serves `model`: a prefix (`openai/…`, `<alias>/…`), an alias, the name's own look, or DEFAULT_PROVIDER.

        Raises InvalidRequest `unknown_model` or `provider_not_configured` that names `field`, so that init can say it to the
        author.
        """
        prefix, slash, rest = model.partition("/")
        if slash and rest and (prefix.lower() in self._endpoints or prefix.lower() == "echo"):
            return self._usable(prefix.lower(), rest, field)
        alias = self._endpoints.get(model.lower())
        if alias is not None and alias.model:
            return self._usable(alias.name, alias.model, field)
        provider = self._by_look(model)
        if provider is None:
            raise _fault(
                field,
                "unknown_model",
                "no provider is known for this model: expected a name such as gpt-4o or claude-sonnet-4-5, a prefix such as "
                "openai/, or DEFAULT_PROVIDER in the service's configuration",
            )
        return self._usable(provider, model, field)

    def _usable(self, provider: str, model: str, field: str) -> Route:
        if provider not in self._served:
            endpoint = self._endpoints.get(provider)
            remedy = f"set {endpoint.key_variable}" if endpoint is not None else "the echo model exists in DEV_MODE only"
            raise _fault(field, "provider_not_configured", f"the provider {provider} is not configured on this service: {remedy}")
        allowed = self[provider].endpoint.models
        if allowed and provider != "echo" and model not in allowed:
            raise _fault(field, "unknown_model", f"is none of the models of {provider} that this service offers (GET /models)")
        return Route(provider, model)

    def _by_look(self, model: str) -> str | None:
        for pattern, provider in _PATTERNS:
            if pattern.match(model):
                return provider
        return self._config.default_provider or None

    def warm_up(self) -> None:
        """Builds the SDK clients now: the first request of a process would fork `uname` and load the CA bundle."""
        for served in self._served.values():
            served.provider.warm_up()

    def close(self) -> None:
        """Closes the connections to all providers that wait for a next request."""
        for served in self._served.values():
            served.provider.close()

    def shown(self) -> Iterable[Route]:
        """Models of the configured providers for a person to choose from."""
        for name, served in self._served.items():
            endpoint = served.provider.endpoint
            for model in endpoint.models or (endpoint.model and (endpoint.model,)) or _SHOWN.get(name, ()):
                yield Route(name, model)

    def name_of(self, route: Route) -> str:
        """What an init calls this model: its bare name where that leads there, else with the provider before it."""
        endpoint = self._endpoints.get(route.provider)
        if endpoint is not None and endpoint.model == route.model:
            return endpoint.name
        try:
            bare = self.route(route.model) == route
        except InvalidRequest:
            bare = False
        return route.model if bare else f"{route.provider}/{route.model}"

    def listing(self) -> list[Listing]:
        """Every provider with what can be asked of it: the models that MODELS_FILE names, else its server's own list.

        All servers are asked at the same time, and not again for LISTED seconds, unless one could not be asked.
        """
        if self._listed is None or time.monotonic() > self._listed[0]:
            endpoints = [*self._endpoints.values(), *([self["echo"].endpoint] if "echo" in self._served else [])]
            found = list(Pool(16).imap(self._list, endpoints))
            patience = LISTED if all(not listing.error for listing in found) else UNLISTED
            self._listed = time.monotonic() + patience, found
        return self._listed[1]

    def _list(self, endpoint: Endpoint) -> Listing:
        if endpoint.name not in self._served:
            return Listing(endpoint, False, (), "")
        names: Iterable[str] = endpoint.models
        if not names:
            try:
                names = self[endpoint.name].models(LISTING)
            except Exception as error:  # a server may answer anything, and its SDK raise whatever it makes of that
                failed = error if isinstance(error, ProviderFailed) else failures.failed(failures.MALFORMED)
                lines.warning("provider.not_listed", provider=endpoint.name, code=failed.code, **failed.log_detail)
                return Listing(endpoint, True, self._named(endpoint, filter(None, [endpoint.model])), failed.code)
        if endpoint.name == "openai" and not endpoint.models:
            names = [name for name in names if self._by_look(name) == "openai" and not _NO_CHAT.search(name)]
        return Listing(endpoint, True, self._named(endpoint, names), "")

    def _named(self, endpoint: Endpoint, names: Iterable[str]) -> tuple[tuple[str, str], ...]:
        return tuple((self.name_of(Route(endpoint.name, name)), name) for name in sorted(set(names)))


def _provider(endpoint: Endpoint, adaptations: Adaptations, transport: str) -> Provider:
    # An SDK is imported only where it is configured: the two take seconds to load and 60 MB to hold.
    if endpoint.api == "anthropic":
        from aistream.providers.anthropic import AnthropicProvider

        return AnthropicProvider(endpoint, adaptations, transport)
    from aistream.providers.openai import OpenAIProvider

    return OpenAIProvider(endpoint, adaptations, transport)


def _fault(field: str, code: Code, message: str) -> InvalidRequest:
    return InvalidRequest.naming(Fault(field, message), code=code)
