"""H2O: keep the tokens that attention keeps returning to, and the newest ones.

Zhang et al., arXiv:2306.14048, algorithm 1: a slot's score is the attention it has received from all queries
so far, summed over the query heads of its key head; the lowest go. Differs from the paper: four sinks are
kept by default, eviction happens every `evict_every` tokens instead of after each one, and the prompt's own
column sums are those of its causal attention (the released evaluation code also adds queries of the future).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from axicon.model.cache import LayerCache
from axicon.protocols import Needs


@dataclass(frozen=True, kw_only=True)
class H2O:
    budget: int
    """Slots kept per head, the recent ones and sinks among them."""
    recent: int
    """Newest slots, always kept. A new token has had little time to collect attention."""
    sinks: int = 4
    """First positions, always kept; 0 in the paper."""
    needs: ClassVar[Needs] = "column_sums"
    once: ClassVar[bool] = False
    recent_share: ClassVar[float] = 0.5

    def score(self, cache: LayerCache, stats_GS: Tensor | None, slots: int) -> Tensor:
        assert stats_GS is not None
        return stats_GS
