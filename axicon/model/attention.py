"""Causal attention without a cache: the dense path of evaluation and compression, the oracle of every other.

Grouped queries as in GQA (arXiv:2305.13245): query head h reads key/value head h // (H / G). The softmax may
be clipped and heads may have gates (arXiv:2306.12929): see `axicon.model.variant`.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from axicon.model.variant import PLAIN, AttentionVariant

QUERIES = 256
"""Of a clipped softmax that are computed at once: scores of a whole text would be its length squared."""


def causal_mask(length: int, window: int | None) -> Tensor:
    """bool (T, T), True where query row i may see key column j: i - window < j <= i."""
    age_TT = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    return (age_TT >= 0) if window is None else (age_TT >= 0) & (age_TT < window)


@lru_cache(maxsize=4)
def _window_mask(length: int, window: int, device: torch.device) -> Tensor:
    return causal_mask(length, window).to(device)


def dense_attention(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, scale: float, window: int | None = None, before: int = 0,
    variant: AttentionVariant = PLAIN,
) -> Tensor:  # fmt: skip
    """Causal attention of whole sequences, (B, T, H, K). Scores and softmax are float32 inside the kernel.

    The first `before` keys and values belong to no query, and every query sees them.
    """
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BTGK, v_BTGK))
    length = q.shape[2]
    mask = _window_mask(length, window, q.device) if window is not None and window < length else None
    if before:
        own = causal_mask(length, window).to(q.device) if mask is None else mask
        mask = torch.cat([own.new_ones(length, before), own], dim=1)
    o = attend(q, k, v, scale=scale, variant=variant, mask=mask, causal=mask is None)
    return o.transpose(1, 2)


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, variant: AttentionVariant = PLAIN,
    mask: Tensor | None = None, causal: bool = False,
) -> Tensor:  # fmt: skip
    """One attention over q (..., H, T, K), k and v (..., G, S, K): the fused kernel where softmax is plain.

    mask: bool, broadcast to (..., H, T, S), True where visible. causal: of square scores, in its place.
    Gates are not here: they are the block's.
    """
    if not variant.clipped:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=q.shape[-3] != k.shape[-3])
    heads, groups, queries = q.shape[-3], k.shape[-3], q.shape[-2]
    if heads != groups:
        k, v = (x.repeat_interleave(heads // groups, dim=-3) for x in (k, v))
    if causal:
        mask = causal_mask(queries, None).to(q.device)
    wide = torch.promote_types(q.dtype, torch.float32)
    k, v, out = k.to(wide), v.to(wide), []
    for first in range(0, queries, QUERIES):
        part = slice(first, first + QUERIES)
        scores = q[..., part, :].to(wide) @ k.transpose(-1, -2) * scale
        if mask is not None:
            own = mask if mask.shape[-2] == 1 else mask[..., part, :]
            scores = scores.masked_fill(~own, -torch.inf)
        out.append(clip(scores.softmax(-1), variant) @ v)
    return torch.cat(out, dim=-2).to(q.dtype)


def clip(shares: Tensor, variant: AttentionVariant) -> Tensor:
    """Equation 4: probabilities stretched to gamma .. zeta and clipped to 0 .. 1. Rows need not sum to 1, and
    what is clipped has no gradient. What a mask hides stays 0.
    """
    if not variant.clipped:
        return shares
    return ((variant.zeta - variant.gamma) * shares + variant.gamma).clamp(0, 1)


class HeadGate(nn.Module):
    """Equation 5: sigmoid(G(x)) for each head, of the input (N, D) of attention.

    `linear` and `mlp` read a head's own D / H channels. Parameters are no products that compressors round:
    they are small, and a head that is off should be.
    """

    def __init__(self, variant: AttentionVariant, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, variant.gate_scale
        own, hidden = width // heads, variant.gate_hidden
        self.up_weight = self.up_bias = None
        if variant.gate == "mlp":
            self.up_weight = nn.Parameter(_start((heads, hidden, own), own))
            self.up_bias = nn.Parameter(torch.zeros(heads, hidden))
        inputs = {"linear": own, "mlp": hidden, "all_heads": width}[variant.gate]
        self.weight = nn.Parameter(_start((heads, inputs), inputs))
        self.bias = nn.Parameter(torch.zeros(heads))
        self.whole = variant.gate == "all_heads"

    def forward(self, x_ND: Tensor) -> Tensor:
        """(N, H) in the dtype of x."""
        if self.whole:
            return self._open(F.linear(x_ND, self.weight, self.bias))
        x_NHI = x_ND.unflatten(-1, (self.heads, -1))
        if self.up_weight is not None and self.up_bias is not None:
            x_NHI = F.relu((x_NHI[:, :, None] * self.up_weight).sum(-1) + self.up_bias)
        return self._open((x_NHI * self.weight).sum(-1) + self.bias)

    def _open(self, logits_NH: Tensor) -> Tensor:
        return self.scale * torch.sigmoid(logits_NH.float()).to(logits_NH.dtype)

    @torch.no_grad()
    def start(self, probability: float, spread: float | None = None) -> None:
        """Set the bias so that a head is as far open as this at first; `spread` is the standard deviation of
        the weights, None leaves them as they are.
        """
        self.bias.fill_(math.log(probability / (1 - probability)))
        if spread is not None:
            self.weight.normal_(0, spread)

    @torch.no_grad()
    def scale_inputs(self, scale_D: Tensor) -> None:
        """Make good for inputs that are divided by these from now on."""
        into = self.weight if self.up_weight is None else self.up_weight
        by = scale_D.to(into.dtype)
        if not self.whole:
            by = by.view(self.heads, *[1] * (into.dim() - 2), -1)
        into.mul_(by)


def _start(shape: tuple[int, ...], inputs: int) -> Tensor:
    """As `nn.Linear` begins: uniform within 1 / sqrt(inputs)."""
    return torch.empty(shape).uniform_(-1, 1) / math.sqrt(inputs)


def reference_attention(
    q_QHK: Tensor, k_SGK: Tensor, v_SGK: Tensor, mask_QS: Tensor, scale: float,
    variant: AttentionVariant = PLAIN,
) -> Tensor:  # fmt: skip
    """Masked matmul in float32, head by head: slow, obvious, and what every other attention is compared with.

    q (Q, H, K), k and v (S, G, K), mask (Q, S) True where visible. Returns (Q, H, K) in q's dtype.
    """
    group = q_QHK.shape[1] // k_SGK.shape[1]
    out = torch.empty_like(q_QHK)
    for head in range(q_QHK.shape[1]):
        k_SK, v_SK = k_SGK[:, head // group].float(), v_SGK[:, head // group].float()
        scores_QS = (q_QHK[:, head].float() @ k_SK.T) * scale
        shares_QS = clip(scores_QS.masked_fill(~mask_QS, -torch.inf).softmax(-1), variant)
        out[:, head] = (shares_QS @ v_SK).to(out.dtype)
    return out
