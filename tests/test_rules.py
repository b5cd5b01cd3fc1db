"""The rules that keep a session true, one interleaving each: what goes wrong without the rule is produced here.

docs/how-it-works.md names the rules and these tests. They run on a real Redis and on the embedded store, on the parts of several
workers in one process; tests/test_survival.py has the same with real processes.
"""

import time
from collections.abc import Callable

import gevent
import pytest

from aistream.events import Cursor, End, Event, Failed, Start, Text, Usage
from aistream.follower import Follower
from aistream.log import Log
from aistream.pulse import Pulse
from aistream.recall import Recall, Told
from aistream.session import CANCELLED, Claimed, Elsewhere, Ended, Finished, Missing, Outcome, Request, Short, State
from aistream.store import NO_PLACES, Holding, Store
from aistream.viewing import Viewer
from aistream.writer import LogWriter, Storing
from tests.conftest import make_config
from tests.service import wait_until

MakeStore = Callable[..., Store]

ASKED = Request(prompt="p", requested_model="gpt-4", model="gpt-4", provider="openai", max_tokens=5)
DONE = Outcome(End("stop"), "gpt-4", Usage(1, 1))
LEASE = {"LEASE_SECONDS": "1"}
#: A lease that is over at once: for tests that wait for nothing but its end.
SHORT = {"LEASE_SECONDS": 0.2}
OVER = 0.25


def claim(store: Store, session_id: str) -> Claimed:
    """A session that this store's worker generates."""
    store.create(session_id, "n8n", ASKED, "http://n8n/w")
    claimed = store.claim(session_id)
    assert isinstance(claimed, Claimed)
    return claimed


def say(store: Store, session_id: str, *texts: str, epoch: int = 1, after: int = 0) -> None:
    """Appends texts to the log in the store."""
    batch: list[tuple[str, Cursor, Event]] = [
        (session_id, Cursor(epoch, after + i), Text(text)) for i, text in enumerate(texts, 1)
    ]
    assert store.append(batch) == [None] * len(texts)


def storing_of(claimed: Claimed, *texts: str) -> Storing:
    """What a generation of epoch 1 holds in memory, with everything stored."""
    log = Log(claimed.accepted.id)
    log.append(Cursor(1, 0), claimed.accepted.start)
    for i, text in enumerate(texts, 1):
        log.append(Cursor(1, i), Text(text))
    return Storing(log, claimed, stored=len(log))


def texts(store: Store, session_id: str) -> list[str]:
    """The texts in the store's log."""
    return [event.text for _, event in store.read({session_id: None}).get(session_id, []) if isinstance(event, Text)]


def empty(store: Store) -> None:
    """What a Redis does that starts again without its data."""
    store.connections.call("FLUSHALL")


# 1. Calm after an outage


def test_after_an_outage_no_healthy_session_is_taken_for_lost(make_store: MakeStore, session_id: str) -> None:
    owner, other = make_store("owner", **LEASE), make_store("other", **LEASE)
    claim(owner, session_id)
    other.due(NO_PLACES)

    gevent.sleep(2.2)  # nobody can ask: the lease lapses, and it is nobody's fault
    first_look = other.due(NO_PLACES)
    renewed = owner.renew({session_id: Holding(1, 1)})
    gevent.sleep(0.5)
    later = other.due(NO_PLACES)

    assert (first_look.due, renewed, later.due) == ([], {session_id: "owner"}, [])


# 2. Recovering is claiming


def test_of_two_workers_that_find_a_lapsed_lease_one_gets_it_and_with_a_lease_of_its_own(
    make_store: MakeStore, session_id: str
) -> None:
    lost, one, other = (make_store(name, LEASE_SECONDS=0.5) for name in ("lost", "one", "other"))
    claim(lost, session_id)
    one.due(NO_PLACES)
    gevent.sleep(0.55)

    due = one.due(NO_PLACES), other.due(NO_PLACES)
    first, second = one.claim(session_id, "recover"), other.claim(session_id, "recover")

    assert [look.due for look in due] == [[(session_id, State.RUNNING, "")]] * 2  # looking takes nothing
    assert isinstance(first, Claimed) and second == Elsewhere("one")
    assert one.renew({session_id: Holding(2, 1)}) == {session_id: "owner"}
    assert one.due(NO_PLACES).due == []


def test_a_claim_whose_answer_was_lost_is_known_again_and_starts_nothing_twice(make_store: MakeStore, session_id: str) -> None:
    store = make_store()
    store.create(session_id, "n8n", ASKED, "http://n8n/w")

    unheard = store.claim(session_id, nonce="n")
    confirmed = store.claim(session_id, "confirm", nonce="n")

    assert isinstance(unheard, Claimed) and unheard == confirmed
    assert len(store.read({session_id: None})[session_id]) == 1


def test_a_claim_that_never_arrived_is_not_made_up_for_without_a_viewer(make_store: MakeStore, session_id: str) -> None:
    store = make_store()
    store.create(session_id, "n8n", ASKED, "http://n8n/w")

    assert store.claim(session_id, "confirm", nonce="n") is None
    assert store.standing([session_id]) == {session_id: (State.PENDING, "")}


# 3. Only `start` fences


@pytest.mark.parametrize("said", [0, 1])
def test_only_a_session_that_said_nothing_runs_again(make_store: MakeStore, session_id: str, said: int) -> None:
    lost, other = make_store("lost", **SHORT), make_store("other", **SHORT)
    claim(lost, session_id)
    say(lost, session_id, *["x"] * said)
    gevent.sleep(OVER)

    recovered = other.claim(session_id, "recover")

    assert isinstance(recovered, Claimed)
    assert (recovered.epoch, recovered.may_run) == (2, not said)
    (late,) = lost.append([(session_id, Cursor(1, said + 1), Text("late"))])
    assert late is not None


def test_a_stopped_session_that_said_nothing_does_not_run_again(make_store: MakeStore, session_id: str) -> None:
    lost, other = make_store("lost", **SHORT), make_store("other", **SHORT)
    claim(lost, session_id)
    other.cancel(session_id)
    gevent.sleep(OVER)

    recovered = other.claim(session_id, "recover")

    assert isinstance(recovered, Claimed)
    assert (recovered.may_run, recovered.cancelled) == (False, True)


# 4. A refusal is a hint, `renew` is the judge: tests/test_writer.py


# 5. No gaps


def test_a_log_that_lost_its_tail_and_was_written_on_is_written_anew_under_the_same_ids(
    make_store: MakeStore, session_id: str
) -> None:
    store = make_store()
    storing = storing_of(claim(store, session_id), "a", "b", "c")
    say(store, session_id, "a")  # a failover lost b; c came after it
    say(store, session_id, "c", after=2)

    verdict = store.renew({session_id: storing.holding})
    LogWriter(store, Pulse(hole=60)).rewrite(storing)

    assert verdict == {session_id: "short"}
    assert store.read({session_id: None})[session_id] == storing.log.entries()
    assert store.renew({session_id: storing.holding}) == {session_id: "owner"}


def test_a_reader_stops_at_a_gap_and_goes_on_when_it_is_filled(make_store: MakeStore, session_id: str) -> None:
    store = make_store()
    storing = storing_of(claim(store, session_id), "a", "b", "c")
    say(store, session_id, "a")
    say(store, session_id, "c", after=2)
    follower = Follower(store, make_config(**LEASE))
    loop = gevent.spawn(follower.run)

    with follower.follow(session_id) as log:
        gevent.sleep(0.1)
        before = log.answer()
        LogWriter(store, Pulse(hole=60)).rewrite(storing)
        wait_until(lambda: len(log) == 4)

        assert (before, log.answer()) == ("a", "abc")
    loop.kill()


# 6. The ending comes last


def test_no_ending_is_written_into_a_log_with_a_gap(make_store: MakeStore, session_id: str) -> None:
    store = make_store()
    storing = storing_of(claim(store, session_id), "a", "b", "c")
    say(store, session_id, "a")
    say(store, session_id, "c", after=2)

    gap = store.finish(session_id, 1, 4, 4, End("stop"), "abc", DONE)
    LogWriter(store, Pulse(hole=60)).rewrite(storing)
    whole = store.finish(session_id, 1, 4, 4, End("stop"), "abc", DONE)

    assert gap == Short()
    assert whole == Finished(Cursor(1, 4), State.COMPLETED)


# 7. Nothing is shown as ended before it is; a worker that was stopped shows nothing new: tests/test_survival.py


def test_a_hole_in_the_ticks_is_a_doubt_until_a_renewal_that_began_after_it() -> None:
    pulse = Pulse(hole=0.2)

    ticking = [pulse.doubted() for _ in range(3)]
    time.sleep(0.25)  # blocks the whole process, as a stop does
    stopped = pulse.doubted()
    asked = pulse.doubts
    time.sleep(0.25)  # stopped again while the store was being asked
    pulse.answer(asked)
    still = pulse.doubted()
    pulse.answer(pulse.doubts)

    assert ticking == [False] * 3
    assert (stopped, still, pulse.doubted()) == (True, True, False)


# 9. Redis emptied


def test_an_emptied_store_is_noticed_and_so_is_one_that_went_back(make_store: MakeStore) -> None:
    store = make_store()
    other = make_store("other")
    looks = [store.due(NO_PLACES).lost, other.due(NO_PLACES).lost, store.due(NO_PLACES).lost]

    empty(store)
    emptied = store.due(NO_PLACES).lost
    again = store.due(NO_PLACES).lost
    store.connections.call("HINCRBY", "aistream:{0}:tick", "looks", -2)
    went_back = store.due(NO_PLACES).lost

    assert (looks, emptied, again, went_back) == ([True, False, False], True, False, True)


def test_a_running_session_is_written_anew_only_where_nothing_or_something_older_stands(
    make_store: MakeStore, session_id: str
) -> None:
    owner, other = make_store("owner", **SHORT), make_store("other", **SHORT)
    storing = storing_of(claim(owner, session_id), "a")
    say(owner, session_id, "a")

    empty(owner)
    assert owner.renew({session_id: storing.holding}) == {session_id: "gone"}
    assert owner.restore(storing.claimed, storing.log.entries())
    restored = owner.read({session_id: None})[session_id]

    empty(owner)
    owner.create_again(storing.claimed.accepted)  # by the worker that accepted it
    assert owner.renew({session_id: storing.holding}) == {session_id: "gone"}
    assert owner.restore(storing.claimed, storing.log.entries())

    gevent.sleep(OVER)
    assert isinstance(other.claim(session_id, "recover"), Claimed)
    assert not owner.restore(storing.claimed, storing.log.entries())
    assert restored == storing.log.entries()


def test_a_worker_that_was_stopped_writes_nothing_anew(make_store: MakeStore, session_id: str) -> None:
    # Another worker may have ended the session meanwhile and told n8n; then Redis lost that too.
    store = make_store()
    storing = storing_of(claim(store, session_id), "a")
    pulse = Pulse(hole=0.1)
    time.sleep(0.15)
    empty(store)

    LogWriter(store, pulse).rewrite(storing)

    assert storing.log.dropped
    assert store.standing([session_id]) == {}


def test_an_accepted_session_comes_back_after_its_owner_had_time_to_do_so_first(make_store: MakeStore, session_id: str) -> None:
    store = make_store(**LEASE)
    recall = Recall(make_config(**LEASE), store)
    recall.accepted(store.create(session_id, "n8n", ASKED, "http://n8n/w"))
    empty(store)

    recall.doubt()
    recall.step()
    at_once = store.standing([session_id])
    gevent.sleep(0.4)
    recall.step()

    assert at_once == {}
    assert store.standing([session_id]) == {session_id: (State.PENDING, "")}
    assert isinstance(store.claim(session_id), Claimed)


def test_what_is_accepted_after_a_doubt_is_not_waited_for(make_store: MakeStore, session_id: str) -> None:
    store = make_store(**LEASE)
    recall = Recall(make_config(**LEASE), store)

    recall.doubt()  # as at the first look at a new Redis
    recall.step()
    recall.accepted(store.create(session_id, "n8n", ASKED, "http://n8n/w"))
    accepted_later = recall.telling
    recall.doubt()
    recall.step()
    accepted_before = recall.telling
    recall.claimed(session_id)

    assert (accepted_later, accepted_before, recall.telling) == (False, True, False)


def ended(store: Store, session_id: str) -> Told:
    """A session that this worker ran to its end."""
    storing = storing_of(claim(store, session_id), "a")
    say(store, session_id, "a")
    result = store.finish(session_id, 1, 2, 2, End("stop"), "a", DONE)
    assert isinstance(result, Finished)
    storing.log.append(result.ending_id, End("stop"))
    return Told(storing.claimed.accepted, storing.claimed, storing.log, End("stop"), DONE)


def test_an_ending_whose_callback_is_owed_comes_back_with_its_log(make_store: MakeStore, session_id: str) -> None:
    store = make_store(**LEASE)
    recall = Recall(make_config(**LEASE), store)
    told = ended(store, session_id)
    recall.ended(told)
    empty(store)

    recall.doubt()
    recall.step()

    assert store.read({session_id: None})[session_id] == told.log.entries()
    taken = store.outbox.take(session_id)
    assert taken is not None and (taken.session.answer, taken.session.resume_url) == ("a", "http://n8n/w")


def test_a_callback_that_was_settled_is_not_owed_again(make_store: MakeStore, session_id: str) -> None:
    store = make_store(**LEASE)
    recall = Recall(make_config(**LEASE), store)
    recall.ended(ended(store, session_id))
    recall.attempted(session_id, 1, "delivered")
    empty(store)

    recall.doubt()
    recall.step()

    assert store.outbox.take(session_id) is None
    assert store.standing([session_id]) == {session_id: (State.COMPLETED, "delivered")}


def test_a_callback_that_is_being_sent_is_hidden_when_it_comes_back(make_store: MakeStore, session_id: str) -> None:
    store = make_store(**LEASE)
    recall = Recall(make_config(**LEASE), store)
    recall.ended(ended(store, session_id))
    recall.attempting(session_id)
    empty(store)

    recall.doubt()
    recall.step()
    while_sent = store.outbox.take(session_id)
    delivered = store.outbox.settle(session_id, 1, "delivered")

    assert while_sent is None and delivered


def test_what_others_settled_or_started_is_forgotten(make_store: MakeStore, session_id: str) -> None:
    store = make_store(**LEASE)
    recall = Recall(make_config(**LEASE), store)
    recall.accepted(store.create("started", "n8n", ASKED, "http://n8n/w"))
    recall.ended(ended(store, session_id))
    store.claim("started")
    store.outbox.take(session_id)
    store.outbox.settle(session_id, 1, "delivered")

    recall.step()

    assert len(recall) == 0


def test_the_memory_is_bounded_and_keeps_what_is_owed_the_longest(make_store: MakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aistream.recall.LIMIT", 7_000)
    store = make_store(**LEASE)
    recall = Recall(make_config(**LEASE), store)
    for name in ("settled", "oldest", "newer", "newest"):
        recall.ended(ended(store, name))
        if name == "settled":
            recall.attempted(name, 1, "delivered")
    empty(store)

    recall.doubt()
    recall.step()

    assert sorted(store.standing(["settled", "oldest", "newer", "newest"])) == ["newer", "newest", "oldest"]


@pytest.mark.parametrize("store_url", ["redis"], indirect=True)
def test_in_a_young_store_a_missing_session_may_still_come_back(
    make_store: MakeStore, session_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aistream.store.NOTICED", 0.3)
    store = make_store(**SHORT)
    store.due(NO_PLACES)

    young = store.claim(session_id)
    gevent.sleep(2 * (0.2 + 0.3) + 0.05)
    old = store.claim(session_id)

    assert (young, old) == (Missing(perhaps=True), Missing(perhaps=False))
    assert store.forgotten([session_id]) == {session_id}


@pytest.mark.parametrize("store_url", ["embedded"], indirect=True)
def test_what_the_embedded_store_does_not_know_nobody_can_tell_it(make_store: MakeStore, session_id: str) -> None:
    assert make_store().claim(session_id) == Missing(perhaps=False)


# 10. Old eyes see no new text


class Reading:
    """A viewer on a log that the test writes."""

    def __init__(self, cursor: Cursor | None, *entries: tuple[Cursor, Event]) -> None:
        self.log = Log("s")
        for entry in entries:
            self.log.append(*entry)
        self.viewer = Viewer(None, "s", cursor, "text")  # type: ignore[arg-type]  # it is only given a log

    def read(self) -> str:
        """What it is sent, up to the end."""
        return b"".join(self.viewer._watch(self.log)).decode()


START = Start("s", "m", "p")
AGAIN = [(Cursor(1, 0), START), (Cursor(2, 0), START), (Cursor(2, 1), Text("new")), (Cursor(2, 2), Text(" text"))]


def test_who_has_text_that_a_failover_lost_is_told_and_gets_no_other_text() -> None:
    running = Reading(Cursor(1, 3), *AGAIN)
    completed = Reading(Cursor(1, 3), *AGAIN, (Cursor(2, 3), End("stop")))

    for reading in (running, completed):
        sent = reading.read()
        assert "event: error" in sent and '"log_lost"' in sent
        assert "text" not in sent.replace("retryable", "")

    assert "id: 2-3\n" in completed.viewer._old_eyes(completed.log).decode()  # coming back with it brings 204


def test_who_has_text_that_a_failover_lost_gets_a_failed_ending_as_it_is() -> None:
    failed = Failed("worker_lost", "m", True)

    sent = Reading(Cursor(1, 3), *AGAIN, (Cursor(2, 3), failed)).read()

    assert '"worker_lost"' in sent and "new" not in sent


@pytest.mark.parametrize("cursor", [None, Cursor(1, 0), Cursor(0, 7)])
def test_who_has_seen_no_text_gets_that_of_the_second_run(cursor: Cursor | None) -> None:
    sent = Reading(cursor, *AGAIN, (Cursor(2, 3), End("stop"))).read()

    assert "data: new\n" in sent and "data: [DONE]" in sent


def test_a_copy_with_text_of_a_lost_epoch_is_thrown_away(make_store: MakeStore, session_id: str) -> None:
    lost, other = make_store("lost", **SHORT), make_store("other", **SHORT)
    claim(lost, session_id)
    say(lost, session_id, "seen")
    follower = Follower(other, make_config(**SHORT))
    loop = gevent.spawn(follower.run)
    with follower.follow(session_id) as copy:
        other.connections.call("XDEL", "aistream:{0}:log:" + session_id, "1-1")  # the failover
        gevent.sleep(OVER)
        assert isinstance(other.claim(session_id, "recover"), Claimed)

        say(other, session_id, "another", epoch=2)

        wait_until(lambda: copy.dropped)
        assert copy.answer() == "seen"
        with follower.follow(session_id) as fresh:
            assert fresh.answer() == "another"
    loop.kill()


# 12. Cancel


def test_a_pending_session_that_is_stopped_is_due_at_once_and_runs_no_more(make_store: MakeStore, session_id: str) -> None:
    store = make_store()
    store.create(session_id, "n8n", ASKED, "http://n8n/w")

    found = store.cancel(session_id)
    due = store.due(NO_PLACES).due
    ended = store.finish(session_id, 0, 0, 0, Failed("expired", "m", False), "", DONE)

    assert (found, due) == (State.PENDING, [(session_id, State.PENDING, "")])
    assert ended == Finished(Cursor(1, 0), State.CANCELLED)
    assert store.read({session_id: None})[session_id] == [(Cursor(1, 0), CANCELLED)]
    assert store.cancel(session_id) is State.CANCELLED


def test_a_viewer_between_the_stop_and_its_ending_starts_nothing(make_store: MakeStore, session_id: str) -> None:
    store = make_store()
    store.create(session_id, "n8n", ASKED, "http://n8n/w")
    store.cancel(session_id)

    claimed = store.claim(session_id)

    assert isinstance(claimed, Claimed) and (claimed.may_run, claimed.cancelled) == (False, True)


def test_an_ending_that_meets_a_stop_is_recorded_as_cancelled(make_store: MakeStore, session_id: str) -> None:
    owner, other = make_store("owner"), make_store("other")
    claim(owner, session_id)
    say(owner, session_id, "a")

    found = other.cancel(session_id)
    told = owner.stopped()
    ended = owner.finish(session_id, 1, 2, 2, End("stop"), "a", DONE)

    assert (found, told, owner.stopped()) == (State.RUNNING, [session_id], [])
    assert ended == owner.finish(session_id, 1, 2, 2, End("stop"), "a", DONE) == Finished(Cursor(1, 2), State.CANCELLED)
    assert owner.claim(session_id) == Ended(State.CANCELLED, Cursor(1, 2), True)
    taken = owner.outbox.take(session_id)
    assert taken is not None and (taken.session.outcome.ending, taken.session.answer) == (CANCELLED, "a")


def test_a_stop_comes_too_late_for_a_session_that_has_ended(make_store: MakeStore, session_id: str) -> None:
    store = make_store()
    ended(store, session_id)

    assert store.cancel(session_id) is State.COMPLETED
    assert store.claim(session_id) == Ended(State.COMPLETED, Cursor(1, 2), True)


def test_viewers_are_counted_on_all_workers(make_store: MakeStore, session_id: str) -> None:
    owner, other = make_store("owner"), make_store("other")
    claim(owner, session_id)

    never = owner.watched(set(), {session_id})
    other.watched({session_id, "gone"}, set())
    gevent.sleep(0.2)
    alone = owner.watched(set(), {session_id, "gone"})

    assert never == {session_id: None}
    assert 0.15 < (alone[session_id] or 0) < 2 and alone["gone"] is None
    assert owner.standing(["gone"]) == {}
