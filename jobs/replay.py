"""`axicon replay`: the model behind any step of a run, made again from its base and its log."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from axicon.errors import AxiconError
from axicon.finetune.log import MACHINE, NAME, read
from axicon.model.artefact import claim
from jobs.command import read_file
from jobs.finetune_output import write
from jobs.finetune_recipe import FinetuneRecipe, ReplayRecipe
from jobs.finetune_work import Trainee, digest_of

RECIPE = "recipe.yaml"


@dataclass(frozen=True)
class Replayed:
    step: int
    digest: str
    """Of what was trained, as runs print it."""
    out: Path | None
    kind: str = ""
    """`adapter` or `merged`, if something was written."""


def run(folder: Path, recipe: ReplayRecipe) -> Replayed:
    """Raises AxiconError for a folder without a run, a step that it has not, and another base."""
    if not (folder / NAME).exists():
        raise AxiconError(f"{folder}: no run of axicon finetune lies there ({NAME} is missing)")
    values = read_file(folder / RECIPE) | ({} if recipe.model is None else {"model": recipe.model})
    trainee = Trainee.of(FinetuneRecipe.parse(**values)).begun_in(folder)
    header, steps, _ = read(folder / NAME)
    check(trainee, header, folder)
    step = len(steps) if recipe.step is None else recipe.step
    model = trainee.rebuild(folder, step)
    digest = digest_of(model)
    if recipe.out is None:
        return Replayed(step, digest, None)
    target = recipe.out.expanduser().absolute()
    with claim(target):
        kind = write(trainee, model, step, str(header.get("data")), target)
    return Replayed(step, digest, target, kind)


def check(trainee: Trainee, header: dict[str, object], folder: Path) -> None:
    """Raise AxiconError where the base, or what decides the bits, is not what the log holds for."""
    if trainee.base != header.get("base"):
        raise AxiconError(
            f"the log in {folder} begins from a base with digest {str(header.get('base'))[:12]}, and "
            f"{trainee.recipe.model} has {trainee.base[:12]}: give model=DIR of the one it was"
        )
    ours = json.loads(json.dumps(trainee.facts()))
    differ = [key for key in ours if key != MACHINE and ours[key] != header.get(key)]
    if differ:
        raise AxiconError(
            f"{folder / RECIPE} and the log beside it differ in {', '.join(differ)}; mend the recipe"
        )
