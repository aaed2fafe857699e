"""BinaryCodeLinear: weights as a few planes of signs with a scale each, and an offset, per group of columns.

The storage format of LUT-GEMM, arXiv:2206.09557, section 2 and 3.2. An output's weights are cut into groups
of `group` neighbouring columns, and of the `bits` planes each is -1 or +1:

    w[o, k] = offset[o, k // group] + sum_i alpha[o, k // group, i] * sign[o, k, i]

Uniform codes are the case alpha_i = scale * 2^(i - 1), offset = scale * ((2^bits - 1) / 2 - zero), exactly
(`from_uniform`, `as_uniform`); what fits no evenly spaced grid has scales of its own. A weight's signs as one
number, plane i as bit i, are its code, so a uniform code is its own.

A word of a plane holds the signs of 32 neighbouring inputs of one output, the first as the lowest bit, 1 for
+1. Outputs are the fastest index, so that neighbouring threads of a GPU read neighbouring words.

How it multiplies: on a GPU from the planes (`axicon/kernels/binary_code_triton.py`); on a CPU uniform codes
as `GroupIntLinear`, others from a dense copy, which takes the memory of dense weights: there such a model is
small on disk only. `runs_as`, and so `/health`, says which.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from axicon.errors import AxiconError
from axicon.kernels import native
from axicon.model.group_int import DTYPE_NAMES, SCALE_DTYPES, GroupIntLinear, group_count
from axicon.model.packed import PackedLinear, Setting, slice_of

BITS = range(1, 9)
WORD = 32


class BinaryCodeLinear(PackedLinear):
    """Buffers: `planes` uint32 (ceil(I / 32), bits, O), `alpha` (G, bits, O), `offset` (G, O) or None, `bias`
    (O,) or None. G is the number of groups; a `group` of 0 is one over the row.
    """

    format = "binary_code"
    settings = ("bits", "group", "shifted", "scale_dtype", "offset_dtype")
    planes: Tensor
    alpha: Tensor
    offset: Tensor | None

    def __init__(
        self, planes: Tensor, alpha: Tensor, offset: Tensor | None, bias: Tensor | None, *, inputs: int,
        group: int,
    ) -> None:
        """Raises ValueError for bits out of 1 .. 8, and for a group that does not divide the inputs."""
        super().__init__()
        words, self.bits, self.outputs = planes.shape
        self.inputs, self.group = inputs, max(group, 0)
        groups = group_count(inputs, group)
        if self.bits not in BITS:
            raise ValueError(f"{self.bits} planes, there are 1 to 8")
        if words != word_count(inputs) or alpha.shape != (groups, self.bits, self.outputs):
            raise ValueError(f"planes {list(planes.shape)} and scales {list(alpha.shape)} do not fit "
                             f"{self.outputs} x {inputs} in {groups} groups")
        self.shifted = offset is not None
        self.scale_dtype = DTYPE_NAMES[alpha.dtype]
        self.offset_dtype = self.scale_dtype if offset is None else DTYPE_NAMES[offset.dtype]
        self.register_buffer("planes", planes)
        self.register_buffer("alpha", alpha)
        self.register_buffer("offset", offset)
        self.register_buffer("bias", bias)
        self._dense: Tensor | None = None
        self._uniform: tuple[GroupIntLinear | None] | None = None
        """What a CPU multiplies by, once that is known. In a tuple, or it would count as a part of this."""

    @classmethod
    def from_codes(
        cls, codes: Tensor, alpha: Tensor, offset: Tensor | None = None, bias: Tensor | None = None, *,
        group: int,
    ) -> Self:
        """From codes (O, I) 0 .. 2^bits - 1 in any integer dtype, alpha (O, G, bits) and offset (O, G)."""
        planes = pack(codes, alpha.shape[2])
        added = None if bias is None else bias.detach().clone()
        return cls(
            planes, alpha.permute(1, 2, 0).contiguous(), None if offset is None else offset.T.contiguous(),
            added, inputs=codes.shape[1], group=group,
        )  # fmt: skip

    @classmethod
    def from_uniform(cls, packed: GroupIntLinear) -> Self:
        """The same weights, bit for bit as `unpack` makes them unless scales are float32: an offset then is
        rounded to float32. Raises ValueError for columns in another order.
        """
        if packed.order is not None:
            raise ValueError("columns in another order have no binary codes; use static groups")
        scale = packed.scale.double()[..., None]
        alpha = scale * 2.0 ** (torch.arange(packed.bits, device=scale.device) - 1)
        zero = 2.0 ** (packed.bits - 1) if packed.zero is None else packed.zero.double()
        offset = scale[..., 0] * ((2**packed.bits - 1) / 2 - zero)
        kept = alpha.to(packed.scale.dtype)
        if not torch.equal(kept.double(), alpha):  # half of the smallest scales is none
            kept = alpha.float()
        return cls.from_codes(packed.codes(), kept, offset.float(), packed.bias, group=packed.group)

    def as_uniform(self) -> GroupIntLinear | None:
        """The inverse of `from_uniform`; None where the codes are not uniform, and for one bit."""
        alpha = self.alpha.double().permute(2, 0, 1)  # (O, G, bits)
        steps = 2.0 ** torch.arange(self.bits, device=alpha.device)
        if self.bits == 1 or not torch.equal(alpha, alpha[..., :1] * steps):
            return None
        scale = 2 * alpha[..., 0]
        offset = torch.zeros_like(scale) if self.offset is None else self.offset.double().T
        middle = (2**self.bits - 1) / 2
        zero = (middle - offset / torch.where(scale > 0, scale, 1.0)).round()
        zero = torch.where(scale > 0, zero, 2.0 ** (self.bits - 1))
        again = (scale * (middle - zero)).to(torch.float32 if self.offset is None else self.offset.dtype)
        if not torch.equal(again.double(), offset) or not ((zero >= 0) & (zero < 2**self.bits)).all():
            return None
        stored = scale.to(self.alpha.dtype)
        if not torch.equal(stored.double(), scale):
            return None
        symmetric = bool((zero == 2 ** (self.bits - 1)).all())
        return GroupIntLinear.from_codes(
            self.codes(), stored.contiguous(), None if symmetric else zero, self.bias, bits=self.bits,
            group=self.group,
        )  # fmt: skip

    def is_uniform(self) -> bool:
        return self.as_uniform() is not None

    @classmethod
    def empty(
        cls, outputs: int, inputs: int, bias: torch.dtype | None, settings: Mapping[str, Setting]
    ) -> Self:
        bits, group, shifted = settings["bits"], settings["group"], settings["shifted"]
        dtypes = settings["scale_dtype"], settings["offset_dtype"]
        if type(bits) is not int or bits not in BITS or type(group) is not int or group < 0:
            raise ValueError("bits is a whole number from 1 to 8, group one from 0 on")
        if not isinstance(shifted, bool) or not all(isinstance(d, str) and d in SCALE_DTYPES for d in dtypes):
            raise ValueError(f"shifted is true or false, scale_dtype and offset_dtype one of "
                             f"{', '.join(SCALE_DTYPES)}")
        groups = group_count(inputs, group)
        alpha_dtype, offset_dtype = (SCALE_DTYPES[str(dtype)] for dtype in dtypes)
        return cls(
            torch.empty(word_count(inputs), bits, outputs, dtype=torch.uint32),
            torch.empty(groups, bits, outputs, dtype=alpha_dtype),
            torch.empty(groups, outputs, dtype=offset_dtype) if shifted else None,
            None if bias is None else torch.empty(outputs, dtype=bias), inputs=inputs, group=group,
        )  # fmt: skip

    def codes(self) -> Tensor:
        """uint8 (O, I)."""
        return unpack(self.planes, self.inputs)

    def unpack(self) -> Tensor:
        groups = len(self.alpha)
        codes = self.codes().view(self.outputs, groups, -1)
        weight = torch.zeros(codes.shape, device=codes.device)
        if self.offset is not None:
            weight += self.offset.float().T[..., None]
        for i in range(self.bits):
            alpha = self.alpha[:, i].float().T[..., None]  # (O, G, 1)
            weight += torch.where((codes >> i) & 1 == 1, alpha, -alpha)
        return weight.view(self.outputs, self.inputs)

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:
            return _product_on_gpu()(x, self.planes, self.alpha, self.offset, self.bias, self.group)
        uniform = self._on_cpu()
        if uniform is not None:
            return uniform(x)
        if self._dense is None or self._dense.dtype != x.dtype:
            self._dense = self.unpack().to(x.dtype)
        return F.linear(x, self._dense, None if self.bias is None else self.bias.to(x.dtype))

    def _on_cpu(self) -> GroupIntLinear | None:
        if self._uniform is None:
            self._uniform = (self.as_uniform(),)
        return self._uniform[0]

    @property
    def runs_as(self) -> str:
        if self.planes.is_cuda:
            return self.format
        return f"{self.format} as {'dense' if self._on_cpu() is None else GroupIntLinear.format}"

    def why_not_native(self) -> str | None:
        uniform = self._on_cpu()
        return None if uniform is None else uniform.why_not_native()

    def native(self, library: native.Library) -> tuple[native.Linear, list[Tensor]]:
        """As the uniform codes they are, or as a dense bfloat16 weight."""
        uniform = self._on_cpu()
        if uniform is not None:
            return uniform.native(library)
        weight = self.unpack().bfloat16()
        packed = torch.empty_like(weight)
        library.axicon_pack_bf16(weight.data_ptr(), self.outputs, self.inputs, packed.data_ptr())
        bias = None if self.bias is None else self.bias.float().contiguous()
        descriptor = native.Linear(
            native.BF16, self.outputs, self.inputs, 0.0, 0.0, None, None,
            None if bias is None else bias.data_ptr(),
        )  # fmt: skip
        return descriptor, [packed] if bias is None else [packed, bias]

    def native_bytes(self) -> int:
        uniform = self._on_cpu()
        return 2 * self.outputs * self.inputs if uniform is None else uniform.native_bytes()

    def shard(self, rank: int, world: int, dim: Literal["out", "in"]) -> Self:
        """Along `in`, the bias stays with rank 0, since the ranks' results are summed.

        Raises ValueError along `in` where a cut would go through a group or a word.
        """
        if dim == "out":
            rows = slice_of(self.outputs, rank, world)
            offset = None if self.offset is None else self.offset[:, rows]
            bias = None if self.bias is None else self.bias[rows]
            return type(self)(
                self.planes[..., rows], self.alpha[..., rows], offset, bias, inputs=self.inputs,
                group=self.group,
            )  # fmt: skip
        columns = slice_of(self.inputs, rank, world)
        share = columns.stop - columns.start
        if share % WORD or (self.group and share % self.group):
            raise ValueError(f"{share} columns a rank cut through groups of {self.group} or words of {WORD}")
        words = slice(columns.start // WORD, columns.stop // WORD)
        groups = slice(columns.start // self.group, columns.stop // self.group) if self.group else slice(None)
        return type(self)(
            self.planes[words], self.alpha[groups], None if self.offset is None else self.offset[groups],
            self.bias if rank == 0 else None, inputs=share, group=self.group,
        )  # fmt: skip


def _product_on_gpu() -> Callable[..., Tensor]:
    """The kernels of `binary_code_triton`, imported late: Triton is not on every system."""
    try:
        from axicon.kernels.binary_code_triton import binary_code_linear
    except ModuleNotFoundError as missing:
        raise AxiconError(
            f"binary codes on a GPU need Triton ({missing}): pip install triton, or run the model on the CPU"
        ) from missing
    return binary_code_linear


def word_count(inputs: int) -> int:
    return (inputs + WORD - 1) // WORD


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes (O, I) 0 .. 2^bits - 1 to uint32 (ceil(I / 32), bits, O). Signs beyond the inputs are 0."""
    outputs, inputs = codes.shape
    padded = F.pad(codes.to(torch.uint8), (0, -inputs % WORD)).view(outputs, -1, 4, 8)
    place = torch.arange(8, dtype=torch.uint8, device=codes.device)
    planes = []
    for i in range(bits):
        octets = (((padded >> i) & 1) << place).sum(-1, dtype=torch.uint8)
        # Every machine that torch runs on keeps the low byte first.
        planes.append(octets.view(torch.uint32).squeeze(-1).T)
    return torch.stack(planes, 1).contiguous()


def unpack(planes: Tensor, inputs: int) -> Tensor:
    """Inverse of `pack`: uint8 (O, I)."""
    words, bits, outputs = planes.shape
    place = torch.arange(8, dtype=torch.uint8, device=planes.device)
    codes = torch.zeros(outputs, words * 4, 8, dtype=torch.uint8, device=planes.device)
    for i in range(bits):
        octets = planes[:, i].T.reshape(-1).view(torch.uint8).view(outputs, -1)  # (O, 4 W)
        codes |= ((octets[..., None] >> place) & 1) << i
    return codes.view(outputs, -1)[:, :inputs]
