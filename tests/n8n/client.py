"""A real n8n as a child process, and the little of its API that the tests need.

Each process has a data folder of its own (SQLite), listens on a free loopback port and talks to nobody else. The REST
API makes the owner and an API key; the public API does the rest.
"""

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx

OWNER = {"email": "tests@example.com", "password": "Password-of-the-tests-1"}
#: Seconds for a start. The first one makes the database.
START = 120.0


class N8n:
    """One n8n. `home` is where `scripts/ensure-n8n` has put Node and n8n, `folder` what this process keeps."""

    def __init__(self, home: Path, folder: Path, environ: Mapping[str, str] | None = None) -> None:
        self._home = home
        self._folder = folder
        self._environ = dict(environ or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._api_key = ""
        self.port, self._broker_port = _free_ports(2)
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        """Everything it has printed."""
        return (self._folder / "log").read_text(errors="replace")

    def start(self) -> None:
        """Starts it, and waits until it takes webhooks; the first time it also gets an owner and an API key."""
        self.spawn()
        wait_for(self._is_ready, START, every=0.25, else_say=lambda: self.log[-2000:])
        if not self._api_key:
            self._api_key = self._make_api_key()

    def spawn(self) -> None:
        """Starts it, without waiting."""
        node = self._home / "node24" / "bin"
        environ = {
            "PATH": f"{node}:{os.environ['PATH']}",
            "HOME": str(self._folder),
            "NODE_ENV": "production",
            "N8N_USER_FOLDER": str(self._folder),
            "N8N_ENCRYPTION_KEY": "an-encryption-key-of-the-tests",
            "N8N_HOST": "127.0.0.1",  # the host in $execution.resumeUrl
            "N8N_PORT": str(self.port),
            "N8N_LISTEN_ADDRESS": "127.0.0.1",
            "N8N_SECURE_COOKIE": "false",  # the API key is asked for over plain HTTP
            "N8N_RUNNERS_BROKER_PORT": str(self._broker_port),
            "N8N_DIAGNOSTICS_ENABLED": "false",
            "N8N_VERSION_NOTIFICATIONS_ENABLED": "false",
            "N8N_TEMPLATES_ENABLED": "false",
            "N8N_DYNAMIC_BANNERS_ENABLED": "false",
            "N8N_COMMUNITY_PACKAGES_ENABLED": "false",
            "N8N_DISABLED_MODULES": "mcp-registry",  # it asks the internet at every start
            **self._environ,
        }
        with (self._folder / "log").open("a") as log:
            self._process = subprocess.Popen(
                [node / "node", self._home / "app" / "node_modules" / "n8n" / "bin" / "n8n", "start"],
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # its task runner is a child: they are killed as one
            )

    def kill(self) -> None:
        """SIGKILL, with its children."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    # ---- Credentials and workflows ----

    def credential(self, name: str, kind: str, data: Mapping[str, Any]) -> dict[str, str]:
        """Makes a credential; gives what a node refers to it with."""
        made = self.api("POST", "/credentials", name=name, type=kind, data=dict(data))
        return {"id": str(made["id"]), "name": name}

    def publish(self, workflow: Mapping[str, Any]) -> str:
        """Creates a workflow and activates it; returns its id when its webhook is there."""
        known = {key: workflow[key] for key in ("name", "nodes", "connections", "settings")}
        made = str(self.api("POST", "/workflows", **known)["id"])
        self.api("POST", f"/workflows/{made}/activate")
        (path,) = [node["parameters"]["path"] for node in workflow["nodes"] if node["type"] == "n8n-nodes-base.webhook"]
        # Publishing is asynchronous: the route comes a moment later.
        wait_for(lambda: "POST" in self.preflight(path).headers.get("access-control-allow-methods", ""), 20)
        return made

    def preflight(self, path: str, origin: str = "http://localhost:3000") -> httpx.Response:
        """What a browser asks before it POSTs JSON to a webhook of another origin."""
        headers = {"Origin": origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
        return httpx.options(f"{self.url}/webhook/{path}", headers=headers, timeout=10)

    def trigger(self, path: str, body: Any) -> httpx.Response:
        """POSTs JSON to a production webhook, as a page does."""
        headers = {"Origin": "http://localhost:3000"}
        return httpx.post(f"{self.url}/webhook/{path}", json=body, headers=headers, timeout=60)

    def offered(self, node: Mapping[str, Any], parameter: str, method: str, filter: str = "") -> list[str]:
        """What the editor offers for a parameter of a node: the values that the node's method finds."""
        asked = {
            "path": f"parameters.{parameter}",
            "methodName": method,
            "filter": filter,
            "nodeTypeAndVersion": {"name": node["type"], "version": node["typeVersion"]},
            "currentNodeParameters": node["parameters"],
            "credentials": node["credentials"],
        }
        with self._session() as session:
            login = {"emailOrLdapLoginId": OWNER["email"], "password": OWNER["password"]}
            session.post("/login", json=login).raise_for_status()
            answer = session.post("/dynamic-node-parameters/resource-locator-results", json=asked)
        assert answer.is_success, answer.text[:500]
        return [str(found["value"]) for found in answer.json()["data"]["results"]]

    # ---- Executions ----

    def execution(self, workflow_id: str) -> "Execution | None":
        """The workflow's newest execution."""
        found = self.api("GET", f"/executions?workflowId={workflow_id}&includeData=true&limit=1")["data"]
        return Execution(found[0]) if found else None

    def wait_for(self, workflow_id: str, *statuses: str, timeout: float = 30.0) -> "Execution":
        """The workflow's newest execution, as soon as it has one of these statuses."""
        latest: list[Execution | None] = []

        def there() -> bool:
            latest[:] = [self.execution(workflow_id)]
            return latest[0] is not None and latest[0].status in statuses

        wait_for(there, timeout, every=0.2, else_say=lambda: f"{latest} is not {statuses}")
        assert latest[0] is not None
        return latest[0]

    def delete_execution(self, execution_id: str) -> None:
        """Deletes an execution, as an author does in the list of executions."""
        self.api("DELETE", f"/executions/{execution_id}")

    def api(self, method: str, path: str, **body: Any) -> Any:
        """The public API's answer; AssertionError if it is no success."""
        headers = {"X-N8N-API-KEY": self._api_key}
        answer = httpx.request(method, f"{self.url}/api/v1{path}", json=body or None, headers=headers, timeout=30)
        assert answer.is_success, f"{method} {path}: {answer.status_code} {answer.text[:500]}"
        return answer.json() if answer.content else None

    def _is_ready(self) -> bool:
        assert self._process is not None and self._process.poll() is None, self.log[-2000:]
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{self.url}/healthz/readiness", timeout=5).status_code == 200
        return False

    def _make_api_key(self) -> str:
        with self._session() as session:
            session.post("/owner/setup", json={**OWNER, "firstName": "The", "lastName": "Tests"}).raise_for_status()
            scopes = session.get("/api-keys/scopes").raise_for_status().json()["data"]
            made = session.post("/api-keys", json={"label": "tests", "scopes": scopes, "expiresAt": None}).raise_for_status()
            return str(made.json()["data"]["rawApiKey"])

    def _session(self) -> httpx.Client:
        """The editor's way in: the REST API, which remembers who logged in."""
        return httpx.Client(base_url=f"{self.url}/rest", headers={"browser-id": "tests"}, timeout=30)


class Execution:
    """One execution as n8n remembers it."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self._data = data
        self.id = str(data["id"])
        self.status = str(data["status"])

    def __repr__(self) -> str:
        return f"execution {self.id}: {self.status} in {self.last_node!r}"

    @property
    def last_node(self) -> str:
        """The node that ran last."""
        return str(self._data["data"]["resultData"].get("lastNodeExecuted"))

    @property
    def nodes(self) -> list[str]:
        """The nodes that ran."""
        return list(self._data["data"]["resultData"]["runData"])

    @property
    def resume_url(self) -> str:
        """`$execution.resumeUrl`, as the Wait node recorded it."""
        runs = [run for runs in self._data["data"]["resultData"]["runData"].values() for run in runs]
        (url,) = {run["metadata"]["resumeUrl"] for run in runs if "resumeUrl" in run.get("metadata", {})}
        return str(url)

    def output(self, node: str) -> dict[str, Any]:
        """The first item that a node gave out, on whichever output."""
        outputs = self._data["data"]["resultData"]["runData"][node][-1]["data"]["main"]
        return dict(next(items for items in outputs if items)[0]["json"])


def wait_for(holds: Callable[[], object], timeout: float, every: float = 0.1, else_say: Callable[[], str] = lambda: "") -> None:
    """A bounded poll, slower than `tests.service.wait_until`: n8n has a processor to share with us."""
    until = time.monotonic() + timeout
    while not holds():
        assert time.monotonic() < until, f"it did not come to that in {timeout} s. {else_say()}"
        time.sleep(every)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as open_at_once:
        sockets = [open_at_once.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]
