"""Int8Linear: vector-wise int8 with an outlier path, the storage format of LLM.int8().

Dettmers et al., arXiv:2208.07339, sections 2 and 3. Weights keep one scale per output, activations one per
row; activation entries of magnitude `threshold` or more stay out of the integer product and multiply the
dequantised weight instead.

Differs from the paper in one point: outliers are found per row, not as the union of columns over the batch,
so that a row's result does not depend on its batch mates. With one row the two agree. As in the authors'
code, the outlier columns of the weight are the dequantised int8 ones.

Beside the paper's fixed threshold there is a relative one, in units of a row's root mean square. The fixed
one is made for the outliers of models of 6.7 billion weights and more; the largest entries of a small
model's rows stay below it and still take most of the range of int8.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, Self, cast

import torch
from torch import Tensor, nn

from axicon.errors import AxiconError
from axicon.kernels import int8_matmul, native
from axicon.model.packed import PackedLinear, Setting, slice_of


class Int8Linear(PackedLinear):
    """Buffers: `qweight` int8 (O, I), `absmax` float32 (O,), `bias` (O,) or None."""

    format = "int8"
    settings = ("threshold", "relative")
    qweight: Tensor
    absmax: Tensor

    def __init__(
        self,
        qweight: Tensor,
        absmax: Tensor,
        bias: Tensor | None,
        threshold: float = 6.0,
        relative: float = 0.0,
    ) -> None:
        super().__init__()
        self.outputs, self.inputs = qweight.shape
        self.threshold, self.relative = threshold, relative
        self.register_buffer("qweight", qweight)
        self.register_buffer("absmax", absmax)
        self.register_buffer("bias", bias)
        self._product: int8_matmul.Product | None = None

    @classmethod
    def from_linear(cls, linear: nn.Linear, threshold: float = 6.0, relative: float = 0.0) -> Int8Linear:
        """Symmetric absmax rounding of each output's weights (step 1 of the note's algorithm)."""
        weight = linear.weight.detach()
        codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        absmax = torch.empty(len(weight), device=weight.device)
        # Outputs by the thousand: in float32 a head takes more memory than all else.
        for rows, code, most in zip(*(x.split(1024) for x in (weight, codes, absmax)), strict=True):
            rows = rows.float()
            most.copy_(rows.abs().amax(1))
            code.copy_((rows * torch.where(most > 0, 127.0 / most, 0.0)[:, None]).round())
        bias = None if linear.bias is None else linear.bias.detach().clone()
        return cls(codes, absmax, bias, threshold, relative)

    @classmethod
    def empty(
        cls, outputs: int, inputs: int, bias: torch.dtype | None, settings: Mapping[str, Setting]
    ) -> Self:
        limits = settings["threshold"], settings["relative"]
        if not all(isinstance(value, float | int) and not value < 0 for value in limits):
            raise ValueError("threshold and relative are numbers from 0 on")
        weight, absmax = torch.empty(outputs, inputs, dtype=torch.int8), torch.empty(outputs)
        added = None if bias is None else torch.empty(outputs, dtype=bias)
        return cls(weight, absmax.float(), added, *map(float, limits))

    def release(self) -> None:
        self._product = None

    def unpack(self) -> Tensor:
        return self.qweight.float() * (self.absmax / 127.0)[:, None]

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:
            if self.relative:
                raise AxiconError("llm_int8: relative outliers are found on a CPU only; use relative=0")
            return _product_on_gpu()(x, self.qweight, self.absmax, self.bias, self.threshold)
        x_NI = x.float()
        q_NI, scale_N1, outlier_NI = quantise_rows(x_NI, self.threshold, self.relative)
        if self._product is None:
            self._product = int8_matmul.PRODUCTS[int8_matmul.choose()](self.qweight)
        y_NO = self._product(q_NI) * (self.absmax * (scale_N1 / 16129.0))
        if bool(outlier_NI.any()):
            columns = outlier_NI.any(0).nonzero().flatten()
            kept = torch.where(outlier_NI, x_NI, 0.0)[:, columns]
            y_NO += kept @ (self.qweight[:, columns].float() * (self.absmax / 127.0)[:, None]).T
        if self.bias is not None:
            y_NO += self.bias
        return y_NO.to(x.dtype)

    def why_not_native(self) -> None:
        return None

    def native(self, library: native.Library) -> tuple[native.Linear, list[Tensor]]:
        packed = torch.empty(self.qweight.shape, dtype=torch.uint8)
        weight, scale = self.qweight.contiguous(), self.absmax.contiguous()
        library.axicon_pack_int8(weight.data_ptr(), self.outputs, self.inputs, packed.data_ptr())
        bias = None if self.bias is None else self.bias.float().contiguous()
        descriptor = native.Linear(
            native.INT8, self.outputs, self.inputs, self.threshold, self.relative,
            None, scale.data_ptr(), None if bias is None else bias.data_ptr(),
        )  # fmt: skip
        return descriptor, [packed, scale] if bias is None else [packed, scale, bias]

    def shard(self, rank: int, world: int, dim: Literal["out", "in"]) -> Self:
        """Along `in`, the bias stays with rank 0, since the ranks' results are summed."""
        if dim == "out":
            rows = slice_of(self.outputs, rank, world)
            bias = None if self.bias is None else self.bias[rows]
            return cast(
                Self, Int8Linear(self.qweight[rows], self.absmax[rows], bias, self.threshold, self.relative)
            )
        columns = slice_of(self.inputs, rank, world)
        bias = self.bias if rank == 0 else None
        weight = self.qweight[:, columns]
        return cast(Self, Int8Linear(weight, self.absmax, bias, self.threshold, self.relative))


def quantise_rows(x_NI: Tensor, threshold: float, relative: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """int8 (N, I) with outliers as zeros, the rows' absmax (N, 1) without them, and where they are (N, I).

    An entry is one from `threshold` on, or from `relative` times the row's root mean square; 0 finds none.
    """
    magnitude = x_NI.abs()
    limit = torch.full((len(x_NI), 1), threshold if threshold > 0 else torch.inf)
    if relative > 0:
        rms = x_NI.square().mean(1, keepdim=True).sqrt()
        limit = torch.where(rms > 0, torch.minimum(limit, relative * rms), limit)
    outlier = magnitude >= limit
    scale = magnitude.masked_fill(outlier, 0.0).amax(1, keepdim=True)
    scaled = x_NI * torch.where(scale > 0, 127.0 / scale, 0.0)
    return scaled.masked_fill(outlier, 0.0).round().to(torch.int8), scale, outlier


def _product_on_gpu() -> Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]:
    """The kernels of `int8_triton`, imported late: Triton is not on every system."""
    try:
        from axicon.kernels.int8_triton import int8_linear
    except ModuleNotFoundError as missing:
        raise AxiconError(
            f"int8 weights on a GPU need Triton ({missing}): pip install triton, or run the model on the CPU"
        ) from missing
    return int8_linear
