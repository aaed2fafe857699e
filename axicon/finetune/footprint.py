"""What finetuning through a ring of buffers takes, from a model's shape alone.

resident weights + buffers + two streams of activations + the widest product and the logits of one pass
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from axicon.finetune.scored import HEAD_ROWS
from axicon.finetune.shifted import PIECE
from axicon.model.decoder import Decoder
from axicon.model.shape import ModelShape

GB = 1e9


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes, of weights and numbers that have `itemsize` bytes each."""

    weights: int
    """Of the whole model."""
    resident: int
    """Of what is in no block: embeddings, final norm, a head of its own."""
    buffers: int
    streams: int
    """Hidden states between blocks, at both points."""
    workspace: int
    """Inside one block at one point, moved pieces of weights, and logits."""

    @property
    def total(self) -> int:
        return self.resident + self.buffers + self.streams + self.workspace

    @property
    def share(self) -> float:
        """Of the weights, that are in memory."""
        return (self.resident + self.buffers) / self.weights

    def describe(self) -> str:
        return (
            f"{self.weights / GB:.1f} GB of weights; in memory {self.total / GB:.2f} GB: "
            f"{self.resident / GB:.2f} resident, {self.buffers / GB:.2f} buffers, "
            f"{self.streams / GB:.2f} hidden states, {self.workspace / GB:.2f} workspace"
        )


def predict(
    shape: ModelShape, *, batch: int, tokens: int, itemsize: int = 2, buffers: int = 3, points: int = 2
) -> Footprint:
    """Of a step on `batch` rows of `tokens` tokens, measured at `points` points."""
    with torch.device("meta"):
        model = Decoder(shape)
    per_block = [sum(p.numel() for p in block.parameters()) * itemsize for block in model.blocks]
    whole = sum(p.numel() for p in model.parameters()) * itemsize
    rows = batch * tokens
    widths = [block.width_in for block in shape.blocks]
    return Footprint(
        weights=whole,
        resident=whole - sum(per_block),
        buffers=buffers * max(per_block),
        streams=points * rows * max(widths) * itemsize,
        workspace=max(_inside(shape, i, rows) for i in range(shape.layers)) * itemsize
        + PIECE * itemsize
        + 3 * min(rows, HEAD_ROWS) * shape.vocab * 4,
    )


def _inside(shape: ModelShape, index: int, rows: int) -> int:
    """Numbers alive at once in a block: queries, keys, values and outputs of heads, or the MLP."""
    block = shape.blocks[index]
    attention = (2 * block.heads + 2 * block.kv_heads) * block.head_width + block.width_in
    mlp = (3 if block.gated else 2) * block.hidden + block.width_middle
    return rows * max(attention, mlp)
