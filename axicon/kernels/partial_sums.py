"""Adding up what several programs of a Triton product found for parts of the inputs, in a fixed order.

With few rows a product has too few tiles for all processors of a GPU, so its inputs are split. Programs write
their sums beside each other, and one kernel adds them: no atomics, so the same bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 256
"""About as many as are wanted at once: two for each processor of the large devices."""
MOST = 16
"""Parts of one product."""


def splits_for(tiles: int, steps: int) -> int:
    """Into how many parts the inputs are cut, where a part is at least two of `steps`."""
    return max(1, min(PROGRAMS // tiles, steps // 2, MOST))


def add_up(partial_SMN: Tensor, bias_N: Tensor | None, y_MN: Tensor) -> Tensor:
    """The sum over parts plus bias, rounded to the dtype of y, which is filled and returned."""
    parts, count = partial_SMN.shape[0], y_MN.numel()
    bias = partial_SMN if bias_N is None else bias_N
    with torch.cuda.device_of(y_MN):
        _add_up[(triton.cdiv(count, 1024),)](
            partial_SMN, bias, y_MN, count, y_MN.shape[1],
            PARTS=parts, BIAS=bias_N is not None, BLOCK=1024, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return y_MN


@triton.jit
def _add_up(
    partial_SMN: tl.tensor, bias_N: tl.tensor, y_MN: tl.tensor, count: tl.tensor, outputs: tl.tensor,
    PARTS: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(0, PARTS):
        total += tl.load(partial_SMN + part * count.to(tl.int64) + at, mask=inside, other=0.0)
    if BIAS:
        total += tl.load(bias_N + at % outputs, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_MN + at, total.to(y_MN.dtype.element_ty), mask=inside)
