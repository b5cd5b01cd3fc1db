"""One question to a provider that costs nothing: its list of models, asked as its SDK would, with our transport and its key.

Without the SDK, whose import takes a second; through the same transport, so with the same authorities and proxies.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import httpx2

from aistream.endpoints import Endpoint
from aistream.providers import wire

#: Where no other one is configured: of the API that every SDK of these years speaks.
_ANTHROPIC_VERSION = "2023-06-01"


class Probed(NamedTuple):
    """The status of the answer, or 0 and why there was none. `date`: its Date; `asked_at`, `answered_at`: by our clock."""

    status: int
    why: str
    date: str
    asked_at: float
    answered_at: float


def probe(endpoint: Endpoint, transport: str, timeout: float) -> Probed:
    """Asks it. Raises nothing; `why` is a kind of failure, and quotes neither key nor answer."""
    if endpoint.api == "anthropic":
        url = f"{endpoint.base_url}/v1/models?limit=1"
        headers = {"x-api-key": endpoint.key or "none", "anthropic-version": endpoint.anthropic_version or _ANTHROPIC_VERSION}
    else:
        url = f"{endpoint.base_url}/models"
        headers = {"Authorization": f"Bearer {endpoint.key or 'none'}"}
    asked_at = time.time()
    try:
        with (
            wire.http_client(httpx2.Client, transport) as client,
            client.stream("GET", url, headers=headers, timeout=timeout) as answer,
        ):
            return Probed(answer.status_code, "", answer.headers.get("Date", ""), asked_at, time.time())
    except Exception as error:  # whatever a server may do to its client
        return Probed(0, type(error).__name__, "", asked_at, time.time())
