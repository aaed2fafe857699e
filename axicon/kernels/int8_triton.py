"""The products of LLM.int8() on a CUDA device: the arithmetic of `Int8Linear.forward` in three kernels.

Dettmers et al., arXiv:2208.07339, section 3. `quantise_rows` makes the codes and marks each row's outliers in
a bitmap; `list_columns` turns the bitmaps of a tile of rows into the ascending list of columns in which any
of them has one; `product` multiplies codes on the tensor cores and adds, column by column of that list, what
the outliers contribute. Nothing is read back by the host, so the three can be captured in a graph.

A row's result is the same bits in every batch: its integer sum is exact, a column in which it has no outlier
adds exactly zero, and the others follow in ascending order whoever its neighbours are. Contraction of
multiply and add is therefore switched off, and written as `tl.fma` where it is wanted.

Sizes: M rows, K inputs, N outputs, G = ceil(K / 32) words of a bitmap.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from axicon.errors import AxiconError

WORD = tl.constexpr(32)
UNROLL = tl.constexpr(8)
"""Outlier columns loaded together, so that their latencies overlap."""
ROUND = tl.constexpr(12582912.0)
"""1.5 * 2^23: adding and subtracting it rounds a float32 below 2^22 to the nearest integer, ties to even."""

MAX_INPUTS = (2**31 - 1) // (127 * 127)
"""Most products of 127 x 127 that an int32 holds."""


class Tiles(NamedTuple):
    """What one program of `product` computes, and how it is run."""

    rows: int
    outputs: int
    inputs: int
    warps: int
    stages: int


DECODE = Tiles(16, 32, 256, 4, 4)  # 16 rows are the least tl.dot takes; narrow tiles give all processors work
SMALL = Tiles(64, 64, 128, 4, 4)
LARGE = Tiles(128, 128, 128, 8, 3)


def tiles_for(rows: int) -> Tiles:
    """The choice changes the speed only, never a result."""
    if rows <= DECODE.rows:
        return DECODE
    return SMALL if rows <= 2 * SMALL.rows else LARGE


def int8_linear(x: Tensor, qweight: Tensor, absmax: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    """(M, K) to (M, N) in the dtype of x. No gradient: raises AxiconError where one would be asked for."""
    if torch.is_grad_enabled() and x.requires_grad:
        raise AxiconError(
            "the int8 product on a GPU has no gradient; run the model under torch.inference_mode()"
        )
    (rows, inputs), outputs = x.shape, qweight.shape[0]
    if inputs > MAX_INPUTS:
        raise AxiconError(f"int8 product of {inputs} inputs may overflow above {MAX_INPUTS}: keep it dense")
    y = x.new_empty(rows, outputs)
    if rows == 0:
        return y
    x, qweight, threshold = _rows_contiguous(x), _rows_contiguous(qweight), float(threshold)
    tiles, words, outliers = tiles_for(rows), triton.cdiv(inputs, 32), threshold > 0
    row_tiles = triton.cdiv(rows, tiles.rows)
    codes = torch.empty(rows, inputs, dtype=torch.int8, device=x.device)
    step = torch.empty(rows, dtype=torch.float32, device=x.device)
    bitmap, columns, counts = (
        torch.empty(shape if outliers else (1,), dtype=torch.int32, device=x.device)
        for shape in ((rows, words), (row_tiles, inputs + UNROLL.value), (row_tiles,))
    )
    with torch.cuda.device_of(x):
        quantise_rows[(rows,)](
            x, codes, step, bitmap, x.stride(0), threshold,
            INPUTS=inputs, OUTLIERS=outliers, WORDS=min(triton.next_power_of_2(words), 128),
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
        if outliers:
            padded = triton.next_power_of_2(words)
            list_columns[(row_tiles,)](
                bitmap, columns, counts, rows,
                INPUTS=inputs, TILE_ROWS=tiles.rows, WORDS=padded,
                ROWS=max(1, min(tiles.rows, 8192 // padded)), num_warps=8, enable_fp_fusion=False,
            )  # fmt: skip
        product[(row_tiles * triton.cdiv(outputs, tiles.outputs),)](
            x, codes, step, qweight, absmax, absmax if bias is None else bias, columns, counts, y,
            rows, outputs, x.stride(0), qweight.stride(0), threshold,
            INPUTS=inputs, OUTLIERS=outliers, BIAS=bias is not None,
            ROWS=tiles.rows, COLUMNS=tiles.outputs, DEPTH=tiles.inputs,
            num_warps=tiles.warps, num_stages=tiles.stages, enable_fp_fusion=False,
        )  # fmt: skip
    return y


def _rows_contiguous(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


@triton.jit
def quantise_rows(
    x_MK: tl.tensor, codes_MK: tl.tensor, step_M: tl.tensor, bitmap_MG: tl.tensor,
    x_stride: tl.tensor, threshold: tl.tensor,
    INPUTS: tl.constexpr, OUTLIERS: tl.constexpr, WORDS: tl.constexpr,
) -> None:  # fmt: skip
    """One row: codes with outliers as zeros, the largest other magnitude / 127^2, where the outliers are."""
    words: tl.constexpr = (INPUTS + WORD - 1) // WORD
    row = tl.program_id(0).to(tl.int64)
    bit = tl.arange(0, WORD)[None, :]
    peak = tl.zeros((WORDS, WORD), tl.float32)
    broken = tl.zeros((WORDS, WORD), tl.int32)
    for first in range(0, words, WORDS):
        word = first + tl.arange(0, WORDS)
        column = word[:, None] * WORD + bit
        x = tl.load(x_MK + row * x_stride + column, mask=column < INPUTS, other=0.0).to(tl.float32)
        broken |= (x != x).to(tl.int32)
        magnitude = tl.abs(x)
        if OUTLIERS:
            outlier = magnitude >= threshold
            tl.store(
                bitmap_MG + row * words + word, tl.sum(outlier.to(tl.int32) << bit, 1), mask=word < words
            )
            magnitude = tl.where(outlier, 0.0, magnitude)
        peak = tl.maximum(peak, magnitude)
    scale = tl.max(tl.max(peak, 1), 0)
    # In two roundings, as torch divides a number by a tensor: codes at a tie are then those of the reference.
    inverse = tl.where(scale > 0, tl.div_rn(1.0, tl.where(scale > 0, scale, 1.0)) * 127.0, 0.0)
    # The maximum passes over a NaN; the row's result must not.
    scale = tl.where(tl.max(tl.max(broken, 1), 0) > 0, float("nan"), scale)
    tl.store(step_M + row, tl.div_rn(scale, 16129.0))
    for first in range(0, words, WORDS):
        column = (first + tl.arange(0, WORDS))[:, None] * WORD + bit
        x = tl.load(x_MK + row * x_stride + column, mask=column < INPUTS, other=0.0).to(tl.float32)
        if OUTLIERS:
            x = tl.where(tl.abs(x) >= threshold, 0.0, x)
        code = tl.minimum(tl.maximum(x * inverse, -127.0), 127.0)
        code = ((code + ROUND) - ROUND).to(tl.int8)
        tl.store(codes_MK + row * INPUTS + column, code, mask=column < INPUTS)


@triton.jit
def either(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    return a | b


@triton.jit
def list_columns(
    bitmap_MG: tl.tensor, columns_TL: tl.tensor, counts_T: tl.tensor, rows: tl.tensor,
    INPUTS: tl.constexpr, TILE_ROWS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
) -> None:  # fmt: skip
    """The union of one tile's bitmaps as ascending column numbers, padded with K, and their count."""
    words: tl.constexpr = (INPUTS + WORD - 1) // WORD
    tile = tl.program_id(0).to(tl.int64)
    word = tl.arange(0, WORDS)
    union = tl.zeros((WORDS,), tl.int32)
    for first in range(0, TILE_ROWS, ROWS):
        row = tile * TILE_ROWS + first + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (word < words)[None, :]
        bits = tl.load(bitmap_MG + row[:, None] * words + word[None, :], mask=inside, other=0)
        union |= tl.reduce(bits, 0, either)
    bit = tl.arange(0, WORD)[None, :]
    present = (union[:, None] >> bit) & 1
    of_word = tl.sum(present, 1)
    place = (tl.cumsum(of_word, 0) - of_word)[:, None] + tl.cumsum(present, 1) - 1
    count = tl.sum(of_word, 0)
    columns = columns_TL + tile * (INPUTS + UNROLL)
    tl.store(columns + place, word[:, None] * WORD + bit, mask=present == 1)
    tl.store(columns + count + tl.arange(0, UNROLL), tl.full((UNROLL,), INPUTS, tl.int32))
    tl.store(counts_T + tile, count)


@triton.jit
def product(
    x_MK: tl.tensor, codes_MK: tl.tensor, step_M: tl.tensor, qweight_NK: tl.tensor,
    absmax_N: tl.tensor, bias_N: tl.tensor, columns_TL: tl.tensor, counts_T: tl.tensor, y_MN: tl.tensor,
    rows: tl.tensor, outputs: tl.tensor, x_stride: tl.tensor, qweight_stride: tl.tensor, threshold: tl.tensor,
    INPUTS: tl.constexpr, OUTLIERS: tl.constexpr, BIAS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
) -> None:  # fmt: skip
    """One tile of y."""
    # Programs that follow each other take the same weights, which so come from memory once.
    row_tiles = tl.cdiv(rows, ROWS)
    tile = (tl.program_id(0) % row_tiles).to(tl.int64)
    m = tile * ROWS + tl.arange(0, ROWS)
    n = (tl.program_id(0) // row_tiles).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    m_inside, n_inside = m < rows, n < outputs

    total = tl.zeros((ROWS, COLUMNS), tl.int32)
    for first in range(0, INPUTS, DEPTH):
        k = first + tl.arange(0, DEPTH)
        q = tl.load(
            codes_MK + m[:, None] * INPUTS + k[None, :],
            mask=m_inside[:, None] & (k < INPUTS)[None, :], other=0,
        )  # fmt: skip
        w = tl.load(
            qweight_NK + n[None, :] * qweight_stride + k[:, None],
            mask=n_inside[None, :] & (k < INPUTS)[:, None], other=0,
        )  # fmt: skip
        total = tl.dot(q, w, total, out_dtype=tl.int32)

    step = tl.load(step_M + m, mask=m_inside, other=0.0)
    absmax = tl.load(absmax_N + n, mask=n_inside, other=0.0)
    y = total.to(tl.float32) * (step[:, None] * absmax[None, :])
    if OUTLIERS:
        kept = tl.zeros((ROWS, COLUMNS), tl.float32)
        count = tl.load(counts_T + tile)
        first = 0
        while first < count:  # a bound read from memory: `range` takes none in the interpreter of Triton 3.6
            for j in tl.static_range(UNROLL):
                k = tl.load(columns_TL + tile * (INPUTS + UNROLL) + first + j)
                # `m * 0`: the interpreter of Triton 3.9 widens a truth value that is spread over a block.
                real = m_inside & (m * 0 + k < INPUTS)
                x = tl.load(x_MK + m * x_stride + k, mask=real, other=0.0).to(tl.float32)
                x = tl.where(tl.abs(x) >= threshold, x, 0.0)
                k = tl.minimum(k, INPUTS - 1)
                w = tl.load(qweight_NK + n * qweight_stride + k, mask=n_inside, other=0).to(tl.float32)
                kept = tl.fma(
                    tl.broadcast_to(x[:, None], (ROWS, COLUMNS)),
                    tl.broadcast_to(w[None, :], (ROWS, COLUMNS)), kept,
                )  # fmt: skip
            first += UNROLL
        y += kept * tl.div_rn(absmax, 127.0)[None, :]
    if BIAS:
        y += tl.load(bias_N + n, mask=n_inside, other=0.0).to(tl.float32)[None, :]
    tl.store(
        y_MN + m[:, None] * outputs + n[None, :], y.to(y_MN.dtype.element_ty),
        mask=m_inside[:, None] & n_inside[None, :],
    )  # fmt: skip
