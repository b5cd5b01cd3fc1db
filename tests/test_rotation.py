"""JWT_SECRET changes on a running service, as docs/security.md says, and nobody is refused."""

import time
from collections.abc import Callable

import gevent
import httpx
import jwt

from tests.service import SECRET, Event, Service, on, text_of, wait_until, watch

NEXT = "the-secret-that-comes-after-with-enough-bytes"
WORDS = "one two three four five six seven eight"


class Traffic:
    """What n8n and browsers do all the time: ask one replica, and watch on another, whichever the balancer has."""

    def __init__(self, replicas: list[Service]) -> None:
        self.live = list(replicas)
        #: What n8n signs with.
        self.secret = SECRET
        self.statuses: list[int] = []
        self.answers: list[str] = []
        self.urls: list[str] = []
        self.over = False

    def run(self, number: int) -> None:
        """One person after the other, until it is over."""
        while not self.over:
            token = jwt.encode({"sub": "n8n", "exp": int(time.time()) + 300}, self.secret, "HS256")
            answer = self.live[number % len(self.live)].init(model="echo", prompt=WORDS, n8nToken=token)
            self.statuses.append(answer.status_code)
            if answer.status_code == 200:
                self.urls.append(answer.json()["streamUrl"])
                self._watch(self.urls[-1], number)

    def _watch(self, url: str, number: int) -> None:
        seen: list[Event] = []
        while not seen or seen[-1].data != "[DONE]":
            number += 1
            with watch(on(self.live[number % len(self.live)], url), seen[-1].id if seen else None) as events:
                self.statuses.append(events.response.status_code)
                if events.response.status_code != 200:
                    return
                for event in events:
                    seen.append(event)
                    if len(seen) == 4:
                        break  # and comes back to another replica
        self.answers.append(text_of(seen))


def test_a_secret_is_rotated_under_live_streams_without_one_refusal(
    start_services: Callable[..., list[Service]], redis_url: str
) -> None:
    """Restarted in one order in the first step, and in the other in the second."""
    replicas = start_services(2, REDIS_URL=redis_url, LEASE_SECONDS="1")
    traffic = Traffic(replicas)
    people = [gevent.spawn(traffic.run, number) for number in range(3)]
    opened: list[str] = []

    def roll(replica: Service, **environ: str) -> None:
        traffic.live.remove(replica)
        replica.restart(**environ)
        traffic.live.append(replica)
        done = len(traffic.answers)
        wait_until(lambda: len(traffic.answers) > done + 3, timeout=20)
        opened.append(traffic.urls[-1])

    try:
        for replica in replicas:
            roll(replica, JWT_SECRET_PREVIOUS=NEXT)
        traffic.secret = NEXT
        for replica in reversed(replicas):
            roll(replica, JWT_SECRET=NEXT, JWT_SECRET_PREVIOUS=SECRET)
    finally:
        traffic.over = True
        gevent.joinall(people, timeout=20)

    assert set(traffic.statuses) == {200}
    assert set(traffic.answers) == {WORDS}
    kids = [jwt.get_unverified_header(url.partition("access_token=")[2])["kid"] for url in opened]
    assert kids[0] == kids[1] != kids[-1]
    again = [httpx.get(on(replica, url), headers={"Accept": "text/event-stream"}) for url in opened for replica in replicas]
    assert [answer.status_code for answer in again] == [200] * 8
