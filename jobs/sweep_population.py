"""Population based training (Jaderberg et al., arXiv:1711.09846), as a searcher.

A trial is one segment of one member: so many steps behind the end of another trial. When all segments of a
generation have ended, the worst members go on from the end of one of the best, with its settings moved by a
fifth or drawn anew; the others go on from their own. Differs from the paper: members wait for each other, so
that what is tried is a function of the seed and of the trials before it, whoever is faster; and the winner
may be of any generation.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Self

from axicon.errors import AxiconError, RunFailed
from jobs.sweep_document import Ranking
from jobs.sweep_ledger import Trial
from jobs.sweep_recipe import SweepRecipe
from jobs.sweep_search import Searcher
from jobs.sweep_space import Parameter, Settings, Space, short
from jobs.sweep_verbs import GoesOn, Verb

FACTORS = (0.8, 1.2)
SEGMENTS = 10
"""Of a run, where nothing is said."""


@dataclass(frozen=True)
class Population:
    space: Space
    ranking: Ranking
    first: Searcher
    """What the members begin with."""
    members: int
    steps: int
    """Of a member in all."""
    interval: int
    """Of a segment; the last one may be shorter."""
    quantile: float
    resample: float
    seed: int

    @classmethod
    def of(
        cls,
        recipe: SweepRecipe,
        space: Space,
        ranking: Ranking,
        first: Searcher,
        members: int,
        steps: int,
    ) -> Self:
        """Raises AxiconError for a population that cannot be."""
        asked = recipe.pbt
        if recipe.search == "optuna":
            raise AxiconError(
                "search=optuna learns from trials that have ended, and scheduler=pbt from its own; take "
                "search=random or search=grid for what members begin with"
            )
        if members < 2:
            raise AxiconError(f"trials={members}: scheduler=pbt compares members; give 2 or more")
        begun: list[Trial] = []
        while len(begun) < members:
            settings = first.suggest(len(begun) + 1, begun)
            if settings is None:
                raise AxiconError(
                    f"trials={members}: the space has only {len(begun)} different settings for members of "
                    "the population to begin with; give fewer trials, or a range in place of a list"
                )
            begun.append(Trial("", settings, ""))
        interval = asked.interval or math.ceil(steps / SEGMENTS)
        if interval >= steps:
            raise AxiconError(
                f"pbt.interval={interval}: a run of {steps} steps has no second segment; give a smaller one"
            )
        return cls(
            space, ranking, first, members, steps, interval, asked.quantile, asked.resample, recipe.seed
        )

    @property
    def trials(self) -> int:
        return self.members * math.ceil(self.steps / self.interval)

    def until(self, number: int) -> int:
        """Steps at the end of trial `number`, counted from 1."""
        return min(self.steps, (self._generation(number) + 1) * self.interval)

    def ready(self, number: int, before: Sequence[Trial]) -> bool:
        """Whether all that decides a trial is known."""
        return all(one.ended for one in before[: self._generation(number) * self.members])

    def suggest(self, number: int, before: Sequence[Trial]) -> Settings | None:
        if self._generation(number) == 0:
            return self.first.suggest(number, before)
        own, parent = self._descent(number, before)
        if parent is own:
            return dict(own.settings)
        draw = random.Random(f"{self.seed} {number} explore")
        return explored(self.space, parent.settings, draw, self.resample)

    def parent(self, number: int, before: Sequence[Trial]) -> str | None:
        """The trial from whose end another begins; None in the first generation."""
        return self._descent(number, before)[1].trial if self._generation(number) else None

    def _descent(self, number: int, before: Sequence[Trial]) -> tuple[Trial, Trial]:
        """The segment before of the same member, and the one it goes on from. Raises RunFailed."""
        generation, member = self._generation(number), (number - 1) % self.members
        last = list(before[(generation - 1) * self.members : generation * self.members])
        ranked = sorted(
            (not self.ranking.within(one), values, one.trial, one)
            for one in last
            if (values := self.ranking.values(one)) is not None
        )
        able = [one for *_, one in ranked]
        if not able:
            raise RunFailed(
                f"no member of generation {generation} ended with {', '.join(self.ranking.objectives)}: "
                "there is nothing to go on from; mend what the trials say, in another out="
            )
        count = max(1, int(self.members * self.quantile))
        best = able[:count]
        lost = self.members - len(able)
        kept = able[: max(len(best), len(able) - max(0, count - lost))]
        own = last[member]
        if own in kept:
            return own, own
        return own, random.Random(f"{self.seed} {number} exploit").choice(best)

    def _generation(self, number: int) -> int:
        return (number - 1) // self.members


def explored(space: Space, settings: Settings, draw: random.Random, resample: float) -> Settings:
    """Settings near others: each moved, or by a chance of `resample` drawn anew."""
    found: Settings = {}
    for one in space.parameters:
        if not one.counts(found):
            continue
        if one.key not in settings or draw.random() < resample:
            found[one.key] = one.drawn(draw)
        else:
            found[one.key] = moved(one, settings[one.key], draw)
    return found


def moved(one: Parameter, value: Any, draw: random.Random) -> Any:
    """A fifth up or down, within the ends; of a list the value before or behind it."""
    if one.kind == "choice":
        at = one.values.index(value)
        near = [one.values[i] for i in (at - 1, at + 1) if 0 <= i < len(one.values)]
        return draw.choice(near) if near else value
    factor = draw.choice(FACTORS)
    if one.kind == "integer":
        step = round(value * factor)
        if step == value:
            step += 1 if factor > 1 else -1
        return min(max(step, int(one.low)), int(one.high))
    return min(max(short(value * factor), one.low), one.high)


def going_on(verb: Verb, base: Mapping[str, Any], keys: Sequence[str]) -> GoesOn:
    """How the verb goes on from another trial's end. Raises AxiconError where it does not, or not so."""
    goes_on = verb.goes_on
    if goes_on is None:
        raise AxiconError(
            f"scheduler=pbt begins trials where others ended, which {verb.name} cannot; take "
            f"scheduler={'asha' if verb.has_steps else 'none'}"
        )
    for key in keys:
        if key.endswith(".method") or not any(fnmatchcase(key, one) for one in goes_on.varies):
            raise AxiconError(
                f"space.{key}: scheduler=pbt goes on with the same model and method under other settings, "
                f"which may be {', '.join(goes_on.varies)}; give {key} in base, or take scheduler=asha"
            )
    for key, (value, why) in goes_on.needs.items():
        found: Any = base
        for part in key.split("."):
            found = found[part]
        if found != value:
            wants = "none" if value is None else value
            raise AxiconError(f"base.{key}={found}: scheduler=pbt {why}; give base.{key}={wants}")
    return goes_on
