"""LLM.int8(): every product in int8 with one scale per output and one per row, outliers apart.

Dettmers et al., arXiv:2208.07339. Needs no data. The arithmetic is in `axicon.model.int8`; here is which
layers get it. Differs from the paper: the head's logits come from an int8 copy too, while the embedding it
may be tied to stays as it is; `head=False` restores the paper's choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch

from torch import Tensor, nn

from axicon.errors import AxiconError
from axicon.model.decoder import Block, Decoder
from axicon.model.int8 import Int8Linear


@dataclass(frozen=True, kw_only=True)
class LLMInt8:
    threshold: float = 6.0
    """Activations of at least this magnitude stay out of the integer product; 0: none do."""
    relative: float = 0.0
    """The same, in units of the row's root mean square; 0: none do. 5 keeps 2 to 7 entries of a row apart."""
    head: bool = True
    """Pack a copy of the head for logits."""
    skip: tuple[str, ...] = ()
    """Patterns of products that stay dense, such as "*.down" or "blocks.0.*"."""

    @property
    def needs_inputs(self) -> bool:
        return False

    def __post_init__(self) -> None:
        for name, value in (("threshold", self.threshold), ("relative", self.relative)):
            if value < 0:
                raise AxiconError(f"llm_int8: {name} {value} is negative; 0 switches it off")

    def begin(self, model: Decoder) -> None:
        """Nothing to prepare."""

    def block(self, block: Block, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        for name, module in list(block.named_children()):
            if isinstance(module, nn.Linear) and not self._skips(f"blocks.{block.index}.{name}"):
                setattr(block, name, Int8Linear.from_linear(module, self.threshold, self.relative))
        return inputs

    def finish(self, model: Decoder) -> None:
        if self.head and not self._skips("lm_head"):
            # A tied embedding keeps its own weight: only the product is replaced.
            packed = Int8Linear.from_linear(model.lm_head, self.threshold, self.relative)
            model.lm_head = packed  # type: ignore[assignment]

    def _skips(self, name: str) -> bool:
        return any(fnmatch(name, pattern) for pattern in self.skip)
