"""The browser client in Chromium and in Firefox, against the real service, behind a proxy that does what networks do."""

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from typing import Any

import pytest

from tests import firefox
from tests.browser import PAGES, Browser, Pages, Tab
from tests.conftest import missing
from tests.nasty import NASTY, differences
from tests.neighbours.faulty import Cut, Fault, FaultyProxy, Pass, Says, Silent
from tests.neighbours.provider import ProviderServer
from tests.neighbours.receiver import Receiver
from tests.neighbours.scenarios import THOUGHTS, words
from tests.service import Service, session_in, wait_until

#: In all browsers what they are asked to do is the same.
BROWSERS = ["chromium", "firefox"]
#: Delays a person need not wait for: the client's own are half a second at least, and doubled.
WAITS = 30.0


@pytest.fixture(scope="session")
def tabs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Tab]]:
    """Gives a tab of a browser, which is started when it is first asked for."""
    with ExitStack() as stack:

        @cache
        def of_firefox() -> Tab:
            program = firefox.program() or missing("firefox-esr")
            return stack.enter_context(firefox.firefox(program, tmp_path_factory.mktemp("firefox")))

        yield lambda name: of_firefox() if name == "firefox" else Browser(request.getfixturevalue("chrome"))


@pytest.fixture(params=BROWSERS)
def tab(request: pytest.FixtureRequest, tabs: Callable[[str], Tab]) -> Iterator[Tab]:
    """A tab of one browser, as a test finds and leaves it."""
    tab = tabs(request.param)
    yield tab
    tab.close()


@pytest.fixture
def pages() -> Iterator[Pages]:
    """Front ends of another origin than the service, one that it allows."""
    with Pages() as pages:
        yield pages


@pytest.fixture
def proxy(service: Service) -> Iterator[FaultyProxy]:
    """Between the browser and the service."""
    with FaultyProxy(service.port) as proxy:
        yield proxy


@pytest.fixture
def page(tab: Tab, pages: Pages, proxy: FaultyProxy) -> Tab:
    """The front end with the client loaded, from the service and through the proxy."""
    tab.open(pages.url("client.html"))
    tab.value("load(args[0])", proxy.url)
    return tab


@pytest.fixture
def same_origin(tab: Tab, proxy: FaultyProxy) -> Tab:
    """A front end behind the same proxy as the service: it may see what the proxy itself answers."""
    tab.open(proxy.url + "/aistream.mjs")  # any page of that origin
    code = (PAGES / "client.js").read_text().replace('"use strict";', "")
    tab.value("document.documentElement.append(Object.assign(document.createElement('script'), { text: args[0] }))", code)
    tab.value("load('')")
    return tab


def over(tab: Tab, number: int = 0) -> dict[str, Any]:
    """What a stream has told until its end."""
    heard: dict[str, Any] = tab.wait_for("watched[args[0]].over && told(args[0])", number, timeout=WAITS)
    return heard


def assert_whole(heard: dict[str, Any], text: str) -> None:
    """Every character once, and one ending."""
    assert heard["text"] == text
    assert (len(heard["completed"]), heard["failed"]) == (1, [])
    assert heard["completed"][0]["status"] == "completed"


# The call of the first README


def test_the_call_of_the_first_readme_works_unchanged(page: Tab, service: Service, proxy: FaultyProxy) -> None:
    proxy.faults.extend([Cut(400), Says(502)])

    page.value("(chat(args[0]), 0)", proxy.through(service.stream_url(model="gpt-test-long-n30-d20")))
    page.wait_for("seed.saved.length", timeout=WAITS)

    assert page.value("seed") == {"shown": "".join(words(30)), "errors": [], "saved": ["".join(words(30))], "cleanup": None}


def test_its_cleanup_ends_the_connection_without_a_word(
    page: Tab, service: Service, provider: ProviderServer, proxy: FaultyProxy
) -> None:
    url = service.stream_url(model="gpt-test-hold-n4-k2")
    page.value("(seed.cleanup = chat(args[0]), 0)", proxy.through(url))
    page.wait_for("seed.shown")

    page.value("(seed.cleanup(), 0)")
    provider.release()

    wait_until(lambda: service.get(f"/sessions/{session_in(url)}").json()["status"] == "completed")
    assert page.value("[seed.errors, seed.saved]") == [[], []]
    assert len(proxy.watched) == 1


# Faults

FAULTS: dict[str, list[Fault]] = {
    "nothing": [],
    "cut before the first byte": [Cut(0), Cut(0)],
    "reset in the middle": [Cut(700)],
    "an end of the line in the middle": [Cut(700, polite=True)],
    "cut again and again": [Cut(count) for count in (300, 301, 302, 303)],
    "a balancer's 502 and 503": [Says(502), Cut(500), Says(503)],
    "a 429 with Retry-After": [Says(429, (("Retry-After", "1"),))],
    "a captive portal": [Cut(300), Says(200)],
    "a late answer": [Pass(delay=0.5)],
    "one byte at a time": [Pass(lump=1)],
    "large lumps": [Pass(lump=900)],
    "silence": [Silent(500), Silent(0)],
}


@pytest.mark.parametrize("faults", list(FAULTS))
def test_whatever_becomes_of_the_line_every_character_arrives_once(
    page: Tab, service: Service, proxy: FaultyProxy, faults: str
) -> None:
    proxy.faults.extend(FAULTS[faults])

    page.value("(watch(args[0], { silence: 2000 }), 0)", proxy.through(service.stream_url(model="gpt-test-long-n30-d20")))

    heard = over(page)
    assert_whole(heard, "".join(words(30)))
    assert len(proxy.watched) == len(heard["lost"]) + 1
    assert not proxy.faults
    assert [request.method for request in proxy.requests if request.method == "OPTIONS"] == []


def test_a_refused_connection_is_tried_until_somebody_is_there(page: Tab, service: Service, proxy: FaultyProxy) -> None:
    page.value("(watch(args[0]), 0)", proxy.through(service.stream_url(model="gpt-test-long-n60-d30")))
    page.wait_for("watched[0].text.length > 20")

    proxy.refuse()
    page.wait_for("watched[0].lost.length >= 3", timeout=WAITS)
    proxy.accept()

    heard = over(page)
    assert_whole(heard, "".join(words(60)))
    assert [lost["attempt"] for lost in heard["lost"]] == list(range(1, len(heard["lost"]) + 1))
    # Half of a delay is chance: each is at least half of its longest, which doubles.
    assert all(lost["delay"] >= min(10_000, 500 * 2**number) / 2 for number, lost in enumerate(heard["lost"]))
    assert heard["opened"][-1] == {"reconnects": 1, "lastEventId": heard["lost"][-1]["lastEventId"]}


def test_a_seeded_plan_of_many_faults_loses_and_doubles_nothing(page: Tab, service: Service, proxy: FaultyProxy) -> None:
    dice = random.Random(8)
    makers: list[Callable[[], Fault]] = [
        lambda: Cut(dice.randrange(900)),
        lambda: Cut(dice.randrange(900), polite=True),
        lambda: Pass(lump=dice.choice([1, 7, 64])),
    ]
    streams = [proxy.through(service.stream_url(model="claude-test-long-n60-d15")) for _ in range(5)]
    proxy.faults.extend(dice.choice(makers)() for _ in range(15))

    page.value("args[0].forEach((url) => void watch(url))", streams)

    for number in range(len(streams)):
        assert_whole(over(page, number), "".join(words(60)))


def test_every_nasty_text_is_exact_when_it_comes_byte_by_byte_over_cut_lines(
    page: Tab, service: Service, proxy: FaultyProxy
) -> None:
    chosen = [nasty for nasty in NASTY if len(nasty.answer) < 5_000]
    models = [one.model(("gpt", "claude")[number % 2]) for number, one in enumerate(chosen)]
    urls = [service.stream_url(model=model, prompt=one.prompt) for model, one in zip(models, chosen, strict=True)]
    proxy.faults.extend([Cut(230), Pass(lump=1), Cut(260, polite=True), Pass(lump=3)] * len(chosen))

    streams = [proxy.through(url) for url in urls]
    page.value("(watchAll(args[0]), 0)", streams)
    page.wait_for("watched.length === args[0] && watched.every(({ over }) => over)", len(urls), timeout=60)

    heard = {chosen[streams.index(one["url"])].name: one for one in page.value("watched.map((_, number) => told(number))")}
    assert differences({name: one["text"] for name, one in heard.items()}, {one.name: one.answer for one in chosen}) == []
    assert [name for name, one in heard.items() if len(one["completed"]) != 1 or one["failed"]] == []


def test_a_line_that_died_in_a_sleep_is_noticed_and_the_answer_goes_on(
    page: Tab, service: Service, provider: ProviderServer, proxy: FaultyProxy
) -> None:
    """A silent line is all that a page sees of its machine's sleep. Firefox cannot be asked to freeze a page, Chromium can."""
    proxy.faults.append(Silent(500))
    page.value("(watch(args[0], { silence: 1500 }), 0)", proxy.through(service.stream_url(model="gpt-test-long-n40-d10")))

    heard = over(page)

    assert_whole(heard, "".join(words(40)))
    assert [lost["reason"] for lost in heard["lost"]] == ["silent"]


@pytest.fixture
def chromium_page(tabs: Callable[[str], Tab], pages: Pages, proxy: FaultyProxy) -> Iterator[Browser]:
    """`page` where Chromium alone can be asked to do what the test needs."""
    tab = tabs("chromium")
    assert isinstance(tab, Browser)
    tab.open_tab(pages.url("client.html"))  # one that was frozen draws no more, whatever is opened in it later
    tab.value("load(args[0])", proxy.url)
    yield tab
    tab.close()


def test_a_page_that_was_frozen_while_its_line_died_goes_on_when_it_wakes(
    chromium_page: Browser, service: Service, proxy: FaultyProxy
) -> None:
    page, url = chromium_page, service.stream_url(model="gpt-test-long-n60-d20")
    page.value(
        "(window.states = [], ['freeze', 'resume'].map((name) => document.addEventListener(name, () => states.push(name))), 0)"
    )
    page.value("(watch(args[0]), 0)", proxy.through(url))
    page.wait_for("watched[0].text.length > 20")

    with page.asleep():
        proxy.refuse()
        wait_until(lambda: service.get(f"/sessions/{session_in(url)}").json()["status"] == "completed")
        proxy.accept()

    heard = over(page)
    assert_whole(heard, "".join(words(60)))
    assert page.value("states") == ["freeze", "resume"]
    assert heard["lost"] and len(proxy.watched) > 1


def test_a_page_that_was_offline_goes_on_when_the_network_is_back(
    chromium_page: Browser, service: Service, proxy: FaultyProxy
) -> None:
    page, url = chromium_page, service.stream_url(model="gpt-test-long-n60-d20")
    page.value("(watch(args[0]), 0)", proxy.through(url))
    page.wait_for("watched[0].text.length > 20")

    with page.offline():
        proxy.cut()
        page.wait_for("watched[0].lost.length")
        wait_until(lambda: service.get(f"/sessions/{session_in(url)}").json()["status"] == "completed")
        offline = page.value("[navigator.onLine, told(0).text.length]")

    heard = over(page)
    assert_whole(heard, "".join(words(60)))
    assert offline[0] is False and offline[1] < len(heard["text"])


def test_a_waiting_client_goes_on_at_once_when_the_browser_is_online_again(
    page: Tab, service: Service, proxy: FaultyProxy
) -> None:
    page.value("(watch(args[0]), 0)", proxy.through(service.stream_url(model="gpt-test-long-n40-d30")))
    page.wait_for("watched[0].text.length > 20")
    proxy.refuse()
    page.wait_for("watched[0].lost.length >= 4", timeout=WAITS)
    proxy.accept()

    page.value("(dispatchEvent(new Event('online')), 0)")

    heard = over(page)
    assert_whole(heard, "".join(words(40)))
    assert len(heard["lost"]) == 4


# What a plain EventSource makes of it


@pytest.mark.parametrize("fault", ["502", "refused"])
def test_where_a_plain_event_source_gives_up_the_client_goes_on(
    page: Tab, service: Service, proxy: FaultyProxy, fault: str, request: pytest.FixtureRequest
) -> None:
    if fault == "refused" and "chromium" in request.node.callspec.id:
        fault = "502"  # Chromium comes back to a refused connection by itself
    url = proxy.through(service.stream_url(model="gpt-test-long-n30-d30"))
    if fault == "502":
        proxy.faults.extend([Cut(300), Cut(300), *[Says(502)] * 2])
    page.value("(plain(args[0]), watch(args[0]), 0)", url)
    if fault == "refused":
        page.wait_for("watched[1].text.length > 20")
        proxy.refuse()
        page.wait_for("watched[0].state === EventSource.CLOSED", timeout=WAITS)
        proxy.accept()

    heard = over(page, 1)
    page.wait_for("watched[0].state === EventSource.CLOSED", timeout=WAITS)
    assert_whole(heard, "".join(words(30)))


# What is final


def refusals(service: Service, proxy: FaultyProxy) -> dict[str, str]:
    """Addresses that are refused for good, by the code."""
    url = proxy.through(service.stream_url())
    bare, token = url.split("?")
    return {
        "token_missing": bare,
        "token_signature": url[:-3] + ("abc" if not url.endswith("abc") else "abd"),
        "not_found": f"{proxy.url}/stream/00000000-0000-4000-8000-000000000000?{token}",
        "upstream_disconnected": proxy.through(service.stream_url(model="gpt-test-cut-k3")),
        "provider_auth_failed": proxy.through(service.stream_url(model="gpt-test-status-s401")),
    }


def test_it_gives_up_on_what_is_final_and_says_why(page: Tab, service: Service, proxy: FaultyProxy) -> None:
    urls = refusals(service, proxy)

    page.value("args[0].forEach((url) => void watch(url))", list(urls.values()))

    heard = [over(page, number) for number in range(len(urls))]
    assert [[failure["code"] for failure in one["failed"]] for one in heard] == [[code] for code in urls]
    assert [(one["completed"], one["lost"]) for one in heard] == [([], [])] * len(urls)
    assert len(proxy.watched) == len(urls)
    assert heard[3]["text"] == "".join(words(3))


def test_an_expired_stream_is_final(page: Tab, start_service: Callable[..., Service]) -> None:
    service = start_service(SESSION_TTL_SECONDS="1")
    url = service.stream_url(model="echo")
    wait_until(lambda: service.get(f"/sessions/{session_in(url)}").json()["status"] == "expired")

    page.value("(watch(args[0]), 0)", url)

    heard = over(page)
    assert [failure["code"] for failure in heard["failed"]] == ["expired"]
    assert (heard["completed"], heard["lost"]) == ([], [])


def test_a_refusal_that_may_pass_is_waited_out(
    page: Tab, proxy: FaultyProxy, start_service: Callable[..., Service], provider: ProviderServer
) -> None:
    service = start_service(MAX_VIEWERS_PER_SESSION="1", **provider.openai_environ)
    url = service.stream_url(model="gpt-test-hold-n4-k2")

    with service.watch(url) as first:
        next(first)
        page.value("(watch(args[0]), 0)", url)
        page.wait_for("watched[0].opened.length")
        assert page.value("watched[0].text") == ""
    page.wait_for("watched[0].text", timeout=WAITS)
    provider.release()

    assert_whole(over(page), "".join(words(4)))


# The rest of what it offers


def test_reasoning_usage_and_who_answers_are_told(page: Tab, service: Service, proxy: FaultyProxy) -> None:
    page.value("(watch(args[0]), 0)", proxy.through(service.stream_url(model="claude-test-reasoning")))

    heard = over(page)
    assert heard["reasoning"] == "".join(THOUGHTS)
    assert [start["provider"] for start in heard["started"]] == ["anthropic"]
    assert heard["usage"] and heard["usage"][-1]["output_tokens"] > 0
    assert heard["completed"][0]["finishReason"]


def test_for_await_reads_the_whole_answer_over_a_cut_line(page: Tab, service: Service, proxy: FaultyProxy) -> None:
    proxy.faults.append(Cut(500))

    got = page.value("iterate(args[0])", proxy.through(service.stream_url(model="gpt-test-long-n30-d10")))

    assert got["text"] == "".join(words(30))
    assert got["ending"]["status"] == "completed" and got["usage"]["output_tokens"] > 0


def test_break_lets_the_line_go(page: Tab, service: Service, provider: ProviderServer, proxy: FaultyProxy) -> None:
    url = service.stream_url(model="gpt-test-hold-n4-k2")

    got = page.value("iterate(args[0], 1)", proxy.through(url))

    wait_until(lambda: service.lines("viewer.left", session=session_in(url)))
    provider.release()
    assert "".join(words(4)).startswith(got["text"]) and got["text"] != "".join(words(4))
    assert len(proxy.watched) == 1


def test_cancel_stops_the_answer_and_n8n_gets_the_part(page: Tab, service: Service, n8n: Receiver, proxy: FaultyProxy) -> None:
    page.value(
        "(watch(args[0]), 0)", proxy.through(service.stream_url(model="gpt-test-hold-n4-k2", resumeUrl=n8n.url("/stopped")))
    )
    page.wait_for("watched[0].text")

    status = page.value("watched[0].connection.cancel()")

    heard = over(page)
    (callback, *_) = n8n.wait_for(1, path="/stopped")
    assert status in ("cancelling", "cancelled")
    assert [ending["status"] for ending in heard["completed"]] == ["cancelled"] and heard["failed"] == []
    assert (callback.json["status"], callback.json["answer"]) == ("cancelled", heard["text"])


def test_an_aborted_signal_ends_it_without_a_word(
    page: Tab, service: Service, provider: ProviderServer, proxy: FaultyProxy
) -> None:
    page.value("(watch(args[0]), 0)", proxy.through(service.stream_url(model="gpt-test-hold-n4-k2")))
    page.wait_for("watched[0].text")

    page.value("(watched[0].controller.abort(), 0)")

    heard = over(page)
    provider.release()
    assert (heard["completed"], heard["failed"], heard["lost"]) == ([], [], [])


@pytest.mark.parametrize("plain", [False, True])
def test_it_loads_from_the_service_into_a_page_of_another_origin(tab: Tab, service: Service, pages: Pages, plain: bool) -> None:
    tab.open(pages.url("client.html"))

    names = tab.value("load(args[0], { plain: args[1] })", service.url, plain)

    assert names == ["StreamError", "connectToStream", "stream"]
    tab.value("(watch(args[0]), 0)", service.stream_url(model="gpt-test-say", prompt="Hello"))
    assert_whole(over(tab), "Hello")
    assert tab.complaints == []


def test_behind_one_balancer_with_its_page_it_tells_which_answer_it_was(
    same_origin: Tab, service: Service, proxy: FaultyProxy
) -> None:
    proxy.faults.extend([Says(503), Cut(300)])

    same_origin.value("(watch(args[0]), 0)", proxy.through(service.stream_url(model="gpt-test-long-n20-d10")))

    heard = over(same_origin)
    assert_whole(heard, "".join(words(20)))
    assert heard["lost"][0]["reason"] == "HTTP 503"


# The demo page


def test_the_demo_page_is_cut_and_goes_on_at_the_exact_character(tab: Tab, service: Service) -> None:
    """In both browsers. Everything else that a person does there is in test_browser.py."""
    prompt = "".join(f"word {number} of a naïve café ☕, " for number in range(20))
    first = "document.querySelector('#viewer-1 [data-part={}]')".format
    state, text = first("status") + ".dataset.state", first("exact") + ".textContent"
    click = "(document.querySelector(args[0]).click(), 0)"

    tab.open(service.url + "/")
    tab.wait_for("document.getElementById('model').options.length > 1")
    tab.value("(document.getElementById('model').value = 'echo', document.getElementById('prompt').value = args[0], 0)", prompt)
    tab.value(click, "[name=view][value=exact]")
    tab.value(click, "#start")
    tab.wait_for(f"{text}.length > 20")
    tab.value(click, "#cut")
    tab.wait_for(f"{state} === 'reconnecting'")
    tab.wait_for("document.getElementById('wire-log').textContent.includes('attempt 1 failed')", timeout=WAITS)
    at_cut = tab.value(text)
    tab.value(click, "#cut")
    tab.wait_for(f"{state} === 'done'", timeout=WAITS)
    tab.wait_for("document.getElementById('callback-state').dataset.state === 'same'", timeout=WAITS)

    assert prompt.startswith(at_cut) and at_cut != prompt
    assert tab.value(text) == prompt
    assert tab.value(first("reconnects") + ".textContent") == "1"
    assert tab.complaints == []
