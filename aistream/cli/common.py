"""What the commands share."""

from __future__ import annotations

import os
import sys

import click
from rich.console import Console

from aistream.config import Config
from aistream.environment import load
from aistream.errors import ConfigError

as_json = click.option("--json", "as_json", is_flag=True, help="One JSON object per line, for programs.")


def _set_dev_mode(_ctx: click.Context, _param: click.Parameter, given: bool) -> None:
    if given:
        os.environ["DEV_MODE"] = "true"


#: For the commands that stand beside a service which `aistream serve --dev` has started.
dev = click.option(
    "--dev", is_flag=True, expose_value=False, callback=_set_dev_mode, help="With DEV_MODE=true, as `aistream serve --dev`."
)


def configured() -> Config:
    """The service's own configuration; a bad one ends the command with exit code 1 and a line for each fault."""
    try:
        return load()
    except ConfigError as error:
        nothing = any(fault.startswith("JWT_SECRET is not set") for fault in error.faults)
        sys.exit(f"{error}\nBeside a service that `aistream serve --dev` has started: --dev" if nothing else str(error))


def console() -> Console:
    """Standard output, for people. Piped into a file or a pager, a table has the width that it needs."""
    return Console() if sys.stdout.isatty() else Console(width=200)
