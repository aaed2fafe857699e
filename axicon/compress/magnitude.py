"""Magnitude pruning: the smallest weights go. Needs no data.

Han et al., arXiv:1506.02626, without retraining. `matrix` ranks each matrix of the checkpoint as a whole, as
in the code of SparseGPT and Wanda, which removes one weight more and equal ones together; here counts are
exact. `row` ranks the inputs of each output apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from axicon.compress.prune import UNSTRUCTURED, Pruning, kept_best, matrices, to_prune
from axicon.model.decoder import Block
from axicon.model.masks import prune


@dataclass(frozen=True, kw_only=True)
class Magnitude(Pruning):
    kind: ClassVar[str] = "magnitude"
    scope: Literal["matrix", "row"] = "matrix"
    """What is ranked together where there is no pattern."""

    @property
    def needs_inputs(self) -> bool:
        return False

    def block(self, block: Block, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        for name, linear, method, before_OI in to_prune(self, block):
            score_OI = linear.weight.detach().float().abs()
            parts = [
                method.kept(score_OI[rows], None if before_OI is None else before_OI[rows])
                for rows in matrices(block, name)
            ]
            prune(linear, torch.cat(parts))
        return inputs

    def kept(self, score_OI: Tensor, before_OI: Tensor | None = None) -> Tensor:
        """bool (O, I) of one matrix."""
        if self.pattern != UNSTRUCTURED or self.scope == "row":
            return kept_best(score_OI, self, before_OI)
        before = None if before_OI is None else before_OI.reshape(1, -1)
        return kept_best(score_OI.reshape(1, -1), self, before).view_as(score_OI)
