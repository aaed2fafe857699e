"""The walk of a compressor over a model: begin, every block in order, finish.

The model comes in parts, each a decoder of its own over some of the blocks: the whole of it in memory, or one
block after the other from disk, where no more than the part at hand is in memory, beside the hidden states of
the calibration sample for a method that looks at some.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from axicon.compress.calibration import (
    Calibration,
    States,
    Store,
    embedded,
    finite,
    sequences,
    through,
)  # fmt: skip
from axicon.errors import AxiconError
from axicon.model.decoder import Block, Decoder
from axicon.model.shape import ModelShape
from axicon.protocols import Compressor, Reshaping


@torch.no_grad()
def walk(
    compressor: Compressor,
    parts: Iterable[Decoder],
    calibration: Calibration | None = None,
    keep: Callable[[Decoder], None] = lambda part: None,
) -> None:
    """Compress in place the parts of one model, in order, and hand each to `keep` when it is done.

    Hidden states stay in memory. No reference to a part is held when the next one is asked for.
    """
    states: States = ()
    for part in parts:
        states, _ = step(compressor, part, states, calibration)
        keep(part)
        part = None  # type: ignore[assignment]


@torch.no_grad()
def step(
    compressor: Compressor, part: Decoder, states: States, calibration: Calibration | None,
    store: Store = list,
) -> tuple[States, list[float]]:
    """Compress one part in place. `states` are those before its first block, which for the embedding's part
    are made here from the sample unless they are given.

    Returns the states behind its last block, kept by `store` (none behind the last of the model), and for
    each block how far its output is from the dense block's for the same first window: |y - dense| / |dense|.
    A block whose basis changes has no such error.
    """
    if compressor.needs_inputs and calibration is None:
        raise ValueError(f"{type(compressor).__name__} needs calibration inputs")
    if not compressor.needs_inputs:
        calibration = None
    shape = reshaped(compressor, part.shape)
    if shape is not part.shape and calibration is not None and calibration.dense:
        raise AxiconError(
            "calibration.inputs=dense: sliced blocks read another basis than dense ones hand on; "
            "take sequential")
    if part.has_embedding:
        compressor.begin(part)
        if calibration is None:
            states = ()
        elif not states:
            states = embedded(part, calibration.tokens_WT)
    errors = []
    for block in part.blocks:
        assert isinstance(block, Block)
        if calibration is None:
            compressor.block(block, states)
            continue
        wanted = block.index + 1 < part.shape.layers
        where = f"the output of blocks.{block.index}"
        before, first = states, states[0]
        dense = sequences(block, first) if shape is part.shape else None
        if wanted and calibration.dense:
            states = store(finite(through(block, before), where))
        after = compressor.block(block, before)
        if wanted and not calibration.dense:
            states = store(finite(after, where))
        got = next(iter(after))
        if dense is not None:
            errors.append(float((got.float() - dense.float()).norm() / dense.float().norm().clamp(min=1e-30)))
    if part.has_head:
        compressor.finish(part)
        states = ()
    part.shape = shape
    return states, errors


def reshaped(compressor: Compressor, shape: ModelShape) -> ModelShape:
    """What the compressor makes of a dense model's shape: the same object unless it changes widths."""
    return compressor.reshaped(shape) if isinstance(compressor, Reshaping) else shape


def compress(compressor: Compressor, model: Decoder, calibration: Calibration | None = None) -> Decoder:
    """Compress a whole `model` in place and return it; see `walk`."""
    walk(compressor, [model], calibration)
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
