"""The service as its users meet it: gunicorn as a child process, asked over HTTP."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import jwt
from httpx_sse import EventSource

from tests.leaks import CANARY, leaks, secrets_of

ROOT = Path(__file__).resolve().parent.parent
SECRET = "a-secret-of-the-tests-with-enough-bytes"
#: What is asked where a test does not care.
PROMPT = f"Hello {CANARY}"


#: For a load that would not come from one n8n.
UNLIMITED = {"INIT_RATE_LIMIT": "off", "USER_RATE_LIMIT": "off", "MAX_PENDING_SESSIONS": "1000000"}


class Event(NamedTuple):
    """One server-sent event as httpx-sse decodes it."""

    id: str
    event: str
    data: str


def n8n_token(**claims: Any) -> str:
    """A token as n8n signs it: valid for five minutes unless the claims say otherwise."""
    return jwt.encode({"sub": "n8n", "exp": int(time.time()) + 300, **claims}, SECRET, "HS256")


class Service:
    """One gunicorn. `environ` on top of a DEV_MODE configuration; nothing else of this process's environment counts.

    `ulimit`: what a shell sets before it starts, such as `-Hn 256`. `app`: in place of the service's own.
    When it ends, whatever it has printed is searched for secrets.
    """

    def __init__(self, log: Path, environ: Mapping[str, str], ulimit: str = "", app: str = "wsgi:app") -> None:
        self._log = log
        self._environ = dict(environ)
        self._limited = ["sh", "-c", f'ulimit {ulimit} && exec "$0" "$@"'] if ulimit else []
        self._app = app
        self._process: subprocess.Popen[bytes] | None = None
        self._searched = 0
        self.port = int(environ.get("PORT", 0)) or _free_port()

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """gunicorn's master."""
        assert self._process is not None
        return self._process.pid

    @property
    def ended(self) -> bool:
        """Whether its master is gone."""
        return self._process is None or self._process.poll() is not None

    @property
    def log(self) -> str:
        """Everything it has printed."""
        return self._log.read_text(errors="replace")

    def lines(self, event: str, **fields: Any) -> list[dict[str, Any]]:
        """Its log lines of this name, with these fields."""
        parsed = [json.loads(line) for line in self.log.splitlines() if line.startswith("{")]
        return [line for line in parsed if line["event"] == event and line.items() >= fields.items()]

    def start(self) -> None:
        """Starts it and waits until it answers."""
        self.spawn()
        self.wait()

    def spawn(self) -> None:
        """Starts it."""
        environ = {
            "PATH": os.environ["PATH"],
            "HOME": str(self._log.parent),
            "PYTHONUNBUFFERED": "1",
            "PYTHON_DOTENV_DISABLED": "true",
            "DEV_MODE": "true",
            "JWT_SECRET": SECRET,
            "DRAIN_SECONDS": "5",
            **self._environ,
            "PORT": str(self.port),
        }
        with self._log.open("a") as log:
            self._process = subprocess.Popen(
                [*self._limited, sys.executable, "-m", "gunicorn", self._app],
                cwd=ROOT,
                env={name: value for name, value in environ.items() if value},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait(self) -> None:
        """Waits until it answers."""
        assert self._process is not None
        until = time.monotonic() + 30
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health", timeout=5, verify=False).status_code == 200:
                    return
            assert self._process.poll() is None and time.monotonic() < until, self.log
            time.sleep(0.05)

    def stop(self, sig: signal.Signals = signal.SIGTERM) -> None:
        """Ends it; whatever it leaves is killed."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(sig)
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._process = None
        self._search()

    def restart(self, **environ: str) -> None:
        """Stops it, and starts it anew on the same port with these variables changed."""
        self.stop()
        self._environ |= environ
        self.start()

    def kill(self) -> None:
        """Kills it, with all its workers."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
            self._search()

    def _search(self) -> None:
        """No secret may be in what it has printed since it was last searched."""
        text = self.log[self._searched :]
        self._searched += len(text)
        found = leaks(text, [SECRET, *secrets_of(self._environ)])
        assert not found, "\n".join(["it has printed what nobody may see:", *found[:20]])

    def get(self, path: str, token: str | None = None) -> httpx.Response:
        """GET of this path, with n8n's token (or this one) in the header."""
        return httpx.get(self.url + path, headers={"Authorization": f"Bearer {token or n8n_token()}"}, timeout=10, verify=False)

    def post(self, path: str, token: str | None = None) -> httpx.Response:
        """POST to this path without a body, with n8n's token (or this one) in the header."""
        return httpx.post(self.url + path, headers={"Authorization": f"Bearer {token or n8n_token()}"}, timeout=10, verify=False)

    def init(self, **body: Any) -> httpx.Response:
        """POST /init-stream with a valid token, a prompt and a resumeUrl that nobody listens on, unless `body` has others."""
        asked = {"n8nToken": n8n_token(), "resumeUrl": "http://127.0.0.1:9/none", "prompt": PROMPT, **body}
        return httpx.post(f"{self.url}/init-stream", json=asked, timeout=10, verify=False)

    def stream_url(self, **body: Any) -> str:
        """The streamUrl of an accepted init."""
        answer = self.init(**body)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["streamUrl"])

    def watch(self, url: str, last_id: str | None = None, **headers: str) -> "contextlib.AbstractContextManager[Watch]":
        """Opens a stream as an EventSource does."""
        return watch(url, last_id, **headers)

    def read(self, url: str, last_id: str | None = None) -> list[Event]:
        """All events of a stream to its end."""
        with self.watch(url, last_id) as events:
            return list(events)


class Watch:
    """An open stream: iterate it for events."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self.last_id = ""
        self._events = EventSource(response).iter_sse() if response.status_code == 200 else iter(())

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        event = next(self._events)
        self.last_id = event.id
        return Event(event.id, event.event, event.data)


@contextlib.contextmanager
def watch(url: str, last_id: str | None = None, **headers: str) -> Iterator[Watch]:
    """A stream, opened with `Last-Event-ID` if given."""
    asked = {"Accept": "text/event-stream", **headers, **({"Last-Event-ID": last_id} if last_id else {})}
    with httpx.Client(timeout=30, trust_env=False, verify=False) as client, client.stream("GET", url, headers=asked) as response:
        yield Watch(response)


def on(service: Service, url: str) -> str:
    """The same stream, asked of another replica."""
    return service.url + url[url.index("/stream/") :]


def session_in(url: str) -> str:
    """The session's id in a stream's address."""
    return url.partition("/stream/")[2].partition("?")[0]


def wait_until(holds: Callable[[], object], timeout: float = 10.0) -> None:
    """A bounded poll: returns when `holds()` does, AssertionError after `timeout` seconds."""
    until = time.monotonic() + timeout
    while not holds():
        assert time.monotonic() < until, f"it did not come to that in {timeout} s"
        time.sleep(0.02)


def text_of(events: list[Event]) -> str:
    """The answer that text-mode events carry."""
    return "".join(event.data for event in events if event.event == "message" and event.data != "[DONE]")


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
