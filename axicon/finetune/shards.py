"""How workers agree on numbers: alone, or in a process group. See `Mean`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from axicon.errors import AxiconError


@dataclass(frozen=True, slots=True)
class Alone:
    """One worker, which computes every shard."""

    shards: int = 1

    @property
    def own(self) -> range:
        return range(self.shards)

    def gather(self, values_SK: Tensor) -> Tensor:
        return values_SK

    def add(self, tensor: Tensor) -> None:
        return None


class Among:
    """One of several workers of a process group that is set up already (gloo, or gloo beside NCCL)."""

    def __init__(self, shards: int) -> None:
        """Raises AxiconError where some worker would have no shard."""
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        if shards < self.world:
            raise AxiconError(
                f"shards={shards}: too few for {self.world} workers, who need one each; the number of shards "
                "belongs to the run, so start another with more of them, or take fewer workers"
            )
        self.shards = shards

    @property
    def own(self) -> range:
        return self._of(self.rank)

    def _of(self, rank: int) -> range:
        return range(self.shards * rank // self.world, self.shards * (rank + 1) // self.world)

    def gather(self, values_SK: Tensor) -> Tensor:
        most = -(-self.shards // self.world)
        padded = torch.zeros(most, values_SK.shape[1], dtype=torch.float64)
        padded[: len(values_SK)] = values_SK
        found = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(found, padded)
        return torch.cat([part[: len(self._of(rank))] for rank, part in enumerate(found)])

    def add(self, tensor: Tensor) -> None:
        dist.all_reduce(tensor)
