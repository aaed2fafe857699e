"""Scales that move from what makes a product's inputs into its weight, at no cost when the model runs.

    W x = (W diag(s)) (diag(1 / s) x)

1 / s goes into what stands before the product: weight and bias of a norm, rows of the value product before
the output product, rows of `up` before `down`. Blocks are scaled as float32 copies, so that a weight is
rounded once: to its grid.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from axicon.errors import AxiconError
from axicon.model.decoder import Block, Norm


@dataclass(frozen=True)
class Pair:
    """Who makes the inputs of which product."""

    producer: str
    """A norm or a product of the block."""
    product: str
    rows: slice | None = None
    """Of a product that makes them: the rows that do."""
    repeats: int = 1
    """Query heads that read the same values: so many inputs share a channel of the producer."""
    head_width: int = 1
    """Neighbouring channels that are repeated together."""

    @property
    def from_norm(self) -> bool:
        return self.rows is None

    def spread(self, scale_C: Tensor) -> Tensor:
        """(I,): a scale of each input from that of each channel of the producer."""
        heads = scale_C.view(-1, 1, self.head_width)
        return heads.expand(-1, self.repeats, -1).reshape(-1)

    def largest(self, value_I: Tensor) -> Tensor:
        """(C,): of the inputs that share a channel, the largest value."""
        return value_I.view(-1, self.repeats, self.head_width).amax(1).flatten()


def norm_pairs(block: Block, method: str) -> list[Pair]:
    """The products that read a norm. Raises AxiconError, which begins with `method`, where a norm's output
    also goes elsewhere, or where it has no weight to scale.
    """
    if not block.norm_first:
        raise AxiconError(
            f"{method}: the norms of this model follow the residual sum, which carries their output on, so "
            "no scale can go into them; take gptq or llm_int8"
        )
    if block.attention_norm.weight is None:
        raise AxiconError(
            f"{method}: the norms of this model have no weights that a scale could go into; "
            "take gptq or llm_int8"
        )
    return [Pair("attention_norm", "qkv"), Pair("mlp_norm", "gate_up" if block.gated else "up")]


def product_pairs(block: Block) -> list[Pair]:
    """The products that read another one through something a positive factor passes: values through
    attention, `up` through its gate or through ReLU. Other activations bend, so `down` is left out there.
    """
    shape = block.shape
    pairs = [Pair("qkv", "out", shape.parts("qkv")["v"], shape.heads // shape.kv_heads, shape.head_width)]
    if block.gated:
        pairs.append(Pair("gate_up", "down", shape.parts("gate_up")["up"]))
    elif block.activate is F.relu:
        pairs.append(Pair("up", "down", slice(0, shape.hidden)))
    return pairs


def float_copy(block: Block, method: str) -> Block:
    """A copy in float32. Raises AxiconError, which begins with `method`, for a weight that is no number."""
    for name, value in block.named_parameters():
        if not value.isfinite().all():
            raise AxiconError(
                f"{method}: blocks.{block.index}.{name.rpartition('.')[0]} holds NaN or infinite weights; "
                "the model is damaged"
            )
    return copy.deepcopy(block).float()


def fold(scaled: Block, pair: Pair, scale_C: Tensor, dtype: torch.dtype) -> Tensor:
    """Scale a float32 copy of a block, whose norms will be stored as `dtype`. `scale_C` has a positive number
    for each channel of the producer.

    Returns the scale of each of the product's inputs. It differs a little from what is asked for where a
    norm comes first: weights of norms are rounded here, and the product makes good what they are rounded by.
    """
    producer, product = getattr(scaled, pair.producer), getattr(scaled, pair.product)
    if isinstance(producer, Norm):
        gate = scaled.head_gate if pair.producer == "attention_norm" else None
        assert producer.weight is not None
        weight_C = (producer.weight / scale_C).to(dtype).float()
        scale_C = torch.where(weight_C != 0, producer.weight / weight_C, scale_C)
        producer.weight = _parameter(weight_C)
        if producer.bias is not None:
            producer.bias = _parameter(producer.bias / scale_C)
        if gate is not None:  # reads the norm too
            gate.scale_inputs(scale_C)
    else:
        producer.weight[pair.rows] /= scale_C[:, None]
        if producer.bias is not None:
            producer.bias[pair.rows] /= scale_C
    scale_I = pair.spread(scale_C)
    product.weight *= scale_I
    return scale_I


def keep_norms(block: Block, scaled: Block, pairs: Iterable[Pair]) -> None:
    """Give a block the norms of its scaled copy, in its own dtype, and the gates that read one."""
    for pair in pairs:
        gate, scaled_gate = block.head_gate, scaled.head_gate
        if gate is not None and scaled_gate is not None and pair.producer == "attention_norm":
            for name, value in scaled_gate.named_parameters():
                setattr(gate, name, _parameter(value.to(gate.bias.dtype)))
        norm, new = getattr(block, pair.producer), getattr(scaled, pair.producer)
        if isinstance(norm, Norm) and norm.weight is not None:
            dtype = norm.weight.dtype  # new parameters: the old ones may be pages of a file
            norm.weight = _parameter(new.weight.to(dtype))
            norm.bias = None if norm.bias is None else _parameter(new.bias.to(dtype))


def living(size_C: Tensor) -> Tensor:
    """Magnitudes without zeros: a channel that the sample left at 0 counts as the smallest of the others."""
    alive = size_C > 0
    return torch.where(alive, size_C, size_C[alive].min()) if alive.any() else torch.ones_like(size_C)


def _parameter(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)
