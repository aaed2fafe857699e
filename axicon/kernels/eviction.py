"""Which slots of a bounded cache stay: chosen, and moved together. In C++ where it runs, the same in torch.

A slot is kept if its position is one of the first `sinks`, if it is among the newest `recent` of its head, or
if its score is among the best of what is left of `budget`. Of equal scores the earlier position stays; NaN is
the lowest of all.
"""

from __future__ import annotations

import torch
from torch import Tensor


def select(
    scores_GS: Tensor, positions_GS: Tensor, lengths_G: Tensor, budget: int, recent: int, sinks: int
) -> Tensor:
    """bool (G, S): what each head keeps of its first `lengths_G` slots, whose positions ascend.

    At most `budget` per head, never fewer than it if there are as many. `recent` + `sinks` must fit into it.
    """
    slots = scores_GS.shape[1]
    place_S = torch.arange(slots, device=scores_GS.device)
    left_G1 = lengths_G[:, None]
    live_GS = place_S < left_G1
    kept_GS = live_GS & ((place_S >= left_G1 - recent) | (positions_GS < sinks))
    room_G1 = budget - kept_GS.sum(1, keepdim=True)
    lowest = torch.finfo(torch.float32).min  # still above what is no longer contested
    scores_GS = scores_GS.float().nan_to_num(lowest, torch.inf, lowest)
    contested_GS = scores_GS.masked_fill(kept_GS | ~live_GS, -torch.inf)
    # Stable: slots lie in the order of their positions, so the earlier of two equals comes first.
    order_GS = contested_GS.argsort(dim=1, descending=True, stable=True)
    rank_GS = torch.empty_like(order_GS).scatter_(1, order_GS, place_S.expand_as(order_GS))
    return kept_GS | (live_GS & ~kept_GS & (rank_GS < room_G1))
