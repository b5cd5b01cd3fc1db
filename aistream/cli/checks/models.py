"""The providers: each that is configured is asked for its list of models, which costs nothing."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from gevent.pool import Pool

from aistream.cli.checks import Clock, Finding, Patient, State, reach
from aistream.config import Config
from aistream.endpoints import Endpoint
from aistream.errors import InvalidRequest
from aistream.providers import Providers
from aistream.providers.probing import Probed, probe

NAME = "provider"
_TRUST = "set SSL_CERT_FILE to a file with its authority, or give it a certificate from a public one"


def check(patient: Patient) -> Iterator[Finding]:
    """One finding for each endpoint, then whether the default model has one."""
    config = patient.found.config
    usable = [endpoint for endpoint in config.endpoints if endpoint.usable]
    asked = Pool(16).imap(lambda endpoint: probe(endpoint, config.provider_transport, reach.TIMEOUT), usable)
    probed = dict(zip([endpoint.name for endpoint in usable], asked, strict=True))
    for endpoint in config.endpoints:
        if endpoint.name in probed:
            yield _judged(endpoint, probed[endpoint.name], patient)
        else:
            yield _without_key(endpoint)
    yield _default(config, bool(usable))


def _without_key(endpoint: Endpoint) -> Finding:
    name = f"{NAME} {endpoint.name}"
    if endpoint.name in ("openai", "anthropic"):
        return Finding(name, "skipped", f"{endpoint.key_variable} is not set")
    return Finding(name, "warning", f"MODELS_FILE has it, and {endpoint.key_variable} is not set", f"set {endpoint.key_variable}")


def _default(config: Config, any_usable: bool) -> Finding:
    try:
        route = Providers(config).route(config.default_model)
    except InvalidRequest as refused:
        state: State = "warning" if any_usable else "problem"
        mend = (
            "set DEFAULT_MODEL to one that a configured provider has" if any_usable else "set OPENAI_API_KEY or ANTHROPIC_API_KEY"
        )
        return Finding("default model", state, f"{config.default_model}: {refused.faults[0].message}", mend)
    return Finding("default model", "ok", f"{config.default_model}, by {route.provider}")


def _judged(endpoint: Endpoint, probed: Probed, patient: Patient) -> Finding:
    name, where = f"{NAME} {endpoint.name}", urlsplit(endpoint.base_url).netloc
    offset = reach.ahead(probed.date, probed.asked_at, probed.answered_at)
    if offset is not None:
        patient.clocks.append(Clock(where, offset))
    key = endpoint.key_variable
    base = {"openai": "OPENAI_BASE_URL", "anthropic": "ANTHROPIC_BASE_URL"}.get(endpoint.name, f"[{endpoint.name}] base_url")
    match probed.status:
        case 0:
            return Finding(name, "problem", *_why(endpoint, probed))
        case 200:
            return Finding(name, "ok", f"{where} answers" + (f", and takes {key}" if key else ""))
        case 401 | 403:
            return Finding(
                name,
                "problem",
                f"{where} does not accept {key or 'a request without a key'} ({probed.status})",
                f"put a valid key into {key}" if key else "set key_variable for it in MODELS_FILE",
            )
        case 404 | 405:
            return Finding(
                name,
                "warning",
                f"{where} has no list of models there ({probed.status}): whether it takes the key is not known",
                f"look at {base}: OpenAI's language wants its version in it, such as /v1; Anthropic's does not",
            )
        case 402 | 429:
            return Finding(
                name, "warning", f"{where} limits this key now ({probed.status})", "look at the account's quota and limits"
            )
        case status if 300 <= status < 400:
            return Finding(name, "problem", f"{where} redirects ({status})", f"set {base} to where it leads")
        case status:
            return Finding(name, "problem", f"{where} answers {status}", "look at the provider's status page, or its log")


def _why(endpoint: Endpoint, probed: Probed) -> tuple[str, str]:
    """Why there was no answer: each step is taken once more, by itself."""
    parts = urlsplit(endpoint.base_url)
    host, tls = parts.hostname or "", parts.scheme == "https"
    port = parts.port or (443 if tls else 80)
    if parts.scheme in getproxies() and not proxy_bypass(host):
        return (
            f"{host} does not answer through the proxy of the environment ({probed.why})",
            "look at HTTP_PROXY, HTTPS_PROXY, NO_PROXY",
        )
    try:
        sock, _ = reach.connect(host, port)
        if tls:
            sock = reach.secured(sock, host, ssl.create_default_context(), _TRUST)
        sock.close()
    except reach.Unreachable as unreachable:
        return unreachable.found, unreachable.mend
    if "Timeout" in probed.why:
        return f"{host}:{port} does not answer within {reach.TIMEOUT:g} s", "look at whether it is overloaded or hangs"
    return f"what answers at {host}:{port} does not speak HTTP as expected ({probed.why})", "correct the base URL"
