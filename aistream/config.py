"""The configuration: one frozen value, built from any mapping of environment variables. Pure.

`Config.from_env` names every bad setting at once, each with variable, value and expectation. Secrets have no default and
do not show in `repr` or in a message. `manual()` is the text of `.env.example`, so that page and code cannot drift apart.
"""

from __future__ import annotations

import dataclasses
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from aistream import parse
from aistream.endpoints import ANTHROPIC_URL, OPENAI_URL, Endpoint, endpoints
from aistream.errors import ConfigError
from aistream.installation import VARIABLES

#: Any port of this machine, as a browser writes the origin: allowed by CORS in DEV_MODE.
LOOPBACK_ORIGIN = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"

#: Seconds that a worker gets beyond its drain, which ends by itself, before gunicorn kills it.
DRAIN_MARGIN = 15

_PLACEHOLDERS = re.compile(r"change.?me|your.?(jwt.?)?secret|example|placeholder|replace.?(me|this)", re.IGNORECASE)
#: Largest callback: n8n takes 16 MiB, and a little stands around the texts.
_CALLBACK_BYTES = 15 * 2**20


@dataclass(frozen=True, slots=True)
class Setting:
    """One environment variable: how it is read, and what the manual says of it. `empties`: set to nothing, it is no unset one."""

    parse: Callable[[str], Any]
    default: str
    doc: str
    secret: bool = False
    empties: bool = False


def _setting(parse: Callable[[str], Any], default: str, doc: str, *, secret: bool = False, empties: bool = False) -> Any:
    return dataclasses.field(metadata={"setting": Setting(parse, default, doc, secret, empties)}, repr=not secret)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All settings, typed. Durations are seconds. Build it with `from_env`."""

    jwt_secret: str = _setting(
        parse.secret,
        "",
        "Signs what n8n sends us (HMAC) and the tokens in stream URLs. At least 32 random bytes. Required.",
        secret=True,
    )
    jwt_secret_previous: str = _setting(
        parse.secret,
        "",
        "One more secret that is accepted and never signs. In a rotation first the next one, then the last: docs/security.md.",
        secret=True,
    )
    jwt_algorithm: str = _setting(
        parse.choice("HS256", "HS384", "HS512"),
        "HS256",
        "The one algorithm accepted in n8n's tokens: HS256, HS384 or HS512.",
    )
    jwt_max_lifetime_seconds: float = _setting(
        parse.seconds(60, 31_536_000),
        "86400",
        "Longest time that n8n's token may still be valid for: one that never expires is a password in a workflow.",
    )
    jwt_audience: str = _setting(parse.text, "", "If set, n8n's tokens must carry it as aud.")
    jwt_issuer: str = _setting(parse.text, "", "If set, n8n's tokens must carry it as iss.")

    base_url: str = _setting(
        parse.base_url,
        "",
        "Where browsers reach the service, a path prefix allowed: https://ai.example.com/chat. Starts every streamUrl; never "
        "taken from the Host header, since n8n calls us by another name than browsers do. Required, except in DEV_MODE "
        "(http://127.0.0.1:PORT).",
    )
    host: str = _setting(parse.text, "127.0.0.1", "Address to listen on. In a container: 0.0.0.0.")
    port: int = _setting(parse.whole(1, 65_535), "8000", "Port to listen on.")
    web_concurrency: int = _setting(
        parse.whole(1, 256), "1", "Worker processes; one per core is right. More than 1 needs REDIS_URL."
    )
    trusted_proxies: int = _setting(
        parse.whole(0, 10),
        "0",
        "How many proxies stand in front of the service, each of which adds an address to X-Forwarded-For: the client's is the "
        "one that the first of them has added. 0: that header is not believed, and the client is whoever connects.",
    )
    allowed_origins: tuple[str, ...] = _setting(
        parse.origins,
        "",
        "Origins of the pages that may open a stream (CORS), exact, separated by commas. In DEV_MODE every port of localhost, "
        "127.0.0.1 and [::1] is allowed as well.",
    )
    dev_mode: bool = _setting(
        parse.flag,
        "false",
        "true: a demo page at /, the echo model, any resumeUrl, no required settings. Only on a loopback HOST.",
    )

    redis_url: str = _setting(
        parse.redis_url,
        "",
        "redis://, rediss:// (TLS) or unix://; redis+sentinel:// or rediss+sentinel:// with the Sentinels' addresses and the "
        "master's name: redis+sentinel://user:password@s1:26379,s2:26379/mymaster. Empty or memory://: an embedded store inside "
        "the one worker, for a first run and for debugging; it forgets everything when the process ends.",
        secret=True,
    )
    redis_pool_size: int = _setting(
        parse.whole(2, 10_000),
        "50",
        "Most connections of a worker to Redis. A command takes well under a millisecond: who finds none free waits its turn.",
    )
    redis_ca_file: str = _setting(
        parse.text,
        "",
        "With rediss://: the certificate authorities (PEM) that Redis's certificate may come from, and no others. Empty: the "
        "system's. It must have the name that REDIS_URL, or the Sentinel, calls Redis by. Relative to this folder.",
    )
    redis_cert_file: str = _setting(
        parse.text, "", "With rediss://: the certificate (PEM) that the service shows to Redis, if that asks for one."
    )
    redis_key_file: str = _setting(
        parse.text, "", "Its private key, without a passphrase, where that is not in REDIS_CERT_FILE itself."
    )
    redis_sentinel_username: str = _setting(
        parse.text, "", "The user at the Sentinels, where they have any; the one in REDIS_URL is Redis's."
    )
    redis_sentinel_password: str = _setting(parse.text, "", "The password at the Sentinels.", secret=True)

    openai_api_key: str = _setting(parse.text, "", "Turns on the OpenAI models.", secret=True)
    openai_base_url: str = _setting(parse.provider_url, OPENAI_URL, "Where the OpenAI SDK sends its requests.")
    anthropic_api_key: str = _setting(parse.text, "", "Turns on the Anthropic models.", secret=True)
    anthropic_base_url: str = _setting(parse.provider_url, ANTHROPIC_URL, "Where the Anthropic SDK sends its requests.")
    anthropic_version: str = _setting(
        parse.date,
        "",
        "The version of Anthropic's API, such as 2023-06-01. Empty: the one that the SDK is made for, which has no temperature "
        "and no top_p any more.",
    )
    models_file: str = _setting(
        parse.text,
        "",
        "A TOML file with more servers of models (Ollama, vLLM, OpenRouter, Mistral, …), default parameters and limits: "
        "docs/providers.md. Relative to this folder. The variables with their keys stand here too.",
    )
    default_model: str = _setting(
        parse.text, "", "Model of an init that names none. Empty: gpt-4; in DEV_MODE without an OpenAI key: echo."
    )
    default_provider: str = _setting(
        str.lower,
        "",
        "openai, anthropic or an alias of MODELS_FILE: takes the models whose name tells no provider. Empty: such a model is "
        "refused at init.",
    )
    provider_retries: int = _setting(
        parse.whole(0, 10),
        "2",
        "How often a model that failed before its first token is asked again, before fallbackModels are.",
    )
    provider_backoff_seconds: float = _setting(
        parse.seconds(0, 10),
        "0.5",
        "Seconds before the first of these retries (varied by 20 %), doubled before each further one. A Retry-After of up to "
        "10 s is waited for; after a longer one the model is not asked again.",
    )
    provider_concurrency: int = _setting(
        parse.whole(1, 100_000),
        "10000",
        "Answers of one provider that are being written at the same time, on each worker. MODELS_FILE may have others for some.",
    )
    provider_queue: int = _setting(
        parse.whole(0, 100_000),
        "1000",
        "Answers that wait for a place with a provider, on each worker; further ones end as overloaded.",
    )
    provider_queue_seconds: float = _setting(
        parse.seconds(0, 3_600), "30", "Longest wait for such a place; then the answer ends as overloaded."
    )
    provider_transport: str = _setting(
        parse.choice("fast", "httpx"),
        "fast",
        "fast: our own HTTP/1.1 under the SDKs. httpx: the SDKs' own, for a server that ours does not get on with; it "
        "costs several times the CPU for each token.",
    )
    token_encoding: str = _setting(
        parse.text,
        "o200k_base",
        "The tiktoken encoding that estimates the tokens of an answer that was stopped or cut. It is used when it is at hand "
        "(TIKTOKEN_CACHE_DIR) and never downloaded; without it, four characters count as a token.",
    )

    resume_url_allowed_origins: tuple[str, ...] = _setting(
        parse.origins,
        "",
        "Origins a resumeUrl may have, exact, separated by commas: http://n8n:5678,https://n8n.example.com. Required, except in "
        "DEV_MODE, where empty allows every origin on this machine and on public addresses.",
    )
    resume_url_rewrite: tuple[tuple[str, str], ...] = _setting(
        parse.rewrites,
        "",
        "FROM=TO, separated by commas: http://localhost:5678=http://n8n:5678. Another origin for resumeUrls that name n8n as "
        "others reach it; path and query stay. Rewritten first, then checked against the allowed origins.",
    )
    callback_schedule: tuple[float, ...] = _setting(
        parse.schedule,
        "0,1,2,4,8,15,30,60,300,1800,7200,18000,36000",
        "Seconds to wait before each attempt of a callback (varied by 20 %). After the last one it is a dead letter.",
    )
    callback_concurrency: int = _setting(
        parse.whole(1, 200),
        "20",
        "Callbacks that a worker sends to one origin at the same time. One that is slow or down delays its own callbacks alone.",
    )
    callback_secret: bytes = _setting(
        parse.webhook_secret,
        "",
        "Signs callbacks (Standard Webhooks): whsec_ and 24 to 64 bytes in base64. Empty: unsigned.",
        secret=True,
    )
    callback_secret_previous: bytes = _setting(
        parse.webhook_secret,
        "",
        "The secret before this one: callbacks carry its signature as well. Set it until every receiver has the new one.",
        secret=True,
    )
    callback_headers: tuple[tuple[str, str], ...] = _setting(
        parse.headers,
        "",
        "Sent with every callback, for the Wait node's header authentication. One as X-Aistream-Key: a-secret, several as "
        '{"X-Aistream-Key": "a-secret", "X-Other": "b"}.',
        secret=True,
    )

    session_ttl_seconds: float = _setting(
        parse.seconds(1, 3_600), "60", "A session whose stream nobody opens within this time expires, and n8n is told so."
    )
    replay_seconds: float = _setting(
        parse.seconds(1, 86_400),
        "1800",
        "How long after its delivery a finished answer can still be watched from the start.",
    )
    tombstone_seconds: float = _setting(
        parse.seconds(1, 31_536_000),
        "86400",
        "How long after that what is left of a session is kept: no text, but how it ended. An init that is said again with its "
        "Idempotency-Key finds it.",
    )
    dead_letter_seconds: float = _setting(
        parse.seconds(1, 31_536_000),
        "604800",
        "How long a callback that could not be delivered is kept, with prompt and answer, for a person to have it sent again.",
    )
    lease_seconds: float = _setting(
        parse.seconds(1, 300), "15", "A worker silent for this long has lost its generations; another one ends them."
    )
    heartbeat_seconds: float = _setting(
        parse.seconds(0.2, 60),
        "15",
        "A comment is sent on a stream silent for this long, so that no proxy in between closes it.",
    )
    slow_viewer_seconds: float = _setting(
        parse.seconds(1, 600),
        "30",
        "A viewer that has not taken what was sent to it for this long is dropped; it can come back, and goes on where it was.",
    )
    request_seconds: float = _setting(
        parse.seconds(1, 300),
        "15",
        "Longest that a client may take to send a request's head, and again its body, however little by little.",
    )
    first_token_seconds: float = _setting(
        parse.seconds(0.1, 3_600),
        "60",
        "Longest wait for a model's first token, keep-alives or not; then the next fallback is asked.",
    )
    reasoning_first_token_seconds: float = _setting(
        parse.seconds(0.1, 3_600),
        "300",
        "The same for models that think first (o3, gpt-5, …), or where reasoning_effort asks for it.",
    )
    first_token_budget_seconds: float = _setting(
        parse.seconds(0.1, 3_600),
        "120",
        "For all attempts, retries and fallbacks together, waits in a provider's queue not counted; at least what the first "
        "model may take for its first token.",
    )
    silence_seconds: float = _setting(
        parse.seconds(0.1, 3_600),
        "60",
        "Longest silence of a provider in mid-answer; then the answer ends as failed, with its part.",
    )
    max_stream_seconds: float = _setting(parse.seconds(1, 7_200), "600", "Longest generation; then it ends as failed.")
    drain_seconds: float = _setting(
        parse.seconds(0, 3_600),
        "120",
        "How long a stopping worker waits for its generations and callbacks. Keep your stop timeout larger.",
    )
    stop_grace_seconds: float = _setting(
        parse.optional(parse.seconds(1, 7_200)),
        "",
        "After how long whoever stops the service kills it: Docker's stop_grace_period (150 in docker-compose.yml), systemd's "
        "TimeoutStopSec. Less than DRAIN_SECONDS and 15 more is refused at start. Empty: not known, and not checked.",
    )

    init_rate_limit: tuple[int, int] | None = _setting(
        parse.rate,
        "30000/minute",
        "New sessions of one subject (the sub of n8n's token), on all workers together, as 60/minute or 100 per 5 minutes. n8n "
        "signs for all its users with one subject, so it is generous. Empty, or off: no limit.",
        empties=True,
    )
    user_rate_limit: tuple[int, int] | None = _setting(
        parse.rate,
        "60/minute",
        "New sessions of one userId of a subject, where an init names one. Empty, or off: no limit.",
        empties=True,
    )
    unauthorized_rate_limit: tuple[int, int] | None = _setting(
        parse.rate,
        "120/minute",
        "Requests with a missing or bad token from one address, on each worker; further ones get 429 in place of 401. A valid "
        "token is never refused. See TRUSTED_PROXIES. Empty, or off: no limit.",
        empties=True,
    )
    max_pending_sessions: int = _setting(
        parse.whole(1, 10_000_000),
        "10000",
        "Sessions of one subject that wait for their first viewer, on all workers together; further inits get 429.",
    )
    max_streams_per_worker: int = _setting(
        parse.whole(1, 1_000_000),
        "10000",
        "Answers being written at the same time, on each worker. At the limit it takes no init and begins none: 503, or for a "
        "browser heartbeats until there is room. The file descriptors that they need: docs/operations.md.",
    )
    max_viewers_per_worker: int = _setting(
        parse.whole(1, 1_000_000),
        "20000",
        "Open streams, on each worker; fewer where its connections would leave no room for inits and health checks.",
    )
    max_viewers_per_session: int = _setting(
        parse.whole(1, 100_000), "10", "Viewers of one session at the same time, on each worker."
    )
    max_body_bytes: int = _setting(
        parse.whole(1_024, 16_777_216),
        "262144",
        "Largest request body, in bytes. It and six times MAX_ANSWER_BYTES must fit into 15 MiB.",
    )
    max_prompt_chars: int = _setting(
        parse.whole(1, 16_000_000), "200000", "Largest prompt, and largest sum of system and messages, in characters."
    )
    max_answer_bytes: int = _setting(
        parse.whole(1_024, 2_097_152),
        "2097152",
        "Largest answer, in bytes of UTF-8. At its maximum of 2 MiB the callback stays below n8n's limit of 16 MiB even where "
        "JSON writes a byte as six.",
    )

    metrics_token: str = _setting(
        parse.token,
        "",
        "Opens GET /metrics to whoever has it (Authorization: Bearer). Empty: there is no such page, except in DEV_MODE.",
        secret=True,
    )
    metrics_port: int = _setting(
        parse.optional(parse.whole(1, 65_535)),
        "",
        "A second port, on which gunicorn serves GET /metrics without a token, /health and /health/ready, and nothing else. It "
        "has connections of its own: a worker that is full still answers there. For Prometheus and the balancer: no network "
        "outside may reach it. Empty: none.",
    )
    metrics_host: str = _setting(parse.text, "", "Address for METRICS_PORT. Empty: HOST.")
    log_level: str = _setting(parse.choice("debug", "info", "warning", "error"), "info", "debug, info, warning or error.")
    log_format: str = _setting(
        parse.choice("auto", "json", "console"), "auto", "json, console, or auto: JSON unless standard output is a terminal."
    )

    #: OpenAI, Anthropic, and the servers of MODELS_FILE.
    endpoints: tuple[Endpoint, ...] = ()

    @classmethod
    def from_env(cls, environ: Mapping[str, str], read: Callable[[str], str] | None = None) -> Config:
        """The configuration that `environ` describes. An empty variable is an unset one, but for a rate, which it switches off.
        `read` gives a file's text.

        Raises ConfigError that names every fault; the value of a secret is never in it.
        """
        config, faults = cls.as_far_as_it_goes(environ, read)
        if faults:
            raise ConfigError(faults)
        return config

    @classmethod
    def as_far_as_it_goes(cls, environ: Mapping[str, str], read: Callable[[str], str] | None = None) -> tuple[Config, list[str]]:
        """The same, with every fault beside it: what cannot be used is at its default. Nothing may be served with such a one."""
        values: dict[str, Any] = {}
        faults: list[str] = []
        for name, setting in settings().items():
            raw = environ.get(name, setting.default).strip()
            raw = raw if raw or setting.empties else setting.default
            try:
                values[name.lower()] = setting.parse(raw)
            except parse.BadValue as bad:
                shown = "has a value that cannot be used" if setting.secret else f"is {raw!r}"
                faults.append(f"{name} {shown}: expected {bad}")
                values[name.lower()] = setting.parse("") if setting.secret else setting.parse(setting.default)
        text = ""
        if values["models_file"]:
            try:
                text = read(values["models_file"]) if read else ""
            except (OSError, ValueError) as error:
                kind = "is no UTF-8" if isinstance(error, ValueError) else error.strerror
                faults.append(f"MODELS_FILE is {values['models_file']!r}, which cannot be read: {kind}")
        found, wrong = endpoints(
            text, environ, values["openai_base_url"], values["anthropic_base_url"], values["anthropic_version"]
        )
        faults += [f"MODELS_FILE {line}" for line in wrong]
        config = cls(**values, endpoints=found)
        named = {fault.split(" ", 1)[0] for fault in faults}
        faults += [f"{name} {text}" for name, text in config._demands() if name not in named]
        config = dataclasses.replace(
            config,
            base_url=config.base_url or f"http://127.0.0.1:{config.port}",
            default_model=config.default_model or ("echo" if config.dev_mode and not config.openai_api_key else "gpt-4"),
        )
        return config, faults

    def _demands(self) -> Iterator[tuple[str, str]]:
        """What the settings must fulfil together: (variable, what is wrong with it)."""
        yield from self._of_secrets()
        names = [endpoint.name for endpoint in self.endpoints]
        if self.default_provider not in ("", "echo", *names):
            yield "DEFAULT_PROVIDER", f"is {self.default_provider!r}: expected one of {', '.join(names)}"
        yield from self._of_redis()
        yield from self._of_sizes_and_times()
        if self.web_concurrency > 1 and self.embedded_store:
            yield (
                "WEB_CONCURRENCY",
                f"is {self.web_concurrency}: expected 1, or REDIS_URL: workers cannot share the embedded store",
            )
        if self.metrics_port == self.port:
            yield "METRICS_PORT", f"is {self.metrics_port}: expected another than PORT"
        yield from self._of_dev_mode() if self.dev_mode else self._of_production()

    def _of_secrets(self) -> Iterator[tuple[str, str]]:
        if not self.jwt_secret:
            yield "JWT_SECRET", "is not set: expected at least 32 random bytes (make env writes a .env with one)"
        size = int(self.jwt_algorithm[2:]) // 8
        for name, secret in (("JWT_SECRET", self.jwt_secret), ("JWT_SECRET_PREVIOUS", self.jwt_secret_previous)):
            if secret and len(secret.encode()) < size:
                # RFC 7518 3.2; PyJWT warns at each token otherwise.
                yield name, f"has {len(secret.encode())} bytes: expected at least {size} random bytes for {self.jwt_algorithm}"
        if self.callback_secret_previous and not self.callback_secret:
            yield "CALLBACK_SECRET_PREVIOUS", "is set alone: expected CALLBACK_SECRET beside it"

    def _of_redis(self) -> Iterator[tuple[str, str]]:
        address = self.redis_address
        files = {
            "REDIS_CA_FILE": self.redis_ca_file,
            "REDIS_CERT_FILE": self.redis_cert_file,
            "REDIS_KEY_FILE": self.redis_key_file,
        }
        for name, value in files.items():
            if value and not (address and address.tls):
                yield name, f"is {value!r}: expected a REDIS_URL of rediss:// or rediss+sentinel:// beside it"
        if self.redis_key_file and not self.redis_cert_file:
            yield "REDIS_KEY_FILE", f"is {self.redis_key_file!r}: expected REDIS_CERT_FILE beside it"
        login = {
            "REDIS_SENTINEL_USERNAME": self.redis_sentinel_username,
            "REDIS_SENTINEL_PASSWORD": self.redis_sentinel_password,
        }
        for name, value in login.items():
            if value and not (address and address.master):
                yield name, "is set: expected a REDIS_URL of redis+sentinel:// or rediss+sentinel:// beside it"
        if self.redis_sentinel_username and not self.redis_sentinel_password:
            yield "REDIS_SENTINEL_USERNAME", "is set alone: expected REDIS_SENTINEL_PASSWORD beside it"

    def _of_sizes_and_times(self) -> Iterator[tuple[str, str]]:
        # JSON writes a control character of the answer as six bytes; the prompt and what is echoed came in with the body.
        largest = 6 * self.max_answer_bytes + self.max_body_bytes
        if largest > _CALLBACK_BYTES:
            text = f"is {self.max_body_bytes}: expected at most {_CALLBACK_BYTES - 6 * self.max_answer_bytes}"
            yield "MAX_BODY_BYTES", f"{text} beside MAX_ANSWER_BYTES, or n8n refuses a callback for its size"
        if 0 < self.stop_grace_seconds < self.drain_seconds + DRAIN_MARGIN:
            least = f"at least {self.drain_seconds + DRAIN_MARGIN:g}, DRAIN_SECONDS and {DRAIN_MARGIN} more"
            text = f"is {self.stop_grace_seconds:g}: expected {least}, or a drain is killed in the middle"
            yield "STOP_GRACE_SECONDS", text

    def _of_dev_mode(self) -> Iterator[tuple[str, str]]:
        if self.metrics_host not in {"", *parse.LOOPBACK_HOSTS}:
            yield "METRICS_HOST", f"is {self.metrics_host!r}: expected 127.0.0.1 in DEV_MODE"
        if self.host not in parse.LOOPBACK_HOSTS:
            yield "HOST", f"is {self.host!r}: expected 127.0.0.1, since DEV_MODE opens doors that no network may see"

    def _of_production(self) -> Iterator[tuple[str, str]]:
        for name, secret in (("JWT_SECRET", self.jwt_secret), ("JWT_SECRET_PREVIOUS", self.jwt_secret_previous)):
            if _PLACEHOLDERS.search(secret):
                yield name, "is a placeholder: expected at least 32 random bytes"
        if not self.base_url:
            yield "BASE_URL", "is not set: expected the address browsers use, such as https://ai.example.com"
        if not self.resume_url_allowed_origins:
            yield "RESUME_URL_ALLOWED_ORIGINS", "is not set: expected n8n's origin, such as http://n8n:5678"
        if self.default_provider == "echo":
            yield "DEFAULT_PROVIDER", "is 'echo': expected openai or anthropic, since echo exists in DEV_MODE only"

    @property
    def embedded_store(self) -> bool:
        """Whether the store lives inside this process."""
        return not self.redis_url

    @property
    def redis_address(self) -> parse.RedisAddress | None:
        """Where Redis is; None for the embedded store."""
        return parse.redis_address(self.redis_url) if self.redis_url else None

    @property
    def keep_seconds(self) -> int:
        """How long Redis keeps what is still owed: a day, or 2.5 times the whole callback schedule."""
        return int(max(86_400.0, 2.5 * sum(self.callback_schedule)))


def settings() -> dict[str, Setting]:
    """Every setting by its variable's name, in the order of the manual."""
    return {field.name.upper(): field.metadata["setting"] for field in dataclasses.fields(Config) if field.metadata}


#: The headings of the manual, each before the setting that it begins with.
SECTIONS = {
    "JWT_SECRET": "Tokens",
    "BASE_URL": "Addresses and processes",
    "REDIS_URL": "Store",
    "OPENAI_API_KEY": "Providers",
    "RESUME_URL_ALLOWED_ORIGINS": "Callbacks to n8n",
    "SESSION_TTL_SECONDS": "Times, in seconds",
    "INIT_RATE_LIMIT": "Limits",
    "METRICS_TOKEN": "Metrics and logs",
}


def manual(values: Mapping[str, str] | None = None) -> str:
    """The text of `.env.example`: every setting and every variable of docker-compose.yml, with purpose, unit and default;
    `values` are filled in."""
    lines = [
        "# aistream's configuration: the manual of every setting. `make env` writes a .env from it with random secrets.",
        "# A variable of the environment wins over .env. Empty means unset. Lines after a # are the defaults.",
    ]
    for name, setting in settings().items():
        if name in SECTIONS:
            lines += ["", f"# ---- {SECTIONS[name]} ----"]
        lines += _entry(name, setting.default, setting.doc, values or {})
    lines += [
        "",
        "# ---- docker-compose.yml ----",
        "# Of no meaning outside it, and the service reads none of them. In it HOST, PORT, DEV_MODE, REDIS_URL,",
        "# RESUME_URL_REWRITE and METRICS_PORT are what docker-compose.yml says, whatever stands above.",
    ]
    for variable in VARIABLES:
        lines += _entry(variable.name, variable.default, variable.doc, values or {})
    return "\n".join(lines) + "\n"


def _entry(name: str, default: str, doc: str, values: Mapping[str, str]) -> list[str]:
    wrapped = textwrap.wrap(doc, 118, initial_indent="# ", subsequent_indent="# ")
    if name in values:
        return ["", *wrapped, f"{name}={values[name]}"]
    return ["", *wrapped, f"#{name}={default}" if default else f"{name}="]
