"""What is added up over the inputs of a product while a sample goes through its block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from axicon.errors import AxiconError

STRIP = 1024
"""Columns of a Hessian that are added to at once."""


class Statistic(Protocol):
    """What is added up, which can be kept and gone on with elsewhere."""

    @property
    def name(self) -> str:
        """Of the kind and its settings: equal names of equal inputs are equal bits."""
        ...

    def add(self, x_NI: Tensor) -> None: ...

    def tensors(self) -> dict[str, Tensor]:
        """All of it, before anything is read off."""
        ...

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take these over as what was added up."""
        ...


class Hessian:
    """The mean of x x^T over the rows of a product's inputs, times 2, in float32.

    Only what lies above the diagonal is added up, strip by strip, which takes half the time.
    """

    name = "hessian"

    def __init__(self, inputs: int) -> None:
        self.sum_II = torch.zeros(inputs, inputs)
        self.rows = 0

    def add(self, x_NI: Tensor) -> None:
        x_NI = x_NI.reshape(-1, x_NI.shape[-1]).float()
        for first in range(0, len(self.sum_II), STRIP):
            strip = slice(first, first + STRIP)
            self.sum_II[strip, first:].addmm_(x_NI[:, strip].T, x_NI[:, first:])
        self.rows += len(x_NI)

    def tensors(self) -> dict[str, Tensor]:
        return {"sum": self.sum_II, "rows": torch.tensor(self.rows)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self.sum_II, self.rows = tensors["sum"], int(tensors["rows"])

    def matrix(self, what: str) -> Tensor:
        """The whole of it, which uses up what was added. Raises AxiconError, which begins with `what`, where
        an input was not finite.
        """
        _finite(self.sum_II.diagonal(), what)
        for first in range(STRIP, len(self.sum_II), STRIP):
            strip = slice(first, first + STRIP)
            self.sum_II[strip, :first] = self.sum_II[:first, strip].T
        return self.sum_II.mul_(2 / max(self.rows, 1))


class GroupHessian:
    """The sum of x x^T over the rows of a product's inputs, for each group of neighbouring inputs alone:
    float32 (G, K, K).
    """

    def __init__(self, inputs: int, group: int) -> None:
        """`group` divides the inputs, or is 0 or less for one over all."""
        self.width = group if group > 0 else inputs
        self.sum_GKK = torch.zeros(inputs // self.width, self.width, self.width)

    @property
    def name(self) -> str:
        return f"group_hessian_{self.width}"

    def tensors(self) -> dict[str, Tensor]:
        return {"sum": self.sum_GKK}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self.sum_GKK = tensors["sum"]

    def add(self, x_NI: Tensor) -> None:
        x_GNK = x_NI.reshape(-1, *self.sum_GKK.shape[:2]).transpose(0, 1).float()
        self.sum_GKK.baddbmm_(x_GNK.mT, x_GNK)

    def divide(self, scale_I: Tensor) -> None:
        """What it would be of inputs divided by a scale each."""
        scale_GK = scale_I.view(-1, self.width)
        self.sum_GKK.div_(scale_GK[:, :, None]).div_(scale_GK[:, None])


class Squares:
    """The sum of x^2 of each input of a product, in float32."""

    name = "squares"

    def __init__(self, inputs: int) -> None:
        self.sum_I = torch.zeros(inputs)

    def add(self, x_NI: Tensor) -> None:
        self.sum_I += x_NI.reshape(-1, x_NI.shape[-1]).float().square().sum(0)

    def tensors(self) -> dict[str, Tensor]:
        return {"sum": self.sum_I}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self.sum_I = tensors["sum"]

    def sum(self, what: str) -> Tensor:
        """(I,). Raises AxiconError as `Hessian.matrix`."""
        return _finite(self.sum_I, what)


class Magnitude:
    """Mean and largest |x| of each input of a product, in float32."""

    name = "magnitude"

    def __init__(self, inputs: int) -> None:
        self.sum_I, self.largest_I = torch.zeros(inputs), torch.zeros(inputs)
        self.rows = 0

    def add(self, x_NI: Tensor) -> None:
        x_NI = x_NI.reshape(-1, x_NI.shape[-1]).abs()
        self.sum_I += x_NI.sum(0, dtype=torch.float32)
        self.largest_I = torch.maximum(self.largest_I, x_NI.amax(0).float())
        self.rows += len(x_NI)

    def tensors(self) -> dict[str, Tensor]:
        return {"sum": self.sum_I, "largest": self.largest_I, "rows": torch.tensor(self.rows)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self.sum_I, self.largest_I, self.rows = tensors["sum"], tensors["largest"], int(tensors["rows"])

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
