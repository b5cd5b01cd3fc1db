"""A real n8n for all tests of a run, and aistream beside it. Only collected when asked for by path: see `make test-n8n`."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.n8n.client import N8n
from tests.n8n.workflow import KEY, Chat, Workflow
from tests.neighbours.provider import ProviderServer
from tests.service import ROOT, SECRET, Service

#: Where scripts/ensure-n8n has put n8n.
HOME = ROOT / os.environ.get("N8N_HOME", ".n8n")
HERE = Path(__file__).parent
NODE = ROOT / "n8n" / "n8n-nodes-aistream"
#: Seconds before the attempts of a callback: an n8n that starts takes half a minute.
SCHEDULE = "0,0.5" + ",2" * 45

StartChat = Callable[..., Chat]
Credentials = dict[str, dict[str, str]]


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    """`pytest tests` passes these by: n8n is 3 GB, and starts in half a minute."""
    asked = [Path(argument.partition("::")[0]).resolve() for argument in config.args]
    return None if any(path.is_relative_to(HERE) for path in asked) else True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test may have to wait for n8n's starts, of which its setup needs six, or for its look at the limits, once a minute."""
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.timeout(600))


@pytest.fixture(scope="session")
def community_node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what our community node is built into; it is built where it is not."""
    if not (NODE / "dist").exists():
        environ = {**os.environ, "PATH": f"{HOME / 'node24' / 'bin'}:{os.environ['PATH']}"}
        for step in (["ci"], ["run", "build"]):
            done = subprocess.run(["npm", *step], cwd=NODE, env=environ, capture_output=True, text=True, timeout=240)
            assert done.returncode == 0, done.stdout + done.stderr
    return Path(shutil.copytree(NODE / "dist", tmp_path_factory.mktemp("extensions") / "aistream"))


@pytest.fixture(scope="session")
def n8n(tmp_path_factory: pytest.TempPathFactory, community_node: Path) -> Iterator[N8n]:
    """A real n8n with our community node, an owner, and nothing else."""
    if not (HOME / "app" / "node_modules" / "n8n").exists():
        pytest.fail(f"there is no n8n in {HOME}: `make test-n8n` installs it")
    process = N8n(HOME, tmp_path_factory.mktemp("n8n"), {"N8N_CUSTOM_EXTENSIONS": str(community_node)})
    try:
        process.start()
        yield process
    finally:
        process.kill()


@pytest.fixture(scope="session")
def credentials(n8n: N8n) -> Credentials:
    """The two credentials that the workflow needs."""
    name, value = KEY
    return {
        "jwtAuth": n8n.credential("JWT", "jwtAuth", {"keyType": "passphrase", "secret": SECRET, "algorithm": "HS256"}),
        "httpHeaderAuth": n8n.credential("Callback", "httpHeaderAuth", {"name": name, "value": value}),
    }


@pytest.fixture
def start_chat(n8n: N8n, credentials: Credentials, start_service: Callable[..., Service], provider: ProviderServer) -> StartChat:
    """Publishes the workflow for a service with these variables, after `change` has been at it."""

    def start(change: Callable[[Workflow], object] = lambda workflow: None, **environ: str) -> Chat:
        header = ": ".join(KEY)
        service = start_service(
            **{"CALLBACK_HEADERS": header, "CALLBACK_SCHEDULE": SCHEDULE, **provider.openai_environ, **environ}
        )
        workflow = Workflow()
        workflow.connect(service.url, credentials)
        change(workflow)
        return Chat(n8n, service, workflow)

    return start
