"""Products with pruned weights on a CUDA device: loaded as sparse, computed as dense.

After Flash-LLM, arXiv:2309.10285. A program reads the bitmap of its tile, counts how many weights are kept
before each place, gathers the values from there into a dense tile in registers, and multiplies on the tensor
cores. The memory that few rows wait for is read as bits and kept values alone. A tile is gathered whatever
its density; none is cut off.

Few rows are a tile of 16 with the inputs split among programs (`partial_sums.py`). Sums are float32, without
atomics. The reference is `TiledSparseLinear.forward` on a CPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from axicon.errors import AxiconError
from axicon.kernels.partial_sums import add_up, splits_for

COLUMNS = 128
"""Inputs of a tile, as stored."""


class Tiles(NamedTuple):
    """What one program computes, and how it is run."""

    rows: int
    outputs: int
    warps: int
    stages: int


DECODE = Tiles(16, 64, 4, 3)  # 16 rows are the least tl.dot takes
LARGE = Tiles(64, 64, 4, 2)


def tiled_sparse_linear(
    x: Tensor, bitmap: Tensor, start: Tensor, values: Tensor, bias: Tensor | None
) -> Tensor:
    """(M, K) to (M, N) in the dtype of x. `bitmap`, `start` and `values` as in `TiledSparseLinear`.

    No gradient: raises AxiconError where one would be asked for.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        raise AxiconError(
            "sparse weights on a GPU have no gradient; run the model under torch.inference_mode()"
        )
    (rows, inputs), outputs = x.shape, bitmap.shape[0]
    y = x.new_empty(rows, outputs)
    if rows == 0:
        return y
    x = x if x.stride(1) == 1 else x.contiguous()
    if values.numel() == 0:
        values = values.new_zeros(1)  # a place to point to
    tiles = DECODE if rows <= DECODE.rows else LARGE
    steps = triton.cdiv(inputs, COLUMNS)
    row_tiles, output_tiles = triton.cdiv(rows, tiles.rows), triton.cdiv(outputs, tiles.outputs)
    splits = splits_for(row_tiles * output_tiles, steps) if rows <= DECODE.rows else 1
    target = y if splits == 1 else torch.empty(splits, rows, outputs, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        product[(row_tiles * output_tiles, splits)](
            x, bitmap, start, values, start if bias is None else bias, target,
            rows, outputs, x.stride(0), bitmap.shape[1],
            INPUTS=inputs, STEPS=steps, EACH=triton.cdiv(steps, splits),
            BIAS=bias is not None and splits == 1, BLOCK_M=tiles.rows, BLOCK_N=tiles.outputs, BLOCK_K=COLUMNS,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
        return y if splits == 1 else add_up(target, bias, y)


@triton.jit
def product(
    x_MK: tl.tensor, bitmap_NB: tl.tensor, start_NT: tl.tensor, values: tl.tensor, bias_N: tl.tensor,
    y_SMN: tl.tensor, rows: tl.tensor, outputs: tl.tensor, x_stride: tl.tensor, row_bytes: tl.tensor,
    INPUTS: tl.constexpr, STEPS: tl.constexpr, EACH: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
) -> None:  # fmt: skip
    output_tiles = tl.cdiv(outputs, BLOCK_N)
    m = (tl.program_id(0) // output_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tl.program_id(0) % output_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in range(0, EACH):
        step = split * EACH + i
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = (n[:, None] < outputs) & (k[None] < INPUTS)
        byte = tl.load(bitmap_NB + n[:, None].to(tl.int64) * row_bytes + k[None] // 8, mask=inside, other=0)
        bit = (byte.to(tl.int32) >> (k[None] % 8)) & 1
        first = tl.load(start_NT + n * STEPS + step, mask=(n < outputs) & (n * 0 + step < STEPS), other=0)
        place = first[:, None] + tl.cumsum(bit, 1) - bit
        weight_NK = tl.load(values + place, mask=bit == 1, other=0.0).to(x_MK.dtype.element_ty)
        x = tl.load(
            x_MK + m[:, None].to(tl.int64) * x_stride + k[None],
            mask=(m[:, None] < rows) & (k[None] < INPUTS),
            other=0.0,
        )
        total = tl.dot(x, tl.trans(weight_NK), total, input_precision="ieee")
    if BIAS:
        total += tl.load(bias_N + n, mask=n < outputs, other=0.0).to(tl.float32)[None]
    place_MN = m[:, None].to(tl.int64) * outputs + n[None] + split.to(tl.int64) * rows * outputs
    tl.store(
        y_SMN + place_MN, total.to(y_SMN.dtype.element_ty), mask=(m[:, None] < rows) & (n[None] < outputs)
    )
