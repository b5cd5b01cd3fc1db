"""Durations counted in plain numbers, for what happens so often that a metric of its own would show in a profile. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence


class Tally:
    """How often something took how long."""

    __slots__ = ("_bounds", "_counts", "_total")

    def __init__(self, bounds: Sequence[float]) -> None:
        """`bounds`: the longest duration that each bucket counts, in seconds, rising; one more is for what is longer."""
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def add(self, seconds: float) -> None:
        """Counts one duration."""
        self._counts[bisect_left(self._bounds, seconds)] += 1
        self._total += seconds

    def take(self) -> tuple[list[int], float]:
        """What was added since this was last called: how many by bucket, and the sum of their seconds."""
        taken = self._counts, self._total
        self._counts, self._total = [0] * len(self._counts), 0.0
        return taken
