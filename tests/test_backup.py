"""deploy/backup and deploy/restore, with a real Redis, a real PostgreSQL and files; containers are processes of this machine.

What is restored is whole: a callback that was owed when the backup was made is delivered after all data were lost. That n8n reads
its credentials again, and with another key does not, is in tests/n8n.
"""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from tests import compose
from tests.compose import Container
from tests.conftest import missing
from tests.neighbours import docker
from tests.neighbours import postgres as pg
from tests.neighbours import redis as own_redis
from tests.neighbours.postgres import Postgres
from tests.neighbours.receiver import Answer, Receiver
from tests.service import ROOT, Service

ENV = compose.sample_env()
SERVICES = compose.read(ENV)["services"]
PASSWORD = ENV["REDIS_PASSWORD"]


class Installation:
    """The containers redis, postgres and n8n, the last one without its process; `project` is the folder that is deployed."""

    def __init__(self, folder: Path, postgres: Postgres, port: int) -> None:
        self.project = folder / "project"
        self.port = port
        self.postgres = postgres
        self.n8n_volume = folder / "n8n-volume"
        self._folder = folder
        self.redis = self._container("redis", 1)
        (self.project / "deploy").mkdir(parents=True)
        for name in ("backup", "restore"):
            shutil.copy(ROOT / "deploy" / name, self.project / "deploy")
        (self.project / ".env").write_text(f"N8N_ENCRYPTION_KEY={ENV['N8N_ENCRYPTION_KEY']}\n")

    @property
    def redis_url(self) -> str:
        """As the service is told."""
        return f"redis://:{PASSWORD}@127.0.0.1:{self.port}/0"

    def _container(self, name: str, number: int) -> Container:
        folder = self._folder / f"redis-{number}"
        folder.mkdir(exist_ok=True)
        service = SERVICES[name]
        options = [part.replace("6381", str(self.port)) for part in service["command"][1:]]
        return Container(
            [own_redis.program() or "", *options, "--bind", "127.0.0.1"],
            compose.environment(service, ENV),
            uid=int(service["user"].partition(":")[0]),
            folder=folder,
            volumes={"/data": folder / "data"},
            workdir="/data",
        )

    def start_redis(self) -> None:
        """Starts it, with whatever its volume has."""
        self.redis.start()
        self.redis.wait_until(lambda: self.redis.run(["redis-cli", "-p", str(self.port), "PING"]).stdout.strip() == "PONG")

    def lose_everything(self) -> None:
        """A new machine: empty volumes, an empty database."""
        self.redis.kill()
        self.redis = self._container("redis", 2)
        self.start_redis()
        shutil.rmtree(self.n8n_volume)
        self.n8n_volume.mkdir()
        assert self.postgres.ask("n8n", "DROP TABLE kept").returncode == 0

    def run(self, script: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """Runs a script of deploy/, as an operator does."""
        superuser = {"PGHOST": "127.0.0.1", "PGPORT": str(self.postgres.port), "PGPASSWORD": ENV["POSTGRES_PASSWORD"]}
        inside = {"REDISCLI_AUTH": PASSWORD}
        services = {
            "redis": docker.Service(self.redis.surroundings, inside, {"6381": str(self.port)}, self.redis.pid),
            "postgres": docker.Service(environ=superuser),
            "n8n": docker.Service(replace={"/home/node/.n8n": str(self.n8n_volume)}),
            "aistream": docker.Service(),
            "aistream-replica": docker.Service(),
        }
        environ = {**os.environ, **docker.stand_in(self._folder / "bin", services)}
        command = [self.project / "deploy" / script, *arguments]
        return subprocess.run(command, env=environ, cwd=self._folder, capture_output=True, text=True, timeout=60)

    @property
    def asked_of_docker(self) -> list[str]:
        """Every `docker compose` of the scripts."""
        return docker.noted(self._folder / "bin")


@pytest.fixture
def installation(tmp_path: Path, free_port: int) -> Iterator[Installation]:
    """It runs, and n8n's database and volume have something in them."""
    if (
        not compose.can_contain()
        or own_redis.program() is None
        or shutil.which("redis-cli") is None
        or pg.program("initdb") is None
    ):
        missing("bubblewrap, redis-server, redis-cli and PostgreSQL's server")
    environ = compose.environment(SERVICES["postgres"], ENV)
    with Postgres(environ, sorted((ROOT / "deploy" / "postgres").glob("*.sh"))) as server:
        made = Installation(tmp_path, server, free_port)
        made.start_redis()
        made.n8n_volume.mkdir()
        (made.n8n_volume / "config").write_text("what n8n keeps beside its database")
        assert server.ask("n8n", "CREATE TABLE kept AS SELECT 'a workflow' AS what").returncode == 0
        try:
            yield made
        finally:
            made.redis.kill()


StartService = Callable[..., Service]


def owing(start_service: StartService, installation: Installation, n8n: Receiver) -> Service:
    """A service that owes one callback: n8n has said that it is not there yet."""
    n8n.always(Answer(503))
    environ = {"REDIS_URL": installation.redis_url, "CALLBACK_SCHEDULE": "0,2" + ",1" * 30, "DEV_MODE": "true"}
    service = start_service(RESUME_URL_ALLOWED_ORIGINS=n8n.origin, **environ)
    service.read(service.stream_url(resumeUrl=n8n.url(), prompt="Kept", model="echo"))
    n8n.wait_for(1)
    return service


def test_a_callback_that_was_owed_at_the_backup_is_delivered_after_everything_was_lost(
    installation: Installation, start_service: StartService, n8n: Receiver
) -> None:
    owing(start_service, installation, n8n).kill()
    backup = installation.run("backup", "backups/one")
    installation.lose_everything()

    restored = installation.run("restore", "backups/one")

    assert (backup.returncode, restored.returncode) == (0, 0), backup.stderr + restored.stdout + restored.stderr
    installation.redis.kill()
    installation.start_redis()
    n8n.reset()
    start_service(REDIS_URL=installation.redis_url, RESUME_URL_ALLOWED_ORIGINS=n8n.origin)
    (delivered,) = n8n.wait_for(1, timeout=30)
    assert (delivered.json["answer"], delivered.json["status"]) == ("Kept", "completed")
    assert installation.postgres.ask("n8n", "TABLE kept").stdout.strip() == "a workflow"
    assert (installation.n8n_volume / "config").read_text() == "what n8n keeps beside its database"
    stopped = [line for line in installation.asked_of_docker if line.startswith("stop")]
    assert stopped == ["stop aistream aistream-replica n8n", "stop redis"]
    assert installation.asked_of_docker[-1] == "up --detach"


def test_a_backup_is_for_its_owner_alone_and_replaces_none(installation: Installation) -> None:
    first = installation.run("backup", "backups/one")

    again = installation.run("backup", "backups/one")

    folder = installation.project / "backups" / "one"
    assert {path.name for path in folder.iterdir()} == {"env", "n8n.dump", "n8n-volume.tar", "redis.tar", "SHA256SUMS"}
    assert {path.stat().st_mode & 0o077 for path in (folder, *folder.iterdir())} == {0}
    assert (first.returncode, again.returncode) == (0, 1) and "there already" in again.stderr
    assert rewrites(installation) == "100"


def rewrites(installation: Installation) -> str:
    """How far the append-only file may grow before Redis writes it anew, in percent; 0 is never."""
    with redis.Redis.from_url(installation.redis_url, decode_responses=True) as client:
        return str(client.config_get("auto-aof-rewrite-percentage")["auto-aof-rewrite-percentage"])


def test_a_backup_that_fails_leaves_nothing_that_looks_like_one(installation: Installation) -> None:
    shutil.rmtree(installation.n8n_volume)

    failed = installation.run("backup", "backups/one")

    assert failed.returncode != 0 and "no backup was made" in failed.stderr
    assert not (installation.project / "backups" / "one").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder, project: (folder / "n8n.dump").write_bytes(b"another"), "is not what was backed up"),
        (lambda folder, project: (project / ".env").write_text("N8N_ENCRYPTION_KEY=another\n"), "could not read its credentials"),
    ],
    ids=["a broken file", "another encryption key"],
)
def test_what_cannot_be_restored_whole_changes_nothing(
    installation: Installation, change: Callable[[Path, Path], object], said: str
) -> None:
    assert installation.run("backup", "backups/one").returncode == 0
    before = installation.asked_of_docker
    change(installation.project / "backups" / "one", installation.project)

    refused = installation.run("restore", "backups/one")

    assert refused.returncode == 1 and said in refused.stderr and "nothing was changed" in refused.stderr
    assert installation.asked_of_docker == before
