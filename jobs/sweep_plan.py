"""A sweep's recipe with everything found that it names, and all that can be wrong with it said beforehand."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from axicon.errors import AxiconError
from axicon.model import checkpoint
from jobs.sweep_document import Ranking
from jobs.sweep_ledger import Trial, read
from jobs.sweep_population import Population, going_on
from jobs.sweep_recipe import SweepRecipe
from jobs.sweep_search import Searcher, searcher
from jobs.sweep_space import Settings, Space, applied
from jobs.sweep_verbs import Verb, verb_of

DEFAULT_OUT = Path("artifacts/sweeps")
TEXT, RECIPE, BEST = "text.txt", "sweep.yaml", "best.yaml"
SHARED = "shared"
"""Folder in which compressions find each other's statistics, while there are trials to come."""
SAMPLES = 32
"""Drawn settings of which one has to make a recipe that the verb takes."""
ASIDE = {"trials", "at_once", "max_failures", "run_best", "full", "out", "base", "model"}
"""Of the recipe, what may be another when a sweep goes on. The base is compared as it is resolved."""
ORDERING = {"objectives", "limits"}
"""The same, where they decide the order of trials and not which ones there are."""


@dataclass(frozen=True)
class Plan:
    recipe: SweepRecipe
    verb: Verb
    base: Mapping[str, Any]
    """Resolved, as plain data."""
    space: Space
    ranking: Ranking
    searcher: Searcher
    wanted: int
    folder: Path
    writes_text: bool
    """Whether the model has to write the text that its copies are measured on."""
    population: Population | None = None
    """The searcher, where trials begin from each other's ends."""

    @classmethod
    def of(cls, recipe: SweepRecipe) -> Self:
        """Raises AxiconError for what is not there or does not fit."""
        verb = verb_of(recipe.verb)
        if not recipe.base:
            raise AxiconError(
                f"base: names nothing to vary; give a recipe of {verb.name} as base=NAME or base=FILE.yaml, "
                "or settings as base.SETTING=VALUE"
            )
        if recipe.scheduler != "none" and not verb.has_steps:
            raise AxiconError(
                f"scheduler={recipe.scheduler} ends trials between their steps, and {verb.name} has none; "
                "take scheduler=none"
            )
        folder = _folder(recipe)
        base = _base(recipe, verb, folder)
        ranking = Ranking(
            objectives=recipe.objectives or verb.objectives,  # type: ignore[arg-type]
            limits={name: limit.model_dump(exclude_none=True) for name, limit in recipe.limits.items()},
        )
        space = Space.of(recipe.space, verb, base)
        writes_text = verb.name == "compress" and base["text"] is None and _of_text(ranking)
        if "model" in base and "model" not in recipe.space:
            source = checkpoint.resolve(base["model"], offline=base["offline"], revision=base["revision"])
            if writes_text:
                most = checkpoint.shape_of(source).max_positions
                base |= {"text": str(folder / TEXT), "window": min(WINDOW, most), "windows": None}
        elif writes_text:
            raise AxiconError("space.model: perplexities of several models want one text: base.text=FILE")
        found, wanted = searcher(recipe, space, ranking)
        population = None
        if recipe.scheduler == "pbt":
            goes_on = going_on(verb, base, list(recipe.space))
            base |= dict(goes_on.fixed)
            population = Population.of(recipe, space, ranking, found, wanted, base[goes_on.steps])
            found, wanted = population, population.trials
        plan = cls(recipe, verb, base, space, ranking, found, wanted, folder, writes_text, population)
        plan._try_some()
        return plan

    def _try_some(self) -> None:
        """Raises AxiconError where no settings make a recipe, or the winner in full would be none."""
        problem: str | None = None
        for number in range(SAMPLES):
            settings = self.space.drawn(random.Random(number))
            _, problem = self.trial_recipe(settings, self.folder)
            if problem is None:
                self.full_recipe(settings)
                return
        raise AxiconError(f"space: none of {SAMPLES} settings makes a recipe: {problem}")

    def segment(self, trial: Trial) -> dict[str, Any]:
        """Settings that say where in the life of a member a trial is: what it begins from, and its end."""
        goes_on = self.verb.goes_on
        if self.population is None or goes_on is None:
            return {}
        begins = None if trial.parent is None else str(self.out_of(trial.parent))
        return {goes_on.start: begins, goes_on.steps: self.population.until(int(trial.trial))}

    def out_of(self, number: str) -> Path:
        """The folder of a trial."""
        return self.folder / "trials" / number

    def trial_recipe(
        self, settings: Settings, out: Path, segment: Mapping[str, Any] = MappingProxyType({})
    ) -> tuple[dict[str, Any], str | None]:
        """The recipe of a trial as plain data, and why the verb does not take it."""
        values = applied(self.base, settings) | dict(segment) | {"out": str(out)}
        try:
            recipe = self.verb.recipe.parse(**values)
            self.verb.check(recipe)
        except AxiconError as error:
            return values, str(error)
        return recipe.model_dump(mode="json"), None

    def full_recipe(
        self, settings: Settings, segment: Mapping[str, Any] = MappingProxyType({})
    ) -> dict[str, Any]:
        """The recipe of a trial as it is run in full. Raises AxiconError for a setting that is none."""
        values = applied(applied(self.base, settings) | dict(segment), self.recipe.full)
        if "threads" not in self.recipe.full:
            values["threads"] = self.verb.recipe.model_fields["threads"].default
        if (sample := values.get("calibration", {})).get("shared") == str(self.folder / SHARED):
            sample["shared"] = None
        try:
            recipe = self.verb.recipe.parse(**values | {"out": str(self.folder / "best")})
        except AxiconError as error:
            raise AxiconError(f"full: {error}") from None
        return recipe.model_dump(mode="json")

    def facts(self) -> dict[str, Any]:
        """What decides which trials there are and what they do."""
        aside = set(ASIDE)
        if self.population is None:
            aside.add("pbt")
        else:
            aside.remove("trials")  # another number of members is another population
        if self.recipe.search != "optuna" and self.recipe.scheduler == "none":
            aside |= ORDERING
        found: dict[str, Any] = json.loads(self.recipe.model_dump_json(exclude=aside))
        told = json.dumps({"sweep": found, "base": dict(self.base)}).replace(str(self.folder), ".")
        facts: dict[str, Any] = json.loads(told)  # a sweep that was moved is the same
        return facts

    def check_same(self, ledger: Path) -> None:
        """Raises AxiconError where the folder has another sweep, saying what is different."""
        if not ledger.exists():
            return
        found, _, _ = read(ledger)
        if not found:
            return
        theirs = dict(_flat(found.get("sweep", {}), "")) | dict(_flat(found.get("base", {}), "base."))
        ours = dict(_flat(self.facts()["sweep"], "")) | dict(_flat(self.facts()["base"], "base."))
        # What only one side names is compared with nothing there: what may change depends on the search.
        differ = [
            f"{key} was {_short(theirs.get(key))} and is {_short(ours.get(key))}"
            for key in [*theirs, *(key for key in ours if key not in theirs)]
            if theirs.get(key) != ours.get(key)
        ]
        if differ:
            more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
            raise AxiconError(
                f"out={self.folder} holds a sweep of another recipe: {'; '.join(differ[:3])}{more}; give "
                "that, or a new name with out="
            )

    def about(self) -> dict[str, Any]:
        """The part of the document that does not change."""
        return {
            "name": self.folder.name,
            "verb": self.verb.name,
            "command": f"axicon sweep {self.folder / RECIPE}",
            "base": dict(self.base),
            "search": self.recipe.search,
            "scheduler": self.recipe.scheduler,
            "parameters": [one.as_json() for one in self.space.parameters],
        }


WINDOW, WINDOWS = 256, 8
"""Tokens and number of the windows that a model writes to be measured on."""


def _of_text(ranking: Ranking) -> bool:
    return any(
        name.endswith(("perplexity", "perplexity_ratio")) for name in (*ranking.objectives, *ranking.limits)
    )


def _base(recipe: SweepRecipe, verb: Verb, folder: Path) -> dict[str, Any]:
    values = recipe.base_values()
    try:
        base: dict[str, Any] = verb.recipe.parse(**values).model_dump(mode="json")
    except AxiconError as error:
        raise AxiconError(f"base: {error}") from None
    if values.get("threads") not in (None, recipe.threads):
        raise AxiconError(f"base.threads={values['threads']}: give threads= of the sweep instead")
    sample = base.get("calibration", {})
    if sample.get("shared", folder) is None:
        sample["shared"] = str(folder / SHARED)
    return base | dict(verb.fixed) | {"threads": recipe.threads, "out": None}


def _folder(recipe: SweepRecipe) -> Path:
    name = checkpoint.model_id(recipe.base_values().get("model", "demo")).replace("/", "--")
    out = recipe.out or DEFAULT_OUT / f"{recipe.verb}-{name}"
    return out.expanduser().absolute()


def _flat(facts: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in facts.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
