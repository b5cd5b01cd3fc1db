"""What is going to happen, all of it from the seed: the streams, their viewers, and the faults."""

import math
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

LEASE = 2.0
#: Longer than the longest stream: a drain must not cut any.
DRAIN = 20
SESSION_TTL = 8.0
#: Until a killed or woken worker's traces are gone: the kernel closes its sockets, the woken one asks who owns what.
AFTERMATH = 1.0

#: Kinds of streams and their shares.
KINDS = {
    "watched": 36,  # by one viewer
    "crowd": 15,  # by two or three, the later ones from the middle on
    "left": 10,  # its viewer leaves after a few events: the generation goes on
    "immediate": 8,  # "start": "immediate", and nobody ever opens it
    "nobody": 6,  # nobody ever opens it: expired
    "stopped": 8,  # POST …/cancel in mid-answer
    "stopped-early": 3,  # … while pending
    "deserted": 4,  # "onDisconnect": "cancel", and its viewer leaves
    "slow-start": 10,  # seconds before the first word: lost in that time, it runs once more
}
#: Kinds of faults and their shares; `drop` is made by the viewers.
FAULTS = {"kill": 30, "stop": 20, "restart": 20, "empty": 10, "drain": 10, "double": 10}
#: Of all faults, so many are those of FAULTS; the rest are drops.
SHARE = 0.55

FRAGMENTS = (
    *(" ", "  ", "\n", "\n\n", "\t", "\\n", "\u2028", " \u00e9", " \U0001f642", " \u6f22\u5b57", " \U0001f469\u200d\U0001f467"),
    *("[DONE]", "\n[DONE]\n", " data: ", "\ndata:", ": ", "\n: ", "\nid: 9-9\n", "\nevent: error\n", "retry: 1\n"),
    '{"type":"end"}',
)


@dataclass(frozen=True, slots=True)
class Options:
    """How much, and from which seed. Logs and stories go into a new folder in `folder` (None: where temporary files go).

    `pace`: streams per second that begin where no schedule of faults sets the pace.
    """

    streams: int = 2000
    concurrency: int = 30
    faults: int = 200
    seed: int = 1
    without: frozenset[str] = frozenset()
    folder: Path | None = None
    pace: float = 10.0


@dataclass(frozen=True, slots=True)
class Watching:
    """What one viewer does: comes after `delay` seconds; its line breaks after so many events of a connection; may leave."""

    delay: float
    json: bool
    breaks: tuple[int, ...]
    leaves_after: int | None
    seed: str


@dataclass(frozen=True, slots=True)
class Plan:
    """One stream: what the model says and how, who watches, and when somebody stops it. `at`: seconds into the schedule."""

    number: int
    kind: str
    family: str
    pieces: tuple[str, ...]
    pause_ms: int
    first_ms: int
    viewers: tuple[Watching, ...]
    stop_after: int | None
    stop_at: float | None
    at: float

    @property
    def text(self) -> str:
        """The whole answer, known before it is asked for."""
        return "".join(self.pieces)

    @property
    def lasts(self) -> float:
        """Seconds from the first viewer to the ending, when nothing happens."""
        return (self.first_ms + self.pause_ms * len(self.pieces)) / 1000


@dataclass(frozen=True, slots=True)
class Planned:
    """One fault: how long it lasts, how long it is quiet afterwards, and what chance decides (the victim, for one)."""

    kind: str
    at: float
    lasts: float
    quiet: float
    victim: float
    delay: float
    variant: int


def plan_faults(options: Options) -> list[Planned]:
    """The schedule of the faults that hit processes. After Redis was emptied, nobody is hurt until everything is written anew."""
    rng = random.Random(f"faults {options.seed}")
    shares = {kind: share for kind, share in FAULTS.items() if kind not in options.without}
    kinds = _deal(shares, math.ceil(options.faults * SHARE), rng)
    schedule: list[Planned] = []
    at = 2.0
    for kind, following in zip(kinds, [*kinds[1:], ""], strict=False):
        lasts = {
            "kill": 0.0,
            "stop": rng.uniform(LEASE * 1.2, LEASE * 2.2),
            "restart": rng.choice((rng.uniform(0.5, LEASE), rng.uniform(LEASE, 5.0))),
            "empty": rng.uniform(0.1, 1.5) + AFTERMATH,
            "drain": 0.0,
            "double": rng.uniform(LEASE * 1.2, LEASE * 2.2) + 1.0 + AFTERMATH,
        }[kind]
        quiet = rng.uniform(3.0, 5.0) if kind in ("kill", "drain") else rng.uniform(1.5, 3.0)
        if kind in ("empty", "double") or following in ("empty", "double"):
            # Before it: who was lost must have been recovered, else it would be a double fault that nobody meant.
            quiet = max(quiet, LEASE + 2.5)
        schedule.append(Planned(kind, at, lasts, quiet, rng.random(), rng.uniform(0.0, 0.8), rng.randrange(3)))
        at += lasts + quiet
    return schedule


def plan_streams(options: Options, seconds: float) -> list[Plan]:
    """The streams, spread over the schedule's `seconds`, and their viewers' broken lines."""
    rng = random.Random(f"streams {options.seed}")
    shares = {kind: share for kind, share in KINDS.items() if kind not in options.without}
    kinds = _deal(shares, options.streams, rng)
    drops = 0 if "drop" in options.without else max(1.6 * options.faults * (1 - SHARE), options.streams / 5)
    per_viewer = drops / max(1, sum(kind in ("watched", "crowd", "slow-start", "stopped") for kind in kinds))
    return [_plan(number, kind, per_viewer, seconds * number / len(kinds), rng) for number, kind in enumerate(kinds)]


def _plan(number: int, kind: str, drops: float, at: float, rng: random.Random) -> Plan:
    count, pause_ms, first_ms = rng.randint(20, 80), rng.randint(40, 100), rng.randint(0, 300)
    if kind == "slow-start":
        count, first_ms = rng.randint(8, 20), rng.randint(1500, 4000)
    elif kind == "deserted":
        count, pause_ms = 80, 110
    pieces = [f"{number}.{i}{rng.choice(FRAGMENTS)}" if rng.random() > 0.04 else "[DONE]" for i in range(count)]
    watchers = {"crowd": rng.randint(2, 3), "immediate": 0, "nobody": 0, "stopped-early": 0}.get(kind, 1)
    viewers = []
    for i in range(watchers):
        stays = kind not in ("left", "deserted")
        breaks = tuple(rng.randint(1, 12) for _ in range(int(drops) + (rng.random() < drops % 1))) if stays else ()
        delay = rng.uniform(0.3, 4.0) if i else rng.uniform(0.0, 0.2)
        viewers.append(Watching(delay, rng.random() < 0.4, breaks, None if stays else rng.randint(2, 8), f"{number} {i} {at}"))
    return Plan(
        number=number,
        kind=kind,
        family=rng.choice(("gpt", "claude")),
        pieces=(*pieces, f"/{number}"),
        pause_ms=pause_ms,
        first_ms=first_ms,
        viewers=tuple(viewers),
        stop_after=rng.randint(1, count // 2) if kind == "stopped" else None,
        stop_at=rng.uniform(0.2, 2.0) if kind == "stopped-early" else None,
        at=at,
    )


def _deal(shares: Mapping[str, int], count: int, rng: random.Random) -> list[str]:
    """`count` cards in these shares, at least one of each kind if there are enough, shuffled."""
    if not shares:
        return []
    total = sum(shares.values())
    cards = list(shares)[:count]
    while len(cards) < count:
        held = Counter(cards)
        cards.append(max(shares, key=lambda kind: shares[kind] * count / total - held[kind]))
    rng.shuffle(cards)
    return cards
