"""Installs what was built as others will, away from this checkout, and sees it work."""

from __future__ import annotations

import ast
import contextlib
import http.server
import json
import os
import queue
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.release.build import Failed, run
from scripts.release.files import unpack

#: An answer that is right only if nothing on its way counts bytes for characters.
PROMPT = "Every word of this comes back: Grüße, 漢字 and 🚀, and then the end."
#: How pip and npm reach their packages here, and whom they trust.
_REACHES = re.compile(r"(pip_|npm_config_|ssl_cert_|requests_ca_bundle$|curl_ca_bundle$|node_extra_ca_certs$|\w+_proxy$).*", re.I)
_NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def environment(home: Path, *programs: str) -> dict[str, str]:
    """A clean one: an empty home, the system's programs and these, and of this one only how packages are reached."""
    home.mkdir(parents=True)
    folder = home / ".programs"
    folder.mkdir()
    for name in programs:
        found = shutil.which(name)
        if found is None:
            raise Failed(f"{name} is not on PATH")
        (folder / name).symlink_to(found)
    kept = {name: value for name, value in os.environ.items() if _REACHES.fullmatch(name)}
    # What a person has configured lies in the home that is not seen, and so does what was fetched before.
    own = {
        "PIP_CONFIG_FILE": Path.home() / ".config" / "pip" / "pip.conf",
        "PIP_CACHE_DIR": Path.home() / ".cache" / "pip",
        "npm_config_userconfig": Path.home() / ".npmrc",
        "npm_config_cache": Path.home() / ".npm",
    }
    known = {name.lower() for name in kept}
    kept |= {name: str(path) for name, path in own.items() if path.exists() and name.lower() not in known}
    return {**kept, "HOME": str(home), "PATH": f"{folder}:/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8"}


# ---- The wheel ----


def make_venv(folder: Path, environ: Mapping[str, str]) -> Path:
    """A fresh virtual environment of this Python; its programs' folder."""
    run([base_python(), "-m", "venv", folder], folder.parent, environ)
    return folder / "bin"


def base_python() -> Path:
    """This Python, outside its virtual environment."""
    return Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"


def install_wheel(wheel: Path, requirements: Path, folder: Path, environ: Mapping[str, str]) -> Path:
    """The wheel on top of what the lock file pins, in a fresh virtual environment; its programs' folder."""
    programs = make_venv(folder, environ)
    pip: list[str | Path] = [programs / "python", "-m", "pip", "--disable-pip-version-check", "--no-input"]
    run([*pip, "install", "--quiet", "--require-hashes", "--only-binary", ":all:", "-r", requirements], folder, environ)
    run([*pip, "install", "--quiet", "--no-deps", "--no-index", wheel], folder, environ)
    run([*pip, "check"], folder, environ)
    return programs


@dataclass(frozen=True, slots=True)
class Served:
    """A running service, and who gets its callbacks."""

    url: str
    environ: Mapping[str, str]
    programs: Path
    callbacks: Callbacks

    def init(self, prompt: str) -> str:
        """Asks for an answer as n8n does, with a token that `aistream token` prints; gives its stream's address."""
        token = run([self.programs / "aistream", "token"], Path(self.environ["HOME"]), self.environ).strip()
        asked = {"n8nToken": token, "prompt": prompt, "model": "echo", "resumeUrl": self.callbacks.url}
        return str(json.loads(fetch(f"{self.url}/init-stream", asked))["streamUrl"])


@contextlib.contextmanager
def serve(programs: Path, folder: Path, environ: Mapping[str, str]) -> Iterator[Served]:
    """`aistream serve --dev` of an installed wheel, in an empty folder; ended by SIGTERM, after which it must exit with 0."""
    folder.mkdir()
    port = _free_port()
    with Callbacks() as callbacks:
        settings = {
            "HOST": "127.0.0.1",
            "PORT": str(port),
            "JWT_SECRET": "of-a-release-that-is-tried-out-with-enough-bytes",
            "RESUME_URL_ALLOWED_ORIGINS": callbacks.origin,
            "DRAIN_SECONDS": "5",
        }
        inside = {**environ, **settings, "PATH": f"{programs}:{environ['PATH']}"}
        with _running([str(programs / "aistream"), "serve", "--dev"], folder, inside) as (process, log):
            url = f"http://127.0.0.1:{port}"
            _wait_for_health(url, process, log)
            yield Served(url, {**inside, "DEV_MODE": "true"}, programs, callbacks)
            _end(process, log)


def see_it_work(service: Served, version: str) -> None:
    """Health, a page, an answer, its callback. Raises Failed."""
    _same("the version in /health", json.loads(fetch(f"{service.url}/health"))["version"], version)
    for path in ("/", "/openapi.json", "/aistream.js", "/aistream.mjs"):
        fetch(service.url + path)
    _same("the answer", text_of(fetch(service.init(PROMPT))), PROMPT)
    callback = service.callbacks.next()
    _same("the callback", (callback["status"], callback["answer"]), ("completed", PROMPT))


def fetch(url: str, body: object = None, timeout: float = 30) -> str:
    """What is at this address, to its end; a POST with a body. Raises Failed."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with _NO_PROXY.open(request, timeout=timeout) as answer:
            return str(answer.read().decode())
    except urllib.error.HTTPError as error:
        raise Failed(f"{url} answered {error.code}: {error.read().decode(errors='replace')}") from None
    except OSError as error:
        raise Failed(f"{url}: {error}") from None


def text_of(stream: str) -> str:
    """The answer in a whole text-mode stream. Raises Failed where it has no proper end."""
    if not stream.endswith("data: [DONE]\n\n"):
        raise Failed(f"the stream does not end as one does: {stream[-200:]!r}")
    events = [[line[6:] for line in block.split("\n") if line.startswith("data: ")] for block in stream.split("\n\n")]
    return "".join("\n".join(event) for event in events[:-2])


class Callbacks:
    """Takes callbacks as a Wait node of n8n does."""

    def __init__(self) -> None:
        self._taken: queue.Queue[dict[str, Any]] = queue.Queue()
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.origin = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.url = f"{self.origin}/webhook-waiting/1"

    def __enter__(self) -> Callbacks:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def next(self, timeout: float = 20) -> dict[str, Any]:
        """The next one. Raises Failed where none comes."""
        try:
            return self._taken.get(timeout=timeout)
        except queue.Empty:
            raise Failed(f"no callback in {timeout} s") from None

    def _handler(self) -> type[http.server.BaseHTTPRequestHandler]:
        taken = self._taken

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                taken.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                answer = b'{"message": "Workflow was started"}'
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: object) -> None:
                pass

        return Handler


# ---- The npm packages ----

_WATCH = """
import { connectToStream, stream } from "aistream-client";
const [first, second] = process.argv.slice(2);
let text = "";
await new Promise((resolve, reject) => connectToStream(first, {
  onMessage: (chunk) => { text += chunk; }, onComplete: resolve, onError: reject,
}));
let again = "";
for await (const chunk of stream(second)) again += chunk;
console.log(JSON.stringify([text, again]));
"""
_TYPES = """
import { connectToStream, stream, StreamError, type Connection, type Options } from "aistream-client";
const options: Options = {
  onMessage: (chunk: string, id: string) => console.log(chunk, id),
  onError: (error: StreamError) => console.log(error.code, error.retryable),
};
const connection: Connection = connectToStream("https://a.example/stream/1", options);
const last: string = connection.lastEventId;
const done: Promise<void> = connection.done;
const length = async (): Promise<number> => {
  let all = "";
  for await (const chunk of stream("/a")) all += chunk;
  return all.length;
};
export { done, last, length };
// @ts-expect-error: a misspelt option is found
connectToStream("/a", { onmessage: () => undefined });
"""


def check_client(tarball: Path, folder: Path, service: Served, npm_packages: Path, environ: Mapping[str, str]) -> None:
    """The browser's client in an empty project: it watches two answers of a running service, and its types compile."""
    _project(folder, {"type": "module"}, [tarball], environ)
    (folder / "watch.mjs").write_text(_WATCH)
    (folder / "types.ts").write_text(_TYPES)
    told = run(["node", "watch.mjs", service.init(PROMPT), service.init(PROMPT)], folder, environ)
    _same("what the client has seen", json.loads(told), [PROMPT, PROMPT])
    for name in ("aistream.js", "aistream.mjs"):
        packed = (folder / "node_modules" / "aistream-client" / "dist" / name).read_text()
        _same(f"the service's /{name}, that it is the package's,", fetch(f"{service.url}/{name}") == packed, True)
    for module in ("nodenext", "bundler"):
        by = ["--module", "nodenext"] if module == "nodenext" else ["--module", "esnext", "--moduleResolution", "bundler"]
        typescript: list[str | Path] = [
            "node",
            npm_packages / "typescript" / "bin" / "tsc",
            "--noEmit",
            "--strict",
            "--target",
            "es2022",
        ]
        run([*typescript, "--lib", "es2022,dom,dom.asynciterable", *by, "types.ts"], folder, environ)


_LOAD = """
const assert = require('node:assert');
const fs = require('node:fs');
const path = require('node:path');
const root = path.join(process.cwd(), 'node_modules', 'n8n-nodes-aistream');
const manifest = require(path.join(root, 'package.json'));
assert.ok(manifest.keywords.includes('n8n-community-node-package'));
assert.equal(manifest.n8n.n8nNodesApiVersion, 1);
assert.deepEqual(Object.keys(manifest.dependencies ?? {}), []);
const load = (file) => new (require(path.join(root, file))[path.basename(file).split('.')[0]])();
const icon = (file, said) => {
  for (const name of typeof said === 'string' ? [said] : Object.values(said)) {
    assert.ok(fs.existsSync(path.join(root, path.dirname(file), name.replace('file:', ''))), name);
  }
};
for (const file of manifest.n8n.nodes) {
  const { description, execute } = load(file);
  assert.equal(typeof execute, 'function');
  icon(file, description.icon);
  assert.ok(JSON.parse(fs.readFileSync(path.join(root, file.replace(/\\.js$/, '.json')))).node.endsWith(description.name));
  console.log(description.name, description.credentials.map((one) => one.name).join());
}
for (const file of manifest.n8n.credentials) {
  const credential = load(file);
  icon(file, credential.icon);
  console.log(credential.name);
}
"""


def check_node(tarball: Path, folder: Path, n8n_workflow: str, environ: Mapping[str, str]) -> None:
    """n8n's node in an empty project with n8n's interface: n8n's manifest names classes that load, with icons that are there."""
    _project(folder, {}, [tarball, f"n8n-workflow@{n8n_workflow}"], environ)
    load_node(folder, environ)


def load_node(project: Path, environ: Mapping[str, str]) -> None:
    """Loads the node that a project has installed, as n8n does. Raises Failed."""
    (project / "load.js").write_text(_LOAD)
    told = run(["node", "load.js"], project, environ).split("\n")
    _same("what n8n would load", told, ["aiStream aiStreamApi", "aiStreamApi", ""])


def _project(folder: Path, manifest: Mapping[str, object], packages: Sequence[str | Path], environ: Mapping[str, str]) -> None:
    folder.mkdir()
    (folder / "package.json").write_text(json.dumps({"name": "empty", "version": "1.0.0", "private": True, **manifest}))
    run(["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error", *packages], folder, environ)


# ---- The image's context ----


def can_contain() -> bool:
    """Whether this machine has what stands in for a container."""
    return shutil.which("bwrap") is not None and shutil.which("setpriv") is not None


def check_context(context: Path, folder: Path, environ: Mapping[str, str]) -> None:
    """Does the Dockerfile's steps, as they stand, on top of this machine's system, and starts what it says as who it says.

    What this shows: that the context has all that the steps copy, that they work, and that the result serves with a read-only
    root. What it does not: the image's own base, and Docker.
    """
    unpacked = folder / "context"
    unpack(context, unpacked)
    image = Image(folder, environ)
    image.build(unpacked)
    port = _free_port()
    settings = {
        "HOST": "127.0.0.1",
        "PORT": str(port),
        "BASE_URL": f"http://127.0.0.1:{port}",
        "JWT_SECRET": "of-a-release-that-is-tried-out-with-enough-bytes",
        "RESUME_URL_ALLOWED_ORIGINS": "https://n8n.example",
        "OPENAI_API_KEY": "none",
        "DRAIN_SECONDS": "5",
    }
    with _running(image.container(image.command, settings), folder, os.environ) as (process, log):
        until = time.monotonic() + 30
        while subprocess.run(image.container(image.health, settings), capture_output=True, timeout=20).returncode != 0:
            _alive(process, log, until)
        inside = _children(process.pid)
        for pid in inside:
            os.kill(pid, signal.SIGTERM)
        _same("the container's exit status", process.wait(30), 0)
    if subprocess.run(image.container(image.health, settings), capture_output=True, timeout=20).returncode == 0:
        raise Failed("the image's health check is good where nothing runs")


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """The lines of a Dockerfile: (instruction, the rest), comments and continuations resolved."""
    text = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", dockerfile, flags=re.MULTILINE))
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in text.splitlines() if line.strip())]


#: The instructions that change a root, and those that say something about its containers.
STEPS = ("FROM", "COPY", "RUN", "ENV")
SAID = ("WORKDIR", "USER", "CMD", "HEALTHCHECK", "STOPSIGNAL", "EXPOSE", "LABEL", "ARG")


class Image:
    """A folder for a root, to which the steps of a Dockerfile are done; of the system it has this machine's, to read."""

    def __init__(self, folder: Path, environ: Mapping[str, str]) -> None:
        self._folder = folder
        self._environ = environ
        self._root = folder
        self._stages: dict[str, Path] = {}
        self._said: dict[str, str] = {}
        self._set: dict[str, str] = {}

    def build(self, context: Path) -> None:
        """All steps, in their order. Raises Failed for an instruction that it does not know."""
        for name, rest in instructions((context / "Dockerfile").read_text()):
            match name:
                case "FROM":
                    _, _, stage = rest.partition(" AS ")
                    self._root = self._folder / f"root-{len(self._stages)}"
                    self._stages[stage or "last"] = self._root
                    self._mount_points()
                    self._set, self._said = {}, {}
                case "COPY":
                    self._copy(rest, context)
                case "RUN":
                    run([*self._inside(writable=True), "/bin/sh", "-c", rest], self._folder, self._building())
                case "ENV":
                    self._set |= dict(part.split("=", 1) for part in rest.split())
                case _ if name in SAID:
                    self._said[name] = rest
                case _:
                    raise Failed(f"scripts/release does not know the Dockerfile's {name}")

    @property
    def command(self) -> list[str]:
        """What a container starts."""
        return list(ast.literal_eval(self._said["CMD"]))

    @property
    def health(self) -> list[str]:
        """What says that it is alive."""
        return list(ast.literal_eval(self._said["HEALTHCHECK"].partition("CMD ")[2]))

    def container(self, command: Sequence[str], settings: Mapping[str, str]) -> list[str]:
        """The line that runs this in a container of the image: a read-only root, its user, no rights, its environment."""
        uid, _, gid = self._said["USER"].partition(":")
        environ = {"PATH": self._path(), **self._set, **settings}
        environ["PATH"] = environ["PATH"].replace("$PATH", self._path())
        user = ["setpriv", "--reuid", uid, "--regid", gid, "--clear-groups", "--inh-caps=-all", "--bounding-set=-all"]
        return [
            *self._inside(writable=False, uid=uid, gid=gid),
            *("--chdir", self._said["WORKDIR"], "--clearenv"),
            *(word for name, value in environ.items() for word in ("--setenv", name, value)),
            "--",
            *([*user, "--no-new-privs", "--"] if os.geteuid() == 0 else []),
            *command,
        ]

    def _copy(self, rest: str, context: Path) -> None:
        *sources, target = rest.split()
        root = context
        if sources[0].startswith("--from="):
            root = self._stages[sources.pop(0).removeprefix("--from=")]
        for source in sources:
            path = root / source.lstrip("/")
            into = self._root / target.strip("/")
            if path.is_dir():
                shutil.copytree(path, into, symlinks=True, dirs_exist_ok=True)
            else:
                into = into / path.name if target.endswith("/") else into
                into.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, into)

    def _mount_points(self) -> None:
        for _, path in self._system():
            (self._root / path.lstrip("/")).mkdir(parents=True, exist_ok=True)
        for path in ("proc", "dev", "tmp"):
            (self._root / path).mkdir(exist_ok=True)

    def _system(self) -> list[tuple[str, str]]:
        """What is mounted of this machine: (from, to). Python wherever it is."""
        paths = [path for path in ("/usr", "/etc", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/opt") if Path(path).exists()]
        python = [] if sys.base_prefix.startswith("/usr") else [sys.base_prefix]
        return [(os.path.realpath(path), path) for path in [*paths, *python]]

    def _inside(self, *, writable: bool, uid: str = "0", gid: str = "0") -> list[str]:
        options = ["bwrap", "--die-with-parent", "--unshare-pid"]
        if os.geteuid() != 0:
            options += ["--unshare-user", "--uid", uid, "--gid", gid]
        options += ["--bind" if writable else "--ro-bind", str(self._root), "/"]
        for source, path in self._system():
            options += ["--ro-bind", source, path]
        return [*options, "--proc", "/proc", "--dev", "/dev", "--perms", "1777", "--tmpfs", "/dev/shm", "--tmpfs", "/tmp"]

    def _building(self) -> dict[str, str]:
        # pip's settings point to files of this machine that are not in there, but for those below /etc and /opt.
        return {**self._environ, "HOME": "/tmp", "PATH": self._path(), "PIP_CACHE_DIR": "/tmp"}

    def _path(self) -> str:
        return f"{self._python_folder()}:/usr/local/bin:/usr/bin:/bin"

    def _python_folder(self) -> Path:
        return base_python().parent


# ---- Processes ----


@contextlib.contextmanager
def _running(command: Sequence[str], folder: Path, environ: Mapping[str, str]) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    log = folder / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            list(command), cwd=folder, env=environ, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
        )
    try:
        yield process, log
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_for_health(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + 30
    while True:
        try:
            fetch(f"{url}/health", timeout=5)
            return
        except Failed:
            _alive(process, log, until)


def _alive(process: subprocess.Popen[bytes], log: Path, until: float) -> None:
    if process.poll() is not None or time.monotonic() > until:
        raise Failed(f"the service does not come up:\n{log.read_text(errors='replace')}")
    time.sleep(0.1)


def _end(process: subprocess.Popen[bytes], log: Path) -> None:
    process.send_signal(signal.SIGTERM)
    if process.wait(30) != 0:
        raise Failed(f"the service ended with {process.returncode} after SIGTERM:\n{log.read_text(errors='replace')}")


def _children(pid: int) -> list[int]:
    """The first process inside a sandbox: bwrap's grandchild, for its child is the sandbox's init."""
    (init,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in Path(f"/proc/{init}/task/{init}/children").read_text().split()]


def _same(what: str, found: object, wanted: object) -> None:
    if found != wanted:
        raise Failed(f"{what}: {found!r} instead of {wanted!r}")


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
