"""TOVA: drop what the newest token looks at least.

Oren et al., arXiv:2401.06104, section 3.2: the score is the last query's attention, averaged over all query
heads, so that all heads of a layer keep the same tokens. Differs from the paper: eviction happens every
`evict_every` tokens, and sinks are kept by default.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from axicon.model.cache import LayerCache
from axicon.protocols import LastRows, Needs


@dataclass(frozen=True, kw_only=True)
class TOVA:
    budget: int
    """Slots kept per head, the recent ones and sinks among them."""
    recent: int = 1
    """Newest slots, always kept."""
    sinks: int = 4
    """First positions, always kept; 0 in the paper."""
    variant: int = 0
    needs: ClassVar[Needs] = LastRows(1)
    once: ClassVar[bool] = False
    recent_share: ClassVar[float] = 0.0
    variants: ClassVar[tuple[str, ...]] = ()
    decay: ClassVar[float] = 1.0

    def score(self, cache: LayerCache, stats_GS: Tensor | None, slots: int) -> Tensor:
        assert stats_GS is not None
        return stats_GS.mean(0, keepdim=True).expand_as(stats_GS)
