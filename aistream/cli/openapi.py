"""`aistream openapi`."""

from __future__ import annotations

import json

import click

from aistream.cli.common import configured


@click.command(
    short_help="Print the OpenAPI document.",
    epilog="""\b
Example:
  aistream openapi > openapi.json
""",
)
def openapi() -> None:
    """Print the OpenAPI document of the service with this configuration."""
    # What it is made from knows all of the service: the other commands need not wait for that.
    from aistream.api.openapi import document

    config = configured()
    click.echo(json.dumps(document(config), indent=2, ensure_ascii=False))
