"""Group int4: weights rounded to 4 or 8 bits by the largest magnitude of their row or group. No data.

GLM-130B, arXiv:2210.02414, section 3.3 and its released code: symmetric, one float16 scale per output, codes
-7 .. 7 (-127 .. 127 at 8 bits), activations untouched; embedding, norms, biases and head stay as they are.

Differs from the code: codes are clamped, which matters where a scale is so small that float16 rounds it
coarsely; a row may be cut into groups (`group`), without which small models lose too much at 4 bits; and
`head: int8` may give logits an int8 copy of the head, as `llm_int8` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

from axicon.compress.grid import Grid, groups_of, packed
from axicon.compress.head import Head, pack_head
from axicon.compress.rules import Rules, check_rules, products
from axicon.errors import AxiconError
from axicon.model.decoder import Block, Decoder
from axicon.model.group_int import GroupIntLinear


@dataclass(frozen=True, kw_only=True)
class GroupInt4:
    bits: int = 4
    """4 or 8."""
    group: int = -1
    """Columns that share a scale; -1: the whole row."""
    head: Head = "dense"
    """int8: logits come from an int8 copy of the head."""
    rules: Rules = field(default_factory=dict)
    """Other `bits` or `group`, or skip, by patterns of product names."""

    @property
    def needs_inputs(self) -> Literal[False]:
        return False

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise AxiconError(f"group_int4: bits={self.bits}: known are 4 and 8")
        check_rules(self, "group_int4")

    def begin(self, model: Decoder) -> None:
        """Nothing to prepare."""

    def block(self, block: Block, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        for name, linear, method in products(self, block, "group_int4"):
            setattr(block, name, quantise(linear, method.bits, method.group))
        return inputs

    def finish(self, model: Decoder) -> None:
        pack_head(model, self.head)


def quantise(linear: nn.Linear, bits: int, group: int) -> GroupIntLinear:
    """Round to the absmax grid of each row or group."""
    weight = groups_of(linear.weight.detach().float(), group)
    grid = Grid.fit(weight, bits, "absmax")
    return packed(grid.codes(weight).view(linear.weight.shape), grid, linear.bias, group)
