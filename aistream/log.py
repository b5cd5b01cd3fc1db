"""A session's events in this process's memory: written once, read by any number of viewers.

A generation writes its own; the follower fills one from Redis for a session that runs elsewhere or has ended. Frames are
encoded once per mode, whoever reads them. Readers wait without polling and are woken together.
"""

from __future__ import annotations

from collections.abc import Callable

from gevent.hub import get_hub

from aistream.events import Cursor, Event, Reasoning, Text, is_ending
from aistream.sse import ENCODERS, Mode

#: Bytes after which a piece of history is long enough.
PIECE = 65_536


class Log:
    """Events in the order of their cursors; `seq` is contiguous within an epoch. The last one is the ending."""

    __slots__ = ("_bases", "_frames", "_readers", "cursors", "dropped", "ended", "events", "lost", "session_id", "text_epoch")

    def __init__(self, session_id: str) -> None:
        self.session_id = session_id
        self.events: list[Event] = []
        self.cursors: list[Cursor] = []
        self.ended = False
        #: The writer lost its lease: what stands here may not be what the session's log says. Readers turn to the store.
        self.dropped = False
        #: The session is gone from the store: nobody will ever write its ending.
        self.lost = False
        #: The epoch that said something last. What an earlier one said, and a failover lost, does not go before it.
        self.text_epoch = 0
        self._frames: dict[Mode, list[bytes]] = {}
        self._bases: dict[int, int] = {}
        self._readers: list[Callable[[], object]] = []

    def __len__(self) -> int:
        return len(self.events)

    @property
    def last(self) -> Cursor | None:
        """The cursor of the last event."""
        return self.cursors[-1] if self.cursors else None

    @property
    def flows(self) -> bool:
        """Whether it is as it should be, and more will come."""
        return not (self.ended or self.dropped or self.lost)

    def append(self, cursor: Cursor, event: Event) -> None:
        """Adds an event and wakes the readers. Without yielding."""
        epoch, seq = cursor
        if epoch not in self._bases:
            self._bases[epoch] = len(self.events) - seq
        self.events.append(event)
        self.cursors.append(cursor)
        kind = type(event)
        if kind is Text or kind is Reasoning:
            self.text_epoch = epoch
        elif is_ending(event):
            self.ended = True
        if self._readers:
            self.wake()

    def next(self, epoch: int) -> Cursor:
        """The cursor of the event that `epoch` says next. It is the last epoch here, or a later one."""
        base = self._bases.get(epoch)
        return Cursor(epoch, 0 if base is None else len(self.events) - base)

    def follows(self, cursor: Cursor) -> bool:
        """Whether `cursor` may come next: the next seq of this epoch, or the first of a later one."""
        last = self.last
        if last is None or cursor.epoch > last.epoch:
            return cursor.seq == 0
        return cursor == (last.epoch, last.seq + 1)

    def position(self, cursor: Cursor | None) -> int:
        """Where a reader that has seen `cursor` goes on: an index into the events, perhaps one still to come.

        A cursor of an epoch unknown here is no cursor. One beyond the last event of its epoch (a viewer may be ahead of
        what a lost worker had stored) is never given anything up to itself again.
        """
        if cursor is None or cursor.epoch not in self._bases:
            return 0
        after = self._bases[cursor.epoch] + cursor.seq + 1
        later = [base for epoch, base in self._bases.items() if epoch > cursor.epoch]
        return min([after, *later])

    def frames(self, mode: Mode, position: int) -> tuple[bytes, int]:
        """The wire form of the events from `position` on, in one piece, and the position behind it.

        A long history comes in several pieces: what a slow reader holds up is bounded.
        """
        frames = self._frames.get(mode)
        if frames is None:
            frames = self._frames[mode] = []
        if position == len(frames) == len(self.events) - 1:
            frame = ENCODERS[mode](self.cursors[position], self.events[position])
            frames.append(frame)
            return frame, position + 1
        if len(frames) < len(self.events):
            encode = ENCODERS[mode]
            for i in range(len(frames), len(self.events)):
                frames.append(encode(self.cursors[i], self.events[i]))
        if len(frames) - position == 1:
            return frames[position], position + 1
        until, size = position, 0
        while until < len(frames) and size < PIECE:
            size += len(frames[until])
            until += 1
        return b"".join(frames[position:until]), until

    def forget_frames(self) -> None:
        """Frees what can be encoded again: nobody reads it at the moment."""
        self._frames.clear()

    def entries(self, *, before_ending: bool = False) -> list[tuple[Cursor, Event]]:
        """All events with their cursors."""
        return list(zip(self.cursors, self.events, strict=True))[: -1 if before_ending and self.ended else None]

    def answer(self) -> str:
        """The text so far, exactly as the provider wrote it."""
        return "".join([event.text for event in self.events if isinstance(event, Text)])

    def reasoning(self) -> str:
        """What the model thought aloud so far."""
        return "".join([event.text for event in self.events if isinstance(event, Reasoning)])

    def add_reader(self, look: Callable[[], object]) -> None:
        """Registers a reader that has read everything. `look` is called once, in the hub, after the next append."""
        self._readers.append(look)

    def discard_reader(self, look: Callable[[], object]) -> None:
        """Forgets a reader that was woken by something else."""
        if look in self._readers:
            self._readers.remove(look)

    def wake(self) -> None:
        """Lets every waiting reader look again."""
        if self._readers:
            readers, self._readers = self._readers, []
            run = get_hub().loop.run_callback
            for look in readers:
                # In the hub, not here: the writer goes on first, so that one look covers all it has.
                run(look)

    def drop(self) -> None:
        """Declares this copy void and sends its readers back to the store."""
        self.dropped = True
        self.wake()

    def lose(self) -> None:
        """Declares that no ending will come, and lets its readers say so."""
        self.lost = True
        self.wake()
