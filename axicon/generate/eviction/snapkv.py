"""SnapKV: at the end of the prompt, keep what its last tokens look at, with the neighbours.

Li et al., arXiv:2404.14469, section 4: the attention of the last 32 queries is summed per key head, smoothed
over 5 neighbours, and the best slots stay beside those 32. Answers are not evicted from, so a request holds
its budget and its answer. Differs from the paper: one copy of the keys per key head, not per query head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from axicon.model.cache import LayerCache
from axicon.protocols import LastRows, Needs

OBSERVED = 32
"""Queries at the end of the prompt, the observation window."""
NEIGHBOURS = 5


@dataclass(frozen=True, kw_only=True)
class SnapKV:
    budget: int
    """Slots kept per head at the end of the prompt, the recent ones and sinks among them."""
    recent: int = OBSERVED
    """Newest slots of the prompt, always kept."""
    sinks: int = 4
    """First positions, always kept; 0 in the paper."""
    variant: int = 0
    needs: ClassVar[Needs] = LastRows(OBSERVED)
    once: ClassVar[bool] = True
    recent_share: ClassVar[float] = 0.25
    variants: ClassVar[tuple[str, ...]] = ()
    decay: ClassVar[float] = 1.0

    def score(self, cache: LayerCache, stats_GS: Tensor | None, slots: int) -> Tensor:
        assert stats_GS is not None
        return F.avg_pool1d(stats_GS, NEIGHBOURS, stride=1, padding=NEIGHBOURS // 2)
