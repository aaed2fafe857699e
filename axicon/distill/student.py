"""The student: a few steps on the made examples, from where an expert was to where it went.

Cazenavette et al., arXiv:2203.11932, section 3 (MTT): N steps of plain SGD on the made examples from
theta_0 = tau[t], matched to tau[t + M] by the squared distance over the squared distance at the start. All of
it is a graph that leads back to the examples and to the step size. Shen et al., arXiv:2310.10541 (AST), add
switches, after the released code:
- inner momentum: the steps have momentum;
- balanced inner loss: a factor of the cross-entropy by how late t is;
- intermediate matching: points on the way are matched to the epochs between;
- weight perturbation: theta_0 moves a little in the weights of convolutions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from axicon.distill.augment import Augment
from axicon.distill.experts import sgd
from axicon.distill.networks import Network

STALLED = 1e-8
"""A pair of epochs closer than this, as a share of the square of the later one, says nothing: experts that
stand still would make the loss a quotient of zeros."""


@dataclass(frozen=True, kw_only=True)
class Matching:
    """How a student is matched. The defaults are MTT's, but for the numbers that depend on the data."""

    steps: int = 10
    """N, of a student."""
    epochs: int = 2
    """M, of an expert."""
    max_start: int = 10
    """t is one of 0 .. max_start - 1."""
    batch: int | None = None
    """Made examples of a step; None: all."""
    momentum: float = 0.0
    balance: bool = False
    intermediate: Literal["none", "agg", "adaptive"] = "none"
    perturb: float = 0.0


def balance_factor(start: int, max_start: int) -> float:
    """What the balanced inner loss makes of the cross-entropy: late starts, where gradients are small, count
    more. The step between t = h - 1 and t = h is in the released code."""
    half = max_start // 2
    if start >= half:
        return math.log(start - half + 8, 5)
    return 1 / math.log(half - start + 8, 5)


def batches(count: int, size: int | None, steps: int, chance: torch.Generator) -> list[Tensor]:
    """Which examples each step takes: a permutation cut into pieces, taken from its end, so that a short last
    piece comes first; then a new permutation. Without a size all of them, as they lie."""
    if size is None:
        return [torch.arange(count)] * steps
    pieces: list[Tensor] = []
    found = []
    for _ in range(steps):
        if not pieces:
            pieces = list(torch.randperm(count, generator=chance).split(size))
        found.append(pieces.pop())
    return found


def perturbed(network: Network, flat_P: Tensor, amount: float, chance: torch.Generator) -> Tensor:
    """w + amount * d / ||d|| * w, elementwise, for each weight w of a convolution; d is normal."""
    if not amount:
        return flat_P
    flat_P = flat_P.clone()
    for place in network.convolutions():
        weight = flat_P[place]
        direction = torch.randn(len(weight), generator=chance)
        flat_P[place] = weight + amount * (direction / direction.norm()) * weight
    return flat_P


def student_path(
    network: Network,
    start_P: Tensor,
    x: Tensor,
    y: Tensor,
    alpha: Tensor,
    chosen: Sequence[Tensor],
    *,
    momentum: float = 0.0,
    factor: float = 1.0,
    augment: Augment | None = None,
    chance: torch.Generator | None = None,
) -> list[Tensor]:
    """Parameters (P,) behind each step, as functions of `x` (K, ...) and `alpha` ()."""
    flat_P, moving_P = start_P.detach().requires_grad_(), None
    path = []
    for rows in chosen:
        seen = x[rows]
        if augment is not None and chance is not None:
            seen = augment(seen, chance)
        loss = F.cross_entropy(network(flat_P, seen), y[rows])
        if factor != 1:
            loss = loss * factor
        [gradient_P] = torch.autograd.grad(loss, flat_P, create_graph=True)
        flat_P, moving_P = sgd(flat_P, gradient_P, alpha, momentum, moving_P)
        path.append(flat_P)
    return path


def distance(reached_P: Tensor, target_P: Tensor, start_P: Tensor) -> Tensor:
    """Squared distance to the target over that of the start: 1 for a student that did not move."""
    return (reached_P - target_P).square().sum() / (start_P - target_P).square().sum()


def matching_loss(
    path: Sequence[Tensor], start_P: Tensor, between: Sequence[Tensor], target_P: Tensor, how: Matching
) -> Tensor:
    """The loss of a student's path; `between` are tau[t + 1] .. tau[t + M - 1].

    An intermediate epoch i is met behind step (N // M) i; with fewer steps than epochs there is none. The
    sum weighs each by 1 (`agg`) or by i over their number plus 1 (`adaptive`).
    """
    loss = distance(path[-1], target_P, start_P)
    every = len(path) // (len(between) + 1)
    if how.intermediate != "none" and every:
        for i, point_P in enumerate(between, 1):
            weight = 1.0 if how.intermediate == "agg" else i / (len(between) + 1)
            loss = loss + weight * distance(path[every * i - 1], point_P, start_P)
    return loss


def stalled(start_P: Tensor, target_P: Tensor) -> bool:
    """Whether an expert stood still between the two."""
    return bool((start_P - target_P).square().sum() < STALLED * target_P.square().sum())
