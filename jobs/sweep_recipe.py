"""What a sweep is asked to do: a recipe of some verb, and what is tried of it."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from axicon.settings import Recipe, laid, split_words
from jobs.command import read_file, shipped

Search = Literal["grid", "random", "optuna"]
Scheduler = Literal["none", "asha", "median", "pbt"]
KINDS = ("choice", "uniform", "log_uniform", "integer")


class ParameterRecipe(Recipe):
    """What one setting of the base may be. Exactly one of the kinds."""

    choice: tuple[Any, ...] | None = Field(None, min_length=1, description="one of these values")
    uniform: tuple[float, float] | None = Field(None, description="any number from the first to the second")
    log_uniform: tuple[float, float] | None = Field(None, description="the same, even in its logarithm")
    integer: tuple[int, int] | None = Field(None, description="a whole number, both ends among them")
    when: dict[str, Any] | None = Field(
        None, description="only where other parameters have these values: {key: value or list of values}"
    )

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of {', '.join(KINDS)}, or a list of values")
        if given != ["choice"]:
            low, high = getattr(self, given[0])
            if not low < high:
                raise ValueError(f"{given[0]}: the first number must be below the second")
            if given == ["log_uniform"] and low <= 0:
                raise ValueError("log_uniform: both numbers must be above 0")
        return self

    @property
    def kind(self) -> str:
        return next(kind for kind in KINDS if getattr(self, kind) is not None)


def _listed(value: Any) -> Any:
    """A list of values given for a parameter is a choice among them."""
    value = split_words(value)
    return {"choice": value} if isinstance(value, list | tuple) else value


def _by_dotted_key(value: Any) -> Any:
    """`{"rule": {"lr": [1, 2]}}`, as words on a command line have it, means `{"rule.lr": [1, 2]}`."""
    if not isinstance(value, Mapping):
        return value
    found: dict[str, Any] = {}
    for key, one in value.items():
        if isinstance(one, Mapping) and not one.keys() & {*KINDS, "when"}:
            found |= {f"{key}.{name}": inner for name, inner in _by_dotted_key(one).items()}
        else:
            found[str(key)] = one
    return found


Space = Annotated[
    dict[str, Annotated[ParameterRecipe, BeforeValidator(_listed)]], BeforeValidator(_by_dotted_key)
]
Settings = Annotated[dict[str, Any], BeforeValidator(_by_dotted_key)]


class LimitRecipe(Recipe):
    """Between what a figure must be."""

    min: float | None = Field(None, description="at least this")
    max: float | None = Field(None, description="at most this")

    @model_validator(mode="after")
    def _some(self) -> Self:
        if self.min is None and self.max is None:
            raise ValueError("give min, max or both")
        return self


class PbtRecipe(Recipe):
    """How a population is trained. `trials` is the number of its members."""

    interval: int | None = Field(None, ge=1, description="steps of a segment; none: a tenth of the base's")
    quantile: float = Field(
        0.25, gt=0, le=0.5, description="share of the members that go on from one of as many best ones"
    )
    resample: float = Field(
        0.25, ge=0, le=1, description="chance of a setting to be drawn anew; else it moves by a fifth"
    )


class SweepRecipe(Recipe):
    """A recipe of a verb tried with different settings, one trial each."""

    verb: str = Field("compress", description="of the trials: compress, distill, evaluate or finetune")
    model: str | None = Field(None, description="of the base; none: what the base says")
    base: dict[str, Any] = Field(
        {}, description="recipe of the verb: base.recipe names a file or one that comes with axicon, "
        "other keys are settings over it"
    )  # fmt: skip
    space: Space = Field(
        {}, description="setting of the base: list of values, or uniform, log_uniform, integer, when"
    )
    trials: int | None = Field(
        None, ge=1, description="how many; none: all of a grid, 20 of another search; members for pbt (8)"
    )
    search: Search = Field("random", description="grid, random, or optuna, which learns from finished trials")
    scheduler: Scheduler = Field(
        "none", description="for verbs with steps: asha and median end bad trials early, pbt has a population"
    )
    grace: int = Field(1, ge=1, description="evaluations that a trial has before it may be ended early")
    reduction: int = Field(3, ge=2, description="asha: one trial of so many goes on")
    pbt: PbtRecipe = Field(PbtRecipe(), description="of scheduler=pbt")
    objectives: dict[str, Literal["min", "max"]] = Field(
        {}, description="figure: min or max; the first decides which trial is the best; none: by the verb"
    )
    limits: dict[str, LimitRecipe] = Field({}, description="figure: min and max of a trial that counts")
    seed: int = Field(0, ge=0, description="of the search, and of what is written to measure by")
    threads: int = Field(1, ge=1, le=1024, description="compute threads of a trial, and the cores it takes")
    gpus: float = Field(0, ge=0, description="GPUs that a trial takes")
    at_once: int | None = Field(None, ge=1, description="trials at the same time; none: as many as fit")
    max_failures: int = Field(3, ge=0, description="failed trials after which the sweep ends")
    full: Settings = Field({}, description="settings over those of the best trial, to run it in full")
    run_best: bool = Field(False, description="true: run the best one in full at the end")
    out: Path | None = Field(None, description="folder of the sweep; none: artifacts/sweeps/VERB-MODEL")

    @classmethod
    def parse(cls, overrides: Sequence[str] = (), /, **values: Any) -> Self:
        if isinstance(base := values.get("base"), str):  # so that words lay settings over it
            values["base"] = {"recipe": base}
        words = [f"base.recipe={word[5:]}" if word.startswith("base=") else word for word in overrides]
        return super().parse(words, **values)

    def inside(self) -> Iterator[tuple[type[Recipe], Mapping[str, Any]]]:
        from jobs.sweep_verbs import verb_of

        kind = verb_of(self.verb).recipe
        yield kind, self.base_values()
        listed = [(key, value) for key, one in self.space.items() for value in one.choice or ()]
        for key, value in [*self.full.items(), *listed]:
            *path, last = key.split(".")
            yield kind, functools.reduce(lambda inner, name: {name: inner}, reversed(path), {last: value})

    def base_values(self) -> dict[str, Any]:
        """Of the base: what its file says, and over it what stands here. Raises AxiconError."""
        over = dict(self.base)
        name = over.pop("recipe", None)
        values: dict[str, Any] = {}
        if name is not None:
            file = str(name) if str(name).endswith((".yaml", ".yml")) else f"{name}.yaml"
            values = read_file(shipped(file) or Path(file))
        return laid(values, over if self.model is None else laid(over, {"model": self.model}))
