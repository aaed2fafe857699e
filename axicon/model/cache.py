"""The KV cache: contiguous extents per request row and layer, in size classes, with exact byte accounting.

A *slot* is storage, a *position* is time. While nothing was evicted, slot i of every head holds position i
and neither is stored: `positions` and `lengths` are None. `ragged` makes both real, per KV head, and from
then on only they tell where a key came from. Slots of a head stay in the order of their positions.

The nodes of a step are *staged* in the slots behind the committed ones. They become permanent when `commit`
names them; what it does not name is overwritten by the next step. So nothing is ever rolled back after an
eviction.

A *block* is a copy of a few adjacent committed tokens of a whole row. It outlives the row, for others that
begin with the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from axicon.model.tally import Tally

SMALLEST = 64
IDLE_PER_CLASS = 64


def size_class(slots: int) -> int:
    """Capacity of the extent that holds `slots`: 64, 96, 128, ... 256, 320, 384, ... 512, 640, ...

    Steps are a quarter of the power of two below, at least 32: at most a quarter of a long extent is unused,
    and copying into the next class costs a constant factor per token.
    """
    if slots <= SMALLEST:
        return SMALLEST
    step = max(32, 1 << max(0, (slots - 1).bit_length() - 3))
    return -(-slots // step) * step


class ExtentPool:
    """Lends buffers (2, G, C, K), keys first, and counts their bytes.

    Returned buffers are kept for the next request of the same class, as long as everything stays within
    `budget`.
    """

    def __init__(self, budget: int, dtype: torch.dtype) -> None:
        self.budget = budget
        self.dtype = dtype
        self.bytes_in_use = 0
        self.bytes_idle = 0
        self._idle: dict[tuple[int, ...], list[Tensor]] = {}

    def take(self, groups: int, capacity: int, width: int) -> Tensor:
        """An extent of undefined but finite content: what a mask hides is still multiplied by zero. Raises
        MemoryError when the budget does not hold it."""
        shape = (2, groups, capacity, width)
        size = 2 * groups * capacity * width * self.dtype.itemsize
        idle = self._idle.get(shape)
        if idle:
            self.bytes_idle -= size
            self.bytes_in_use += size
            return idle.pop()
        if self.bytes_in_use + size > self.budget:
            raise MemoryError(
                f"KV cache: {size} more bytes do not fit, {self.bytes_in_use} of {self.budget} are in use"
            )
        if self.bytes_in_use + self.bytes_idle + size > self.budget:
            self._idle.clear()
            self.bytes_idle = 0
        extent = torch.zeros(shape, dtype=self.dtype)
        self.bytes_in_use += size
        return extent

    def give(self, extent: Tensor) -> None:
        size = extent.nbytes
        self.bytes_in_use -= size
        idle = self._idle.setdefault(tuple(extent.shape), [])
        if len(idle) < IDLE_PER_CLASS and self.bytes_in_use + self.bytes_idle + size <= self.budget:
            idle.append(extent)
            self.bytes_idle += size


class LayerCache:
    """Keys and values of one request in one layer."""

    __slots__ = ("extent", "keys_GCK", "lengths", "positions_GC", "values_GCK")

    def __init__(self, extent: Tensor) -> None:
        self.lengths: NDArray[np.int32] | None = None
        """(G,) committed slots of each KV head; None while every head holds every committed position."""
        self.positions_GC: Tensor | None = None
        """int32. Position held by each slot; None while slot i holds position i."""
        self.place(extent)

    def place(self, extent: Tensor) -> None:
        self.extent = extent
        self.keys_GCK, self.values_GCK = extent.unbind(0)

    @property
    def capacity(self) -> int:
        return self.extent.shape[2]

    def used(self, committed: int) -> int:
        """Committed slots of the fullest head."""
        return committed if self.lengths is None else int(self.lengths.max())

    def positions(self, slots: int) -> Tensor:
        """int32 (G, S): positions of the first `slots` slots."""
        if self.positions_GC is None:
            return torch.arange(slots, dtype=torch.int32).expand(self.extent.shape[1], slots)
        return self.positions_GC[:, :slots]

    def stage(self, k_TGK: Tensor, v_TGK: Tensor, committed: int) -> None:
        """Write the nodes of a step behind the committed slots of every head."""
        tokens = k_TGK.shape[0]
        if self.lengths is None:
            self.keys_GCK.narrow(1, committed, tokens).copy_(k_TGK.transpose(0, 1))
            self.values_GCK.narrow(1, committed, tokens).copy_(v_TGK.transpose(0, 1))
            return
        assert self.positions_GC is not None
        heads, slots = self._staged_slots(torch.arange(tokens))
        self.keys_GCK[heads, slots] = k_TGK.transpose(0, 1)
        self.values_GCK[heads, slots] = v_TGK.transpose(0, 1)
        self.positions_GC[heads, slots] = torch.arange(committed, committed + tokens, dtype=torch.int32)

    def commit(self, path: Sequence[int], committed: int) -> None:
        """Keep the staged nodes `path` (ascending offsets), moved together behind the `committed` ones."""
        heads, old = self._staged_slots(torch.tensor(path), committed)
        _, new = self._staged_slots(torch.arange(len(path)), committed)
        self.extent[:, heads, new] = self.extent[:, heads, old]
        if self.positions_GC is not None:
            after = torch.arange(committed, committed + len(path), dtype=torch.int32)
            self.positions_GC[heads, new] = after

    def _staged_slots(self, offsets_T: Tensor, committed: int = 0) -> tuple[Tensor, Tensor]:
        """Index pair (G, 1), (G, T) of staged nodes in a (G, C, ...) buffer."""
        heads = self.extent.shape[1]
        lengths_G = np.full(heads, committed) if self.lengths is None else self.lengths
        return torch.arange(heads)[:, None], torch.from_numpy(lengths_G).long()[:, None] + offsets_T


class RowCache:
    """What one request holds in all layers of this runner."""

    __slots__ = ("bytes", "committed", "layers", "lengths_LG", "reserved", "room", "tally", "version")

    def __init__(self, layers: list[LayerCache], reserved: int) -> None:
        self.layers = layers
        self.reserved = reserved
        """Slots per head this row may ever hold, staged nodes included."""
        self.committed = 0
        """Tokens committed: the position of the next root node."""
        self.lengths_LG: NDArray[np.int32] | None = None
        """Committed slots of each head of each layer; None while nothing may have been evicted."""
        self.tally: Tally | None = None
        """Attention that the slots have received, where a policy wants to know."""
        self.version = 0
        """Grows whenever something of this row lies elsewhere than before."""
        self.bytes = 0
        """Of its keys and values, with the room behind them."""
        self.measure()

    @property
    def whole(self) -> bool:
        """Every head holds every committed position."""
        return self.lengths_LG is None

    def measure(self) -> None:
        """Find out how many slots are `room`, free behind the fullest head of any layer, and the `bytes`."""
        free = (layer.capacity - layer.used(self.committed) for layer in self.layers)
        self.room = min(free, default=self.reserved)
        self.bytes = sum(layer.extent.nbytes for layer in self.layers)
        self.version += 1

    def ragged(self) -> None:
        """Give every head slots and positions of its own."""
        if self.lengths_LG is not None:
            return
        groups = max(layer.extent.shape[1] for layer in self.layers)
        self.lengths_LG = np.full((len(self.layers), groups), self.committed, dtype=np.int32)
        for layer, lengths in zip(self.layers, self.lengths_LG, strict=True):
            heads = layer.extent.shape[1]
            layer.lengths = lengths[:heads]
            layer.positions_GC = torch.arange(layer.capacity, dtype=torch.int32).repeat(heads, 1)
        self.version += 1


class KVCache:
    """All rows of a runner. `shapes` gives (KV heads, head width) per layer."""

    keeps_blocks: ClassVar[bool] = True

    def __init__(self, shapes: Sequence[tuple[int, int]], dtype: torch.dtype, budget: int) -> None:
        self.shapes = list(shapes)
        self.pool = ExtentPool(budget, dtype)
        self.rows: dict[int, RowCache] = {}
        self.blocks: dict[int, list[Tensor]] = {}
        """By number: (2, G, T, K) of each layer."""
        self.kept: dict[int, int] = {}
        """Tokens of each block."""
        self.slots_kept = 0
        """Slots that blocks take."""
        self.bytes_per_slot = sum(2 * g * k * dtype.itemsize for g, k in self.shapes)

    @property
    def slots(self) -> int:
        """Slots per head that can be reserved. A row grows one layer at a time, with the old and the new
        extent of that layer alive together, so one layer's share of the budget is set aside. It also holds
        the one layer in which a layered prompt has all its keys.
        """
        layers = len(self.shapes)
        return self.pool.budget * layers // (max(1, self.bytes_per_slot) * (layers + 1))

    @property
    def slots_reserved(self) -> int:
        return sum(row.reserved for row in self.rows.values())

    @property
    def bytes_in_use(self) -> int:
        """Of rows and blocks."""
        return self.pool.bytes_in_use

    @property
    def bytes_kept(self) -> int:
        return self.slots_kept * self.bytes_per_slot

    def open(self, row: int, slots: int) -> None:
        """Begin a row that never holds more than `slots`, rounded up to a size class."""
        slots = size_class(slots)
        if row in self.rows:
            raise ValueError(f"request row {row} is in use")
        free = self.slots - self.slots_reserved - self.slots_kept
        if slots > free:
            raise ValueError(f"row {row} reserves {slots} slots, {free} are free")
        layers = [LayerCache(self.pool.take(g, SMALLEST, k)) for g, k in self.shapes]
        self.rows[row] = RowCache(layers, slots)

    def release(self, row: int) -> None:
        for layer in self.rows.pop(row).layers:
            self.pool.give(layer.extent)

    def keep(self, block: int, row: int, start: int, stop: int) -> None:
        """Copy committed tokens of a whole row into a new block."""
        copies = [self.pool.take(g, stop - start, k) for g, k in self.shapes]
        torch._foreach_copy_(copies, [layer.extent[:, :, start:stop] for layer in self.rows[row].layers])
        self.blocks[block], self.kept[block] = copies, stop - start
        self.slots_kept += stop - start

    def drop(self, block: int) -> None:
        """Give a block back, if it is there."""
        for extent in self.blocks.pop(block, ()):
            self.pool.give(extent)
        self.slots_kept -= self.kept.pop(block, 0)

    def reuse(self, row: int, blocks: Sequence[int]) -> None:
        """Copy blocks, one after the other, behind the committed tokens of a whole row, and commit them."""
        cache = self.rows[row]
        self.make_room(row, sum(self.kept[block] for block in blocks))
        for block in blocks:
            start, stop = cache.committed, cache.committed + self.kept[block]
            ours = [layer.extent[:, :, start:stop] for layer in cache.layers]
            torch._foreach_copy_(ours, self.blocks[block])
            cache.committed = stop
            cache.room -= stop - start

    def make_room(self, row: int, tokens: int) -> None:
        """Make sure `tokens` nodes can be staged in every layer of `row`."""
        cache = self.rows[row]
        if cache.tally is not None and cache.tally.make_room(tokens):
            cache.version += 1
        if cache.room >= tokens:
            return
        for layer in cache.layers:
            used = layer.used(cache.committed)
            if used + tokens > cache.reserved:
                raise ValueError(f"row {row} reserved {cache.reserved} slots and now needs {used + tokens}")
            if used + tokens > layer.capacity:
                self._move(layer, size_class(used + tokens), used)
        cache.measure()

    def commit(self, row: int, path: Sequence[int]) -> None:
        """Keep the staged nodes at these ascending offsets of the row's last step, drop the others."""
        cache = self.rows[row]
        if path[-1] + 1 != len(path):
            for layer in cache.layers:
                layer.commit(path, cache.committed)
        if cache.lengths_LG is not None:
            if cache.tally is not None:
                cache.tally.commit(path, cache.lengths_LG)
            cache.lengths_LG += len(path)
        cache.committed += len(path)
        cache.room -= len(path)

    def positions(self, row: int) -> list[list[Tensor]]:
        """int32, per layer and head: the positions of the committed slots."""
        committed = self.rows[row].committed
        found = []
        for layer in self.rows[row].layers:
            heads = layer.extent.shape[1]
            lengths = [committed] * heads if layer.lengths is None else layer.lengths.tolist()
            positions_GS = layer.positions(max(lengths))
            found.append([positions_GS[g, :length] for g, length in enumerate(lengths)])
        return found

    def retain(self, row: int, layer: int, keep_GS: Tensor, spare: int = 0) -> None:
        """Cut one layer to the slots where `keep_GS` (bool, S the fullest head) holds, in their order.

        Heads may keep different numbers of slots. Bytes of a smaller size class go back, but for `spare`
        slots more than are kept.
        """
        cache = self.rows[row]
        cache.ragged()
        store = cache.layers[layer]
        lengths, positions_GC = store.lengths, store.positions_GC
        assert lengths is not None
        assert positions_GC is not None
        for g, length in enumerate(lengths.tolist()):
            kept = keep_GS[g, :length].nonzero().flatten()
            store.extent[:, g, : len(kept)] = store.extent[:, g, kept]
            positions_GC[g, : len(kept)] = positions_GC[g, kept]
            if cache.tally is not None:
                cache.tally.retain(layer, g, kept)
            lengths[g] = len(kept)
        self.fit(row, [layer], spare)

    def fit(self, row: int, layers: Sequence[int], spare: int) -> None:
        """Give bytes back that these layers need neither now nor for `spare` slots more."""
        cache = self.rows[row]
        for index in layers:
            layer = cache.layers[index]
            used = layer.used(cache.committed)
            capacity = size_class(used + spare)
            if capacity < layer.capacity:
                self._move(layer, capacity, used)
        cache.measure()

    def exchange(self, row: int, layer: int, slots: int) -> Tensor:
        """Put an extent for `slots` slots in the place of an empty layer's."""
        store = self.rows[row].layers[layer]
        groups, width = self.shapes[layer]
        self.rows[row].bytes -= store.extent.nbytes
        self.pool.give(store.extent)
        store.place(self.pool.take(groups, size_class(slots), width))
        self.rows[row].bytes += store.extent.nbytes
        if store.positions_GC is not None:
            store.positions_GC = torch.arange(store.capacity, dtype=torch.int32).repeat(groups, 1)
        return store.extent

    def _move(self, layer: LayerCache, capacity: int, used: int) -> None:
        old = layer.extent
        new = self.pool.take(old.shape[1], capacity, old.shape[3])
        new[:, :, :used] = old[:, :, :used]
        layer.place(new)
        if layer.positions_GC is not None:
            wider = layer.positions_GC.new_zeros(old.shape[1], capacity)
            wider[:, :used] = layer.positions_GC[:, :used]
            layer.positions_GC = wider
        self.pool.give(old)
