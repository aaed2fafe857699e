"""Hybrid training of the zeroth-order benchmark (arXiv:2402.11592): gradients for the last blocks alone.

Blocks before `first_order` and the embeddings are moved by a two-point estimate, the blocks from there on,
the final norm and the head by their gradient, both of the same parameters. Activations are kept for the last
blocks only: nothing before them asks for a gradient. A head tied to the embedding moves as that does. With
all blocks before `first_order` this is `zo_sgd`, with none of them SGD.

It is described in the paper and not in the released code. Not a scalar rule: it has checkpoints.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from axicon.data.batch import Batch
from axicon.errors import AxiconError
from axicon.finetune.directions import direction
from axicon.finetune.estimate import Parameters, losses, mean_losses, trained
from axicon.finetune.gradients import clear, gradients
from axicon.finetune.shifted import shifted
from axicon.model.decoder import Decoder
from axicon.protocols import Mean, Moment, Objective


@dataclass(kw_only=True)
class Hybrid:
    first_order: int = 15
    """The first block that has a gradient."""
    lr: float = 1e-2
    """Of the blocks with a gradient."""
    zo_lr: float = 1e-3
    """Of those without."""
    eps: float = 1e-2

    def __post_init__(self) -> None:
        if not (self.lr > 0 and self.zo_lr > 0 and self.eps > 0) or self.first_order < 0:
            raise ValueError("lr, zo_lr and eps must be more than 0, first_order not negative")
        self._estimated: Parameters = {}
        self._derived: Parameters = {}

    def prepare(self, model: nn.Module) -> None:
        if not isinstance(model, Decoder):
            raise AxiconError(f"hybrid divides a model by its blocks; {type(model).__name__} has none")
        if self.first_order > model.shape.layers:
            raise AxiconError(
                f"rule.first_order={self.first_order}: the model has {model.shape.layers} blocks"
            )
        found = trained(model)
        late = {name for name in found if self._is_late(name, model.shape.layers)}
        self._estimated = {name: p for name, p in found.items() if name not in late}
        self._derived = {name: p for name, p in found.items() if name in late}

    def _is_late(self, name: str, layers: int) -> bool:
        kind, _, rest = name.partition(".")
        if kind == "blocks":
            return int(rest.partition(".")[0]) >= self.first_order
        if kind.startswith(("embed_", "project_in")):
            return self.first_order == 0
        return self.first_order < layers

    def step(self, model: nn.Module, objective: Objective, batch: Batch, mean: Mean, at: Moment) -> float:
        loss, g = None, 0.0
        if self._derived:
            for p in self._estimated.values():
                p.requires_grad_(False)
            loss = gradients(model, self._derived, objective, batch, mean)
            for p in self._estimated.values():
                p.requires_grad_(True)
            if loss is None:
                return math.nan
        z = direction("rademacher", at.key("step", at.step, 0), self._estimated)
        if self._estimated:
            sums = []
            for sign in (1.0, -1.0):
                with shifted(model, self._estimated, z, sign * self.eps):
                    sums.append(losses(model, objective, batch, mean))
            plus, minus = mean_losses(torch.stack(sums, dim=1), len(batch), mean)
            g = (plus - minus) / (2 * self.eps)
            loss = math.fsum((plus, minus)) / 2 if loss is None else loss
        if not math.isfinite(g):
            clear(self._derived)
            return math.nan
        with torch.no_grad():
            for name, p in self._estimated.items():
                z.add(name, p.data, p.data, -self.zo_lr * at.rate * g)
            for p in self._derived.values():
                if p.grad is not None:
                    p.sub_(p.grad * (self.lr * at.rate))
        clear(self._derived)
        assert loss is not None
        return loss

    def finish(self, model: nn.Module) -> None:
        clear(self._derived)
        self._estimated, self._derived = {}, {}
