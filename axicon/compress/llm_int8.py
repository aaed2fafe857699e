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
    head: bool = True
    """Pack a copy of the head for logits."""
    skip: tuple[str, ...] = ()
    """Patterns of products that stay dense, such as "*.down" or "blocks.0.*"."""

    @property
    def needs_inputs(self) -> bool:
        return False

    def __post_init__(self) -> None:
        if self.threshold < 0:
            raise AxiconError(f"llm_int8: threshold {self.threshold} is negative; 0 switches outliers off")

    def begin(self, model: Decoder) -> None:
        """Nothing to prepare."""

    def block(self, block: Block, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        for name, module in list(block.named_children()):
            if isinstance(module, nn.Linear) and not self._skips(f"blocks.{block.index}.{name}"):
                setattr(block, name, Int8Linear.from_linear(module, self.threshold))
        return inputs

    def finish(self, model: Decoder) -> None:
        if self.head and not self._skips("lm_head"):
            # A tied embedding keeps its own weight: only the product is replaced.
            model.lm_head = Int8Linear.from_linear(model.lm_head, self.threshold)  # type: ignore[assignment]

    def _skips(self, name: str) -> bool:
        return any(fnmatch(name, pattern) for pattern in self.skip)
