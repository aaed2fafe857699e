"""How attention of a block differs from the plain one: clipped softmax and gated heads.

Bondarenko et al., arXiv:2306.12929, sections 4.1 and 4.2. Both let a head do nothing without large logits, so
that a model trained with them has smaller outliers. In `config.json`, beside what the plain model's says, for
all blocks or as a list with one object per block, each key with its default where it is left out:

    "attention_variant": {"gamma": 0.0, "zeta": 1.0, "gate": "none", "gate_hidden": 4, "gate_scale": 1.0}

They change what a model computes: weights trained without them need training with them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from axicon.errors import AxiconError

if TYPE_CHECKING:
    from axicon.model.shape import BlockShape, ModelShape

KEY = "attention_variant"
GateKind = Literal["none", "linear", "mlp", "all_heads"]
GATES: tuple[GateKind, ...] = get_args(GateKind)
MOST_HIDDEN = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionVariant:
    """Raises ValueError for numbers that mean nothing."""

    gamma: float = 0.0
    """Softmax is stretched to gamma .. zeta and clipped to 0 .. 1: at most 0."""
    zeta: float = 1.0
    """At least 1."""
    gate: GateKind = "none"
    """What each head's output is multiplied by: a sigmoid of a linear function of the head's own part of the
    block's input, of a small MLP of it, or of a linear function of all of it.
    """
    gate_hidden: int = 4
    """Inside an `mlp` gate."""
    gate_scale: float = 1.0
    """What a gate is multiplied by: 1 / its start where gates join a trained model, which then begins as it
    was.
    """

    def __post_init__(self) -> None:
        if not (-1 < self.gamma <= 0 and 1 <= self.zeta < math.inf):
            raise ValueError(f"gamma={self.gamma:g}, zeta={self.zeta:g}: from above -1 to 0, and at least 1")
        if self.gate not in GATES:
            raise ValueError(f"gate={self.gate!r}: known are {', '.join(GATES)}")
        if not (1 <= self.gate_hidden <= MOST_HIDDEN and 0 < self.gate_scale < math.inf):
            raise ValueError(
                f"gate_hidden={self.gate_hidden}: from 1 to {MOST_HIDDEN}; gate_scale={self.gate_scale:g}: "
                "more than 0"
            )

    @property
    def clipped(self) -> bool:
        return self.gamma < 0 or self.zeta > 1

    @property
    def gated(self) -> bool:
        return self.gate != "none"

    @property
    def plain(self) -> bool:
        return not (self.clipped or self.gated)

    def __str__(self) -> str:
        clip = [f"softmax clipped to {self.gamma:g} .. {self.zeta:g}"] if self.clipped else []
        gate = [f"{self.gate} gates on its heads"] if self.gated else []
        return " and ".join(clip + gate) or "plain"


PLAIN = AttentionVariant()


def clipped(alpha: float, tokens: int) -> AttentionVariant:
    """The paper's clip for a model trained on so many tokens: gamma = -alpha / tokens. 2 to 4 does well for
    alpha; decoders do better with gates.
    """
    return AttentionVariant(gamma=-alpha / tokens)


def with_variants(shape: ModelShape, variants: Sequence[AttentionVariant]) -> ModelShape:
    """The shape with these, one per block. Raises ValueError where one does not fit its block."""
    if len(variants) != shape.layers:
        raise ValueError(f"{len(variants)} variants for {shape.layers} blocks")
    for index, (block, one) in enumerate(zip(shape.blocks, variants, strict=True)):
        if (reason := why_not(block, one)) is not None:
            raise ValueError(f"block {index}: {reason}")
    pairs = zip(shape.blocks, variants, strict=True)
    blocks = tuple(dataclasses.replace(block, attention=one) for block, one in pairs)
    return dataclasses.replace(shape, blocks=blocks)


def why_not(block: BlockShape, variant: AttentionVariant) -> str | None:
    """Why a block cannot have this, in one line."""
    own = variant.gate in ("linear", "mlp")
    if own and block.heads * block.head_width != block.width_in:
        return (
            f"gate={variant.gate} reads a head's own part of the input, and {block.heads} heads of "
            f"{block.head_width} channels are not its {block.width_in}; take gate=all_heads"
        )
    return None


def as_config(shape: ModelShape) -> dict[str, Any] | list[dict[str, Any]] | None:
    """The value of `attention_variant`; None for a plain model."""
    variants = [block.attention for block in shape.blocks]
    if all(one.plain for one in variants):
        return None
    found = [dataclasses.asdict(one) for one in variants]
    return found[0] if len(set(variants)) == 1 else found


def read(shape: ModelShape, found: Any) -> ModelShape:
    """The shape of a model whose config has `found` beside what makes `shape`. Raises AxiconError."""
    per_block = found if isinstance(found, list) else [found] * shape.layers
    try:
        return with_variants(shape, [_read_one(one) for one in per_block])
    except ValueError as e:
        raise AxiconError(f"config.json: {KEY}: {e}") from None


def _read_one(found: Any) -> AttentionVariant:
    defaults = dataclasses.asdict(PLAIN)
    if not isinstance(found, Mapping) or not found.keys() <= defaults.keys():
        raise ValueError(f"{str(found)[:80]} is not an object of {', '.join(defaults)}")
    for key, value in found.items():
        wanted = type(defaults[key])
        fits = isinstance(value, (int, float) if wanted is float else wanted) and not isinstance(value, bool)
        if not fits:
            raise ValueError(f"{key} is {value!r}")
    return AttentionVariant(**cast("dict[str, Any]", found))
