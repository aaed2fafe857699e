"""The numerics path: which row counts a deployment computes, so that no result depends on its batch mates.

A matrix product may change bits with its row count (measured: float32 linear below 8 rows, bfloat16 linear
at one row and 49,152 outputs). So blocks and head are probed once at load, and steps are padded to a
multiple of the smallest tile from which on every probed count gives equal bits. If long chunks agree too,
decode rows and prompt chunks share one pass; otherwise every chunk goes alone, in a shape that depends on
its request only.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from axicon.model.decoder import Block, Decoder

log = logging.getLogger("axicon")

COUNTS = (*range(1, 21), 24, 31, 32, 33, 48, 63, 64, 65, 96, 128, 129, 192, 256, 257, 320, 512, 1024)
"""Row counts that are tried, up to what a step may have."""
TILE_LIMIT = 64
MOST_PROBED = 1024
FEW = 4
COMPARED = 1 << 16
"""Numbers that are compared for so few rows, at least."""


@dataclass(frozen=True, slots=True)
class NumericsPath:
    body_tile: int
    """Rows through the blocks are padded to a multiple of this."""
    head_tile: int
    merged: bool
    """Decode rows and prompt chunks share one pass."""

    def __str__(self) -> str:
        chunks = "with" if self.merged else "apart from"
        return f"blocks by {self.body_tile} rows, head by {self.head_tile}, chunks {chunks} decode rows"


ANY_ROWS = NumericsPath(1, 1, True)
"""Where a row's bits are its own by construction."""


def padded(rows: int, tile: int) -> int:
    return -(-rows // tile) * tile


@torch.inference_mode()
def choose_path(decoder: Decoder, max_rows: int, prefill_chunk: int) -> NumericsPath:
    """Probe every distinct block shape and the head. Takes about a second for a small model."""
    path = NumericsPath(padded(max_rows, TILE_LIMIT), padded(max_rows, TILE_LIMIT), False)
    for merged, most in ((True, max_rows + prefill_chunk), (False, max_rows)):
        blocks, heads = (
            [_Probe(call, *_rows(decoder, most, width)) for call, width in functions]
            for functions in (_block_functions(decoder), _head_functions(decoder))
        )
        body_tile, head_tile = _smallest_tile(blocks), _smallest_tile(heads)
        if body_tile and head_tile:
            path = NumericsPath(body_tile, head_tile, merged)
            break
    log.info("numerics path: %s", path)
    return path


@torch.inference_mode()
def bits(decoder: Decoder) -> str:
    """Digest of what blocks and head compute on fixed rows, to compare thread counts."""
    digest = hashlib.sha256()
    for call, width in (*_block_functions(decoder), *_head_functions(decoder)):
        x, positions = _rows(decoder, 256, width)
        for count in (1, 8, 64, 256):
            digest.update(call(x[:count].clone(), positions[:count]).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


RowFunction = Callable[[Tensor, Tensor], Tensor]
"""(x (N, width), positions (N,)) -> (N, ...), each row from its own row."""


def _block_functions(decoder: Decoder) -> list[tuple[RowFunction, int]]:
    """Every distinct block shape with its input width."""
    return [(_block_function(decoder, block), block.shape.width_in) for block in _distinct_blocks(decoder)]


def _head_functions(decoder: Decoder) -> list[tuple[RowFunction, int]]:
    """The head with its input width; none in a stage that does not hold it."""
    if not decoder.has_head:
        return []
    return [(lambda x, _: decoder.head(x), decoder.shape.blocks[-1].width_out)]


def _rows(decoder: Decoder, most: int, width: int) -> tuple[Tensor, Tensor]:
    """At least `most` rows, if that can be afforded, and a whole number of the largest tiles."""
    count = padded(min(most, MOST_PROBED), TILE_LIMIT)
    x = torch.randn(count, width, generator=torch.Generator().manual_seed(0)).to(decoder.dtype)
    return x, torch.arange(count) % decoder.shape.max_positions


def _distinct_blocks(decoder: Decoder) -> Iterable[Block]:
    seen: dict[object, Block] = {}
    for block in decoder.blocks:
        key = tuple((name, tuple(p.shape), p.dtype) for name, p in block.state_dict().items())
        seen.setdefault((key, block.shape), cast(Block, block))
    return seen.values()


def _block_function(decoder: Decoder, block: Block) -> RowFunction:
    def attend(block: Block, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> Tensor:
        """Mixes what each row computed without mixing rows."""
        return q_NHK + (k_NGK + v_NGK).repeat_interleave(q_NHK.shape[1] // k_NGK.shape[1], dim=1)

    return lambda x, positions: block(x, decoder.rotary(positions), attend)


class _Probe:
    """Compares a row-wise function at smaller row counts with the same rows, elsewhere, of a long one.

    A sum in another order seldom rounds to another bit, in bfloat16 once in ten thousand. So a few rows,
    which kernels like to treat in their own way, are tried at many places, and with turned channels until
    enough numbers were compared.
    """

    def __init__(self, call: RowFunction, x: Tensor, positions: Tensor) -> None:
        self._call, self._x, self._positions = call, x, positions
        self.rows = len(x)
        self._long = [call(x.clone(), positions)]
        self._enough = -(-COMPARED // self._long[0][0].numel())
        """Rows that hold so many numbers."""
        self._agrees: dict[int, bool] = {}

    def agrees(self, rows: int) -> bool:
        if rows not in self._agrees:
            most = max(rows, min(self.rows, self._enough)) if rows <= FEW else rows
            turns = min(self._x.shape[1], -(-self._enough // self.rows)) if rows <= FEW else 1
            self._agrees[rows] = all(self._same(turn, rows, most) for turn in range(turns))
        return self._agrees[rows]

    def _same(self, turn: int, rows: int, most: int) -> bool:
        """Whether the last `most` rows, so many at a time, have the bits of the long run."""
        x = self._x.roll(turn, 1)
        if turn == len(self._long):
            self._long.append(self._call(x.clone(), self._positions))
        for first in range(self.rows - rows, max(-1, self.rows - most - 1), -rows):
            own = slice(first, first + rows)
            if not torch.equal(self._call(x[own].clone(), self._positions[own]), self._long[turn][own]):
                return False
        return True


def _smallest_tile(probes: Sequence[_Probe]) -> int | None:
    """The smallest power of two all of whose probed multiples agree, or None."""
    for exponent in range(TILE_LIMIT.bit_length()):
        tile = 1 << exponent
        if all(probe.agrees(n) for probe in probes for n in COUNTS if n % tile == 0 and n <= probe.rows):
            return tile
    return None
