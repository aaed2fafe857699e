"""TiledSparseLinear: the kept weights alone, with a bit for every place.

After Flash-LLM, arXiv:2309.10285: loaded as sparse, computed as dense. In place of the paper's 32-bit items,
of which half is a position, a bitmap says where the values go: 1 bit a weight, so anything from a tenth of
zeros on saves bytes, and a tile may be as full as it likes.

A weight is cut into tiles of 64 outputs and 128 inputs, in the order of outputs, then inputs. The values of a
tile lie together, output after output; `start[o, t]` is where those of output o in tile t begin.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from axicon.errors import AxiconError
from axicon.kernels import native
from axicon.model.group_int import DTYPE_NAMES, SCALE_DTYPES, pack, row_bytes, unpack
from axicon.model.masks import kept
from axicon.model.packed import PackedLinear, Setting, slice_of

ROWS, COLUMNS = 64, 128
"""Of a tile."""
ROWS_AT_ONCE = 8 * ROWS
"""Outputs whose weights are dense at the same time, in a product on a CPU."""
LINE = 64
"""Bytes of a cache line, which the C++ step reads at once, so it wants one behind the last weight."""
MOST = 2**31 - 1
"""Values of one product: places are 32 bits."""


def stored_bytes(outputs: int, inputs: int, count: int, itemsize: int = 2) -> int:
    """Of a weight with so many kept values, without bias."""
    return count * itemsize + outputs * (row_bytes(inputs, 1) + 4 * tiles_of(inputs))


def tiles_of(inputs: int) -> int:
    return -(-inputs // COLUMNS)


class TiledSparseLinear(PackedLinear):
    """Buffers: `bitmap` uint8 (O, ceil(I / 8)), least significant bit first; `start` int32 (O, tiles);
    `values` (kept,) in a float dtype; `bias` (O,) or None.
    """

    format = "tiled_sparse"
    settings = ("kept", "value_dtype")
    bitmap: Tensor
    start: Tensor
    values: Tensor

    def __init__(
        self, bitmap: Tensor, start: Tensor, values: Tensor, bias: Tensor | None, *, inputs: int
    ) -> None:
        """Raises ValueError for shapes that do not fit each other."""
        super().__init__()
        self.outputs, self.inputs, self.kept = len(bitmap), inputs, len(values)
        self.value_dtype = DTYPE_NAMES[values.dtype]
        expected = (self.outputs, row_bytes(inputs, 1)), (self.outputs, tiles_of(inputs))
        if (bitmap.shape, start.shape) != expected:
            raise ValueError(
                f"a bitmap {list(bitmap.shape)} and starts {list(start.shape)} do not fit "
                f"{self.outputs} x {inputs}"
            )
        if not 0 <= self.kept <= MOST:
            raise ValueError(f"{self.kept} values in one product, at most {MOST}")
        for name, value in (("bitmap", bitmap), ("start", start), ("values", values), ("bias", bias)):
            self.register_buffer(name, value)

    @classmethod
    def from_weight(cls, weight: Tensor, kept_OI: Tensor, bias: Tensor | None = None) -> Self:
        """The kept weights of (O, I), in the weight's own dtype. A kept weight may be 0."""
        outputs, inputs = weight.shape
        if int(kept_OI.sum()) > MOST:
            raise ValueError(f"{int(kept_OI.sum())} values in one product, at most {MOST}")
        tiles, values = _tiles(kept_OI), _tiles(weight.detach())
        counts = tiles.sum(-1).flatten()  # in the order of the values
        start = (counts.cumsum(0) - counts).view(tiles.shape[:3]).transpose(1, 2).flatten(0, 1)
        added = None if bias is None else bias.detach().clone()
        return cls(
            pack(kept_OI.to(torch.uint8), 1),
            start[:outputs].to(torch.int32).contiguous(),
            values[tiles],
            added,
            inputs=inputs,
        )

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Self:
        """By the product's mask; without one, what is not 0 is kept."""
        mask = kept(linear)
        return cls.from_weight(linear.weight, linear.weight != 0 if mask is None else mask, linear.bias)

    @classmethod
    def empty(
        cls, outputs: int, inputs: int, bias: torch.dtype | None, settings: Mapping[str, Setting]
    ) -> Self:
        count, dtype = settings["kept"], settings["value_dtype"]
        if type(count) is not int or not 0 <= count <= outputs * inputs:
            raise ValueError(f"kept is {count!r} of {outputs * inputs} weights")
        if not isinstance(dtype, str) or dtype not in SCALE_DTYPES:
            raise ValueError(f"value_dtype is {dtype!r}, known are {', '.join(SCALE_DTYPES)}")
        return cls(
            torch.empty(outputs, row_bytes(inputs, 1), dtype=torch.uint8),
            torch.empty(outputs, tiles_of(inputs), dtype=torch.int32),
            torch.empty(count, dtype=SCALE_DTYPES[dtype]),
            None if bias is None else torch.empty(outputs, dtype=bias),
            inputs=inputs,
        )

    def check(self) -> None:
        """Every place that a product reads must be there."""
        tiles = _tiles(self.mask())
        counts = tiles.sum(-1)
        if int(counts.sum()) != self.kept:
            raise ValueError(f"its bitmap marks {int(counts.sum())} weights, it has {self.kept} values")
        flat = counts.flatten()
        want = (flat.cumsum(0) - flat).view(counts.shape).transpose(1, 2).flatten(0, 1)[: self.outputs]
        if not torch.equal(want.to(torch.int32), self.start):
            raise ValueError("its values do not begin where its bitmap says")

    def mask(self) -> Tensor:
        """bool (O, I): True where a weight is kept."""
        return unpack(self.bitmap, 1, self.inputs).bool()

    def rows(self, first: int, last: int) -> Tensor:
        """(last - first, I) in the dtype of the values; `first` is a multiple of a tile's outputs."""
        tiles = _tiles(unpack(self.bitmap[first:last], 1, self.inputs).bool())
        begin = int(self.start[first, 0])
        dense = torch.zeros(tiles.shape, dtype=self.values.dtype, device=self.values.device)
        dense.masked_scatter_(tiles, self.values[begin:])
        return dense.transpose(1, 2).flatten(2).flatten(0, 1)[: last - first, : self.inputs]

    def unpack(self) -> Tensor:
        return self.rows(0, self.outputs).float()

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if x.is_cuda:
            return _product_on_gpu()(x, self.bitmap, self.start, self.values, bias)
        pieces = [
            F.linear(x, self.rows(first, min(first + ROWS_AT_ONCE, self.outputs)).to(x.dtype))
            for first in range(0, self.outputs, ROWS_AT_ONCE)
        ]
        y = torch.cat(pieces, -1)
        return y if bias is None else y + bias

    def why_not_native(self) -> str | None:
        if self.values.dtype == torch.bfloat16:
            return None
        return f"has values of {DTYPE_NAMES[self.values.dtype]}, not bfloat16"

    def native(self, library: native.Library) -> tuple[native.Linear, list[Tensor]]:
        """Blocks of 16 outputs, each its masks and behind them its kept weights, as linear.h has them."""
        mask = _blocks(self.mask())
        bits = pack(mask.to(torch.uint8).flatten(0, 1), 1).view(len(mask), -1)  # (blocks, 2 I) bytes
        values = _blocks(self.rows(0, self.outputs))
        start = self._starts()
        packed = torch.zeros(self.native_bytes(), dtype=torch.uint8)
        for place, masks, own, weights in zip(start.tolist(), bits, mask, values, strict=True):
            both = torch.cat((masks, weights[own].view(torch.uint8)))
            packed[place : place + len(both)] = both
        bias = None if self.bias is None else self.bias.float().contiguous()
        descriptor = native.Linear(
            native.SPARSE, self.outputs, self.inputs, 0.0, 0.0, None, None,
            None if bias is None else bias.data_ptr(), start=start.data_ptr(),
        )  # fmt: skip
        return descriptor, [packed, start] if bias is None else [packed, start, bias]

    def native_bytes(self) -> int:
        return int(self._starts(whole=True)[-1]) + LINE

    def _starts(self, *, whole: bool = False) -> Tensor:
        """int64: the byte at which each block of 16 outputs begins there, and with `whole` the end of all."""
        counts = self.mask().sum(1).view(-1, native.LANES).sum(1)
        sizes = -(-2 * (counts + self.inputs) // LINE) * LINE
        ends = F.pad(sizes.cumsum(0), (1, 0))
        return ends if whole else ends[:-1].contiguous()

    def shard(self, rank: int, world: int, dim: Literal["out", "in"]) -> Self:
        weight, mask = self.rows(0, self.outputs), self.mask()
        if dim == "out":
            part = slice_of(self.outputs, rank, world)
            return self.from_weight(weight[part], mask[part], None if self.bias is None else self.bias[part])
        part = slice_of(self.inputs, rank, world)
        bias = self.bias if rank == 0 else None
        return self.from_weight(weight[:, part], mask[:, part], bias)


def _tiles(matrix: Tensor) -> Tensor:
    """(O, I) as (rows of tiles, tiles of a row, 64, 128), with zeros where tiles stand out."""
    outputs, inputs = matrix.shape
    padded = F.pad(matrix, (0, -inputs % COLUMNS, 0, -outputs % ROWS))
    return padded.unflatten(1, (-1, COLUMNS)).unflatten(0, (-1, ROWS)).transpose(1, 2)


def _blocks(matrix: Tensor) -> Tensor:
    """(O, I) as (O / 16, I / 2, 32): of each block of 16 outputs, two inputs of all of them side by side."""
    outputs, inputs = matrix.shape
    return matrix.view(outputs // native.LANES, native.LANES, inputs // 2, 2).transpose(1, 2).flatten(2)


def _product_on_gpu() -> Callable[..., Tensor]:
    """The kernel of `sparse_triton`, imported late: Triton is not on every system."""
    try:
        from axicon.kernels.sparse_triton import tiled_sparse_linear
    except ModuleNotFoundError as missing:
        raise AxiconError(
            f"sparse weights on a GPU need Triton ({missing}): pip install triton, or run it on the CPU"
        ) from missing
    return tiled_sparse_linear
