"""What a request that asks for details is told about its tokens and its cache. Nobody else pays for it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from axicon.generate.request import Delta, Kept
from axicon.generate.scheduler import Work
from axicon.protocols import Runner

COLUMNS = 256
"""The most columns of a picture: neighbouring positions share one."""
DIGITS = "0123456789"


def pictured(delta: Delta, one: Work, runner: Runner, cut: Collection[int]) -> Delta:
    """With what the cache of a bounded row holds, where that is news: behind the prompt, when it is one of
    the rows that were `cut`, and at the end.
    """
    stream = one.stream
    row = stream.left if stream.row < 0 else stream.row
    begins = one.start < len(stream.request.prompt)
    if not (begins or row in cut or delta.finish_reason):
        return delta
    held, committed = runner.positions(row), one.stop if begins else one.start
    return delta if held is None else replace(delta, kept=picture(held, committed))


def picture(held: Sequence[Sequence[Tensor]], committed: int) -> Kept:
    """`held` are the positions in the cache, per layer and head, of `committed` tokens."""
    per_column = max(1, -(-committed // COLUMNS))
    columns = -(-committed // per_column)
    all_of = torch.full((columns,), per_column)
    if columns:
        all_of[-1] = committed - (columns - 1) * per_column
    layers = []
    for heads in held:
        counts = torch.bincount(torch.cat(list(heads)).long() // per_column, minlength=columns)
        most = all_of * len(heads)
        # Only nothing is 0, and only everything is 9.
        shades = (counts * 9 // most).clamp(max=9)
        shades = torch.where(counts > 0, shades.clamp(min=1), shades)
        layers.append("".join(DIGITS[shade] for shade in shades.tolist()))
    return Kept(committed, per_column, tuple(layers))
