"""How the text of a setting becomes a value. Pure.

Each function takes the text, `""` for an unset variable, and raises BadValue, whose message is what was expected.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

LOOPBACK_HOSTS = {"localhost", "127.0.0.1", "::1"}
_SECRET_BYTES = 32
#: PEM (also a certificate), the four SSH families, and a JWK: as PyJWT, which refuses them when it signs, and JWK besides.
_PUBLIC_KEY = re.compile(r'-----BEGIN|^(ssh|ecdsa-sha2|sk-ssh|sk-ecdsa-sha2)-\S+ AAAA|^\{.*"kty"')
#: An origin as `origin_of` writes it. flask-cors would take one with other characters for a regular expression.
_ORIGIN = re.compile(r"https?://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]+)?")


class BadValue(ValueError):
    """A value that cannot be used; the message is what was expected."""


def text(value: str) -> str:
    """Any text."""
    return value


def flag(value: str) -> bool:
    """`true` or `false`, and what else people write for them."""
    try:
        return {
            "true": True,
            "1": True,
            "yes": True,
            "on": True,
            "false": False,
            "0": False,
            "no": False,
            "off": False,
            "": False,
        }[value.lower()]
    except KeyError:
        raise BadValue("true or false") from None


def whole(low: int, high: int) -> Callable[[str], int]:
    """A whole number in these bounds."""

    def parse(value: str) -> int:
        if re.fullmatch(r"[0-9]{1,18}", value) and low <= int(value) <= high:
            return int(value)
        raise BadValue(f"a whole number from {low} to {high}")

    return parse


def optional(parse: Callable[[str], float]) -> Callable[[str], float]:
    """The same, or 0 for nothing."""
    return lambda value: parse(value) if value else 0


def seconds(low: float, high: float) -> Callable[[str], float]:
    """A number of seconds in these bounds."""

    def parse(value: str) -> float:
        if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,6})?", value) and low <= float(value) <= high:
            return float(value)
        raise BadValue(f"a number of seconds from {low:.10g} to {high:.10g}")

    return parse


_SPANS = {"second": 1, "minute": 60, "hour": 3_600, "day": 86_400}
_RATE = re.compile(r"([0-9]{1,9})\s*(?:/|\s+per\s+)\s*([0-9]{1,5})?\s*([a-z]+?)s?")


def rate(value: str) -> tuple[int, int] | None:
    """How many in how many seconds: `60/minute`, `100 per 5 minutes`. None for no limit: `off`, or nothing."""
    if value.lower() in ("", "off"):
        return None
    match = _RATE.fullmatch(value.lower())
    amount, seconds = (int(match[1]), int(match[2] or 1) * _SPANS.get(match[3], 0)) if match else (0, 0)
    if not amount or not 1 <= seconds <= _SPANS["day"]:
        raise BadValue("a number and a span of at most a day, such as 60/minute or 100 per 5 minutes; or off")
    return amount, seconds


def choice(*allowed: str) -> Callable[[str], str]:
    """One of these, whatever the case."""

    def parse(value: str) -> str:
        for one in allowed:
            if value.lower() == one.lower():
                return one
        raise BadValue("one of " + ", ".join(a or "(empty)" for a in allowed))

    return parse


def secret(value: str) -> str:
    """A secret that HMAC signs with, or none."""
    # os.environ has bytes that are no UTF-8 as lone surrogates, with which nothing can be signed: they count for nothing.
    if (value and len(value.encode(errors="ignore")) < _SECRET_BYTES) or not value.isprintable():
        raise BadValue(f"at least {_SECRET_BYTES} random bytes, for example from: openssl rand -hex 32")
    if _PUBLIC_KEY.search(value):
        raise BadValue("a random secret, not a PEM or SSH key: HMAC with a public key lets everybody sign")
    return value


def token(value: str) -> str:
    """A token that somebody shows, or none."""
    if value and not re.fullmatch(r"[!-~]{16,}", value):
        raise BadValue("at least 16 random characters without spaces, for example from: openssl rand -hex 32")
    return value


def webhook_secret(value: str) -> bytes:
    """Standard Webhooks' serialisation: `whsec_` and 24 to 64 bytes in base64."""
    if not value:
        return b""
    try:
        secret = base64.b64decode(value.removeprefix("whsec_"), validate=True)
    except ValueError:  # of which binascii.Error is one, and what is not ASCII another
        secret = b""
    if not 24 <= len(secret) <= 64:
        raise BadValue("whsec_ followed by 24 to 64 random bytes in base64 (Standard Webhooks)")
    return secret


def base_url(value: str) -> str:
    """An address for browsers: https, a path prefix allowed."""
    if not value:
        return ""
    parts = http_url(value)
    if parts.scheme == "http" and parts.hostname not in LOOPBACK_HOSTS:
        raise BadValue("an https:// URL (http:// only for this machine itself)")
    if "?" in value or "#" in value:
        raise BadValue("a URL without query and fragment")
    return value.rstrip("/")


def date(value: str) -> str:
    """A date, or none."""
    if value and not re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", value):
        raise BadValue("a date such as 2023-06-01")
    return value


def provider_url(value: str) -> str:
    """The base URL of an SDK."""
    http_url(value)
    return value.rstrip("/")


def http_url(value: str) -> Any:
    """The parts of a full URL without a user."""
    try:
        parts = urlsplit(value)
        valid = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port)
    except ValueError:
        valid = False
    if not valid or parts.username is not None or not re.fullmatch(r"[!-~]+", value):
        raise BadValue("a full URL such as https://ai.example.com")
    return parts


def origin_of(url: str) -> str:
    """`scheme://host[:port]` of a URL in lower case, without the scheme's own port. Raises ValueError for what has none."""
    parts = urlsplit(url)
    port = parts.port
    if parts.scheme.lower() not in ("http", "https") or not parts.hostname:
        raise ValueError("no http origin")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    default = 443 if parts.scheme.lower() == "https" else 80
    return f"{parts.scheme.lower()}://{host}" + (f":{port}" if port not in (None, default) else "")


def origins(value: str) -> tuple[str, ...]:
    """Exact origins."""
    found = []
    for item in filter(None, (part.strip() for part in value.split(","))):
        try:
            origin = origin_of(item)
        except ValueError:
            origin = ""
        if not _ORIGIN.fullmatch(origin) or urlsplit(item).path not in ("", "/") or re.search("[@?#]", item):
            raise BadValue("origins separated by commas, each exact, such as https://chat.example.com (no *, no path)")
        found.append(origin)
    return tuple(found)


def rewrites(value: str) -> tuple[tuple[str, str], ...]:
    """Pairs of origins, each given one once."""
    rules = []
    for item in filter(None, (part.strip() for part in value.split(","))):
        match = re.fullmatch(r"(?i:(https?://[^=]*)=(https?://[^=]*))", item)
        try:
            sides = [origins(side) for side in match.groups()] if match else []
        except BadValue:
            sides = []
        if len(sides) != 2:
            raise BadValue("FROM=TO separated by commas, both exact origins, such as http://localhost:5678=http://n8n:5678")
        rules.append((sides[0][0], sides[1][0]))
    if len({given for given, _ in rules}) < len(rules):
        raise BadValue("each origin rewritten once")
    return tuple(rules)


#: A field name of HTTP (RFC 9110 5.1), and those that are the sender's own.
_FIELD = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_OWN_FIELDS = re.compile(
    r"host|connection|content-(length|type|encoding)|transfer-encoding|expect|te|trailer|upgrade|user-agent|webhook-.*",
    re.IGNORECASE,
)


def headers(value: str) -> tuple[tuple[str, str], ...]:
    """Header fields, each once, and none that is the service's own."""
    expected = 'one header such as X-Aistream-Key: a-secret, or several as {"X-Aistream-Key": "a-secret", "X-Other": "…"}'
    if value.startswith("{"):
        try:
            pairs = json.loads(value, object_pairs_hook=list)
        except ValueError:
            raise BadValue(expected) from None
    else:
        name, colon, text = value.partition(":")
        pairs = [(name.strip(), text.strip())] if colon else [("", value)] if value else []
    for name, text in pairs:
        if not isinstance(text, str) or not _FIELD.fullmatch(name) or not re.fullmatch(r"[\t -~]+", text) or text != text.strip():
            raise BadValue(expected)
        if _OWN_FIELDS.fullmatch(name):
            raise BadValue(f"headers of your own: {name} is set by the service")
    if len({name.lower() for name, _ in pairs}) < len(pairs):
        raise BadValue("each header once")
    return tuple((name, text) for name, text in pairs)


def schedule(value: str) -> tuple[float, ...]:
    """Seconds before each attempt."""
    try:
        delays = tuple(seconds(0, 86_400)(part.strip()) for part in value.split(","))
    except BadValue:
        raise BadValue("seconds before each attempt separated by commas, each from 0 to 86400") from None
    if len(delays) > 50:
        raise BadValue("at most 50 attempts")
    return delays


class RedisAddress(NamedTuple):
    """Where Redis is, and who asks there.

    `hosts`: host and port of the server or, with `master`, of the Sentinels that know it under this name; none with `path`, a
    unix socket.
    """

    hosts: tuple[tuple[str, int], ...]
    master: str
    path: str
    tls: bool
    username: str
    password: str
    db: int


#: User and password, percent-encoded.
_LOGIN = r"(?:(?P<username>[^:/?#]*)(?::(?P<password>[^/?#]*))?@)?"
#: What else a client may be told in a query has its own settings, or is the service's own; a misspelt one would do nothing.
_REDIS_FORMS = (
    rf"redis(?P<tls>s)?://{_LOGIN}(?P<hosts>[^/?#,@]*)(?:/(?P<db>[0-9]{{0,5}}))?",
    rf"redis(?P<tls>s)?\+sentinel://{_LOGIN}(?P<hosts>[^/?#@]+)/(?P<master>[^/?#]+)(?:/(?P<db>[0-9]{{0,5}}))?",
    rf"unix://{_LOGIN}(?P<path>/[^?#]*)(?:\?db=(?P<db>[0-9]{{1,5}}))?",
)


def redis_address(url: str) -> RedisAddress:
    """The parts of a URL of Redis: of a server, of a master that Sentinels know, or of a unix socket."""
    match = next(filter(None, (re.fullmatch(form, url) for form in _REDIS_FORMS)), None)
    if match is None:
        raise BadValue(
            "redis://[user:password@]host[:port][/db], redis+sentinel://[user:password@]host[:port],…/master[/db], "
            "rediss for redis in both (TLS), or unix:///path, without a query; or memory:// for the embedded store"
        )
    found = match.groupdict()
    port = 26_379 if found.get("master") else 6_379
    return RedisAddress(
        hosts=() if found.get("path") else tuple(_host_and_port(place, port) for place in found["hosts"].split(",")),
        master=unquote(found.get("master") or ""),
        path=unquote(found.get("path") or ""),
        tls=bool(found.get("tls")),
        username=unquote(found["username"] or ""),
        password=unquote(found["password"] or ""),
        db=int(found["db"] or 0),
    )


def redis_url(value: str) -> str:
    """Where Redis is; `""` for the embedded store."""
    if not value or value == "memory://":
        return ""
    redis_address(value)
    return value


def _host_and_port(place: str, default: int) -> tuple[str, int]:
    try:
        parts = urlsplit(f"//{place}")
        host, port = parts.hostname, default if parts.port is None else parts.port
    except ValueError:
        host, port = None, 0
    if not host or not port:
        raise BadValue("a host behind redis://, and a port from 1 to 65535 where it is not the usual one")
    return host, port
