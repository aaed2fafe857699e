"""ZO-Adam of the zeroth-order benchmark (arXiv:2402.11592): Adam (arXiv:1412.6980, algorithm 1) fed with the
estimate g z.

Two copies of what trains, in float32, which a log replays. Products and sums are rounded one by one, so that
no bit depends on how torch shares the elements among threads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from axicon.finetune.estimate import ZerothOrder
from axicon.kernels import directions
from axicon.protocols import Moment, Scalars


@dataclass(kw_only=True)
class ZoAdam(ZerothOrder):
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    """Added to the root of the second moment."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1 and self.epsilon > 0):
            raise ValueError("beta1 and beta2 must be at least 0 and less than 1, epsilon more than 0")
        self._moments: dict[str, tuple[Tensor, Tensor]] = {}
        self._count = 0

    def prepare(self, model: nn.Module) -> None:
        super().prepare(model)
        zeros = {
            name: torch.zeros_like(p, dtype=torch.float32)
            for group in self._groups
            for name, p in group.items()
        }
        self._moments = {name: (zero, zero.clone()) for name, zero in zeros.items()}
        self._count = 0

    @torch.no_grad()
    def apply(self, model: nn.Module, scalars: Scalars, at: Moment) -> None:
        self._count += 1
        lr = self.lr * at.rate
        step = lr / (1 - self.beta1**self._count)
        root = math.sqrt(1 - self.beta2**self._count)
        for name, p, along in self.by_parameter(scalars, at):
            estimate = torch.zeros_like(p, dtype=torch.float32)
            for z, g in along:
                z.add(name, estimate, estimate, g)
            first, second = self._moments[name]
            first.mul_(self.beta1).add_(estimate * (1 - self.beta1))
            second.mul_(self.beta2).add_(estimate.square_().mul_(1 - self.beta2))
            change = first / second.sqrt().div_(root).add_(self.epsilon)
            directions.add(p.data, p.data, change, -step, self.kept(name, lr))

    def state(self) -> dict[str, Tensor]:
        pairs = {f"{name}/{i}": m for name, both in self._moments.items() for i, m in enumerate(both)}
        return pairs | {"count": torch.tensor(self._count)}

    def restore(self, state: dict[str, Tensor]) -> None:
        self._moments = {name: (state[f"{name}/0"], state[f"{name}/1"]) for name in self._moments}
        self._count = int(state["count"])

    def finish(self, model: nn.Module) -> None:
        super().finish(model)
        self._moments = {}
