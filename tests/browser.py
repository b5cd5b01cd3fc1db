"""Chromium as a person's browser: opens pages, and tells what they asked of the network and what they complained about."""

import contextlib
import dataclasses
import json
import re
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.select import Select

from tests.neighbours.http1 import Connection, Request, Server

PAGES = Path(__file__).parent / "pages"
FOREIGN = "pages.test"
"""A host that leads to this machine, and whose pages the service does not know."""
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1200,1000"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic"),
    *("--no-proxy-server", f"--host-resolver-rules=MAP {FOREIGN} 127.0.0.1"),
)
_TYPES = {".html": "text/html; charset=utf-8", ".js": "text/javascript; charset=utf-8"}


def programs() -> tuple[str, str] | None:
    """The paths of a Chromium and its driver, or None where one of them is missing."""
    browsers = filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))
    browser, driver = next(browsers, None), shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


@contextlib.contextmanager
def chromium(browser: str, driver: str, folder: Path, *flags: str) -> Iterator[Chrome]:
    """A headless Chromium with a fresh profile in `folder`. Given both programs, Selenium has nothing to look for."""
    options = ChromeOptions()
    options.binary_location = browser
    for flag in (*FLAGS, *flags, f"--user-data-dir={folder / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = ChromeService(executable_path=driver, log_output=str(folder / "chromedriver.log"))
    chrome = Chrome(options=options, service=service)
    try:
        chrome.set_script_timeout(30)
        yield chrome
    finally:
        chrome.quit()


@dataclass(frozen=True, slots=True)
class Seen:
    """One request that a page made. `status` is None where no answer has come; `last_event_id` where it named one."""

    method: str
    url: str
    status: int | None = None
    last_event_id: str | None = None

    @property
    def origin(self) -> str:
        """`scheme://host:port`."""
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc}"


class Tab(ABC):
    """What tests ask of a page, whatever the browser."""

    @property
    @abstractmethod
    def complaints(self) -> list[str]:
        """The errors and warnings in the page's console."""

    @abstractmethod
    def open(self, url: str) -> None:
        """Opens a page in this tab."""

    @abstractmethod
    def close(self) -> None:
        """Leaves the page, and forgets what it has complained of."""

    @abstractmethod
    def value(self, expression: str, *args: Any) -> Any:
        """What a JavaScript expression gives, promises awaited; `args` are in it as `args[0]`, …."""

    def wait_for(self, expression: str, *args: Any, timeout: float = 15.0) -> Any:
        """The value of a JavaScript expression as soon as it is true; AssertionError after `timeout` seconds."""
        until = time.monotonic() + timeout
        while not (value := self.value(expression, *args)):
            assert time.monotonic() < until, f"not within {timeout} s: {expression}; complaints: {self.complaints}"
            time.sleep(0.02)
        return value


class Browser(Tab):
    """One test's use of the browser: a tab to begin with, and everything asked and complained since then."""

    def __init__(self, chrome: Chrome) -> None:
        self.chrome = chrome
        self._asked: dict[str, Seen] = {}
        self._last_event_ids: dict[str, str | None] = {}
        self._complaints: list[str] = []
        self._first = chrome.current_window_handle

    def close(self) -> None:
        """Closes what the test has opened and forgets what it has noted."""
        for handle in self.chrome.window_handles:
            self.chrome.switch_to.window(handle)
            if handle != self._first:
                self.chrome.close()
        self.chrome.switch_to.window(self._first)
        self.chrome.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        self.chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
        self.chrome.get("about:blank")
        self._drain()

    def device(self, width: int, height: int, *, dark: bool = False, calm: bool = False, scale: float = 1) -> None:
        """What pages are shown on: its size in CSS pixels, and what its owner prefers. `calm`: no motion."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": width < 600}
        self.chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        prefers = {
            "prefers-color-scheme": "dark" if dark else "light",
            "prefers-reduced-motion": "reduce" if calm else "no-preference",
        }
        features = [{"name": name, "value": value} for name, value in prefers.items()]
        self.chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    @contextlib.contextmanager
    def asleep(self) -> Iterator[None]:
        """The page is frozen, as one that a phone has put away: it runs nothing within, and goes on afterwards."""
        self.chrome.execute_cdp_cmd("Page.setWebLifecycleState", {"state": "frozen"})
        yield
        self.chrome.execute_cdp_cmd("Page.setWebLifecycleState", {"state": "active"})

    @contextlib.contextmanager
    def offline(self) -> Iterator[None]:
        """The page is told within that there is no network, and what it asks of it fails."""
        conditions = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        self.chrome.execute_cdp_cmd("Network.enable", {})
        self.chrome.execute_cdp_cmd("Network.emulateNetworkConditions", {"offline": True, **conditions})
        yield
        self.chrome.execute_cdp_cmd("Network.emulateNetworkConditions", {"offline": False, **conditions})

    def violations(self, axe: str) -> list[str]:
        """What axe-core, given as its source, has against the page: the rule, and where it is broken."""
        self.chrome.execute_script(axe)
        found = self.value("axe.run(document, { resultTypes: ['violations'] }).then(({ violations }) => violations)")
        return [f"{one['id']}: {node['html']} {node['failureSummary']}" for one in found for node in one["nodes"]]

    def open(self, url: str) -> None:
        """Opens a page in this tab."""
        self.chrome.get(url)

    def open_tab(self, url: str) -> str:
        """Opens a page in a new tab, in front, and gives that tab's handle."""
        self.chrome.switch_to.new_window("tab")
        self.chrome.get(url)
        return self.chrome.current_window_handle

    @property
    def tab(self) -> str:
        """The handle of the tab in front."""
        return self.chrome.current_window_handle

    def show(self, tab: str) -> None:
        """Brings a tab to the front."""
        self.chrome.switch_to.window(tab)

    def value(self, expression: str, *args: Any) -> Any:
        """What a JavaScript expression gives, promises awaited; `args` are in it as `args[0]`, ….

        Travels as JSON text: nothing on the way may touch what the page has seen.
        """
        script = """
            const [args, done] = [arguments[0], arguments[arguments.length - 1]];
            Promise.resolve().then(() => %s).then(
                (value) => done(["value", JSON.stringify(value ?? null)]),
                (error) => done(["error", String(error)]),
            );"""
        kind, text = self.chrome.execute_async_script(script % expression, args)
        assert kind == "value", text
        return json.loads(text)

    def element(self, name: str) -> WebElement:
        """The page's element with this id."""
        return self.chrome.find_element(By.ID, name)

    def text(self, name: str) -> str:
        """The element's text, every space and line end of it."""
        return str(self.value("document.getElementById(args[0]).textContent", name))

    def choose(self, name: str, option: str) -> None:
        """Chooses an option of a select by its value."""
        Select(self.element(name)).select_by_value(option)

    def type(self, name: str, text: str) -> None:
        """Types into an emptied field."""
        field = self.element(name)
        field.clear()
        field.send_keys(text)

    @property
    def requests(self) -> list[Seen]:
        """What the pages have asked of the network, in order."""
        self._drain()
        asked, ids = self._asked, self._last_event_ids
        return [dataclasses.replace(seen, last_event_id=ids.get(number)) for number, seen in asked.items()]

    @property
    def complaints(self) -> list[str]:
        """The errors and warnings in the pages' consoles, violations of a content security policy included."""
        self._drain()
        return list(self._complaints)

    def _drain(self) -> None:
        for line in self.chrome.get_log("performance"):
            message = json.loads(line["message"])["message"]
            self._note(message["method"], message["params"])
        self._complaints += [line["message"] for line in self.chrome.get_log("browser") if line["level"] != "INFO"]

    def _note(self, method: str, event: dict[str, Any]) -> None:
        if method == "Network.requestWillBeSent" and urlsplit(event["request"]["url"]).scheme in ("http", "https"):
            self._asked[event["requestId"]] = Seen(event["request"]["method"], event["request"]["url"])
        elif method == "Network.requestWillBeSentExtraInfo":  # the headers as they were sent
            headers = {name.lower(): value for name, value in event["headers"].items()}
            self._last_event_ids[event["requestId"]] = headers.get("last-event-id")
        elif method == "Network.responseReceived" and event["requestId"] in self._asked:
            seen = self._asked[event["requestId"]]
            self._asked[event["requestId"]] = dataclasses.replace(seen, status=event["response"]["status"])


class Pages:
    """The static pages of `tests/pages` and what a test adds, on a port of their own: of another origin than the service."""

    def __init__(self) -> None:
        self._server = Server(self._handle)
        self._added: dict[str, bytes] = {}

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop()

    def add(self, name: str, page: str) -> None:
        """Has one more page, of the test's own."""
        self._added[name] = page.encode()

    def down(self) -> None:
        """Refuses connections, and keeps the port."""
        self._server.suspend()

    def up(self) -> None:
        """Is there again after `down`."""
        self._server.start()

    def url(self, name: str, host: str = "localhost") -> str:
        """The address of a page."""
        return f"http://{host}:{self._server.port}/{name}"

    def _handle(self, connection: Connection, request: Request) -> None:
        page = PAGES / urlsplit(request.target).path.removeprefix("/")
        if page.name in self._added:
            connection.reply(200, [("Content-Type", _TYPES[".html"])], _with_its_script(self._added[page.name]))
        elif page.parent == PAGES and page.is_file():
            connection.reply(200, [("Content-Type", _TYPES[page.suffix])], _with_its_script(page.read_bytes()))
        else:
            connection.reply(404, [("Content-Type", "text/plain")], b"no such page")


def _with_its_script(page: bytes) -> bytes:
    """The page in one answer: a script that Chromium once did not get left a page without it."""
    return _SCRIPT.sub(lambda found: b"<script>" + (PAGES / found[1].decode()).read_bytes() + b"</script>", page)


_SCRIPT = re.compile(rb'<script src="([a-z.]+)"></script>')
