"""Gates that join the heads of a model which was trained without them (arXiv:2306.12929, section 4.2).

They are half open, doubled, and hardly look at their input, so the model begins as it was; then they train.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from axicon.errors import AxiconError
from axicon.kernels.directions import normals
from axicon.model.attention import HeadGate
from axicon.model.decoder import Block, Decoder
from axicon.model.variant import GateKind, why_not, with_variants

OPEN = 0.5


@torch.no_grad()
def join_gates(model: Decoder, gate: GateKind, spread: float, seed: int) -> None:
    """Gates on all heads of all blocks; `spread` is the standard deviation of their weights. Raises
    AxiconError for blocks that have some, or whose heads these do not fit.
    """
    variants = [
        dataclasses.replace(block.attention, gate=gate, gate_scale=1 / OPEN) for block in model.shape.blocks
    ]
    for shape, variant in zip(model.shape.blocks, variants, strict=True):
        if shape.attention.gated:
            raise AxiconError("the heads of this model have gates already; scheme=full trains them")
        if shape.attention_shortcut:
            raise AxiconError("gates do not join a sliced model, whose stream they would read in its basis")
        if (reason := why_not(shape, variant)) is not None:
            raise AxiconError(f"scheme.gate: {reason}")
    model.shape = with_variants(model.shape, variants)
    dtype, device = model.dtype, model.device
    for index, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        block.shape = model.shape.blocks[model.first + index]
        block.variant = block.shape.attention
        made = HeadGate(block.variant, block.shape.width_in, block.shape.heads)
        for place, (name, value) in enumerate(made.named_parameters()):
            if name.endswith("bias"):
                continue
            drawn = normals(seed, 2 * (model.first + index) + place, 0, value.numel()).view(value.shape)
            value.copy_(drawn * (1 / math.sqrt(value.shape[-1]) if name == "up_weight" else spread))
        made.start(OPEN)
        block.head_gate = made.to(device, dtype).requires_grad_(False)
