"""What is added up over the inputs of a product while a sample goes through its block."""

from __future__ import annotations

import torch
from torch import Tensor

from axicon.errors import AxiconError


class Hessian:
    """The mean of x x^T over the rows of a product's inputs, times 2, in float32."""

    def __init__(self, inputs: int) -> None:
        self.sum_II = torch.zeros(inputs, inputs)
        self.rows = 0

    def add(self, x_NI: Tensor) -> None:
        x_NI = x_NI.reshape(-1, x_NI.shape[-1]).float()
        self.sum_II.addmm_(x_NI.T, x_NI)
        self.rows += len(x_NI)

    def matrix(self, what: str) -> Tensor:
        """Raises AxiconError, which begins with `what`, where an input was not finite."""
        _finite(self.sum_II.diagonal(), what)
        return self.sum_II.mul_(2 / max(self.rows, 1))


class GroupHessian:
    """The sum of x x^T over the rows of a product's inputs, for each group of neighbouring inputs alone:
    float32 (G, K, K).
    """

    def __init__(self, inputs: int, group: int) -> None:
        """`group` divides the inputs, or is 0 or less for one over all."""
        self.width = group if group > 0 else inputs
        self.sum_GKK = torch.zeros(inputs // self.width, self.width, self.width)

    def add(self, x_NI: Tensor) -> None:
        x_GNK = x_NI.reshape(-1, *self.sum_GKK.shape[:2]).transpose(0, 1).float()
        self.sum_GKK.baddbmm_(x_GNK.mT, x_GNK)

    def divide(self, scale_I: Tensor) -> None:
        """What it would be of inputs divided by a scale each."""
        scale_GK = scale_I.view(-1, self.width)
        self.sum_GKK.div_(scale_GK[:, :, None]).div_(scale_GK[:, None])


class Magnitude:
    """Mean and largest |x| of each input of a product, in float32."""

    def __init__(self, inputs: int) -> None:
        self.sum_I, self.largest_I = torch.zeros(inputs), torch.zeros(inputs)
        self.rows = 0

    def add(self, x_NI: Tensor) -> None:
        x_NI = x_NI.reshape(-1, x_NI.shape[-1]).abs()
        self.sum_I += x_NI.sum(0, dtype=torch.float32)
        self.largest_I = torch.maximum(self.largest_I, x_NI.amax(0).float())
        self.rows += len(x_NI)

    def mean(self, what: str) -> Tensor:
        """Raises AxiconError, which begins with `what`, where an input was not finite."""
        return _finite(self.sum_I / max(self.rows, 1), what)

    def largest(self, what: str) -> Tensor:
        """The same of the largest. NaN counts as largest."""
        return _finite(self.largest_I, what)


def _finite(values: Tensor, what: str) -> Tensor:
    if not values.isfinite().all():
        raise AxiconError(f"{what}: its inputs hold NaN or infinite values; try dtype=float32")
    return values
