"""A verb that takes no time, and sweeps of it in this process."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

from axicon.settings import Method, OptionalMethod, Recipe
from jobs import sweep, sweep_verbs
from jobs.progress import Reporter
from jobs.report import Report
from jobs.sweep_recipe import SweepRecipe
from jobs.sweep_study import Study
from jobs.sweep_trial import run_trial
from jobs.sweep_verbs import Verb


@dataclass
class Round:
    digits: int = 2


@dataclass
class Cut:
    at: float = 0.5
    digits: int = 1


class Inner(Recipe):
    rate: float = Field(0.1, description="how fast")


class ToyRecipe(Recipe):
    x: float = Field(1.0, description="where")
    n: int = Field(3, ge=0, description="how often")
    method: OptionalMethod = Field(Method(method="round"), description="what is done")
    chain: tuple[Method, ...] = Field((), description="in order")
    inner: Inner = Field(Inner(), description="more")
    steps: int = Field(0, description="on the way")
    threads: int | None = Field(None, description="of compute")
    out: Path | None = Field(None, description="folder")


@dataclass
class Toy:
    """The verb `toy`; `does` is what a run does beside reporting (x - 2)^2 as loss and 10 n as bytes."""

    runs: list[dict[str, Any]] = field(default_factory=list)
    does: Callable[[ToyRecipe], None] = lambda recipe: None

    def run(self, recipe: ToyRecipe, reporter: Reporter) -> Report:
        self.runs.append(recipe.model_dump(mode="json"))
        self.does(recipe)
        for step in range(1, recipe.steps + 1):
            reporter.figures(step, {"loss": (recipe.x - 2) ** 2 + 1 / step})
        metrics = {"loss": (recipe.x - 2) ** 2, "bytes": 10.0 * recipe.n}
        assert recipe.out is not None
        return Report(verb="toy", recipe=recipe, metrics=metrics, seconds=0.0, files=(recipe.out / "it",))

    def verb(self) -> Verb:
        return Verb(
            name="toy",
            recipe=ToyRecipe,
            run=self.run,
            tables={"method": {"round": Round, "cut": Cut}, "chain": {"round": Round, "cut": Cut}},
            objectives={"loss": "min"},
            has_steps=True,
            served=lambda out: out,
        )


def known(monkeypatch: pytest.MonkeyPatch) -> Toy:
    """The verb, known to sweeps for the time of a test."""
    found = Toy()
    monkeypatch.setitem(sweep_verbs.VERBS, "toy", found.verb)
    return found


def one_by_one(study: Study) -> None:
    """Runs trials here, one after the other, as the runner on Ray Tune does in actors."""
    while (task := study.ask()) is not None:
        result = run_trial(task, functools.partial(study.stepped, task["trial"]))
        try:
            study.told(task["trial"], result)
        except Exception as error:
            study.error = error


SPACE: dict[str, Any] = {"x": {"uniform": [0, 4]}, "n": [1, 2, 3]}


def recipe(out: Path, **settings: Any) -> SweepRecipe:
    values: dict[str, Any] = {"verb": "toy", "base": {"n": 3}, "space": SPACE, "trials": 6, "out": out}
    return SweepRecipe.parse(**values | settings)


def swept(out: Path, said: io.StringIO | None = None, **settings: Any) -> Report:
    """A whole sweep, with what it says."""
    return sweep.run(recipe(out, **settings), Reporter(said or io.StringIO()), one_by_one)
