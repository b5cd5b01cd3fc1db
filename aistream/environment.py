"""Where the settings come from: the process's environment, a `.env` file and, in DEV_MODE, a secret of this checkout.

The only module that reads files for the configuration. `python -m aistream.environment` writes a `.env`; with `-`, to standard
output, as a container does.
"""

from __future__ import annotations

import base64
import dataclasses
import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dotenv import dotenv_values

from aistream import tls
from aistream.config import Config, manual, settings
from aistream.errors import ConfigError
from aistream.installation import VARIABLES

#: The folder of `wsgi.py`, `.env` and `.env.example`.
ROOT = Path(__file__).resolve().parent.parent


class Found(NamedTuple):
    """What there is of a configuration. `file`: the `.env`, if it counts, and `in_file` the names in it."""

    config: Config
    faults: list[str]
    file: Path | None
    in_file: frozenset[str]


def load(environ: Mapping[str, str] | None = None, root: Path | None = None) -> Config:
    """The configuration of this process. A variable of the environment wins over `.env`; PYTHON_DOTENV_DISABLED (python-dotenv's
    own switch) leaves the file out.

    In DEV_MODE without JWT_SECRET a random one is made once and kept in `.dev-secret`, so that `make run`, `flask run` and
    `generate_token.py` agree on it. Raises ConfigError.
    """
    found = look(environ, root, keep_secret=True)
    if found.faults:
        raise ConfigError(found.faults)
    return found.config


def look(environ: Mapping[str, str] | None = None, root: Path | None = None, *, keep_secret: bool = False) -> Found:
    """The same with every fault beside it, for who looks what is wrong; nothing is written unless DEV_MODE's secret is kept."""
    environ = os.environ if environ is None else environ
    root = _root() if root is None else root
    disabled = environ.get("PYTHON_DOTENV_DISABLED", "").lower() in ("1", "true", "yes", "on", "t", "y")
    said = {name for name, setting in settings().items() if setting.empties}  # also by nothing
    file = {} if disabled else dotenv_values(root / ".env")
    values = {name: value for name, value in file.items() if value or (value is not None and name in said)}
    values |= {name: value for name, value in environ.items() if value.strip() or name in said}
    if not values.get("JWT_SECRET") and values.get("DEV_MODE", "").strip().lower() in ("true", "1", "yes", "on"):
        values["JWT_SECRET"] = _dev_secret(root / ".dev-secret", keep_secret)
    config, faults = Config.as_far_as_it_goes(values, lambda path: (root / path).read_text(encoding="utf-8"))
    files: dict[str, Any] = {name: getattr(config, name) for name in ("redis_ca_file", "redis_cert_file", "redis_key_file")}
    files = {name: str(root / path) for name, path in files.items() if path}
    config = dataclasses.replace(config, **files)
    if config.redis_address and config.redis_address.tls:
        try:
            tls.context(config)  # told now, by gunicorn's master: a worker that cannot start would be started again and again
        except ConfigError as error:
            faults += error.faults
    path = root / ".env"
    return Found(config, faults, path if not disabled and path.is_file() else None, frozenset(file))


def _root() -> Path:
    # Installed as a package there is no checkout around it: then the folder it is started in.
    return ROOT if (ROOT / "wsgi.py").exists() else Path.cwd()


def _dev_secret(path: Path, keep: bool) -> str:
    try:
        secret = path.read_text().strip()
        if len(secret) >= 64:
            return secret
        if keep:
            path.unlink()
    except FileNotFoundError:
        pass
    except OSError:
        return secrets.token_hex(32)
    fresh = secrets.token_hex(32)
    if not keep:
        return fresh
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(fresh + "\n")
        # link() refuses to replace: of two processes that start at once, both end up with the first one's secret.
        os.link(partial, path)
        return fresh
    except FileExistsError:
        return path.read_text().strip()
    except OSError:
        return fresh
    finally:
        partial.unlink(missing_ok=True)


def fresh_env() -> str:
    """The text of a `.env` in which only the provider keys are missing, for `gunicorn wsgi:app` and docker-compose.yml alike."""
    return manual(
        {
            "JWT_SECRET": secrets.token_hex(32),
            "CALLBACK_SECRET": "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode(),
            "CALLBACK_HEADERS": "X-Aistream-Key: " + secrets.token_hex(24),
            "BASE_URL": "http://127.0.0.1:8000",
            "RESUME_URL_ALLOWED_ORIGINS": "http://localhost:5678,http://127.0.0.1:5678,http://n8n:5678",
            "ALLOWED_ORIGINS": "http://localhost:3000",
            **{variable.name: secrets.token_hex(24) for variable in VARIABLES if not variable.default},
        }
    )


def write_env(path: Path) -> None:
    """Writes `fresh_env()`. Raises FileExistsError rather than replace one."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(fresh_env())


def main(arguments: Sequence[str]) -> int:
    """Writes `.env` beside `.env.example`, or with `-` to standard output; says what is left to fill in."""
    if list(arguments) == ["-"]:
        sys.stdout.write(fresh_env())
        return 0
    path = _root() / ".env"
    try:
        write_env(path)
    except FileExistsError:
        print(f"{path} exists already: it is left as it is. Remove it first to have a new one.", file=sys.stderr)
        return 1
    print(
        f"wrote {path} with random secrets. Fill in OPENAI_API_KEY or ANTHROPIC_API_KEY (or both), "
        "then: docker compose up --build, or gunicorn wsgi:app"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
