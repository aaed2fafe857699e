"""Experts: networks trained on the real data, whose parameters before and after every epoch are kept.

Cazenavette et al., arXiv:2203.11932, section 3 (MTT), with plain SGD. Shen et al., arXiv:2310.10541 (AST),
smooth the path by two switches:
- clipping loss: the cross-entropy of epoch e is multiplied by min(1, 0.5 + 0.05 e), which slows the epochs
  that change most. It scales the loss and clips no value, as the released code has it; the penalty is not
  scaled;
- gradient penalty: `grad_penalty` times the mean of (||d(sum of logits)/dx|| - 1)^2, where the norm goes over
  the channels of a pixel, as the released code has it, or over the whole example (`penalty_norm`).
Its experts also use momentum and weight decay, and a learning rate times `decay` in the second half, where
the released code makes its optimizer anew, so momentum begins again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from axicon.distill.augment import Augment
from axicon.distill.examples import Examples
from axicon.distill.networks import Network
from axicon.errors import RunFailed
from axicon.protocols import Moment


@dataclass(frozen=True, kw_only=True)
class Training:
    """How an expert is trained. The defaults are MTT's, but for the number of epochs."""

    epochs: int = 20
    batch: int = 256
    lr: float = 0.01
    momentum: float = 0.0
    weight_decay: float = 0.0
    decay: float = 1.0
    """Of the learning rate, behind the epoch epochs // 2 + 1, counted from 0."""
    clip_loss: bool = False
    grad_penalty: float = 0.0
    penalty_norm: Literal["pixel", "example"] = "pixel"


def generator(seed: int, *what: str | int) -> torch.Generator:
    """Random numbers that are a function of the run's seed and of what they are for."""
    return torch.Generator().manual_seed(Moment(0, seed).key(*what) >> 1)


def order(count: int, seed: int, expert: int, epoch: int) -> Tensor:
    """(count,) int64: the examples of an epoch in the order in which an expert sees them."""
    return torch.randperm(count, generator=generator(seed, "order", expert, epoch))


def loss_factor(epoch: int) -> float:
    """What the clipping loss makes of the cross-entropy in an epoch: 0.5, 0.55, ... 0.95, then 1."""
    return 0.5 + 0.05 * epoch if epoch < 10 else 1.0


def penalty(network: Network, flat_P: Tensor, x: Tensor, norm: Literal["pixel", "example"]) -> Tensor:
    """The gradient penalty without its weight; a graph leads back to `flat_P`."""
    x = x.detach().requires_grad_()
    [slope] = torch.autograd.grad(network(flat_P, x).sum(), x, create_graph=True)
    if norm == "example":
        slope = slope.flatten(1)
    return (slope.norm(2, dim=1) - 1).square().mean()


def sgd(
    flat_P: Tensor, gradient_P: Tensor, lr: float | Tensor, momentum: float, moving_P: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One step, and the moving sum of gradients behind it; the first step has none before. Experts and
    students share it, so equal batches give equal bits."""
    moving_P = gradient_P if moving_P is None else momentum * moving_P + gradient_P
    return flat_P - lr * moving_P, moving_P


def train_expert(
    network: Network,
    data: Examples,
    how: Training,
    *,
    seed: int,
    expert: int,
    augment: Augment | None = None,
    after: Callable[[int], None] = lambda epochs: None,
) -> Tensor:
    """float32 (epochs + 1, P): the parameters before training and behind every epoch.

    `after` is called behind each with their number. Raises RunFailed where the loss is not finite.
    """
    flat_P = network.initial(generator(seed, "expert", expert))
    path = [flat_P]  # each step makes a new vector, so none of these is ever overwritten
    moving_P, lr = None, how.lr
    for epoch in range(how.epochs):
        flat_P, moving_P = _epoch(network, data, how, flat_P, moving_P, lr, seed, expert, epoch, augment)
        if not bool(torch.isfinite(flat_P).all()):
            raise RunFailed(
                f"expert {expert} is not finite after epoch {epoch + 1}: take a smaller experts.lr "
                f"(now {how.lr})"
            )
        path.append(flat_P)
        if how.decay != 1 and epoch == how.epochs // 2 + 1:
            lr, moving_P = lr * how.decay, None
        after(epoch + 1)
    return torch.stack(path)


def _epoch(
    network: Network,
    data: Examples,
    how: Training,
    flat_P: Tensor,
    moving_P: Tensor | None,
    lr: float,
    seed: int,
    expert: int,
    epoch: int,
    augment: Augment | None,
) -> tuple[Tensor, Tensor | None]:
    factor = loss_factor(epoch) if how.clip_loss else 1.0
    chance = generator(seed, "augment", expert, epoch)
    for chosen in order(len(data), seed, expert, epoch).split(how.batch):
        x, y = data.x[chosen], data.y[chosen]
        flat_P = flat_P.detach().requires_grad_()
        seen = x if augment is None else augment(x, chance)
        loss = F.cross_entropy(network(flat_P, seen), y)
        if factor != 1:
            loss = loss * factor
        if how.grad_penalty:
            loss = loss + how.grad_penalty * penalty(network, flat_P, x, how.penalty_norm)
        [gradient_P] = torch.autograd.grad(loss, flat_P)
        flat_P = flat_P.detach()
        if how.weight_decay:
            gradient_P = gradient_P + how.weight_decay * flat_P
        flat_P, moving_P = sgd(flat_P, gradient_P, lr, how.momentum, moving_P)
    return flat_P, moving_P


def movement(path_TP: Tensor) -> float:
    """The largest distance between the parameters of two neighbouring epochs."""
    return float(path_TP.diff(dim=0).norm(dim=1).max())
