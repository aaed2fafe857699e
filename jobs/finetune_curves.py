"""Curves of a run: one page that needs nothing from elsewhere, and files for TensorBoard."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from axicon.model.artefact import write_atomically
from jobs.finetune_recipe import FinetuneRecipe
from jobs.finetune_work import Evaluation
from jobs.page import one_file

PAGE, EVENTS = "curves.html", "tensorboard"
TEMPLATE = "curves.html"
SMOOTHED = 20
MOST_POINTS = 5000
"""Of single steps; a longer run is drawn by its means alone."""

Points = Sequence[tuple[float, float]]


def write_curves(
    folder: Path, recipe: FinetuneRecipe, losses: Points, evaluations: Sequence[Evaluation], chosen: int
) -> None:
    """`curves.html` and the folder `tensorboard`, both made again from what the run has. `chosen` is the step
    whose model is the result."""
    held_out = [(one.step, one.loss) for one in evaluations]
    accuracy = [(one.step, one.accuracy) for one in evaluations if one.accuracy is not None]
    document = {
        "title": f"{recipe.model}, {recipe.rule.method}, {recipe.scheme.method}",
        "facts": {
            "steps": len(losses),
            "batch": recipe.batch,
            "seed": recipe.seed,
            "result": f"step {chosen}",
        },
        "recipe": recipe.as_yaml(),
        "losses": losses if len(losses) <= MOST_POINTS else [],
        "smoothed": smooth(losses) if len(losses) > SMOOTHED else [],
        "smoothed_over": SMOOTHED,
        "evaluations": [dataclasses.asdict(one) for one in evaluations],
        "result_step": chosen,
    }
    write_atomically(folder / PAGE, one_file(TEMPLATE, document))
    _write_events(folder / EVENTS, losses, held_out, accuracy)


def smooth(points: Points, width: int = SMOOTHED) -> list[tuple[float, float]]:
    """Means of neighbours, `width` at a time."""
    groups = [points[i : i + width] for i in range(0, len(points), width)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def _write_events(folder: Path, losses: Points, held_out: Points, accuracy: Points) -> None:
    """One file of events. It is written once, at the end, so that a run that was resumed has one curve."""
    from tensorboardX import SummaryWriter

    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()
    with SummaryWriter(str(folder)) as events:
        for tag, points in (("loss/train", losses), ("loss/evaluated", held_out), ("accuracy", accuracy)):
            for x, y in points:
                events.add_scalar(tag, y, int(x))
