"""The two kinds of token: n8n's, which may start a session, and a viewer's, which may watch one.

No I/O, and no clock but the one it is given. (PyJWT compares `exp` and `nbf` with its own.) The algorithm is pinned by
configuration and never read from a token (RFC 8725 3.1). The kinds cannot pass for each other: a viewer's has its own `typ` and
`aud`. What is signed here names its secret in `kid`, so that two of them can be in use while one replaces the other.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jwt

from aistream.config import Config
from aistream.errors import Code, Unauthorized

VIEWER_TYPE = "aistream-viewer+jwt"
VIEWER_AUDIENCE = "aistream-viewer"
#: Seconds two clocks may differ.
LEEWAY = 30


@dataclass(frozen=True, slots=True)
class Caller:
    """Who an accepted n8n token speaks for. `subject` owns what it starts; a token without `sub` owns as ``""``."""

    subject: str


class Tokens:
    """Signs and verifies with the configured secrets: JWT_SECRET signs, JWT_SECRET_PREVIOUS is accepted as well.

    `clock` gives the seconds since 1970.
    """

    def __init__(self, config: Config, clock: Callable[[], float]) -> None:
        self._secrets = {key_id(secret): secret for secret in (config.jwt_secret, config.jwt_secret_previous) if secret}
        self._signing = (key_id(config.jwt_secret), config.jwt_secret)
        self._clock = clock
        self._max_lifetime = config.jwt_max_lifetime_seconds
        self._algorithm = config.jwt_algorithm
        self._audience = config.jwt_audience
        self._issuer = config.jwt_issuer

    def verify_caller(self, token: str | None) -> Caller:
        """The caller that n8n's token names. Raises Unauthorized with a code that says what is wrong with it."""
        claims = self._verify(token, audience=self._audience or None, issuer=self._issuer or None)
        if int(claims["exp"]) > self._clock() + self._max_lifetime + LEEWAY:
            raise _lives_too_long(self._max_lifetime)
        subject = str(claims.get("sub", ""))
        try:
            subject.encode()
        except UnicodeEncodeError:  # half a surrogate pair: no store can hold it
            raise _malformed() from None
        return Caller(subject)

    def sign_caller(self, subject: str, expires_at: int, audience: str = "", issuer: str = "") -> str:
        """A token as n8n would sign it; `expires_at` in seconds since 1970. Missing audience and issuer: the configured ones."""
        claims: dict[str, Any] = {"sub": subject, "exp": expires_at}
        claims |= {"aud": audience or self._audience} if audience or self._audience else {}
        claims |= {"iss": issuer or self._issuer} if issuer or self._issuer else {}
        kid, secret = self._signing
        return jwt.encode(claims, secret, self._algorithm, headers={"kid": kid})

    def sign_viewer(self, session_id: str, expires_at: int) -> str:
        """The token in a stream URL: good for watching this one session until `expires_at`."""
        claims = {"sub": session_id, "aud": VIEWER_AUDIENCE, "exp": expires_at}
        kid, secret = self._signing
        return jwt.encode(claims, secret, "HS256", headers={"typ": VIEWER_TYPE, "kid": kid})

    def verify_viewer(self, token: str | None) -> str:
        """The id of the session that a viewer's token is good for. Raises Unauthorized."""
        return str(self._verify(token, audience=VIEWER_AUDIENCE, viewer=True)["sub"])

    def _verify(
        self, token: str | None, *, audience: str | None, issuer: str | None = None, viewer: bool = False
    ) -> dict[str, Any]:
        if not token:
            where = "access_token in the URL" if viewer else "n8nToken in the body, or the header Authorization: Bearer"
            raise Unauthorized(f"There is no token: expected {where}.", code="token_missing")
        algorithm = "HS256" if viewer else self._algorithm
        try:
            decoded = self._decode(token, audience, issuer, algorithm)
        except (jwt.PyJWTError, ValueError, RecursionError) as error:
            raise _refusal(error, token, algorithm, viewer) from None
        if (decoded["header"].get("typ") == VIEWER_TYPE) is not viewer:
            raise _wrong_kind()
        claims: dict[str, Any] = decoded["payload"]
        return claims

    def _decode(self, token: str, audience: str | None, issuer: str | None, algorithm: str) -> dict[str, Any]:
        required = [
            "exp",
            *(["aud"] if audience else []),
            *(["iss"] if issuer else []),
            *(["sub"] if audience == VIEWER_AUDIENCE else []),
        ]
        for secret in self._candidates(token):
            try:
                return jwt.decode_complete(
                    token,
                    secret,
                    algorithms=[algorithm],
                    audience=audience,
                    issuer=issuer,
                    leeway=LEEWAY,
                    options={"require": required, "verify_aud": audience is not None},
                )
            except jwt.InvalidSignatureError:
                continue
        raise jwt.InvalidSignatureError

    def _candidates(self, token: str) -> list[str]:
        """The secrets that may have signed it: the one that it names, or all, since n8n names none, or one of its own."""
        if len(self._secrets) > 1:
            named = self._secrets.get(jwt.get_unverified_header(token).get("kid", ""))
            if named is not None:
                return [named]
        return list(self._secrets.values())


def key_id(secret: str) -> str:
    """The `kid` of what this secret signs. Whoever sees it can try secrets against it, as he could against the signature."""
    return hmac.new(secret.encode(), b"aistream kid", hashlib.sha256).hexdigest()[:8]


def _lives_too_long(most: float) -> Unauthorized:
    return Unauthorized(
        f"The token's exp lies further ahead than {most:g} s (JWT_MAX_LIFETIME_SECONDS): sign a fresh one for each request, with "
        "exp: Math.floor(Date.now() / 1000) + 300.",
        code="token_lifetime",
    )


def _wrong_kind() -> Unauthorized:
    return Unauthorized("This is a token for something else.", code="token_wrong_kind")


def _malformed() -> Unauthorized:
    return Unauthorized("The token is not a valid JWT.", code="token_malformed")


#: Of PyJWT's errors, those that say all there is to say.
_PLAIN: tuple[tuple[type[jwt.PyJWTError], Code, str], ...] = (
    (jwt.ExpiredSignatureError, "token_expired", "The token has expired (exp lies in the past)."),
    (jwt.ImmatureSignatureError, "token_not_yet_valid", "The token is not valid yet (nbf or iat lies in the future)."),
    (jwt.InvalidAudienceError, "token_audience", "The token's aud is not the one configured as JWT_AUDIENCE."),
    (jwt.InvalidIssuerError, "token_issuer", "The token's iss is not the one configured as JWT_ISSUER."),
    (jwt.InvalidSignatureError, "token_signature", "The token's signature does not match JWT_SECRET."),
)
#: Every algorithm that a JWT library may have offered (RFC 7518 3.1, RFC 8037); PyJWT alone knows fewer.
_KNOWN = re.compile(r"(HS|RS|ES|PS)(256|384|512)|ES256K|EdDSA")


def _refusal(error: Exception, token: str, expected: str, viewer: bool) -> Unauthorized:
    """What is wrong with a token, in words for who signed it. Nothing in it is trusted here, only named."""
    try:
        header = jwt.get_unverified_header(token)
    except (jwt.PyJWTError, ValueError, RecursionError):
        return _malformed()
    if (header.get("typ") == VIEWER_TYPE) is not viewer:
        return _wrong_kind()
    if isinstance(error, jwt.InvalidAlgorithmError):
        named = str(header.get("alg"))
        if named.lower() == "none":
            return Unauthorized(f"The token is unsigned (alg none): expected {expected}.", code="token_unsigned")
        known = named if _KNOWN.fullmatch(named) else "unknown to us"
        return Unauthorized(f"The token's algorithm is {known}: expected {expected}.", code="token_algorithm")
    if isinstance(error, jwt.MissingRequiredClaimError):
        return Unauthorized(_missing(token, error.claim), code="token_claim_missing")
    for kind, code, sentence in _PLAIN:
        if isinstance(error, kind):
            return Unauthorized(sentence, code=code)
    return _wrong_claim(token)


def _wrong_claim(token: str) -> Unauthorized:
    """Which claim has a type that it may not have, if that is what is wrong: n8n's expressions give ISO dates and numbers."""
    try:
        claims = jwt.decode(token, options={"verify_signature": False})
    except (jwt.PyJWTError, ValueError, RecursionError):
        return _malformed()
    for name in ("exp", "nbf", "iat"):
        value = claims.get(name, 0)
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            return Unauthorized(f"The token's {name} is not a number of seconds since 1970.", code="token_malformed")
    if not isinstance(claims.get("sub", ""), str):
        return Unauthorized("The token's sub is not text.", code="token_malformed")
    return _malformed()


def _missing(token: str, claim: str) -> str:
    """What to do about a missing claim. n8n's JWT node with its own claim fields writes `expiresIn`, `audience`, `issuer`."""
    wrong = {"exp": "expiresIn", "aud": "audience", "iss": "issuer", "sub": "subject"}.get(claim)
    if wrong in jwt.decode(token, options={"verify_signature": False}):
        return (
            f"The token has {wrong} but no {claim}: n8n's JWT node writes {wrong} from its own claim fields. Turn on 'Use JSON "
            "to Build Payload' and give the claims sub, iat and exp: Math.floor(Date.now() / 1000) + 300."
        )
    return f"The token has no {claim} claim."
