"""GroupIntLinear: uniform codes of 2 to 8 bits with a scale, and perhaps a zero, per group of columns.

The one format of every method that rounds to an evenly spaced grid (GLM-130B's, GPTQ, AWQ), so that they
share readers, kernels and tests. An output's weights are cut into groups of `group` neighbouring columns:

    w[o, k] = scale[o, k // group] * (code[o, k] - zero[o, k // group])        0 <= code < 2^bits

Without zeros, zero is 2^(bits - 1): codes of a symmetric grid are stored with that much added. A row of codes
is one string of bits, least significant first: code k takes the bits k * bits ... k * bits + bits - 1. So at
4 bits the low half of a byte comes first, at 8 bits a code is a byte, and 8 codes of 3 bits take 3 bytes.
Rows begin at a byte.

With `permuted`, columns are stored in another order (GPTQ's act-order): stored column j multiplies input
`order[j]`, and groups are of neighbours in the stored order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from axicon.errors import AxiconError
from axicon.kernels import native
from axicon.model.packed import PackedLinear, Setting, slice_of

SCALE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
DTYPE_NAMES = {dtype: name for name, dtype in SCALE_DTYPES.items()}
BITS = range(2, 9)


class GroupIntLinear(PackedLinear):
    """Buffers: `qweight` uint8 (O, ceil(I * bits / 8)), `scale` (O, G), `zero` uint8 (O, G) or None, `order`
    int32 (I,) or None, `bias` (O,) or None. G is the number of groups; a `group` of 0 is one over the row.
    """

    format = "group_int"
    settings = ("bits", "group", "asymmetric", "permuted", "scale_dtype")
    qweight: Tensor
    scale: Tensor
    zero: Tensor | None
    order: Tensor | None

    def __init__(
        self,
        qweight: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        bias: Tensor | None,
        *,
        inputs: int,
        bits: int,
        group: int,
        order: Tensor | None = None,
    ) -> None:
        """Raises ValueError for bits out of 2 .. 8, and for a group that does not divide the inputs."""
        super().__init__()
        self.bits, self.group = bits, max(group, 0)
        self.outputs, self.inputs = len(qweight), inputs
        groups = group_count(inputs, group)
        if bits not in BITS:
            raise ValueError(f"{bits} bits, a code has 2 to 8")
        if qweight.shape[1] != row_bytes(inputs, bits) or scale.shape != (self.outputs, groups):
            raise ValueError(
                f"codes {list(qweight.shape)} and scales {list(scale.shape)} do not fit "
                f"{self.outputs} x {inputs} at {bits} bits in {groups} groups"
            )
        self.asymmetric, self.permuted = zero is not None, order is not None
        self.scale_dtype = DTYPE_NAMES[scale.dtype]
        self.register_buffer("qweight", qweight)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)
        self.register_buffer("order", order)
        self.register_buffer("bias", bias)

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        bits: int,
        group: int,
        order: Tensor | None = None,
    ) -> Self:
        """From codes (O, I) 0 .. 2^bits - 1 in any integer dtype, in the stored order of the columns."""
        added = None if bias is None else bias.detach().clone()
        places = None if order is None else order.to(torch.int32)
        zeros = None if zero is None else zero.to(torch.uint8)
        packed = pack(codes, bits)
        return cls(packed, scale, zeros, added, inputs=codes.shape[1], bits=bits, group=group, order=places)

    @classmethod
    def empty(
        cls, outputs: int, inputs: int, bias: torch.dtype | None, settings: Mapping[str, Setting]
    ) -> Self:
        bits, group, dtype = settings["bits"], settings["group"], settings["scale_dtype"]
        flags = settings["asymmetric"], settings["permuted"]
        if type(bits) is not int or bits not in BITS or type(group) is not int or group < 0:
            raise ValueError("bits is a whole number from 2 to 8, group one from 0 on")
        known = isinstance(dtype, str) and dtype in SCALE_DTYPES
        if not known or not all(isinstance(flag, bool) for flag in flags):
            raise ValueError(
                f"asymmetric and permuted are true or false, scale_dtype one of {', '.join(SCALE_DTYPES)}"
            )
        groups = group_count(inputs, group)
        return cls(
            torch.empty(outputs, row_bytes(inputs, bits), dtype=torch.uint8),
            torch.empty(outputs, groups, dtype=SCALE_DTYPES[str(dtype)]),
            torch.empty(outputs, groups, dtype=torch.uint8) if flags[0] else None,
            None if bias is None else torch.empty(outputs, dtype=bias),
            inputs=inputs, bits=bits, group=group,
            order=torch.empty(inputs, dtype=torch.int32) if flags[1] else None,
        )  # fmt: skip

    def check(self) -> None:
        if self.order is not None and not torch.equal(
            self.order.sort().values.long(), torch.arange(self.inputs, device=self.order.device)
        ):
            raise ValueError("order does not name every input once")

    def codes(self) -> Tensor:
        """uint8 (O, I), in the stored order of the columns."""
        return unpack(self.qweight, self.bits, self.inputs)

    def stored(self) -> Tensor:
        """float32 (O, I): the weight with its columns in the stored order."""
        groups = self.scale.shape[1]
        codes = self.codes().reshape(self.outputs, groups, -1).float()
        codes -= 2.0 ** (self.bits - 1) if self.zero is None else self.zero.float()[..., None]
        codes *= self.scale.float()[..., None]
        return codes.view(self.outputs, self.inputs)

    def unpack(self) -> Tensor:
        weight = self.stored()
        return weight if self.order is None else weight[:, self.order.long().argsort()]

    def forward(self, x: Tensor) -> Tensor:
        if self.order is not None:
            x = x[..., self.order.long()]
        if x.is_cuda:
            product = _product_on_gpu()
            return product(x, self.qweight, self.scale, self.zero, self.bias, self.bits, self.group)
        return F.linear(x, self.stored().to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def why_not_native(self) -> str | None:
        if kernel_group(self.inputs, self.group) is None:
            return f"has groups of {self.group}, they want multiples of 16 columns"
        return None

    def native(self, library: native.Library) -> tuple[native.Linear, list[Tensor]]:
        """Codes of up to 4 bits take half a byte there, wider ones a whole one."""
        size = kernel_group(self.inputs, self.group)
        assert size is not None
        codes, nibbles = self.codes().contiguous(), self.bits <= 4
        packed = torch.empty(self.native_bytes(), dtype=torch.uint8)
        library.axicon_pack_groups(
            codes.data_ptr(), self.outputs, self.inputs, int(nibbles), packed.data_ptr()
        )
        place = codes.numel() // 2 if nibbles else codes.numel()
        for values in (self.scale, self.zero):
            if values is not None:
                share = _by_blocks(values, self.inputs // size).view(torch.uint8).flatten()
                packed[place : place + len(share)] = share
                place += len(share)
        bias = None if self.bias is None else self.bias.float().contiguous()
        order = None if self.order is None else self.order.contiguous()
        descriptor = native.Linear(
            native.GROUP4 if nibbles else native.GROUP8, self.outputs, self.inputs, 0.0, 0.0, None, None,
            None if bias is None else bias.data_ptr(), size,
            2 ** (self.bits - 1) if self.zero is None else 0, native.SCALE_TYPES[self.scale_dtype],
            int(self.asymmetric), None if order is None else order.data_ptr(),
        )  # fmt: skip
        return descriptor, [packed, *(value for value in (bias, order) if value is not None)]

    def native_bytes(self) -> int:
        groups = self.inputs // (kernel_group(self.inputs, self.group) or self.inputs)
        codes = self.outputs * self.inputs // (2 if self.bits <= 4 else 1)
        return codes + self.outputs * groups * (self.scale.itemsize + self.asymmetric)

    def shard(self, rank: int, world: int, dim: Literal["out", "in"]) -> Self:
        """Along `in`, the bias stays with rank 0, since the ranks' results are summed.

        Raises ValueError along `in` for another order of columns, whose groups are spread over all ranks, and
        where a cut would go through a group or a byte.
        """
        if dim == "out":
            rows = slice_of(self.outputs, rank, world)
            zero, bias = (None if value is None else value[rows] for value in (self.zero, self.bias))
            return type(self)(
                self.qweight[rows], self.scale[rows], zero, bias, inputs=self.inputs, bits=self.bits,
                group=self.group, order=self.order,
            )  # fmt: skip
        columns = slice_of(self.inputs, rank, world)
        share = columns.stop - columns.start
        if self.order is not None:
            raise ValueError("columns in another order cannot be cut; use static groups")
        if (self.group and share % self.group) or share * self.bits % 8:
            raise ValueError(f"{share} columns a rank cut through groups of {self.group} or through a byte")
        whole = slice(columns.start * self.bits // 8, columns.stop * self.bits // 8)
        groups = slice(columns.start // self.group, columns.stop // self.group) if self.group else slice(None)
        return type(self)(
            self.qweight[:, whole], self.scale[:, groups],
            None if self.zero is None else self.zero[:, groups], self.bias if rank == 0 else None,
            inputs=share, bits=self.bits, group=self.group,
        )  # fmt: skip


def _product_on_gpu() -> Callable[..., Tensor]:
    """The kernel of `group_int_triton`, imported late: Triton is not on every system."""
    try:
        from axicon.kernels.group_int_triton import group_int_linear
    except ModuleNotFoundError as missing:
        raise AxiconError(
            f"group codes on a GPU need Triton ({missing}): pip install triton, or run the model on the CPU"
        ) from missing
    return group_int_linear


def group_count(inputs: int, group: int) -> int:
    """Groups of a row; 0 or less is the whole of it. Raises ValueError where a group does not divide."""
    if group <= 0:
        return 1
    if inputs % group:
        near = [size for size in (32, 48, 64, 96, 128, 192, 256) if inputs % size == 0]
        take = f"{', '.join(map(str, near))} or -1 (the whole row)" if near else "-1, the whole row"
        raise ValueError(f"a group of {group} does not divide {inputs} inputs; take {take}")
    return inputs // group


WIDEST = 128
"""Columns that share one int8 scale of activations in the C++ products."""


def kernel_group(inputs: int, group: int) -> int | None:
    """Columns of a group there: the largest part of `group` that is no wider than `WIDEST`; None where no
    multiple of 16 divides it.
    """
    whole = group or inputs
    return next((size for size in range(min(whole, WIDEST) & ~15, 0, -16) if whole % size == 0), None)


def _by_blocks(values: Tensor, groups: int) -> Tensor:
    """Scales or zeros (O, G) as the products read them: (O / 16, groups, 16)."""
    values = values.repeat_interleave(groups // values.shape[1], dim=1)
    return values.view(-1, 16, groups).transpose(1, 2).contiguous()


def row_bytes(inputs: int, bits: int) -> int:
    return (inputs * bits + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes (O, I) 0 .. 2^bits - 1 to uint8 (O, ceil(I * bits / 8)). Eight codes are `bits` bytes."""
    if bits == 8:
        return codes.to(torch.uint8).contiguous()
    outputs, inputs = codes.shape
    eights = F.pad(codes, (0, -inputs % 8)).reshape(outputs, -1, 8)
    words = torch.zeros(eights.shape[:2], dtype=torch.int64, device=codes.device)
    for i in range(8):
        words |= eights[..., i].long() << (bits * i)
    # Every machine that torch runs on keeps the low byte first.
    octets = words.view(torch.uint8).view(outputs, -1, 8)[..., :bits]
    return octets.reshape(outputs, -1)[:, : row_bytes(inputs, bits)].contiguous()


def unpack(packed: Tensor, bits: int, inputs: int) -> Tensor:
    """Inverse of `pack`: uint8 (O, I)."""
    if bits == 8:
        return packed
    outputs = len(packed)
    octets = F.pad(packed, (0, -packed.shape[1] % bits)).reshape(outputs, -1, bits)
    words = F.pad(octets, (0, 8 - bits)).view(torch.int64).squeeze(-1)
    codes = torch.empty(*words.shape, 8, dtype=torch.uint8, device=packed.device)
    for i in range(8):
        codes[..., i] = (words >> (bits * i)) & (2**bits - 1)
    return codes.view(outputs, -1)[:, :inputs]
