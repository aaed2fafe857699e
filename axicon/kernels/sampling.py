"""The parts of sampling that touch the whole vocabulary: probabilities, the best of them, and the draw.

In torch, a row of 49,152 logits takes some 30 small operations and a selection, which for eight rows is a
third of a step of a small model; in C++ it is one pass that stays in a core's cache. Every function has a
torch reference, which runs where the C++ kernels do not. Either way a row's result depends on that row alone.
"""

from __future__ import annotations

import operator
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from axicon.kernels import native

WIDTHS = (64, 1024)
"""Candidates the torch reference of truncation looks at first and second; a row that needs more is sorted."""

_MASK = (1 << 64) - 1
GOLDEN, _MIX1, _MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def softmax(logits: Sequence[Tensor], temperatures: Sequence[float]) -> tuple[Tensor, list[bool]]:
    """float32 (R, V) softmax(logits / temperature) of rows of logits, float32 (V,) each, and which rows are
    good: the rest hold a NaN or an infinite maximum, and what is returned for them means nothing.
    """
    if not _on_cpu(*logits):
        return softmax_torch(logits, temperatures)
    logits = [row.contiguous() for row in logits]
    rows, vocab = len(logits), len(logits[0])
    pointers_R = torch.tensor([row.data_ptr() for row in logits])
    heat_R = torch.tensor(temperatures, dtype=torch.float32)
    probs_RV, good_R = torch.empty(rows, vocab), torch.empty(rows, dtype=torch.bool)
    native.library().axicon_softmax(
        pointers_R.data_ptr(), heat_R.data_ptr(), rows, vocab, probs_RV.data_ptr(), good_R.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return probs_RV, good_R.tolist()


def softmax_torch(logits: Sequence[Tensor], temperatures: Sequence[float]) -> tuple[Tensor, list[bool]]:
    """The reference of `softmax`. Row by row, as a row fits the cache of a core and a batch does not."""
    probs, good = [], []
    for logits_V, temperature in zip(logits, temperatures, strict=True):
        best = logits_V.amax()
        good.append(bool(best.isfinite()))
        probs.append(logits_V.sub(best).div_(temperature).softmax(-1))
    return torch.stack(probs), good


class Truncation(NamedTuple):
    """What one row keeps. Each setting is a lowest probability that may stay, so entries of equal probability
    stay or go together; top-p counts the mass that top-k left, min-p compares with the best.
    """

    top_k: int
    """0, or no less than the vocabulary: all. Then the mass is 1, whatever rounding made of its sum."""
    top_p: float
    min_p: float


def truncate(probs_RV: Tensor, settings: Sequence[Truncation]) -> None:
    """In place: what a row does not keep becomes 0, and the rest sums to 1 again."""
    if not _on_cpu(probs_RV):
        return truncate_torch(probs_RV, settings)
    settings_R3 = torch.tensor(settings, dtype=torch.float64)
    rows, vocab = probs_RV.shape
    assert probs_RV.is_contiguous()
    native.library().axicon_truncate(
        probs_RV.data_ptr(), rows, vocab, settings_R3.data_ptr(), torch.get_num_threads()
    )


def truncate_torch(probs_RV: Tensor, settings: Sequence[Truncation]) -> None:
    """The reference of `truncate`."""
    for probs_V, one in zip(probs_RV, settings, strict=True):
        if one.top_k >= len(probs_V):
            one = one._replace(top_k=0)
        values_W, least = probs_V, 0.0
        for width in (*(w for w in WIDTHS if w < len(probs_V)), len(probs_V)):
            values_W = probs_V.topk(width).values
            values = values_W.tolist()
            count = _kept(values, one, complete=width == len(probs_V))
            if count is not None:
                least = values[count - 1]
                break
        probs_V.masked_fill_(probs_V < least, 0.0).div_(sum(values[:count]))


def _kept(values: Sequence[float], one: Truncation, complete: bool) -> int | None:
    """How many of these probabilities, best first, stay. None if that depends on those behind them."""
    count, whole = len(values), 1.0
    if one.top_k:
        if one.top_k < count:
            count = _with_ties(values, one.top_k)
        if count == len(values) and not complete and one.top_p < 1.0:
            return None
    if one.top_p < 1.0:
        mass = list(accumulate(values[:count]))
        if one.top_k:
            whole = mass[-1]
        count = min(count, _with_ties(values, bisect_left(mass, one.top_p * whole) + 1))
    if one.min_p > 0.0:
        least = one.min_p * values[0]
        count = min(count, bisect_right(values, -least, key=operator.neg))
    return None if count == len(values) and not complete else count


def _with_ties(values: Sequence[float], count: int) -> int:
    """`count`, and those behind that equal the last of them."""
    while 0 < count < len(values) and values[count] == values[count - 1]:
        count += 1
    return min(count, len(values))


def draw(probs_RC: Tensor, ids_RC: Tensor, keys: Sequence[int]) -> Tensor:
    """int64 (R,): per row the argmin of E / p over its candidates, E the exponential of their ids under the
    row's 64-bit key; the lowest id among equals.
    """
    if not len(keys):
        return torch.empty(0, dtype=torch.int64)
    if not _on_cpu(probs_RC, ids_RC):
        return draw_torch(probs_RC, ids_RC, keys)
    probs_RC = probs_RC.contiguous()
    if ids_RC.stride(1) != 1 or ids_RC.dtype != torch.int64:
        ids_RC = ids_RC.to(torch.int64).contiguous()
    tokens_R, keys_R = torch.empty(len(keys), dtype=torch.int64), torch.tensor([signed(key) for key in keys])
    native.library().axicon_draw(
        probs_RC.data_ptr(), ids_RC.data_ptr(), *probs_RC.shape, ids_RC.stride(0), keys_R.data_ptr(),
        tokens_R.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return tokens_R


def draw_torch(probs_RC: Tensor, ids_RC: Tensor, keys: Sequence[int]) -> Tensor:
    """The reference of `draw`. Row by row: its arithmetic cannot depend on the batch."""
    tokens = []
    for probs_C, ids_C, key in zip(probs_RC, ids_RC, keys, strict=True):
        kept = probs_C.nonzero().flatten()
        probs_C, ids_C = probs_C[kept], ids_C[kept]
        arrivals = exponentials(key, ids_C).div_(probs_C)
        tokens.append(ids_C[arrivals == arrivals.amin()].amin())
    return torch.stack(tokens)


def _on_cpu(*tensors: Tensor) -> bool:
    return native.why_unavailable() is None and all(x.device.type == "cpu" for x in tensors)


def signed(n: int) -> int:
    """The int64 with the same bits."""
    n &= _MASK
    return n - (1 << 64) if n >> 63 else n


def splitmix(n: int) -> int:
    """Output function of SplitMix64 (Steele, Lea and Flood 2014): a bijection of 64-bit integers that mixes
    well.
    """
    n = ((n ^ (n >> 30)) * _MIX1) & _MASK
    n = ((n ^ (n >> 27)) * _MIX2) & _MASK
    return n ^ (n >> 31)


def exponentials(key: int, ids: Tensor) -> Tensor:
    """float32 unit exponentials, one per id: -log(1 - v), v from SplitMix64 at counter `id + 1` of the
    stream.

    v is 52 random bits as a float32, never 0. Where the exponential is small, which is where the least of
    many is found, its relative error is that of a float32.
    """
    z = torch.add(torch.tensor(signed(key + GOLDEN)), ids, alpha=signed(GOLDEN))
    for shift, factor in ((30, _MIX1), (27, _MIX2)):
        # `>>` keeps the sign of an int64, the hash wants zeros to come in.
        z.bitwise_xor_((z >> shift).bitwise_and_((1 << (64 - shift)) - 1)).mul_(signed(factor))
    z.bitwise_xor_((z >> 31).bitwise_and_((1 << 33) - 1))
    v = (z >> 12).bitwise_and_((1 << 52) - 1).float().add_(0.5).mul_(-(2.0**-52))
    return v.log1p_().neg_()
