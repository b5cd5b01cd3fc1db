"""What is going to happen, all of it from the seed: the endings, how n8n fails, and when workers are killed."""

import random
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from tests.neighbours.scenarios import SEPARATOR, words

LEASE = 2.0
SESSION_TTL = 3.0

#: How sessions end, and in which shares.
KINDS = {
    "echo": 30,  # "start": "immediate", with the built-in model
    "say": 15,  # … with a provider
    "failed": 12,  # … whose provider breaks off
    "stopped": 5,  # … stopped in mid-answer
    "cancelled": 28,  # stopped right after init
    "expired": 10,  # never opened
}
#: What the failing n8n does with a session in particular, while it is well otherwise.
MANNERS = {
    "plain": 70,
    "early": 10,
    "cut": 4,
    "error": 4,
    "half": 2,
    "held": 3,
    "hung": 2,
    "refused": 3,
    "hopeless": 2,
}
#: Those after which the callback is dead.
DOOMED = ("refused", "hopeless")
#: Share of the endings that go to the n8n that is well.
HEALTHY = 0.2

#: One round of what the failing n8n does as a whole: kind and seconds. The hang is longer than an attempt may last.
ROUND = (
    ("up", 8.0),
    ("down", 9.0),
    ("starting", 4.0),
    ("up", 10.0),
    ("hang", 36.0),
    ("down", 1.0),
    ("starting", 2.0),
    ("up", 12.0),
    ("errors", 6.0),
    ("up", 5.0),
    ("cut", 5.0),
    ("up", 4.0),
    ("busy", 5.0),
)
#: Seconds before each attempt in a run of full length, and the fewest in a short one.
SCHEDULE = (0.0, 0.5, 1.0, 2.0, 3.0, *[4.0] * 3, *[5.0] * 7)
SHORT_SCHEDULE = (0.0, 0.1, 0.2, *[0.3] * 6)


@dataclass(frozen=True, slots=True)
class Options:
    """How much, and from which seed. Logs and stories go into a new folder in `folder` (None: where temporary files go).

    `pace`: endings per second. `viewers`: streams that are watched at the same time, all the while.
    """

    endings: int = 5000
    seed: int = 1
    kills: int = 20
    pace: float = 24.0
    viewers: int = 4
    folder: Path | None = None

    @property
    def seconds(self) -> float:
        """How long sessions go on being made."""
        return self.endings / self.pace

    @property
    def rounds(self) -> int:
        """How often the failing n8n goes through everything."""
        return max(1, round(self.seconds / sum(lasts for _, lasts in ROUND)))

    @property
    def scale(self) -> float:
        """How long a phase lasts, measured by ROUND."""
        return self.seconds / (self.rounds * sum(lasts for _, lasts in ROUND))

    @property
    def short(self) -> bool:
        """Whether it takes a few seconds only."""
        return self.scale <= 0.5

    @property
    def schedule(self) -> tuple[float, ...]:
        """The service's CALLBACK_SCHEDULE: it outlasts the outages."""
        return SHORT_SCHEDULE if self.short else SCHEDULE


@dataclass(frozen=True, slots=True)
class Plan:
    """One session: how it ends, what it says, and what n8n does with it. `at`: seconds into the run."""

    number: int
    kind: str
    manner: str
    healthy: bool
    at: float
    model: str
    prompt: str
    text: str
    stop_after: float
    dice: float

    @property
    def name(self) -> str:
        """For stories."""
        return f"{self.kind}, {'the healthy n8n' if self.healthy else self.manner}"


@dataclass(frozen=True, slots=True)
class Phase:
    """What the failing n8n does as a whole, from a moment on. `at`: seconds into the run."""

    kind: str
    at: float


def plan_sessions(options: Options) -> list[Plan]:
    """The sessions, spread evenly.

    Those that are hopeless come early, since they need the whole schedule. In a short run so do those that hang: the restart
    that ends the other hangs ends theirs, else they would take 30 s.
    """
    rng = random.Random(f"endings {options.seed}")
    kinds = _deal(KINDS, options.endings, rng)
    plans = []
    for number, kind in enumerate(kinds):
        healthy = rng.random() < HEALTHY
        manner = "plain" if healthy else rng.choices(list(MANNERS), list(MANNERS.values()))[0]
        late = number > options.endings * 0.5 or kind == "expired"
        if (manner == "hopeless" and number > options.endings * 0.5) or (manner == "hung" and options.short and late):
            manner = "plain"
        plans.append(_plan(number, kind, manner, healthy, number / options.pace, rng))
    return plans


def _plan(number: int, kind: str, manner: str, healthy: bool, at: float, rng: random.Random) -> Plan:
    pieces = [f"{number}.{i}{rng.choice((' ', '  ', chr(10), ' é ', ' 漢字 ', ' 🙂 '))}" for i in range(rng.randint(1, 5))]
    text, prompt, model = "".join(pieces), "".join(pieces), f"echo/i{number}"
    if kind == "say":
        prompt, model = SEPARATOR.join(pieces), f"gpt-test-say-i{number}"
    elif kind == "failed":
        text, model = "".join(words(3)), f"gpt-test-truncated-k3-i{number}"
    elif kind == "stopped":
        text, model = "".join(words(40)), f"gpt-test-slow-n40-d50-i{number}"
    elif kind in ("cancelled", "expired"):
        text = ""
    return Plan(number, kind, manner, healthy, at, model, prompt, text, rng.uniform(0.1, 1.0), rng.random())


def watched(number: int) -> Plan:
    """A stream of two seconds that somebody watches; its callback goes to the healthy n8n."""
    text, model = "".join(words(40)), f"gpt-test-slow-n40-d50-i{number}"
    return Plan(number, "watched", "plain", True, 0.0, model, f"watched {number}", text, 0.0, 0.0)


def plan_phases(options: Options) -> list[Phase]:
    """What the failing n8n does, when; in the end it is well."""
    phases, at = [], 0.0
    for _ in range(options.rounds):
        for kind, lasts in ROUND:
            phases.append(Phase(kind, at))
            at += lasts * options.scale
    return [*phases, Phase("up", at)]


def plan_kills(options: Options) -> list[float]:
    """When a worker is killed: seconds into the run, spread evenly, but not while n8n hangs in every second round.

    There attempts get to time out, which takes longer than a worker lives elsewhere. The first comes while nobody can connect.
    """
    rng = random.Random(f"kills {options.seed}")
    spans = list(pairwise(plan_phases(options)))
    hangs = [(one.at, following.at - one.at) for one, following in spans if one.kind == "hang"][1::2]
    step = (options.seconds - sum(lasts for _, lasts in hangs)) / max(1, options.kills)
    kills = []
    for i in range(options.kills):
        at = step * (i + rng.uniform(0.2, 0.8))
        for since, lasts in hangs:
            at += lasts if at >= since else 0.0
        kills.append(at)
    down = next((one.at + following.at) / 2 for one, following in spans if one.kind == "down")
    return sorted([down, *kills[1:]]) if kills else []


def _deal(shares: dict[str, int], count: int, rng: random.Random) -> list[str]:
    """`count` cards in these shares, shuffled."""
    total = sum(shares.values())
    cards = [kind for kind, share in shares.items() for _ in range(max(1, round(share * count / total)))]
    cards = (cards + list(shares) * count)[:count]
    rng.shuffle(cards)
    return cards
