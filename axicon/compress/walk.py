"""The walk of a compressor over a model, in memory: begin, every block in order, finish."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from axicon.model.decoder import Block, Decoder
from axicon.protocols import Compressor


@torch.no_grad()
def compress(compressor: Compressor, model: Decoder, inputs: Sequence[Tensor] = ()) -> Decoder:
    """Compress `model` in place and return it. `inputs` are the hidden states (B, T, D) before the first
    block.
    """
    if compressor.needs_inputs and not inputs:
        raise ValueError(f"{type(compressor).__name__} needs calibration inputs")
    compressor.begin(model)
    for block in model.blocks:
        assert isinstance(block, Block)
        inputs = compressor.block(block, inputs)
    compressor.finish(model)
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
