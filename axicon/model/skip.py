"""A copy of a model with fewer blocks: the cheapest model that has the same vocabulary.

Men et al., arXiv:2403.03853: a block that hands on almost what it was given (cosine similarity of its input
and output) is missed least. Here all go at once, measured on one text.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from axicon.errors import AxiconError
from axicon.model.decoder import Block, Decoder


@torch.inference_mode()
def influence(decoder: Decoder, tokens_T: Tensor) -> list[float]:
    """How much each block changes what it is given, over the tokens of one text: 1 - cosine similarity."""
    found: list[float] = []

    def note(block: nn.Module, inputs: tuple[Tensor, ...], output_ND: Tensor) -> None:
        x_ND, y_ND = inputs[0].float(), output_ND.float()
        # Where the residual stream changes its width there is nothing to skip.
        same = x_ND.shape == y_ND.shape
        found.append(1 - float(cosine_similarity(x_ND, y_ND, dim=-1).mean()) if same else torch.inf)

    hooks = [block.register_forward_hook(note) for block in decoder.blocks]
    try:
        decoder.logits(tokens_T[None])
    finally:
        for hook in hooks:
            hook.remove()
    return found


def skip_blocks(decoder: Decoder, count: int, tokens_T: Tensor) -> Decoder:
    """Copies of the `count` blocks that change most of a text, and of all before and behind them.

    Raises AxiconError for a number that the model does not have.
    """
    shape = decoder.shape
    if not 1 <= count < shape.layers:
        raise AxiconError(
            f"a draft of {count} blocks: the model has {shape.layers}, keep 1 to {shape.layers - 1}"
        )
    shares = influence(decoder, tokens_T)
    kept = sorted(sorted(range(shape.layers), key=lambda i: -shares[i])[:count])
    with torch.device("meta"):
        draft = Decoder(dataclasses.replace(shape, blocks=tuple(shape.blocks[i] for i in kept)))
    blocks = [cast(Block, copy.deepcopy(decoder.blocks[i])) for i in kept]
    for index, block in enumerate(blocks):
        block.index = index
    for name, module in decoder.named_children():
        setattr(draft, name, nn.ModuleList(blocks) if name == "blocks" else copy.deepcopy(module))
    return draft.eval()
