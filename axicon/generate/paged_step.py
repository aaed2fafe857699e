"""The nodes of a step as a GPU reads them: one array of integers, copied at once, and its views.

A captured graph reads the same addresses at every replay, so a step that is to be replayed is padded to a
bucket: what differs between two steps of a bucket is the content of the array alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from axicon.generate.spans import Span
from axicon.kernels.paged_attention import Nodes, Tiles

SPLIT = 256
"""Slots of a program for rows that decode and for trees. Fixed, so that a row's bits are its own."""
LONG_SPLIT = 1024
"""The most slots of a program for prompt chunks, which have programs enough."""
TILE_ROWS = 64
"""The most rows of a tile, query heads times nodes; a span of more is a prompt chunk."""
MOST_PADDED = 256
"""Nodes of the largest step that is captured."""

Ints = NDArray[np.int32]


class TileShape(NamedTuple):
    tiles: int
    rows: int
    split: int
    splits: int


class Layout(NamedTuple):
    """What is fixed when a graph is captured."""

    nodes: int
    words: int
    groups: tuple[TileShape, ...]

    @property
    def padded(self) -> bool:
        """One that graphs can have: short spans, and a power of two of nodes."""
        return self.words == 1 and len(self.groups) == 1 and self.nodes & (self.nodes - 1) == 0


class Packed(NamedTuple):
    layout: Layout
    flat: Ints

    def views(self, flat: Tensor) -> tuple[Tensor, Tensor, Nodes]:
        """Tokens, positions and nodes in an int32 tensor that holds `flat`."""
        return unpack(self.layout, flat)


def unpack(layout: Layout, flat: Tensor) -> tuple[Tensor, Tensor, Nodes]:
    n, words = layout.nodes, layout.words
    sizes = [n, n, n, n, n * words, *(4 * group.tiles for group in layout.groups)]
    tokens_N, positions_N, rows_N, offsets_N, ancestors, *tiles = flat.split(sizes)
    groups = tuple(
        Tiles(part.view(-1, 4), group.rows, group.split, group.splits)
        for part, group in zip(tiles, layout.groups, strict=True)
    )
    return tokens_N, positions_N, Nodes(rows_N, offsets_N, positions_N, ancestors.view(n, words), groups)


def pack(
    tokens_N: Sequence[int],
    spans: Sequence[Span],
    rows: Sequence[int],
    slots: Sequence[int],
    share: int,
    nobodys: int | None = None,
) -> Packed:
    """One entry of `rows` (of the table) and of `slots` (committed ones, fullest head) per span. Spans lie
    one after the other. share: query heads of a KV head. nobodys: the table's row of padding, if the step may
    be padded.
    """
    n = sum(map(len, spans))
    words = -(-max(map(len, spans)) // 32)
    short = [i for i, span in enumerate(spans) if len(span) * share <= TILE_ROWS]
    long = [i for i in range(len(spans)) if i not in set(short)]
    padded = n
    if nobodys is not None and not long and words == 1 and n <= MOST_PADDED:
        padded = 1 << (n - 1).bit_length()
    offsets = np.zeros(padded, np.int32)
    positions = np.zeros(padded, np.int32)
    table_rows = np.full(padded, nobodys or 0, np.int32)
    tokens = np.zeros(padded, np.int32)
    ancestors = np.zeros((padded, words), np.int32)
    ancestors[n:, 0] = 1
    tokens[:n] = tokens_N
    for span, row in zip(spans, rows, strict=True):
        own = slice(span.start, span.stop)
        offsets[own], positions[own], table_rows[own] = range(len(span)), span.positions, row
        ancestors[own] = ancestor_words(span, words)
    shapes, parts = [], []
    for which, most in ((short, SPLIT), (long, LONG_SPLIT)):
        if not which:
            continue
        live = max(slots[i] + len(spans[i]) for i in which)
        largest = max(len(spans[i]) for i in which)
        tile_rows = max(16, _power(share), min(TILE_ROWS, _power(share * largest)))
        tiles = [t for i in which for t in _tiles(spans[i], rows[i], tile_rows // share)]
        if padded > n:
            assert nobodys is not None
            tiles += [(nobodys, node, 1, 0) for node in range(n, padded)]
        if nobodys is not None and not long and padded == _power(padded):
            tiles += [(nobodys, 0, 0, 0)] * (padded - len(tiles))
        split = most if most == SPLIT else max(64, min(most, _power(live)))
        shapes.append(TileShape(len(tiles), tile_rows, split, _power(-(-live // split))))
        parts.append(np.array(tiles, np.int32).ravel())
    flat = np.concatenate([tokens, positions, table_rows, offsets, ancestors.ravel(), *parts])
    return Packed(Layout(padded, words, tuple(shapes)), flat)


def ancestor_words(span: Span, words: int) -> Ints:
    """int32 (T, W): bit j % 32 of word j // 32 says that a node sees node j of its span, itself included."""
    if span.chain:
        return _chain_words(len(span), words)
    sees = np.eye(len(span), words * 32, dtype=bool)
    for i, parent in enumerate(span.parents):
        if parent >= 0:
            sees[i] |= sees[parent]
    return _as_words(sees)


@lru_cache(maxsize=64)
def _chain_words(nodes: int, words: int) -> Ints:
    return _as_words(np.tri(nodes, words * 32, dtype=bool))


def _as_words(sees: NDArray[np.bool_]) -> Ints:
    return np.packbits(sees, axis=1, bitorder="little").view("<i4").astype(np.int32)


def _tiles(span: Span, row: int, nodes: int) -> list[tuple[int, int, int, int]]:
    return [
        (row, span.start + first, min(nodes, len(span) - first), first)
        for first in range(0, len(span), nodes)
    ]


def _power(count: int) -> int:
    """The power of two from `count` on."""
    return 1 << (count - 1).bit_length()
