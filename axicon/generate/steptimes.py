"""How long steps that only decode take, counted by size, for percentiles of any span of time."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

BOUNDS = tuple(0.0005 * 2 ** (i / 4) for i in range(53))
"""Seconds, upper ends of the classes: 0.5 ms to 4 s, each 19 % above the one before."""


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Steps counted since the start; subtract an earlier one for those in between."""

    counts: tuple[int, ...] = (0,) * (len(BOUNDS) + 1)
    """Per class of BOUNDS; the last is for all that are longer."""
    seconds: float = 0.0
    """Of all of them together."""


class StepClock:
    """Counts steps. Belongs to the engine's thread; `read` may be called from any."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS) + 1)
        self._seconds = 0.0

    def note(self, seconds: float) -> None:
        self._counts[bisect_left(BOUNDS, seconds)] += 1
        self._seconds += seconds

    def read(self) -> StepTimes:
        return StepTimes(tuple(self._counts), self._seconds)
