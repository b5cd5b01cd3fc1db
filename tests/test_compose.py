"""What is deployed: the images, the compose file and its containers, as far as that can be seen without a container engine.

Linters read every file. The command of each container is run as a process in what its container would give it (tests/compose.py).
n8n's containers are in tests/n8n, with a real n8n.
"""

import ast
import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from aistream import __version__, kernel_limits
from aistream.config import DRAIN_MARGIN, Config, settings
from aistream.installation import VARIABLES
from tests import compose
from tests.compose import Container
from tests.conftest import missing
from tests.neighbours import postgres as pg
from tests.neighbours import redis as own_redis
from tests.neighbours.provider import ProviderServer
from tests.neighbours.receiver import Receiver
from tests.service import ROOT, Event, text_of, watch

ENV = compose.sample_env()
PROJECT = compose.read(ENV)
SERVICES: dict[str, dict[str, Any]] = PROJECT["services"]
DOCKERFILES = [ROOT / "Dockerfile", ROOT / "deploy" / "n8n" / "Dockerfile"]
#: The service's own.
OURS = ["aistream", "aistream-replica"]
IGNORED = {".venv", ".n8n", "node_modules", ".git", ".hypothesis", "dist"}


def files(*patterns: str) -> list[Path]:
    """The project's files of this kind."""
    found = {path for pattern in patterns for path in ROOT.rglob(pattern) if path.is_file()}
    return sorted(path for path in found if not IGNORED & set(path.relative_to(ROOT).parts))


def scripts() -> list[Path]:
    """The project's shell scripts, by their first line."""
    first = {
        path: path.read_bytes()[:40].split(b"\n")[0]
        for folder in ("scripts", "deploy", ".ci")
        for path in files(f"{folder}/**/*")
    }
    return [path for path, line in first.items() if re.fullmatch(rb"#!.*\b(ba)?sh", line)]


def lint(*command: str | Path) -> None:
    """Runs a linter; AssertionError with what it says."""
    found = shutil.which(str(command[0]), path=f"{sys.prefix}/bin:{os.environ['PATH']}")
    if found is None:
        missing(str(command[0]))
    done = subprocess.run([found, *map(str, command[1:])], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


# ---- Linters ----


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_dockerfile_passes_hadolint(path: Path) -> None:
    lint("hadolint", "--failure-threshold", "style", path)


def test_every_yaml_of_the_project_passes_yamllint() -> None:
    lint("yamllint", "--strict", *files("*.yml", "*.yaml", ".yamllint"))


def test_every_shell_script_passes_shellcheck() -> None:
    assert {path.name for path in scripts()} >= {"run", "ensure-n8n", "setup", "n8n.sh", "backup", "restore"}

    lint("shellcheck", *scripts())


def test_the_compose_file_is_one_by_composes_own_schema(tmp_path: Path) -> None:
    """dclint checks it against the schema of the Compose Specification, and then by its rules."""
    linter = Path(sys.prefix) / "npm" / "node_modules" / "dclint" / "bin" / "dclint.cjs"
    if not linter.exists():
        missing("dclint of tests/tools")
    filled = tmp_path / "docker-compose.yml"
    filled.write_text(yaml.safe_dump(PROJECT))

    # It may be built here, and it has a name.
    lint("node", linter, "--quiet", "--disable-rule", "no-build-and-image", "--max-warnings=-1", filled)


# ---- The compose file ----


def test_every_variable_of_the_compose_file_is_explained_and_every_explained_one_is_used() -> None:
    explained = {variable.name for variable in VARIABLES}

    assert compose.variables() - explained - set(settings()) == set()
    assert explained - compose.variables() == set()
    assert explained & set(settings()) == set()


def test_the_defaults_of_the_compose_file_are_those_of_the_manual() -> None:
    text = compose.FILE.read_text()

    for variable in VARIABLES:
        used = set(re.findall(rf"\$\{{{variable.name}(:[-?][^}}]*)\}}", text))
        assert used == ({f":-{variable.default}"} if variable.default else {":?is missing in .env, see .env.example"}), (
            variable.name
        )


def test_what_make_env_writes_is_all_that_the_compose_file_demands() -> None:
    assert compose.read(ENV) == PROJECT
    for variable in VARIABLES:
        if not variable.default:
            with pytest.raises(compose.Missing, match=variable.name):
                compose.read({**ENV, variable.name: ""})


@pytest.mark.parametrize("name", SERVICES)
def test_every_container_is_pinned_watched_restarted_and_held_short(name: str) -> None:
    service = SERVICES[name]

    assert re.fullmatch(r"[a-z0-9/-]+:v?\d+\.\d+(\.\d+)?(-[a-z]+)?", service["image"])
    assert (service["cap_drop"], service["security_opt"]) == (["ALL"], ["no-new-privileges:true"])
    assert service["logging"]["options"].keys() == {"max-size", "max-file"}
    assert not {"privileged", "network_mode", "pid", "ipc", "container_name"} & service.keys()
    if name == "n8n-setup":  # runs to its end
        assert service["restart"] == "no"
        assert SERVICES["n8n"]["depends_on"][name] == {"condition": "service_completed_successfully"}
        return
    assert service["restart"] == "unless-stopped"
    assert name in OURS or {"test", "interval", "timeout", "retries", "start_period"} == service["healthcheck"].keys()
    assert service["pids_limit"] > 0


def test_a_container_is_waited_for_until_it_is_healthy() -> None:
    waits = {name: service.get("depends_on", {}) for name, service in SERVICES.items()}

    assert {other for needed in waits.values() for other in needed} <= SERVICES.keys()
    assert {
        condition["condition"] for needed in waits.values() for other, condition in needed.items() if other != "n8n-setup"
    } == {"service_healthy"}
    assert all("redis" in waits[name] for name in OURS) and {"postgres", "n8n-setup"} == waits["n8n"].keys()


def test_only_what_must_be_is_published_and_on_this_host_alone() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}

    assert published == {
        "aistream": ["127.0.0.1:8000:8000"],
        "n8n": ["127.0.0.1:5678:5678"],
        "haproxy": ["127.0.0.1:8080:80"],
        "nginx": ["0.0.0.0:443:443", "0.0.0.0:80:80"],
        "prometheus": ["127.0.0.1:9090:9090"],
        "grafana": ["127.0.0.1:3001:3000"],
    }
    assert [name for name, service in SERVICES.items() if "expose" in service] == []


def test_what_need_not_reach_the_world_is_in_networks_that_do_not_lead_there() -> None:
    inner = {name for name, network in PROJECT["networks"].items() if network.get("internal")}

    assert inner == {"store", "data", "metrics"}
    assert {name for name, service in SERVICES.items() if "store" in service["networks"]} == {"redis", *OURS}
    assert {name for name, service in SERVICES.items() if "data" in service["networks"]} == {"postgres", "n8n", "n8n-setup"}
    assert [name for name, service in SERVICES.items() if set(service["networks"]) <= inner] == ["redis", "postgres", "n8n-setup"]


def test_n8n_and_the_balancer_find_every_instance_under_one_name() -> None:
    networks = SERVICES["aistream-replica"]["networks"]

    assert [networks[name]["aliases"] for name in ("edge", "metrics")] == [["aistream"], ["aistream"]]
    assert SERVICES["aistream-replica"]["deploy"] == {"replicas": "2"} and "ports" not in SERVICES["aistream-replica"]
    assert {name: service["profiles"] for name, service in SERVICES.items() if "profiles" in service} == {
        "aistream-replica": ["scale"],
        "haproxy": ["scale"],
        "nginx": ["tls"],
        "prometheus": ["observability"],
        "grafana": ["observability"],
    }


def test_every_file_that_is_mounted_exists_and_is_read_only() -> None:
    mounted = [volume for service in SERVICES.values() for volume in service.get("volumes", []) if volume.startswith(".")]

    assert len(mounted) > 5 and all(volume.endswith(":ro") for volume in mounted)
    assert [path for path in (volume.split(":")[0] for volume in mounted) if not (ROOT / path).exists()] == []


def test_every_named_volume_is_declared_and_used() -> None:
    used = [volume.split(":")[0] for service in SERVICES.values() for volume in service.get("volumes", [])]

    assert {name for name in used if not name.startswith(".")} == PROJECT["volumes"].keys()


@pytest.mark.parametrize("name", OURS)
def test_nobodys_secret_but_its_own_is_in_the_services_containers(name: str) -> None:
    environ = compose.environment(SERVICES[name], ENV)
    own = {ENV["REDIS_PASSWORD"]}

    foreign = {ENV[variable.name] for variable in VARIABLES if not variable.default} - own
    assert len(foreign) == 4 and foreign & set(environ.values()) == set()
    assert [name for name, value in environ.items() if ENV["REDIS_PASSWORD"] in value] == ["REDIS_URL"]


def test_the_containers_of_others_get_no_secret_of_the_service() -> None:
    secret = {ENV[name] for name, setting in settings().items() if setting.secret and ENV.get(name)}
    told = {
        name: secret & set(compose.environment(service, ENV).values()) for name, service in SERVICES.items() if name not in OURS
    }

    assert {name for name, found in told.items() if found} == {"n8n-setup"}  # which makes n8n's credentials of them
    assert told["n8n-setup"] == {ENV["JWT_SECRET"], ENV["CALLBACK_HEADERS"]}


@pytest.mark.parametrize("name", OURS)
def test_the_services_containers_have_a_configuration_that_it_takes(name: str) -> None:
    config = Config.from_env(compose.environment(SERVICES[name], ENV))

    assert (config.host, config.port, config.dev_mode) == ("0.0.0.0", 8000, False)
    assert config.redis_url == f"redis://:{ENV['REDIS_PASSWORD']}@redis:6381/0"
    assert config.resume_url_rewrite == (("http://localhost:5678", "http://n8n:5678"),)
    assert "http://n8n:5678" in config.resume_url_allowed_origins
    assert config.stop_grace_seconds == compose.seconds(SERVICES[name]["stop_grace_period"])


def test_n8n_and_the_service_agree_on_n8ns_address() -> None:
    services = compose.read({**ENV, "N8N_URL": "https://n8n.test", "RESUME_URL_ALLOWED_ORIGINS": ""})["services"]
    config = Config.from_env(compose.environment(services["aistream"], {**ENV, "RESUME_URL_ALLOWED_ORIGINS": ""}))

    assert services["n8n"]["environment"]["WEBHOOK_URL"] == "https://n8n.test/"
    assert config.resume_url_rewrite == (("https://n8n.test", "http://n8n:5678"),)
    assert config.resume_url_allowed_origins == ("http://n8n:5678",)


@pytest.mark.parametrize("name", [*OURS, "haproxy", "nginx"])
def test_nothing_is_killed_that_is_still_draining(name: str) -> None:
    drain = Config.from_env(compose.environment(SERVICES["aistream"], ENV)).drain_seconds

    assert compose.seconds(SERVICES[name]["stop_grace_period"]) >= drain + DRAIN_MARGIN


def test_descriptors_do_for_all_places_of_both_providers() -> None:
    keys = {"OPENAI_API_KEY": "a", "ANTHROPIC_API_KEY": "b"}
    wanted = kernel_limits.demand(Config.from_env({**compose.environment(SERVICES["aistream"], ENV), **keys})).wanted

    for name in (*OURS, "haproxy", "nginx"):
        limit = SERVICES[name]["ulimits"]["nofile"]
        assert limit["soft"] == limit["hard"] >= wanted


def test_the_tag_of_the_image_is_the_version() -> None:
    assert {SERVICES[name]["image"] for name in OURS} == {f"aistream:{__version__}"}
    assert {SERVICES[name]["build"]["args"]["VERSION"] for name in OURS} == {__version__}
    assert f"ARG VERSION={__version__}\n" in DOCKERFILES[0].read_text()


# ---- The images ----


def instructions(path: Path) -> list[tuple[str, str]]:
    """The lines of a Dockerfile: (instruction, the rest)."""
    text = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", path.read_text(), flags=re.MULTILINE))
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in text.splitlines() if line.strip())]


def last(name: str) -> list[str]:
    """The exec form that the service's image ends with."""
    rest = next(rest for instruction, rest in reversed(instructions(DOCKERFILES[0])) if instruction == name)
    return list(ast.literal_eval(rest.partition("CMD ")[2] or rest))


def environment_of_the_image() -> dict[str, str]:
    """What the service's image sets."""
    (rest,) = [rest for name, rest in instructions(DOCKERFILES[0]) if name == "ENV"]
    return dict(part.split("=", 1) for part in rest.split())


def test_the_image_holds_what_the_service_runs_on_and_no_more() -> None:
    copied = [rest.split()[:-1] for name, rest in instructions(DOCKERFILES[0]) if name == "COPY" and "--from" not in rest]
    let_in = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]

    assert sorted(name for names in copied for name in names) == sorted(let_in)
    assert set(let_in) == {"aistream", "wsgi.py", "gunicorn.conf.py", "generate_token.py", "requirements.txt"}


def test_the_image_of_n8n_is_given_what_it_copies_and_no_more() -> None:
    copied = [rest.split()[:-1] for name, rest in instructions(DOCKERFILES[1]) if name == "COPY" and "--from" not in rest]
    let_in = [line[1:] for line in Path(f"{DOCKERFILES[1]}.dockerignore").read_text().splitlines() if line.startswith("!")]

    assert sorted(name for names in copied for name in names) == sorted(let_in)
    assert all((ROOT / name).exists() for name in let_in)


def test_the_image_runs_as_nobody_and_stops_by_sigterm() -> None:
    said = dict(instructions(DOCKERFILES[0]))

    assert re.fullmatch(r"[1-9]\d{3,}:[1-9]\d{3,}", said["USER"])
    assert (said["STOPSIGNAL"], said["EXPOSE"]) == ("SIGTERM", "8000")
    assert SERVICES["aistream"]["read_only"] is True and not {"user", "command", "healthcheck"} & SERVICES["aistream"].keys()
    assert "--require-hashes" in DOCKERFILES[0].read_text()


def test_the_image_has_the_python_that_the_lock_file_and_the_tests_are_for() -> None:
    (oldest,) = re.findall(r'^requires-python = ">=(3\.\d+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)

    assert re.findall(r"^ARG PYTHON=python:(3\.\d+)\.\d+-slim-bookworm$", DOCKERFILES[0].read_text(), re.MULTILINE) == [oldest]


# ---- The containers as processes ----


@pytest.fixture
def redis_container(tmp_path: Path, free_port: int) -> Iterator[tuple[Container, list[str]]]:
    """Redis by the command of its container, and its health check, both on another port."""
    if not compose.can_contain() or own_redis.program() is None or shutil.which("redis-cli") is None:
        missing("bubblewrap, redis-server and redis-cli")
    service = SERVICES["redis"]
    command = [part.replace("6381", str(free_port)) for part in service["command"]]
    check = service["healthcheck"]["test"]
    assert check[0] == "CMD-SHELL"
    folder = tmp_path / "redis"
    folder.mkdir()
    with Container(
        [own_redis.program() or "", *command[1:], "--bind", "127.0.0.1"],
        compose.environment(service, ENV),
        uid=int(service["user"].partition(":")[0]),
        folder=folder,
        volumes={"/data": folder / "data"},
        workdir="/data",
    ) as container:
        healthy = ["sh", "-c", check[1].replace("6381", str(free_port))]
        container.wait_until(lambda: container.run(healthy).returncode == 0)
        yield container, healthy


def cli(container: Container, port: str, *command: str) -> str:
    """What redis-cli says, in Redis's container."""
    return container.run(["redis-cli", "-p", port, *command]).stdout.strip()


def test_redis_wants_its_password_and_keeps_what_it_has(
    redis_container: tuple[Container, list[str]], free_port: int, tmp_path: Path
) -> None:
    container, healthy = redis_container
    port = str(free_port)
    stranger = ["env", "-u", "REDISCLI_AUTH", *healthy]

    said = cli(container, port, "PING"), container.run(["env", "-u", "REDISCLI_AUTH", "redis-cli", "-p", port, "PING"]).stdout

    assert said[0] == "PONG" and said[1].startswith("NOAUTH")
    assert container.run(stranger).returncode != 0
    settings_of = {
        name: cli(container, port, "CONFIG", "GET", name).split("\n")[-1]
        for name in ("maxmemory-policy", "appendonly", "maxmemory")
    }
    assert settings_of == {"maxmemory-policy": "noeviction", "appendonly": "yes", "maxmemory": str(2**30)}
    assert container.stop(signal.SIGTERM) == 0
    assert {path.name for path in (tmp_path / "redis" / "data").iterdir()} == {"appendonlydir"}


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """/app as the Dockerfile makes it, bytecode and all; the packages are those of this environment."""
    app = tmp_path / "app"
    shutil.copytree(ROOT / "aistream", app / "aistream", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("wsgi.py", "gunicorn.conf.py", "generate_token.py"):
        shutil.copy(ROOT / name, app)
    (step,) = [rest for name, rest in instructions(DOCKERFILES[0]) if name == "RUN" and "compileall" in rest]
    done = subprocess.run(step.replace("/app", str(app)).replace("python", sys.executable, 1), shell=True, timeout=60)
    assert done.returncode == 0
    return app


def test_the_service_runs_as_its_container_does_and_ends_in_order(
    redis_container: tuple[Container, list[str]],
    free_port: int,
    image: Path,
    tmp_path: Path,
    provider: ProviderServer,
    n8n: Receiver,
) -> None:
    """A read-only root, no rights, the environment of the compose file; only the names of other containers are this machine's."""
    port, metrics_port = map(str, _ports(2))
    env = {**ENV, **provider.openai_environ, "DRAIN_SECONDS": "5"}
    environ = {
        **{name: value for name, value in environment_of_the_image().items() if name != "PATH"},
        **compose.environment(SERVICES["aistream"], env),
        "HOST": "127.0.0.1",
        "PORT": port,
        "METRICS_PORT": metrics_port,
        "REDIS_URL": f"redis://:{ENV['REDIS_PASSWORD']}@127.0.0.1:{free_port}/0",
        "RESUME_URL_REWRITE": f"http://localhost:5678={n8n.origin}",
        "RESUME_URL_ALLOWED_ORIGINS": n8n.origin,
        "BASE_URL": f"http://127.0.0.1:{port}",
    }
    before = sorted(image.rglob("*"))
    with Container(
        last("CMD"),
        environ,
        uid=10_001,
        folder=tmp_path,
        mounts={"/app": image},
        tmpfs=SERVICES["aistream"]["tmpfs"],
        workdir="/app",
    ) as container:
        container.wait_until(lambda: container.run(last("HEALTHCHECK")).returncode == 0)
        printed = container.run(["python", "generate_token.py"])
        answer = httpx.post(
            f"http://127.0.0.1:{port}/init-stream",
            json={
                "n8nToken": printed.stdout.strip(),
                "resumeUrl": "http://localhost:5678/webhook-waiting/1?signature=ab",
                "prompt": "Hi",
                "model": "gpt-test-hello",
            },
            timeout=10,
        )
        with watch(answer.json()["streamUrl"]) as events:
            seen: list[Event] = list(events)
        (told,) = n8n.wait_for(1)
        unwritable = container.run(["sh", "-c", "touch /app/x || touch /x || touch /usr/x"])
        who = container.run(["sh", "-c", "id -u; grep -E 'CapEff|NoNewPrivs' /proc/self/status"]).stdout.split()
        status = container.stop(signal.SIGTERM)
        after = container.run(last("HEALTHCHECK"))

    assert text_of(seen) == told.json["answer"] == "Hello, this is the test provider."
    assert unwritable.returncode != 0 and "Read-only file system" in unwritable.stderr
    assert who == ["10001", "CapEff:", "0" * 16, "NoNewPrivs:", "1"]
    assert (status, after.returncode) == (0, 1)
    assert sorted(image.rglob("*")) == before
    assert "Traceback" not in container.log


def _ports(count: int) -> list[int]:
    with contextlib.ExitStack() as open_at_once:
        sockets = [open_at_once.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


# ---- PostgreSQL ----


@pytest.fixture(scope="module")
def postgres() -> Iterator[pg.Postgres]:
    """A PostgreSQL that was made as its container makes it, with our script."""
    if pg.program("initdb") is None:
        missing("PostgreSQL's server")
    service = SERVICES["postgres"]
    environ = {**compose.environment(service, ENV), "N8N_DB_PASSWORD": AWKWARD}
    scripts = sorted((ROOT / "deploy" / "postgres").glob("*.sh"))  # what is mounted where the image looks
    with pg.Postgres(environ, scripts) as server:
        yield server


#: A password that would break out of SQL or of a shell.
AWKWARD = 'it\'s "$HOME" \\ `id`; --'


def test_n8ns_role_is_nobody_in_particular_and_owns_its_schema(postgres: pg.Postgres) -> None:
    rights = "rolsuper, rolcreatedb, rolcreaterole, rolreplication, rolbypassrls, rolcanlogin"

    role = postgres.ask("n8n", f"SELECT {rights} FROM pg_roles WHERE rolname = current_user")
    owner = postgres.ask("n8n", "SELECT nspowner::regrole FROM pg_namespace WHERE nspname = 'public'")

    assert (role.stdout.strip(), owner.stdout.strip()) == ("f|f|f|f|f|t", "n8n"), role.stderr


@pytest.mark.parametrize(
    "sql",
    [
        *("CREATE DATABASE other", "CREATE ROLE other", "ALTER ROLE n8n SUPERUSER", "CREATE SCHEMA other", "SET ROLE postgres"),
        *("DROP DATABASE n8n", "COPY (SELECT 1) TO PROGRAM 'id'", "SELECT pg_read_file('/etc/passwd')", "TABLE pg_authid"),
    ],
)
def test_n8ns_role_may_not(postgres: pg.Postgres, sql: str) -> None:
    refused = postgres.ask("n8n", sql)

    assert refused.returncode != 0
    assert re.search("permission denied|must be (owner|superuser)", refused.stderr), refused.stderr


def test_n8ns_role_may_do_what_migrations_do(postgres: pg.Postgres) -> None:
    sql = "CREATE TABLE t (id uuid DEFAULT gen_random_uuid()); CREATE INDEX ON t (id); ALTER TABLE t ADD c jsonb; DROP TABLE t"

    done = postgres.ask("n8n", sql)

    assert done.returncode == 0, done.stderr


def test_a_database_wants_the_password_and_lets_no_other_database_be_seen(postgres: pg.Postgres) -> None:
    stranger = postgres.by_tcp("psql", "-X", "-U", "n8n", "-d", "n8n", "-c", "SELECT 1", password="another")
    elsewhere = [postgres.ask("n8n", "SELECT 1", database=name) for name in ("postgres", "template1")]

    assert "password authentication failed" in stranger.stderr
    assert ["permission denied for database" in answer.stderr for answer in elsewhere] == [True, True]


def test_the_health_check_of_postgresql_is_good_when_it_takes_connections(postgres: pg.Postgres) -> None:
    kind, *check = SERVICES["postgres"]["healthcheck"]["test"]

    ends = [postgres.by_tcp(*check, f"--port={port}", password="").returncode for port in (postgres.port, _ports(1)[0])]

    assert kind == "CMD" and ends == [0, 2]


def test_without_a_password_for_n8n_nothing_is_made(postgres: pg.Postgres) -> None:
    (script,) = (ROOT / "deploy" / "postgres").glob("*.sh")
    where = {"PGHOST": "127.0.0.1", "PGPORT": str(postgres.port), "PGPASSWORD": ENV["POSTGRES_PASSWORD"]}
    environ = {"PATH": os.environ["PATH"], "POSTGRES_USER": "postgres", "POSTGRES_DB": "n8n", **where}

    done = subprocess.run([script], env=environ, capture_output=True, text=True, timeout=30)

    assert done.returncode != 0 and "N8N_DB_PASSWORD is not set" in done.stderr
