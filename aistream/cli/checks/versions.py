"""What runs here, and whether it is what this release was tested with."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from importlib import metadata

from aistream import __version__
from aistream.cli.checks import Finding, Patient

NAME = "versions"
_SHOWN = ("gunicorn", "gevent", "redis", "openai", "anthropic")
_PIN = re.compile(r"([A-Za-z0-9._-]+)(?:\[[^\]]*\])?==([^;\s]+)")


def check(patient: Patient) -> Iterator[Finding]:
    """One line; and one for each direct dependency that is not the pinned one, where the package is installed and says so."""
    shown = ", ".join(f"{name} {_installed(name) or '(missing)'}" for name in _SHOWN)
    yield Finding(NAME, "ok", f"aistream {__version__}, Python {platform.python_version()}, {shown}")
    try:
        required = metadata.requires("aistream") or []
    except metadata.PackageNotFoundError:
        return  # a checkout: requirements.txt is what its venv is made from
    for requirement in required:
        pin = _PIN.match(requirement)
        if pin and _installed(pin[1]) != pin[2]:
            found = f"{pin[1]} is {_installed(pin[1]) or 'missing'}, and this release was tested with {pin[2]}"
            yield Finding(NAME, "warning", found, f"pip install {pin[1]}=={pin[2]}")


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
