"""Wanda: of each output the weights go whose size times the size of their input is smallest.

Sun et al., arXiv:2306.11695, equation 1 and the released code: |W| * ||X||, with the norm of each input over
all rows of the sample, compared within an output; or within every m neighbouring inputs for n:m. Weights that
stay do not change. Norms are plain sums, as only their ratios matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from axicon.compress.calibration import through
from axicon.compress.moments import Squares
from axicon.compress.prune import Pruning, kept_best, to_prune
from axicon.compress.shared import gather
from axicon.model.decoder import Block
from axicon.model.masks import prune


@dataclass(frozen=True, kw_only=True)
class Wanda(Pruning):
    kind: ClassVar[str] = "wanda"

    def block(self, block: Block, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        todo = list(to_prune(self, block))
        seen = {name: Squares(linear.in_features) for name, linear, _, _ in todo}
        if seen:
            gather(block, inputs, {name: [one] for name, one in seen.items()})
        for name, linear, method, before_OI in todo:
            norm_I = seen[name].sum(f"wanda: blocks.{block.index}.{name}").sqrt()
            prune(linear, kept_best(linear.weight.detach().float().abs() * norm_I, method, before_OI))
        return through(block, inputs)
