"""How often a model chooses right, and how likely the answers are to it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from axicon.data.batch import Examples
from axicon.errors import AxiconError
from axicon.finetune.objectives.choice import Choice
from axicon.protocols import Objective


@dataclass(frozen=True, slots=True)
class Quality:
    examples: int
    loss: float
    """Mean over the examples."""
    accuracy: float | None = None
    """Share of examples answered right; None where nothing is chosen."""

    @property
    def standard_error(self) -> float | None:
        """Of the accuracy, by the number of examples."""
        if self.accuracy is None:
            return None
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.examples)


@torch.no_grad()
def quality(
    model: nn.Module,
    objective: Objective,
    examples: Examples,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Quality:
    """Loss of all examples, and accuracy where they have answers. Raises AxiconError for a loss that is not
    finite.

    Classes may be uneven: what always answering the commonest would score is the figure to compare with.
    """
    losses: list[float] = []
    right: int | None = None
    for batch in examples.batches():
        if batch.answer is None:
            losses += objective.loss(model, batch).double().tolist()
        else:
            judge = objective if isinstance(objective, Choice) else Choice()
            losses_B, answers_B = judge.judge(model, batch)
            losses += losses_B.double().tolist()
            right = (right or 0) + int((answers_B == batch.answer).sum())
        if progress is not None:
            progress(len(losses), len(examples))
    done = len(losses)
    loss = math.fsum(losses) / done
    if not math.isfinite(loss):
        raise AxiconError(
            f"the mean loss of {done} examples is {loss}: the model overflows; try dtype=float32"
        )
    return Quality(done, loss, None if right is None else right / done)
