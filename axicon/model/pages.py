"""The KV cache on a GPU: pages of 16 slots per row, layer and KV head.

What belongs to whom is decided on the host, in numpy, and copied to the device once per step (`sync`); keys
and values never leave the device. Lengths after an eviction follow from the budget, so nothing is read back.

Otherwise a `KVCache`: the same rows, the same accounting, the same order of append, commit and cut. What an
extent is there, a row's pages are here, so evictions give back whole pages of each head by itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from axicon.errors import AxiconError
from axicon.kernels.paged_attention import NOBODYS, PAGE, Pages
from axicon.model.cache import KVCache, LayerCache, RowCache, size_class

BESIDE = 8
"""Bytes of a slot beside key and value: its position and what it has received."""
FEW = 64
"""Pages per head that the table has room for at first; it doubles."""


class PagedRow(RowCache):
    """A row of a `PagedCache`: its lengths are a view of the cache's, and always real."""

    __slots__ = ("_whole", "index")

    def __init__(self, index: int, reserved: int, lengths_LG: NDArray[np.int32]) -> None:
        super().__init__([], reserved)
        self.index = index
        """Its row of the table."""
        self.lengths_LG = lengths_LG
        self._whole = True

    @property
    def whole(self) -> bool:
        return self._whole

    def ragged(self) -> None:
        self._whole = False

    def measure(self) -> None:
        """Its pages are counted as they come and go."""


class PagedCache(KVCache):
    """Takes all of `budget` bytes when it is made. `version` grows when the table lies elsewhere.

    Row `max_rows` of the table belongs to nobody: its nodes are padding. Raises AxiconError where layers
    differ in KV heads or their width.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        dtype: torch.dtype,
        budget: int,
        *,
        device: torch.device,
        max_rows: int,
    ) -> None:
        super().__init__(shapes, dtype, budget)
        if len(set(self.shapes)) != 1:
            raise AxiconError(
                f"the cache of a GPU wants equal KV heads in all layers, these are {sorted(set(self.shapes))}"
            )
        (groups, width), layers = self.shapes[0], len(self.shapes)
        self.device, self.max_rows, self.version = device, max_rows, 0
        self.bytes_per_slot = layers * groups * (2 * width * dtype.itemsize + BESIDE)
        self._page_bytes = self.bytes_per_slot * PAGE // (layers * groups)
        count = max(2, budget // self._page_bytes)
        shape = (max_rows + 1, layers, groups)
        self._lengths = np.zeros(shape, np.int32)
        self._counts = np.zeros(shape, np.int32)
        """Pages of each head."""
        self._table = np.full((*shape, FEW), NOBODYS, np.int32)
        self._free = np.arange(count - 1, 0, -1, dtype=np.int32)
        """Taken from its end, which is `_left`."""
        self._left = count - 1
        self._rows_left = list(range(max_rows - 1, -1, -1))
        self._changed: list[NDArray[np.int64]] = []
        self._synced = False
        self._block_pages: dict[int, NDArray[np.int32]] = {}
        """(L, G, M) of each block."""
        self._pages_kept = 0
        self.pages = Pages(
            # Zeros, because what a mask hides must be finite.
            torch.zeros(count, PAGE, width, dtype=dtype, device=device),
            torch.zeros(count, PAGE, width, dtype=dtype, device=device),
            torch.zeros(count, PAGE, dtype=torch.int32, device=device),
            torch.zeros(count, PAGE, dtype=torch.float32, device=device),
            torch.from_numpy(self._table).to(device, copy=True),
            torch.from_numpy(self._lengths).to(device, copy=True),
        )

    @property
    def slots(self) -> int:
        """As for extents, with one layer's share set aside; the page that is nobody's does not count."""
        layers, groups = self._lengths.shape[1:]
        return (len(self._free) // (groups * (layers + 1))) * PAGE

    @property
    def bytes_in_use(self) -> int:
        return (len(self._free) - self._left) * self._page_bytes

    @property
    def bytes_kept(self) -> int:
        return self._pages_kept * self._page_bytes

    def paged(self, row: int) -> PagedRow:
        cache = self.rows[row]
        assert isinstance(cache, PagedRow)
        return cache

    def open(self, row: int, slots: int) -> None:
        slots = size_class(slots)
        if row in self.rows:
            raise ValueError(f"request row {row} is in use")
        free = self.slots - self.slots_reserved - self.slots_kept
        if slots > free:
            raise ValueError(f"row {row} reserves {slots} slots, {free} are free")
        if not self._rows_left:
            raise ValueError(f"row {row} is one more than {self.max_rows} rows")
        index = self._rows_left.pop()
        self.rows[row] = PagedRow(index, slots, self._lengths[index])

    def release(self, row: int) -> None:
        cache = self.paged(row)
        del self.rows[row]
        self._lengths[cache.index] = 0
        self._give_back(cache.index, range(len(self.shapes)))
        self._rows_left.append(cache.index)

    def make_room(self, row: int, tokens: int, layers: range | None = None) -> None:
        """Give pages to every head that needs them for `tokens` nodes more.

        With `layers`, to heads of these alone, whatever the row reserved: what a prompt needs that goes
        through the model layer by layer.
        """
        cache, bounded = self.paged(row), layers is None
        layers = range(len(self.shapes)) if layers is None else layers
        lengths_LG = self._lengths[cache.index, layers.start : layers.stop]
        counts_LG = self._counts[cache.index, layers.start : layers.stop]
        if bounded and int(lengths_LG.max()) + tokens > cache.reserved:
            raise ValueError(
                f"row {row} reserved {cache.reserved} slots and now needs {int(lengths_LG.max()) + tokens}"
            )
        wanted_LG = -(-(lengths_LG + tokens) // PAGE)
        missing_LG = np.maximum(wanted_LG - counts_LG, 0)
        total = int(missing_LG.sum())
        if total == 0:
            return
        self._widen(int(wanted_LG.max()))
        # Entry e of a head goes behind the pages it has: heads one after the other, entries ascending.
        heads = np.repeat(np.arange(missing_LG.size), missing_LG.ravel())
        starts = np.cumsum(missing_LG.ravel()) - missing_LG.ravel()
        entries = np.arange(total) - starts[heads] + counts_LG.ravel()[heads]
        first = np.ravel_multi_index((cache.index, layers.start, 0, 0), self._table.shape)
        flat = first + heads * self._table.shape[3] + entries
        self._table.reshape(-1)[flat] = self._take(total)
        self._changed.append(flat)
        np.maximum(counts_LG, wanted_LG, out=counts_LG)
        cache.bytes += total * self._page_bytes

    def commit(self, row: int, path: Sequence[int]) -> None:
        cache = self.paged(row)
        if path[-1] + 1 != len(path):
            layers = range(len(self.shapes))
            lengths_LG1 = torch.from_numpy(self.lengths(row, layers)).to(self.device)[..., None].long()
            old, new = (torch.tensor(x, device=self.device) for x in (list(path), list(range(len(path)))))
            source, target = (self._places(cache.index, layers, lengths_LG1 + x) for x in (old, new))
            self._copy(source, target)
        self.grow(row, range(len(self.shapes)), len(path))
        cache.committed += len(path)

    def grow(self, row: int, layers: range, tokens: int) -> None:
        """Count staged nodes of these layers as committed ones; the row's `committed` stays."""
        self._lengths[self.paged(row).index, layers.start : layers.stop] += tokens
        self._synced = False

    def lengths(self, row: int, layers: range) -> NDArray[np.int32]:
        """(L, G), a copy."""
        return self._lengths[self.paged(row).index, layers.start : layers.stop].copy()

    def positions(self, row: int) -> list[list[Tensor]]:
        layers = range(len(self.shapes))
        positions_LGS = self.pages.positions_PS.view(-1)[self._all_places(row, layers)].cpu()
        lengths_LG = self.lengths(row, layers)
        return [
            [positions_LGS[at, g, :n] for g, n in enumerate(of.tolist())] for at, of in enumerate(lengths_LG)
        ]

    def received(self, row: int, layers: range) -> Tensor:
        """float32 (L, G, S) up to the fullest head of these layers."""
        return self.pages.received_PS.view(-1)[self._all_places(row, layers)]

    def dense(self, row: int, layers: range) -> list[LayerCache]:
        """Copies of layers as they lie in an extent, for policies to look at."""
        place_LGS = self._all_places(row, layers)
        width = self.shapes[0][1]
        extents = [store.view(-1, width)[place_LGS] for store in (self.pages.keys_PSK, self.pages.values_PSK)]
        positions_LGS = self.pages.positions_PS.view(-1)[place_LGS]
        lengths_LG = self.lengths(row, layers)
        found = []
        for at in range(len(layers)):
            layer = LayerCache(torch.stack([extent[at] for extent in extents]))
            layer.lengths, layer.positions_GC = lengths_LG[at], positions_LGS[at]
            found.append(layer)
        return found

    def cut(self, row: int, layers: range, kept_LGS: Tensor, lengths_LG: NDArray[np.int32]) -> None:
        """Move the slots where `kept_LGS` (bool, on the device) holds together, and give pages back.

        `lengths_LG` says how many those are.
        """
        index, most = self.paged(row).index, int(lengths_LG.max())
        # Stable: the slots that stay in their order, then the others, which land behind the new length.
        source_LGS = (~kept_LGS).to(torch.uint8).argsort(dim=2, stable=True)[..., :most]
        target_LGS = torch.arange(most, device=self.device).expand_as(source_LGS)
        self._copy(self._places(index, layers, source_LGS), self._places(index, layers, target_LGS))
        self._lengths[index, layers.start : layers.stop] = lengths_LG
        self.paged(row).bytes -= self._give_back(index, layers) * self._page_bytes

    def keep(self, block: int, row: int, start: int, stop: int) -> None:
        layers, groups = self._lengths.shape[1:]
        pages_LGM = self._take(layers * groups * -(-(stop - start) // PAGE)).reshape(layers, groups, -1)
        self._block_pages[block], self.kept[block] = pages_LGM, stop - start
        self._pages_kept += pages_LGM.size
        self.slots_kept += stop - start
        slot_LGS = torch.arange(start, stop, device=self.device).expand(layers, groups, -1)
        self._copy(self._places(self.paged(row).index, range(layers), slot_LGS), self._block_places(block))

    def drop(self, block: int) -> None:
        pages_LGM = self._block_pages.pop(block, None)
        if pages_LGM is not None:
            self._pages_kept -= pages_LGM.size
            self._give(pages_LGM.ravel())
        self.slots_kept -= self.kept.pop(block, 0)

    def reuse(self, row: int, blocks: Sequence[int]) -> None:
        layers, groups = self._lengths.shape[1:]
        cache = self.paged(row)
        self.make_room(row, sum(self.kept[block] for block in blocks))
        for block in blocks:
            tokens = self.kept[block]
            slot_S = torch.arange(cache.committed, cache.committed + tokens, device=self.device)
            target = self._places(cache.index, range(layers), slot_S.expand(layers, groups, -1))
            self._copy(self._block_places(block), target)
            self.grow(row, range(layers), tokens)
            cache.committed += tokens

    def sync(self) -> None:
        """Tell the device what has changed on the host."""
        if self._changed:
            flat = np.unique(np.concatenate(self._changed))
            both = torch.from_numpy(np.stack([flat, self._table.reshape(-1)[flat]])).to(self.device)
            self.pages.table_RLGM.view(-1)[both[0]] = both[1].int()
            self._changed.clear()
        if not self._synced:
            self.pages.lengths_RLG.copy_(torch.from_numpy(self._lengths))
            self._synced = True

    def _places(self, index: int, layers: range, slot_LGS: Tensor) -> Tensor:
        """int64 (L, G, S): where slots lie among all slots. Those beyond a head's pages are nobody's."""
        self.sync()
        slot_LGS = slot_LGS.clamp(max=self._table.shape[3] * PAGE - 1)
        table_LGM = self.pages.table_RLGM[index, layers.start : layers.stop]
        return table_LGM.gather(2, slot_LGS // PAGE).long() * PAGE + slot_LGS % PAGE

    def _all_places(self, row: int, layers: range) -> Tensor:
        lengths_LG = self.lengths(row, layers)
        slot_S = torch.arange(int(lengths_LG.max()), device=self.device)
        return self._places(self.paged(row).index, layers, slot_S.expand(*lengths_LG.shape, -1))

    def _block_places(self, block: int) -> Tensor:
        slot_S = torch.arange(self.kept[block], device=self.device)
        pages_LGM = torch.from_numpy(self._block_pages[block]).to(self.device)
        return pages_LGM[..., slot_S // PAGE].long() * PAGE + slot_S % PAGE

    def _copy(self, source: Tensor, target: Tensor) -> None:
        for store in (self.pages.keys_PSK, self.pages.values_PSK):
            flat = store.view(-1, store.shape[2])
            flat[target] = flat[source]
        for beside in (self.pages.positions_PS, self.pages.received_PS):
            beside.view(-1)[target] = beside.view(-1)[source]

    def _give_back(self, index: int, layers: range) -> int:
        """Pages behind the last committed slot of each head. Returns how many those are."""
        counts_LG = self._counts[index, layers.start : layers.stop]
        needed_LG = -(-self._lengths[index, layers.start : layers.stop] // PAGE)
        self._synced = False
        entry_M = np.arange(int(counts_LG.max()))
        behind_LGM = (entry_M >= needed_LG[..., None]) & (entry_M < counts_LG[..., None])
        layer, g, entry = behind_LGM.nonzero()
        if len(entry) == 0:
            return 0
        flat = np.ravel_multi_index(
            (np.full_like(entry, index), layer + layers.start, g, entry), self._table.shape
        )
        self._give(self._table.reshape(-1)[flat])
        self._table.reshape(-1)[flat] = NOBODYS
        self._changed.append(flat)
        np.minimum(counts_LG, needed_LG, out=counts_LG)
        return len(entry)

    def _take(self, count: int) -> NDArray[np.int32]:
        if count > self._left:
            raise MemoryError(f"KV cache: {count} more pages do not fit, {self._left} are free")
        self._left -= count
        return self._free[self._left : self._left + count].copy()

    def _give(self, pages: NDArray[np.int32]) -> None:
        self._free[self._left : self._left + len(pages)] = pages
        self._left += len(pages)

    def _widen(self, pages: int) -> None:
        """Have so many entries per head in the table."""
        width = self._table.shape[3]
        if pages <= width:
            return
        self.sync()
        wider = max(2 * width, 1 << (pages - 1).bit_length())
        table = np.full((*self._table.shape[:3], wider), NOBODYS, np.int32)
        table[..., :width] = self._table
        self._table = table
        self.pages = self.pages._replace(table_RLGM=torch.from_numpy(table).to(self.device, copy=True))
        self.version += 1
