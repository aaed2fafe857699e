"""The walk of a compressor over a model, in memory: begin, every block in order, finish."""

from __future__ import annotations

from collections.abc import Sequence

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
