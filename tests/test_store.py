"""The store's transitions, one by one, on a real Redis and on the embedded store."""

import time
from collections.abc import Callable

import gevent
import pytest

from aistream.errors import StoreUnavailable
from aistream.events import Cursor, End, Failed, Reasoning, Start, Text, Usage
from aistream.session import EXPIRED, Claimed, Elsewhere, Ended, Fenced, Finished, Missing, Outcome, Request, Short, State
from aistream.store import NO_PLACES, Holding, Places, Store
from tests.conftest import make_config

MakeStore = Callable[..., Store]

ASKED = Request(
    prompt="Héllo\n\0", requested_model="gpt-4", model="gpt-4", provider="openai", max_tokens=5, user_id=7, metadata={"a": [1.5]}
)
DONE = Outcome(End("stop"), "gpt-4-0613", Usage(3, 4), first_token_ms=5)

#: Places for callbacks.
ROOM = Places(10, 10, {})

#: A lease that is over at once: for tests that wait for nothing but its end.
SHORT = {"LEASE_SECONDS": 0.2}
OVER = 0.25


def create(store: Store, session_id: str) -> None:
    store.create(session_id, "n8n", ASKED, "http://n8n/w?signature=ab")


def running(store: Store, session_id: str) -> Claimed:
    create(store, session_id)
    claimed = store.claim(session_id)
    assert isinstance(claimed, Claimed)
    return claimed


def ended(store: Store, session_id: str, answer: str = "answer") -> None:
    running(store, session_id)
    assert isinstance(store.finish(session_id, 1, 1, 1, End("stop"), answer, DONE), Finished)


def test_a_created_session_is_due_after_its_time_and_not_before(make_store: MakeStore, session_id: str) -> None:
    store = make_store(SESSION_TTL_SECONDS=0.5)

    accepted = store.create(session_id, "n8n", ASKED, "http://n8n/w")
    at_once = store.due(ROOM).due

    assert accepted.deadline - accepted.created_at == 500
    assert at_once == []
    gevent.sleep(0.55)
    assert store.due(ROOM).due == [(session_id, State.PENDING, "")]


def test_creating_a_session_again_changes_nothing(make_store: MakeStore, session_id: str) -> None:
    store = make_store()

    first = store.create(session_id, "n8n", ASKED, "http://n8n/w")
    claimed = store.claim(session_id)
    second = store.create(session_id, "other", ASKED, "http://other/w")

    assert (second.created_at, second.deadline) == (first.created_at, first.deadline)
    assert isinstance(claimed, Claimed) and claimed.accepted == first and isinstance(store.claim(session_id), Elsewhere)


def test_only_the_first_claim_gets_the_session_and_all_it_needs(make_store: MakeStore, session_id: str) -> None:
    one, other = make_store("one"), make_store("other")
    create(one, session_id)

    first, second = one.claim(session_id), other.claim(session_id)

    assert isinstance(first, Claimed) and (first.epoch, first.request, first.may_run) == (1, ASKED, True)
    assert second == Elsewhere("one")
    assert one.read({session_id: None}) == {session_id: [(Cursor(1, 0), Start(session_id, "gpt-4", "openai"))]}


def test_a_session_nobody_knows_is_missing(make_store: MakeStore, session_id: str) -> None:
    store = make_store()

    assert isinstance(store.claim(session_id), Missing)
    assert store.finish(session_id, 1, 1, 1, End("stop"), "", DONE) == Missing()
    assert store.renew({session_id: Holding(1, 1)}) == {session_id: "gone"}
    assert store.outbox.take(session_id) is None
    assert store.outbox.settle(session_id, 1, "delivered") is False
    assert isinstance(store.cancel(session_id), Missing)
    assert (store.last_id(session_id), store.standing([session_id]), store.pending(session_id)) == (None, {}, None)


def test_events_come_back_as_they_were_appended(make_store: MakeStore, session_id: str) -> None:
    store = make_store()
    running(store, session_id)
    events = [Text("a\r\n\0é😀\u2028"), Reasoning("why"), Usage(1, 2, 3, 4, "partial"), Text("x" * 100_000)]

    refusals = store.append([(session_id, Cursor(1, i), event) for i, event in enumerate(events, 1)])

    assert refusals == [None] * 4
    assert [event for _, event in store.read({session_id: Cursor(1, 0)})[session_id]] == events
    assert store.last_id(session_id) == Cursor(1, 4)


def test_a_late_append_of_an_earlier_epoch_is_refused(make_store: MakeStore, session_id: str) -> None:
    paused, other = make_store("paused", **SHORT), make_store("other", **SHORT)
    running(paused, session_id)
    paused.append([(session_id, Cursor(1, 1), Text("seen"))])
    gevent.sleep(OVER)

    recovered = other.claim(session_id, "recover")
    (refused,) = paused.append([(session_id, Cursor(1, 2), Text("late"))])

    assert isinstance(recovered, Claimed) and (recovered.epoch, recovered.may_run) == (2, False)
    assert refused is not None
    assert paused.renew({session_id: Holding(1, 1)}) == {session_id: "fenced"}
    assert isinstance(paused.finish(session_id, 1, 2, 2, End("stop"), "late", DONE), Fenced)


def test_a_session_that_only_started_may_run_once_more_and_then_never_again(make_store: MakeStore, session_id: str) -> None:
    store = make_store(**SHORT)
    running(store, session_id)

    gevent.sleep(OVER)
    second = store.claim(session_id, "recover")
    gevent.sleep(OVER)
    third = store.claim(session_id, "recover")

    assert isinstance(second, Claimed) and (second.epoch, second.may_run) == (2, True)
    assert isinstance(third, Claimed) and (third.epoch, third.may_run) == (3, False)


def test_a_renewed_lease_cannot_be_recovered(make_store: MakeStore, session_id: str) -> None:
    one, other = make_store("one", LEASE_SECONDS="1"), make_store("other", LEASE_SECONDS="1")
    running(one, session_id)

    gevent.sleep(0.7)
    verdict = one.renew({session_id: Holding(1, 1)})
    gevent.sleep(0.7)

    assert verdict == {session_id: "owner"}
    assert isinstance(other.claim(session_id, "recover"), Elsewhere)


def test_nothing_is_appended_to_a_log_that_is_gone(make_store: MakeStore, session_id: str) -> None:
    store = make_store()

    (refused,) = store.append([(session_id, Cursor(1, 1), Text("x"))])

    assert refused is not None
    assert store.last_id(session_id) is None


def test_the_ending_waits_for_the_events_before_it(make_store: MakeStore, session_id: str) -> None:
    store = make_store()
    running(store, session_id)

    short = store.finish(session_id, 1, 2, 2, End("stop"), "a", DONE)
    store.append([(session_id, Cursor(1, 1), Text("a"))])
    whole = store.finish(session_id, 1, 2, 2, End("stop"), "a", DONE)
    again = store.finish(session_id, 1, 2, 2, End("stop"), "a", DONE)

    assert short == Short()
    assert whole == again == Finished(Cursor(1, 2), State.COMPLETED)
    assert store.claim(session_id) == Ended(State.COMPLETED, Cursor(1, 2), True)


def test_a_pending_session_expires_only_when_its_time_has_come(make_store: MakeStore, session_id: str) -> None:
    store = make_store(SESSION_TTL_SECONDS=0.5)
    create(store, session_id)

    early = store.finish(session_id, 0, 0, 0, EXPIRED, "", DONE)
    gevent.sleep(0.55)
    late = store.finish(session_id, 0, 0, 0, EXPIRED, "", DONE)

    assert (early, late) == (Fenced(), Finished(Cursor(1, 0), State.EXPIRED))
    assert store.read({session_id: None})[session_id] == [(Cursor(1, 0), EXPIRED)]
    assert store.claim(session_id) == Ended(State.EXPIRED, Cursor(1, 0), True)


def test_an_ended_session_owes_one_callback_with_everything_in_it(make_store: MakeStore, session_id: str) -> None:
    store = make_store()
    ended(store, session_id, answer="ans\0wér")

    due = store.due(ROOM).due
    taken = store.outbox.take(session_id)

    assert due == [(session_id, State.COMPLETED, "http://n8n")]
    assert taken is not None and (taken.attempt, taken.ambiguous) == (1, False)
    assert (taken.session.request, taken.session.answer, taken.session.outcome) == (ASKED, "ans\0wér", DONE)
    assert taken.session.resume_url == "http://n8n/w?signature=ab"
    assert store.outbox.take(session_id) is None
    assert store.due(ROOM).due == []


def test_a_callback_is_tried_again_after_its_delay_and_counts_its_attempts(make_store: MakeStore, session_id: str) -> None:
    store = make_store()
    ended(store, session_id)
    store.outbox.take(session_id)

    store.outbox.settle(session_id, 1, "retry", delay=0.2, ambiguous=True, last_answer="503")
    too_early = store.outbox.take(session_id)
    gevent.sleep(0.25)
    again = store.outbox.take(session_id)

    assert too_early is None
    assert again is not None and (again.attempt, again.ambiguous) == (2, True)


def test_an_attempt_left_open_by_a_lost_worker_is_ambiguous(make_store: MakeStore, session_id: str) -> None:
    store = make_store(**SHORT)
    ended(store, session_id)

    store.outbox.take(session_id)
    gevent.sleep(OVER)
    second = store.outbox.take(session_id)

    assert second is not None and (second.attempt, second.ambiguous) == (2, True)


def test_delivered_wins_over_a_late_word_and_a_late_word_over_nothing(make_store: MakeStore, session_id: str) -> None:
    store = make_store()
    ended(store, session_id)
    store.outbox.take(session_id)

    assert store.outbox.settle(session_id, 9, "dead") is False
    assert store.outbox.settle(session_id, 1, "delivered") is True
    assert store.outbox.settle(session_id, 1, "retry") is False
    assert store.due(ROOM).due == []


def test_after_delivery_the_content_goes_with_the_replay_and_a_tombstone_stays(make_store: MakeStore, session_id: str) -> None:
    store = make_store(REPLAY_SECONDS="1")
    ended(store, session_id)
    store.outbox.take(session_id)

    store.outbox.settle(session_id, 1, "delivered")
    replayable = store.claim(session_id)
    time.sleep(1.1)

    assert replayable == Ended(State.COMPLETED, Cursor(1, 1), True)
    assert store.claim(session_id) == Ended(State.COMPLETED, Cursor(1, 1), False)
    assert store.pending(session_id) is None


def test_a_delivery_that_is_said_again_does_not_prolong_the_replay(make_store: MakeStore, session_id: str) -> None:
    store = make_store(REPLAY_SECONDS="2")
    ended(store, session_id)
    store.outbox.take(session_id)
    store.outbox.settle(session_id, 1, "delivered")
    time.sleep(1.1)  # keys run out by Redis's own clock

    said_again = store.outbox.settle(session_id, 1, "delivered")
    time.sleep(1.0)

    assert said_again is True
    assert store.claim(session_id) == Ended(State.COMPLETED, Cursor(1, 1), False)


def test_a_dead_callback_is_kept_for_a_week(make_store: MakeStore, session_id: str) -> None:
    store = make_store()
    ended(store, session_id)
    store.outbox.take(session_id)

    store.outbox.settle(session_id, 1, "dead", last_answer="410")

    call = store.connections.call
    assert call("ZRANGE", "aistream:{0}:dead", 0, -1) == [session_id.encode()]
    assert call("TTL", "aistream:{0}:content:" + session_id) > 6 * 86_400
    assert call("TTL", "aistream:{0}:log:" + session_id) <= 1800


def test_no_more_callbacks_are_given_than_there_are_places(make_store: MakeStore) -> None:
    store = make_store(SESSION_TTL_SECONDS=0.2)
    for number in range(4):
        ended(store, f"ended-{number}")
    create(store, "pending")
    gevent.sleep(0.25)

    due = store.due(Places(2, 2, {})).due

    assert [state for _, state, _ in due] == [State.PENDING, State.COMPLETED, State.COMPLETED]


def test_after_a_silence_running_sessions_get_one_lease_to_renew_first(make_store: MakeStore, session_id: str) -> None:
    store = make_store(LEASE_SECONDS=0.5)
    running(store, session_id)
    gevent.sleep(0.55)

    first_look = store.due(NO_PLACES).due
    gevent.sleep(0.1)
    during_calm = store.due(NO_PLACES).due
    gevent.sleep(0.45)
    after_calm = store.due(NO_PLACES).due

    assert (first_look, during_calm) == ([], [])
    assert after_calm == [(session_id, State.RUNNING, "")]


def test_nothing_private_stands_in_the_session_hash(make_store: MakeStore, session_id: str) -> None:
    store = make_store()
    ended(store, session_id, answer="the-answer")

    stored = b" ".join(store.connections.call("HGETALL", "aistream:{0}:session:" + session_id))

    for private in (b"the-answer", "Héllo".encode(), b"signature"):
        assert private not in stored


def test_a_failed_ending_is_kept_with_its_reason(make_store: MakeStore, session_id: str) -> None:
    store = make_store()
    running(store, session_id)
    failed = Failed("upstream_cut", "It broke.", True)

    store.finish(session_id, 1, 1, 1, failed, "", DONE)

    assert store.claim(session_id) == Ended(State.FAILED, Cursor(1, 1), True)
    assert store.read({session_id: Cursor(1, 0)})[session_id] == [(Cursor(1, 1), failed)]


def test_a_redis_that_is_not_there_is_named_as_away(free_port: int) -> None:
    store = Store(make_config(REDIS_URL=f"redis://127.0.0.1:{free_port}"))

    for ask in (store.ping, lambda: store.claim("x"), lambda: store.append([("x", Cursor(1, 1), Text("x"))])):
        with pytest.raises(StoreUnavailable):
            ask()


@pytest.mark.parametrize(
    "state",
    [
        [("CONFIG", "SET", "maxmemory", "1")],
        [("REPLICAOF", "127.0.0.1", "1")],
        [("CONFIG", "SET", "replica-serve-stale-data", "no"), ("REPLICAOF", "127.0.0.1", "1")],
        [("CONFIG", "SET", "min-replicas-to-write", "1")],
    ],
    ids=["full", "replica", "replica-without-master", "too-few-replicas"],
)
def test_a_redis_that_answers_but_cannot_serve_is_away_too(redis_url: str, session_id: str, state: list[tuple[str, ...]]) -> None:
    store = Store(make_config(REDIS_URL=redis_url))
    running(store, session_id)
    call = store.connections.call
    try:
        for command in state:
            call(*command)

        with pytest.raises(StoreUnavailable):
            store.append([(session_id, Cursor(1, 1), Text("x"))])
        with pytest.raises(StoreUnavailable):
            store.create("another", "n8n", ASKED, "http://n8n/w")
    finally:
        for command in [
            ("REPLICAOF", "NO", "ONE"),
            ("CONFIG", "SET", "replica-serve-stale-data", "yes"),
            ("CONFIG", "SET", "min-replicas-to-write", "0"),
        ]:
            call(*command)
        call("CONFIG", "SET", "maxmemory", "0")
    assert store.append([(session_id, Cursor(1, 1), Text("x"))]) == [None]
    store.close()


def test_a_connection_that_redis_has_closed_is_replaced_unnoticed(redis_url: str) -> None:
    store = Store(make_config(REDIS_URL=redis_url))
    store.ping()
    killer = Store(make_config(REDIS_URL=redis_url))

    killer.connections.call("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")

    store.ping()
    for one in (store, killer):
        one.close()


def test_a_greenlet_killed_in_the_middle_of_a_command_leaves_no_answer_to_the_next(redis_url: str) -> None:
    store = Store(make_config(REDIS_URL=redis_url))
    store.ping()
    asking = gevent.spawn(store.connections.call, "EVAL", "for i = 1, 3e7 do end return 'late'", 0)
    gevent.sleep(0.01)

    asking.kill()

    assert store.connections.call("ECHO", "mine") == b"mine"
    store.close()
