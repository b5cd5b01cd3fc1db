"""The configuration: what is demanded, what is refused and in which words, and where the values come from."""

import os
import re
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import jwt
import pytest
from dotenv import dotenv_values

from aistream.app import create_app
from aistream.config import Config, manual, settings
from aistream.endpoints import ANTHROPIC_URL, OPENAI_URL
from aistream.environment import load
from aistream.errors import ConfigError
from aistream.installation import VARIABLES
from aistream.parse import RedisAddress, origin_of
from aistream.tokens import Caller, Tokens
from tests.conftest import make_config, missing
from tests.neighbours.redis import Locks
from tests.service import ROOT, SECRET, Service

#: The least that production needs.
PRODUCTION = {
    "JWT_SECRET": SECRET,
    "BASE_URL": "https://ai.test/chat",
    "RESUME_URL_ALLOWED_ORIGINS": "http://n8n:5678",
}


def faults(environ: Mapping[str, str]) -> list[str]:
    """What is said of an unusable configuration."""
    with pytest.raises(ConfigError) as refused:
        Config.from_env(environ)
    return list(refused.value.faults)


def production(**environ: str) -> Config:
    """The least production configuration, with these variables on top."""
    return Config.from_env({**PRODUCTION, **environ})


# ---- Values ----


def test_the_manual_is_what_env_example_says() -> None:
    assert (ROOT / ".env.example").read_text() == manual()


def test_the_manual_holds_every_setting_once_and_a_default_that_is_accepted() -> None:
    lines = [line.lstrip("#") for line in manual().splitlines() if "=" in line and line.lstrip("#")[:1].isupper()]

    assert [line.partition("=")[0] for line in lines] == [*settings(), *(variable.name for variable in VARIABLES)]
    assert Config.from_env({**dict(line.split("=", 1) for line in lines), **PRODUCTION}) == production()


def test_production_starts_with_its_three_demands_and_sensible_defaults() -> None:
    config = production()

    assert (config.base_url, config.host, config.port, config.web_concurrency) == ("https://ai.test/chat", "127.0.0.1", 8000, 1)
    assert (config.dev_mode, config.embedded_store, config.allowed_origins) == (False, True, ())
    assert (config.jwt_algorithm, config.jwt_audience, config.jwt_issuer) == ("HS256", "", "")
    assert (config.openai_base_url, config.anthropic_base_url) == (OPENAI_URL, ANTHROPIC_URL)
    assert (config.default_model, config.default_provider) == ("gpt-4", "")
    assert config.callback_schedule == (0, 1, 2, 4, 8, 15, 30, 60, 300, 1800, 7200, 18_000, 36_000)
    assert (config.session_ttl_seconds, config.replay_seconds, config.lease_seconds) == (60, 1800, 15)
    assert (config.heartbeat_seconds, config.max_stream_seconds, config.drain_seconds) == (15, 600, 120)
    assert (config.init_rate_limit, config.user_rate_limit, config.unauthorized_rate_limit) == ((30_000, 60), (60, 60), (120, 60))
    assert (config.max_pending_sessions, config.max_streams_per_worker, config.max_viewers_per_worker) == (10_000, 10_000, 20_000)
    assert (config.max_viewers_per_session, config.max_body_bytes, config.max_answer_bytes) == (10, 256 * 1024, 2 * 2**20)
    assert (config.log_level, config.log_format) == ("info", "auto")
    assert (config.metrics_token, config.metrics_port, config.metrics_host) == ("", 0, "")
    assert (config.callback_secret, config.callback_secret_previous, config.callback_headers) == (b"", b"", ())
    assert (config.callback_concurrency, config.resume_url_rewrite) == (20, ())
    assert (config.first_token_seconds, config.reasoning_first_token_seconds, config.first_token_budget_seconds) == (60, 300, 120)
    assert (config.silence_seconds, config.provider_retries, config.provider_backoff_seconds) == (60, 2, 0.5)
    assert (config.provider_concurrency, config.provider_queue, config.provider_queue_seconds) == (10_000, 1_000, 30)
    assert (config.models_file, config.anthropic_version, config.token_encoding) == ("", "", "o200k_base")


RATES = {"INIT_RATE_LIMIT", "USER_RATE_LIMIT", "UNAUTHORIZED_RATE_LIMIT"}


def test_an_empty_variable_is_an_unset_one() -> None:
    blank = dict.fromkeys(set(settings()) - set(PRODUCTION) - RATES, "  ")

    assert production(**blank) == production()


@pytest.mark.parametrize("value", ["", "  ", "off", "OFF"])
def test_an_empty_rate_is_none(tmp_path: Path, value: str) -> None:
    blank = dict.fromkeys(RATES, value)
    (tmp_path / ".env").write_text("".join(f"{name}={value}\n" for name in RATES))

    found = [production(**blank), load({**PRODUCTION, **blank}, ROOT / "docs"), load(PRODUCTION, tmp_path)]

    assert {(one.init_rate_limit, one.user_rate_limit, one.unauthorized_rate_limit) for one in found} == {(None, None, None)}


@pytest.mark.parametrize(
    ("value", "rate"),
    [
        ("60/minute", (60, 60)),
        ("1 per second", (1, 1)),
        ("100 per 5 Minutes", (100, 300)),
        ("10/2hours", (10, 7_200)),
        ("999999999 / day", (999_999_999, 86_400)),
    ],
)
def test_a_rate_is_so_many_in_a_span(value: str, rate: tuple[int, int]) -> None:
    assert production(USER_RATE_LIMIT=value).user_rate_limit == rate


@pytest.mark.parametrize(
    "value",
    [
        "60",
        "0/minute",
        "-1/minute",
        "5/week",
        "5/0 minutes",
        "5/2 days",
        "60 minute",
        "60permin",
        "6.5/minute",
        "5/minute;9/hour",
    ],
)
def test_a_rate_that_is_none_is_refused(value: str) -> None:
    expected = "a number and a span of at most a day, such as 60/minute or 100 per 5 minutes; or off"

    assert faults({**PRODUCTION, "USER_RATE_LIMIT": value}) == [f"USER_RATE_LIMIT is {value!r}: expected {expected}"]


def test_values_are_read_without_the_blanks_around_them() -> None:
    config = production(PORT=" 9000\n", LOG_LEVEL=" Debug ", BASE_URL=" https://ai.test/ ")

    assert (config.port, config.log_level, config.base_url) == (9000, "debug", "https://ai.test")


def test_what_is_owed_is_kept_for_a_day_or_longer_than_its_schedule() -> None:
    assert production(CALLBACK_SCHEDULE="0,1").keep_seconds == 86_400
    assert production(CALLBACK_SCHEDULE="0,86400,86400").keep_seconds == 2.5 * 2 * 86_400


def test_an_origin_is_rewritten_to_another() -> None:
    config = production(RESUME_URL_REWRITE="HTTP://LocalHost:5678=http://n8n:5678, https://n8n.test=http://[::1]:5678/,")

    assert config.resume_url_rewrite == (("http://localhost:5678", "http://n8n:5678"), ("https://n8n.test", "http://[::1]:5678"))


@pytest.mark.parametrize(
    ("value", "headers"),
    [
        ("X-Aistream-Key: a-secret", (("X-Aistream-Key", "a-secret"),)),
        ("Authorization: Bearer a:b, c", (("Authorization", "Bearer a:b, c"),)),
        ('{"X-One": "1", "X-Two": "{}"}', (("X-One", "1"), ("X-Two", "{}"))),
        ("{}", ()),
    ],
)
def test_callback_headers_are_one_line_or_a_json_object(value: str, headers: tuple[tuple[str, str], ...]) -> None:
    assert production(CALLBACK_HEADERS=value).callback_headers == headers


HEADERS = 'one header such as X-Aistream-Key: a-secret, or several as {"X-Aistream-Key": "a-secret", "X-Other": "…"}'


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a-secret", HEADERS),
        ("X Key: a", HEADERS),
        ("X-Key:", HEADERS),
        (": a", HEADERS),
        ("X-Key: é", HEADERS),
        ('{"X-Key": 1}', HEADERS),
        ('{"X-Key": " a"}', HEADERS),
        ('{"X-Key": "a\\nX-Other: b"}', HEADERS),
        ('{"X-Key"', HEADERS),
        ('{"X-Key": "a", "x-key": "b"}', "each header once"),
        ("Content-Length: 5", "headers of your own: Content-Length is set by the service"),
        ("host: n8n", "headers of your own: host is set by the service"),
        ("Webhook-Id: 1", "headers of your own: Webhook-Id is set by the service"),
    ],
)
def test_callback_headers_that_cannot_be_sent_are_refused_and_not_shown(value: str, expected: str) -> None:
    assert faults({**PRODUCTION, "CALLBACK_HEADERS": value}) == [
        f"CALLBACK_HEADERS has a value that cannot be used: expected {expected}"
    ]


def test_a_callback_that_n8n_would_refuse_for_its_size_cannot_be_configured() -> None:
    assert production(MAX_BODY_BYTES=str(3 * 2**20)).max_body_bytes == 3 * 2**20
    assert production(MAX_BODY_BYTES=str(9 * 2**20), MAX_ANSWER_BYTES=str(2**20)).max_answer_bytes == 2**20
    assert faults({**PRODUCTION, "MAX_BODY_BYTES": "4000000"}) == [
        "MAX_BODY_BYTES is 4000000: expected at most 3145728 beside MAX_ANSWER_BYTES, or n8n refuses a callback for its size"
    ]


def test_a_previous_callback_secret_needs_its_successor() -> None:
    secret = "whsec_" + "aGlkZGVu" * 5

    assert faults({**PRODUCTION, "CALLBACK_SECRET_PREVIOUS": secret}) == [
        "CALLBACK_SECRET_PREVIOUS is set alone: expected CALLBACK_SECRET beside it"
    ]
    assert production(CALLBACK_SECRET_PREVIOUS=secret, CALLBACK_SECRET=secret).callback_secret_previous == b"hidden" * 5


# ---- Faults ----

REWRITES = "FROM=TO separated by commas, both exact origins, such as http://localhost:5678=http://n8n:5678"

DELAYS = "seconds before each attempt separated by commas, each from 0 to 86400"


@pytest.mark.parametrize(
    ("name", "value", "fault"),
    [
        ("PORT", "0", "is '0': expected a whole number from 1 to 65535"),
        ("PORT", "65536", "is '65536': expected a whole number from 1 to 65535"),
        ("PORT", "8000.0", "is '8000.0': expected a whole number from 1 to 65535"),
        ("PORT", "٨٠٠٠", "is '٨٠٠٠': expected a whole number from 1 to 65535"),
        ("MAX_BODY_BYTES", "1e6", "is '1e6': expected a whole number from 1024 to 16777216"),
        ("MAX_ANSWER_BYTES", "9" * 40, f"is '{'9' * 40}': expected a whole number from 1024 to 2097152"),
        ("MAX_VIEWERS_PER_SESSION", "-1", "is '-1': expected a whole number from 1 to 100000"),
        ("LEASE_SECONDS", "inf", "is 'inf': expected a number of seconds from 1 to 300"),
        ("LEASE_SECONDS", "nan", "is 'nan': expected a number of seconds from 1 to 300"),
        ("SESSION_TTL_SECONDS", "1m", "is '1m': expected a number of seconds from 1 to 3600"),
        ("HEARTBEAT_SECONDS", "0.1", "is '0.1': expected a number of seconds from 0.2 to 60"),
        ("DEV_MODE", "maybe", "is 'maybe': expected true or false"),
        ("LOG_LEVEL", "loud", "is 'loud': expected one of debug, info, warning, error"),
        ("JWT_ALGORITHM", "none", "is 'none': expected one of HS256, HS384, HS512"),
        ("JWT_ALGORITHM", "RS256", "is 'RS256': expected one of HS256, HS384, HS512"),
        ("DEFAULT_PROVIDER", "google", "is 'google': expected one of openai, anthropic"),
        ("ANTHROPIC_VERSION", "latest", "is 'latest': expected a date such as 2023-06-01"),
        ("PROVIDER_RETRIES", "11", "is '11': expected a whole number from 0 to 10"),
        ("FIRST_TOKEN_SECONDS", "0", "is '0': expected a number of seconds from 0.1 to 3600"),
        ("CALLBACK_SCHEDULE", "0,1,soon", f"is '0,1,soon': expected {DELAYS}"),
        ("CALLBACK_SCHEDULE", "0,", f"is '0,': expected {DELAYS}"),
        ("CALLBACK_SCHEDULE", "86401", f"is '86401': expected {DELAYS}"),
        ("CALLBACK_SCHEDULE", ",".join("0" * 51), f"is '{','.join('0' * 51)}': expected at most 50 attempts"),
        ("CALLBACK_CONCURRENCY", "0", "is '0': expected a whole number from 1 to 200"),
        ("RESUME_URL_REWRITE", "http://a", f"is 'http://a': expected {REWRITES}"),
        ("RESUME_URL_REWRITE", "http://a=b", f"is 'http://a=b': expected {REWRITES}"),
        ("RESUME_URL_REWRITE", "http://a=http://b/x", f"is 'http://a=http://b/x': expected {REWRITES}"),
        ("RESUME_URL_REWRITE", "http://*=http://b", f"is 'http://*=http://b': expected {REWRITES}"),
        (
            "RESUME_URL_REWRITE",
            "http://a=http://b,http://A=http://c",
            "is 'http://a=http://b,http://A=http://c': expected each origin rewritten once",
        ),
        ("OPENAI_BASE_URL", "api.openai.com", "is 'api.openai.com': expected a full URL such as https://ai.example.com"),
        ("ANTHROPIC_BASE_URL", "ftp://a.test", "is 'ftp://a.test': expected a full URL such as https://ai.example.com"),
        ("BASE_URL", "ai.test", "is 'ai.test': expected a full URL such as https://ai.example.com"),
        ("BASE_URL", "http://ai.test", "is 'http://ai.test': expected an https:// URL (http:// only for this machine itself)"),
        ("BASE_URL", "https://ai.test/?a=1", "is 'https://ai.test/?a=1': expected a URL without query and fragment"),
        ("BASE_URL", "https://me:pw@ai.test", "is 'https://me:pw@ai.test': expected a full URL such as https://ai.example.com"),
        ("BASE_URL", "https://[::1", "is 'https://[::1': expected a full URL such as https://ai.example.com"),
        ("BASE_URL", "https://ai.test:99999", "is 'https://ai.test:99999': expected a full URL such as https://ai.example.com"),
    ],
)
def test_a_bad_value_is_told_with_variable_value_and_expectation(name: str, value: str, fault: str) -> None:
    assert faults({**PRODUCTION, name: value}) == [f"{name} {fault}"]


@pytest.mark.parametrize("value", ["https://ai.test/chat?", "https://ai.test/chat#", "https://ai test", "https://ai.test/a b"])
def test_a_base_url_that_no_stream_url_can_start_with_is_refused(value: str) -> None:
    assert [fault.split(" ")[0] for fault in faults({**PRODUCTION, "BASE_URL": value})] == ["BASE_URL"]


RANDOM = "at least 32 random bytes, for example from: openssl rand -hex 32"
PUBLIC_KEY = "a random secret, not a PEM or SSH key: HMAC with a public key lets everybody sign"
REDIS_FORMS = (
    "redis://[user:password@]host[:port][/db], redis+sentinel://[user:password@]host[:port],…/master[/db], "
    "rediss for redis in both (TLS), or unix:///path, without a query; or memory:// for the embedded store"
)
WHSEC = "whsec_ followed by 24 to 64 random bytes in base64 (Standard Webhooks)"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("JWT_SECRET", "kept-private", RANDOM),
        ("JWT_SECRET_PREVIOUS", "kept-private", RANDOM),
        (
            "JWT_SECRET",
            "-----BEGIN PUBLIC KEY----- kept-private",
            PUBLIC_KEY,
        ),
        ("JWT_SECRET", "ssh-ed25519 AAAAkept-private-kept-private-kept-private me@here", PUBLIC_KEY),
        ("JWT_SECRET_PREVIOUS", "ecdsa-sha2-nistp256 AAAAkept-private-kept-private-kept-private", PUBLIC_KEY),
        ("JWT_SECRET", '{"kty": "RSA", "n": "kept-private-kept-private-kept-private"}', PUBLIC_KEY),
        ("CALLBACK_SECRET", "kept-private", WHSEC),
        ("METRICS_TOKEN", "kept-private", "at least 16 random characters without spaces, for example from: openssl rand -hex 32"),
        ("CALLBACK_SECRET", "whsec_a2VwdC1wcml2YXRl", WHSEC),
        ("REDIS_URL", "http://:kept-private@redis:6379", REDIS_FORMS),
    ],
)
def test_a_bad_secret_is_told_without_its_value(name: str, value: str, expected: str) -> None:
    found = faults({**PRODUCTION, name: value})

    assert found == [f"{name} has a value that cannot be used: expected {expected}"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("REDIS_URL", "redis://:kept-private@[::1"),
        ("REDIS_URL", "redis://:kept-private@redis:port"),
        ("CALLBACK_SECRET", "whsec_kept-private-é"),
        ("JWT_SECRET", "\udcff" * 40),  # bytes that are no UTF-8, as os.environ has them
    ],
)
def test_a_secret_that_cannot_even_be_parsed_is_told_in_the_same_way(name: str, value: str) -> None:
    (fault,) = faults({**PRODUCTION, name: value})

    assert fault.startswith(f"{name} has a value that cannot be used: expected ")
    assert "kept-private" not in fault


def test_all_faults_are_told_at_once_and_each_once() -> None:
    found = faults({"JWT_SECRET": "short", "PORT": "x", "DEV_MODE": "perhaps", "LOG_FORMAT": "xml"})

    assert [fault.split(" ")[0] for fault in found] == [
        "JWT_SECRET",
        "PORT",
        "DEV_MODE",
        "LOG_FORMAT",
        "BASE_URL",
        "RESUME_URL_ALLOWED_ORIGINS",
    ]


def test_the_message_has_a_readable_line_for_each_fault() -> None:
    with pytest.raises(ConfigError) as refused:
        Config.from_env({**PRODUCTION, "PORT": "x", "LOG_LEVEL": "y"})

    assert str(refused.value) == (
        "aistream cannot start with this configuration:\n"
        "  - PORT is 'x': expected a whole number from 1 to 65535\n"
        "  - LOG_LEVEL is 'y': expected one of debug, info, warning, error"
    )


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("JWT_SECRET", "is not set: expected at least 32 random bytes (make env writes a .env with one)"),
        ("BASE_URL", "is not set: expected the address browsers use, such as https://ai.example.com"),
        ("RESUME_URL_ALLOWED_ORIGINS", "is not set: expected n8n's origin, such as http://n8n:5678"),
    ],
)
def test_production_demands(name: str, fault: str) -> None:
    assert faults({**PRODUCTION, name: ""}) == [f"{name} {fault}"]


@pytest.mark.parametrize("algorithm", ["HS384", "HS512"])
def test_a_secret_is_at_least_as_long_as_its_algorithms_hash(algorithm: str) -> None:
    """RFC 7518 3.2; PyJWT warns at each token otherwise."""
    size = int(algorithm[2:]) // 8

    assert faults({**PRODUCTION, "JWT_ALGORITHM": algorithm}) == [
        f"JWT_SECRET has {len(SECRET)} bytes: expected at least {size} random bytes for {algorithm}"
    ]
    assert faults({**PRODUCTION, "JWT_ALGORITHM": algorithm, "JWT_SECRET": "x" * size, "JWT_SECRET_PREVIOUS": SECRET}) == [
        f"JWT_SECRET_PREVIOUS has {len(SECRET)} bytes: expected at least {size} random bytes for {algorithm}"
    ]
    assert production(JWT_ALGORITHM=algorithm, JWT_SECRET="x" * size).jwt_algorithm == algorithm


def test_the_metrics_have_a_port_of_their_own_and_in_dev_mode_on_this_machine() -> None:
    config = production(METRICS_PORT="9464", METRICS_HOST="10.0.0.1")
    same = faults({**PRODUCTION, "METRICS_PORT": "8000"})
    far = faults({"DEV_MODE": "true", "JWT_SECRET": SECRET, "METRICS_PORT": "9464", "METRICS_HOST": "0.0.0.0"})

    assert (config.metrics_port, config.metrics_host) == (9464, "10.0.0.1")
    assert same == ["METRICS_PORT is 8000: expected another than PORT"]
    assert far == ["METRICS_HOST is '0.0.0.0': expected 127.0.0.1 in DEV_MODE"]


@pytest.mark.parametrize("environ", [{}, {"REDIS_URL": "memory://"}])
def test_several_workers_are_refused_on_the_embedded_store(environ: dict[str, str]) -> None:
    assert faults({**PRODUCTION, **environ, "WEB_CONCURRENCY": "2"}) == [
        "WEB_CONCURRENCY is 2: expected 1, or REDIS_URL: workers cannot share the embedded store"
    ]


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://redis", RedisAddress((("redis", 6379),), "", "", False, "", "", 0)),
        ("redis://:p%40ss:word@redis:6381/3", RedisAddress((("redis", 6381),), "", "", False, "", "p@ss:word", 3)),
        ("rediss://u%2Fser:pw@[::1]:6380/", RedisAddress((("::1", 6380),), "", "", True, "u/ser", "pw", 0)),
        (
            "redis+sentinel://user:pw@s1:26380,s2,[fe80::1]:7/my%20master/2",
            RedisAddress((("s1", 26380), ("s2", 26379), ("fe80::1", 7)), "my master", "", False, "user", "pw", 2),
        ),
        ("rediss+sentinel://s1/m", RedisAddress((("s1", 26379),), "m", "", True, "", "", 0)),
        ("unix:///run/redis%20.sock", RedisAddress((), "", "/run/redis .sock", False, "", "", 0)),
        ("unix://u:p@/run/redis.sock?db=4", RedisAddress((), "", "/run/redis.sock", False, "u", "p", 4)),
    ],
)
def test_a_redis_is_found_by_its_url(url: str, expected: RedisAddress) -> None:
    assert production(REDIS_URL=url).redis_address == expected


@pytest.mark.parametrize(
    "url",
    [
        *(
            "redis",
            "redis:redis",
            "rediss//redis",
            "REDIS://redis",
            "redis://",
            "redis://:6379",
            "redis://redis/x",
            "redis://redis/0/1",
        ),
        *("redis://redis:0", "redis://redis:65536", "redis://redis:port", "redis://[::1", "redis://one,two/0"),
        *("rediss://redis?ssl_cert_reqs=none", "redis://redis#x", "unix://redis.sock", "unix:///s?db=x", "unix:///s?timeout=5"),
        *(
            "redis+sentinel://s1",
            "redis+sentinel://s1/",
            "redis+sentinel:///m",
            "redis+sentinel://s1,/m",
            "redis+sentinel://s1/m/x",
        ),
        *("sentinel://s1/m", "redis+unix:///s", "valkey://redis"),
    ],
)
def test_a_redis_that_no_url_can_mean_is_refused(url: str) -> None:
    assert [fault.split(" ")[0] for fault in faults({**PRODUCTION, "REDIS_URL": url})] == ["REDIS_URL"]


def test_the_embedded_store_has_no_address() -> None:
    assert production(REDIS_URL="memory://").redis_address is production().redis_address is None


RATHER = "expected a REDIS_URL of rediss:// or rediss+sentinel:// beside it"


@pytest.mark.parametrize(
    ("environ", "fault"),
    [
        ({"REDIS_URL": "redis://redis", "REDIS_CA_FILE": "ca.pem"}, f"REDIS_CA_FILE is 'ca.pem': {RATHER}"),
        ({"REDIS_CERT_FILE": "c.pem"}, f"REDIS_CERT_FILE is 'c.pem': {RATHER}"),
        ({"REDIS_URL": "rediss://redis", "REDIS_KEY_FILE": "k"}, "REDIS_KEY_FILE is 'k': expected REDIS_CERT_FILE beside it"),
        (
            {"REDIS_URL": "redis://redis", "REDIS_SENTINEL_PASSWORD": "hidden"},
            "REDIS_SENTINEL_PASSWORD is set: expected a REDIS_URL of redis+sentinel:// or rediss+sentinel:// beside it",
        ),
        (
            {"REDIS_URL": "redis+sentinel://s1/m", "REDIS_SENTINEL_USERNAME": "user"},
            "REDIS_SENTINEL_USERNAME is set alone: expected REDIS_SENTINEL_PASSWORD beside it",
        ),
        ({"REDIS_POOL_SIZE": "1"}, "REDIS_POOL_SIZE is '1': expected a whole number from 2 to 10000"),
    ],
)
def test_what_does_not_go_with_its_redis_is_refused(environ: dict[str, str], fault: str) -> None:
    assert faults({**PRODUCTION, **environ}) == [fault]


@pytest.mark.parametrize(
    ("files", "fault"),
    [
        ({"REDIS_CA_FILE": "none.pem"}, "REDIS_CA_FILE cannot be used (No such file or directory): "),
        ({"REDIS_CA_FILE": "text"}, "REDIS_CA_FILE cannot be used (NO_CERTIFICATE_OR_CRL_FOUND): "),
        ({"REDIS_CERT_FILE": "none.pem"}, "REDIS_CERT_FILE cannot be used (No such file or directory): "),
        ({"REDIS_CERT_FILE": "client.pem"}, "REDIS_CERT_FILE cannot be used ("),
        (
            {"REDIS_CERT_FILE": "client.pem", "REDIS_KEY_FILE": "server.key"},
            "REDIS_CERT_FILE cannot be used (KEY_VALUES_MISMATCH): ",
        ),
    ],
    ids=["no-file", "no-certificates", "no-certificate", "no-key", "another-key"],
)
def test_a_tls_file_that_cannot_be_used_stops_the_start_and_is_named(tmp_path: Path, files: dict[str, str], fault: str) -> None:
    Locks.make(tmp_path, "redis")
    (tmp_path / "text").write_text("no PEM")

    with pytest.raises(ConfigError) as refused:
        load({**PRODUCTION, "REDIS_URL": "rediss://redis", **files}, tmp_path)

    (told,) = refused.value.faults
    assert told.startswith(fault)


def test_tls_files_are_looked_for_beside_the_env_file(tmp_path: Path) -> None:
    environ = {name: Path(path).name for name, path in Locks.make(tmp_path, "redis").environ.items()}

    config = load({**PRODUCTION, "REDIS_URL": "rediss://redis", **environ}, tmp_path)

    assert config.redis_ca_file == str(tmp_path / "ca.pem")
    assert config.redis_key_file == str(tmp_path / "client.key")


def test_several_workers_are_welcome_on_a_redis() -> None:
    assert production(WEB_CONCURRENCY="2", REDIS_URL="redis://redis:6379/0").web_concurrency == 2


PLACEHOLDERS = [
    "change-me-change-me-change-me-change-me",
    "CHANGEME-0123456789-0123456789-0123456789",
    "your_jwt_secret_your_jwt_secret_your_jwt_secret",
    "your-secret-key-that-is-long-enough-really",
    "an-example-secret-that-is-long-enough",
    "replace-this-replace-this-replace-this",
    "placeholder-placeholder-placeholder",
]


@pytest.mark.parametrize("secret", PLACEHOLDERS)
def test_a_placeholder_is_no_secret_outside_dev_mode(secret: str) -> None:
    assert faults({**PRODUCTION, "JWT_SECRET": secret}) == ["JWT_SECRET is a placeholder: expected at least 32 random bytes"]
    assert make_config(JWT_SECRET=secret).jwt_secret == secret


def test_a_placeholder_is_no_previous_secret_either() -> None:
    """Whoever rotates away from a placeholder must not go on accepting what everybody can sign."""
    assert faults({**PRODUCTION, "JWT_SECRET_PREVIOUS": PLACEHOLDERS[0]}) == [
        "JWT_SECRET_PREVIOUS is a placeholder: expected at least 32 random bytes"
    ]


# ---- DEV_MODE ----


@pytest.mark.parametrize("value", ["true", "TRUE", "1", "yes", "on"])
def test_dev_mode_needs_nothing_but_a_secret(value: str) -> None:
    config = Config.from_env({"DEV_MODE": value, "JWT_SECRET": SECRET})

    assert (config.dev_mode, config.base_url, config.default_model) == (True, "http://127.0.0.1:8000", "echo")


@pytest.mark.parametrize("value", ["false", "0", "no", "Off", ""])
def test_dev_mode_is_off_unless_it_is_on(value: str) -> None:
    assert production(DEV_MODE=value).dev_mode is False


def test_dev_mode_finds_its_own_port_and_keeps_a_given_address() -> None:
    assert make_config(PORT="9123").base_url == "http://127.0.0.1:9123"
    assert make_config(BASE_URL="http://localhost:3000/ai/").base_url == "http://localhost:3000/ai"


def test_the_default_model_is_echo_only_in_dev_mode_without_an_openai_key() -> None:
    assert make_config(ANTHROPIC_API_KEY="k").default_model == "echo"
    assert make_config(OPENAI_API_KEY="k").default_model == "gpt-4"
    assert make_config(DEFAULT_MODEL="claude-x").default_model == "claude-x"
    assert production().default_model == "gpt-4"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "ai.test"])
def test_dev_mode_listens_on_this_machine_alone(host: str) -> None:
    assert faults({"DEV_MODE": "true", "JWT_SECRET": SECRET, "HOST": host}) == [
        f"HOST is {host!r}: expected 127.0.0.1, since DEV_MODE opens doors that no network may see"
    ]
    assert production(HOST=host).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_dev_mode_may_listen_on_any_loopback(host: str) -> None:
    assert make_config(HOST=host).host == host


def test_the_echo_provider_takes_nothing_over_in_production() -> None:
    assert faults({**PRODUCTION, "DEFAULT_PROVIDER": "echo"}) == [
        "DEFAULT_PROVIDER is 'echo': expected openai or anthropic, since echo exists in DEV_MODE only"
    ]
    assert make_config(DEFAULT_PROVIDER="echo").default_provider == "echo"


# ---- Origins ----


def test_origins_are_compared_as_browsers_write_them() -> None:
    config = production(ALLOWED_ORIGINS=" https://Chat.TEST/ , http://localhost:3000,https://a.test:443,http://[::1]:80, ,")

    assert config.allowed_origins == ("https://chat.test", "http://localhost:3000", "https://a.test", "http://[::1]")


@pytest.mark.parametrize("name", ["ALLOWED_ORIGINS", "RESUME_URL_ALLOWED_ORIGINS"])
@pytest.mark.parametrize(
    "value",
    [
        *(
            "*",
            "chat.test",
            "https://chat.test/path",
            "https://a.test,*",
            "https://me@a.test",
            "https://a.test?x",
            "https://a.test#",
        ),
        *("null", "file:///x", "https://", "http://a.test:99999", "http://a.test:x", "http://[::1"),
    ],
)
def test_what_is_no_exact_origin_is_refused(name: str, value: str) -> None:
    (fault,) = faults({**PRODUCTION, name: value})

    assert fault == (
        f"{name} is {value!r}: expected origins separated by commas, each exact, such as https://chat.example.com (no *, no path)"
    )


@pytest.mark.parametrize(
    "value", ["https://*.a.test", "http://a.test$", "https://(a|b).test", "https://a\\.test", "https://a b.test"]
)
def test_a_pattern_is_no_origin(value: str) -> None:
    """flask-cors would take it for a regular expression, and let in `https://xa.test.evil`."""
    (fault,) = faults({**PRODUCTION, "ALLOWED_ORIGINS": value})

    assert fault.endswith("(no *, no path)")


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("http://n8n:5678/webhook-waiting/7?signature=ab", "http://n8n:5678"),
        ("HTTPS://N8N.Example.com:443/x", "https://n8n.example.com"),
        ("http://n8n:80", "http://n8n"),
        ("http://n8n:443", "http://n8n:443"),
        ("http://n8n:/x", "http://n8n"),
        ("http://[::1]:5678/x", "http://[::1]:5678"),
    ],
)
def test_the_origin_of_a_url_is_in_lower_case_and_without_the_schemes_own_port(url: str, origin: str) -> None:
    assert origin_of(url) == origin


@pytest.mark.parametrize(
    "url", ["", "n8n:5678/x", "//n8n/x", "ftp://n8n", "http:///x", "http://n8n:x/", "http://[::1/", "data:x"]
)
def test_what_is_no_http_url_has_no_origin(url: str) -> None:
    with pytest.raises(ValueError):  # whichever one
        origin_of(url)


# ---- Secrets ----


def test_repr_shows_no_secret() -> None:
    config = production(
        JWT_SECRET_PREVIOUS="hidden-" * 6,
        OPENAI_API_KEY="hidden-openai",
        ANTHROPIC_API_KEY="hidden-anthropic",
        CALLBACK_SECRET="whsec_" + "aGlkZGVu" * 5,
        REDIS_URL="redis://:hidden-password@redis:6379",
    )

    shown = repr(config) + str(config)

    assert "hidden" not in shown and SECRET not in shown
    assert "https://ai.test/chat" in shown


# ---- How long a stop may take ----


@pytest.mark.parametrize("grace", ["", "135", "150"])
def test_a_stop_that_outlasts_the_drain_is_long_enough(grace: str) -> None:
    assert production(STOP_GRACE_SECONDS=grace).drain_seconds == 120


def test_a_stop_that_would_kill_a_drain_in_the_middle_is_refused() -> None:
    assert faults({**PRODUCTION, "STOP_GRACE_SECONDS": "150", "DRAIN_SECONDS": "300"}) == [
        "STOP_GRACE_SECONDS is 150: expected at least 315, DRAIN_SECONDS and 15 more, or a drain is killed in the middle"
    ]


# ---- Where the values come from ----


def test_the_environment_wins_over_env_and_empty_is_unset(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(f"JWT_SECRET={SECRET}\nDEV_MODE=true\nPORT=9001\nLOG_LEVEL=debug\nDEFAULT_MODEL=echo\n")

    config = load({"PORT": "9002", "LOG_LEVEL": "", "DEFAULT_MODEL": " "}, tmp_path)

    assert (config.port, config.log_level, config.default_model, config.jwt_secret) == (9002, "debug", "echo", SECRET)


def test_without_env_the_environment_is_enough(tmp_path: Path) -> None:
    assert load(PRODUCTION, tmp_path) == production()
    assert list(tmp_path.iterdir()) == []


def test_env_is_left_out_when_dotenv_is_switched_off(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("PORT=9001\n")

    assert load({**PRODUCTION, "PYTHON_DOTENV_DISABLED": "true"}, tmp_path) == production()


def test_a_faulty_env_is_told_like_a_faulty_environment(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("DEV_MODE=true\nPORT=x\n")

    with pytest.raises(ConfigError, match=r"PORT is 'x': expected a whole number from 1 to 65535"):
        load({}, tmp_path)


def test_dev_mode_makes_a_secret_once_that_only_its_owner_can_read(tmp_path: Path) -> None:
    first = load({"DEV_MODE": "true"}, tmp_path)
    second = load({"DEV_MODE": "1"}, tmp_path)

    kept = tmp_path / ".dev-secret"
    assert first.jwt_secret == second.jwt_secret == kept.read_text().strip()
    assert len(bytes.fromhex(first.jwt_secret)) == 32
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == [".dev-secret"]


def test_a_given_secret_and_production_leave_no_dev_secret_behind(tmp_path: Path) -> None:
    load({"DEV_MODE": "true", "JWT_SECRET": SECRET}, tmp_path)
    with pytest.raises(ConfigError):
        load({**PRODUCTION, "JWT_SECRET": ""}, tmp_path)

    assert list(tmp_path.iterdir()) == []


def test_a_dev_secret_that_was_cut_short_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / ".dev-secret").write_text("0123\n")

    config = load({"DEV_MODE": "true"}, tmp_path)

    assert config.jwt_secret == (tmp_path / ".dev-secret").read_text().strip()
    assert len(config.jwt_secret) == 64


def test_processes_that_start_at_once_share_one_dev_secret(tmp_path: Path) -> None:
    script = f"""
from pathlib import Path
from aistream.environment import load
print(load({{"DEV_MODE": "true"}}, Path({str(tmp_path)!r})).jwt_secret)
"""
    command = [sys.executable, "-c", script]

    processes = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(8)]

    assert {process.communicate(timeout=30)[0] for process in processes} == {(tmp_path / ".dev-secret").read_text()}
    assert [path.name for path in tmp_path.iterdir()] == [".dev-secret"]


# ---- What a person types ----


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout of its own, so that no .env of the developer's counts and none is written to."""
    shutil.copytree(ROOT / "aistream", tmp_path / "aistream", ignore=shutil.ignore_patterns("__pycache__", "static"))
    for name in ("wsgi.py", "gunicorn.conf.py", "generate_token.py"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


@pytest.fixture
def run(checkout: Path) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """Runs Python in the checkout with these variables and no others."""

    def run(*args: str, **environ: str) -> "subprocess.CompletedProcess[str]":
        environ = {"PATH": os.environ["PATH"], "HOME": str(checkout), "PYTHONDONTWRITEBYTECODE": "1", **environ}
        return subprocess.run(
            [sys.executable, *args], cwd=checkout, env=environ, capture_output=True, text=True, timeout=60, check=False
        )

    return run


Run = Callable[..., "subprocess.CompletedProcess[str]"]


def test_make_env_writes_an_env_in_which_only_the_provider_keys_are_missing(checkout: Path, run: Run) -> None:
    written = run("-m", "aistream.environment")

    config = load({}, checkout)
    app = create_app(config)
    answer = app.test_client().post(
        "/init-stream",
        json={
            "n8nToken": Tokens(config, time.time).sign_caller("n8n", int(time.time()) + 300),
            "resumeUrl": "http://localhost:5678/webhook-waiting/1",
            "prompt": "Hi",
        },
    )
    app.extensions["aistream"].background.stop()
    assert (written.returncode, written.stderr) == (0, "")
    assert "OPENAI_API_KEY or ANTHROPIC_API_KEY" in written.stdout
    assert stat.S_IMODE((checkout / ".env").stat().st_mode) == 0o600
    assert len(config.jwt_secret) == 64 and len(config.callback_secret) == 32 and not config.dev_mode
    assert config.redis_url == ""  # docker-compose.yml has one of its own
    assert (answer.status_code, (answer.json or {})["code"]) == (400, "provider_not_configured")
    assert "set OPENAI_API_KEY" in (answer.json or {})["detail"]


def test_make_env_writes_other_secrets_each_time_and_replaces_none(checkout: Path, run: Run) -> None:
    run("-m", "aistream.environment")
    first, text = load({}, checkout), (checkout / ".env").read_text()

    again = run("-m", "aistream.environment")

    assert (again.returncode, again.stdout) == (1, "")
    assert "exists already" in again.stderr and "Traceback" not in again.stderr
    assert (checkout / ".env").read_text() == text
    (checkout / ".env").unlink()
    run("-m", "aistream.environment")
    assert load({}, checkout).jwt_secret != first.jwt_secret
    assert load({}, checkout).callback_secret != first.callback_secret
    assert load({}, checkout).callback_headers != first.callback_headers != ()


def test_an_env_on_standard_output_is_the_same(checkout: Path, run: Run) -> None:
    printed = run("-m", "aistream.environment", "-")

    (checkout / ".env").write_text(printed.stdout)
    values = dotenv_values(checkout / ".env")
    made = {variable.name: values[variable.name] or "" for variable in VARIABLES if not variable.default}
    assert load({}, checkout).callback_headers[0][0] == "X-Aistream-Key"
    assert len(set(made.values())) == len(made) == 5
    assert all(re.fullmatch(r"[0-9a-f]{48}", secret) for secret in made.values())


def test_what_is_printed_is_written_nowhere_else(checkout: Path, run: Run) -> None:
    run("-m", "aistream.environment", "-")

    assert not (checkout / ".env").exists()


@pytest.mark.parametrize(
    ("args", "environ", "message"),
    [
        (
            [],
            {**PRODUCTION, "JWT_SECRET": "kept-private", "PORT": "x"},
            "aistream cannot start with this configuration:\n"
            f"  - JWT_SECRET has a value that cannot be used: expected {RANDOM}\n"
            "  - PORT is 'x': expected a whole number from 1 to 65535\n",
        ),
        (
            [],
            {"DEV_MODE": "true", "WEB_CONCURRENCY": "2"},
            "aistream cannot start with this configuration:\n"
            "  - WEB_CONCURRENCY is 2: expected 1, or REDIS_URL: workers cannot share the embedded store\n",
        ),
        (
            ["-w", "2", "-b", "127.0.0.1:0"],
            {"DEV_MODE": "true"},
            "aistream cannot start 2 workers without REDIS_URL: they cannot share the embedded store\n",
        ),
        (
            ["--certfile", "wsgi.py", "-b", "127.0.0.1:0"],
            {"DEV_MODE": "true"},
            "aistream cannot start with gunicorn's certfile: it speaks plain HTTP, and TLS ends at the proxy before it\n",
        ),
    ],
    ids=["bad values", "WEB_CONCURRENCY=2", "-w 2", "--certfile"],
)
def test_gunicorn_says_why_it_cannot_start(run: Run, args: list[str], environ: dict[str, str], message: str) -> None:
    process = run("-m", "gunicorn", *args, "wsgi:app", **environ)

    assert process.returncode == 1
    assert process.stderr.endswith(message)
    assert "Traceback" not in process.stdout + process.stderr
    assert "kept-private" not in process.stdout + process.stderr


def test_generate_token_says_what_is_missing(run: Run) -> None:
    process = run("generate_token.py")

    assert (process.returncode, process.stdout) == (1, "")
    assert process.stderr.startswith("aistream cannot start with this configuration:\n  - JWT_SECRET is not set")


def test_a_generated_token_is_one_that_the_service_accepts(run: Run) -> None:
    demands = {"JWT_AUDIENCE": "aistream", "JWT_ISSUER": "n8n", "JWT_ALGORITHM": "HS384", "JWT_SECRET": SECRET * 2}

    token = run("generate_token.py", "--sub", "me", "--ttl", "60", **(PRODUCTION | demands)).stdout.strip()

    assert Tokens(production(**demands), time.time).verify_caller(token) == Caller("me")
    assert jwt.decode(token, options={"verify_signature": False})["exp"] == pytest.approx(time.time() + 60, abs=30)


def test_a_token_that_the_service_would_not_accept_is_not_generated(run: Run) -> None:
    process = run("generate_token.py", "--ttl", "86401", DEV_MODE="true", JWT_SECRET=SECRET)

    assert (process.returncode, process.stdout) == (2, "")
    assert "the service accepts at most 86400 (JWT_MAX_LIFETIME_SECONDS)" in process.stderr


def test_a_generated_token_lives_no_longer_than_is_accepted(run: Run) -> None:
    environ = {"JWT_MAX_LIFETIME_SECONDS": "60", "DEV_MODE": "true", "JWT_SECRET": SECRET}

    token = run("generate_token.py", **environ).stdout.strip()

    assert Tokens(make_config(JWT_MAX_LIFETIME_SECONDS="60"), time.time).verify_caller(token) == Caller("n8n")


def test_a_generated_token_goes_to_standard_output_and_nowhere_else(run: Run, checkout: Path) -> None:
    process = run("generate_token.py", DEV_MODE="true", JWT_SECRET=SECRET)

    assert (process.stdout.count("."), process.stderr) == (2, "")
    token = process.stdout.strip().encode()
    assert [path for path in checkout.rglob("*") if path.is_file() and token in path.read_bytes()] == []


def test_a_generated_token_has_the_audience_and_issuer_asked_for(run: Run) -> None:
    token = run("generate_token.py", "--audience", "a", "--issuer", "b", DEV_MODE="true", JWT_SECRET=SECRET).stdout.strip()

    assert Tokens(make_config(JWT_AUDIENCE="a", JWT_ISSUER="b"), time.time).verify_caller(token) == Caller("n8n")


def test_the_printed_call_can_be_pasted_into_a_shell(service: Service, run: Run) -> None:
    if shutil.which("curl") is None:
        missing("curl")
    prompt = 'It\'s "quoted" $HOME `id` \\ é\n😀'
    environ = {"DEV_MODE": "true", "JWT_SECRET": SECRET, "PORT": str(service.port)}
    printed = run("generate_token.py", "--curl", "--prompt", prompt, "--model", "echo", **environ)

    pasted = subprocess.run(["sh", "-c", printed.stdout], capture_output=True, text=True, timeout=30, check=False)

    assert '"ok":true' in pasted.stdout, printed.stdout + pasted.stdout + pasted.stderr
