"""Every text arrives as the provider wrote it: in JSON mode and at n8n exactly, in text mode as far as the format can."""

import json
import random
from typing import Any

import httpx
import pytest
from gevent.pool import Pool

from tests.nasty import BY_NAME, NASTY, Nasty, differences
from tests.neighbours.receiver import Receiver
from tests.service import Event, Service, text_of

BOTH = pytest.mark.parametrize("family", ["gpt", "claude"])
AT_ONCE = 16
"""Texts under way at the same time."""

RESUMED = [
    BY_NAME[name]
    for name in (
        "blank lines",
        "CRLF split between two chunks",
        "CR at the very end",
        "surrogate pair split over two deltas",
        "NUL within CRLF",
        "[DONE] many times",
        "[DONE] with NUL inside",
        "only empty chunks",
        "100 KB of lines in one chunk",
        "a code block",
    )
]
CRUMBS = (
    *("a", " ", "  ", "\n", "\n\n", "\r", "\r\n", "\t", "", "\0", "[DONE]", "[DO", "NE]", "[", "data:", "data: ", ":", "id: 1"),
    *("event: error", "retry: 0", "\u2028", "\u0085", "\x0b", "\ufeff", "é", "😀", "\u200d", "\ud83d", "\ude00", "[DONE]\r"),
)
"""What random texts are mixed from."""


@BOTH
def test_every_nasty_text_arrives_exactly_in_both_modes_and_at_n8n(service: Service, n8n: Receiver, family: str) -> None:
    got = read_all(service, n8n, NASTY, family)

    assert got == as_expected(NASTY)


def test_random_mixes_of_nasty_pieces_arrive_exactly(service: Service, n8n: Receiver) -> None:
    dice = random.Random(20_261_123)
    mixes = [Nasty(f"mix {number}", tuple(dice.choices(CRUMBS, k=dice.randint(1, 12))), by="deltas") for number in range(60)]

    got = read_all(service, n8n, mixes, "gpt")

    assert got == as_expected(mixes)


def test_nothing_on_the_wire_ends_a_line_but_lf(service: Service) -> None:
    fields = {b"id", b"data", b"event", b"retry", b""}

    def wire(nasty: Nasty) -> bytes:
        url = service.stream_url(model=nasty.model("gpt"), prompt=nasty.prompt)
        return httpx.get(url, headers={"Accept": "text/event-stream"}, verify=False, timeout=30).content

    for nasty, raw in zip(NASTY, Pool(AT_ONCE).map(wire, NASTY), strict=True):
        lines = raw.split(b"\n")
        assert (nasty.name, raw.count(b"\r"), raw.count(b"\0"), lines[0]) == (nasty.name, 0, 0, b"retry: 2000")
        assert {line.partition(b":")[0] for line in lines} <= fields, nasty.name
        assert lines.count(b"data: [DONE]") >= 1 and raw.endswith(b"\ndata: [DONE]\n\n"), nasty.name


@pytest.mark.parametrize("mode", ["text", "json"])
def test_a_reader_that_resumes_anywhere_gets_exactly_the_rest(service: Service, mode: str) -> None:
    def resume(nasty: Nasty) -> None:
        url = service.stream_url(model=nasty.model("gpt") + "-d3", prompt=nasty.prompt, format=mode)
        whole = service.read(url)
        assert whole[-1].data == "[DONE]", nasty.name
        ids = list(dict.fromkeys(event.id for event in whole))
        rests = {last_id: service.read(url, last_id) for last_id in ids}
        assert ids[-1] == whole[-1].id and rests.pop(ids[-1]) == [], nasty.name
        for last_id, rest in rests.items():
            # What has no id of its own (JSON mode's `end`) bears the one before it, and comes once more.
            seen = [event.id for event in whole].index(last_id) + 1
            assert [event._replace(id=event.id or last_id) for event in rest] == whole[seen:], (nasty.name, last_id)

    Pool(AT_ONCE).map(resume, RESUMED)


def test_a_reader_that_has_the_ending_is_told_that_there_is_no_more(service: Service) -> None:
    url = service.stream_url(model="gpt-test-hello")
    last_id = service.read(url)[-1].id

    with service.watch(url, last_id) as events:
        assert (events.response.status_code, list(events)) == (204, [])


@BOTH
@pytest.mark.parametrize("mode", ["text", "json"])
def test_a_reader_whose_line_breaks_after_every_event_gets_each_once(service: Service, family: str, mode: str) -> None:
    def read(nasty: Nasty) -> tuple[str, list[Event], list[Event]]:
        url = service.stream_url(model=nasty.model(family) + "-d10", prompt=nasty.prompt, format=mode)
        broken: list[Event] = []
        while not broken or broken[-1].data != "[DONE]":
            assert len(broken) < 300, nasty.name
            with service.watch(url, broken[-1].id if broken else None) as events:
                # An event without an id of its own is no place to break: it would come again, as it should.
                broken += [event for event in [next(events)] if not _is_end(event, mode)] or [next(events)]
        return nasty.name, broken, [event for event in service.read(url) if not _is_end(event, mode)]

    for name, broken, whole in Pool(AT_ONCE).map(read, RESUMED):
        assert broken == whole, name


def test_a_viewer_on_another_worker_gets_the_same_events(pair: list[Service]) -> None:
    here, there = pair

    def read(nasty: Nasty) -> tuple[str, list[Event], list[Event]]:
        url = here.stream_url(model=nasty.model("gpt") + "-d5", prompt=nasty.prompt)
        with here.watch(url) as events:  # so it runs here, and the other one follows
            followed = there.read(url.replace(here.url, there.url))
            return nasty.name, list(events), followed

    for name, watched, followed in Pool(AT_ONCE).map(read, RESUMED):
        assert text_of(watched) == BY_NAME[name].in_text_mode, name
        assert followed == watched, name


def read_all(service: Service, n8n: Receiver, texts: tuple[Nasty, ...] | list[Nasty], family: str) -> dict[str, Any]:
    """Each text through one session with a viewer in either mode; what each of the three readers got."""

    def read(number: int) -> tuple[list[Event], list[Event], Any]:
        nasty, path = texts[number], f"/{family}/{number}"
        url = service.stream_url(model=nasty.model(family), prompt=nasty.prompt, resumeUrl=n8n.url(path))
        text, typed = Pool(2).map(service.read, (url, url + "&format=json"))
        (callback,) = n8n.wait_for(1, path=path, timeout=15)
        return text, typed, callback.json

    results = dict(zip((nasty.name for nasty in texts), Pool(AT_ONCE).map(read, range(len(texts))), strict=True))
    return {
        "in text mode": differences(
            {name: text_of(text) for name, (text, _, _) in results.items()},
            {nasty.name: nasty.in_text_mode for nasty in texts},
        ),
        "in JSON mode": differences(
            {name: typed_text_of(typed) for name, (_, typed, _) in results.items()},
            {nasty.name: nasty.answer for nasty in texts},
        ),
        "at n8n": differences(
            {name: callback["answer"] for name, (_, _, callback) in results.items()},
            {nasty.name: nasty.answer for nasty in texts},
        ),
        "not ended by one [DONE]": [name for name, (*both, _) in results.items() if not all(map(_ends_once, both))],
        "with ids out of order": [name for name, (text, _, _) in results.items() if not _ordered(text)],
        "how they ended": {callback["status"] for _, _, callback in results.values()},
    }


def as_expected(texts: tuple[Nasty, ...] | list[Nasty]) -> dict[str, Any]:
    """What `read_all` gives when all is well."""
    return {
        "in text mode": [],
        "in JSON mode": [],
        "at n8n": [],
        "not ended by one [DONE]": [],
        "with ids out of order": [],
        "how they ended": {"completed"},
    }


def typed_text_of(events: list[Event]) -> str:
    """The answer that JSON-mode events carry."""
    typed = [json.loads(event.data) for event in events if event.data != "[DONE]"]
    return "".join(event["text"] for event in typed if event["type"] == "text")


def _ends_once(events: list[Event]) -> bool:
    return events[-1].data == "[DONE]" and [event.data for event in events].count("[DONE]") == 1


def _ordered(events: list[Event]) -> bool:
    cursors = [tuple(map(int, event.id.split("-"))) for event in events]
    return cursors == sorted(set(cursors))


def _is_end(event: Event, mode: str) -> bool:
    return mode == "json" and event.data.startswith('{"type":"end"')
