"""The walk of a compressor over a model: begin, every block in order, finish.

The model comes in parts, each a decoder of its own over some of the blocks: the whole of it in memory, or one
block after the other from disk, where no more than the part at hand is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from axicon.model.decoder import Block, Decoder
from axicon.protocols import Compressor


@torch.no_grad()
def walk(
    compressor: Compressor,
    parts: Iterable[Decoder],
    inputs: Sequence[Tensor] = (),
    keep: Callable[[Decoder], None] = lambda part: None,
) -> None:
    """Compress in place the parts of one model, in order, and hand each to `keep` when it is done.

    `inputs` are the hidden states (B, T, D) before the first block. No reference to a part is held when the
    next one is asked for.
    """
    if compressor.needs_inputs and not inputs:
        raise ValueError(f"{type(compressor).__name__} needs calibration inputs")
    for part in parts:
        if part.has_embedding:
            compressor.begin(part)
        for block in part.blocks:
            assert isinstance(block, Block)
            inputs = compressor.block(block, inputs)
        if part.has_head:
            compressor.finish(part)
        keep(part)
        block = part = None  # type: ignore[assignment]


def compress(compressor: Compressor, model: Decoder, inputs: Sequence[Tensor] = ()) -> Decoder:
    """Compress a whole `model` in place and return it; see `walk`."""
    walk(compressor, [model], inputs)
    return model


@dataclass(frozen=True)
class Compress:
    """A compressor that needs no data, as something to do to a decoder. Its `str` is the method and its
    settings.
    """

    compressor: Compressor

    def __call__(self, decoder: Decoder) -> Decoder:
        return compress(self.compressor, decoder)

    def __str__(self) -> str:
        return repr(self.compressor)
