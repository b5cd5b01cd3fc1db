"""`aistream doctor`: what is wrong is found and told, one thing hides no other, and nothing secret is printed."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from aistream.cli.checks import Clock, Finding, Patient, clock, configuration, limits, reach
from aistream.cli.doctor import examine
from aistream.environment import look
from aistream.errors import DestinationRefused
from tests.conftest import missing
from tests.leaks import leaks, secrets_of
from tests.neighbours.http1 import Connection, Request, Server
from tests.neighbours.provider import ProviderServer
from tests.neighbours.redis import Locks, RedisServer, Sentinels, program, speaks_tls
from tests.service import ROOT, SECRET, Service

#: A service that others may use, as far as a test can have one.
PRODUCTION = {
    "BASE_URL": "https://ai.example.test",
    "JWT_SECRET": SECRET,
    "RESUME_URL_ALLOWED_ORIGINS": "http://127.0.0.1:9",
    "CALLBACK_SECRET": "whsec_" + "c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0",
    "ALLOWED_ORIGINS": "https://chat.example.test",
}


class Told:
    """What the doctor has said."""

    def __init__(self, code: int, out: str) -> None:
        self.code = code
        self.findings = [Finding(**json.loads(line)) for line in out.splitlines()]

    def of(self, check: str) -> list[Finding]:
        """The findings of this name."""
        return [finding for finding in self.findings if finding.check == check]

    def one(self, check: str) -> Finding:
        """The one finding of this name."""
        (finding,) = self.of(check)
        return finding

    @property
    def problems(self) -> set[str]:
        """Where there are any."""
        return {finding.check for finding in self.findings if finding.state == "problem"}


def run(*args: str, cwd: Path = ROOT, **environ: str) -> "subprocess.CompletedProcess[str]":
    """Runs `aistream doctor …`; nothing secret may be in what it prints."""
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "PYTHON_DOTENV_DISABLED": "true", **environ}
    command = [sys.executable, "-m", "aistream", "doctor", *args]
    done = subprocess.run(
        command,
        cwd=cwd,
        env={name: value for name, value in environ.items() if value},
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert leaks(done.stdout + done.stderr, secrets_of(environ)) == []
    assert "Traceback" not in done.stderr and "itself failed" not in done.stdout, done.stdout + done.stderr
    return done


def doctor(*args: str, **environ: str) -> Told:
    """What it says of these variables."""
    done = run("--json", *args, **{"DEV_MODE": "true", "JWT_SECRET": SECRET, **environ})
    assert done.stderr == ""
    return Told(done.returncode, done.stdout)


@contextmanager
def answering(status: int = 200, body: bytes = b"{}", **headers: str) -> Iterator[str]:
    """A server that answers so, whatever it is asked; its origin."""

    def answer(connection: Connection, request: Request) -> None:
        pairs = [(name.replace("_", "-"), value) for name, value in headers.items()]
        connection.reply(status, pairs, b"" if request.method == "HEAD" else body)

    with Server(answer) as server:
        yield f"http://127.0.0.1:{server.port}"


# ---- The whole ----


def test_a_healthy_service_is_told_so_and_nothing_is_changed(
    start_service: Callable[..., Service], provider: ProviderServer, tmp_path: Path
) -> None:
    if program() is None:
        missing("redis-server")
    with RedisServer(tmp_path / "redis") as redis:
        environ = {"REDIS_URL": redis.url, **provider.environ}
        service = start_service(**environ)
        before = _keys(redis), len(service.lines("request.finished"))

        told = doctor(PORT=str(service.port), **environ)

        after = _keys(redis)
    assert told.code == 0 and told.problems == set()
    assert {finding.state for finding in told.findings if finding.check.startswith(("redis", "provider", "BASE_URL"))} == {"ok"}
    for check in ("redis", "redis role", "redis memory", "redis persistence", "provider openai", "provider anthropic"):
        assert told.one(check).state == "ok"
    assert told.one("service").found.startswith("aistream ") and told.one("BASE_URL stream").state == "ok"
    assert told.one("clock").state == "ok" and "Redis" in told.one("clock").found
    assert before[0] == after and provider.requests() == []


def _keys(redis: RedisServer) -> set[bytes]:
    """Those that the service does not write by itself now and then."""
    with redis.client() as client:
        return {key for key in client.keys("*") if not key.endswith(b":tick")}


def test_people_get_a_list_with_what_mends_each_thing_and_programs_a_line_for_each(free_port: int) -> None:
    environ = {"DEV_MODE": "true", "JWT_SECRET": SECRET, "REDIS_URL": f"redis://127.0.0.1:{free_port}"}

    people, programs = run(**environ), run("--json", **environ)

    lines = [line.rstrip() for line in people.stdout.splitlines()]
    place = lines.index(next(line for line in lines if line.startswith("problem  redis")))
    assert f"127.0.0.1:{free_port} refuses connections" in lines[place] and "→ start Redis" in lines[place + 1]
    assert " 1 problem, " in lines[-1]
    keys = {tuple(json.loads(line)) for line in programs.stdout.splitlines()}
    assert keys == {("check", "state", "found", "mend")}
    assert people.returncode == programs.returncode == 1


def test_warnings_count_as_problems_under_strict() -> None:
    lenient, strict = doctor(), doctor("--strict")

    assert (lenient.code, strict.code) == (0, 1)
    assert "DEV_MODE is on" in lenient.of("configuration")[0].found


def test_a_half_broken_installation_is_told_in_every_part(free_port: int) -> None:
    with answering(401) as provider, answering(200) as n8n:
        broken = {
            **{"DEV_MODE": "", "JWT_SECRET": "short", "WEB_CONCURRENCY": "256", "PORT": "x"},
            "REDIS_URL": f"redis://:a-long-password@127.0.0.1:{free_port}",
            "OPENAI_API_KEY": "sk-of-the-tests",
            "OPENAI_BASE_URL": f"{provider}/v1",
            "RESUME_URL_ALLOWED_ORIGINS": f"{n8n},http://127.0.0.1:{free_port}",
        }
        told = doctor(**{**PRODUCTION, **broken})

    assert told.code == 1
    faults = [finding for finding in told.of("configuration") if finding.state == "problem"]
    assert [finding.found.split()[0] for finding in faults] == ["JWT_SECRET", "PORT"]
    assert told.problems == {"configuration", "redis", "provider openai", f"resume URL http://127.0.0.1:{free_port}"}
    assert told.one(f"resume URL {n8n}").state == "ok"
    assert told.one("limits cores").state == "warning"


def test_one_check_that_breaks_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(patient: Patient) -> Iterator[Finding]:
        yield Finding("redis", "ok", "so far")
        raise ValueError(f"a secret: {SECRET}")

    monkeypatch.setattr("aistream.cli.doctor.CHECKS", (("redis", breaks), ("clock", clock.check), ("limits", limits.check)))

    first, second, third, *others = examine(Patient(look({"DEV_MODE": "true", "JWT_SECRET": SECRET})))

    assert (first.found, second.state, third.check) == ("so far", "problem", "clock")
    assert "ValueError at test_doctor.py:" in second.found and SECRET not in second.found
    assert {finding.check for finding in others} >= {"limits descriptors", "limits cores"}


def test_one_check_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def hangs(patient: Patient) -> Iterator[Finding]:
        yield Finding("redis", "ok", "so far")
        time.sleep(60)

    monkeypatch.setattr("aistream.cli.doctor.CHECKS", (("redis", hangs), ("clock", clock.check)))
    monkeypatch.setattr("aistream.cli.doctor.PATIENCE", 0.1)

    findings = list(examine(Patient(look({"DEV_MODE": "true", "JWT_SECRET": SECRET}))))

    assert [finding.state for finding in findings] == ["ok", "problem", "skipped"]


# ---- Configuration ----


def test_every_fault_is_told_at_once_with_what_was_expected() -> None:
    told = doctor(DEV_MODE="", JWT_SECRET="change-me-change-me-change-me-change-me", LOG_LEVEL="loud")

    problems = {finding.found.split()[0]: finding for finding in told.of("configuration") if finding.state == "problem"}
    assert set(problems) == {"LOG_LEVEL", "JWT_SECRET", "BASE_URL", "RESUME_URL_ALLOWED_ORIGINS"}
    assert "is a placeholder" in problems["JWT_SECRET"].found
    assert problems["LOG_LEVEL"].mend == "expected one of debug, info, warning, error"


def test_what_is_allowed_and_rarely_meant_is_a_warning() -> None:
    environ = {**PRODUCTION, "BASE_URL": "http://localhost:8000", "CALLBACK_SECRET": "", "ALLOWED_ORIGINS": ""}

    told = doctor(**{**environ, "DEV_MODE": ""})

    warnings = " ".join(finding.found for finding in told.of("configuration") if finding.state == "warning")
    for word in ("only browsers on this machine", "ALLOWED_ORIGINS is empty", "neither signed", "embedded store"):
        assert word in warnings
    assert told.one("default model").state == "problem" and "OPENAI_API_KEY" in told.one("default model").mend


def test_a_misspelt_setting_and_an_open_file_are_found(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(
        f"DEV_MODE=true\nJWT_SECRET={SECRET}\nREDIS_ULR=redis://r\nN8N_PORT=1\nCOMPOSE_FILE=x\nMINE=1\n"
    )
    (tmp_path / ".env").chmod(0o644)

    findings = list(configuration.check(Patient(look({}, tmp_path))))

    told = {finding.found: finding.mend for finding in findings if finding.state == "warning"}
    assert told["REDIS_ULR in .env is no setting"] == "was REDIS_URL meant?"
    assert f"chmod 600 {tmp_path / '.env'}" in told.values() and len(told) == 3


def test_looking_makes_no_secret(tmp_path: Path) -> None:
    found = look({"DEV_MODE": "true"}, tmp_path)

    assert (found.faults, list(tmp_path.iterdir())) == ([], [])


# ---- Redis ----


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis that a test may spoil."""
    if program() is None:
        missing("redis-server")
    with RedisServer(tmp_path / "redis") as server:
        yield server


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis with a password."""
    if program() is None:
        missing("redis-server")
    with RedisServer(tmp_path / "locked", locks=Locks()) as server:
        yield server


def test_a_wrong_and_a_missing_password_are_told_apart(locked: RedisServer) -> None:
    wrong = doctor(REDIS_URL=f"redis://:not-this-password@127.0.0.1:{locked.port}").one("redis")
    none = doctor(REDIS_URL=f"redis://127.0.0.1:{locked.port}").one("redis")

    assert (wrong.state, none.state) == ("problem", "problem")
    assert "does not accept the user or password" in wrong.found and "wants a password" in none.found
    assert doctor(REDIS_URL=locked.url).one("redis").state == "ok"


def test_a_redis_that_would_drop_sessions_or_forget_them_is_a_warning(redis: RedisServer) -> None:
    with redis.client() as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
        client.config_set("appendonly", "no")

    told = doctor(REDIS_URL=redis.url)

    assert told.code == 0
    assert (told.one("redis memory").state, told.one("redis persistence").state) == ("warning", "warning")
    assert "maxmemory-policy is allkeys-lru" in told.one("redis memory").found
    assert "noeviction" in told.one("redis memory").mend and "appendonly" in told.one("redis persistence").mend


def test_a_full_redis_is_a_problem(redis: RedisServer) -> None:
    with redis.client() as client:
        client.set("much", "x" * 2_000_000, ex=60)
        client.config_set("maxmemory", "1mb")

    told = doctor(REDIS_URL=redis.url)

    assert told.one("redis writes").state == "problem" and "maxmemory" in told.one("redis writes").mend


def test_a_replica_is_no_store(redis: RedisServer, tmp_path: Path) -> None:
    with RedisServer(tmp_path / "replica") as replica:
        replica.follow(redis)

        told, master = doctor(REDIS_URL=replica.url), doctor(REDIS_URL=redis.url)

    assert told.one("redis role").state == "problem" and "replica" in told.one("redis role").found
    assert master.one("redis role").found == "a master with 1 replica takes writes and runs scripts"


def test_a_user_without_the_rights_is_told_what_it_may_not(redis: RedisServer) -> None:
    with redis.client() as client:
        client.execute_command("ACL", "SETUSER", "few", "on", ">of-few-rights", "~aistream:{0}:*", "+ping", "+time", "+evalsha")

    told = doctor(REDIS_URL=f"redis://few:of-few-rights@127.0.0.1:{redis.port}")

    assert told.one("redis writes").state == "problem" and "docs/operations.md" in told.one("redis writes").mend
    assert told.one("redis memory").state == "skipped"


def test_tls_that_is_not_trusted_is_told_with_the_setting_that_mends_it(tmp_path: Path) -> None:
    if not speaks_tls():
        missing("a redis-server with TLS")
    locks = Locks.make(tmp_path / "locks", "127.0.0.1")
    other = Locks.make(tmp_path / "other", "127.0.0.1")
    with RedisServer(tmp_path / "redis", locks=locks) as redis:
        strange = doctor(REDIS_URL=redis.url, **{**locks.environ, "REDIS_CA_FILE": other.environ["REDIS_CA_FILE"]})
        plain = doctor(REDIS_URL=redis.url.replace("rediss", "redis"))
        trusted = doctor(REDIS_URL=redis.url, **locks.environ)

    assert strange.one("redis").state == "problem" and "REDIS_CA_FILE" in strange.one("redis").mend
    assert plain.one("redis").state == "problem" and "rediss://" in plain.one("redis").mend
    assert trusted.one("redis").state == "ok" and "TLS" in trusted.one("redis").found


def test_sentinels_are_asked_one_by_one(tmp_path: Path) -> None:
    if program() is None:
        missing("redis-server")
    with RedisServer(tmp_path / "master") as master, RedisServer(tmp_path / "replica") as replica:
        replica.follow(master)
        with Sentinels(tmp_path / "sentinels", master) as sentinels:
            all_of_them = doctor(**sentinels.environ)
            sentinels.kill(0)
            two = doctor(**sentinels.environ)

    assert all_of_them.one("redis sentinels").found == f"3 of 3 call 127.0.0.1:{master.port} the master of aistream"
    assert two.one("redis sentinels").state == "warning" and two.one("redis sentinels").found.startswith("2 of 3 tell the master")
    assert two.one("redis").state == "ok"


def test_a_redis_url_that_cannot_be_used_is_not_asked() -> None:
    told = doctor(REDIS_URL="http://127.0.0.1:1")

    assert told.one("redis").state == "skipped"
    assert "configuration" in told.problems


# ---- Providers ----


@pytest.mark.parametrize(
    ("status", "state", "word"),
    [
        (401, "problem", "OPENAI_API_KEY"),
        (403, "problem", "OPENAI_API_KEY"),
        (404, "warning", "OPENAI_BASE_URL"),
        (429, "warning", "quota"),
        (500, "problem", "status page"),
        (301, "problem", "OPENAI_BASE_URL"),
    ],
)
def test_what_a_provider_answers_is_judged(status: int, state: str, word: str) -> None:
    with answering(status) as origin:
        told = doctor(OPENAI_API_KEY="sk-of-the-tests-1234", OPENAI_BASE_URL=f"{origin}/v1")

    finding = told.one("provider openai")
    assert (finding.state, str(status) in finding.found) == (state, True)
    assert word in finding.mend


def test_each_alias_of_the_file_is_asked_with_its_own_key(provider: ProviderServer, tmp_path: Path, free_port: int) -> None:
    file = tmp_path / "models.toml"
    file.write_text(
        f'[good]\nbase_url = "{provider.openai_url}"\nkey_variable = "GOOD_KEY"\n'
        f'[claude]\napi = "anthropic"\nbase_url = "{provider.environ["ANTHROPIC_BASE_URL"]}"\nkey_variable = "GOOD_KEY"\n'
        f'[keyless]\nbase_url = "{provider.openai_url}"\nkey_variable = "NO_KEY"\n'
        f'[down]\nbase_url = "http://127.0.0.1:{free_port}/v1"\n'
        '[nowhere]\nbase_url = "http://no-such-host.invalid/v1"\n'
    )

    told = doctor(MODELS_FILE=str(file), GOOD_KEY="k-of-the-tests")

    states = {name: told.one(f"provider {name}") for name in ("good", "claude", "keyless", "down", "nowhere")}
    assert [finding.state for finding in states.values()] == ["ok", "ok", "warning", "problem", "problem"]
    assert states["keyless"].mend == "set NO_KEY" and "refuses connections" in states["down"].found
    assert states["nowhere"].found == "the name no-such-host.invalid has no address"
    assert provider.requests() == []  # no model was asked


def test_a_provider_whose_certificate_is_not_trusted_is_told_apart(tmp_path: Path) -> None:
    with ProviderServer(tls=tmp_path) as provider:
        environ = provider.openai_environ
        strange = doctor(**{**environ, "SSL_CERT_FILE": ""})
        trusted = doctor(**{**environ, "SSL_CERT_FILE": str(tmp_path / "ca.pem")})

    assert strange.one("provider openai").state == "problem"
    assert "certificate" in strange.one("provider openai").found and "SSL_CERT_FILE" in strange.one("provider openai").mend
    assert trusted.one("provider openai").state == "ok"


def test_a_provider_that_hangs_is_waited_for_a_bounded_time(provider: ProviderServer) -> None:
    provider.answer_models(0)

    told = doctor(**provider.openai_environ)

    assert "does not answer within 5 s" in told.one("provider openai").found


def test_a_default_model_that_nobody_has_is_a_warning(provider: ProviderServer) -> None:
    told = doctor(DEFAULT_MODEL="llama-3", **provider.openai_environ)

    assert told.one("default model").state == "warning" and "DEFAULT_MODEL" in told.one("default model").mend


# ---- Resume URLs ----


def test_a_resume_url_is_judged_as_init_would_and_is_not_called() -> None:
    asked: list[Request] = []

    def answer(connection: Connection, request: Request) -> None:
        asked.append(request)
        connection.reply(200, [], b"")

    with Server(answer) as server:
        origin = f"http://127.0.0.1:{server.port}"
        environ = {"RESUME_URL_ALLOWED_ORIGINS": origin, "RESUME_URL_REWRITE": f"http://localhost:5678={origin}"}
        url = "http://localhost:5678/webhook-waiting/231?signature=0123456789abcdef"
        rewritten = doctor("--resume-url", url, **environ).one("--resume-url")
        plain = doctor("--resume-url", f"{origin}/webhook-waiting/231", **environ).one("--resume-url")
        refused = doctor("--resume-url", "http://other:5678/x", **environ).one("--resume-url")
        broken = doctor("--resume-url", "n8n", **environ).one("--resume-url")

    listed = "is among RESUME_URL_ALLOWED_ORIGINS"
    assert rewritten.found == f"init would take it: RESUME_URL_REWRITE makes {origin} of http://localhost:5678, which {listed}"
    assert plain.found == f"init would take it: its origin {origin} {listed}"
    assert (refused.state, broken.state) == ("problem", "problem")
    assert "not among RESUME_URL_ALLOWED_ORIGINS" in refused.found and "is not an http URL" in broken.found
    assert {(request.method, request.target) for request in asked} == {("HEAD", "/")}


def test_an_origin_that_callbacks_cannot_go_to_is_told(free_port: int) -> None:
    told = doctor(
        RESUME_URL_ALLOWED_ORIGINS=f"http://169.254.169.254,http://127.0.0.1:{free_port},http://no-such-host.invalid:5678",
        RESUME_URL_REWRITE="http://localhost:5678=http://n8n:5678",
    )

    assert "no callback may go to" in told.one("resume URL http://169.254.169.254").found
    assert "RESUME_URL_REWRITE" in told.one(f"resume URL http://127.0.0.1:{free_port}").mend
    assert "has no address" in told.one("resume URL http://no-such-host.invalid:5678").found
    assert "add http://n8n:5678 to RESUME_URL_ALLOWED_ORIGINS" in told.one("resume URL").mend


def test_a_certificate_that_callbacks_would_not_trust_is_told(tmp_path: Path) -> None:
    with ProviderServer(tls=tmp_path) as tls:
        origin = tls.openai_url.removesuffix("/v1")
        told = doctor(RESUME_URL_ALLOWED_ORIGINS=origin, SSL_CERT_FILE=str(tmp_path / "ca.pem"))

    assert told.one(f"resume URL {origin}").state == "problem" and "certificate" in told.one(f"resume URL {origin}").found


# ---- The public side ----


def aistream_at(**spoilt: str) -> Callable[[Connection, Request], None]:
    """Answers as aistream does, with these headers of a stream's head in place of its own; none for `""`."""

    def answer(connection: Connection, request: Request) -> None:
        if request.target.startswith("/health"):
            connection.reply(200, [("Content-Type", "application/json")], b'{"ok":true,"status":"alive","version":"0.1.0"}')
            return
        headers = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-store, no-transform"}
        headers |= {name.replace("_", "-"): value for name, value in spoilt.items()}
        status = int(headers.pop("Status", "200"))
        connection.reply(status, [(name, value) for name, value in headers.items() if value], b"")

    return answer


@pytest.mark.parametrize(
    ("spoilt", "state", "word"),
    [
        ({}, "ok", "unspoilt"),
        ({"Content_Encoding": "gzip"}, "problem", "compresses"),
        ({"Cache_Control": "public"}, "warning", "no-transform"),
        ({"Status": "401"}, "problem", "does not accept"),
        ({"Content_Type": "text/html"}, "problem", "not as one"),
    ],
    ids=["as it is", "gzip", "transforms", "another secret", "no stream"],
)
def test_what_a_proxy_does_to_a_stream_is_seen_in_its_head(spoilt: dict[str, str], state: str, word: str) -> None:
    with Server(aistream_at(**spoilt)) as server:
        told = doctor(BASE_URL=f"http://127.0.0.1:{server.port}")

    finding = told.one("BASE_URL stream")
    assert finding.state == state and word in finding.found


def test_a_base_url_that_leads_elsewhere_is_told(service: Service, free_port: int) -> None:
    with answering(200, b"<h1>It works!</h1>") as elsewhere, answering(308, Location="https://x/") as redirects:
        wrong = doctor(PORT=str(service.port), BASE_URL=elsewhere)
        moved = doctor(PORT=str(service.port), BASE_URL=redirects)
        away = doctor(PORT=str(service.port), BASE_URL=f"http://127.0.0.1:{free_port}")
        early = doctor(PORT="9", BASE_URL=f"http://127.0.0.1:{free_port}")

    assert "is not aistream (200)" in wrong.one("BASE_URL").found and wrong.code == 1
    assert "redirects (308)" in moved.one("BASE_URL").found
    assert (away.one("BASE_URL").state, early.one("BASE_URL").state) == ("problem", "warning")  # not started yet
    assert early.one("service").state == "skipped"


def test_a_service_with_another_secret_is_found(service: Service) -> None:
    told = doctor(PORT=str(service.port), JWT_SECRET="another-secret-of-the-tests-with-enough-bytes")

    assert "give both the same JWT_SECRET" in told.one("BASE_URL stream").mend


def test_what_listens_on_the_port_and_is_not_ours_is_told() -> None:
    with answering(200, b"<h1>It works!</h1>") as other:
        told = doctor(PORT=other.rpartition(":")[2])

    assert told.one("service").state == "problem" and "another PORT" in told.one("service").mend


# ---- Clocks ----


@pytest.mark.parametrize(("off", "state"), [(0, "ok"), (10, "warning"), (-3600, "problem"), (3600, "problem")])
def test_a_clock_that_differs_is_seen_by_the_date_of_an_answer(off: int, state: str) -> None:
    with answering(200, Date=formatdate(time.time() + off, usegmt=True)) as n8n:
        told = doctor(RESUME_URL_ALLOWED_ORIGINS=n8n)

    finding = told.one("clock")
    assert finding.state == state and n8n in finding.found
    assert told.code == (1 if state == "problem" else 0)


def test_a_date_is_exact_to_a_second_and_what_is_none_is_no_clock() -> None:
    now = 1_800_000_000.7

    assert reach.ahead(formatdate(now, usegmt=True), now - 0.1, now + 0.1) == 0
    assert reach.ahead(formatdate(now + 60, usegmt=True), now, now) == pytest.approx(60, abs=1)
    assert [reach.ahead(text, now, now) for text in ("", "yesterday", "0")] == [None, None, None]


def test_every_clock_that_differs_is_named() -> None:
    patient = Patient(look({"DEV_MODE": "true", "JWT_SECRET": SECRET}))
    patient.clocks += [Clock("Redis", 0.1), Clock("n8n", -45.0), Clock("provider", 7.0)]

    findings = list(clock.check(patient))

    assert [(finding.state, finding.found.split("'")[0]) for finding in findings] == [("problem", "n8n"), ("warning", "provider")]
    assert "45 s behind" in findings[0].found and "NTP" in findings[0].mend


# ---- Limits, and how others are reached ----


def test_what_the_kernel_gives_is_held_against_the_configuration() -> None:
    command = [sys.executable, "-m", "aistream", "doctor", "--json"]
    environ = {
        "PATH": os.environ["PATH"],
        "PYTHON_DOTENV_DISABLED": "true",
        "PORT": "9",
        **PRODUCTION,
        "OPENAI_API_KEY": "sk-of-tests",
    }
    environ |= {"OPENAI_BASE_URL": "http://127.0.0.1:9/v1", "BASE_URL": "http://127.0.0.1:9"}

    limited = ["sh", "-c", 'ulimit -n 256 && exec "$0" "$@"', *command]
    done = subprocess.run(limited, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60)

    told = Told(done.returncode, done.stdout)
    assert told.one("limits descriptors").state == "warning"
    assert "256 file descriptors carry 64 streams" in told.one("limits descriptors").found
    assert "LimitNOFILE=" in told.one("limits descriptors").mend


def test_memory_is_the_machines_or_what_the_container_leaves(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 8000000 kB\nMemAvailable: 4000000 kB\n")
    (tmp_path / "memory.max").write_text("100000000\n")
    (tmp_path / "memory.current").write_text("40000000\n")

    assert limits._available(tmp_path / "meminfo", tmp_path) == 60_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert limits._available(tmp_path / "meminfo", tmp_path) == 4_096_000_000
    assert limits._available(tmp_path / "none", tmp_path) is None


def test_each_step_that_fails_is_told_by_itself(monkeypatch: pytest.MonkeyPatch, free_port: int) -> None:
    monkeypatch.setattr(reach, "TIMEOUT", 0.2)
    said: dict[str, str] = {}

    def note(name: str, url: str, **options: Any) -> None:
        with pytest.raises((reach.Unreachable, DestinationRefused)) as raised:
            reach.ask(url, **options)
        said[name] = str(raised.value)

    def forbidden(address: str) -> None:
        raise DestinationRefused(f"leads to {address}")

    with (
        Server(lambda connection, _: connection.pause(3)) as silent,
        Server(lambda connection, _: connection.send(b"SSH-2.0\r\n")) as other,
    ):
        note("name", "http://no-such-host.invalid/")
        note("closed", f"http://127.0.0.1:{free_port}/")
        note("silent", f"http://127.0.0.1:{silent.port}/")
        note("no TLS", f"https://127.0.0.1:{other.port}/")
        note("no HTTP", f"http://127.0.0.1:{other.port}/")
        note("forbidden", f"http://127.0.0.1:{other.port}/", allowed=forbidden)

    assert said == {
        "name": "the name no-such-host.invalid has no address",
        "closed": f"127.0.0.1:{free_port} refuses connections",
        "silent": f"127.0.0.1:{silent.port} does not answer within 0.2 s",
        "no TLS": said["no TLS"],
        "no HTTP": f"what answers at 127.0.0.1:{other.port} does not speak HTTP",
        "forbidden": "leads to 127.0.0.1",
    }
    assert "does not speak TLS" in said["no TLS"]


def test_a_finding_says_what_mends_it_where_something_is_wrong() -> None:
    told = doctor(DEV_MODE="", JWT_SECRET="", REDIS_URL="redis://127.0.0.1:9", RESUME_URL_ALLOWED_ORIGINS="http://127.0.0.1:9")

    wrong = [finding for finding in told.findings if finding.state in ("problem", "warning")]
    assert len(wrong) > 4 and [finding for finding in wrong if not finding.mend] == []
    assert [finding for finding in told.findings if "\n" in finding.found + finding.mend] == []
