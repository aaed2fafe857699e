"""What a small data set is worth: fresh networks trained on it alone, and how often they are right.

The accuracy is that behind the last epoch, as a user would get it. The best over all epochs, which the
released code of AST reports, is chosen by the test set.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from axicon.distill.augment import Augment
from axicon.distill.choose import logits
from axicon.distill.examples import Examples
from axicon.distill.experts import generator, sgd
from axicon.distill.networks import Network

BASELINE_RATES = (0.01, 0.03)
"""Real examples are judged at these rates and at the distilled one, and the best counts, in their favour."""


@dataclass(frozen=True, kw_only=True)
class Judging:
    """How networks are trained on a small set: full batches of it, with momentum, the learning rate times
    `decay` in the second half. The defaults are MTT's."""

    nets: int = 5
    epochs: int = 1000
    momentum: float = 0.9
    weight_decay: float = 5e-4
    decay: float = 0.1
    batch: int = 256


@dataclass(frozen=True)
class Verdict:
    accuracies: tuple[float, ...]
    """Of each network, behind its last epoch."""

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accuracies)

    @property
    def deviation(self) -> float:
        """Over the networks; 0 for one alone."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else 0.0


def judge(
    network: Network,
    x: Tensor,
    y: Tensor,
    lr: float,
    test: Examples,
    how: Judging,
    *,
    seed: int,
    augment: Augment | None = None,
) -> Verdict:
    """Train `how.nets` networks on (x, y), and test each. Their initial values and augmentation are keyed by
    `seed`, so two sets are judged by the same networks."""
    return Verdict(
        tuple(
            judge_one(network, x, y, lr, test, how, seed=seed, net=net, augment=augment)
            for net in range(how.nets)
        )
    )


def judge_one(
    network: Network,
    x: Tensor,
    y: Tensor,
    lr: float,
    test: Examples,
    how: Judging,
    *,
    seed: int,
    net: int,
    augment: Augment | None = None,
) -> float:
    """The accuracy of one of the networks."""
    return accuracy(network, _train(network, x, y, lr, how, seed, net, augment), test)


def accuracy(network: Network, flat_P: Tensor, test: Examples) -> float:
    return float((logits(network, flat_P, test).argmax(dim=1) == test.y).double().mean())


def _train(
    network: Network,
    x: Tensor,
    y: Tensor,
    lr: float,
    how: Judging,
    seed: int,
    net: int,
    augment: Augment | None,
) -> Tensor:
    flat_P, moving_P = network.initial(generator(seed, "judge", net)), None
    chance = generator(seed, "judge", net, "steps")
    for epoch in range(how.epochs):
        if epoch == how.epochs // 2 + 1:
            lr, moving_P = lr * how.decay, None
        rows = torch.randperm(len(x), generator=chance) if len(x) > how.batch else torch.arange(len(x))
        for chosen in rows.split(how.batch):
            flat_P = flat_P.detach().requires_grad_()
            seen = x[chosen] if augment is None else augment(x[chosen], chance)
            [gradient_P] = torch.autograd.grad(F.cross_entropy(network(flat_P, seen), y[chosen]), flat_P)
            flat_P = flat_P.detach()
            flat_P, moving_P = sgd(flat_P, gradient_P + how.weight_decay * flat_P, lr, how.momentum, moving_P)
    return flat_P
