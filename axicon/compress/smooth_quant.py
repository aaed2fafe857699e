"""SmoothQuant: what is hard to round in activations moves into weights, where int8 has room for it.

Xiao et al., arXiv:2211.10438, equation 4 and the released code: each input of a product that reads a norm
gets s = max |x|^alpha / max |w|^(1 - alpha), the norm is divided by s and the weight multiplied. Then weights
get 8 bits and a scale per output, activations 8 bits and a scale per row when the model runs (O1, O2). The
output product and `down` are rounded as they are.

Differs from the code: a channel that the sample left at 0 counts as the smallest of the others; weights of
norms are rounded before the product that reads them is scaled, so that no error comes from storing them;
`pairs: all` smooths the output product and `down` too, through the rows of value and `up` before them;
entries far above their row may stay out of the integer product, as in `llm_int8` (`relative`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

from axicon.compress.calibration import through
from axicon.compress.head import Head, pack_head
from axicon.compress.moments import Magnitude
from axicon.compress.rules import Rules, check_rules, products
from axicon.compress.scaling import Pair, float_copy, fold, keep_norms, living, norm_pairs, product_pairs
from axicon.compress.shared import gather
from axicon.errors import AxiconError
from axicon.model.decoder import Block, Decoder
from axicon.model.int8 import Int8Linear

SMALLEST = 1e-5


@dataclass(frozen=True, kw_only=True)
class SmoothQuant:
    alpha: float = 0.5
    """How much of it moves, 0 to 1. The paper's for OPT; 0.8 to 0.85 for the LLaMA family."""
    pairs: Literal["norms", "all"] = "norms"
    """norms: products that read a norm. all: those too that read values, or `up` through a gate or ReLU."""
    relative: float = 0.0
    """Activations of so many root mean squares of their row stay out of the integer product; 0: none do."""
    head: Head = "dense"
    """int8: logits come from an int8 copy of the head."""
    rules: Rules = field(default_factory=dict)
    """Another `alpha` or `relative`, or skip, by patterns of product names."""

    @property
    def needs_inputs(self) -> bool:
        return True

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise AxiconError(f"smooth_quant: alpha={self.alpha}: must be from 0 to 1")
        if self.relative < 0:
            raise AxiconError(f"smooth_quant: relative={self.relative}: is negative; 0 switches it off")
        check_rules(self, "smooth_quant", ("alpha", "relative"))

    def begin(self, model: Decoder) -> None:
        """Nothing to prepare."""

    def block(self, block: Block, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        todo = {name: method for name, _, method in products(self, block, "smooth_quant")}
        pairs = [
            pair
            for pair in self._pairs(block)
            if pair.product in todo and (pair.from_norm or pair.producer in todo)
        ]
        scaled = float_copy(block, "smooth_quant")
        dtype = next(block.parameters()).dtype
        seen = {pair.product: Magnitude(getattr(block, pair.product).in_features) for pair in pairs}
        gather(block, inputs, {name: [one] for name, one in seen.items()})
        for pair in pairs:
            largest_I = seen[pair.product].largest(f"smooth_quant: blocks.{block.index}.{pair.product}")
            weight_OI = getattr(scaled, pair.product).weight
            fold(scaled, pair, todo[pair.product].scales(pair, largest_I, weight_OI), dtype)
        keep_norms(block, scaled, pairs)
        for name, method in todo.items():
            product: nn.Linear = getattr(scaled, name)
            rounded = Int8Linear.from_linear(product, threshold=0.0, relative=method.relative)
            if rounded.bias is not None:
                rounded.bias = rounded.bias.to(dtype)
            setattr(block, name, rounded)
        return through(block, inputs)

    def finish(self, model: Decoder) -> None:
        pack_head(model, self.head)

    def scales(self, pair: Pair, largest_I: Tensor, weight_OI: Tensor) -> Tensor:
        """(C,): equation 4, for each channel of what makes the inputs."""
        input_C = living(pair.largest(largest_I))
        weight_C = pair.largest(weight_OI.abs().amax(0)).clamp(min=SMALLEST)
        return (input_C.pow(self.alpha) / weight_C.pow(1 - self.alpha)).clamp(min=SMALLEST)

    def _pairs(self, block: Block) -> list[Pair]:
        first = norm_pairs(block, "smooth_quant")
        return first if self.pairs == "norms" else [*first, *product_pairs(block)]
