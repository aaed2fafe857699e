"""Products with group codes on a CUDA device: unpacked in registers, multiplied on the tensor cores.

The weight of `GroupIntLinear` is never written out: a program reads the packed bytes of its tile, takes them
apart, and multiplies. Where tiles lie within groups, the codes less their zero are what is multiplied, whole
numbers that 16 bits hold exactly, and a group's scale comes to its sum in float32: closer to the exact
product than a weight rounded to 16 bits. Elsewhere weights are made in the dtype of x, as torch makes them.

Few rows are a tile of 16 with the inputs split among programs (`partial_sums.py`). Sums are float32, without
atomics. The reference is `GroupIntLinear.forward` on a CPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from axicon.errors import AxiconError
from axicon.kernels.partial_sums import add_up, splits_for


class Tiles(NamedTuple):
    """What one program computes, and how it is run. `inputs` is the most; a group may want fewer."""

    rows: int
    outputs: int
    inputs: int
    warps: int
    stages: int


DECODE = Tiles(16, 64, 128, 4, 4)  # 16 rows are the least tl.dot takes
SMALL = Tiles(64, 64, 64, 4, 3)
LARGE = Tiles(128, 128, 64, 8, 3)


def tiles_for(rows: int) -> Tiles:
    if rows <= DECODE.rows:
        return DECODE
    return SMALL if rows <= 2 * SMALL.rows else LARGE


def depth_for(group: int, most: int) -> tuple[int, bool]:
    """Inputs of a tile, and whether such tiles lie within groups."""
    depth = next((d for d in (128, 64, 32, 16) if d <= most and group % d == 0), None)
    return (min(most, 64), False) if depth is None else (depth, True)


def group_int_linear(
    x: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int, group: int
) -> Tensor:
    """(M, K) to (M, N) in the dtype of x, columns of x in the stored order. `group` of 0: the whole row.

    No gradient: raises AxiconError where one would be asked for.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        raise AxiconError(
            "group codes on a GPU have no gradient; run the model under torch.inference_mode()")
    (rows, inputs), outputs = x.shape, qweight.shape[0]
    y = x.new_empty(rows, outputs)
    if rows == 0:
        return y
    x, qweight = (value if value.stride(1) == 1 else value.contiguous() for value in (x, qweight))
    scale = scale.contiguous()
    zero = scale if zero is None else zero.contiguous()
    tiles = tiles_for(rows)
    width = group or inputs
    depth, within = depth_for(width, tiles.inputs)
    steps = triton.cdiv(inputs, depth)
    row_tiles, output_tiles = triton.cdiv(rows, tiles.rows), triton.cdiv(outputs, tiles.outputs)
    splits = splits_for(row_tiles * output_tiles, steps) if rows <= DECODE.rows else 1
    target = y if splits == 1 else torch.empty(splits, rows, outputs, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        product[(row_tiles * output_tiles, splits)](
            x, qweight, scale, zero, scale if bias is None else bias, target,
            rows, outputs, x.stride(0), qweight.stride(0), scale.shape[1],
            INPUTS=inputs, BITS=bits, GROUP=width, WITHIN=within, ZEROS=zero is not scale,
            BIAS=bias is not None and splits == 1, SPLIT_STEPS=triton.cdiv(steps, splits),
            ROWS=tiles.rows, COLUMNS=tiles.outputs, DEPTH=depth,
            num_warps=tiles.warps, num_stages=tiles.stages, enable_fp_fusion=False,
        )  # fmt: skip
    return y if splits == 1 else add_up(target, bias, y)


@triton.jit
def codes_of(
    qweight: tl.tensor, n: tl.tensor, n_inside: tl.tensor, first: tl.tensor, stride: tl.tensor,
    INPUTS: tl.constexpr, BITS: tl.constexpr, DEPTH: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """int32 (outputs, DEPTH), the codes from input `first` on, which begins a byte."""
    row_bytes: tl.constexpr = (INPUTS * BITS + 7) // 8
    if BITS == 4:
        at = first // 2 + tl.arange(0, DEPTH // 2)
        inside = n_inside[:, None] & (at < row_bytes)[None, :]
        pair = tl.load(qweight + n[:, None] * stride + at[None, :], mask=inside, other=0).to(tl.int32)
        return tl.interleave(pair & 15, pair >> 4)
    bit = (first + tl.arange(0, DEPTH)) * BITS
    at = bit // 8
    place = qweight + n[:, None] * stride + at[None, :]
    code = tl.load(place, mask=n_inside[:, None] & (at < row_bytes)[None, :], other=0).to(tl.int32)
    if 8 % BITS != 0:  # a code may go over the end of its byte
        inside = n_inside[:, None] & (at + 1 < row_bytes)[None, :]
        code |= tl.load(place + 1, mask=inside, other=0).to(tl.int32) << 8
    return (code >> (bit % 8)[None, :]) & ((1 << BITS) - 1)


@triton.jit
def product(
    x_MK: tl.tensor, qweight: tl.tensor, scale_NG: tl.tensor, zero_NG: tl.tensor, bias_N: tl.tensor,
    y_MN: tl.tensor, rows: tl.tensor, outputs: tl.tensor, x_stride: tl.tensor, qweight_stride: tl.tensor,
    groups: tl.tensor,
    INPUTS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, WITHIN: tl.constexpr, ZEROS: tl.constexpr,
    BIAS: tl.constexpr, SPLIT_STEPS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
) -> None:  # fmt: skip
    """One tile of y, or what one split of the inputs adds to it: y is then float32 (splits, M, N)."""
    # Programs that follow each other take the same weights, which so come from memory once.
    row_tiles = tl.cdiv(rows, ROWS)
    m = (tl.program_id(0) % row_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    n = (tl.program_id(0) // row_tiles).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    m_inside, n_inside = m < rows, n < outputs
    split = tl.program_id(1)
    middle: tl.constexpr = 1 << (BITS - 1)

    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(0, SPLIT_STEPS):
        first = (split * SPLIT_STEPS + step) * DEPTH
        k = first + tl.arange(0, DEPTH)
        x = tl.load(
            x_MK + m[:, None] * x_stride + k[None, :],
            mask=m_inside[:, None] & (k < INPUTS)[None, :], other=0.0,
        )  # fmt: skip
        code = codes_of(qweight, n, n_inside, first, qweight_stride, INPUTS, BITS, DEPTH)
        if WITHIN:
            group = first // GROUP
            here = n_inside & (n * 0 + first < INPUTS)
            scale = tl.load(scale_NG + n * groups + group, mask=here, other=0.0).to(tl.float32)
            if ZEROS:
                code -= tl.load(zero_NG + n * groups + group, mask=here, other=0).to(tl.int32)[:, None]
            else:
                code -= middle
            part = tl.dot(x, tl.trans(code.to(x.dtype)), input_precision="ieee")
            total += part * scale[None, :]
        else:
            at = n[:, None] * groups + (k // GROUP)[None, :]
            inside = n_inside[:, None] & (k < INPUTS)[None, :]
            scale = tl.load(scale_NG + at, mask=inside, other=0.0).to(tl.float32)
            if ZEROS:
                code -= tl.load(zero_NG + at, mask=inside, other=0).to(tl.int32)
            else:
                code -= middle
            weight = code.to(tl.float32) * scale
            total = tl.dot(x, tl.trans(weight.to(x.dtype)), total, input_precision="ieee")
    if BIAS:
        total += tl.load(bias_N + n, mask=n_inside, other=0.0).to(tl.float32)[None, :]
    tl.store(
        y_MN + split.to(tl.int64) * rows * outputs + m[:, None] * outputs + n[None, :],
        total.to(y_MN.dtype.element_ty), mask=m_inside[:, None] & n_inside[None, :],
    )  # fmt: skip
