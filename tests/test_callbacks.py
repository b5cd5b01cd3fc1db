"""Callbacks from the ending to the last attempt: the outbox, the queues, and the sender against a real receiver."""

import base64
import contextlib
import socket
import time
import uuid
from collections.abc import Callable, Iterator

import gevent
import pytest
from standardwebhooks import Webhook, WebhookVerificationError

from aistream.delivery import Delivery
from aistream.destination import Destinations
from aistream.events import End, Usage
from aistream.outbound import TIMEOUT, Outbound
from aistream.recall import Recall
from aistream.session import Attempt, CallbackRecord, Claimed, Counts, Finished, Outcome, Request, State
from aistream.session import IdempotencyKey as Key
from aistream.store import Places, Store
from tests.conftest import make_config
from tests.neighbours.receiver import (
    CANNOT_POST,
    CUT,
    CUT_BODY,
    DOES_NOT_EXIST,
    ENDLESS,
    FINISHED_ALREADY,
    HANG,
    INVALID_TOKEN,
    LOST_THE_RACE,
    RUNNING_ALREADY,
    STARTED,
    STARTING_UP,
    Answer,
    Receiver,
    Script,
)
from tests.service import Service, wait_until

MakeStore = Callable[..., Store]
ASKED = Request(prompt="Hi", requested_model="echo", model="echo", provider="echo", max_tokens=5, user_id="u")
DONE = Outcome(End("stop"), "echo", Usage(3, 4))
ROOM = Places(100, 100, {})
ONE, TWO = "http://one:1", "http://two:2"


def ended(store: Store, session_id: str = "", url: str = ONE + "/w", subject: str = "n8n", callback_in: float = 0) -> str:
    """A session that has ended and owes its callback; its id."""
    session_id = session_id or str(uuid.uuid4())
    store.create(session_id, subject, ASKED, url)
    assert isinstance(store.claim(session_id), Claimed)
    finished = store.finish(session_id, 1, 1, 1, End("stop"), "Hello", DONE, callback_in=callback_in)
    assert isinstance(finished, Finished)
    return session_id


def dead(store: Store, url: str = ONE + "/w", subject: str = "n8n") -> str:
    """A session whose callback was given up; its id."""
    session_id = ended(store, url=url, subject=subject)
    assert store.outbox.take(session_id) is not None
    assert store.outbox.settle(session_id, 1, "dead", last_answer="n8n answered 410", line=Attempt(1, "dead", 5, 410, "gone", 7))
    return session_id


def standing(store: Store, session_id: str) -> CallbackRecord:
    """Where a callback stands."""
    record = store.outbox.record(session_id)
    assert record is not None and record.callback is not None
    return record.callback


@pytest.fixture(autouse=True)
def no_doubt(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that is new gives its callbacks at once; when it must not is in test_rules.py."""
    monkeypatch.setattr("aistream.store.NOTICED", 0)


# ---- The outbox ----


def test_the_callback_is_owed_with_the_ending_and_no_longer_than_that(make_store: MakeStore) -> None:
    store = make_store()
    owed = ended(store)
    before = store.outbox.counts()

    store.outbox.take(owed)
    store.outbox.settle(owed, 1, "delivered")

    assert (before.owed, before.dead, store.outbox.counts()) == (1, 0, Counts(0, 0.0, 0, 0))
    assert standing(store, owed).state == "delivered"
    assert store.due(ROOM).due == []
    assert store.connections.call("KEYS", "aistream:{0}:origins*") == []


def test_the_first_attempt_waits_for_its_time(make_store: MakeStore) -> None:
    store = make_store()
    session_id = ended(store, callback_in=0.2)

    at_once = store.due(ROOM).due, store.outbox.take(session_id)
    gevent.sleep(0.25)
    later = store.due(ROOM).due

    assert at_once == ([], None)
    assert later == [(session_id, State.COMPLETED, ONE)]


def test_an_origin_without_places_does_not_stand_before_another(make_store: MakeStore) -> None:
    store = make_store()
    for _ in range(30):
        ended(store, url=ONE + "/w")
    other = ended(store, url=TWO + "/w")

    full = store.due(Places(10, 5, {ONE: 0}))
    some = store.due(Places(10, 5, {}))
    few = store.due(Places(3, 5, {}))

    assert (full.due, full.more) == ([(other, State.COMPLETED, TWO)], True)
    assert sorted(due.origin for due in some.due) == [ONE] * 5 + [TWO] and some.more
    assert len(few.due) == 3 and few.more


def test_when_all_that_is_due_has_a_place_there_is_no_more(make_store: MakeStore) -> None:
    store = make_store()
    ids = {ended(store), ended(store), ended(store, url=TWO)}

    look = store.due(Places(3, 2, {}))

    assert ({due.session_id for due in look.due}, look.more) == (ids, False)


def test_a_queue_forgets_a_session_that_has_run_out(make_store: MakeStore) -> None:
    store = make_store()
    session_id = ended(store)
    call = store.connections.call
    call("DEL", f"aistream:{{0}}:session:{session_id}")

    due = store.due(ROOM).due

    assert (due, store.outbox.counts().owed) == ([], 0)
    assert call("KEYS", "aistream:{0}:origins*") == []


def test_attempts_are_kept_with_their_time_status_and_reason(make_store: MakeStore) -> None:
    store = make_store(LEASE_SECONDS=0.2)
    session_id = ended(store)
    first = Attempt(1, "retry", 1_795_000_000_000, 503, "n8n answered 503", 12)
    store.outbox.take(session_id)
    store.outbox.settle(session_id, 1, "retry", delay=0, last_answer=first.reason, line=first)
    store.outbox.take(session_id)  # and its worker is lost
    gevent.sleep(0.25)
    third = store.outbox.take(session_id)

    assert third is not None and (third.attempt, third.tries, third.ambiguous) == (3, 3, True)
    callback = standing(store, session_id)
    assert callback.history == [first, Attempt(2, "lost")]
    assert (callback.state, callback.attempt, callback.origin, callback.open) == ("owed", 3, ONE, True)
    assert callback.last_answer == "n8n answered 503"


def test_an_attempt_is_hidden_for_as_long_as_its_worker_holds_it(make_store: MakeStore) -> None:
    store = make_store(LEASE_SECONDS="1")
    session_id = ended(store)
    store.outbox.take(session_id)

    gevent.sleep(0.7)
    store.outbox.hold({session_id: 1, "unheard-of": 1})
    gevent.sleep(0.7)
    held = store.outbox.take(session_id)
    store.outbox.hold({session_id: 7})  # another worker's idea of the attempt
    gevent.sleep(0.4)
    lapsed = store.outbox.take(session_id)

    assert held is None
    assert lapsed is not None and (lapsed.attempt, lapsed.ambiguous) == (2, True)


def test_a_settled_attempt_is_not_moved_by_a_late_hold(make_store: MakeStore) -> None:
    store = make_store()
    waiting, done = ended(store), ended(store)
    for session_id in (waiting, done):
        store.outbox.take(session_id)
    store.outbox.settle(waiting, 1, "retry", delay=0)
    store.outbox.settle(done, 1, "delivered")

    store.outbox.hold({waiting: 1, done: 1})

    assert [due.session_id for due in store.due(ROOM).due] == [waiting]


def test_a_long_history_loses_its_beginning(make_store: MakeStore) -> None:
    store = make_store()
    session_id = ended(store)
    for attempt in range(1, 60):
        store.outbox.take(session_id)
        store.outbox.settle(session_id, attempt, "retry", line=Attempt(attempt, "retry", 1, 503, "x" * 300, 1))

    kept = [one.attempt for one in standing(store, session_id).history]

    assert kept == list(range(kept[0], 60)) and 10 < len(kept) < 30


def test_how_long_n8n_has_said_that_it_runs_is_known_until_it_says_something_else(make_store: MakeStore) -> None:
    store = make_store()
    session_id = ended(store)
    seen = []
    for attempt, running in enumerate([True, True, False, True, True], start=1):
        taken = store.outbox.take(session_id)
        assert taken is not None
        seen.append(taken.running_for)
        gevent.sleep(0.1)
        store.outbox.settle(session_id, attempt, "retry", running=running)
    last = store.outbox.take(session_id)

    assert last is not None
    assert (seen[0], seen[3]) == (0, 0)
    assert seen[2] >= seen[1] + 0.09 and last.running_for >= 0.09
    assert last.age >= 0.49


# ---- Again, by somebody's wish ----


def test_a_dead_callback_is_owed_again_with_its_whole_schedule(make_store: MakeStore) -> None:
    store = make_store()
    session_id = dead(store)

    said = store.outbox.redeliver(session_id)
    taken = store.outbox.take(session_id)

    assert said == "owed"
    assert taken is not None and (taken.attempt, taken.tries) == (2, 1)
    assert store.outbox.counts().dead == 0 and store.outbox.counts().owed == 1
    assert store.connections.call("TTL", "aistream:{0}:content:" + session_id) > 86_400


def test_an_owed_callback_is_due_at_once_unless_it_is_being_attempted(make_store: MakeStore) -> None:
    store = make_store()
    session_id = ended(store)
    store.outbox.take(session_id)
    during = store.outbox.redeliver(session_id)
    store.outbox.settle(session_id, 1, "retry", delay=3600)

    said = store.outbox.redeliver(session_id)
    taken = store.outbox.take(session_id)

    assert (during, said) == ("trying", "owed")
    assert taken is not None and (taken.attempt, taken.tries) == (2, 1)


def test_what_cannot_be_delivered_again_is_told_apart(make_store: MakeStore) -> None:
    store = make_store()
    pending, delivered, gone = str(uuid.uuid4()), ended(store), dead(store)
    store.create(pending, "n8n", ASKED, ONE)
    store.outbox.take(delivered)
    store.outbox.settle(delivered, 1, "delivered")
    store.connections.call("DEL", f"aistream:{{0}}:content:{gone}")
    foreign = dead(store, subject="other")

    said = [store.outbox.redeliver(one, "n8n") for one in (pending, delivered, gone, foreign, "unheard-of")]

    assert said == ["not_ended", "delivered", "gone", "missing", "missing"]
    assert standing(store, foreign).state == "dead"
    assert store.outbox.redeliver(foreign, "other") == "owed"


# ---- The lists ----


def test_callbacks_are_listed_page_by_page_oldest_first(make_store: MakeStore) -> None:
    store = make_store()
    letters = []
    for _ in range(5):
        letters.append(dead(store))
        gevent.sleep(0.002)
    owed = ended(store)

    pages, after = [], None
    while True:
        page = store.outbox.callbacks("dead", after=after, limit=2)
        pages.append([record.id for record in page.callbacks])
        after = page.after
        if after is None:
            break

    assert [one for page in pages for one in page] == letters and [len(page) for page in pages[:2]] == [2, 2]
    assert [record.id for record in store.outbox.callbacks("owed").callbacks] == [owed]


def test_callbacks_of_the_same_millisecond_are_listed_once_each(make_store: MakeStore) -> None:
    store = make_store()
    letters = {dead(store) for _ in range(7)}
    store.connections.call("ZADD", "aistream:{0}:dead", *(part for one in letters for part in (int(time.time() * 1000), one)))

    found, after = [], None
    for _ in range(7):
        page = store.outbox.callbacks("dead", after=after, limit=1)
        found += [record.id for record in page.callbacks]
        after = page.after

    assert sorted(found) == sorted(letters)


def test_a_subject_sees_its_own_callbacks_alone(make_store: MakeStore) -> None:
    store = make_store()
    mine, others = [dead(store, subject="a"), dead(store, subject="a")], dead(store, subject="b")

    assert {record.id for record in store.outbox.callbacks("dead", "a").callbacks} == set(mine)
    assert [record.id for record in store.outbox.callbacks("dead", "b").callbacks] == [others]
    assert store.outbox.callbacks("dead", "").callbacks == []
    assert len(store.outbox.callbacks("dead").callbacks) == 3


def test_a_dead_letter_is_forgotten_after_a_week(make_store: MakeStore) -> None:
    store = make_store()
    old, new = dead(store), dead(store)
    store.connections.call("ZADD", "aistream:{0}:dead", int((time.time() - 7 * 86_400 - 5) * 1000), old)

    listed = [record.id for record in store.outbox.callbacks("dead").callbacks]

    assert (listed, store.outbox.counts().dead) == ([new], 1)


def test_the_oldest_owed_callback_is_known_by_its_age(make_store: MakeStore) -> None:
    store = make_store()
    ended(store)
    gevent.sleep(0.2)
    ended(store)

    counts = store.outbox.counts()

    assert counts.owed == 2 and counts.oldest_owed >= 0.19


# ---- Idempotency keys ----


def test_a_key_gives_the_session_it_began_and_none_for_another_body(make_store: MakeStore) -> None:
    store = make_store()
    first = store.create("1", "n8n", ASKED, ONE, Key("k", "body"))

    same = store.create("2", "n8n", ASKED, ONE, Key("k", "body"))
    other = store.create("3", "n8n", ASKED, ONE, Key("k", "another"))

    assert first is not None and same is not None
    assert (same.id, same.created_at, same.deadline, other) == ("1", first.created_at, first.deadline, None)
    assert store.pending("2") is None and store.pending("3") is None


def test_a_store_that_lost_everything_is_told_of_the_keys_again(make_store: MakeStore) -> None:
    store = make_store()
    pending = store.create("1", "n8n", ASKED, ONE, Key("k1", "b"))
    store.create("2", "n8n", ASKED, ONE, Key("k2", "b"))
    claimed = store.claim("2")
    assert pending is not None and isinstance(claimed, Claimed)
    store.connections.call("FLUSHALL")

    store.create_again(pending)
    store.restore(claimed, [])

    ids = [found and found.id for found in (store.create(k, "n8n", ASKED, ONE, Key(k, "b")) for k in ("k1", "k2"))]
    assert ids == ["1", "2"]


# ---- The sender ----

SECRETS = ["whsec_" + base64.b64encode(bytes([byte]) * 32).decode() for byte in (1, 2, 3)]


class Sender:
    """A worker's sender on the embedded store, without the rest of the worker."""

    def __init__(self, **environ: str) -> None:
        config = make_config(**{"CALLBACK_SCHEDULE": "0,0,0,0,0,0,0,0", **environ})
        self.store = Store(config)
        destinations = Destinations(config)
        self.outbound = Outbound(destinations, pool_size=5)
        self.delivery = Delivery(config, self.store.outbox, destinations, self.outbound, Recall(config, self.store))

    def deliver(self, url: str) -> CallbackRecord:
        """Owes a callback and makes its attempts until it is settled."""
        session_id = ended(self.store, url=url)
        for _ in range(30):
            callback = standing(self.store, session_id)
            if callback.state != "owed":
                return callback
            self.delivery.wake(session_id, callback.origin)
            wait_until(lambda: not len(self.delivery))
        raise AssertionError(f"never settled: {standing(self.store, session_id)}")


@pytest.fixture
def make_sender() -> Iterator[Callable[..., Sender]]:
    """Builds senders."""
    senders: list[Sender] = []

    def make(**environ: str) -> Sender:
        senders.append(Sender(**environ))
        return senders[-1]

    yield make
    for sender in senders:
        sender.outbound.close()
        sender.store.close()


MakeSender = Callable[..., Sender]
HTML = {"Content-Type": "text/html"}

#: What the receiver does, attempt by attempt -> what becomes of the callback, and what came of each attempt.
STORIES: dict[str, tuple[list[Script], str, str]] = {
    "at once": ([STARTED], "delivered", "delivered"),
    "whatever success": ([Answer(202, {}, "")], "delivered", "delivered"),
    "no content": ([Answer(204, {}, "")], "delivered", "delivered"),
    "starting": ([STARTING_UP, CANNOT_POST, STARTED], "delivered", "retry retry delivered"),
    "busy": ([Answer(429), Answer(408), Answer(425), Answer(503), STARTED], "delivered", "retry retry retry retry delivered"),
    "too early": ([RUNNING_ALREADY, RUNNING_ALREADY, STARTED], "delivered", "retry retry delivered"),
    "cut, and it had arrived": ([CUT, FINISHED_ALREADY], "delivered", "retry delivered"),
    "cut, and the execution is deleted": ([CUT, DOES_NOT_EXIST], "delivered", "retry delivered"),
    "lost a race": ([LOST_THE_RACE, RUNNING_ALREADY, FINISHED_ALREADY], "delivered", "retry retry delivered"),
    "gateway timed out": ([Answer(504, HTML, ""), FINISHED_ALREADY], "delivered", "retry delivered"),
    "bad gateway": ([Answer(502, HTML, ""), FINISHED_ALREADY], "dead", "retry dead"),
    "nobody waits": ([FINISHED_ALREADY], "dead", "dead"),
    "too early, then too late": ([RUNNING_ALREADY, FINISHED_ALREADY], "dead", "retry dead"),
    "redirect": ([Answer(302, {"Location": "/x"}, "")], "dead", "dead"),
    "gone": ([Answer(410)], "dead", "dead"),
    "not let in": ([INVALID_TOKEN], "dead", "dead"),
    "endless success": ([ENDLESS], "delivered", "delivered"),
    "success that breaks off": ([CUT_BODY], "delivered", "delivered"),
}


@pytest.mark.parametrize("story", STORIES)
def test_a_callback_comes_to_what_its_answers_mean(make_sender: MakeSender, n8n: Receiver, story: str) -> None:
    script, state, outcomes = STORIES[story]
    n8n.answers(script)

    callback = make_sender().deliver(n8n.url())

    assert (callback.state, " ".join(one.outcome for one in callback.history)) == (state, outcomes)
    assert len(n8n.requests) == len(script)
    assert [received.json["attempt"] for received in n8n.requests] == list(range(1, len(script) + 1))
    assert len({received.headers["webhook-id"] for received in n8n.requests}) == 1


@pytest.mark.parametrize(("first", "state"), [(CUT, "delivered"), (Answer(503), "dead")])
def test_an_execution_that_runs_and_runs_is_judged_at_its_bound_by_whether_an_attempt_may_have_arrived(
    make_sender: MakeSender, n8n: Receiver, monkeypatch: pytest.MonkeyPatch, first: Script, state: str
) -> None:
    monkeypatch.setattr("aistream.callback.RUNNING", 0.3)
    sender = make_sender(CALLBACK_SCHEDULE="0,0,0.1,3600,3600")
    n8n.answers([first])
    n8n.always(RUNNING_ALREADY)
    session_id = ended(sender.store, url=n8n.url())

    until = time.monotonic() + 5
    while standing(sender.store, session_id).state == "owed" and time.monotonic() < until:
        sender.delivery.wake(session_id, n8n.origin)
        gevent.sleep(0.02)

    callback = standing(sender.store, session_id)
    assert callback.state == state
    # The third wait is an hour by the schedule: it ends at the bound.
    assert len(n8n.requests) == 4
    assert "attempt" in callback.last_answer


def test_the_last_attempt_of_the_schedule_is_the_last(make_sender: MakeSender, n8n: Receiver) -> None:
    n8n.always(Answer(503))

    callback = make_sender(CALLBACK_SCHEDULE="0,0,0").deliver(n8n.url())

    assert (callback.state, callback.attempt, len(n8n.requests)) == ("dead", 3, 3)
    assert callback.last_answer == "n8n answered 503; this was the last attempt"


def test_an_n8n_that_is_down_has_seen_nothing(make_sender: MakeSender, n8n: Receiver) -> None:
    sender = make_sender(CALLBACK_SCHEDULE="0,0,0")
    n8n.down()

    callback = sender.deliver(n8n.url())
    n8n.up()

    assert (callback.state, n8n.requests) == ("dead", [])
    assert callback.last_answer == "could not connect; this was the last attempt"


def test_an_answer_that_drips_ends_with_what_its_status_says(
    make_sender: MakeSender, n8n: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aistream.outbound.READING", 0.2)
    for status, outcomes in ((200, "delivered"), (409, "retry retry delivered"), (410, "dead")):
        n8n.reset()
        n8n.answers([Answer(status, body=b"x" * 100, drip=0.05)] * 2)

        callback = make_sender().deliver(n8n.url())

        assert " ".join(one.outcome for one in callback.history) == outcomes


def test_a_receiver_that_takes_the_request_and_says_nothing_is_left(
    make_sender: MakeSender, n8n: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aistream.delivery.ATTEMPT", 0.2)
    n8n.answers([HANG, FINISHED_ALREADY])

    callback = make_sender().deliver(n8n.url())

    assert (callback.state, callback.history[0].reason) == ("delivered", "no whole answer in time")


def test_a_receiver_that_says_nothing_for_the_time_of_a_read_may_have_the_callback(
    make_sender: MakeSender, n8n: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert TIMEOUT == (5, 30)
    monkeypatch.setattr("aistream.outbound.TIMEOUT", (5, 0.2))
    n8n.answers([HANG, DOES_NOT_EXIST])

    callback = make_sender().deliver(n8n.url())

    assert (callback.state, callback.history[0].reason) == ("delivered", "no answer in time")


def test_a_receiver_that_does_not_take_the_connection_has_not_got_the_callback(
    make_sender: MakeSender, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aistream.outbound.TIMEOUT", (0.2, 30))
    with contextlib.ExitStack() as stack:
        deaf = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):  # more than wait to be accepted: the kernel leaves the next ones without an answer
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(deaf.getsockname())

        callback = make_sender(CALLBACK_SCHEDULE="0").deliver(f"http://127.0.0.1:{deaf.getsockname()[1]}/w")

    assert (callback.state, callback.last_answer) == ("dead", "connecting timed out; this was the last attempt")


def test_a_hanging_receiver_delays_its_own_callbacks_alone(make_sender: MakeSender, n8n: Receiver) -> None:
    sender = make_sender(CALLBACK_CONCURRENCY="2")
    n8n.always(HANG)
    with Receiver() as other:
        hanging = [ended(sender.store, url=n8n.url()) for _ in range(40)]
        well = [ended(sender.store, url=other.url(f"/{number}")) for number in range(10)]

        for _ in range(20):  # as the worker's loop does
            look = sender.store.due(sender.delivery.places)
            sender.delivery.looked(look.more)
            for session_id, _, origin in look.due:
                sender.delivery.wake(session_id, origin)
            sender.delivery.rest(0.2)
            if len(other.requests) == len(well):
                break

        n8n.wait_for(2)
        assert len(other.requests) == 10 and len(n8n.requests) == 2
        assert {standing(sender.store, one).state for one in hanging} == {"owed"}
        wait_until(lambda: {standing(sender.store, one).state for one in well} == {"delivered"})
        sender.delivery.give_up()
        wait_until(lambda: not len(sender.delivery))


def test_while_more_is_due_than_there_are_places_a_free_one_is_used_at_once(make_sender: MakeSender, n8n: Receiver) -> None:
    sender = make_sender(CALLBACK_CONCURRENCY="3")
    owed = [ended(sender.store, url=n8n.url()) for _ in range(30)]

    looks = 0
    while sender.store.outbox.counts().owed and looks < 100:
        look = sender.store.due(sender.delivery.places)
        sender.delivery.looked(look.more)
        for session_id, _, origin in look.due:
            sender.delivery.wake(session_id, origin)
        sender.delivery.rest(30 if look.more else 0.2)  # nobody waits that long: room is told of
        looks += 1

    assert len(n8n.requests) == len(owed)


def test_a_callback_carries_the_operators_headers_and_is_signed_with_both_secrets(make_sender: MakeSender, n8n: Receiver) -> None:
    sender = make_sender(
        CALLBACK_SECRET=SECRETS[0],
        CALLBACK_SECRET_PREVIOUS=SECRETS[1],
        CALLBACK_HEADERS='{"X-Key": "a: b", "Authorization": "Bearer c"}',
    )

    sender.deliver(n8n.url())

    (received,) = n8n.requests
    assert (received.headers["x-key"], received.headers["authorization"]) == ("a: b", "Bearer c")
    assert received.headers["user-agent"].startswith("Mozilla/5.0 (compatible; aistream/")
    for secret in SECRETS[:2]:
        assert Webhook(secret).verify(received.body, received.headers) == received.json
    with pytest.raises(WebhookVerificationError):
        Webhook(SECRETS[2]).verify(received.body, received.headers)


def test_a_callback_goes_to_the_rewritten_origin_with_path_and_query_as_given(make_sender: MakeSender, n8n: Receiver) -> None:
    sender = make_sender(RESUME_URL_REWRITE=f"http://localhost:5678={n8n.origin}")

    callback = sender.deliver("http://localhost:5678/webhook-waiting/7?signature=ab%2fcd&a='b'")

    assert callback.state == "delivered"
    assert [received.target for received in n8n.requests] == ["/webhook-waiting/7?signature=ab%2fcd&a='b'"]


def test_a_destination_that_is_refused_is_a_dead_letter_that_names_the_setting(make_sender: MakeSender) -> None:
    callback = make_sender(RESUME_URL_ALLOWED_ORIGINS="http://n8n:5678").deliver("http://localhost:5678/w")

    assert callback.state == "dead" and callback.attempt == 1
    assert callback.last_answer == (
        "resumeUrl has the origin http://localhost:5678, which is not among RESUME_URL_ALLOWED_ORIGINS of the service's "
        "configuration"
    )


def test_retry_after_slows_the_next_attempt_down_within_its_bounds(make_sender: MakeSender, n8n: Receiver) -> None:
    n8n.answers([Answer(503, {"Retry-After": "100"}, "")])
    sender = make_sender(CALLBACK_SCHEDULE="0,20")
    session_id = ended(sender.store, url=n8n.url())

    sender.delivery.wake(session_id, n8n.origin)
    wait_until(lambda: standing(sender.store, session_id).history)

    callback = standing(sender.store, session_id)
    assert callback.next_at is not None and callback.history[0].at is not None
    assert 39_000 < callback.next_at - callback.history[0].at < 60_000  # the schedule says 20 s, Retry-After 100


# ---- The whole service ----


def test_a_receiver_that_hangs_does_not_keep_another_or_the_streams_waiting(
    start_service: Callable[..., Service], n8n: Receiver
) -> None:
    service = start_service(CALLBACK_CONCURRENCY="2")
    n8n.always(HANG)
    with Receiver() as other:
        for number in range(20):
            service.read(service.stream_url(model="echo", resumeUrl=n8n.url(f"/hangs/{number}")))
        for number in range(5):
            service.read(service.stream_url(model="echo", resumeUrl=other.url(f"/well/{number}")))

        delivered = other.wait_for(5)

        assert {received.path for received in delivered} == {f"/well/{number}" for number in range(5)}
        assert len(n8n.requests) == 2
        wait_until(lambda: len(service.lines("callback.attempted")) == 5)
    metrics = service.get("/metrics").text
    assert 'aistream_callback_attempts_total{outcome="delivered"} 5.0' in metrics
    assert "aistream_callbacks_owed 20.0" in metrics
