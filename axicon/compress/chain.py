"""Several methods as one: each block goes through all of them before the next block is read.

So later methods see what earlier ones made of the block, with inputs from blocks that all of them have
changed, and a chain is walked, resumed and checked as one method is. The order is slice, prune, repair, pack:
slicing mixes weights, which fills what was pruned; what is repaired is fitted to its mask; and packed weights
are final.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from axicon.compress.calibration import through
from axicon.errors import AxiconError
from axicon.model.decoder import Block, Decoder
from axicon.model.shape import ModelShape
from axicon.protocols import Compressor, Repairing, Reshaping

STAGES = ("slice", "prune", "repair", "pack")
REPAIR = STAGES.index("repair")


@dataclass(frozen=True)
class Chain:
    names: tuple[str, ...]
    """Of the methods, as users call them."""
    steps: tuple[Compressor, ...]

    def __post_init__(self) -> None:
        """Raises AxiconError for an order in which a method would undo, or cannot take, what is before it."""
        ranks = [_rank(step) for step in self.steps]
        ordered = [self.names[i] for i in sorted(range(len(ranks)), key=ranks.__getitem__)]
        if ranks != sorted(ranks):
            at = next(i for i in range(1, len(ranks)) if ranks[i] < ranks[i - 1])
            raise AxiconError(
                f"chain: {self.names[at]} behind {self.names[at - 1]} {_why(ranks[at], ranks[at - 1])}; "
                f"the order is {', '.join(ordered)}"
            )
        if REPAIR in ranks and STAGES.index("prune") not in ranks:
            name = self.names[ranks.index(REPAIR)]
            raise AxiconError(
                f"{name} brings a block back to what it was before this run pruned it: put it behind the "
                f"pruning, as chain=wanda,{name}; a model that is pruned already is repaired by "
                "axicon finetune recipes/perp.yaml"
            )
        for what in ("slice", "repair", "pack"):
            rank = STAGES.index(what)
            if ranks.count(rank) > 1:
                both = [name for name, one in zip(self.names, ranks, strict=True) if one == rank]
                raise AxiconError(f"chain: {' and '.join(both)} both {what} the weights; keep one of them")

    @property
    def needs_inputs(self) -> bool:
        return any(step.needs_inputs for step in self.steps)

    def reshaped(self, shape: ModelShape) -> ModelShape:
        for step in self._reshaping():
            shape = step.reshaped(shape)
        return shape

    def entered(self, block: Block, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        for step in self._reshaping():
            inputs = step.entered(block, inputs)
        return inputs

    def carried(self) -> dict[str, Tensor]:
        return {name: value for step in self._reshaping() for name, value in step.carried().items()}

    def carry(self, tensors: Mapping[str, Tensor]) -> None:
        for step in self._reshaping():
            step.carry(tensors)

    def _reshaping(self) -> list[Reshaping]:
        """At most one, as only one may slice."""
        return [step for step in self.steps if isinstance(step, Reshaping)]

    @property
    def more_passes(self) -> float:
        """See `axicon.compress.estimate`."""
        return sum(getattr(step, "more_passes", 0) for step in self.steps)

    @property
    def trained_windows(self) -> int:
        """The same."""
        return max(getattr(step, "trained_windows", 0) for step in self.steps)

    def begin(self, model: Decoder) -> None:
        for step in self.steps:
            step.begin(model)

    def block(self, block: Block, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        inputs = self.entered(block, inputs)
        repairs = [step for step in self.steps if isinstance(step, Repairing)]
        for step in self.steps:
            if STAGES[_rank(step)] != "slice":
                while repairs:
                    repairs.pop().remember(block)
            step.block(block, inputs)
        return through(block, inputs) if self.needs_inputs else inputs

    def finish(self, model: Decoder) -> None:
        for step in self.steps:
            step.finish(model)


def _rank(step: Compressor) -> int:
    return STAGES.index(getattr(step, "stage", "pack"))


def _why(rank: int, before: int) -> str:
    if STAGES[before] == "pack":
        return f"would have to {STAGES[rank]} weights that are packed"
    if STAGES[rank] == "prune":
        return "would prune what was repaired, and nothing would make good for that"
    return "would fill what was pruned"
