"""Key norm: keep the keys of small norm. Needs no attention at all.

Devoto et al., arXiv:2406.11430, section 3: keys of low L2 norm receive the most attention. Differs from the
paper: sinks and the newest tokens are kept, and no layer is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from axicon.model.cache import LayerCache
from axicon.protocols import Needs


@dataclass(frozen=True, kw_only=True)
class KeyNorm:
    budget: int
    """Slots kept per head, the recent ones and sinks among them."""
    recent: int
    """Newest slots, always kept; 0 in the paper."""
    sinks: int = 4
    """First positions, always kept; 0 in the paper."""
    variant: int = 0
    needs: ClassVar[Needs] = "none"
    once: ClassVar[bool] = False
    recent_share: ClassVar[float] = 0.5
    variants: ClassVar[tuple[str, ...]] = ()
    decay: ClassVar[float] = 1.0

    def score(self, cache: LayerCache, stats_GS: Tensor | None, slots: int) -> Tensor:
        return -cache.keys_GCK[:, :slots].float().norm(dim=-1)
