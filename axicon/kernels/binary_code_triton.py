"""Products with binary codes on a CUDA device: by table lookup for few rows, unpacked to weights for more.

LUT-GEMM, arXiv:2206.09557, section 3, in two ways over one format:

`tabulate` writes, for every 8 inputs, all 256 signed sums of them; `lookup` then reads a byte of signs as
one entry, adds entries up within a group, and brings scales and offset to the sums. Tables are float32 and
lie in memory, of which a processor's cache holds what its program is at. Sums are float32 too; the
released kernel adds in float16 with atomics, so its results differ from run to run.

`product` takes the signs of a tile apart in registers, makes weights of them in the dtype of x, and
multiplies on the tensor cores. It also takes groups that tables of 8 inputs do not fit.

References: `axicon/kernels/binary_code.py` and `BinaryCodeLinear.forward` on a CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from axicon.errors import AxiconError
from axicon.kernels.group_int_triton import Tiles, depth_for, tiles_for
from axicon.kernels.partial_sums import add_up, splits_for

FEW_ROWS = 4
"""Most rows that are looked up."""
LOOKUP_OUTPUTS = 128
"""Outputs of one program of `lookup`."""
CHUNKS_AT_ONCE = 16
"""Tables that one program of `tabulate` makes."""


def binary_code_linear(
    x: Tensor, planes: Tensor, alpha: Tensor, offset: Tensor | None, bias: Tensor | None, group: int
) -> Tensor:
    """(M, K) to (M, N) in the dtype of x; layouts as in `axicon/model/binary_code.py`.

    No gradient: raises AxiconError where one would be asked for.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        raise AxiconError(
            "binary codes on a GPU have no gradient; run the model under torch.inference_mode()")
    if x.shape[0] == 0:
        return x.new_empty(0, planes.shape[2])
    x = x if x.stride(1) == 1 else x.contiguous()
    words, alpha = planes.contiguous().view(torch.int32), alpha.contiguous()
    offset = None if offset is None else offset.contiguous()
    width = group or 32 * len(words)
    if x.shape[0] <= FEW_ROWS and width % 8 == 0:
        return by_lookup(x, words, alpha, offset, bias, width)
    return by_weights(x, words, alpha, offset, bias, width)


def by_lookup(
    x: Tensor, words: Tensor, alpha: Tensor, offset: Tensor | None, bias: Tensor | None, width: int
) -> Tensor:
    """At most FEW_ROWS rows; words int32, and `width` a multiple of 8 inputs."""
    (rows, inputs), (count, bits, outputs) = x.shape, words.shape
    chunks = 4 * count
    at_once = next((w for w in (4, 2, 1) if width % (32 * w) == 0), 1)
    steps = triton.cdiv(count, at_once)
    tiles = triton.cdiv(outputs, LOOKUP_OUTPUTS)
    splits = splits_for(tiles, steps)
    table = torch.empty(rows, chunks, 256, dtype=torch.float32, device=x.device)
    partial = torch.empty(splits, rows, outputs, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        tabulate[(triton.cdiv(chunks, CHUNKS_AT_ONCE), rows)](
            x, table, x.stride(0), chunks, INPUTS=inputs, CHUNKS=CHUNKS_AT_ONCE,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
        lookup[(tiles, splits)](
            table, words, alpha, alpha if offset is None else offset, partial, rows, outputs,
            COUNT=count, BITS=bits, GROUP=width, WITHIN=width % 32 == 0, OFFSET=offset is not None,
            SPLIT_STEPS=triton.cdiv(steps, splits), WORDS=at_once, ROWS=triton.next_power_of_2(rows),
            OUTPUTS=LOOKUP_OUTPUTS, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return add_up(partial, bias, x.new_empty(rows, outputs))


def by_weights(
    x: Tensor, words: Tensor, alpha: Tensor, offset: Tensor | None, bias: Tensor | None, width: int
) -> Tensor:
    """Any rows and any width of groups; words int32."""
    (rows, inputs), (count, bits, outputs) = x.shape, words.shape
    tiles: Tiles = tiles_for(rows)
    depth, within = depth_for(width, tiles.inputs)
    depth, within = (depth, within) if depth >= 32 else (32, False)
    steps = triton.cdiv(inputs, depth)
    row_tiles, output_tiles = triton.cdiv(rows, tiles.rows), triton.cdiv(outputs, tiles.outputs)
    splits = splits_for(row_tiles * output_tiles, steps) if row_tiles == 1 else 1
    y = x.new_empty(rows, outputs)
    target = y if splits == 1 else torch.empty(splits, rows, outputs, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        product[(row_tiles * output_tiles, splits)](
            x, words, alpha, alpha if offset is None else offset, alpha if bias is None else bias, target,
            rows, outputs, x.stride(0),
            INPUTS=inputs, COUNT=count, BITS=bits, GROUP=width, WITHIN=within, OFFSET=offset is not None,
            BIAS=bias is not None and splits == 1, SPLIT_STEPS=triton.cdiv(steps, splits),
            ROWS=tiles.rows, COLUMNS=tiles.outputs, DEPTH=depth,
            num_warps=tiles.warps, num_stages=tiles.stages, enable_fp_fusion=False,
        )  # fmt: skip
    return y if splits == 1 else add_up(target, bias, y)


@triton.jit
def tabulate(
    x_MK: tl.tensor, table_MCV: tl.tensor, x_stride: tl.tensor, chunks: tl.tensor,
    INPUTS: tl.constexpr, CHUNKS: tl.constexpr,
) -> None:  # fmt: skip
    """Entry v of a chunk: the sum of its 8 inputs, input j negative where bit j of v is 0."""
    row = tl.program_id(1).to(tl.int64)
    chunk = tl.program_id(0) * CHUNKS + tl.arange(0, CHUNKS)
    v = tl.arange(0, 256)
    entry = tl.zeros((CHUNKS, 256), tl.float32)
    for j in tl.static_range(8):
        k = chunk * 8 + j
        x = tl.load(x_MK + row * x_stride + k, mask=k < INPUTS, other=0.0).to(tl.float32)
        sign = (((v >> j) & 1) * 2 - 1).to(tl.float32)
        entry += x[:, None] * sign[None, :]
    tl.store(
        table_MCV + (row * chunks + chunk)[:, None] * 256 + v[None, :], entry,
        mask=(chunk < chunks)[:, None] & (v >= 0)[None, :],
    )  # fmt: skip


@triton.jit
def lookup(
    table_MCV: tl.tensor, words_WQN: tl.tensor, alpha_GQN: tl.tensor, offset_GN: tl.tensor,
    partial_SMN: tl.tensor, rows: tl.tensor, outputs: tl.tensor,
    COUNT: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, WITHIN: tl.constexpr,
    OFFSET: tl.constexpr, SPLIT_STEPS: tl.constexpr, WORDS: tl.constexpr, ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
) -> None:  # fmt: skip
    """What one split of the inputs adds to some outputs of all rows. A step is WORDS words of each output."""
    n = tl.program_id(0).to(tl.int64) * OUTPUTS + tl.arange(0, OUTPUTS)
    m = tl.arange(0, ROWS).to(tl.int64)
    n_inside, m_inside = n < outputs, m < rows
    split = tl.program_id(1)
    inside = m_inside[:, None] & n_inside[None, :]
    table_M = table_MCV + m * (4 * COUNT * 256)
    total = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for step in range(0, SPLIT_STEPS):
        first = (split * SPLIT_STEPS + step) * WORDS
        # The interpreter of Triton 3.9 widens a truth value that is spread over a block.
        real = n_inside & (n * 0 + first < COUNT)
        if WITHIN:
            group = first * 32 // GROUP
            for i in tl.static_range(BITS):
                found = tl.zeros((ROWS, OUTPUTS), tl.float32)
                for w in tl.static_range(WORDS):
                    word = tl.load(words_WQN + ((first + w) * BITS + i) * outputs + n, mask=real, other=0)
                    for b in tl.static_range(4):
                        entry = ((first + w) * 4 + b) * 256 + ((word >> (8 * b)) & 255)
                        found += tl.load(
                            table_M[:, None] + entry[None, :], mask=inside & real[None, :], other=0.0)
                alpha = tl.load(alpha_GQN + (group * BITS + i) * outputs + n, mask=real, other=0.0)
                total += found * alpha.to(tl.float32)[None, :]
            if OFFSET:
                # The last entry of a table is the sum of its inputs.
                added = tl.zeros((ROWS,), tl.float32)
                for c in tl.static_range(4 * WORDS):
                    at = table_M + (first * 4 + c) * 256 + 255
                    added += tl.load(at, mask=m_inside & (m * 0 + first < COUNT), other=0.0)
                offset = tl.load(offset_GN + group * outputs + n, mask=real, other=0.0)
                total += added[:, None] * offset.to(tl.float32)[None, :]
        else:
            for b in tl.static_range(4):
                group = (first * 32 + 8 * b) // GROUP
                # The last word may reach beyond the last group.
                whole = real & (n * 0 + group < (COUNT * 32) // GROUP)
                for i in tl.static_range(BITS):
                    word = tl.load(words_WQN + (first * BITS + i) * outputs + n, mask=real, other=0)
                    entry = (first * 4 + b) * 256 + ((word >> (8 * b)) & 255)
                    place = table_M[:, None] + entry[None, :]
                    found = tl.load(place, mask=inside & whole[None, :], other=0.0)
                    alpha = tl.load(alpha_GQN + (group * BITS + i) * outputs + n, mask=whole, other=0.0)
                    total += found * alpha.to(tl.float32)[None, :]
                if OFFSET:
                    at = table_M + (first * 4 + b) * 256 + 255
                    added = tl.load(at, mask=m_inside & (m * 0 + first < COUNT), other=0.0)
                    offset = tl.load(offset_GN + group * outputs + n, mask=whole, other=0.0)
                    total += added[:, None] * offset.to(tl.float32)[None, :]
    tl.store(
        partial_SMN + (split.to(tl.int64) * rows + m)[:, None] * outputs + n[None, :], total, mask=inside)


@triton.jit
def product(
    x_MK: tl.tensor, words_WQN: tl.tensor, alpha_GQN: tl.tensor, offset_GN: tl.tensor, bias_N: tl.tensor,
    y_MN: tl.tensor, rows: tl.tensor, outputs: tl.tensor, x_stride: tl.tensor,
    INPUTS: tl.constexpr, COUNT: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    WITHIN: tl.constexpr, OFFSET: tl.constexpr, BIAS: tl.constexpr, SPLIT_STEPS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
) -> None:  # fmt: skip
    """One tile of y, or what one split of the inputs adds to it: y is then float32 (splits, M, N)."""
    row_tiles = tl.cdiv(rows, ROWS)
    m = (tl.program_id(0) % row_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    n = (tl.program_id(0) // row_tiles).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    m_inside, n_inside = m < rows, n < outputs
    split = tl.program_id(1)
    bit = tl.arange(0, 32)

    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(0, SPLIT_STEPS):
        first = (split * SPLIT_STEPS + step) * DEPTH
        k = first + tl.arange(0, DEPTH)
        x = tl.load(
            x_MK + m[:, None] * x_stride + k[None, :],
            mask=m_inside[:, None] & (k < INPUTS)[None, :], other=0.0,
        )  # fmt: skip
        at = first // 32 + tl.arange(0, DEPTH // 32)
        there = (at < COUNT)[:, None] & n_inside[None, :]
        here = n_inside & (n * 0 + first < INPUTS)
        inside = (k < INPUTS)[:, None] & n_inside[None, :]
        weight = tl.zeros((DEPTH, COLUMNS), tl.float32)
        for i in tl.static_range(BITS):
            word = tl.load(words_WQN + (at[:, None] * BITS + i) * outputs + n[None, :], mask=there, other=0)
            sign = tl.reshape((word[:, None, :] >> bit[None, :, None]) & 1, (DEPTH, COLUMNS))
            if WITHIN:
                alpha = tl.load(alpha_GQN + (first // GROUP * BITS + i) * outputs + n, mask=here, other=0.0)
                alpha = tl.broadcast_to(alpha.to(tl.float32)[None, :], (DEPTH, COLUMNS))
            else:
                place = ((k // GROUP)[:, None] * BITS + i) * outputs + n[None, :]
                alpha = tl.load(alpha_GQN + place, mask=inside, other=0.0).to(tl.float32)
            weight += tl.where(sign == 1, alpha, -alpha)
        if OFFSET:
            if WITHIN:
                offset = tl.load(offset_GN + first // GROUP * outputs + n, mask=here, other=0.0)
                weight += offset.to(tl.float32)[None, :]
            else:
                place = (k // GROUP)[:, None] * outputs + n[None, :]
                weight += tl.load(offset_GN + place, mask=inside, other=0.0).to(tl.float32)
        total = tl.dot(x, weight.to(x.dtype), total, input_precision="ieee")
    if BIAS:
        total += tl.load(bias_N + n, mask=n_inside, other=0.0).to(tl.float32)[None, :]
    tl.store(
        y_MN + split.to(tl.int64) * rows * outputs + m[:, None] * outputs + n[None, :],
        total.to(y_MN.dtype.element_ty), mask=m_inside[:, None] & n_inside[None, :],
    )  # fmt: skip
