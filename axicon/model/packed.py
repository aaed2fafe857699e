"""PackedLinear: the base of every compressed storage format. Its buffers are the file format.

A format says what its weight means (`unpack`), may multiply faster than by unpacking (`forward`), may be
run by the C++ step (`native`), knows how to be cut for tensor parallelism (`shard`), and can be made without
values for a reader to fill (`empty`). `axicon/model/formats.py` lists the formats.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from axicon.kernels import native

Setting = bool | int | float | str


class PackedLinear(nn.Module, ABC):
    """y = x W^T + b with W stored in some other form than a matrix.

    A buffer named `bias` has the dtype of the model; every other one a dtype that the format prescribes.
    """

    format: ClassVar[str]
    settings: ClassVar[tuple[str, ...]] = ()
    """Names of the attributes that a product depends on beside its buffers. They are kept in config.json."""
    outputs: int
    inputs: int
    bias: Tensor | None

    @classmethod
    @abstractmethod
    def empty(
        cls, outputs: int, inputs: int, bias: torch.dtype | None, settings: Mapping[str, Setting]
    ) -> Self:
        """With buffers that hold no values yet, on torch's default device. `settings` has the names of the
        class's; its values come from a file. Raises ValueError for one that is out of range.
        """

    def check(self) -> None:
        """Called once the buffers hold what a file says. Raises ValueError for values that mean nothing."""

    def release(self) -> None:
        """Forget what was made of the buffers to multiply by: they are about to hold something else."""

    @property
    def runs_as(self) -> str:
        """The format, and what it is turned into to be multiplied where that takes other memory."""
        return self.format

    @abstractmethod
    def unpack(self) -> Tensor:
        """(O, I) float32: what `forward` really multiplies by, up to the rounding of activations."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, I) to (N, O) in the dtype of x."""
        return F.linear(x, self.unpack().to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def __call__(self, x: Tensor) -> Tensor:
        """`forward`, through which gradients pass as through the weight it stands for."""
        if torch.is_grad_enabled() and x.requires_grad:
            y: Tensor = _StraightThrough.apply(x, self)
            return y
        return super().__call__(x)

    def why_not_native(self) -> str | None:
        """Why the C++ step cannot run this product, in words that follow its name; None where it can."""
        return f"is stored as {self.format}, for which they have no product"

    def native(self, library: native.Library) -> tuple[native.Linear, list[Tensor]]:
        """Descriptor for the C++ step, whose `weight` the caller fills in, and the tensors it points into,
        packed weights first. Called where `why_not_native` is None.
        """
        raise ValueError(f"no kernel for {self.format}")

    def native_bytes(self) -> int:
        """Size of the packed weights of `native`."""
        return self.outputs * self.inputs

    @abstractmethod
    def shard(self, rank: int, world: int, dim: Literal["out", "in"]) -> Self:
        """The part of one rank. Raises ValueError where the dimension does not divide."""


class _StraightThrough(torch.autograd.Function):
    """Rounding of activations has no gradient, and kernels have none either; the unpacked weight has."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, product: PackedLinear) -> Tensor:
        ctx.product = product
        return product(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        [grad] = grads
        return grad @ ctx.product.unpack().to(grad.dtype), None


def slice_of(size: int, rank: int, world: int) -> slice:
    """The rank's share of `size` rows or columns. Raises ValueError where it does not divide."""
    if size % world:
        raise ValueError(f"{size} does not divide among {world} ranks")
    share = size // world
    return slice(rank * share, (rank + 1) * share)


def formats(model: nn.Module) -> set[str]:
    """How the products of a model are stored and run: names of dtypes and of packed formats."""
    found = {m.runs_as for m in model.modules() if isinstance(m, PackedLinear)}
    return found | {
        str(m.weight.dtype).removeprefix("torch.") for m in model.modules() if isinstance(m, nn.Linear)
    }
