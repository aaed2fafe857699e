"""AdamW (Loshchilov and Hutter, arXiv:1711.05101): the first-order baseline, by torch's optimizer.

With the scheme `lora` this is what PEFT's users run. The state is two copies of what trains.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from axicon.finetune.first_order import FirstOrder


@dataclass(kw_only=True)
class AdamW(FirstOrder):
    lr: float = 1e-4
    weight_decay: float = 0.0
    clip: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        self.check()

    def make(self, groups: list[dict[str, object]]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, lr=self.lr, betas=(self.beta1, self.beta2), eps=self.epsilon)
