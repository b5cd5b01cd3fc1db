"""`aistream token`, and generate_token.py."""

from __future__ import annotations

import json
import shlex
import time
import uuid

import click

from aistream.cli.common import as_json, configured, dev
from aistream.config import Config
from aistream.tokens import Tokens

#: Whom a token speaks for, where nobody says.
SUBJECT = "n8n"


@click.command(
    short_help="Print a token, or the call to paste.",
    epilog="""\b
Examples:
  TOKEN=$(aistream token)
  aistream token --curl --prompt "Hello" | sh    asks a running service
  aistream token --sub team-a --ttl 300 --json
""",
)
@click.option("--sub", default=SUBJECT, show_default=True, help="Whom the token speaks for: owns what it starts.")
@click.option("--ttl", type=click.IntRange(1), help="Seconds until it expires; by default an hour, or as long as is accepted.")
@click.option("--audience", default="", help="aud; by default JWT_AUDIENCE.")
@click.option("--issuer", default="", help="iss; by default JWT_ISSUER.")
@click.option("--curl", is_flag=True, help="Print the call of POST /init-stream instead of the bare token.")
@click.option("--prompt", default="Tell me something about streams.", show_default=True, help="The call's prompt.")
@click.option("--model", default="", help="The call's model; by default DEFAULT_MODEL.")
@click.option("--resume-url", default="", help="The call's resumeUrl; by default one that the service accepts.")
@dev
@as_json
def token(
    sub: str, ttl: int | None, audience: str, issuer: str, curl: bool, prompt: str, model: str, resume_url: str, as_json: bool
) -> None:
    """Prints a token that n8n could have signed; with --curl the whole call to paste. Reads the service's own configuration."""
    config = configured()
    most = int(config.jwt_max_lifetime_seconds)
    ttl = min(3600, most) if ttl is None else ttl
    if ttl > most:
        raise click.BadParameter(f"the service accepts at most {most} (JWT_MAX_LIFETIME_SECONDS)", param_hint="--ttl")
    expires_at = int(time.time()) + ttl
    signed = Tokens(config, time.time).sign_caller(sub, expires_at, audience, issuer)
    body = {"prompt": prompt, "resumeUrl": resume_url or default_resume_url(config), "userId": "user123", "chatId": "chat123"}
    if model:
        body["model"] = model
    call = (
        f"curl -sS -X POST {shlex.quote(config.base_url + '/init-stream')} \\\n"
        f"  -H {shlex.quote('Authorization: Bearer ' + signed)} \\\n"
        f"  -H 'Content-Type: application/json' \\\n"
        f"  -d {shlex.quote(json.dumps(body, ensure_ascii=False))}"
    )
    if as_json:
        click.echo(json.dumps({"token": signed, "sub": sub, "exp": expires_at, **({"curl": call} if curl else {})}))
    else:
        click.echo(call if curl else signed)


def default_resume_url(config: Config) -> str:
    """One that the service accepts: in DEV_MODE its own receiver, else one of n8n's that no execution waits at."""
    if config.dev_mode:
        return f"http://127.0.0.1:{config.port}/demo/callback/{uuid.uuid4().hex}"
    return f"{config.resume_url_allowed_origins[0]}/webhook-waiting/1"
