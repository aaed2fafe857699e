"""Recursive speculative decoding: trees whose siblings are drawn without replacement.

Jeon et al., arXiv:2402.14160. RSD-C branches by fixed numbers; siblings are the first of Gumbel-top-k. RSD-S
keeps the `width` best of each level by stochastic beam search (Kool et al., arXiv:1903.06059), so the tree
is wide where the draft model is unsure. Both are verified by recursive rejection, exact because siblings stay
in descending order of their noise. Differs from the paper: RSD-C's trees branch at the root alone, so
that both methods ask for `width` x `depth` nodes; `branch` takes any other shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from axicon.protocols import Level


@dataclass(frozen=True, kw_only=True)
class RSDC:
    width: int = 3
    depth: int = 4
    needs_model: ClassVar[bool] = True
    rule: ClassVar[str] = "without_replacement"
    draws: ClassVar[int] = 1

    @property
    def nodes(self) -> int:
        return self.width * self.depth

    def grow(self, log_probs_FC: Tensor, noise_DFC: Tensor | None, above: Level) -> Level:
        return branch(log_probs_FC, noise_DFC, above, self.width if above.parents[0] < 0 else 1)


def branch(log_probs_FC: Tensor, noise_DFC: Tensor | None, above: Level, children: int) -> Level:
    """`children` per node by Gumbel-top-k, fewer where fewer can be drawn."""
    noisy_FC = log_probs_FC if noise_DFC is None else log_probs_FC + noise_DFC[0]
    best_FB, token_FB = noisy_FC.topk(min(children, noisy_FC.shape[1]), dim=-1)
    drawn_FB = best_FB > -torch.inf
    parents, tokens = drawn_FB.nonzero()[:, 0], token_FB[drawn_FB]
    return Level(parents, tokens, above.log_probs[parents] + log_probs_FC[parents, tokens], best_FB[drawn_FB])


@dataclass(frozen=True, kw_only=True)
class RSDS:
    width: int = 3
    depth: int = 4
    needs_model: ClassVar[bool] = True
    rule: ClassVar[str] = "without_replacement"
    draws: ClassVar[int] = 1

    @property
    def nodes(self) -> int:
        return self.width * self.depth

    def grow(self, log_probs_FC: Tensor, noise_DFC: Tensor | None, above: Level) -> Level:
        paths_FC = above.log_probs[:, None] + log_probs_FC
        perturbed_FC = paths_FC if noise_DFC is None else paths_FC + noise_DFC[0]
        if noise_DFC is not None and above.parents[0] >= 0:
            perturbed_FC = conditioned(perturbed_FC, above.perturbed)
        best, place = perturbed_FC.flatten().topk(min(self.width, perturbed_FC.numel()))
        place = place[best > -torch.inf]
        parents, tokens = place // log_probs_FC.shape[1], place % log_probs_FC.shape[1]
        return Level(parents, tokens, paths_FC[parents, tokens], perturbed_FC[parents, tokens])


def conditioned(gumbels_FC: Tensor, maximum_F: Tensor) -> Tensor:
    """Gumbel variables of the children, given that their maximum is that of their parent."""
    top_F1 = gumbels_FC.amax(-1, keepdim=True)
    maximum_F1 = maximum_F[:, None]
    # log1p(-exp(0)) is -inf at the maximum itself, where the result is exactly that of the parent.
    v_FC = maximum_F1 - gumbels_FC + torch.log1p(-torch.exp(gumbels_FC - top_F1))
    return maximum_F1 - v_FC.clamp(min=0) - torch.log1p(torch.exp(-v_FC.abs()))
