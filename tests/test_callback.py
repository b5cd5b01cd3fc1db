"""What n8n is told, when, how it is signed, and what each of its answers means."""

import base64
import json
import time
from datetime import UTC, datetime
from email.utils import format_datetime
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from standardwebhooks import Webhook, WebhookVerificationError

from aistream import __version__
from aistream.callback import (
    RUNNING,
    Answer,
    Dead,
    Delivered,
    Retry,
    headers,
    meaning,
    next_delay,
    next_step,
    payload,
    timestamp,
)
from aistream.config import Config
from aistream.events import End, Failed, Usage
from aistream.retry_after import retry_after
from aistream.session import EXPIRED, Outcome, Request, Session
from tests.neighbours import receiver as n8n

SESSION_ID = "0b8e0c9e-93f1-4c1b-8f9d-2b1c4f2a7d11"
CREATED_AT = 1_795_000_000_123
SCHEDULE = Config.from_env({"DEV_MODE": "true", "JWT_SECRET": "x" * 32}).callback_schedule
SECRET = bytes(range(32))
MODEL = {"requested_model": "gpt-4o", "model": "gpt-4o", "provider": "openai"}

# ---- The body ----


def session(ending: End | Failed = End("stop"), *, answer: str = "Hi there", started: bool = True, **asked: Any) -> Session:  # noqa: B008  # frozen
    """An ended session of gpt-4o."""
    request = Request(**{"prompt": "Hi", **MODEL, "max_tokens": 9, **asked})
    outcome = Outcome(
        ending,
        "gpt-4o-2026-01-01",
        Usage(11, 7, 3, 2),
        first_token_ms=250 if started else None,
        provider="mistral",
        queued_ms=40,
        requests=3,
        warnings=("top_p was not sent",),
    )
    started_at = CREATED_AT + 1000 if started else None
    return Session(SESSION_ID, request, "http://n8n:5678/w/1", answer, outcome, CREATED_AT, started_at, CREATED_AT + 2500)


def sent(ended: Session, attempt: int = 1) -> dict[str, Any]:
    """The callback's body, decoded."""
    return dict(json.loads(payload(ended, attempt)))


def test_a_completed_answer_is_told_in_full() -> None:
    body = sent(session(user_id="u-1", chat_id=7, metadata={"a": [1, None]}), attempt=3)

    assert body == {
        "userId": "u-1",
        "chatId": 7,
        "prompt": "Hi",
        "answer": "Hi there",
        "input_tokens": 11,
        "output_tokens": 7,
        "streamId": SESSION_ID,
        "status": "completed",
        "finish_reason": "stop",
        "error": None,
        "model": "gpt-4o-2026-01-01",
        "requested_model": "gpt-4o",
        "provider": "mistral",
        "provider_requests": 3,
        "warnings": ["top_p was not sent"],
        "usage": {
            "input_tokens": 11,
            "output_tokens": 7,
            "cached_input_tokens": 3,
            "reasoning_tokens": 2,
            "source": "provider",
            "estimated_by": None,
        },
        "timings": {
            "created_at": "2026-11-18T11:06:40.123Z",
            "started_at": "2026-11-18T11:06:41.123Z",
            "first_token_at": "2026-11-18T11:06:41.373Z",
            "ended_at": "2026-11-18T11:06:42.623Z",
            "queued_ms": 40,
            "time_to_first_token_ms": 250,
            "duration_ms": 1500,
        },
        "attempt": 3,
        "metadata": {"a": [1, None]},
    }


LOST = Failed("worker_lost", "The server that wrote this answer was lost.", True)


@pytest.mark.parametrize(
    ("ending", "status", "reason", "error"),
    [
        (End("stop"), "completed", "stop", None),
        (End("length"), "completed", "length", None),
        (End("refusal"), "completed", "refusal", None),
        (End("content_filter"), "completed", "content_filter", None),
        (End("cancelled"), "cancelled", "cancelled", None),
        (LOST, "failed", "failed", {"code": "worker_lost", "message": LOST.message, "retryable": True}),
        (EXPIRED, "expired", "expired", {"code": "expired", "message": EXPIRED.message, "retryable": False}),
    ],
)
def test_every_ending_has_its_status_its_reason_and_all_fields(
    ending: End | Failed, status: str, reason: str, error: dict[str, Any] | None
) -> None:
    body = sent(session(ending, answer="Hi th"))

    assert (body["status"], body["finish_reason"], body["error"]) == (status, reason, error)
    assert (body["answer"], body["input_tokens"], body["output_tokens"]) == ("Hi th", 11, 7)
    assert list(body) == list(sent(session()))


def test_an_expired_session_has_an_empty_answer_and_no_times_of_a_generation() -> None:
    body = sent(session(EXPIRED, answer="", started=False))

    assert (body["answer"], type(body["input_tokens"]), type(body["output_tokens"])) == ("", int, int)
    assert body["timings"] == {
        "created_at": "2026-11-18T11:06:40.123Z",
        "started_at": None,
        "first_token_at": None,
        "ended_at": "2026-11-18T11:06:42.623Z",
        "queued_ms": None,
        "time_to_first_token_ms": None,
        "duration_ms": None,
    }


@pytest.mark.parametrize("value", [None, "", "7", 7, 0, -1, 7.0, 7.5, 2**53 + 1, 10**30, "é\0\u2028"], ids=repr)
def test_user_and_chat_are_echoed_in_the_type_they_came_in(value: object) -> None:
    body = sent(session(user_id=value, chat_id=value))

    assert (body["userId"], body["chatId"]) == (value, value)
    assert (type(body["userId"]), type(body["chatId"])) == (type(value), type(value))


def test_the_callback_has_the_answer_as_the_provider_wrote_it() -> None:
    answer = " a\r\n\0\u2028[DONE]\ndata: x 😀\x7f"

    assert sent(session(answer=answer, prompt=answer))["answer"] == answer
    assert sent(session(answer=answer, prompt=answer))["prompt"] == answer


def test_the_largest_answer_stays_below_what_n8n_takes() -> None:
    """n8n refuses bodies above 16 MiB; a control character is one byte that JSON writes as six."""
    config = Config.from_env({"DEV_MODE": "true", "JWT_SECRET": "x" * 32, "MAX_ANSWER_BYTES": "2097152"})

    body = payload(session(answer="\1" * config.max_answer_bytes), 1)

    assert len(body) < 15 * 2**20


@pytest.mark.parametrize(
    ("ms", "text"),
    [
        (None, None),
        (0, "1970-01-01T00:00:00.000Z"),
        (1, "1970-01-01T00:00:00.001Z"),
        (CREATED_AT, "2026-11-18T11:06:40.123Z"),
        (1_795_000_000_999, "2026-11-18T11:06:40.999Z"),
    ],
)
def test_a_point_in_time_is_written_in_utc_to_the_millisecond(ms: int | None, text: str | None) -> None:
    assert timestamp(ms) == text


@settings(deadline=None)
@given(st.integers(0, 4 * 10**12))
def test_no_millisecond_is_lost_in_a_point_in_time(ms: int) -> None:
    written = timestamp(ms)

    assert written is not None
    assert round(datetime.fromisoformat(written).timestamp() * 1000) == ms


# ---- The headers ----


def test_the_signature_is_one_that_standard_webhooks_accepts() -> None:
    body = payload(session(), 1)

    signed = headers(SESSION_ID, body, int(time.time()), [SECRET])

    verifier = Webhook("whsec_" + base64.b64encode(SECRET).decode())
    assert verifier.verify(body, signed) == json.loads(body)
    with pytest.raises(WebhookVerificationError):
        verifier.verify(body + b" ", signed)
    with pytest.raises(WebhookVerificationError):
        Webhook(base64.b64encode(b"another" * 5).decode()).verify(body, signed)
    with pytest.raises(WebhookVerificationError):
        verifier.verify(body, {**signed, "webhook-id": "msg_other"})
    with pytest.raises(WebhookVerificationError):
        verifier.verify(body, {**signed, "webhook-timestamp": str(int(time.time()) + 1)})


def test_the_id_stays_the_same_over_all_attempts_and_the_time_does_not() -> None:
    first, second = headers(SESSION_ID, b"{}", 1000, [SECRET]), headers(SESSION_ID, b"{}", 2000, [SECRET])

    assert first["webhook-id"] == second["webhook-id"] == f"msg_{SESSION_ID}"
    assert (first["webhook-timestamp"], second["webhook-timestamp"]) == ("1000", "2000")
    assert first["webhook-signature"] != second["webhook-signature"]


def test_without_a_secret_there_is_no_signature() -> None:
    assert headers(SESSION_ID, b"{}", 1000, []) == {
        "Content-Type": "application/json",
        "User-Agent": f"Mozilla/5.0 (compatible; aistream/{__version__})",
        "webhook-id": f"msg_{SESSION_ID}",
        "webhook-timestamp": "1000",
    }


# ---- The schedule ----


@pytest.mark.parametrize(
    ("attempt", "retry_after", "delay"),
    [
        (1, None, 1),
        (2, None, 2),
        (7, None, 60),
        (8, None, 300),
        (12, None, 36_000),
        (13, None, None),
        (14, None, None),
        (13, 5.0, None),
        (5, 1.0, 15),
        (5, 15.0, 15),
        (5, 20.0, 20),
        (5, 30.0, 30),
        (5, 86_400.0, 30),
    ],
)
def test_the_next_attempt_comes_by_the_schedule_and_at_most_twice_as_late(
    attempt: int, retry_after: float | None, delay: float | None
) -> None:
    assert next_delay(attempt, retry_after, SCHEDULE, dice=0.5) == delay


@settings(deadline=None)
@given(st.integers(1, 12), st.none() | st.floats(0, 1e6), st.floats(0, 1))
def test_a_delay_is_varied_by_a_fifth_at_most(attempt: int, retry_after: float | None, dice: float) -> None:
    planned = next_delay(attempt, retry_after, SCHEDULE, dice=0.5)
    delay = next_delay(attempt, retry_after, SCHEDULE, dice)

    assert planned is not None and delay is not None
    assert 0.8 * planned * (1 - 1e-9) <= delay <= 1.2 * planned * (1 + 1e-9)


def test_the_dice_cover_the_whole_fifth() -> None:
    assert next_delay(7, None, SCHEDULE, dice=0.0) == pytest.approx(48)
    assert next_delay(7, None, SCHEDULE, dice=1.0) == pytest.approx(72)


# ---- What an answer means ----


def answer(said: n8n.Answer, retry_after: float | None = None) -> Answer:
    """An answer of the receiver as the sender reads it."""
    body = said.body if isinstance(said.body, str) else said.body.decode()
    return Answer(said.status, said.headers.get("Content-Type", ""), body, retry_after)


def plain(status: int, body: str = "", content_type: str = "application/json; charset=utf-8") -> n8n.Answer:
    """An answer with this status."""
    return n8n.Answer(status, {"Content-Type": content_type}, body)


HTML = "text/html; charset=utf-8"
NOT_WAITING = Dead("the execution no longer waits")

#: What n8n 2.41.1 was seen to answer -> what it means at a first attempt, and after one that may have arrived.
ROWS: list[tuple[n8n.Answer, type, type]] = [
    (n8n.STARTED, Delivered, Delivered),
    (plain(202), Delivered, Delivered),
    (plain(204, content_type=""), Delivered, Delivered),
    (plain(200, "ok", "text/plain"), Delivered, Delivered),
    (plain(200, '[{"last": "node"}]'), Delivered, Delivered),
    (n8n.STARTING_UP, Retry, Retry),
    (plain(200, "<!doctype html><title>n8n</title>", "Text/HTML"), Retry, Retry),
    (n8n.CANNOT_POST, Retry, Retry),
    (n8n.DATABASE_NOT_READY, Retry, Retry),
    (n8n.RUNNING_ALREADY, Retry, Retry),
    (n8n.FINISHED_ALREADY, Dead, Delivered),
    (n8n.FINISHED_WITH_ERROR, Dead, Delivered),
    (n8n.LOST_THE_RACE, Retry, Retry),
    (plain(500, '{"message":"Error in workflow"}'), Retry, Retry),
    (n8n.DOES_NOT_EXIST, Dead, Delivered),
    (n8n.WRONG_METHOD, Dead, Dead),
    (n8n.INVALID_TOKEN, Dead, Dead),
    (plain(401, "jwt expired", "text/plain"), Dead, Dead),
    (plain(403, "Authorization data is wrong!", "text/plain"), Dead, Dead),
    (plain(403, "<html>a proxy's own page</html>", HTML), Dead, Dead),
    (plain(422, '{"message":"Failed to parse request body"}'), Dead, Dead),
    (plain(408), Retry, Retry),
    (plain(425), Retry, Retry),
    (plain(429), Retry, Retry),
    (plain(502, "<html>Bad Gateway</html>", HTML), Retry, Retry),
    (plain(504, "<html>Gateway Time-out</html>", HTML), Retry, Retry),
    (plain(301), Dead, Dead),
    (plain(307), Dead, Dead),
    (plain(308), Dead, Dead),
    (plain(400), Dead, Dead),
    (plain(404, '{"message":"Not Found"}'), Dead, Dead),
    (plain(410), Dead, Dead),
    (plain(524, "<html>A timeout occurred</html>", HTML), Retry, Retry),
    (plain(413), Dead, Dead),
]


@pytest.mark.parametrize(("said", "first", "later"), ROWS, ids=[f"{row[0].status} {row[0].body!s:.40}" for row in ROWS])
def test_an_answer_means_what_n8n_meant_by_it(said: n8n.Answer, first: type, later: type) -> None:
    assert type(meaning(answer(said), ambiguous=False)) is first
    assert type(meaning(answer(said), ambiguous=True)) is later


def test_after_a_500_nobody_knows_whether_it_arrived() -> None:
    assert meaning(answer(n8n.LOST_THE_RACE), ambiguous=False) == Retry("n8n answered 500", arrived=True)


@pytest.mark.parametrize("said", [n8n.STARTING_UP, n8n.CANNOT_POST, n8n.DATABASE_NOT_READY, n8n.RUNNING_ALREADY, plain(429)])
def test_what_n8n_turned_away_has_not_arrived(said: n8n.Answer) -> None:
    verdict = meaning(answer(said), ambiguous=False)

    assert isinstance(verdict, Retry) and not verdict.arrived


@pytest.mark.parametrize("status", [404, 409])
def test_an_answer_whose_words_broke_off_says_nothing_yet(status: int) -> None:
    broken = Answer(status, "application/json", '{"code":409,"mess', broken=True)

    assert meaning(broken, ambiguous=True) == Retry(f"n8n answered {status}, and its words broke off")


@pytest.mark.parametrize(("status", "kind"), [(200, Delivered), (410, Dead), (503, Retry)])
def test_a_status_that_says_it_all_needs_no_words(status: int, kind: type) -> None:
    assert type(meaning(Answer(status, "application/json", "", broken=True), ambiguous=False)) is kind


@pytest.mark.parametrize("status", [500, 504, 524])
def test_who_may_have_waited_for_an_answer_in_vain_may_have_delivered(status: int) -> None:
    verdict = meaning(Answer(status), ambiguous=False)

    assert isinstance(verdict, Retry) and verdict.arrived


RUNS = Retry("it runs", running=True)


def step(outcome: Retry, attempt: int = 1, *, ambiguous: bool = False, running_for: float = 0) -> object:
    """What follows an attempt, without jitter."""
    return next_step(outcome, attempt=attempt, ambiguous=ambiguous, running_for=running_for, schedule=SCHEDULE, dice=0.5)


def test_what_is_not_delivered_is_tried_again_until_the_schedule_ends() -> None:
    assert [step(Retry("busy"), attempt) for attempt in (1, 2, 12)] == [1, 2, 36_000]
    assert step(Retry("busy"), 13) == step(Retry("busy"), 13, ambiguous=True) == Dead("busy; this was the last attempt")


def test_an_execution_that_runs_is_asked_for_ten_minutes_and_then_judged() -> None:
    assert RUNNING == 600
    assert step(RUNS, 8, running_for=120) == 300
    assert step(RUNS, 9, running_for=420) == 180  # half an hour by the schedule: the bound comes first
    assert step(RUNS, 10, running_for=600) == Dead("it runs; this was the last attempt")
    assert step(RUNS, 10, running_for=600, ambiguous=True) == Delivered()


def test_a_schedule_that_ends_before_that_bound_leaves_a_dead_letter_and_no_guess() -> None:
    assert step(RUNS, 13, running_for=5) == step(RUNS, 13, running_for=5, ambiguous=True)
    assert step(RUNS, 13, running_for=5) == Dead("it runs; this was the last attempt")


@settings(deadline=None)
@given(st.integers(1, 12), st.floats(0, 1e6), st.floats(0, 1))
def test_jitter_never_brings_an_attempt_before_its_retry_after(attempt: int, retry_after: float, dice: float) -> None:
    planned = SCHEDULE[attempt]
    delay = next_delay(attempt, retry_after, SCHEDULE, dice)

    assert delay is not None and min(retry_after, 2 * planned) <= delay <= 2 * planned


def test_retry_after_is_handed_on_with_a_status_that_carries_it() -> None:
    assert meaning(answer(plain(429), 7.0), ambiguous=False) == Retry("n8n answered 429", retry_after=7.0)
    assert meaning(answer(n8n.DATABASE_NOT_READY, 3.0), ambiguous=False) == Retry("n8n answered 503", retry_after=3.0)


@pytest.mark.parametrize(
    ("said", "dead"),
    [
        (n8n.WRONG_METHOD, Dead("set the Wait node's HTTP method to POST and its suffix to none")),
        (n8n.FINISHED_ALREADY, NOT_WAITING),
        (n8n.FINISHED_WITH_ERROR, NOT_WAITING),
        (n8n.DOES_NOT_EXIST, NOT_WAITING),
        (plain(302), Dead("n8n answered 302: a redirect is not followed; use the final address as resumeUrl")),
    ],
)
def test_a_dead_callback_has_a_reason_that_an_author_can_act_on(said: n8n.Answer, dead: Dead) -> None:
    assert meaning(answer(said), ambiguous=False) == dead


@settings(deadline=None)
@given(st.integers(200, 599), st.sampled_from(["", HTML, "application/json"]), st.text(), st.booleans())
def test_every_answer_means_something_and_no_reason_quotes_it(status: int, content_type: str, body: str, ambiguous: bool) -> None:
    verdict = meaning(Answer(status, content_type, "QUOTED" + body), ambiguous=ambiguous)

    assert isinstance(verdict, (Delivered, Retry, Dead))
    assert "QUOTED" not in str(msgspec.to_builtins(verdict))


#: Whatever may stand between a callback and its meaning, n8n's own words among it.
SAID = st.builds(
    Answer,
    st.integers(100, 999),
    st.sampled_from(["", HTML, "Text/HTML", "application/json", "text/plain"]),
    st.text(max_size=10)
    | st.sampled_from(["is running already", "has finished already", "does not exist", "matching path/method", "Cannot POST /x"]),
    st.none() | st.floats(0, 1e6),
    st.booleans(),
)


@settings(deadline=None)
@given(SAID)
def test_that_an_earlier_attempt_may_have_arrived_makes_of_a_dead_callback_a_delivered_one_and_changes_nothing_else(
    said: Answer,
) -> None:
    first, later = meaning(said, ambiguous=False), meaning(said, ambiguous=True)

    assert type(first) is type(later) or (type(first), type(later)) == (Dead, Delivered)
    assert type(first) is type(later) or said.status in (404, 409)


@settings(deadline=None)
@given(SAID, st.booleans())
def test_every_answer_keeps_to_the_rules(said: Answer, ambiguous: bool) -> None:
    verdict = meaning(said, ambiguous=ambiguous)

    status, page = said.status, said.content_type.lower().startswith("text/html")
    if 200 <= status < 300:
        assert type(verdict) is (Retry if page else Delivered)
    elif status >= 500 or status in (408, 425, 429):
        assert verdict == Retry(f"n8n answered {status}", status in (500, 504, 524), said.retry_after)
    elif status not in (404, 409):
        assert type(verdict) is Dead
    if isinstance(verdict, Retry):
        assert verdict.running == (status == 409 and "running already" in said.body and not said.broken)


@settings(deadline=None)
@given(
    st.text(max_size=20)
    | st.text("0123456789 :,+-GMTWedJanFeb", max_size=40)
    | st.datetimes().map(lambda at: format_datetime(at.replace(tzinfo=UTC), usegmt=True))
    | st.integers(0, 10**30).map(str),
    st.floats(0, 1e11),
)
def test_a_retry_after_is_a_number_of_seconds_to_wait_or_nothing(value: str, now: float) -> None:
    seconds = retry_after(value, now)

    assert seconds is None or 0 <= seconds < 1e12
