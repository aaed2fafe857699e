"""What rules with gradients and an optimizer of torch share: a step, and their state as tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from axicon.data.batch import Batch
from axicon.finetune.estimate import Parameters, decays, trained
from axicon.finetune.gradients import clear, gradients
from axicon.protocols import Mean, Moment, Objective


class FirstOrder:
    """A rule has the fields `lr`, `weight_decay` and `clip`, and makes its optimizer."""

    lr: float
    weight_decay: float
    clip: float
    """Longest gradient over all parameters; 0 cuts none."""
    _parameters: Parameters
    _optimizer: torch.optim.Optimizer | None

    def make(self, groups: list[dict[str, object]]) -> torch.optim.Optimizer:
        raise TypeError("a rule says which optimizer it has")

    def check(self) -> None:
        if not self.lr > 0 or self.weight_decay < 0 or self.clip < 0:
            raise ValueError("lr must be more than 0, weight_decay and clip not negative")
        self._parameters, self._optimizer = {}, None

    def prepare(self, model: nn.Module) -> None:
        self._parameters = trained(model)
        groups: list[dict[str, object]] = [
            {"params": [p], "weight_decay": self.weight_decay if decays(name) else 0.0}
            for name, p in self._parameters.items()
        ]
        self._optimizer = self.make(groups)

    def step(self, model: nn.Module, objective: Objective, batch: Batch, mean: Mean, at: Moment) -> float:
        """The loss; NaN, with nothing changed, where it or a gradient is not finite."""
        assert self._optimizer is not None
        loss = gradients(model, self._parameters, objective, batch, mean)
        if loss is None:
            return math.nan
        if self.clip:
            nn.utils.clip_grad_norm_(self._parameters.values(), self.clip)
        for group in self._optimizer.param_groups:
            group["lr"] = self.lr * at.rate
        self._optimizer.step()
        clear(self._parameters)
        return loss

    def state(self) -> dict[str, Tensor]:
        assert self._optimizer is not None
        found = self._optimizer.state
        return {
            f"{name}/{kind}": value if isinstance(value, Tensor) else torch.tensor(value)
            for name, p in self._parameters.items()
            for kind, value in found.get(p, {}).items()
            if value is not None
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        assert self._optimizer is not None
        for name, kind, value in _split(state.items()):
            self._optimizer.state.setdefault(self._parameters[name], {})[kind] = value

    def finish(self, model: nn.Module) -> None:
        clear(self._parameters)
        self._optimizer = None


def _split(items: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, str, Tensor]]:
    for key, value in items:
        name, _, kind = key.rpartition("/")
        yield name, kind, value
