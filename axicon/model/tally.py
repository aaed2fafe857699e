"""Attention that the slots of a row have received: what score-based eviction looks at.

The nodes of a step are tallied apart and counted when they are committed, one after the other, so that a
guess that was wrong leaves no trace and a right one leaves the same bits as a step of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Tally:
    """float32, per layer, KV head and slot; sums over the query heads of a group.

    last: keep the attention of the newest committed query instead of the sum over all. decay: what is left of
    the sum when the next query is counted. every: adjacent nodes
    of a step that share one entry, for prompts, whose nodes all stay.
    """

    __slots__ = ("decay", "every", "last", "staged_LGNC", "sums_LGC")

    def __init__(
        self,
        layers: int,
        groups: int,
        slots: int,
        *,
        nodes: int = 1,
        every: int = 1,
        last: bool = False,
        decay: float = 1.0,
    ) -> None:
        self.decay = decay
        self.every, self.last = every, last
        self.sums_LGC = torch.zeros(layers, groups, slots)
        self.staged_LGNC = torch.zeros(layers, groups, -(-nodes // every), slots)

    def make_room(self, nodes: int) -> bool:
        """Have an entry for each of so many nodes. True if the entries lie elsewhere now."""
        layers, groups, entries, slots = self.staged_LGNC.shape
        if nodes <= entries * self.every:
            return False
        self.staged_LGNC = torch.zeros(layers, groups, -(-nodes // self.every), slots)
        return True

    def commit(self, path: Sequence[int], lengths_LG: NDArray[np.int32]) -> None:
        """Count the nodes `path` of the last step; `lengths_LG` are the slots committed before it."""
        if list(path) != list(range(len(path))):
            self._move(path, lengths_LG)
        if self.last:
            self.sums_LGC.copy_(self.staged_LGNC[:, :, path[-1]])
            return
        for node in path:
            if self.decay != 1.0:
                self.sums_LGC *= self.decay
            self.sums_LGC += self.staged_LGNC[:, :, node]

    def retain(self, layer: int, head: int, kept: Tensor) -> None:
        """The slots `kept` of a head are moved together."""
        sums_C = self.sums_LGC[layer, head]
        sums_C[: len(kept)] = sums_C[kept]
        sums_C[len(kept) :] = 0

    def _move(self, path: Sequence[int], lengths_LG: NDArray[np.int32]) -> None:
        """Entries name staged slots; those of the path are about to move together."""
        first_LG1 = torch.from_numpy(lengths_LG).long()[:, :, None]
        slots = self.sums_LGC.shape[2]
        staged_LGS = torch.arange(slots) >= first_LG1
        old_LGT = first_LG1 + torch.tensor(path)
        new_LGT = first_LG1 + torch.arange(len(path))
        for node in path:
            entry_LGC = self.staged_LGNC[:, :, node]
            moved_LGT = entry_LGC.gather(2, old_LGT)
            entry_LGC.masked_fill_(staged_LGS, 0.0).scatter_(2, new_LGT, moved_LGT)
