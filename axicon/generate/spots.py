"""Where tokens are drawn in a step: behind a stream's last token, and behind the guesses that were right."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from axicon.generate.sampling.sample import Row, sample
from axicon.generate.scheduler import Work
from axicon.generate.speculate import Speculator
from axicon.protocols import Sampler

log = logging.getLogger("axicon")


class Spot(NamedTuple):
    """One place."""

    work: Work
    root: int
    """Row of the last token's logits; those of the tree's nodes lie behind it."""
    node: int = -1
    """The node of the tree, -1 for the last token."""

    @property
    def row(self) -> int:
        return self.root + 1 + self.node

    def child(self, token: int) -> int | None:
        """The first child that holds this token."""
        tree = self.work.tree
        return next((i for i in tree.children(self.node) if tree.tokens[i] == token), None)


def rows_of(x_WV: Tensor, index: Sequence[int]) -> Tensor:
    """These rows; a view where they are neighbours, as copying a row takes as long as finding its maximum."""
    first, count = index[0], len(index)
    return x_WV[first : first + count] if index == list(range(first, first + count)) else x_WV[index]


def choose(
    spots: Sequence[Spot], logits_RV: Tensor, rows: Sequence[Row], sampler: Sampler, speculator: Speculator
) -> list[int | None]:
    """The token behind each spot, None where there is none: drawn, or judged where guesses are rejected by
    chance.
    """
    judged = [r for r, spot in enumerate(spots) if speculator.judges(spot.work, spot.node)]
    if not judged:
        return _sample(logits_RV, rows, sampler)
    tokens: list[int | None] = [None] * len(rows)
    drawn = [r for r in range(len(rows)) if r not in judged]
    if drawn:
        found = _sample(logits_RV[drawn], [rows[r] for r in drawn], sampler)
        for r, token in zip(drawn, found, strict=True):
            tokens[r] = token
    for r in judged:
        try:
            tokens[r] = speculator.judge(spots[r].work, spots[r].node, logits_RV[r], rows[r], sampler)
        except Exception:
            log.exception("verifying a guess of request %s failed", spots[r].work.stream.request.id)
    return tokens


def _sample(logits_RV: Tensor, rows: Sequence[Row], sampler: Sampler) -> list[int | None]:
    """All rows at once; one by one if that fails, to find the row it fails for."""
    try:
        return sample(logits_RV, rows, sampler)
    except Exception:
        log.exception("sampling a batch of %d failed", len(rows))
        if len(rows) == 1:
            return [None]
        return [_sample(logits_RV[r : r + 1], [row], sampler)[0] for r, row in enumerate(rows)]
