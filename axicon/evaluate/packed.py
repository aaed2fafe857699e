"""Causal attention over several texts laid end to end, without padding and without a cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class PackedCausal:
    """An `Attend`: the N rows of a pass are texts of the given lengths, one after the other.

    Each text attends causally to itself alone, within the block's sliding window if it has one.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = list(lengths)

    def __call__(self, block: Any, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> Tensor:
        parts = zip(*(torch.split(x, self.lengths) for x in (q_NHK, k_NGK, v_NGK)), strict=True)
        return torch.cat([self._one(block, q, k, v) for q, k, v in parts])

    def _one(self, block: Any, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor) -> Tensor:
        length, heads, _ = q_THK.shape
        window = block.window
        mask_TT = None
        if window is not None and window < length:
            age_TT = torch.arange(length)[:, None] - torch.arange(length)[None, :]
            mask_TT = (age_TT >= 0) & (age_TT < window)
        q, k, v = (x.transpose(0, 1)[None] for x in (q_THK, k_TGK, v_TGK))
        o_1HTK = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask_TT,
            is_causal=mask_TT is None,
            scale=block.scale,
            enable_gqa=heads != k_TGK.shape[1],
        )
        return o_1HTK[0].transpose(0, 1)
