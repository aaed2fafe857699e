"""ZO-SGD-Cons of the zeroth-order benchmark (arXiv:2402.11592): a step is taken only where it helps.

Of theta, theta - lr g z and theta + lr g z, the one with the least loss on the same batch stays: five forward
passes a step, and the loss of a batch never rises by it. What was chosen is in the log.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from axicon.data.batch import Batch
from axicon.finetune.estimate import ZerothOrder, losses, mean_losses
from axicon.finetune.shifted import shifted
from axicon.protocols import Mean, Moment, Objective, Scalars

CANDIDATES = (0.0, 1.0, -1.0)
"""What the step is multiplied by. The first of equals stays."""


@dataclass(kw_only=True)
class ZoConservative(ZerothOrder):
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.queries != 1 or self.blocks or self.weight_decay:
            raise ValueError("one step is compared: no queries, no blocks, no weight_decay")

    def measure(
        self, model: nn.Module, objective: Objective, batch: Batch, mean: Mean, at: Moment
    ) -> Scalars:
        found = super().measure(model, objective, batch, mean, at)
        [(group, z, g)] = self.estimates(found, at)
        sums = [losses(model, objective, batch, mean)]
        for factor in CANDIDATES[1:]:
            with shifted(model, group, z, -self.lr * at.rate * factor * g):
                sums.append(losses(model, objective, batch, mean))
        means = mean_losses(torch.stack(sums, dim=1), len(batch), mean)
        best = min(range(len(means)), key=means.__getitem__)
        return {"loss": means[0], "g": [g], "chosen": CANDIDATES[best]}

    @torch.no_grad()
    def apply(self, model: nn.Module, scalars: Scalars, at: Moment) -> None:
        factor = scalars["chosen"]
        assert isinstance(factor, float | int)
        if factor == 0:
            return
        for group, z, g in self.estimates(scalars, at):
            for name, p in group.items():
                z.add(name, p.data, p.data, -self.lr * at.rate * factor * g)
