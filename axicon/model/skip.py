"""A copy of a model with fewer blocks: the cheapest model that has the same vocabulary."""

from __future__ import annotations

import copy
import dataclasses
from typing import cast

import torch
from torch import nn

from axicon.errors import AxiconError
from axicon.model.decoder import Block, Decoder


def spread(layers: int, count: int) -> list[int]:
    """`count` of so many blocks, first and last among them, the others evenly between."""
    if count == 1:
        return [0]
    return [round(i * (layers - 1) / (count - 1)) for i in range(count)]


def skip_blocks(decoder: Decoder, count: int) -> Decoder:
    """Copies of `count` blocks, and of everything before and behind them.

    Raises AxiconError for a number that the model does not have.
    """
    shape = decoder.shape
    if not 1 <= count < shape.layers:
        raise AxiconError(
            f"a draft of {count} blocks: the model has {shape.layers}, keep 1 to {shape.layers - 1}"
        )
    kept = spread(shape.layers, count)
    with torch.device("meta"):
        draft = Decoder(dataclasses.replace(shape, blocks=tuple(shape.blocks[i] for i in kept)))
    blocks = [cast(Block, copy.deepcopy(decoder.blocks[i])) for i in kept]
    for index, block in enumerate(blocks):
        block.index = index
    for name, module in decoder.named_children():
        setattr(draft, name, nn.ModuleList(blocks) if name == "blocks" else copy.deepcopy(module))
    return draft.eval()
