"""History, then live, to one viewer: from this process's memory where the generation runs here, else through the follower.

Every refusal is decided before the first byte; after it, only events. A viewer's own trouble (slow, gone, too many) is
nobody else's.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from functools import partial
from typing import Any

import gevent
from gevent.hub import Waiter, get_hub

from aistream import metrics
from aistream.config import Config
from aistream.errors import NotFound, Overloaded, Refused, StoreUnavailable
from aistream.events import Cursor, Failed
from aistream.follower import Follower
from aistream.generation import Generation, Generations
from aistream.log import Log
from aistream.session import Elsewhere, Ended, Missing
from aistream.sockets import PEEK
from aistream.sse import HEARTBEAT, PREAMBLE, Mode, error_frame
from aistream.telemetry import log as lines

#: Seconds that a refusal which may pass is held back, with heartbeats: any status but 200 ends an EventSource for good.
HOLD = 20.0
#: Seconds between two tries while it is held.
RETRY = 0.5
#: Bytes that the kernel keeps for a client that does not read.
SEND_BUFFER = 131_072

#: What has woken a viewer.
_BY_LOG, _BY_ANOTHER = object(), object()


class Viewer:
    """One EventSource connection. `stream()` is its response body; `close()` may come at any time, more than once."""

    def __init__(
        self, viewing: Viewing, session_id: str, cursor: Cursor | None, mode: Mode, request_id: str | None = None
    ) -> None:
        self.session_id = session_id
        self.request_id = request_id
        # No event has epoch 0: whoever says so has seen none.
        self.cursor = cursor if cursor is not None and cursor.epoch else None
        self.mode = mode
        self.spoke_at = time.monotonic()
        #: The client has left, or was too slow.
        self.gone = False
        self.slow = False
        #: It got a stream; why that ended, where it was not the client that left.
        self._joined = False
        self._left = ""
        self.admitted = False
        self._viewing = viewing
        self._source: Log | Ended | None = None
        self._found = False
        self._due = b""
        self._waiter: Waiter[Any] | None = None
        #: What the log calls meanwhile.
        self._look_again: Callable[[], object] | None = None
        self._watcher: Any = None
        #: gevent's, and the plain one below it.
        self._socket: Any = None
        self._plain: Any = None
        #: Chunks may be written to the plain one, past gunicorn; what of the last one was not taken.
        self._direct = False
        self._unsent = b""
        self._position = 0
        self._began = time.monotonic()
        self._bytes = 0
        self._closed = False

    def open(self) -> bool:
        """Gets a line, and a place among the session's viewers, and looks whether there is anything to see.

        False: this viewer has seen the ending. Raises NotFound and Refused; whoever is not held then keeps nothing.
        """
        try:
            self._viewing.admit(self)
            self._look()
            source = self._source
            ending_id = source.ending_id if isinstance(source, Ended) else source.last if source and source.ended else None
            if ending_id is not None and self.cursor == ending_id:
                self.hang_up()
                return False
            if isinstance(source, Ended) and not source.replayable:
                raise _replay_over(source)
            found = "memory" if isinstance(source, Log) else "replay" if isinstance(source, Ended) else "follower"
            self._joined = True
            metrics.viewer_joined(resumed=self.cursor is not None, source=found)
        except BaseException as error:
            self._viewing.release(self)
            if not isinstance(error, Refused) or not error.held:
                self.hang_up()
            raise
        return True

    def hang_up(self) -> None:
        """Gives place and line back."""
        self._viewing.release(self)
        self._viewing.lines.discard(self)

    def stream(self) -> Generator[bytes, None, None]:
        """The response's body: everything after the cursor, then what comes, up to the ending."""
        try:
            yield PREAMBLE
            while not self.gone:
                if not self._found and not (yield from self._hold()):
                    return
                if (yield from self._watch_source()):
                    self._left = self._left or ("" if self.gone else "complete")
                    return
                # The log turned out to be void, or the store went away: the line stays open, and what comes next is looked for.
                self._found = False
        finally:
            self.close()

    def wake(self, due: bytes = b"") -> None:
        """Lets it look again; `due` is sent if there is nothing else to send."""
        if self._waiter is not None:
            self._due = due
            get_hub().loop.run_callback(self._waiter.switch, _BY_ANOTHER)

    @property
    def waiting(self) -> bool:
        """Whether it has sent everything and waits for more."""
        return self._waiter is not None

    def leave(self) -> None:
        """Ends the response without an ending, as a broken line would."""
        self.gone = True
        self.wake()

    def drop_if_slow(self, since: float) -> None:
        """Cuts the line of a client that has not taken what was sent to it at `since`. It can come back, and resume."""
        if self._waiter is None and self._plain is not None and not self.gone and self.spoke_at < since:
            self.gone = self.slow = True
            with suppress(OSError):
                # Below gevent, so that whoever is sending gets the kernel's EPIPE, which gunicorn passes over.
                self._plain.shutdown(socket.SHUT_RDWR)

    def watch(self, sock: Any, *, chunked: bool) -> None:
        """Notices at once when the client closes its end of `sock`. `chunked`: what is written to it goes in HTTP's chunks.

        Neither gunicorn nor gevent tells: a silent stream would never notice, a busy one at the second write. A client that
        only half-closes looks the same; no EventSource does that.
        """
        plain = getattr(sock, "_sock", sock)
        self._socket, self._plain = sock, plain
        self._direct = chunked and plain is not sock and not isinstance(sock, ssl.SSLSocket)
        with suppress(OSError):
            # What a client that does not read can hold up in the kernel: without it, up to 4 MiB and so whole answers.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)

        def readable() -> None:
            try:
                closed = plain.recv(1, PEEK) == b""
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                closed = True
            if closed:
                self.leave()
            self._unwatch()  # bytes of a next request would only wake us again and again

        self._watcher = get_hub().loop.io(sock.fileno(), 1)
        self._watcher.start(readable)

    def close(self) -> None:
        """Gives its place back."""
        if self._closed:
            return
        self._closed = True
        self._unwatch()
        self.hang_up()
        if self._joined:
            metrics.viewer_left("slow" if self.slow else self._left or "gone")
        lines.info(
            "viewer.left",
            session=self.session_id,
            mode=self.mode,
            bytes=self._bytes,
            gone=self.gone,
            **({"slow": True} if self.slow else {}),
            duration_ms=round((time.monotonic() - self._began) * 1000),
            request_id=self.request_id,
        )

    def _look(self) -> None:
        self._source = self._viewing.source(self.session_id)
        self._found = True
        self.spoke_at = time.monotonic()

    def _watch_source(self) -> Generator[bytes, None, bool]:
        """Watches the log wherever it is. True: the last word is said. False: it has to be looked for again."""
        if isinstance(self._source, Log):
            return (yield from self._watch(self._source))
        try:
            with self._viewing.follower.follow(self.session_id) as log:
                if isinstance(self._source, Ended) and not len(log):
                    # The replay ended between the question and the answer.
                    yield self._refuse(_replay_over(self._source))
                    return True
                return (yield from self._watch(log))
        except StoreUnavailable:
            return False

    def _watch(self, log: Log) -> Generator[bytes, None, bool]:
        """Sends what the log has after the cursor, then what comes. Gives False where the log turned out to be void."""
        self._position = log.position(self.cursor)
        while not self.gone:
            if self._unsent:
                unsent, self._unsent = self._unsent, b""
                self._socket.sendall(unsent)
            position, count = self._position, len(log)
            if log.dropped:
                return False
            if self.cursor is not None and self.cursor.seq and self.cursor.epoch < log.text_epoch:
                yield self._old_eyes(log)
                return True
            if position >= count and log.ended:
                # It has a cursor beyond what a lost worker had stored: what it still lacks is the ending.
                self._position = position = count - 1 if position > count or self.cursor != log.last else count
                if position == count:
                    return True
            if position < count:
                frames = self._take(log)
                if frames:
                    yield frames
            elif log.lost:
                yield self._refuse(Refused("session_lost"))
                return True
            elif self._due:
                due, self._due = self._due, b""
                self.spoke_at = time.monotonic()
                yield due
            else:
                self._wait(log)
        return True

    def _take(self, log: Log) -> bytes:
        """The frames that come next, which count as sent."""
        frames, self._position = log.frames(self.mode, self._position)
        self.cursor = log.cursors[self._position - 1]
        if frames:
            self._bytes += len(frames)
            self.spoke_at = time.monotonic()
        return frames

    def _old_eyes(self, log: Log) -> bytes:
        """It has text of an epoch that a failover lost, and the session ran once more: what that says does not go with it."""
        ending = log.events[-1] if log.ended else None
        self.spoke_at = time.monotonic()
        if isinstance(ending, Failed):
            return log.frames(self.mode, len(log) - 1)[0]
        return self._refuse(Refused("log_lost", str(log.last) if ending else None))

    def _refuse(self, refused: Refused) -> bytes:
        self._left = "refused"
        return refusal_frame(refused, self.cursor, self.mode)

    def _wait(self, log: Log) -> None:
        waiter = self._waiter = Waiter()
        look = self._look_again = partial(self._push, log, waiter) if self._direct else partial(waiter.switch, _BY_LOG)
        log.add_reader(look)
        woken_by_log = False
        try:
            woken_by_log = waiter.get() is _BY_LOG
        finally:
            self._waiter = self._look_again = None
            if not woken_by_log:
                log.discard_reader(look)

    def _push(self, log: Log, waiter: Waiter[Any]) -> None:
        """In the hub: writes what has come as a chunk, while this viewer's own greenlet sleeps on.

        A greenlet's wake-up, gunicorn's chunk and gevent's `sendall` cost more than the rest of a token's way. Whatever is not
        plain sailing (an end, a client that is slow or gone) wakes the greenlet.
        """
        if waiter is not self._waiter or self._look_again is None:
            return  # something else has woken it in the same moment
        if not log.flows or self.gone or (self.cursor is not None and self.cursor.epoch < log.text_epoch):
            waiter.switch(_BY_LOG)
            return
        if self._position < len(log):
            frames = self._take(log)
            if frames:
                chunk = b"%x\r\n%b\r\n" % (len(frames), frames)
                try:
                    sent = self._plain.send(chunk)
                except OSError:  # also of a client that is gone: its greenlet will meet it again, where gunicorn passes it over
                    sent = 0
                self._unsent = chunk[sent:]
            if self._unsent or self._position < len(log):
                waiter.switch(_BY_LOG)
                return
        log.add_reader(self._look_again)

    def _hold(self) -> Generator[bytes, None, bool]:
        """Waits for a place or for the store, with heartbeats. True: found now. False: the last word is said.

        In mid-stream the first try comes at once: then it is only elsewhere.
        """
        until = time.monotonic() + HOLD
        pause = 0.0 if self.admitted else RETRY
        while not self.gone:
            gevent.sleep(pause)
            if pause:
                self.spoke_at = time.monotonic()
                yield HEARTBEAT
            pause = RETRY
            try:
                if self.admitted:
                    self._look()
                    return True
                return self.open()
            except NotFound:
                # The store lost it: without a word the browser would come back, be sent away, and never know why.
                refused = Refused("session_lost")
            except Refused as error:
                refused = error
            if not refused.held or time.monotonic() >= until:
                yield self._refuse(refused)
                return False
            if self._viewing.leaving:
                self._left = "drained"
                return False  # as a broken line: the browser comes back by itself, and finds another worker
        return False

    def _unwatch(self) -> None:
        if self._watcher is not None:
            self._watcher.stop()
            self._watcher.close()
            self._watcher = None


def _replay_over(ended: Ended) -> Refused:
    return Refused("replay_over", str(ended.ending_id) if ended.ending_id else None)


def refusal_frame(refused: Refused, cursor: Cursor | None, mode: Mode) -> bytes:
    """The refusal as a browser can see it, which counts as told.

    Only one that is final has an id, which brings 204 at the next try: by that a client tells it from one that may pass.
    """
    metrics.viewer_refused(refused.code)
    if refused.limit:
        metrics.limited(refused.limit)
    event_id = refused.event_id or (str(cursor) if cursor and refused.final else None)
    return error_frame(Failed(refused.code, refused.detail, not refused.final), event_id, typed=mode == "json")


class Viewing:
    """The viewers of this worker."""

    def __init__(self, config: Config, generations: Generations, follower: Follower) -> None:
        self.heartbeat = config.heartbeat_seconds
        self.follower = follower
        self._generations = generations
        #: Viewers with an open line, those that are held included.
        self.lines: set[Viewer] = set()
        self._most_lines = config.max_viewers_per_worker
        self._limit = config.max_viewers_per_session
        self._patience = config.slow_viewer_seconds
        self._viewers: dict[str, set[Viewer]] = {}
        #: Sessions that are cancelled without viewers, and had one here since this was last asked.
        self._counted: set[str] = set()

    def __len__(self) -> int:
        return sum(map(len, self._viewers.values()))

    @property
    def leaving(self) -> bool:
        """Whether this worker begins nothing any more, for whomever it would be held."""
        return self._generations.closed

    def viewers(self, session_id: str) -> list[Viewer]:
        """The session's viewers on this worker."""
        return list(self._viewers.get(session_id, ()))

    def take_lines(self, most: int) -> None:
        """Has no more open lines than these, whatever the settings allow."""
        self._most_lines = min(self._most_lines, most)

    def admit(self, viewer: Viewer) -> None:
        """Gives a viewer its line and its place. Raises Refused.

        For want of a line nobody is held: that would take one of those that are kept for inits and health checks.
        """
        if viewer not in self.lines and len(self.lines) >= self._most_lines:
            raise Refused("overloaded", limit="viewers", held=False)
        self.lines.add(viewer)
        viewers = self._viewers.setdefault(viewer.session_id, set())
        if len(viewers) >= self._limit:
            raise Refused("too_many_viewers", limit="viewers_of_session")
        viewers.add(viewer)
        viewer.admitted = True

    def release(self, viewer: Viewer) -> None:
        """Takes a viewer's place back."""
        viewer.admitted = False
        viewers = self._viewers.get(viewer.session_id, set())
        viewers.discard(viewer)
        if not viewers:
            self._viewers.pop(viewer.session_id, None)

    def source(self, session_id: str) -> Log | Ended | None:
        """Where the session's events are: a log here; ended; or None where they come through the store.

        Starts the generation of a pending session. Raises NotFound and Refused.
        """
        try:
            found = self._generations.claim(session_id)
        except StoreUnavailable:
            raise Refused("store_unavailable") from None
        except Overloaded as error:
            raise Refused(error.code, limit=error.limit) from None
        if isinstance(found, Missing):
            if found.perhaps:
                raise Refused("store_unavailable")
            raise NotFound("There is no such stream.")
        if isinstance(found, Generation):
            if found.request.disconnect_grace is not None:
                self._counted.add(session_id)
            return found.log
        if isinstance(found, Elsewhere) and found.cancels:
            self._counted.add(session_id)
        return found if isinstance(found, Ended) else None

    def take_watched(self) -> set[str]:
        """Of the sessions that are cancelled without viewers those that have one here, or had one since this was last asked."""
        watched = set(self._counted)
        self._counted &= self._viewers.keys()
        return watched

    def beat(self, every: Callable[[], float]) -> None:
        """The loop that sends a heartbeat on every stream that has been silent for long enough, and drops who is too slow.

        Never returns. One greenlet for all of them: a timer for each viewer and each wait would cost more than the token it
        waits for.
        """
        while True:
            gevent.sleep(every())
            now = time.monotonic()
            for viewers in list(self._viewers.values()):
                for viewer in list(viewers):
                    if viewer.waiting and viewer.spoke_at <= now - self.heartbeat:
                        viewer.wake(HEARTBEAT)
                    else:
                        viewer.drop_if_slow(now - self._patience)
