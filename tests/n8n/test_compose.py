"""n8n's containers of docker-compose.yml: what comes up at the first start, and what becomes of it at later ones."""

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import compose
from tests.n8n.conftest import HOME
from tests.n8n.installation import NODE, Installation
from tests.n8n.workflow import ASKED, FILE, Chat, Workflow
from tests.neighbours.postgres import Postgres
from tests.neighbours.provider import ProviderServer
from tests.service import ROOT, Service, text_of

ENV = {**compose.sample_env(), "CALLBACK_HEADERS": '{"X-Aistream-Key": "a-key-of-the-tests", "X-Other": "b"}'}
PLAIN = {"executionOrder": "v1"}
WORKFLOW = json.loads(FILE.read_text())["id"]


@pytest.fixture(scope="module")
def service_port() -> int:
    """Where the workflow looks for aistream."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    """n8n's database as its container makes it."""
    environ = compose.environment(compose.read(ENV)["services"]["postgres"], ENV)
    with Postgres(environ, sorted((ROOT / "deploy" / "postgres").glob("*.sh"))) as server:
        yield server


@pytest.fixture(scope="module")
def installation(
    postgres: Postgres, service_port: int, tmp_path_factory: pytest.TempPathFactory, community_node: Path
) -> Iterator[Installation]:
    """It has been set up, and runs. The node is built: `community_node` sees to that."""
    made = Installation(HOME, tmp_path_factory.mktemp("installation"), postgres, ENV, f"http://127.0.0.1:{service_port}")
    done = made.setup()
    assert done.returncode == 0, done.stdout
    assert "the workflow is published" in done.stdout
    try:
        made.n8n.start()
        yield made
    finally:
        made.n8n.kill()


@pytest.fixture
def service(
    installation: Installation, service_port: int, start_service: Callable[..., Service], provider: ProviderServer
) -> Service:
    """aistream with what docker-compose.yml tells it of n8n."""
    environ = compose.environment(installation.services["aistream"], ENV)
    (rewritten,) = [part.partition("=")[0] for part in environ["RESUME_URL_REWRITE"].split(",")]
    told = ("JWT_SECRET", "CALLBACK_HEADERS", "CALLBACK_SECRET")
    return start_service(
        PORT=str(service_port),
        RESUME_URL_REWRITE=f"{rewritten}={installation.n8n.url}",
        RESUME_URL_ALLOWED_ORIGINS=installation.n8n.url,
        **{name: environ[name] for name in told},
        **provider.openai_environ,
    )


def test_the_imported_workflow_streams_an_answer_and_gets_its_callback(installation: Installation, service: Service) -> None:
    asked = installation.n8n.trigger("start-chat", ASKED)

    events = service.read(asked.json()["streamUrl"])

    execution = installation.n8n.wait_for(WORKFLOW, "success", "error")
    assert execution.output("Use the answer")["answer"] == text_of(events) == "Hello, this is the test provider."
    assert execution.resume_url.startswith("http://localhost:5678/webhook-waiting/")


def test_our_node_is_there_under_the_name_that_workflows_are_exchanged_with(installation: Installation, service: Service) -> None:
    data = {"baseUrl": service.url, "jwtSecret": ENV["JWT_SECRET"], "algorithm": "HS256", "subject": "n8n"}
    secrets = {"callbackSecret": ENV["CALLBACK_SECRET"], "audience": "", "issuer": ""}
    credential = installation.n8n.credential("AiStream", "aiStreamApi", {**data, **secrets})
    example = Workflow(json.loads((NODE / "examples" / "chat.json").read_text()))
    example["AiStream"].update(credentials={"aiStreamApi": credential})
    example.parameters("AiStream").update(model={"__rl": True, "mode": "name", "value": "={{ $json.body.model }}"})
    chat = Chat(installation.n8n, service, example)

    events = service.read(chat.stream_url())

    assert chat.ended().output("Save the answer")["answer"] == text_of(events) != ""


def test_n8n_is_healthy_by_its_health_check(installation: Installation, free_port: int) -> None:
    answers = installation.healthy(installation.n8n.port), installation.healthy(free_port)

    assert answers == (True, False)


def test_what_an_author_has_changed_outlives_every_later_setup(installation: Installation) -> None:
    n8n = installation.n8n
    known = ("nodes", "connections")
    workflow = n8n.api("GET", f"/workflows/{WORKFLOW}")
    n8n.api("PUT", f"/workflows/{WORKFLOW}", **{name: workflow[name] for name in known}, name="Mine", settings=PLAIN)

    again = installation.setup()
    (installation.volume / ".n8n" / ".aistream-imported").unlink()  # a restored database, and a new volume
    restored = installation.setup()

    assert (again.returncode, restored.returncode) == (0, 0), again.stdout + restored.stdout
    assert "imported before" in again.stdout and "the database has the workflow" in restored.stdout
    assert n8n.api("GET", f"/workflows/{WORKFLOW}")["name"] == "Mine"
    assert (installation.volume / ".n8n" / ".aistream-imported").exists()


def test_restored_credentials_are_read_with_their_key_and_are_lost_with_another(
    installation: Installation, postgres: Postgres, tmp_path: Path
) -> None:
    """As deploy/backup dumps the database and deploy/restore puts it back."""
    asked, superuser = ["--username=postgres", "--dbname=n8n"], ENV["POSTGRES_PASSWORD"]
    dumped = postgres.by_tcp("pg_dump", *asked, "--format=custom", f"--file={tmp_path / 'n8n.dump'}", password=superuser)
    installation.n8n.kill()
    assert postgres.ask("n8n", "DROP TABLE credentials_entity CASCADE").returncode == 0
    options = ["--clean", "--if-exists", "--single-transaction"]
    restored = postgres.by_tcp("pg_restore", *asked, *options, str(tmp_path / "n8n.dump"), password=superuser)

    export = ["export:credentials", "--all", "--decrypted"]
    told = installation.command(tmp_path / "one", *export, f"--output={tmp_path / 'told'}")
    lost = installation.command(tmp_path / "two", *export, f"--output={tmp_path / 'lost'}", N8N_ENCRYPTION_KEY="another")

    assert (dumped.returncode, restored.returncode) == (0, 0), dumped.stderr + restored.stderr
    assert ENV["JWT_SECRET"] in (tmp_path / "told").read_text(), told.stdout
    assert not (tmp_path / "lost").exists() and "decrypt" in lost.stdout.lower(), lost.stdout
