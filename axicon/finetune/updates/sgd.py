"""SGD with momentum: the first-order baseline FO-SGD of the zeroth-order benchmark (arXiv:2402.11592)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from axicon.finetune.first_order import FirstOrder


@dataclass(kw_only=True)
class SGD(FirstOrder):
    lr: float = 1e-2
    weight_decay: float = 0.0
    clip: float = 0.0
    momentum: float = 0.0

    def __post_init__(self) -> None:
        self.check()
        if not 0 <= self.momentum < 1:
            raise ValueError("momentum must be at least 0 and less than 1")

    def make(self, groups: list[dict[str, object]]) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum)
