"""Pruned products stored as their kept weights and a bitmap, where that saves bytes.

After Flash-LLM, arXiv:2309.10285, whose form is in `axicon.model.tiled_sparse`. Nothing is pruned here: it
packs what `magnitude`, `wanda` or `sparse_gpt` left, without loss. What would not save enough stays as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from axicon.compress.rules import Rules, check_rules, products
from axicon.errors import AxiconError
from axicon.model.decoder import Block, Decoder
from axicon.model.masks import kept
from axicon.model.tiled_sparse import TiledSparseLinear, stored_bytes

log = logging.getLogger("axicon")


@dataclass(frozen=True, kw_only=True)
class TiledSparse:
    min_saving: float = 0.25
    """Of a product's bytes; one that would save less stays dense. Below 0: may grow."""
    rules: Rules = field(default_factory=dict)
    """Other `min_saving`, or skip, by patterns of product names."""

    @property
    def needs_inputs(self) -> bool:
        return False

    def __post_init__(self) -> None:
        if not self.min_saving < 1:
            raise AxiconError(f"tiled_sparse: min_saving={self.min_saving:g}: a share, less than 1")
        check_rules(self, "tiled_sparse", ("min_saving",))

    def begin(self, model: Decoder) -> None:
        """Nothing to prepare."""

    def block(self, block: Block, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        ratios = {}
        for name, linear, method in products(self, block, "tiled_sparse"):
            ratio = ratios[name] = byte_ratio(linear)
            if ratio <= 1 - method.min_saving:
                setattr(block, name, TiledSparseLinear.from_linear(linear))
        stay = {name: ratio for name, ratio in ratios.items() if isinstance(getattr(block, name), nn.Linear)}
        if ratios and len(stay) == len(ratios):
            name = min(stay, key=stay.__getitem__)
            raise AxiconError(
                f"tiled_sparse: nothing in blocks.{block.index} would save {self.min_saving:.0%} of its "
                f"bytes; {name}, with the most zeros, would take {stay[name]:.0%}. Prune more first, for "
                "example chain=wanda,tiled_sparse, or ask for less with min_saving"
            )
        for name, ratio in stay.items():
            log.warning(
                "tiled_sparse: blocks.%d.%s stays dense, it would take %.0f %% of its bytes",
                block.index,
                name,
                100 * ratio,
            )
        return inputs

    def finish(self, model: Decoder) -> None:
        """The head stays as it is."""


def byte_ratio(linear: nn.Linear) -> float:
    """Stored bytes to those of the dense weight."""
    mask = kept(linear)
    count = int((linear.weight != 0).sum() if mask is None else mask.sum())
    itemsize = linear.weight.itemsize
    return stored_bytes(linear.out_features, linear.in_features, count, itemsize) / (
        linear.weight.numel() * itemsize
    )
