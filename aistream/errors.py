"""Every error the service raises on purpose. Each knows its public code, and its HTTP status where it has one.

    AistreamError
    ├── ConfigError             the configuration is unusable: stops the start
    ├── DestinationRefused      no callback goes there: a fault at init, a dead letter later
    ├── Problem                 answered to the caller as RFC 9457 problem+json
    │   ├── InvalidRequest      400: names every faulty field
    │   ├── Unauthorized        401: says what is wrong with the token
    │   ├── NotFound            404
    │   ├── Conflict            409: not in this state
    │   ├── Limited             429, 503: more than a limit allows
    │   ├── Draining            503: this worker stops, and another one can be asked
    │   ├── Refused             a viewer's valid token, but no stream: expired, over, too many, away
    │   └── StoreUnavailable    503: Redis is away
    └── ProviderFailed          the model did not finish: becomes the session's `Failed` ending

What a caller may know is in the error; what only the operator may know goes to the log where the error is made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

#: Every code of an answer that is no success: stable, and public. What each says and where it may come from stands in
#: `api.contract.CODES` and docs/http.md; mypy finds a code that is not here, and the tests one that is not there.
Code = Literal[
    "invalid_json",
    "invalid_request",
    "malformed_http",
    "unknown_model",
    "provider_not_configured",
    "token_missing",
    "token_malformed",
    "token_expired",
    "token_unsigned",
    "token_algorithm",
    "token_signature",
    "token_claim_missing",
    "token_lifetime",
    "token_not_yet_valid",
    "token_audience",
    "token_issuer",
    "token_wrong_kind",
    "not_found",
    "method_not_allowed",
    "request_timeout",
    "already_delivered",
    "not_ended",
    "content_gone",
    "replay_over",
    "session_lost",
    "log_lost",
    "body_too_large",
    "address_too_long",
    "unsupported_media_type",
    "expectation_failed",
    "idempotency_key_reused",
    "rate_limited",
    "too_many_pending",
    "too_many_viewers",
    "head_too_large",
    "internal",
    "transfer_coding_unknown",
    "store_unavailable",
    "overloaded",
    "draining",
]


class AistreamError(Exception):
    """Root of the tree."""


class ConfigError(AistreamError):
    """The configuration is unusable. `faults` has one readable line per setting, each with variable, value and expectation."""

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join(["aistream cannot start with this configuration:", *(f"  - {f}" for f in faults)]))


class DestinationRefused(AistreamError):
    """A callback may not go there. The message says why, in words that follow the field's name."""


class Fault(NamedTuple):
    """One faulty field of a request and what was expected of it."""

    field: str
    message: str


class Problem(AistreamError):
    """An answer that is not a success, told as RFC 9457 problem+json with a stable `code`.

    `limit`: the name in the metrics of the limit that has refused, where one has.
    """

    status = 500
    code: Code = "internal"
    title = "Something went wrong on our side"
    limit = ""

    def __init__(
        self,
        detail: str,
        *,
        code: Code | None = None,
        status: int | None = None,
        title: str | None = None,
        faults: Sequence[Fault] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.code = code or self.code
        self.status = status or self.status
        self.title = title or self.title
        self.faults = tuple(faults)
        self.headers = dict(headers or {})


class InvalidRequest(Problem):
    """The request's body cannot be used; `faults` names each field."""

    status = 400
    code = "invalid_request"
    title = "The request is not valid"

    @classmethod
    def naming(cls, *faults: Fault, code: Code | None = None) -> InvalidRequest:
        """One whose detail names these faults."""
        detail = "; ".join(f"{fault.field}: {fault.message}" for fault in faults) + "."
        return cls(detail, code=code, faults=faults)


class Unauthorized(Problem):
    """The token is missing or cannot be accepted; the code says which."""

    status = 401
    title = "The token was not accepted"

    def __init__(self, detail: str, *, code: Code) -> None:
        # RFC 6750 3: a 401 names its scheme; `error` only where a token was given.
        challenge = "Bearer" if code == "token_missing" else 'Bearer error="invalid_token"'
        super().__init__(detail, code=code, headers={"WWW-Authenticate": challenge})


class NotFound(Problem):
    """There is no such thing, or it belongs to somebody else: the two are not told apart."""

    status = 404
    code = "not_found"
    title = "Not found"


class Conflict(Problem):
    """What is asked cannot be done in the state that things are in; the code says which."""

    status = 409
    title = "Not in this state"

    def __init__(self, detail: str, *, code: Code) -> None:
        super().__init__(detail, code=code)


class StoreUnavailable(Problem):
    """Redis cannot be asked now. What is already running goes on without it."""

    status = 503
    code = "store_unavailable"
    title = "The store is away"

    def __init__(self, detail: str = "The service cannot reach its store now. Try again shortly.") -> None:
        super().__init__(detail, headers={"Retry-After": "2"})


class Limited(Problem):
    """More than a limit allows, for now; `limit` has its name, `retry_after` the seconds until it is worth trying again."""

    status = 429
    code: Code = "rate_limited"
    title = "Too many requests"

    def __init__(
        self, detail: str, *, limit: str, retry_after: float, code: Code | None = None, status: int | None = None
    ) -> None:
        super().__init__(detail, code=code, status=status, headers={"Retry-After": str(max(1, math.ceil(retry_after)))})
        self.limit = limit


class Overloaded(Limited):
    """This worker writes as many answers as it may; another one may take it."""

    status = 503
    code = "overloaded"
    title = "Too many answers at the same time"

    def __init__(self) -> None:
        detail = "This server writes as many answers as it may at the same time (MAX_STREAMS_PER_WORKER). Try again shortly."
        super().__init__(detail, limit="streams", retry_after=2)


class Draining(Problem):
    """This worker stops, and whoever asks has said that it can ask another one."""

    status = 503
    code: Code = "draining"
    title = "This worker stops"

    def __init__(self) -> None:
        super().__init__("This worker takes nothing new any more; another one does.", headers={"Retry-After": "1"})


class Refused(Problem):
    """A viewer with a valid token gets no stream. `final` tells whether coming back can help, `held` whether waiting can.

    `event_id` is the id of the session's ending, where it has one: a browser that comes back with it gets 204.
    """

    final: bool
    event_id: str | None

    def __init__(self, code: Code, event_id: str | None = None, *, limit: str = "", held: bool = True) -> None:
        self.status, self.final, detail = _REFUSALS[code]
        self.event_id = event_id
        self.limit = limit
        self.held = held and not self.final
        headers = {} if self.final else {"Retry-After": "2"}
        super().__init__(detail, code=code, title="There is no stream to watch", headers=headers)


# code -> (status for a client that is no EventSource, final?, what the person is told)
_REFUSALS: dict[Code, tuple[int, bool, str]] = {
    "replay_over": (410, True, "The answer is complete and no longer kept for replay."),
    "too_many_viewers": (429, False, "This answer has as many viewers as it may have. Close one and try again."),
    "overloaded": (503, False, "The service has as much to do as it can carry. Try again shortly."),
    "store_unavailable": (503, False, "The service cannot reach its store now. Try again shortly."),
    "session_lost": (410, True, "The session was lost together with the server that ran it."),
    "log_lost": (
        410,
        True,
        "A part of this answer was lost with its server; what was written since does not go with it.",
    ),
}


class ProviderFailed(AistreamError):
    """The provider did not bring the answer to an end.

    `code` and `message` are public and stable; `retryable` tells whether the same request may succeed later. `again`: whether
    the same model is worth asking again at once, and `retry_after` in how many seconds, where the provider said so.
    `parameters`: those of the request that it does not take, if that was all. `log_detail` is for the operator's log only:
    the provider's own words are redacted there (keys and organisation ids occur in them).
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        retryable: bool,
        again: bool | None = None,
        retry_after: float | None = None,
        parameters: Sequence[str] = (),
        log_detail: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(code)
        self.code = code
        self.message = message
        self.retryable = retryable
        self.again = retryable if again is None else again
        self.retry_after = retry_after
        self.parameters = tuple(parameters)
        self.log_detail = dict(log_detail or {})
