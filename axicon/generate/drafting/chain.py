"""A chain: the draft model's next token, and what follows that, `depth` times.

Leviathan et al., arXiv:2211.17192, and Chen et al., arXiv:2302.01318. Verified by rejection, which for one
child per node is what both papers do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from axicon.protocols import Level


@dataclass(frozen=True, kw_only=True)
class Chain:
    width: int = 1
    depth: int = 4
    needs_model: ClassVar[bool] = True
    rule: ClassVar[str] = "without_replacement"
    draws: ClassVar[int] = 1

    @property
    def nodes(self) -> int:
        return self.depth

    def grow(self, log_probs_FC: Tensor, noise_DFC: Tensor | None, above: Level) -> Level:
        noisy_FC = log_probs_FC if noise_DFC is None else log_probs_FC + noise_DFC[0]
        best_F, token_F = noisy_FC.max(-1)
        parents_F = torch.arange(len(token_F))
        log_probs_F = above.log_probs + log_probs_FC[parents_F, token_F]
        return Level(parents_F, token_F, log_probs_F, best_F)
