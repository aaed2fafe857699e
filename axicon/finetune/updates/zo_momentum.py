"""ZO-SGD with momentum, ZO-SGD-MMT of the zeroth-order benchmark (arXiv:2402.11592).

    u <- momentum u + lr g z          theta <- (1 - lr wd) theta - u

Torch multiplies the whole sum by the learning rate of the step instead: the same while that is constant,
which all scripts of the benchmark ask for. With momentum 0 this is `zo_sgd`, bit for bit. One copy of what
trains, in float32; a log replays it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from axicon.finetune.estimate import ZerothOrder
from axicon.kernels import directions
from axicon.protocols import Moment, Scalars


@dataclass(kw_only=True)
class ZoMomentum(ZerothOrder):
    momentum: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.momentum < 1:
            raise ValueError("momentum must be at least 0 and less than 1")
        self._u: dict[str, Tensor] = {}

    def prepare(self, model: nn.Module) -> None:
        super().prepare(model)
        self._u = {
            name: torch.zeros_like(p, dtype=torch.float32)
            for group in self._groups
            for name, p in group.items()
        }

    @torch.no_grad()
    def apply(self, model: nn.Module, scalars: Scalars, at: Moment) -> None:
        lr = self.lr * at.rate
        for name, p, along in self.by_parameter(scalars, at):
            u, keep = self._u[name], self.momentum
            for z, g in along:
                z.add(name, u, u, lr * g, keep=keep)
                keep = 1.0
            directions.add(p.data, p.data, u, -1.0, self.kept(name, lr))

    def state(self) -> dict[str, Tensor]:
        return self._u

    def restore(self, state: dict[str, Tensor]) -> None:
        self._u = dict(state)

    def finish(self, model: nn.Module) -> None:
        super().finish(model)
        self._u = {}
