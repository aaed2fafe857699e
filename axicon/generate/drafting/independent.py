"""Independent siblings: `width` continuations of the last token, each drawn by itself, so some may be equal.

The baselines that drawing without replacement is compared with. Multi-round rejection: SpecInfer, Miao et
al., arXiv:2305.09781. K-SEQ: SpecTr, Sun et al., arXiv:2310.15141. Differs from them: trees branch at the
root alone, and equal siblings stay apart, as their cost is what the comparison is about.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from axicon.protocols import Level


@dataclass(frozen=True, kw_only=True)
class MultiRound:
    width: int = 3
    depth: int = 4
    needs_model: ClassVar[bool] = True
    rule: ClassVar[str] = "multi_round"

    @property
    def nodes(self) -> int:
        return self.width * self.depth

    @property
    def draws(self) -> int:
        return self.width

    def grow(self, log_probs_FC: Tensor, noise_DFC: Tensor | None, above: Level) -> Level:
        rounds = self.width if above.parents[0] < 0 else 1
        if noise_DFC is None:
            noise_DFC = log_probs_FC.new_zeros(rounds, 1, 1)
        best_DF, token_DF = (log_probs_FC + noise_DFC[:rounds]).max(-1)
        parents_F = torch.arange(len(log_probs_FC)).repeat(rounds)
        token_F = token_DF.flatten()
        log_probs_F = above.log_probs[parents_F] + log_probs_FC[parents_F, token_F]
        return Level(parents_F, token_F, log_probs_F, best_DF.flatten())


@dataclass(frozen=True, kw_only=True)
class KSeq(MultiRound):
    rule: ClassVar[str] = "k_seq"
