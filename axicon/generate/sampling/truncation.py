"""Top-k, top-p (arXiv:1904.09751) and min-p (arXiv:2407.01082), without sorting the vocabulary in the common
case.

Each of the three is a lowest probability that may stay, so tokens of equal probability stay or go together
and the result does not depend on an order among them. Top-p counts the mass that top-k left; min-p compares
with the best.
"""

from __future__ import annotations

import operator
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from axicon.generate.request import SamplingParams
from axicon.kernels.sampling import largest

WIDTHS = (64, 1024)
"""Candidates looked at first and second; only a row that needs more is sorted whole."""


def truncates(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


def truncate(probs_RV: Tensor, params: Sequence[SamplingParams]) -> tuple[Tensor, Tensor]:
    """The kept candidates of each row, best first: renormalised float32 probabilities (R, C), zero behind the
    last one that is kept, and token ids (R, C).
    """
    rows, vocab = probs_RV.shape
    kept: dict[int, tuple[int, float]] = {}
    found: list[tuple[list[int], Tensor, Tensor]] = []
    for width in (*(w for w in WIDTHS if w < vocab), vocab):
        todo = [r for r in range(rows) if r not in kept]
        if not todo:
            break
        values_RW, ids_RW = largest(probs_RV if len(todo) == rows else probs_RV[todo], width)
        found.append((todo, values_RW, ids_RW))
        for r, values in zip(todo, values_RW.tolist(), strict=True):
            count = _kept(values, params[r], complete=width == vocab)
            if count is not None:
                kept[r] = (count, sum(values[:count]))
    most = max(count for count, _ in kept.values())
    probs_RC, ids_RC = torch.zeros(rows, most), torch.zeros(rows, most, dtype=torch.int64)
    for todo, values_RW, ids_RW in found:  # what a later round found again lies over the round before
        width = min(most, values_RW.shape[1])
        probs_RC[todo, :width], ids_RC[todo, :width] = values_RW[:, :width], ids_RW[:, :width]
    count_R1, mass_R1 = torch.tensor([kept[r] for r in range(rows)]).split(1, dim=1)
    return probs_RC.masked_fill_(torch.arange(most) >= count_R1, 0.0).div_(mass_R1), ids_RC


def _kept(values: Sequence[float], params: SamplingParams, complete: bool) -> int | None:
    """How many of these probabilities, best first, stay. None if that depends on those behind them."""
    count, whole = len(values), 1.0
    if params.top_k:
        if params.top_k < count:
            count = _with_ties(values, params.top_k)
        if count == len(values) and not complete and params.top_p < 1.0:
            return None
    if params.top_p < 1.0:
        mass = list(accumulate(values[:count]))
        if params.top_k:
            whole = mass[-1]
        count = min(count, _with_ties(values, bisect_left(mass, params.top_p * whole) + 1))
    if params.min_p > 0.0:
        least = params.min_p * values[0]
        count = min(count, bisect_right(values, -least, key=operator.neg))
    return None if count == len(values) and not complete else count


def _with_ties(values: Sequence[float], count: int) -> int:
    """`count`, and those behind that equal the last of them."""
    while 0 < count < len(values) and values[count] == values[count - 1]:
        count += 1
    return min(count, len(values))
