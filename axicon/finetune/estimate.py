"""The two-point estimate that every zeroth-order rule begins with: MeZO (arXiv:2305.17333, algorithm 1) and
the zeroth-order benchmark (arXiv:2402.11592).

    g = (L(theta + eps z) - L(theta - eps z)) / (2 eps)         one number; g z estimates the gradient

Differs from both: parameters are never moved to be measured, so nothing drifts and the numbers of all steps
are the run; directions are keyed by name and element; a step's loss is the mean of the two it computes, which
has no first-order error, where theirs is L(theta + eps z).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from axicon.data.batch import Batch
from axicon.errors import AxiconError
from axicon.finetune.directions import Direction, Kind, Mask, direction
from axicon.finetune.shifted import shifted
from axicon.protocols import Mean, Moment, Objective, Scalars

Parameters = Mapping[str, nn.Parameter]


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name. Raises AxiconError where there are none."""
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise AxiconError("nothing to train: the scheme chose no parameter of this model")
    return found


@torch.no_grad()
def losses(model: nn.Module, objective: Objective, batch: Batch, mean: Mean) -> Tensor:
    """float64 (own shards,): the sum over the examples of each virtual shard of this worker."""
    shards = list(batch.shards(mean.shards))
    return torch.stack([objective.loss(model, shards[i]).double().sum() for i in mean.own])


def mean_losses(sums_SK: Tensor, examples: int, mean: Mean) -> list[float]:
    """Means over a batch, one per column of the sums of this worker's shards; added in the shards' order."""
    columns = mean.gather(sums_SK).T.tolist()
    return [sum(column) / examples for column in columns]


def decays(name: str) -> bool:
    """Whether weight decay holds for a parameter: not for biases, nor for norms, the final one included."""
    module, _, kind = name.rpartition(".")
    return kind != "bias" and not module.endswith("norm")


def groups_of(parameters: Parameters, blocks: bool) -> list[Parameters]:
    """All parameters as one group; or those of each block and of each module beside the blocks, in the order
    of the model.
    """
    if not blocks:
        return [parameters]
    found: dict[str, dict[str, nn.Parameter]] = {}
    for name, p in parameters.items():
        parts = name.split(".")
        group = ".".join(parts[:2]) if parts[0] == "blocks" else parts[0]
        found.setdefault(group, {})[name] = p
    return list(found.values())


@dataclass(kw_only=True)
class ZerothOrder:
    """What the zeroth-order rules share: how they measure. A rule adds how it applies what was measured."""

    lr: float = 1e-3
    eps: float = 1e-2
    """How far the two points are from the parameters, in units of a direction's elements."""
    weight_decay: float = 0.0
    direction: Kind = "rademacher"
    queries: int = 1
    """Directions per step; their estimates are averaged."""
    one_sided: bool = False
    """Compares with the parameters themselves instead of the point on the other side."""
    blocks: bool = False
    """Estimates block by block, with all else unmoved: two forward passes for each."""
    share: float = 1.0
    """Of the elements that move; which ones is drawn anew every `resample` steps."""
    resample: int = 1

    def __post_init__(self) -> None:
        positive = {"lr": self.lr, "eps": self.eps, "queries": self.queries, "resample": self.resample}
        for name, value in positive.items():
            if not value > 0:
                raise ValueError(f"{name} must be more than 0")
        if not 0 < self.share <= 1:
            raise ValueError("share must be more than 0 and at most 1")
        if self.weight_decay < 0:
            raise ValueError("weight_decay must not be negative")
        self._groups: list[Parameters] = []

    def prepare(self, model: nn.Module) -> None:
        self._groups = groups_of(trained(model), self.blocks)

    def finish(self, model: nn.Module) -> None:
        self._groups = []

    def step(self, model: nn.Module, objective: Objective, batch: Batch, mean: Mean, at: Moment) -> float:
        scalars = self.measure(model, objective, batch, mean, at)
        self.apply(model, scalars, at)
        loss = scalars["loss"]
        assert isinstance(loss, float)
        return loss

    def measure(
        self, model: nn.Module, objective: Objective, batch: Batch, mean: Mean, at: Moment
    ) -> Scalars:
        """`loss`, and in `g` the estimates: of every group in turn, for each query."""
        clean = [losses(model, objective, batch, mean)] if self.one_sided else []
        sums = list(clean)
        for group, z in self.directions(at):
            for sign in (1.0,) if self.one_sided else (1.0, -1.0):
                with shifted(model, group, z, sign * self.eps):
                    sums.append(losses(model, objective, batch, mean))
        means = mean_losses(torch.stack(sums, dim=1), len(batch), mean)
        if self.one_sided:
            return {"loss": means[0], "g": [(plus - means[0]) / self.eps for plus in means[1:]]}
        pairs = list(zip(means[::2], means[1::2], strict=True))
        loss = math.fsum(means) / len(means)
        return {"loss": loss, "g": [(plus - minus) / (2 * self.eps) for plus, minus in pairs]}

    @torch.no_grad()
    def apply(self, model: nn.Module, scalars: Scalars, at: Moment) -> None:
        """Descend: theta <- (1 - lr wd) theta - lr g z, the product rounded to float32 and then the sum."""
        lr = self.lr * at.rate
        decayed: set[str] = set()
        for group, z, g in self.estimates(scalars, at):
            for name, p in group.items():
                z.add(name, p.data, p.data, -lr * g, keep=1.0 if name in decayed else self.kept(name, lr))
                decayed.add(name)

    def kept(self, name: str, lr: float) -> float:
        """What weight decay leaves of a parameter."""
        return 1 - lr * self.weight_decay if decays(name) else 1.0

    def directions(self, at: Moment) -> Iterator[tuple[Parameters, Direction]]:
        """Groups with their directions, query by query: the order of `g`."""
        mask = None
        if self.share < 1:
            mask = Mask(at.key("mask", at.step // self.resample), self.share)
        for query in range(self.queries):
            for group in self._groups:
                yield group, direction(self.direction, at.key("step", at.step, query), group, mask)

    def by_parameter(
        self, scalars: Scalars, at: Moment
    ) -> Iterator[tuple[str, nn.Parameter, list[tuple[Direction, float]]]]:
        """Every parameter with all its directions and what was measured along them."""
        found: dict[str, tuple[nn.Parameter, list[tuple[Direction, float]]]] = {}
        for group, z, g in self.estimates(scalars, at):
            for name, p in group.items():
                found.setdefault(name, (p, []))[1].append((z, g))
        for name, (p, along) in found.items():
            yield name, p, along

    def estimates(self, scalars: Scalars, at: Moment) -> Iterator[tuple[Parameters, Direction, float]]:
        """Groups and directions with what was measured along them, divided by the number of queries."""
        found = scalars["g"]
        assert not isinstance(found, float)
        for (group, z), g in zip(self.directions(at), found, strict=True):
            yield group, z, g / self.queries
