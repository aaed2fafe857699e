"""Logits of scored tokens alone: no more of them at once than a batch of windows could afford.

A model here is whatever has `states` and `head` as a `Decoder` has them. Nothing behind the last scored token
of a row goes through it, and that token itself does not either.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from axicon.data.batch import UNSCORED, Batch

HEAD_ROWS = 256
"""Rows whose logits are alive at once: 256 x 49,152 in float32 are 50 MB, a batch of windows a gigabyte."""


class Scored(NamedTuple):
    """The S scored tokens of a batch, row by row."""

    states_SD: Tensor
    """Hidden states that predict them."""
    targets_S: Tensor
    rows_S: Tensor
    """Which row of the batch each is in."""


def scored(model: Any, batch: Batch) -> Scored:
    """One pass through the blocks. Raises ValueError for a row in which nothing is scored, or its first token
    is."""
    labels_RT = batch.labels
    is_scored = labels_RT != UNSCORED
    if not bool(is_scored.any(1).all()) or bool(is_scored[:, 0].any()):
        raise ValueError("every row has a scored token, and none is its first")
    places = torch.arange(labels_RT.shape[1], device=labels_RT.device)
    lengths: list[int] = (places * is_scored).amax(1).tolist()
    x_RTD = model.states(batch.input_ids[:, : max(lengths)], lengths)
    rows_S, places_S = is_scored.nonzero(as_tuple=True)
    return Scored(x_RTD[rows_S, places_S - 1], labels_RT[rows_S, places_S], rows_S)


def log_probs(model: Any, found: Scored) -> Tensor:
    """float32 (S,): of each scored token, under the model's law over the whole vocabulary."""

    def piece(x_ND: Tensor, targets_N: Tensor) -> Tensor:
        return -F.cross_entropy(model.head(x_ND).float(), targets_N, reduction="none")

    pieces = list(
        zip(torch.split(found.states_SD, HEAD_ROWS), torch.split(found.targets_S, HEAD_ROWS), strict=True)
    )
    if len(pieces) > 1 and torch.is_grad_enabled():
        # Or every piece's logits would wait for the backward pass.
        return torch.cat([checkpoint(piece, *one, use_reentrant=False) for one in pieces])
    return torch.cat([piece(*one) for one in pieces])


def mean_log_probs(model: Any, found: Scored, rows: int) -> Tensor:
    """float32 (R,): mean over the scored tokens of each row."""
    values_S = log_probs(model, found)
    counts_R = torch.bincount(found.rows_S, minlength=rows)
    return torch.zeros(rows, device=values_S.device).index_add(0, found.rows_S, values_S) / counts_R
