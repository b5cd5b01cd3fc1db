"""The shell's side of the service: one click group, a module for each command.

A command's module is imported when the command is asked for: `aistream token` need not wait for the Redis client.
"""

from __future__ import annotations

from importlib import import_module

import click

from aistream import __version__

#: In the order of the help. Each is a command of this name in the module of this name.
COMMANDS = ("serve", "token", "stream", "doctor", "callbacks", "openapi")


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(import_module(f"aistream.cli.{cmd_name}"), cmd_name)
        return command


@click.group(
    cls=_Commands,
    epilog="""\b
Examples:
  aistream serve --dev          the service with a demo page, on this machine
  aistream stream --dev "Hello" an answer, as it is written
  aistream doctor               what is wrong, and what mends it
  aistream COMMAND --help       options and examples of a command
""",
)
@click.version_option(__version__, prog_name="aistream")
def main() -> None:
    """aistream: streams AI answers from a workflow to a browser, and reports them back.

    Settings come from the environment and from .env in the current folder; .env.example is their manual.
    """
