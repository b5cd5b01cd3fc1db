"""n8n/workflow.json as a test uses it: on a path of its own, with credentials, asking the test's service."""

import json
import uuid
from collections.abc import Mapping
from typing import Any

import httpx

from tests.n8n.client import Execution, N8n
from tests.service import ROOT, Service, wait_until

FILE = ROOT / "n8n" / "workflow.json"
#: What the Wait node demands of whoever wakes it.
KEY = ("X-Aistream-Key", "a-key-that-only-aistream-has")
#: The body of the page's `startChat`.
ASKED = {"prompt": "What is AI?", "model": "gpt-test-hello", "max_tokens": 2000, "userId": "user_123", "chatId": "chat_456"}


class Workflow:
    """An editable copy, or another workflow whose first node is a webhook."""

    def __init__(self, data: Mapping[str, Any] | None = None) -> None:
        self.data: dict[str, Any] = json.loads(FILE.read_text() if data is None else json.dumps(data))
        self.path = f"start-chat-{uuid.uuid4().hex}"
        (webhook,) = [node for node in self.data["nodes"] if node["type"] == "n8n-nodes-base.webhook"]
        webhook["webhookId"] = str(uuid.uuid4())
        webhook["parameters"]["path"] = self.path

    def connect(self, service_url: str, credentials: Mapping[str, Mapping[str, str]]) -> None:
        """Does what an author does after the import: the address, and the two credentials."""
        self.parameters("Open the stream").update(url=f"{service_url}/init-stream")
        self["Sign the token"].update(credentials={"jwtAuth": credentials["jwtAuth"]})
        self["Wait for the answer"].update(credentials={"httpHeaderAuth": credentials["httpHeaderAuth"]})

    def __getitem__(self, name: str) -> dict[str, Any]:
        nodes: list[dict[str, Any]] = [node for node in self.data["nodes"] if node["name"] == name]
        (found,) = nodes
        return found

    def parameters(self, name: str) -> dict[str, Any]:
        """A node's parameters, to be changed in place."""
        parameters: dict[str, Any] = self[name]["parameters"]
        return parameters

    def say_resume_url(self, expression: str) -> None:
        """Tells the service this JavaScript expression as resumeUrl."""
        asked = self.parameters("Open the stream")
        asked["jsonBody"] = asked["jsonBody"].replace("$execution.resumeUrl", expression)

    def insert(self, node: dict[str, Any], before: str) -> None:
        """Puts a node in front of one that has a single predecessor."""
        self.data["nodes"].append({"id": str(uuid.uuid4()), "position": [0, 0], **node})
        links = [link for outputs in self.data["connections"].values() for links in outputs["main"] for link in links]
        (link,) = [link for link in links if link["node"] == before]
        link["node"] = node["name"]
        self.data["connections"][node["name"]] = {"main": [[{"node": before, "type": "main", "index": 0}]]}


class Chat:
    """A published workflow, and the page that asks it."""

    def __init__(self, n8n: N8n, service: Service, workflow: Workflow) -> None:
        self.n8n = n8n
        self.service = service
        self.path = workflow.path
        self._id = n8n.publish(workflow.data)

    def ask(self, **body: Any) -> httpx.Response:
        """What the page gets for a request; the body of `startChat`, unless `body` has something else."""
        return self.ask_exactly({**ASKED, **body})

    def ask_exactly(self, body: Any) -> httpx.Response:
        """What the page gets for this request."""
        return self.n8n.trigger(self.path, body)

    def stream_url(self, **body: Any) -> str:
        """The streamUrl that the page gets."""
        answer = self.ask(**body)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["streamUrl"])

    def waiting(self) -> Execution:
        """The execution, as soon as its Wait node waits."""
        return self.n8n.wait_for(self._id, "waiting")

    def ended(self, timeout: float = 30.0) -> Execution:
        """The execution, as soon as it has ended."""
        return self.n8n.wait_for(self._id, "success", "error", "canceled", "crashed", timeout=timeout)

    def attempts(self, last: str, timeout: float = 30.0) -> list[dict[str, Any]]:
        """The service's attempts at its one callback, as soon as one has this outcome."""
        wait_until(lambda: last in [line["outcome"] for line in self.service.lines("callback.attempted")], timeout)
        return self.service.lines("callback.attempted")
