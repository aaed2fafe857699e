"""H2O: keep the tokens that attention keeps returning to, and the newest ones.

Zhang et al., arXiv:2306.14048, algorithm 1: a slot's score is the attention it has received from all queries
so far, summed over the query heads of its key head; the lowest go. Differs from the paper: four sinks are
kept by default, eviction happens every `evict_every` tokens instead of after each one, and the prompt's own
column sums are those of its causal attention (the released evaluation code also adds queries of the future).

A sum favours old tokens, which more queries have seen, and what was read often over what is asked for now. So
a request may have two other scores: `mean` divides by the queries that saw the slot; `decay` keeps a part of
the sum with each query, so that those at the end of the prompt, and then the newest, decide.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from axicon.model.cache import LayerCache
from axicon.protocols import Needs

DECAY = 0.8


@dataclass(frozen=True, kw_only=True)
class H2O:
    budget: int
    """Slots kept per head, the recent ones and sinks among them."""
    recent: int
    """Newest slots, always kept. A new token has had little time to collect attention."""
    sinks: int = 4
    """First positions, always kept; 0 in the paper."""
    variant: int = 0
    needs: ClassVar[Needs] = "column_sums"
    once: ClassVar[bool] = False
    recent_share: ClassVar[float] = 0.5
    variants: ClassVar[tuple[str, ...]] = ("sum", "mean", "decay")

    @property
    def decay(self) -> float:
        return DECAY if self.variants[self.variant] == "decay" else 1.0

    def score(self, cache: LayerCache, stats_GS: Tensor | None, slots: int) -> Tensor:
        assert stats_GS is not None
        if self.variants[self.variant] != "mean":
            return stats_GS
        positions_GS = cache.positions(slots)
        # The newest position, which every head holds, has been seen by its own query alone.
        return stats_GS / (positions_GS.max() + 1 - positions_GS).clamp(min=1)
