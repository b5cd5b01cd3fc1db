"""Prints a token that n8n could have signed; with --curl the whole call to paste. Reads the service's own configuration."""

import json
import shlex
import sys
import time
import uuid

import click

from aistream.config import Config
from aistream.environment import load
from aistream.errors import ConfigError
from aistream.tokens import Tokens


@click.command(help=__doc__)
@click.option("--sub", default="n8n", show_default=True, help="Whom the token speaks for: owns what it starts.")
@click.option("--ttl", type=click.IntRange(1), help="Seconds until it expires; by default an hour, or as long as is accepted.")
@click.option("--audience", default="", help="aud; by default JWT_AUDIENCE.")
@click.option("--issuer", default="", help="iss; by default JWT_ISSUER.")
@click.option("--curl", is_flag=True, help="Print the call of POST /init-stream instead of the bare token.")
@click.option("--prompt", default="Tell me something about streams.", show_default=True, help="The call's prompt.")
@click.option("--model", default="", help="The call's model; by default DEFAULT_MODEL.")
@click.option("--resume-url", default="", help="The call's resumeUrl; by default one that the service accepts.")
def main(sub: str, ttl: int | None, audience: str, issuer: str, curl: bool, prompt: str, model: str, resume_url: str) -> None:
    """The command."""
    try:
        config = load()
    except ConfigError as error:
        sys.exit(str(error))
    most = int(config.jwt_max_lifetime_seconds)
    ttl = min(3600, most) if ttl is None else ttl
    if ttl > most:
        raise click.BadParameter(f"the service accepts at most {most} (JWT_MAX_LIFETIME_SECONDS)", param_hint="--ttl")
    token = Tokens(config, time.time).sign_caller(sub, int(time.time()) + ttl, audience, issuer)
    if not curl:
        click.echo(token)
        return
    body = {"prompt": prompt, "resumeUrl": resume_url or _resume_url(config), "userId": "user123", "chatId": "chat123"}
    if model:
        body["model"] = model
    click.echo(
        f"curl -sS -X POST {shlex.quote(config.base_url + '/init-stream')} \\\n"
        f"  -H {shlex.quote('Authorization: Bearer ' + token)} \\\n"
        f"  -H 'Content-Type: application/json' \\\n"
        f"  -d {shlex.quote(json.dumps(body, ensure_ascii=False))}"
    )


def _resume_url(config: Config) -> str:
    if config.dev_mode:
        return f"http://127.0.0.1:{config.port}/demo/callback/{uuid.uuid4().hex}"
    return f"{config.resume_url_allowed_origins[0]}/webhook-waiting/1"


if __name__ == "__main__":
    main()
