"""Where the documentation's code is run: what stands around a block, and when it has done what it says.

A scene gets the stage, the block and an empty folder, and raises AssertionError where the block does not work. The addresses of a
reader's machine (127.0.0.1:8000, n8n at localhost:5678, Redis at 127.0.0.1:6379) are replaced by those of the stage.
"""

import contextlib
import functools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import jwt
from selenium.webdriver import Chrome

from scripts.release.files import project_files
from tests.browser import Browser, Pages, chromium
from tests.doc_blocks import Block
from tests.neighbours.provider import ProviderServer
from tests.neighbours.receiver import STARTED, Answer, Reaction, Received, Receiver
from tests.neighbours.redis import RedisServer
from tests.neighbours.scenarios import HELLO
from tests.service import ROOT, SECRET, Service, n8n_token, session_in, wait_until

#: Seconds that a block may take.
LIMIT = 60.0
#: Seconds within which a page shows the answer.
PATIENCE = 40.0
#: What the stage's models say.
ANSWER = "".join(HELLO)
#: The models that the pages name, each an alias of one that says ANSWER.
MODELS = ("gpt-4", "gpt-4o-mini", "claude-sonnet-4-5", "fast")


class Stage:
    """What the scenes share, each part started when a scene first asks for it; `close` ends them all.

    `programs`: a Chromium and its driver, or None where there is none.
    """

    def __init__(self, folder: Path, provider: ProviderServer, programs: tuple[str, str] | None) -> None:
        self._folder = folder
        self._provider = provider
        self._programs = programs
        self._open = contextlib.ExitStack()

    def close(self) -> None:
        """Ends what was started. Whatever the service has printed is searched for secrets."""
        self._open.close()

    @functools.cached_property
    def redis(self) -> RedisServer:
        """A real one, on a port of its own."""
        (self._folder / "redis").mkdir()
        return self._open.enter_context(RedisServer(self._folder / "redis"))

    @functools.cached_property
    def environ(self) -> dict[str, str]:
        """The service's settings: a first run's, over Redis, with both providers and what the pages call their models."""
        leads = f'base_url = "{self._provider.openai_url}"\nkey_variable = "OPENAI_API_KEY"\nmodel = "gpt-test-hello"\n'
        (self._folder / "models.toml").write_text("\n".join(f"[{name}]\n{leads}" for name in MODELS))
        return {
            **self._provider.environ,
            "DEV_MODE": "true",
            "JWT_SECRET": SECRET,
            "REDIS_URL": self.redis.url,
            "MODELS_FILE": str(self._folder / "models.toml"),
        }

    @functools.cached_property
    def service(self) -> Service:
        """The service that the pages speak of."""
        service = Service(self._folder / "service.log", self.environ)
        self._open.callback(service.stop)
        service.start()
        return service

    @functools.cached_property
    def chrome(self) -> Chrome:
        """A Chromium."""
        assert self._programs is not None
        (self._folder / "chromium").mkdir()
        return self._open.enter_context(chromium(*self._programs, self._folder / "chromium"))


class N8n(Receiver):
    """What n8n does for the pages: its webhook `start-chat` opens a stream as the workflow does, for every page."""

    def __init__(self, service: Service) -> None:
        super().__init__()
        self._service = service
        self.always(self._react)

    def _react(self, request: Received) -> Reaction:
        cors = {"Access-Control-Allow-Origin": "*", "Access-Control-Allow-Headers": "content-type"}
        if request.method == "OPTIONS":
            return Answer(204, cors, "")
        if request.path != "/webhook/start-chat":
            return STARTED
        asked = self._service.init(resumeUrl=self.url(), **request.json)
        told = asked.json()
        known = (
            {name: told[name] for name in ("ok", "streamUrl", "streamId")} if asked.is_success else {"ok": False, "error": told}
        )
        return Answer(asked.status_code, {**cors, "Content-Type": "application/json"}, json.dumps(known))


# Shells


def shell(stage: Stage, block: Block, folder: Path) -> None:
    """bash in a fresh copy of the checkout, beside the service, whose settings are in the environment."""
    with N8n(stage.service) as n8n:
        _bash(block, folder, _service_environ(stage), _places(stage, n8n))


def outbox(stage: Stage, block: Block, folder: Path) -> None:
    """The same, after n8n has refused a callback: $STREAM_ID is that stream."""
    with N8n(stage.service) as n8n:
        n8n.answers([(403, {}, "Authorization data is wrong!")], path="/refused")
        stream_url = stage.service.stream_url(resumeUrl=n8n.url("/refused"))
        stage.service.read(stream_url)
        stream_id = session_in(stream_url)
        wait_until(lambda: (stage.service.get(f"/sessions/{stream_id}").json()["callback"] or {}).get("state") == "dead")
        _bash(block, folder, {**_service_environ(stage), "STREAM_ID": stream_id}, _places(stage, n8n))


def shell_empty(stage: Stage, block: Block, folder: Path) -> None:
    """bash in a fresh copy of the checkout, with no service, no settings and no keys."""
    _bash(block, folder, {}, {})


def serve(stage: Stage, block: Block, folder: Path) -> None:
    """The same, for a command that goes on: it answers on its port, and ends when it is told to."""
    port = _free_port()
    places = {r"(localhost|127\.0\.0\.1):8000": f"127.0.0.1:{port}", r"PORT=\d+": f"PORT={port}", r"--port \d+": f"--port {port}"}
    if "redis://" in block.script:
        places |= _redis(stage)
    script = _put(block.script, places)
    log = folder / "log"
    with log.open("w") as output:
        process = _start(script, checkout(folder / "checkout"), {**_clean(folder), "PORT": str(port)}, output)
    try:
        until = time.monotonic() + LIMIT
        while not _answers(port):
            assert process.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.05)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(LIMIT)
    finally:
        _kill(process)
    _search(log.read_text())


def _service_environ(stage: Stage) -> dict[str, str]:
    return {**stage.environ, "PORT": str(stage.service.port), "BASE_URL": stage.service.url}


def _bash(block: Block, folder: Path, environ: Mapping[str, str], places: Mapping[str, str]) -> None:
    _run(["bash", "-euo", "pipefail", "-c", _put(block.script, places)], checkout(folder / "checkout"), folder, environ)


def checkout(folder: Path) -> Path:
    """A copy of what git knows of and what it does not ignore, as it stands now; with a `.venv` that has the tests' packages.

    Its lists of packages say that nothing is to be installed: no block changes the virtual environment that the tests run in.
    """
    for name in project_files():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    venv = folder / ".venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "lib").symlink_to(Path(sys.prefix) / "lib")
    shutil.copy2(Path(sys.prefix) / "pyvenv.cfg", venv)
    for program in (Path(sys.prefix) / "bin").iterdir():
        (venv / "bin" / program.name).symlink_to(program)
    (venv / "bin" / "pip").unlink(missing_ok=True)
    (venv / "bin" / "pip").write_text(f"#!{venv}/bin/python\nraise SystemExit('nothing is installed here')\n")
    for lock in ("requirements.txt", "requirements-dev.txt"):
        shutil.copy2(folder / lock, venv / f"installed-{lock}")
    return folder


def _run(command: list[str], where: Path, home: Path, environ: Mapping[str, str]) -> str:
    """Runs it to its end, within LIMIT, and gives what it printed, in which no secret may be."""
    log = home / "log"
    with log.open("w") as output:
        process = _start(command, where, {**_clean(home), **environ}, output)
    try:
        status = process.wait(LIMIT)
    except subprocess.TimeoutExpired:
        status = None
    finally:
        _kill(process)
    printed = log.read_text(errors="replace")
    assert status == 0, f"{'it did not end' if status is None else f'exit status {status}'}; it printed:\n{printed}"
    _search(printed)
    return printed


def _start(command: str | list[str], where: Path, environ: Mapping[str, str], output: Any) -> "subprocess.Popen[bytes]":
    words = ["bash", "-euo", "pipefail", "-c", command] if isinstance(command, str) else command
    return subprocess.Popen(
        words, cwd=where, env=dict(environ), stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
    )


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """With all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _clean(home: Path) -> dict[str, str]:
    """A reader's environment: nothing of the tests', and curl says so where it is refused."""
    (home / ".curlrc").write_text("fail-with-body\nsilent\nshow-error\n")
    path = [entry for entry in os.environ["PATH"].split(":") if Path(entry).resolve() != Path(sys.prefix, "bin").resolve()]
    return {"PATH": ":".join(path), "HOME": str(home), "LANG": "C.UTF-8", "TMPDIR": str(home), "PIP_NO_INDEX": "1"}


def _search(printed: str) -> None:
    """A page may have a token printed; a secret, or a key, never."""
    found = [secret for secret in (SECRET, "sk-test-openai", "sk-ant-test-anthropic") if secret in printed]
    assert not found, f"it has printed {len(found)} secrets"


# Browser and Node.js


def browser(stage: Stage, block: Block, folder: Path) -> None:
    """A script in a page of another origin, or a whole page, where the stream's answer must come to be seen.

    A script finds what stands around it in tests/pages/block.js, and `streamUrl`. Not one error may be in the console.
    """
    with Pages() as pages, N8n(stage.service) as n8n:
        script = _put(block.script, _places(stage, n8n))
        around = {"streamUrl": stage.service.stream_url(resumeUrl=n8n.url()), "webhookUrl": n8n.url("/webhook/start-chat")}
        pages.add("block.html", _page(script, block.language, around, f"{stage.service.url}/aistream"))
        tab = Browser(stage.chrome)
        try:
            tab.open(pages.url("block.html"))
            with contextlib.suppress(AssertionError):
                tab.wait_for("broken.length || seen().includes(args[0])", ANSWER, timeout=PATIENCE)
            seen, complaints = tab.value("seen()"), tab.complaints
            asked = [f"{one.method} {one.url.partition('?')[0]} {one.status}" for one in tab.requests]
        finally:
            tab.close()
    assert not complaints, "\n".join(complaints)
    assert ANSWER in seen, f"the answer is not seen, but {seen!r}; asked for: {', '.join(asked)}"


def node(stage: Stage, block: Block, folder: Path) -> None:
    """A module of Node.js with the package aistream-client, and `streamUrl`; the answer must come to be printed."""
    package = folder / "node_modules" / "aistream-client"
    (package / "dist").mkdir(parents=True)
    shutil.copy2(ROOT / "clients" / "js" / "package.json", package)
    shutil.copy2(ROOT / "aistream" / "static" / "client" / "aistream.mjs", package / "dist")
    with N8n(stage.service) as n8n:
        around = {"streamUrl": stage.service.stream_url(resumeUrl=n8n.url()), "webhookUrl": n8n.url("/webhook/start-chat")}
        (folder / "around.mjs").write_text(f"Object.assign(globalThis, {json.dumps(around)});")
        (folder / "block.mjs").write_text(_put(block.script, _places(stage, n8n)))
        printed = _node(["--import", "./around.mjs", "block.mjs"], folder)
    assert ANSWER in printed, f"the answer is not printed, but {printed!r}"


def _page(script: str, language: str, around: Mapping[str, str], client: str) -> str:
    """The page around a script; or one that is whole, with the stage's stream in the place of its own."""
    setting = f"<script>Object.assign(globalThis, {json.dumps(around)});</script>"
    known = '<link rel="icon" href="data:,"><script src="block.js"></script>' + setting
    imports = json.dumps({"imports": {"aistream-client": f"{client}.mjs"}})
    if language == "html":
        return re.sub(r"(<!doctype html>)?", lambda _: f"<!doctype html>{known}", script, count=1, flags=re.IGNORECASE)
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>A block</title>{known}
        <script type="importmap">{imports}</script><script src="{client}.js"></script>
        <script type="module">{script}</script></head>
        <body><div id="chat"></div><button id="stop">Stop</button></body></html>"""


def _node(arguments: list[str], folder: Path, environ: Mapping[str, str] | None = None) -> str:
    program = shutil.which("node", path=f"{sys.prefix}/bin:{os.environ['PATH']}")
    assert program is not None
    return _run([program, *arguments], folder, folder, environ or {})


# n8n's expressions


def n8n_claims(stage: Stage, block: Block, folder: Path) -> None:
    """An expression of n8n that gives a token's claims: the service accepts what is signed with them."""
    answer = stage.service.get("/models", jwt.encode(_expression(block.text, folder), SECRET, "HS256"))
    assert answer.status_code == 200, answer.text


def n8n_body(stage: Stage, block: Block, folder: Path) -> None:
    """An expression of n8n that gives the body of an init: the service accepts it, and knows all its fields."""
    _accepted(stage, _expression(block.text, folder))


def n8n_body_lines(stage: Stage, block: Block, folder: Path) -> None:
    """Lines that go into such a body."""
    least = {"n8nToken": n8n_token(), "resumeUrl": "http://127.0.0.1:9/none", "prompt": "What is AI?"}
    _accepted(stage, least | _expression(f"{{{{ JSON.stringify({{{block.text}}}) }}}}", folder))


def _accepted(stage: Stage, body: Any) -> None:
    answer = httpx.post(f"{stage.service.url}/init-stream", json=body, timeout=10)
    assert answer.status_code == 200, answer.text
    unknown = [warning for warning in answer.json()["warnings"] if "unknown" in warning.lower()]
    assert not unknown, unknown


def _expression(text: str, folder: Path) -> Any:
    """What n8n makes of `{{ … }}`, in the execution of a workflow that has signed its token; it must be JSON."""
    match = re.fullmatch(r"\{\{(.*)\}\}", text.strip(), re.DOTALL)
    assert match, "no expression: {{ … }}"
    asked = {"prompt": "What is AI?", "model": "gpt-4o-mini", "userId": "user_123", "chatId": 456}
    (folder / "expression.mjs").write_text(f"""
        const $json = {{ token: process.env.TOKEN }};
        const $execution = {{ id: "7", resumeUrl: "http://127.0.0.1:9/webhook-waiting/7?signature=0123" }};
        const $ = (name) => ({{ item: {{ json: {{ body: {json.dumps(asked)} }} }} }});
        console.log({match[1]});""")
    return json.loads(_node(["expression.mjs"], folder, {"TOKEN": n8n_token()}))


# Redis


def redis_cli(stage: Stage, block: Block, folder: Path) -> None:
    """Commands of Redis, one a line: none of them is refused."""
    with contextlib.closing(stage.redis.client()) as client:
        for line in block.text.replace("\\\n", " ").strip().splitlines():
            client.execute_command(*line.split())


# Addresses


def _places(stage: Stage, n8n: Receiver) -> dict[str, str]:
    host = f"127.0.0.1:{stage.service.port}"
    return {r"(localhost|127\.0\.0\.1):8000": host, r"http://(localhost|127\.0\.0\.1):5678": n8n.origin, **_redis(stage)}


def _redis(stage: Stage) -> dict[str, str]:
    return {r"redis://(localhost|127\.0\.0\.1)(:6379)?": stage.redis.url}


def _put(text: str, places: Mapping[str, str]) -> str:
    for pattern, there in places.items():
        text = re.sub(pattern, lambda _, there=there: there, text)  # type: ignore[misc]  # it has no type with a default
    return text


def _answers(port: int) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200
    return False


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


#: Their names in a mark.
SCENES: dict[str, Callable[[Stage, Block, Path], None]] = {
    "shell": shell,
    "outbox": outbox,
    "shell-empty": shell_empty,
    "serve": serve,
    "browser": browser,
    "node": node,
    "n8n-claims": n8n_claims,
    "n8n-body": n8n_body,
    "n8n-body-lines": n8n_body_lines,
    "redis-cli": redis_cli,
}
#: The programs that a scene needs beside Redis.
NEEDS = {"browser": "chromium", "node": "node", "n8n-claims": "node", "n8n-body": "node", "n8n-body-lines": "node"}
