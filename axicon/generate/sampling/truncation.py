"""Top-k, top-p (arXiv:1904.09751) and min-p (arXiv:2407.01082), without sorting the vocabulary in the common
case.

Each of the three is a lowest probability that may stay, so tokens of equal probability stay or go together
and the result does not depend on an order among them. Top-p counts the mass that top-k left; min-p compares
with the best.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from axicon.generate.request import SamplingParams

WIDTHS = (64, 1024)
"""Candidates looked at first and second; only a row that needs more is sorted whole (27 ms for 16 rows of
49,152, measured, against 0.4 and 3 ms).
"""


def truncates(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


def truncate(probs_RV: Tensor, params: Sequence[SamplingParams]) -> list[tuple[Tensor, Tensor]]:
    """Per row the kept candidates: (renormalised float32 probabilities (C,), token ids (C,)), best first.

    How many candidates were looked at depends on the row alone.
    """
    vocab = probs_RV.shape[1]
    kept: dict[int, tuple[Tensor, Tensor]] = {}
    pending = list(range(len(params)))
    for width in (*(w for w in WIDTHS if w < vocab), vocab):
        if not pending:
            break
        rows = probs_RV if len(pending) == len(probs_RV) else probs_RV[pending]
        values_RC, ids_RC = rows.topk(width, dim=-1)
        least_R = _least([params[row] for row in pending], values_RC, vocab)
        lowest = values_RC[:, -1].tolist()
        again = []
        for i, (row, least) in enumerate(zip(pending, least_R, strict=True)):
            if width == vocab or (least is not None and lowest[i] < least):
                stay = values_RC[i] >= (least or 0.0)
                values, ids = values_RC[i][stay], ids_RC[i][stay]
                kept[row] = (values / values.sum(), ids)
            else:
                again.append(row)
        pending = again
    return [kept[row] for row in range(len(params))]


def _least(params: Sequence[SamplingParams], values_RC: Tensor, vocab: int) -> list[float | None]:
    """The lowest probability that may stay, per row; None if these candidates cannot tell."""
    width = values_RC.shape[1]
    mass_RC = values_RC.cumsum(-1, dtype=torch.float64)
    result: list[float | None] = []
    for p, values, mass in zip(params, values_RC, mass_RC, strict=True):
        k = min(p.top_k, vocab)
        if k > width:
            result.append(None)
            continue
        least = float(values[k - 1]) if k else 0.0
        if p.top_p < 1.0:
            if k and width < vocab and float(values[-1]) >= least:
                result.append(None)
                continue
            # Ties of the k-th stay, so their mass counts as well.
            whole = float(mass[int((values >= least).sum()) - 1]) if k else 1.0
            reached = int(torch.searchsorted(mass, p.top_p * whole))
            if reached >= width and width < vocab:
                result.append(None)
                continue
            least = max(least, float(values[min(reached, width - 1)]))
        result.append(max(least, float(values[0]) * p.min_p))
    return result
