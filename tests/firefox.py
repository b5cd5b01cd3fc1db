"""Firefox as a person's browser, driven by WebDriver BiDi, which it speaks itself: there is no geckodriver."""

import contextlib
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import websocket

from tests.browser import FOREIGN, Tab

#: It speaks to nobody but the pages that a test opens, and its first run asks nothing.
PREFS = {
    "app.normandy.enabled": False,
    "app.update.enabled": False,
    "app.update.disabledForTesting": True,
    "browser.aboutwelcome.enabled": False,
    "browser.safebrowsing.downloads.enabled": False,
    "browser.safebrowsing.malware.enabled": False,
    "browser.safebrowsing.phishing.enabled": False,
    "browser.shell.checkDefaultBrowser": False,
    "browser.startup.homepage_override.mstone": "ignore",
    "datareporting.policy.dataSubmissionEnabled": False,
    "dom.push.connection.enabled": False,
    "extensions.getAddons.cache.enabled": False,
    "extensions.update.enabled": False,
    "network.captive-portal-service.enabled": False,
    "network.connectivity-service.enabled": False,
    "network.dns.localDomains": FOREIGN,
    "network.http.speculative-parallel-limit": 0,
    "network.prefetch-next": False,
    "network.proxy.type": 0,
    "services.settings.server": "data:,",
    "toolkit.telemetry.enabled": False,
    "toolkit.telemetry.unified": False,
}


def program() -> str | None:
    """The path of a Firefox, or None where there is none."""
    return shutil.which("firefox-esr") or shutil.which("firefox")


@contextlib.contextmanager
def firefox(program: str, folder: Path) -> Iterator["Firefox"]:
    """A headless Firefox with a fresh profile in `folder`."""
    profile = folder / "profile"
    profile.mkdir()
    lines = [f"user_pref({json.dumps(name)}, {json.dumps(value)});" for name, value in PREFS.items()]
    (profile / "user.js").write_text("\n".join(lines))
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    command = [program, "--headless", "--no-remote", "--profile", str(profile), "--remote-debugging-port", str(port)]
    with (folder / "firefox.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={"HOME": str(folder), "MOZ_CRASHREPORTER_DISABLE": "1"})
    try:
        line = _connect(process, port, folder / "firefox.log")
        try:
            yield Firefox(line)
        finally:
            line.close()
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _connect(process: "subprocess.Popen[bytes]", port: int, log: Path) -> Any:
    until = time.monotonic() + 60
    while True:
        try:
            return websocket.create_connection(f"ws://127.0.0.1:{port}/session", timeout=60, suppress_origin=True)
        except OSError:
            assert process.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.1)


class Firefox(Tab):
    """The one tab of a Firefox; `line` is the WebSocket to it."""

    def __init__(self, line: Any) -> None:
        self._line = line
        self._number = 0
        self._complaints: list[str] = []
        self._ask("session.new", capabilities={})
        self._ask("session.subscribe", events=["log.entryAdded"])
        self._context = self._ask("browsingContext.getTree")["contexts"][0]["context"]

    def open(self, url: str) -> None:
        """Opens a page."""
        self._ask("browsingContext.navigate", context=self._context, url=url, wait="complete")

    def close(self) -> None:
        """Leaves the page, and forgets what it has complained of."""
        self.open("about:blank")
        self._complaints.clear()

    @property
    def complaints(self) -> list[str]:
        """The errors and warnings in the page's console."""
        self._ask("browsingContext.getTree")  # what has been said until now comes before the answer
        return list(self._complaints)

    def value(self, expression: str, *args: Any) -> Any:
        """What a JavaScript expression gives, promises awaited; `args` are in it as `args[0]`, …. Travels as JSON text."""
        script = f"""(() => {{
            const args = {json.dumps(args)};
            return Promise.resolve().then(() => {expression}).then(
                (value) => JSON.stringify(["value", value ?? null]),
                (error) => JSON.stringify(["error", String(error)]),
            );
        }})()"""
        told = self._ask("script.evaluate", expression=script, target={"context": self._context}, awaitPromise=True)
        assert told["type"] == "success", told
        kind, value = json.loads(told["result"]["value"])
        assert kind == "value", value
        return value

    def _ask(self, method: str, **params: Any) -> Any:
        self._number += 1
        self._line.send(json.dumps({"id": self._number, "method": method, "params": params}))
        while True:
            said = json.loads(self._line.recv())
            if said.get("id") == self._number:
                assert said["type"] == "success", said
                return said["result"]
            if said.get("method") == "log.entryAdded" and said["params"]["level"] in ("error", "warn"):
                self._complaints.append(str(said["params"]["text"]))
