"""Everything that a provider may do, with both providers: what viewers see in both modes, what n8n gets, what is counted.

The rows are in `tests/matrix.py`; docs/providers.md shows them. They run in lanes beside one another, each with providers
(aliases) of its own, so that what is counted of them is one row's. They run over each way to a provider, and all ways come to
the same.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import gevent
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests import matrix
from tests.matrix import FAMILIES, RETRYABLE, ROWS, Expect
from tests.neighbours.provider import ProviderServer
from tests.neighbours.receiver import Received, Receiver
from tests.neighbours.wires import SECRETS
from tests.service import Event, Service, text_of

LANES = 6
#: Metrics of providers that the rows tell of.
COUNTED = ("aistream_sessions_ended", "aistream_provider_attempts", "aistream_provider_retries")
COUNTED += ("aistream_provider_fallbacks", "aistream_provider_adaptations", "aistream_tokens")
#: The ways to a provider: PROVIDER_TRANSPORT, and with TLS or without.
WAYS = {"fast": "fast", "httpx": "httpx", "fast-tls": "fast"}
#: What differs from one run to the next.
OWN = ("streamId", "timings")


class Seen(NamedTuple):
    """What came of a row."""

    text: list[Event]
    json: list[Event]
    callback: Received


def alias_of(number: int, family: str) -> str:
    """The provider that a row has for itself; `-spare` behind it is its fallback's."""
    return f"row{number}-{family}"


def models_file(provider: ProviderServer) -> str:
    """The aliases of all rows. A spare one is of the other family."""
    urls = {"openai": provider.openai_url, "anthropic": provider.anthropic_url}
    other = {"openai": "anthropic", "anthropic": "openai"}
    return "\n".join(
        f'[{alias_of(number, family)}{suffix}]\napi = "{api}"\nbase_url = "{urls[api]}"\nkey_variable = "TEST_KEY"'
        for number, family in matrix.cells()
        for suffix, api in (("", family), ("-spare", other[family]))
        if not suffix or ROWS[number].fallback
    )


class Runner:
    """Runs the rows against one service. `counted`: of each alias, by metric and labels, the provider's left out."""

    def __init__(self, service: Service, n8n: Receiver) -> None:
        self.service = service
        self.n8n = n8n
        self.seen: dict[tuple[int, str], Seen | BaseException] = {}
        self.counted: defaultdict[str, Counter[tuple[str, ...]]] = defaultdict(Counter)

    def run(self) -> None:
        """All rows. What is counted is read once, after all: the page of so many providers keeps a worker busy for long."""
        gevent.joinall([gevent.spawn(self._lane, lane, family) for lane in range(LANES) for family in FAMILIES])
        for metric in text_string_to_metric_families(self.service.get("/metrics").text):
            for sample in metric.samples if metric.name in COUNTED else []:
                labels = dict(sample.labels)
                if sample.name.endswith("_total") and sample.value and (provider := labels.pop("provider", "")):
                    self.counted[provider][metric.name, *(labels[name] for name in sorted(labels))] += int(sample.value)

    def _lane(self, lane: int, family: str) -> None:
        for number in range(lane, len(ROWS), LANES):
            try:
                self.seen[number, family] = self._cell(number, family)
            except BaseException as error:  # is raised by the test of this row
                self.seen[number, family] = error

    def _cell(self, number: int, family: str) -> Seen:
        row, alias, path = ROWS[number], alias_of(number, family), f"/{number}/{family}"
        other = FAMILIES["anthropic" if family == "openai" else "openai"]
        url = self.service.stream_url(
            model=f"{alias}/{FAMILIES[family]}-test-{row.scenario}-i{number}",
            resumeUrl=self.n8n.url(path),
            format="json",
            **({"fallbackModels": [f"{alias}-spare/{other}-test-{row.fallback}-i{number}"]} if row.fallback else {}),
            **row.ask,
        )
        viewers = [gevent.spawn(self.service.read, url), gevent.spawn(self.service.read, url.replace("&format=json", ""))]
        in_json, in_text = [viewer.get(timeout=60) for viewer in viewers]
        (callback,) = self.n8n.wait_for(1, timeout=20, path=path)
        return Seen(in_text, in_json, callback)


def ran(way: str, folder: Path) -> Runner:
    """All rows, run over this way to a provider."""
    with ProviderServer(tls=folder if way.endswith("tls") else None) as provider, Receiver() as n8n:
        (folder / "models.toml").write_text(models_file(provider))
        trust = {"SSL_CERT_FILE": str(provider.ca)} if way.endswith("tls") else {}
        keys = {"TEST_KEY": "sk-test-of-the-matrix", "MODELS_FILE": str(folder / "models.toml")}
        service = Service(folder / "log", {**matrix.ENVIRON, **keys, **trust, "PROVIDER_TRANSPORT": WAYS[way]})
        service.start()
        try:
            runner = Runner(service, n8n)
            runner.run()
        finally:
            service.stop()
    return runner


@pytest.fixture(scope="module")
def run_over(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Runner]:
    """Runs all rows over a way, the first time that it is asked for."""
    return cache(lambda way: ran(way, tmp_path_factory.mktemp("matrix")))


@pytest.fixture(params=WAYS, scope="module")
def runner(run_over: Callable[[str], Runner], request: pytest.FixtureRequest) -> Runner:
    """All rows, run over one way after the other."""
    return run_over(request.param)


CELLS = pytest.mark.parametrize(
    ("number", "family"), list(matrix.cells()), ids=lambda value: value if isinstance(value, str) else ROWS[value].what
)


def seen_by(runner: Runner, number: int, family: str) -> Seen:
    """What came of this cell. Raises what was raised then."""
    seen = runner.seen[number, family]
    if isinstance(seen, BaseException):
        raise seen
    return seen


@CELLS
def test_what_a_provider_does_comes_to_what_the_table_says(runner: Runner, number: int, family: str) -> None:
    row, seen = ROWS[number], seen_by(runner, number, family)
    expect, callback = row.expect(family), seen.callback.json
    alias = alias_of(number, family)

    told = told_in_json(seen.json)
    assert_text(callback["answer"], expect)
    assert text_of(seen.text) == told["text"] == callback["answer"]
    assert told["reasoning"] == expect.reasoning
    assert told["start"]["provider"] == alias
    assert told["end"] == seen.text[-1].data if expect.failed else seen.text[-1].data == "[DONE]"
    assert_callback(callback, expect, told["end"])
    assert callback["provider"] == (f"{alias}-spare" if expect.told_by_fallback else alias)
    counted = runner.counted[alias] + runner.counted[f"{alias}-spare"]
    assert counted == expected_counts(expect, row.fallback) + tokens_of(callback)


@pytest.mark.timeout(300)  # alone, the first one runs all rows three times
@CELLS
def test_all_ways_to_a_provider_come_to_the_same(run_over: Callable[[str], Runner], number: int, family: str) -> None:
    seen = [seen_by(run_over(way), number, family) for way in WAYS]

    told = [{**(parts := told_in_json(one.json)), "start": others(parts["start"])} for one in seen]
    callbacks = [others(one.callback.json) for one in seen]
    assert told == told[:1] * len(WAYS)
    assert callbacks == callbacks[:1] * len(WAYS)


def others(fields: dict[str, Any]) -> dict[str, Any]:
    """All but what is one run's own."""
    return {name: value for name, value in fields.items() if name not in OWN}


def told_in_json(events: list[Event]) -> dict[str, Any]:
    """The parts of a JSON stream, which has nothing but what it may have, in its order."""
    bodies = [json.loads(event.data) for event in events if event.data != "[DONE]"]
    kinds = [body["type"] for body in bodies]
    assert kinds[0] == "start" and set(kinds[1:-1]) <= {"text", "reasoning", "usage"}, kinds
    ended = kinds[-1] == "end"
    assert (events[-1].data == "[DONE]") == ended and (events[-1].event == "error") != ended
    assert kinds.count("usage") == ended
    end = bodies[-1]
    return {
        "start": bodies[0],
        "text": "".join(body["text"] for body in bodies if body["type"] == "text"),
        "reasoning": "".join(body["text"] for body in bodies if body["type"] == "reasoning"),
        "usage": next((body for body in bodies if body["type"] == "usage"), None),
        # The same as in text mode, but for its type.
        "end": end if ended else events[-1].data.replace('"type":"error",', ""),
    }


def assert_text(answer: str, expect: Expect) -> None:
    """The answer is the whole, or the part, that is expected."""
    if expect.answer is None:
        assert answer and "".join(matrix.words(1000)).startswith(answer)
        assert len(answer) <= int(matrix.ENVIRON["MAX_ANSWER_BYTES"])
    else:
        assert answer == expect.answer


def assert_callback(callback: dict[str, Any], expect: Expect, end: Any) -> None:
    """n8n gets how it ended, with figures that it can bill."""
    assert callback["provider_requests"] == expect.requests
    usage = callback["usage"]
    billed = not (expect.failed and expect.source == "provider")
    assert usage["source"] == expect.source and usage["input_tokens"] == callback["input_tokens"]
    assert (usage["input_tokens"] > 0) == billed
    assert usage["estimated_by"] in ((None,) if expect.source == "provider" else (None, "characters", "tiktoken"))
    assert (usage["output_tokens"] > 0) == bool(callback["answer"] or expect.reasoning or expect.reason == "tool_calls")
    assert len(callback["warnings"]) == len(expect.warnings)
    assert all(word in warning for word, warning in zip(expect.warnings, callback["warnings"], strict=True))
    if expect.failed:
        error = json.loads(end)
        assert (error["code"], error["retryable"]) == (expect.reason, RETRYABLE[expect.reason])
        assert (callback["status"], callback["finish_reason"], callback["error"]) == ("failed", "failed", error)
    else:
        assert end == {"type": "end", "finish_reason": expect.reason}
        assert (callback["status"], callback["finish_reason"], callback["error"]) == ("completed", expect.reason, None)


def expected_counts(expect: Expect, fallback: str) -> Counter[tuple[str, ...]]:
    """The metrics of a row."""
    counted: Counter[tuple[str, ...]] = Counter()
    counted["aistream_sessions_ended", expect.reason, "failed" if expect.failed else "completed"] = 1
    for outcome, count in expect.outcomes.items():
        counted["aistream_provider_attempts", outcome] += count
    retries = expect.retries
    if expect.fell_back:
        counted["aistream_provider_fallbacks",] = 1
        spare = {"hello": {"answered": 1}, "status-s529": {"provider_overloaded": matrix.TRIES}}[fallback]
        for outcome, count in spare.items():
            counted["aistream_provider_attempts", outcome] += count
        retries += sum(spare.values()) - 1
    if retries:
        counted["aistream_provider_retries",] = retries
    for parameter in expect.adapted:
        counted["aistream_provider_adaptations", parameter] += 1
    return counted


def tokens_of(callback: dict[str, Any]) -> Counter[tuple[str, ...]]:
    """The metrics of its tokens: what n8n is told, and is billed by."""
    usage = callback["usage"]
    kinds = ("input", "output")
    return +Counter({("aistream_tokens", kind, usage["source"]): usage[f"{kind}_tokens"] for kind in kinds})


def test_of_all_that_providers_said_no_key_and_no_organisation_got_out(runner: Runner) -> None:
    seen = [one for one in runner.seen.values() if isinstance(one, Seen)]
    out = " ".join(str(event) for one in seen for event in one.text + one.json)
    out += " ".join(one.callback.body.decode() for one in seen) + runner.service.log

    assert len(seen) == 2 * len(ROWS)
    assert [secret for secret in (*SECRETS, "sk-test-of-the-matrix") if secret in out] == []
    assert "Traceback" not in runner.service.log and not runner.service.lines("provider.broke")


def test_the_providers_own_words_are_in_the_log(runner: Runner) -> None:
    said = {line.get("provider_message", "") for line in runner.service.lines("provider.failed")}

    assert any("The server had an error while processing your request" in text for text in said)
    assert any("You exceeded your current quota" in text for text in said)


def test_the_matrix_is_as_large_as_it_should_be() -> None:
    assert len({(row.scenario, row.fallback) for row in ROWS}) >= 40
    assert {expect.reason for row in ROWS for expect in (row.openai, row.anthropic) if expect.failed} == set(RETRYABLE)


def test_the_page_shows_the_matrix() -> None:
    page = matrix.PAGE.read_text()

    assert page == matrix.page(page), "run `python -m tests.matrix`"
    assert matrix.table() in page
