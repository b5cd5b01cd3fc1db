"""Where callbacks go: each allowed origin as the sender would reach it, and one resumeUrl as init would judge it.

Nothing is posted, and no resumeUrl is asked: a GET may resume an execution as well. What is asked is the origin's root.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from functools import partial
from urllib.parse import urlsplit

from gevent.pool import Pool
from requests.utils import DEFAULT_CA_BUNDLE_PATH

from aistream.cli.checks import Clock, Finding, Patient, reach
from aistream.config import Config
from aistream.destination import Destinations
from aistream.errors import DestinationRefused
from aistream.parse import origin_of

NAME = "resume URL"
_TRUST = "callbacks trust public authorities alone: give n8n such a certificate, or call it by http:// in your own network"


def check(patient: Patient) -> Iterator[Finding]:
    """The rules of RESUME_URL_REWRITE, then each origin, then the given URL."""
    config = patient.found.config
    allowed = config.resume_url_allowed_origins
    anything = config.dev_mode and not allowed
    for given, made in config.resume_url_rewrite:
        if made not in allowed and not anything:
            yield Finding(
                NAME,
                "problem",
                f"RESUME_URL_REWRITE makes {made} of {given}, and no callback may go there",
                f"add {made} to RESUME_URL_ALLOWED_ORIGINS",
            )
    rewritten = dict(config.resume_url_rewrite)
    origins = list(dict.fromkeys(rewritten.get(origin, origin) for origin in allowed))
    origins = [origin for origin in origins if origin in allowed]
    yield from Pool(16).imap(partial(_origin, patient), origins)
    if not origins:
        why = "DEV_MODE allows every one on this machine and on public addresses" if anything else "none is allowed"
        yield Finding(
            NAME, "skipped", f"RESUME_URL_ALLOWED_ORIGINS is empty: {why}", "" if anything else "set it to n8n's origin"
        )
    if patient.resume_url:
        yield from _given(patient, origins)


def _given(patient: Patient, asked: list[str]) -> Iterator[Finding]:
    config, url = patient.found.config, patient.resume_url
    name = "--resume-url"
    try:
        goal = Destinations(config).of(url)
    except DestinationRefused as refused:
        yield Finding(name, "problem", f"init would refuse it: it {refused}", _mend(refused))
        return
    origin, given = origin_of(goal), origin_of(url)
    rule = f"RESUME_URL_REWRITE makes {origin} of {given}, which" if origin != given else f"its origin {origin}"
    listed = origin in config.resume_url_allowed_origins
    by = "is among RESUME_URL_ALLOWED_ORIGINS" if listed else "is allowed by DEV_MODE"
    yield Finding(name, "ok", f"init would take it: {rule} {by}")
    if origin not in asked:
        yield _origin(patient, origin)


def _mend(refused: DestinationRefused) -> str:
    if "RESUME_URL_ALLOWED_ORIGINS" in str(refused):
        return "add the origin to RESUME_URL_ALLOWED_ORIGINS, or one that is allowed to RESUME_URL_REWRITE"
    return "give the workflow's $execution.resumeUrl as it is"


def _origin(patient: Patient, origin: str) -> Finding:
    name = f"{NAME} {origin}"
    destinations = Destinations(patient.found.config)
    context = ssl.create_default_context(cafile=DEFAULT_CA_BUNDLE_PATH) if origin.startswith("https") else None
    try:
        answer = reach.ask(
            origin + "/",
            method="HEAD",
            context=context,
            trust=_TRUST,
            allowed=lambda address: destinations.check_address(address, origin),
        )
    except reach.Unreachable as unreachable:
        return Finding(name, "problem", unreachable.found, _for_n8n(patient.found.config, origin, unreachable.mend))
    except DestinationRefused as refused:
        return Finding(name, "problem", f"it {refused}", "give n8n an address in a network of its own, and its name there")
    if answer.ahead is not None:
        patient.clocks.append(Clock(origin, answer.ahead))
    if answer.status >= 500:
        return Finding(name, "warning", f"{answer.address} answers {answer.status}", "look at whether n8n runs behind its proxy")
    return Finding(name, "ok", f"{answer.address} answers {answer.status}")


def _for_n8n(config: Config, origin: str, mend: str) -> str:
    if urlsplit(origin).hostname in ("localhost", "127.0.0.1", "::1"):
        return f"{mend}; in a container this is the container itself: RESUME_URL_REWRITE gives n8n's name there"
    return mend
