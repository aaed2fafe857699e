"""Plan: which process holds which blocks of a model.

A *stage* is a range of blocks; the first also holds the embedding, the last the final norm and the head.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import nn

from axicon.errors import AxiconError
from axicon.model.decoder import Decoder
from axicon.model.shape import ModelShape


@dataclass(frozen=True, slots=True)
class Stage:
    """Blocks `first` .. `last - 1`."""

    first: int
    last: int

    @property
    def blocks(self) -> range:
        return range(self.first, self.last)

    def __str__(self) -> str:
        return f"{self.first}-{self.last - 1}"


@dataclass(frozen=True, slots=True)
class Plan:
    """The stages of a model in order. Raises ValueError unless they follow one another without a gap."""

    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        ends = [0, *(stage.last for stage in self.stages)]
        starts = [stage.first for stage in self.stages]
        if starts != ends[:-1] or any(a >= b for a, b in pairwise(ends)) or not starts:
            raise ValueError(f"stages {', '.join(map(str, self.stages))} are not the blocks in a row")

    @property
    def layers(self) -> int:
        return self.stages[-1].last

    def __len__(self) -> int:
        return len(self.stages)

    def __str__(self) -> str:
        """Stages x ranks of each, and the blocks: part of a deployment's fingerprint."""
        return f"{len(self)}x1: {', '.join(map(str, self.stages))}"


def balanced(shape: ModelShape, stages: int) -> Plan:
    """The split into this many stages whose largest is as small as it can be, by number of weights.

    A tied head counts in the last stage too, which needs its own copy. Raises AxiconError when there are more
    stages than blocks.
    """
    if not 1 <= stages <= shape.layers:
        raise AxiconError(
            f"{stages} stages for a model of {shape.layers} blocks: every stage needs a block, so ask for "
            f"1 to {shape.layers}")
    return Plan(_split(_weights(shape), stages))


def _split(weights: tuple[int, ...], stages: int) -> tuple[Stage, ...]:
    """Cut the row of weights into `stages` parts, the largest as small as possible."""
    sums = [0, *accumulate(weights)]

    @functools.cache
    def best(parts: int, stop: int) -> tuple[int, int]:
        """(the largest part, where the last one starts) for the first `stop` weights."""
        if parts == 1:
            return sums[stop], 0
        return min(
            (max(best(parts - 1, start)[0], sums[stop] - sums[start]), start)
            for start in range(parts - 1, stop)
        )

    found: list[Stage] = []
    stop = len(weights)
    for parts in range(stages, 0, -1):
        start = best(parts, stop)[1]
        found.append(Stage(start, stop))
        stop = start
    return tuple(reversed(found))


def _weights(shape: ModelShape) -> tuple[int, ...]:
    """Weights of every block; what lies before the first and behind the last counts with them."""
    with torch.device("meta"):
        whole = Decoder(shape)
    blocks = [_count(block) for block in whole.blocks]
    before = [whole.embed_tokens, whole.project_in, *([whole.embed_positions] if shape.rope is None else [])]
    behind = [whole.final_norm, whole.project_out, whole.lm_head]
    blocks[0] += sum(_count(module) for module in before if module is not None)
    blocks[-1] += sum(_count(module) for module in behind if module is not None)
    return tuple(blocks)


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
