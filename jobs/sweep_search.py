"""Which settings a sweep tries next.

A searcher is a function of the seed, the number of the trial and the trials before it. It keeps nothing, so a
sweep that goes on after a kill asks for what it would have asked for.
"""

from __future__ import annotations

import importlib.util
import itertools
import random
from collections.abc import Sequence
from typing import Any, Protocol

from axicon.errors import AxiconError
from jobs.sweep_document import Ranking
from jobs.sweep_ledger import Trial
from jobs.sweep_recipe import SweepRecipe
from jobs.sweep_space import MANY, Parameter, Settings, Space, key_of

DEFAULT_TRIALS = 20
MEMBERS = 8
"""Of a population."""
REDRAWS = 200
"""Draws of one trial before a space counts as used up."""


class Searcher(Protocol):
    def suggest(self, number: int, before: Sequence[Trial]) -> Settings | None:
        """The settings of trial `number`, counted from 1; None when there is nothing new to try."""
        ...


class Grid:
    """All combinations in order."""

    def __init__(self, space: Space) -> None:
        self.space = space

    def suggest(self, number: int, before: Sequence[Trial]) -> Settings | None:
        return next(itertools.islice(self.space.grid(), number - 1, None), None)


class Random:
    """Each trial drawn by itself, and drawn again if an earlier one was the same."""

    def __init__(self, space: Space, seed: int) -> None:
        self.space, self.seed = space, seed

    def suggest(self, number: int, before: Sequence[Trial]) -> Settings | None:
        tried = {key_of(one.settings) for one in before}
        for attempt in range(REDRAWS):
            settings = self.space.drawn(random.Random(f"{self.seed} {number} {attempt}"))
            if key_of(settings) not in tried:
                return settings
        return None


class Optuna:
    """Optuna's tree of Parzen estimators over one objective or several, told all trials that ended.

    Failed trials and those beyond a limit are told as what not to look for.
    """

    def __init__(self, space: Space, seed: int, ranking: Ranking) -> None:
        if importlib.util.find_spec("optuna") is None:
            raise AxiconError("search=optuna wants Optuna: install axicon[sweep], or take search=random")
        self.space, self.seed, self.ranking = space, seed, ranking
        self.otherwise = Random(space, seed)

    def suggest(self, number: int, before: Sequence[Trial]) -> Settings | None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        sampler = optuna.samplers.TPESampler(
            seed=random.Random(f"{self.seed} {number}").getrandbits(32),
            constant_liar=True,
        )
        directions = [optuna.study.StudyDirection.MINIMIZE] * len(self.ranking.objectives)
        study = optuna.create_study(sampler=sampler, directions=directions)
        study.add_trials([self._told(one) for one in before])
        tried = {key_of(one.settings) for one in before}
        for _ in range(REDRAWS // 10):
            asked = study.ask()
            settings = self._asked(asked)
            if key_of(settings) not in tried:
                return settings
            study.tell(asked, state=optuna.trial.TrialState.FAIL)
        return self.otherwise.suggest(number, before)

    def _asked(self, trial: Any) -> Settings:
        settings: Settings = {}
        for one in self.space.parameters:
            if not one.counts(settings):
                continue
            if one.kind == "choice":
                settings[one.key] = one.values[trial.suggest_categorical(one.key, range(len(one.values)))]
            elif one.kind == "integer":
                settings[one.key] = trial.suggest_int(one.key, int(one.low), int(one.high))
            else:
                log = one.kind == "log_uniform"
                value = short_within(one, trial.suggest_float(one.key, one.low, one.high, log=log))
                settings[one.key] = value
        return settings

    def _told(self, trial: Trial) -> Any:
        """A trial as Optuna knows it."""
        import optuna

        State = optuna.trial.TrialState
        values = self.ranking.values(trial)
        state = State.COMPLETE if values is not None else State.FAIL if trial.ended else State.RUNNING
        by_key = {one.key: one for one in self.space.parameters}
        distributions = {key: _distribution(by_key[key]) for key in trial.settings}
        params = {
            key: by_key[key].values.index(value) if by_key[key].kind == "choice" else value
            for key, value in trial.settings.items()
        }
        return optuna.trial.create_trial(
            state=state,
            values=None if values is None else list(values),
            params=params,
            distributions=distributions,
            constraints=self.ranking.beyond(trial) if values is not None else None,
        )


def _distribution(one: Parameter) -> Any:
    from optuna import distributions

    if one.kind == "choice":
        return distributions.CategoricalDistribution(tuple(range(len(one.values))))
    if one.kind == "integer":
        return distributions.IntDistribution(int(one.low), int(one.high))
    return distributions.FloatDistribution(one.low, one.high, log=one.kind == "log_uniform")


def short_within(one: Parameter, value: float) -> float:
    """A few digits, and no rounding beyond the ends."""
    return min(max(float(f"{value:.6g}"), one.low), one.high)


def searcher(recipe: SweepRecipe, space: Space, ranking: Ranking) -> tuple[Searcher, int]:
    """The searcher, and how many trials there are to be. Raises AxiconError."""
    if recipe.search == "grid":
        size = space.grid_size()
        if recipe.trials is None and size > MANY:
            raise AxiconError(f"the grid has more than {MANY} trials; say how many of them with trials=")
        return Grid(space), size if recipe.trials is None else min(recipe.trials, size)
    wanted = recipe.trials or (MEMBERS if recipe.scheduler == "pbt" else DEFAULT_TRIALS)
    if recipe.trials is None and recipe.scheduler != "pbt" and space.is_listed:
        wanted = min(wanted, space.grid_size())
    if recipe.search == "random":
        return Random(space, recipe.seed), wanted
    return Optuna(space, recipe.seed, ranking), wanted
