"""Where models are served: the built-in providers, and what the file MODELS_FILE adds to them. Pure.

The file is TOML, one table for each alias; docs/providers.md has an example and every name in it.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

OPENAI_URL = "https://api.openai.com/v1"
ANTHROPIC_URL = "https://api.anthropic.com"

#: How hard a model is to think: OpenAI's words (openai 3.54.0, `shared/reasoning_effort.py`).
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Api = Literal["openai", "anthropic"]

#: Neither user and password nor query and fragment: a key in a URL would end up in logs.
_URL = r"^https?://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[1-9][0-9]{0,4})?(/[!-\"$->@-~]*)?$"
#: What is expected of a text that has not its form.
_FORMS = {
    "base_url": "expected a URL such as http://127.0.0.1:11434/v1",
    "key_variable": "expected the name of a variable, such as MISTRAL_API_KEY",
    "anthropic_version": "expected a date such as 2023-06-01",
}
#: Parts of a request that the service decides about itself.
_RESERVED = ("model", "messages", "system", "stream", "stream_options", "n", "tools", "functions")
_KEYS: dict[str, tuple[Api, str]] = {"openai": ("openai", "OPENAI_API_KEY"), "anthropic": ("anthropic", "ANTHROPIC_API_KEY")}


class Limits(BaseModel):
    """What an endpoint may be asked for, on each worker. None: as the settings have it. Durations are seconds."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    max_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    concurrency: Annotated[int, Field(ge=1, le=100_000)] | None = None
    queue: Annotated[int, Field(ge=0, le=100_000)] | None = None
    queue_seconds: Annotated[float, Field(ge=0, le=3_600)] | None = None
    first_token_seconds: Annotated[float, Field(ge=0.1, le=3_600)] | None = None
    silence_seconds: Annotated[float, Field(ge=0.1, le=3_600)] | None = None


class Defaults(BaseModel):
    """Parameters of requests that name none of their own. What is not named here is sent to the server as it stands."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True, allow_inf_nan=False)

    max_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    stop: Annotated[list[Annotated[str, StringConstraints(min_length=1, max_length=200)]], Field(max_length=4)] | None = None
    reasoning_effort: Effort | None = None


class _Table(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    base_url: Annotated[str, StringConstraints(pattern=_URL)] | None = None
    api: Api | None = None
    key_variable: Annotated[str, StringConstraints(pattern=r"^[A-Z][A-Z0-9_]{0,99}$")] | None = None
    anthropic_version: Annotated[str, StringConstraints(pattern=r"^\d{4}-\d{2}-\d{2}$")] | None = None
    model: Annotated[str, StringConstraints(min_length=1, max_length=200)] | None = None
    models: list[Annotated[str, StringConstraints(min_length=1, max_length=200)]] = []
    defaults: Defaults = Defaults()
    limits: Limits = Limits()


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """One server of models, and how it is asked.

    `api` is the language it speaks. `key` is secret; `key_variable` the variable that holds it, `""` where the server wants
    none. `model`: what the bare alias stands for; `models`: those that may be asked for, empty for all that the server has.
    """

    name: str
    api: Api
    base_url: str
    key: str = ""
    key_variable: str = ""
    anthropic_version: str = ""
    model: str = ""
    models: tuple[str, ...] = ()
    defaults: Defaults = Defaults()
    limits: Limits = Limits()

    def __repr__(self) -> str:
        return f"Endpoint({self.name!r}, {self.api!r}, {self.base_url!r})"

    @property
    def usable(self) -> bool:
        """Whether it can be asked: it has the key that it wants."""
        return bool(self.key or not self.key_variable)

    @property
    def extra(self) -> dict[str, Any]:
        """Parameters that are sent as they stand: the server's own."""
        return dict(self.defaults.model_extra or {})


def endpoints(
    text: str, environ: Mapping[str, str], openai_url: str, anthropic_url: str, anthropic_version: str
) -> tuple[tuple[Endpoint, ...], list[str]]:
    """All endpoints, the built-in ones first, and what is wrong with `text`, the file's contents, one line for each fault.

    Keys come from `environ`. No fault quotes a value: a key may stand where it should not.
    """
    tables, faults = _tables(text)
    built_in = {"openai": openai_url, "anthropic": anthropic_url}
    found = []
    for name in [*built_in, *(name for name in tables if name not in built_in)]:
        table = tables.get(name, _Table())
        api, variable = _KEYS.get(name, (table.api or "openai", table.key_variable or ""))
        if name in built_in:
            forbidden = {field for field in ("base_url", "api", "key_variable", "model") if getattr(table, field) is not None}
            faults += [f"[{name}] {field} is not set here: expected a variable" for field in sorted(forbidden)]
        elif table.base_url is None:
            faults.append(f"[{name}] base_url is missing: it is required")
        if table.models and table.model and table.model not in table.models:
            faults.append(f"[{name}] model is none of models")
        found.append(
            Endpoint(
                name=name,
                api=api,
                base_url=(built_in.get(name) or table.base_url or "").rstrip("/"),
                key=environ.get(variable, "").strip() if variable else "",
                key_variable=variable,
                anthropic_version=table.anthropic_version or (anthropic_version if name == "anthropic" else ""),
                model=table.model or "",
                models=tuple(table.models),
                defaults=table.defaults,
                limits=table.limits,
            )
        )
    return tuple(found), faults


def _tables(text: str) -> tuple[dict[str, _Table], list[str]]:
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        return {}, [f"is not TOML: {error}"]
    tables: dict[str, _Table] = {}
    faults: list[str] = []
    for name, value in raw.items():
        alias = name.lower()
        if not alias.isascii() or not all(sign.isalnum() or sign in "-_" for sign in alias) or not 1 <= len(alias) <= 40:
            faults.append(f"[{name[:40]!r}] is no name: expected 1 to 40 letters, digits, - and _")
        elif alias == "echo" or alias in tables:
            faults.append(f"[{name}] is taken: expected another name")
        else:
            tables[alias] = _Table()
            try:
                tables[alias] = _Table.model_validate(value)
            except ValidationError as error:
                faults += [f"[{name}] {line}" for line in _named(error)]
                # The rest of the file is judged as if this were there.
                tables[alias] = _Table(base_url="http://unknown")
            else:
                faults += [f"[{name}] {line}" for line in _unsendable(tables[alias].defaults)]
    return tables, faults


def _unsendable(defaults: Defaults) -> list[str]:
    faults = []
    for name, value in (defaults.model_extra or {}).items():
        if name in _RESERVED:
            faults.append(f"defaults.{name} is the service's own: expected another parameter")
        elif not _is_json(value):
            faults.append(f"defaults.{name} is no JSON: expected text, numbers, lists and tables of them")
    return faults


def _is_json(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_json, value.values()))
    if isinstance(value, list):
        return all(map(_is_json, value))
    return isinstance(value, (str, bool, int)) or (isinstance(value, float) and value - value == 0)


def _named(error: ValidationError) -> list[str]:
    lines: dict[str, str] = {}
    for one in error.errors(include_url=False, include_input=False, include_context=False):
        place = ".".join(str(part) for part in one["loc"])
        said = "is unknown" if one["type"] == "extra_forbidden" else one["msg"].replace("Input should be", "expected")
        lines.setdefault(place, _FORMS.get(place, said) if one["type"] == "string_pattern_mismatch" else said)
    return [f"{place}: {said}" if place else "expected a table" for place, said in lines.items()]
