"""What a sweep has found so far, as one document: the front of its trials, the best of them, all figures.

`sweep.json` is this document, rewritten after each event; the page is made from it, and from nothing else. It
is made anew from the ledger each time, so there is nothing in it that could be lost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from jobs.report import plain
from jobs.sweep_ledger import Trial

FORMAT_VERSION = 1
NAME, PAGE = "sweep.json", "sweep.html"

Direction = Literal["min", "max"]
SIGNS = {"min": -1.0, "max": 1.0}
"""Times a figure, it grows the way that its name says."""


@dataclass(frozen=True)
class Ranking:
    """What makes one trial better than another."""

    objectives: Mapping[str, Direction]
    """By metric. The first one says which trial is the best; all of them, which ones are on the front."""
    limits: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """`{"perplexity": {"max": 30}}`: a trial beyond one is neither best nor on the front."""

    def values(self, trial: Trial) -> tuple[float, ...] | None:
        """Lower is better; None for a trial that did not end well or reports no such figure."""
        if trial.status != "finished" or any(name not in trial.metrics for name in self.objectives):
            return None
        return tuple(-SIGNS[way] * trial.metrics[name] for name, way in self.objectives.items())

    def within(self, trial: Trial) -> bool:
        """A figure that is not known is within no limit."""
        return all(amount <= 0 for amount in self.beyond(trial).values())

    def beyond(self, trial: Trial) -> dict[str, float]:
        """By how much each limit is passed; 0 and below is within it, and 1 stands for what is not known."""
        found = {}
        for name, limit in self.limits.items():
            value = trial.metrics.get(name)
            over = [] if value is None else [SIGNS[way] * (value - end) for way, end in limit.items()]
            found[name] = max(over) if over else 1.0
        return found

    def ranked(self, trials: Sequence[Trial]) -> list[tuple[tuple[float, ...], Trial]]:
        """Those that count, the best first. Equal ones are in the order of their numbers."""
        found = [(values, t) for t in trials if self.within(t) and (values := self.values(t)) is not None]
        return sorted(found, key=lambda one: (one[0], one[1].trial))

    def best(self, trials: Sequence[Trial]) -> Trial | None:
        ranked = self.ranked(trials)
        return ranked[0][1] if ranked else None

    def front(self, trials: Sequence[Trial]) -> set[str]:
        """Numbers of the trials that no other one beats in all objectives."""
        ranked = self.ranked(trials)
        return {
            trial.trial
            for values, trial in ranked
            if not any(_beats(other, values) for other, _ in ranked)
        }  # fmt: skip


def _beats(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


def document(
    about: Mapping[str, Any], ranking: Ranking, trials: Sequence[Trial], **state: Any
) -> dict[str, Any]:
    """The document: `about` says what the sweep is, `state` how far it is."""
    front, best = ranking.front(trials), ranking.best(trials)
    shown = [
        {name: value for name, value in vars(trial).items() if name != "again"}
        | {"front": trial.trial in front, "within_limits": ranking.within(trial)}
        for trial in trials
    ]
    found = {
        "format_version": FORMAT_VERSION,
        **about,
        **state,
        "objectives": [{"metric": name, "direction": way} for name, way in ranking.objectives.items()],
        "limits": [{"metric": name, **limit} for name, limit in ranking.limits.items()],
        "trials": shown,
        "best": None if best is None else best.trial,
    }
    result: dict[str, Any] = plain(found)
    return result
