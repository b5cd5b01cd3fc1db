"""The settings: every fault at once, and what is allowed but rarely meant."""

from __future__ import annotations

import difflib
import os
import stat
from collections.abc import Iterator
from urllib.parse import urlsplit

from aistream.cli.checks import Finding, Patient
from aistream.config import settings
from aistream.installation import VARIABLES
from aistream.parse import LOOPBACK_HOSTS

NAME = "configuration"
#: Read from .env's place by others, or by libraries.
_FOREIGN = ("COMPOSE_", "DOCKER_", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "TIKTOKEN_", "SSL_CERT_", "PYTHON", "GUNICORN_", "TZ")


def check(patient: Patient) -> Iterator[Finding]:
    """Faults, then doubts, or one line that all is well."""
    found = patient.found
    config = found.config
    for fault in found.faults:
        said, colon, expected = fault.partition(": expected ")
        yield Finding(NAME, "problem", said, f"expected {expected}" if colon else "correct it: .env.example is the manual")
    doubts = [*_of_file(patient), *(_of_dev_mode() if config.dev_mode else _of_production(patient)), *_unknown(patient)]
    yield from doubts
    if not found.faults:
        kind = "DEV_MODE" if config.dev_mode else "production"
        where = f"{found.file} and the environment" if found.file else "the environment alone, without .env"
        yield Finding(NAME, "ok", f"{kind}, from {where}: every setting can be used")


def _of_file(patient: Patient) -> Iterator[Finding]:
    file = patient.found.file
    if file is not None and os.name == "posix" and file.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
        yield Finding(NAME, "warning", f"other users of this machine may read {file}, secrets and all", f"chmod 600 {file}")


def _of_dev_mode() -> Iterator[Finding]:
    yield Finding(
        NAME,
        "warning",
        "DEV_MODE is on: a demo page, the echo model and any resumeUrl on this machine",
        "right for a first run; for others to use it, unset DEV_MODE (make env writes a .env)",
    )


def _of_production(patient: Patient) -> Iterator[Finding]:
    config = patient.found.config
    parts = urlsplit(config.base_url)
    if parts.hostname in LOOPBACK_HOSTS and not patient.faulty("BASE_URL"):
        yield Finding(
            NAME,
            "warning",
            f"BASE_URL is {config.base_url}: only browsers on this machine can open a stream",
            "set BASE_URL to the https:// address that browsers use",
        )
    if not config.allowed_origins:
        yield Finding(
            NAME,
            "warning",
            "ALLOWED_ORIGINS is empty: pages of other origins than BASE_URL's cannot open a stream",
            "set ALLOWED_ORIGINS to the origin of your page, such as https://chat.example.com",
        )
    if config.callback_headers == () and not config.callback_secret:
        yield Finding(
            NAME,
            "warning",
            "callbacks are neither signed nor have a header of their own: n8n cannot tell them from others'",
            "set CALLBACK_SECRET, or CALLBACK_HEADERS for the Wait node's header authentication",
        )
    if config.embedded_store and not patient.faulty("REDIS_URL"):
        yield Finding(
            NAME,
            "warning",
            "REDIS_URL is not set: the embedded store forgets every session and callback when the process ends",
            "set REDIS_URL",
        )


def _unknown(patient: Patient) -> Iterator[Finding]:
    keys = [endpoint.key_variable for endpoint in patient.found.config.endpoints if endpoint.key_variable]
    known = [*settings(), *(variable.name for variable in VARIABLES), *keys]
    for name in sorted(patient.found.in_file - set(known)):
        if not name.startswith(_FOREIGN):
            near = difflib.get_close_matches(name, known, 1, 0.8)
            # Any other name may be a container's that shares the file: only what looks like one of ours is worth a word.
            if near:
                yield Finding(NAME, "warning", f"{name} in .env is no setting", f"was {near[0]} meant?")
