"""Products and inputs on which methods that look at data do better than those that do not."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from axicon.compress.moments import Hessian


def linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def correlated(seed: int) -> tuple[Tensor, Tensor]:
    """Inputs of a few directions and noise, channels of very different sizes; weights with long tails."""
    made = torch.Generator().manual_seed(seed)
    mixed = torch.randn(512, 8, generator=made) @ torch.randn(8, 64, generator=made)
    x = (mixed + torch.randn(512, 64, generator=made)) * torch.randn(64, generator=made).exp()
    squares = torch.randn(48, 64, 4, generator=made).square().sum(-1)
    return x, torch.randn(48, 64, generator=made) / (squares / 4).sqrt()


def hessian(x: Tensor) -> Tensor:
    found = Hessian(x.shape[1])
    found.add(x)
    return found.matrix("x")


def error(x: Tensor, weight: Tensor, got: Tensor) -> float:
    return float((x @ (weight - got).T).square().sum() / (x @ weight.T).square().sum())
