"""What a browser makes of the service: the demo page, plain EventSources, and front ends that know nothing of aistream."""

import json
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from gevent.pool import Pool
from selenium.webdriver import ActionChains, Chrome
from selenium.webdriver.common.keys import Keys

from aistream.tokens import Tokens
from tests.browser import FOREIGN, Browser, Pages, Seen
from tests.conftest import make_config, missing
from tests.nasty import BY_NAME, NASTY, differences
from tests.neighbours.provider import ProviderServer
from tests.neighbours.receiver import STARTED, Answer, Receiver
from tests.neighbours.scenarios import HELLO, words
from tests.service import Service

CLOSED = 2
PROMPT = (
    "Hello, naïve café ☕: <b>no</b> <img src=nowhere> markup.\n\n    Indented,   with   spaces. \n"
    + "".join(f"{number} " for number in range(1, 71))
    + "\n\nThe end. "
)
"""What a person types. The echo of it takes longer than a browser takes to come back."""


@pytest.fixture
def browser(chrome: Chrome) -> Iterator[Browser]:
    """The browser, as one test finds and leaves it."""
    browser = Browser(chrome)
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def parked() -> Iterator[tuple[Pages, Receiver]]:
    """Front ends and an n8n that are down; their ports stay theirs, so that a service can be told of them at its start."""
    with Pages() as pages, Receiver() as n8n:
        pages.down()
        n8n.down()
        yield pages, n8n


@pytest.fixture
def pages(parked: tuple[Pages, Receiver]) -> Iterator[Pages]:
    """Front ends of another origin."""
    pages, _ = parked
    pages.up()
    yield pages
    pages.down()


@pytest.fixture
def production_n8n(parked: tuple[Pages, Receiver]) -> Iterator[Receiver]:
    """The n8n that `production` may call."""
    _, n8n = parked
    n8n.up()
    yield n8n
    n8n.down()
    n8n.reset()


@pytest.fixture(scope="module")
def production_process(
    provider_process: ProviderServer, parked: tuple[Pages, Receiver], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    """The process behind `production`."""
    pages, n8n = parked
    port = str(unused_port())
    environ = {
        **provider_process.openai_environ,
        "DEV_MODE": "",
        "PORT": port,
        "BASE_URL": f"http://127.0.0.1:{port}",
        "ALLOWED_ORIGINS": pages.url("", FOREIGN).rstrip("/"),
        "RESUME_URL_ALLOWED_ORIGINS": f"{n8n.origin},http://127.0.0.1:9",
        "SESSION_TTL_SECONDS": "1",
        "REPLAY_SECONDS": "1",
        "MAX_VIEWERS_PER_SESSION": "2",
    }
    service = Service(tmp_path_factory.mktemp("production") / "log", environ)
    service.start()
    yield service
    service.stop()


@pytest.fixture
def production(production_process: Service, provider: ProviderServer) -> Service:
    """A service without DEV_MODE, for a front end at FOREIGN: waits a second for a viewer, lets in two, replays for a second."""
    return production_process


# Texts


@pytest.mark.parametrize("mode", ["text", "json"])
def test_every_nasty_text_arrives_exactly_in_chromium(service: Service, browser: Browser, pages: Pages, mode: str) -> None:
    def start(number: int) -> str:
        model = NASTY[number].model(("gpt", "claude")[number % 2])
        return service.stream_url(model=model, prompt=NASTY[number].prompt, format=mode)

    urls = Pool(8).map(start, range(len(NASTY)))
    browser.open(pages.url("reader.html"))

    heard = dict(zip((nasty.name for nasty in NASTY), browser.value("readAll(args[0])", urls), strict=True))

    expected = {nasty.name: nasty.answer if mode == "json" else nasty.in_text_mode for nasty in NASTY}
    assert differences({name: text(one, mode) for name, one in heard.items()}, expected) == []
    assert [name for name, one in heard.items() if datas(one).count("[DONE]") != 1 or datas(one)[-1] != "[DONE]"] == []
    assert [(one["opened"], one["failures"], one["lost"]) for one in heard.values()] == [(1, [], [])] * len(NASTY)


# A front end that does what the original README describes


@pytest.mark.parametrize("model", ["gpt-test-say-d10", "claude-test-say-d10"])
def test_a_simple_front_end_gets_every_chunk_and_completes_once(
    service: Service, browser: Browser, pages: Pages, model: str
) -> None:
    nasty = BY_NAME["a code block"]
    url = service.stream_url(model=model, prompt=nasty.prompt)
    browser.open(pages.url("frontend.html"))

    browser.value("chat(args[0])", url)

    browser.wait_for("seen.completed")
    seen = browser.value("seen")
    chunks = [event.data for event in service.read(url)]
    assert [*seen.pop("chunks"), "[DONE]"] == chunks and len(chunks) > 2
    assert seen == {"completed": 1, "failed": 0, "data": None, "afterwards": 0}
    assert (browser.text("chat"), browser.text("outcome")) == (nasty.answer, "complete")


@pytest.mark.parametrize(
    ("model", "code", "count"),
    [
        ("gpt-test-cut-k3", "upstream_disconnected", 3),
        ("claude-test-cut-k3", "upstream_disconnected", 3),
        ("gpt-test-error-event-k3", "provider_unavailable", 3),
        ("claude-test-error-event-k3", "provider_overloaded", 3),
        ("claude-test-truncated-k3", "upstream_truncated", 3),
        ("gpt-test-status-s401", "provider_auth_failed", 0),
    ],
)
def test_a_simple_front_end_is_told_of_a_failure_and_never_completes(
    service: Service, n8n: Receiver, browser: Browser, pages: Pages, model: str, code: str, count: int
) -> None:
    url = service.stream_url(model=model, resumeUrl=n8n.url())
    browser.open(pages.url("frontend.html"))

    browser.value("chat(args[0])", url)

    browser.wait_for("seen.failed")
    (callback,) = n8n.wait_for(1)
    seen = browser.value("seen")
    error = json.loads(seen.pop("data"))
    assert "".join(seen.pop("chunks")) == callback.json["answer"] == "".join(words(count))
    assert error == callback.json["error"] and error["code"] == code
    assert seen == {"completed": 0, "failed": 1, "afterwards": 0}
    assert browser.text("outcome") == "failed"
    assert "[DONE]" not in [event.data for event in service.read(url)]


def test_a_failure_in_json_mode_says_its_type_as_well(service: Service, browser: Browser, pages: Pages) -> None:
    url = service.stream_url(model="claude-test-error-event-k2", format="json")
    browser.open(pages.url("reader.html"))

    (heard,) = browser.value("readAll(args[0])", [url])

    ((_, data),) = heard["failures"]
    failure = json.loads(data)
    assert (failure["type"], failure["code"], failure["retryable"]) == ("error", "provider_overloaded", True)
    assert (text(heard, "json"), heard["state"]) == ("".join(words(2)), CLOSED)
    assert "[DONE]" not in datas(heard)


# Lost connections


def test_a_browser_whose_line_broke_comes_back_and_goes_on_at_the_exact_event(
    service: Service, provider: ProviderServer, browser: Browser, pages: Pages
) -> None:
    modes = ("text", "text", "json")
    flowing = service.stream_url(model="claude-test-slow-n60-d50")
    held = [service.stream_url(model=f"gpt-test-hold-n8-k3-i{n}", format=mode) for n, mode in enumerate(modes[1:])]
    urls = [flowing, *held]
    browser.open(pages.url("reader.html"))
    browser.value("args[0].forEach((url) => follow(url))", urls)
    browser.wait_for("followed.every((heard) => heard.messages.some((message) => message[1].includes('word3')))")

    dropped = [httpx.post(f"{service.url}/demo/drop/{session(url)}", verify=False).json() for url in urls]
    browser.wait_for("followed.every((heard) => heard.opened === 2)")
    provider.release()
    browser.wait_for("followed.every((heard) => heard.state === EventSource.CLOSED)")

    heard = browser.value("followed")
    assert dropped == [{"dropped": 1}] * 3
    assert [text(one, mode) for one, mode in zip(heard, modes, strict=True)] == ["".join(words(n)) for n in (60, 8, 8)]
    assert [(one["opened"], len(one["lost"]), one["failures"]) for one in heard] == [(2, 1, [])] * 3
    for url, one in zip(urls, heard, strict=True):
        assert [seen.last_event_id for seen in asked(browser, url)] == [None, *one["lost"]]
        assert one["messages"] == [[event.id, event.data] for event in service.read(url)]
    assert len(provider.requests()) == 3


def test_a_browser_that_comes_back_after_the_ending_is_sent_away_for_good(
    service: Service, browser: Browser, pages: Pages
) -> None:
    urls = [service.stream_url(model=model) for model in ("gpt-test-hello", "claude-test-error-event-k2", "gpt-test-cut-k0")]
    browser.open(pages.url("reader.html"))

    browser.value("args[0].forEach((url) => follow(url, { closes: false }))", urls)

    browser.wait_for("followed.every((heard) => heard.state === EventSource.CLOSED)")
    for url, heard in zip(urls, browser.value("followed"), strict=True):
        last_id, _ = (heard["messages"] + heard["failures"])[-1]
        assert [(seen.status, seen.last_event_id) for seen in asked(browser, url)] == [(200, None), (204, last_id)]
        assert heard["opened"] == 1  # for a browser 204 is no opening
        assert [data for _, data in heard["messages"]] + heard["failures"] == [
            event.data if event.event == "message" else [event.id, event.data] for event in service.read(url)
        ]


def test_a_second_tab_attaches_to_the_running_answer_and_sees_all_of_it(
    service: Service, provider: ProviderServer, browser: Browser, pages: Pages
) -> None:
    model = "gpt-test-hold-n8-k3-i9"
    url = service.stream_url(model=model)
    first = browser.tab
    browser.open(pages.url("reader.html"))
    browser.value("(follow(args[0]), 0)", url)
    browser.wait_for("followed[0].messages.some((message) => message[1].includes('word3'))")

    browser.open_tab(pages.url("reader.html"))
    browser.wait_for("typeof follow === 'function'")  # a tab in the back is given less time to load
    browser.value("(follow(args[0]), 0)", url)
    # What was written before it came is sent in one piece, and makes as many events as it was.
    browser.wait_for("followed[0].messages.some((message) => message[1].includes('word3'))")
    provider.release()

    second_heard = browser.wait_for("followed[0].state === EventSource.CLOSED && followed[0]")
    browser.show(first)
    first_heard = browser.wait_for("followed[0].state === EventSource.CLOSED && followed[0]")
    assert text(first_heard, "text") == "".join(words(8))
    assert second_heard == first_heard
    assert len(provider.requests(model)) == 1


# Refusals


def test_a_browser_with_a_valid_token_gets_the_reason_and_is_then_sent_away(
    production: Service, production_n8n: Receiver, browser: Browser, pages: Pages
) -> None:
    # What is still owed to n8n is kept, so that of the two only the answered one is over.
    production_n8n.always(lambda received: Answer(503) if received.path == "/expired" else STARTED)
    over = production.stream_url(model="gpt-test-hello", resumeUrl=production_n8n.url("/over"))
    expired = production.stream_url(model="gpt-test-hello", resumeUrl=production_n8n.url("/expired"))
    production.read(over)
    wait_until(lambda: httpx.get(over, verify=False).status_code == 410)
    (told, *_) = production_n8n.wait_for(1, path="/expired", timeout=10)
    assert told.json["status"] == "expired"
    browser.open(pages.url("reader.html", FOREIGN))

    urls = [expired, expired + "&format=json", over, over + "&format=json"]
    browser.value("args[0].forEach((url) => follow(url, { closes: false }))", urls)
    browser.wait_for("followed.every((heard) => heard.state === EventSource.CLOSED)")

    heard = browser.value("followed")
    failures = [[json.loads(data) for _, data in one["failures"]] for one in heard]
    assert [[failure["code"] for failure in one] for one in failures] == [["expired"]] * 2 + [["replay_over"]] * 2
    assert [failure["retryable"] for one in failures for failure in one] == [False] * 4
    assert ["type" in failure for one in failures for failure in one] == [False, True] * 2
    assert [one["messages"] for one in heard] == [[]] * 4
    for url, one in zip(urls, heard, strict=True):
        last_id = one["failures"][0][0]
        assert [(seen.status, seen.last_event_id) for seen in asked(browser, url)] == [(200, None), (204, last_id)]


def test_a_browser_that_is_one_too_many_waits_for_a_place_and_gets_it(
    production: Service, provider: ProviderServer, browser: Browser, pages: Pages
) -> None:
    url = production.stream_url(model="gpt-test-hold-n4-k2")
    browser.open(pages.url("reader.html", FOREIGN))

    with production.watch(url) as one, production.watch(url) as two:
        assert next(one) == next(two)
        browser.value("(follow(args[0]), 0)", url)
        browser.wait_for("followed[0].opened === 1")
        assert browser.value("followed[0].messages") == []
    browser.wait_for("followed[0].messages.length === 2")
    provider.release()

    heard = browser.wait_for("followed[0].state === EventSource.CLOSED && followed[0]")
    assert text(heard, "text") == "".join(words(4))
    assert (heard["opened"], heard["lost"], heard["failures"]) == (1, [], [])


def test_a_browser_without_a_valid_token_or_stream_does_not_come_back(
    service: Service, browser: Browser, pages: Pages, session_id: str
) -> None:
    url = service.stream_url()
    bare, token = url.split("?")
    unknown = Tokens(make_config(), time.time).sign_viewer(session_id, int(time.time()) + 60)
    refused = {
        bare: 401,
        url[:-2]: 401,
        f"{service.url}/stream/{session_id}?{token}": 404,
        f"{service.url}/stream/{session_id}?access_token={unknown}": 404,
    }
    browser.open(pages.url("reader.html"))

    heard = browser.value("readAll(args[0])", list(refused))

    assert [(one["opened"], one["messages"], one["failures"], one["lost"]) for one in heard] == [(0, [], [], [None])] * 4
    assert [one["state"] for one in heard] == [CLOSED] * 4
    assert {seen.url: seen.status for seen in browser.requests if "/stream/" in seen.url} == refused


# Origins


def test_a_page_of_an_unknown_origin_hears_nothing(service: Service, browser: Browser, pages: Pages) -> None:
    url = service.stream_url(model="gpt-test-hello")
    browser.open(pages.url("reader.html", FOREIGN))

    (heard,) = browser.value("readAll(args[0])", [url])

    assert (heard["opened"], heard["messages"], heard["failures"], heard["state"]) == (0, [], [], CLOSED)
    assert any("CORS policy" in complaint for complaint in browser.complaints)


def test_in_production_only_the_configured_origin_hears_anything(production: Service, browser: Browser, pages: Pages) -> None:
    url = production.stream_url(model="gpt-test-hello")

    browser.open(pages.url("reader.html", FOREIGN))
    (ours,) = browser.value("readAll(args[0])", [url])
    browser.open(pages.url("reader.html"))
    (theirs,) = browser.value("readAll(args[0])", [url])
    browser.open(production.url + "/")

    assert text(ours, "text") == "".join(HELLO)
    assert (theirs["opened"], theirs["messages"]) == (0, [])
    assert [seen.status for seen in asked(browser, production.url + "/")] == [404]  # the demo page exists in DEV_MODE only


# The demo page


def test_a_person_watches_an_answer_cuts_the_line_sees_it_go_on_and_sees_the_callback(service: Service, browser: Browser) -> None:
    open_demo(browser, service)
    browser.type("prompt", PROMPT)

    browser.element("start").click()
    browser.wait_for(f"{shown('status')}.dataset.state === 'streaming' && {shown('rendered')}.textContent")
    browser.element("cut").click()
    browser.wait_for(f"{shown('status')}.dataset.state === 'reconnecting'")
    at_cut = exact_text(browser)
    browser.wait_for("document.getElementById('wire-log').textContent.includes('attempt 1 failed')")
    while_cut = exact_text(browser)
    was_on = browser.element("cut").get_attribute("aria-checked")
    browser.element("cut").click()
    browser.wait_for(f"{shown('reconnects')}.textContent === '1'")
    browser.wait_for(f"{shown('status')}.dataset.state === 'done'")
    callback = json.loads(browser.wait_for("document.getElementById('callback').textContent"))

    assert PROMPT.startswith(at_cut) and while_cut == at_cut != PROMPT
    assert exact_text(browser) == callback["answer"] == callback["prompt"] == PROMPT
    assert callback["status"] == "completed"
    assert browser.element("callback-state").get_attribute("data-state") == "same"
    assert browser.element("callback").is_displayed()
    mark = browser.value(f"({{ ...{shown('exact')}.querySelector('.resumed').dataset }})")
    assert utf16(at_cut) == int(mark["at"])
    assert re.fullmatch(r"resumed here, [1-9]\d* characters caught up", mark["label"])
    assert (was_on, browser.element("cut").get_attribute("aria-checked")) == ("true", "false")
    noted = browser.text("wire-log")
    for line in (
        "POST demo/start",
        "the line is cut after id 1-",
        "connection lost after id 1-",
        "connected again, behind id 1-",
    ):
        assert line in noted
    assert "callback arrived" in noted
    streams = [seen.url for seen in browser.requests if "/stream/" in seen.url]
    assert ["last_event_id=1-" in url for url in streams] == [False, True]  # the refused ones reached no network
    assert_harmless(browser, service)


def test_a_person_stops_an_answer_and_sees_that_n8n_gets_the_part(service: Service, browser: Browser) -> None:
    open_demo(browser, service)
    browser.type("prompt", PROMPT)

    browser.element("start").click()
    browser.wait_for(f"{shown('rendered')}.textContent")
    browser.element("stop").click()
    browser.wait_for(f"{shown('status')}.dataset.state === 'cancelled'")

    callback = json.loads(browser.wait_for("document.getElementById('callback').textContent"))
    part = exact_text(browser)
    assert callback["status"] == "cancelled" and part == callback["answer"]
    assert PROMPT.startswith(part) and part != PROMPT
    assert not browser.element("stop").is_enabled() and not browser.element("cut").is_enabled()
    assert_harmless(browser, service)


def test_a_second_viewer_sees_the_answer_from_its_beginning_while_the_first_ones_line_is_cut(
    service: Service, provider: ProviderServer, browser: Browser
) -> None:
    open_demo(browser, service, "gpt-test-hold-n8-k3")

    browser.element("start").click()
    browser.wait_for(f"{shown('rendered')}.textContent.includes('word3')")
    browser.element("cut").click()
    browser.element("second").click()
    browser.wait_for(f"{shown('rendered', 2)}.textContent.includes('word3')")
    provider.release()
    browser.wait_for(f"{shown('status', 2)}.dataset.state === 'done'")
    states = browser.value(f"[1, 2].map((n) => {shown('status', '${n}')}.dataset.state)")
    texts = exact_text(browser), exact_text(browser, 2)
    browser.element("cut").click()
    browser.wait_for(f"{shown('status')}.dataset.state === 'done'")

    assert states == ["reconnecting", "done"]
    assert texts == ("".join(words(3)), "".join(words(8)))
    assert exact_text(browser) == "".join(words(8))
    assert "second viewer: connected" in browser.text("wire-log")
    assert len(provider.requests()) == 1
    browser.element("second").click()
    assert browser.value("document.querySelectorAll('.viewer').length") == 1
    browser.element("second").click()  # also when it is over: it is shown again
    browser.wait_for(f"{shown('status', 2)}.dataset.state === 'done'")
    assert exact_text(browser, 2) == "".join(words(8))
    assert_harmless(browser, service)


HOSTILE = """<script>alert(1)</script> <img src=x onerror=alert(2)> <b>bold</b> <style>*{display:none}</style>

<iframe src="https://evil.test/frame"></iframe>
<svg onload=alert(3)>

![a picture](https://evil.test/pixel.png "title") ![data](data:image/png;base64,AAAA) [![nested](https://evil.test/n.png)](https://evil.test/n)

[js](javascript:alert(4)) [JS](JaVaScRiPt:alert(5)) [tab](java&#x09;script:alert(6)) [vb](vbscript:alert(7))
[data](data:text/html,<script>alert(8)</script>) [file](file:///etc/passwd) [relative](/operator)
[proto](//evil.test/p) [frame](#stop)

[good](https://good.test/a?b=c&d "title") <mailto:someone@good.test> https://good.test/auto <javascript:alert(9)> www.evil.test

[ref] and "quotes" ' `<i>code</i>`

[ref]: javascript:alert(10)

```html" onmouseover="alert(11)
<script>alert(12)</script>
```

| a | b |
|:-:|--:|
| <u>1</u> | [x](javascript:alert(13)) |
"""


def test_an_answer_is_rendered_as_markdown_and_can_do_nothing_else(service: Service, browser: Browser) -> None:
    open_demo(browser, service)
    browser.value("(document.getElementById('prompt').value = args[0])", HOSTILE)

    browser.element("start").click()
    browser.wait_for("document.getElementById('callback-state').dataset.state === 'same'")

    tags = set(browser.value(f"Array.from({shown('rendered')}.querySelectorAll('*'), (element) => element.localName)"))
    assert tags <= {"p", "a", "code", "pre", "div", "button", "table", "thead", "tbody", "tr", "th", "td"}
    assert {"a", "pre", "code", "td"} <= tags
    attributes = f"Array.from({shown('rendered')}.querySelectorAll('*'), (element) => element.getAttributeNames()).flat()"
    assert not {name for name in browser.value(attributes) if name.startswith("on") or name in ("style", "src", "id")}
    links = browser.value(
        f"Array.from({shown('rendered')}.querySelectorAll('a'), (a) => [a.getAttribute('href'), a.target, a.rel])"
    )
    assert {target for target, *_ in links} == {
        "https://evil.test/frame",  # a person may follow it: nothing has
        "https://evil.test/pixel.png",
        "https://evil.test/n",
        "https://good.test/a?b=c&d",
        "mailto:someone@good.test",
        "https://good.test/auto",
    }
    assert {tuple(rest) for _, *rest in links} == {("_blank", "noopener noreferrer nofollow")}
    assert "<script>alert(1)</script> <img src=x" in browser.value(f"{shown('rendered')}.textContent")
    assert exact_text(browser) == HOSTILE
    assert_harmless(browser, service)


GROWING = (
    "# Title\n\nA *soft*\nline with **bo\nld** and `code`.\n\n- one\n- two\n\n  more\n    - three\n\n1. first\n\n\n2. second\n",
    "text\n===\n\n> quoted\nlazy\n\n> again\n\n---\n\n    indented\n\n    code\n\nafter",
    "```js\nlet a = 1;\n\n# no title\n```\nbehind\n~~~\nnever closed\n\n- no list",
    "| a | b |\n|---|---|\n| 1 | 2 |\n| 3 | 4 |\nend\n\n| not a table\n",
    "windows\r\n\r\nlines\r\n- a\r\n- b\r\n\r\nend\ralone\0null",
    "[later] and [sooner]\n\n[sooner]: https://a.test\n\nmore [sooner] [later]\n\n[later]: https://b.test\n\nend",
    "[early]: https://a.test\n'title\n\nno title'\n\n[early] is used",
    "naïve ☕ 👩‍👩‍👧 e\u0301\n\n* * *\n\n\n\n",
    "",
)


def test_markdown_that_grows_is_in_the_end_what_one_rendering_makes_of_it(service: Service, browser: Browser) -> None:
    texts = [*GROWING, HOSTILE, *(nasty.answer for nasty in NASTY if len(nasty.answer) < 1000)]
    browser.open(service.url + "/")

    grown = browser.value(
        """import("./static/demo/markdown.js").then(({ MarkdownView, markdown }) => {
            const plain = (element) => {
                for (const box of element.querySelectorAll(".code-block")) box.replaceWith(box.querySelector("pre"));
                for (const pre of element.querySelectorAll("pre")) {
                    for (const name of pre.getAttributeNames()) pre.removeAttribute(name);
                }
                return element.innerHTML.replace('<div class="live">', "").replace(/<\\/div>$/, "");
            };
            const whole = (text) => {
                const element = document.createElement("div");
                element.innerHTML = markdown.render(text);
                return plain(element);
            };
            return args[0].flatMap((text) => [1, 2, 7].map((step) => {
                const element = document.createElement("div");
                const view = new MarkdownView(element);
                const wrong = [];
                for (let end = 0; end < text.length; end += step) {
                    view.update(text.slice(0, end));
                    if (plain(element.cloneNode(true)) !== whole(text.slice(0, end))) wrong.push(end);
                }
                view.finish(text);
                return [wrong, plain(element.cloneNode(true)) === whole(text)];
            }));
        })""",
        texts,
    )

    assert [texts[at // 3] for at, (_, same) in enumerate(grown) if not same] == []
    # On the way a link's definition that is still to come is the one thing that may be missing.
    assert [(texts[at // 3], wrong) for at, (wrong, _) in enumerate(grown) if wrong and "]: " not in texts[at // 3]] == []


@pytest.mark.parametrize("model", ["gpt-test-slow-n40-d50", "claude-test-slow-n40-d50"])
def test_the_tokens_per_second_are_an_estimate_until_the_provider_has_counted(
    service: Service, browser: Browser, model: str
) -> None:
    open_demo(browser, service, model)

    browser.element("start").click()
    estimate = browser.wait_for(f"{shown('rate')}.textContent.startsWith('≈') && {shown('rate')}.textContent")
    note = browser.value(f"{shown('rate-note')}.textContent")
    browser.wait_for(f"{shown('status')}.dataset.state === 'done'")
    callback = json.loads(browser.wait_for("document.getElementById('callback').textContent"))

    assert re.fullmatch(r"≈ [\d,.]+", estimate) and note.startswith("estimated")
    assert re.fullmatch(r"[\d,.]+", browser.value(f"{shown('rate')}.textContent"))
    visible = callback["output_tokens"] - callback.get("reasoning_tokens", 0)
    assert browser.value(f"{shown('rate-note')}.textContent") == f"of {visible} that the provider counted"
    assert re.fullmatch(r"[\d,.]+ m?s", browser.value(f"{shown('first-text')}.textContent"))
    assert browser.value(f"{shown('plot-line')}.getAttribute('d')").count("L") >= 3
    assert "at most" in browser.value(f"{shown('plot')}.getAttribute('aria-label')")


def test_the_demo_page_is_used_by_keyboard_alone(service: Service, provider: ProviderServer, browser: Browser) -> None:
    open_demo(browser, service, "gpt-test-hold-n8-k3")

    browser.element("prompt").send_keys(Keys.CONTROL, Keys.ENTER)
    browser.wait_for(f"{shown('rendered')}.textContent.includes('word3')")
    reached = tab_through(browser)
    browser.element("cut").send_keys(Keys.SPACE)
    browser.wait_for(f"{shown('status')}.dataset.state === 'reconnecting'")
    browser.element("cut").send_keys(Keys.SPACE)
    browser.wait_for(f"{shown('reconnects')}.textContent === '1'")
    browser.element("cut").send_keys(Keys.ESCAPE)
    browser.wait_for(f"{shown('status')}.dataset.state === 'cancelled'")

    assert [name for name in reached if name in ("prompt", "model", "start", "second", "cut", "stop")] == [
        "prompt",
        "model",
        "start",
        "second",
        "cut",
        "stop",
    ]
    assert {"wire-log", "curl", "tab-client"} <= set(reached) and "tab-await" not in reached
    tab = browser.element("tab-client")
    for key, chosen in ((Keys.ARROW_RIGHT, "await"), (Keys.END, "source"), (Keys.ARROW_RIGHT, "client")):
        tab.send_keys(key)
        tab = browser.chrome.switch_to.active_element
        assert (tab.get_attribute("id"), tab.get_attribute("aria-selected")) == (f"tab-{chosen}", "true")
        panels = browser.value("Array.from(document.querySelectorAll('[role=tabpanel]:not([hidden])'), ({ id }) => id)")
        assert panels == [f"code-{chosen}"]
    assert_harmless(browser, service)


WIDE = f"{'unbreakable' * 30}\n\n| {' | '.join('abcdefghijkl')} |\n|{'---|' * 12}\n\n```\n{'long line ' * 40}\n```\n"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_the_demo_page_fits_a_phone_and_reads_well_for_everybody(
    service: Service, browser: Browser, width: int, dark: bool
) -> None:
    axe = Path(sys.prefix, "npm", "node_modules", "axe-core", "axe.min.js")
    if not axe.exists():
        missing("axe-core")
    browser.device(width, 800, dark=dark)
    open_demo(browser, service)
    browser.value("(document.getElementById('prompt').value = args[0])", WIDE)
    sideways = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    before = browser.value(sideways), browser.violations(axe.read_text())

    browser.element("start").click()
    browser.wait_for("!document.getElementById('second').disabled")
    browser.element("second").click()
    browser.wait_for(f"{shown('status')}.dataset.state === 'done' && {shown('status', 2)}.dataset.state === 'done'")
    browser.wait_for("document.getElementById('callback-state').dataset.state === 'same'")

    assert before == (0, [])
    assert (browser.value(sideways), browser.violations(axe.read_text())) == (0, [])
    tops = browser.value("Array.from(document.querySelectorAll('.viewer'), (one) => one.getBoundingClientRect().top)")
    assert (tops[0] == tops[1]) == (width == 1280)  # side by side, or one under the other
    assert browser.value("matchMedia('(prefers-color-scheme: dark)').matches") == dark


def test_the_demo_page_shows_what_is_wrong_beside_the_field(service: Service, browser: Browser) -> None:
    open_demo(browser, service)
    browser.element("prompt").clear()

    browser.element("start").click()

    problem = browser.wait_for("document.getElementById('prompt-problem').textContent")
    assert browser.element("prompt-problem").is_displayed() and "at least 1 character" in problem
    assert browser.element("prompt").get_attribute("aria-invalid") == "true"
    assert browser.element("prompt") == browser.chrome.switch_to.active_element
    assert not browser.element("model-problem").is_displayed()
    assert not [seen for seen in browser.requests if "/stream/" in seen.url]
    assert browser.text("start") == "Start"  # nothing has been started
    browser.type("prompt", "Better.")
    browser.element("start").click()
    browser.wait_for(f"{shown('status')}.dataset.state === 'done'")
    assert browser.text("start") == "Start again"
    assert not browser.element("prompt-problem").is_displayed()
    assert exact_text(browser) == "Better."


def test_the_demo_page_says_why_an_answer_failed_and_what_n8n_was_told(service: Service, browser: Browser) -> None:
    open_demo(browser, service, "gpt-test-cut-k3")

    browser.element("start").click()

    browser.wait_for(f"{shown('status')}.dataset.state === 'failed'")
    callback = json.loads(browser.wait_for("document.getElementById('callback').textContent"))
    assert "upstream_disconnected" in browser.value(f"{shown('status')}.textContent")
    assert exact_text(browser) == callback["answer"] == "".join(words(3))
    assert (callback["status"], callback["error"]["code"]) == ("failed", "upstream_disconnected")
    assert_harmless(browser, service)


def test_the_demo_page_offers_the_models_of_the_configured_providers(service: Service, browser: Browser) -> None:
    open_demo(browser, service)

    models = httpx.get(f"{service.url}/demo/models", verify=False).json()["models"]
    offered = browser.value("Array.from(document.getElementById('model').options, (option) => option.value)")
    assert offered == [model["id"] for model in models]
    assert {model["provider"] for model in models} == {"openai", "anthropic", "echo"}


# Helpers


def datas(heard: dict[str, Any]) -> list[str]:
    """The data of the messages that an EventSource got."""
    return [data for _, data in heard["messages"]]


def text(heard: dict[str, Any], mode: str) -> str:
    """The answer that they carry."""
    told = [data for data in datas(heard) if data != "[DONE]"]
    if mode == "text":
        return "".join(told)
    return "".join(event["text"] for event in map(json.loads, told) if event["type"] == "text")


def session(url: str) -> str:
    """The session's id in a stream's address."""
    return urlsplit(url).path.rpartition("/")[2]


def asked(browser: Browser, url: str) -> list[Seen]:
    """The browser's requests for exactly this address."""
    return [seen for seen in browser.requests if seen.url == url]


def unused_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def wait_until(condition: Callable[[], bool], timeout: float = 10.0) -> None:
    """Polls; AssertionError after `timeout` seconds."""
    until = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < until, f"not within {timeout} s"
        time.sleep(0.05)


def test_the_page_of_the_api_shows_every_operation_and_asks_nobody_else(service: Service, browser: Browser) -> None:
    document = httpx.get(f"{service.url}/openapi.json", timeout=10).json()
    operations = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}

    browser.open(service.url + "/")
    browser.value("document.querySelector('footer a').click()")
    shown = browser.wait_for("[...document.querySelectorAll('[data-path]')].map(({dataset: d}) => [d.method, d.path])")

    assert {tuple(one) for one in shown} == {*operations, ("POST", "{$request.body#/resumeUrl}")}
    assert set(document["components"]["schemas"]) == set(
        browser.value("[...document.querySelectorAll('.schema h3')].map((title) => title.textContent)")
    )
    assert (
        browser.value("[...document.querySelectorAll('a[href^=\"#\"]')].filter((a) => !document.querySelector(a.hash)).length")
        == 0
    )
    assert browser.value("document.documentElement.scrollWidth <= innerWidth")
    assert browser.value("getComputedStyle(document.querySelector('.operation')).borderRadius") != "0px"  # its style is there
    assert_harmless(browser, service)


def open_demo(browser: Browser, service: Service, model: str = "echo") -> None:
    """Opens the demo page as a person would, and chooses the model; one that is not offered is put into the list."""
    browser.open(service.url + "/")
    browser.wait_for("document.getElementById('model').options.length > 1")
    if model != "echo":
        browser.value("document.getElementById('model').add(new Option(args[0], args[0]))", model)
    browser.choose("model", model)


def shown(part: str, viewer: int | str = 1) -> str:
    """JavaScript for the part of this name of the first or second viewer."""
    return f"""document.querySelector(`#viewer-{viewer} [data-part="{part}"]`)"""


def exact_text(browser: Browser, viewer: int = 1) -> str:
    """What the viewer shows as text. The choice stays as it was."""
    return str(
        browser.value(
            f"""[...document.querySelectorAll("[name=view]")].reduceRight((text, choice) => {{
                choice.click();
                return text ?? {shown("exact", viewer)}.textContent;
            }}, null)"""
        )
    )


def tab_through(browser: Browser) -> list[str]:
    """The ids of what the tab key reaches on the page, in order; "" for what has none."""
    rounds: list[list[str]] = [[]]
    while len(rounds) < 3:  # the first one begins somewhere
        ActionChains(browser.chrome).send_keys(Keys.TAB).perform()
        if browser.value("document.activeElement === document.body"):
            rounds.append([])
        else:
            rounds[-1].append(str(browser.value("document.activeElement.id")))
        assert len(rounds[-1]) < 100, rounds
    return rounds[1]


def utf16(text: str) -> int:
    """The length of a text as JavaScript has it."""
    return len(text.encode("utf-16-le")) // 2


def assert_harmless(browser: Browser, service: Service) -> None:
    """The page spoke to its own origin alone, and neither broke nor tried what its policy forbids."""
    assert {seen.origin for seen in browser.requests} == {service.url}
    assert browser.complaints == []
