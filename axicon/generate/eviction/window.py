"""Window: keep the first tokens and the newest ones.

StreamingLLM, Xiao et al., arXiv:2309.17453, section 3.2: attention parks what it does not need on the first
tokens, and a window without them breaks down. Differs from the paper: keys keep the rotation of their
original position instead of one by their place in the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from axicon.model.cache import LayerCache
from axicon.protocols import Needs


@dataclass(frozen=True, kw_only=True)
class Window:
    budget: int
    """Slots kept per head, sinks among them."""
    recent: int = 0
    """Without meaning here: all but the sinks is recent."""
    sinks: int = 4
    """First positions, always kept."""
    variant: int = 0
    needs: ClassVar[Needs] = "none"
    once: ClassVar[bool] = False
    recent_share: ClassVar[float] = 0.0
    variants: ClassVar[tuple[str, ...]] = ()
    decay: ClassVar[float] = 1.0

    def score(self, cache: LayerCache, stats_GS: Tensor | None, slots: int) -> Tensor:
        return cache.positions(slots)
