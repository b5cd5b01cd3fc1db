"""`aistream serve`: gunicorn with the service's settings, from wherever the package is."""

from __future__ import annotations

import os
import sys

import click

from aistream import server

APP = "aistream.wsgi:app"


@click.command(
    short_help="Start the service.",
    epilog="""\b
Examples:
  aistream serve --dev                      a demo page on http://127.0.0.1:8000/
  aistream serve --host 0.0.0.0 --workers 4
  aistream serve -- --max-requests 100000   what follows -- is gunicorn's own
""",
)
@click.option("--host", help="Address to listen on, in place of HOST.")
@click.option("--port", type=click.IntRange(1, 65_535), help="Port to listen on, in place of PORT.")
@click.option("--workers", type=click.IntRange(1, 256), help="Worker processes, in place of WEB_CONCURRENCY.")
@click.option("--dev", is_flag=True, help="DEV_MODE=true, and DRAIN_SECONDS=2 where the environment has none.")
@click.argument("gunicorn_arguments", nargs=-1, type=click.UNPROCESSED)
def serve(host: str | None, port: int | None, workers: int | None, dev: bool, gunicorn_arguments: tuple[str, ...]) -> None:
    """Starts the service in the foreground.

    Settings come from the environment and from .env in this folder; the options win over both. This process becomes gunicorn's
    master: signals and exit codes are gunicorn's (SIGTERM drains, SIGHUP reads the configuration anew and replaces the workers).
    """
    given = {"HOST": host, "PORT": port, "WEB_CONCURRENCY": workers}
    os.environ.update({name: str(value) for name, value in given.items() if value is not None})
    if dev:
        os.environ["DEV_MODE"] = "true"
        os.environ.setdefault("DRAIN_SECONDS", "2")
    sys.stdout.flush()
    sys.stderr.flush()
    # The file, not the module: gunicorn reads a file anew on SIGHUP. What is given last counts.
    command = [sys.executable, "-m", "gunicorn", "--config", str(server.__file__), APP, *gunicorn_arguments]
    os.execv(sys.executable, command)  # nosec B606  # no shell, and nothing but this user's own arguments
