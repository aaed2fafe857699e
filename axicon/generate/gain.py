"""What a guess is worth: how long steps take by the nodes they compute, and how often guesses turn out right.

A token costs time in every step it is computed in, more the more streams there are, and brings a token only
with some chance. So whether guesses pay is measured, all the time, and they are left out where they do not.
"""

from __future__ import annotations

from collections.abc import Sequence

MEMORY = 0.98
"""Weight of the past, per step."""
SLOPE = 0.07
"""Time of a further node over the time of a step of one, before anything was measured: that of a small model
in int8 on two cores."""
CERTAIN = 16.0
"""Sum of squared distances from the mean node count at which the measurement counts as much as `SLOPE`."""
CALLS = 12.0
"""Guesses whose outcomes count as much as what is assumed beforehand."""


class StepCost:
    """Seconds of a step as a line over its nodes, fitted to the steps so far with fading memory."""

    def __init__(self) -> None:
        self._nodes = self._seconds = self._variance = self._covariance = 0.0
        self._weight = 0.0

    def note(self, nodes: int, seconds: float) -> None:
        """A step without prompts took so long."""
        if self._weight:
            # A hiccup of the machine says nothing about nodes.
            seconds = min(seconds, 3 * self.seconds(nodes))
        self._weight = MEMORY * self._weight + 1
        share = 1 / self._weight
        dn, ds = nodes - self._nodes, seconds - self._seconds
        self._nodes += share * dn
        self._seconds += share * ds
        self._variance = (1 - share) * (self._variance + share * dn * dn)
        self._covariance = (1 - share) * (self._covariance + share * dn * ds)

    @property
    def slope(self) -> float:
        """Seconds of one node more."""
        assumed = SLOPE * self._seconds / (1 + SLOPE * max(0.0, self._nodes - 1))
        believed = self._weight * self._variance
        found = (self._weight * self._covariance + CERTAIN * assumed) / (believed + CERTAIN)
        return max(0.1 * assumed, found)

    def seconds(self, nodes: float) -> float:
        """Of a step of so many nodes; 0 before the first was measured."""
        return max(0.1 * self._seconds, self._seconds + self.slope * (nodes - self._nodes))


class DraftCost:
    """Seconds that a draft model takes for a level of its trees."""

    def __init__(self) -> None:
        self._level = 0.0

    def note(self, levels: int, seconds: float) -> None:
        if levels:
            found = seconds / levels
            # The first time something is built or read that later ones find there.
            self._level = 0.9 * self._level + 0.1 * found if self._level else found

    def seconds(self, levels: int) -> float:
        return self._level * levels


class Odds:
    """How often guesses of some kinds turn out right, by kind."""

    def __init__(self, assumed: Sequence[float]) -> None:
        self._tried = [CALLS] * len(assumed)
        self._right = [CALLS * odds for odds in assumed]

    def note(self, kind: int, right: bool) -> None:
        self._tried[kind] = MEMORY * self._tried[kind] + 1
        self._right[kind] = MEMORY * self._right[kind] + right

    def of(self, kind: int) -> float:
        return self._right[kind] / self._tried[kind]


def worth_checking(odds: Sequence[Sequence[float]], streams: int, cost: StepCost) -> tuple[list[int], float]:
    """How many tokens of each stream's guess to check, and the gain over checking none.

    odds: per guess, per token, the chance that it turns out right along with all before it; falling. Tokens
    are taken from the likeliest on, as long as the step makes more tokens per second for it.
    """
    lengths = [0] * len(odds)
    ranked = sorted(
        ((chance, i) for i, guess in enumerate(odds) for chance in guess), key=lambda one: -one[0]
    )
    tokens, seconds, slope = float(streams), cost.seconds(streams), cost.slope
    alone = tokens / seconds if seconds else 0.0
    for chance, i in ranked:
        if chance * seconds <= slope * tokens:
            break
        lengths[i] += 1
        tokens += chance
        seconds += slope
    return lengths, (tokens / seconds / alone if alone else 1.0)
