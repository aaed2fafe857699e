"""ZO-SGD-Sign of the zeroth-order benchmark (arXiv:2402.11592): steps of one size.

    of = elements (the paper):           theta <- theta - lr sign(g z)
    of = estimate (the released code):   theta <- theta - lr sign(g) z

With directions of plus and minus ones the two are one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from axicon.finetune.estimate import ZerothOrder
from axicon.kernels import directions
from axicon.protocols import Moment, Scalars


@dataclass(kw_only=True)
class ZoSign(ZerothOrder):
    of: Literal["elements", "estimate"] = "elements"
    """Whose sign is taken: of every element of the estimated gradient, or of the numbers measured."""

    @torch.no_grad()
    def apply(self, model: nn.Module, scalars: Scalars, at: Moment) -> None:
        lr = self.lr * at.rate
        for name, p, along in self.by_parameter(scalars, at):
            keep = self.kept(name, lr)
            if self.of == "estimate":
                for z, g in along:
                    z.add(name, p.data, p.data, -lr * _sign(g) / self.queries, keep=keep)
                    keep = 1.0
                continue
            estimate = torch.zeros_like(p, dtype=torch.float32)
            for z, g in along:
                z.add(name, estimate, estimate, g)
            directions.add(p.data, p.data, estimate.sign_(), -lr, keep)


def _sign(g: float) -> float:
    return math.copysign(1.0, g) if g else 0.0
