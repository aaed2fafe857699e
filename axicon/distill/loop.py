"""The loop of a distillation: an iteration moves the made examples and the step size down the matching loss.

Every random number is keyed by the run's seed and the iteration, so an iteration is a function of what is
there before it: the examples, the step size, and the moving sums of both. A checkpoint is these, and a run
that was killed ends with the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from safetensors.torch import save
from torch import Tensor

from axicon.distill.augment import Augment
from axicon.distill.experts import generator
from axicon.distill.networks import Network
from axicon.distill.student import (
    Matching,
    balance_factor,
    batches,
    matching_loss,
    perturbed,
    stalled,
    student_path,
)
from axicon.errors import AxiconError, RunFailed

LEAST_ALPHA = 1e-6
"""A step size below 0 would walk a student up its loss; one that explodes is caught as a loss."""
MOMENTUM = 0.5
"""Of the outer steps, for examples and step size alike."""
DRAWS = 100
"""Pairs of epochs that may be tried until one moved."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Learning rates of the outer steps."""

    data: float = 100.0
    alpha: float = 1e-5


@dataclass
class Made:
    """What is being distilled, and what the outer steps keep."""

    x: Tensor
    """float32 (K, ...), standardised."""
    alpha: Tensor
    """float32 (): the students' step size."""
    moving_x: Tensor
    moving_alpha: Tensor
    iterations: int = 0

    @classmethod
    def begin(cls, x: Tensor, alpha: float) -> Made:
        zero = torch.zeros(())
        return cls(x.clone(), torch.tensor(alpha), torch.zeros_like(x), zero)

    def to_bytes(self) -> bytes:
        """A safetensors file."""
        tensors = {
            "x": self.x,
            "alpha": self.alpha,
            "moving_x": self.moving_x,
            "moving_alpha": self.moving_alpha,
        }
        return save({k: v.contiguous() for k, v in tensors.items()}, {"iterations": str(self.iterations)})


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """All that decides a run, but for the number of its iterations."""

    network: Network
    y: Tensor
    """int64 (K,): labels of the made examples."""
    trajectories: Sequence[Tensor]
    """One (T + 1, P) for each expert."""
    matching: Matching
    rates: Rates
    augment: Augment | None
    seed: int

    def __post_init__(self) -> None:
        epochs = min(len(path) - 1 for path in self.trajectories)
        last = self.matching.max_start - 1 + self.matching.epochs
        if last > epochs:
            raise AxiconError(
                f"experts of {epochs} epochs are too short: max_start={self.matching.max_start} and "
                f"expert_epochs={self.matching.epochs} reach epoch {last}; train longer, or take smaller ones"
            )

    def run(self, made: Made, iterations: int) -> Iterator[float]:
        """Iterate until `iterations` are done, and yield the loss of each; `made` is changed in place.

        Raises RunFailed for a loss that is not finite; `made` is then as it was before that iteration.
        """
        while made.iterations < iterations:
            yield self._iterate(made)

    def pick(self, chance: torch.Generator) -> tuple[Tensor, int]:
        """An expert's path and an epoch to start from. Raises RunFailed where none moved in many draws."""
        for _ in range(DRAWS):
            path = self.trajectories[int(torch.randint(len(self.trajectories), (1,), generator=chance))]
            start = int(torch.randint(self.matching.max_start, (1,), generator=chance))
            if not stalled(path[start], path[start + self.matching.epochs]):
                return path, start
        raise RunFailed("the experts stand still: take a larger experts.lr or a smaller max_start")

    def loss(self, made: Made, chance: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """The matching loss of a student, and the leaves its graph leads back to: examples, step size."""
        how = self.matching
        path, start = self.pick(chance)
        start_P = perturbed(self.network, path[start], how.perturb, chance)
        x, alpha = made.x.clone().requires_grad_(), made.alpha.clone().requires_grad_()
        walked = student_path(
            self.network,
            start_P,
            x,
            self.y,
            alpha,
            batches(len(x), how.batch, how.steps, chance),
            momentum=how.momentum,
            factor=balance_factor(start, how.max_start) if how.balance else 1.0,
            augment=self.augment,
            chance=chance,
        )
        end = start + how.epochs
        return matching_loss(walked, start_P, list(path[start + 1 : end]), path[end], how), x, alpha

    def _iterate(self, made: Made) -> float:
        loss, x, alpha = self.loss(made, generator(self.seed, "iteration", made.iterations))
        slope_x, slope_alpha = torch.autograd.grad(loss, (x, alpha))
        if not all(bool(torch.isfinite(one).all()) for one in (loss, slope_x, slope_alpha)):
            raise RunFailed(
                f"iteration {made.iterations + 1}: the matching loss is not finite; begin again in another "
                f"out= with a smaller lr_data (now {self.rates.data:g}), alpha or lr_alpha"
            )
        made.moving_x = MOMENTUM * made.moving_x + slope_x
        made.moving_alpha = MOMENTUM * made.moving_alpha + slope_alpha
        made.x = made.x - self.rates.data * made.moving_x
        made.alpha = (made.alpha - self.rates.alpha * made.moving_alpha).clamp(min=LEAST_ALPHA)
        made.iterations += 1
        return float(loss.detach())
