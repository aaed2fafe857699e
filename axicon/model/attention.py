"""Causal attention without a cache: the dense path of evaluation and compression, the oracle of every other.

Grouped queries as in GQA (arXiv:2305.13245): query head h reads key/value head h // (H / G).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

VARIANTS = ("plain",)
"""Attention functions a block may ask for in `BlockShape.attention`."""


def causal_mask(length: int, window: int | None) -> Tensor:
    """bool (T, T), True where query row i may see key column j: i - window < j <= i."""
    age_TT = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    return (age_TT >= 0) if window is None else (age_TT >= 0) & (age_TT < window)


@lru_cache(maxsize=4)
def _window_mask(length: int, window: int, device: torch.device) -> Tensor:
    return causal_mask(length, window).to(device)


def dense_attention(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, scale: float, window: int | None = None
) -> Tensor:
    """Causal attention of whole sequences, (B, T, H, K). Scores and softmax are float32 inside the kernel."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BTGK, v_BTGK))
    length = q.shape[2]
    mask = _window_mask(length, window, q.device) if window is not None and window < length else None
    o = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return o.transpose(1, 2)


def reference_attention(q_QHK: Tensor, k_SGK: Tensor, v_SGK: Tensor, mask_QS: Tensor, scale: float) -> Tensor:
    """Masked matmul in float32, head by head: slow, obvious, and what every other attention is compared with.

    q (Q, H, K), k and v (S, G, K), mask (Q, S) True where visible. Returns (Q, H, K) in q's dtype.
    """
    group = q_QHK.shape[1] // k_SGK.shape[1]
    out = torch.empty_like(q_QHK)
    for head in range(q_QHK.shape[1]):
        k_SK, v_SK = k_SGK[:, head // group].float(), v_SGK[:, head // group].float()
        scores_QS = (q_QHK[:, head].float() @ k_SK.T) * scale
        out[:, head] = (scores_QS.masked_fill(~mask_QS, -torch.inf).softmax(-1) @ v_SK).to(out.dtype)
    return out


DenseAttention = Callable[[Tensor, Tensor, Tensor, float, int | None], Tensor]
