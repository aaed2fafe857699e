"""SparseGPT: weights go column by column, and each column's error is made good by the columns still to come.

Frantar and Alistarh, arXiv:2301.00774, algorithm 1 and the released code, in GPTQ's loop and with its
Hessian. Of each piece of columns the weights with the smallest w^2 / U_jj^2 go, over all rows of a matrix;
for n:m of every m columns of a row, chosen when the loop comes to them.

Differs from the code: counts are exact, also over pieces that do not divide; where H cannot be factored at
any damping, the choice is Wanda's and nothing is made good, and the log says so.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from axicon.compress.calibration import through
from axicon.compress.columns import compensate, inverse_factor
from axicon.compress.moments import Hessian
from axicon.compress.prune import (
    UNSTRUCTURED,
    Pruning,
    kept_best,
    matrices,
    pattern_of,
    to_prune,
    without_lowest,
)  # fmt: skip
from axicon.compress.shared import gather
from axicon.errors import AxiconError
from axicon.model.decoder import Block
from axicon.model.masks import prune

log = logging.getLogger("axicon")


@dataclass(frozen=True, kw_only=True)
class SparseGPT(Pruning):
    kind: ClassVar[str] = "sparse_gpt"
    damping: float = 0.01
    """Share of the mean diagonal of H that is added to it."""
    block_size: int = 128
    """Columns that are ranked together, and whose updates are made at once."""

    def __post_init__(self) -> None:
        if self.damping < 0 or self.block_size < 1:
            raise AxiconError(
                f"sparse_gpt: damping={self.damping} and block_size={self.block_size}: "
                "must be at least 0 and 1"
            )
        super().__post_init__()
        if self.pattern != UNSTRUCTURED and self.block_size % pattern_of(self.pattern, "sparse_gpt")[1]:
            raise AxiconError(
                f"sparse_gpt: pattern={self.pattern}: its groups do not divide block_size={self.block_size}"
            )

    def block(self, block: Block, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        todo = list(to_prune(self, block))
        hessians = {name: Hessian(linear.in_features) for name, linear, _, _ in todo}
        if hessians:
            gather(block, inputs, {name: [one] for name, one in hessians.items()})
        for name, linear, method, before_OI in todo:
            where = f"blocks.{block.index}.{name}"
            hessian_II = hessians.pop(name).matrix(f"sparse_gpt: {where}")
            values_OI, kept_OI = method.pruned(
                linear.weight.detach().float(), hessian_II, matrices(block, name), before_OI, where
            )
            linear.weight.copy_(values_OI)
            prune(linear, kept_OI)
        return through(block, inputs)

    def pruned(
        self,
        weight_OI: Tensor,
        hessian_II: Tensor,
        parts: Sequence[slice] = (slice(None),),
        before_OI: Tensor | None = None,
        name: str = "the product",
    ) -> tuple[Tensor, Tensor]:
        """Values and mask, bool (O, I), of one product. `hessian_II` is used up; `parts` are rows that are
        ranked together. `name` is for the log.
        """
        dead_I = hessian_II.diagonal() == 0
        hessian_II.diagonal()[dead_I] = 1
        size_I = hessian_II.diagonal().sqrt()
        factor_II = inverse_factor(hessian_II, self.damping)
        del hessian_II
        if factor_II is None:
            log.warning(
                "sparse_gpt: %s is pruned as by wanda: its inputs leave H singular at any damping", name
            )
            factor_II = size_I.reciprocal().diag()
        columns = _Columns(self, weight_OI, factor_II.diagonal().square(), parts, before_OI)
        starts = range(0, weight_OI.shape[1], self.block_size)
        pieces = [slice(start, min(start + self.block_size, weight_OI.shape[1])) for start in starts]
        compensate(weight_OI.masked_fill(dead_I, 0), factor_II, pieces, columns)
        return columns.values_IO.T, columns.kept_IO.T


class _Columns:
    """Chooses what goes when the loop comes to it, and puts 0 there."""

    def __init__(
        self,
        method: SparseGPT,
        weight_OI: Tensor,
        square_I: Tensor,
        parts: Sequence[slice],
        before_OI: Tensor | None,
    ) -> None:
        self.method, self.square_I, self.parts = method, square_I, parts
        self.values_IO = torch.empty_like(weight_OI.T)
        self.kept_IO = torch.ones_like(self.values_IO, dtype=torch.bool)
        self.before_IO = None if before_OI is None else before_OI.T

    def begin(self, piece: slice, rest_OJ: Tensor) -> None:
        if self.method.pattern != UNSTRUCTURED:
            return
        weight_JO = rest_OJ[:, : piece.stop - piece.start].T
        for rows in self.parts:
            score_JO = weight_JO[:, rows].square() / self.square_I[piece, None]
            outputs = score_JO.shape[1]
            # What a piece leaves over goes with the next one, so the matrix as a whole is exact.
            count = int(outputs * piece.stop * self.method.sparsity)
            count -= int(outputs * piece.start * self.method.sparsity)
            before = None if self.before_IO is None else self.before_IO[piece, rows].reshape(1, -1)
            found = without_lowest(score_JO.reshape(1, -1), count, before)
            self.kept_IO[piece, rows] = found.view_as(score_JO)

    def column(self, index: int, rest_JO: Tensor) -> Tensor:
        if self.method.pattern != UNSTRUCTURED:
            _, group = pattern_of(self.method.pattern, "sparse_gpt")
            if index % group == 0:
                columns = slice(index, index + group)
                score_OK = (rest_JO[:group].square() / self.square_I[columns, None]).T
                before = None if self.before_IO is None else self.before_IO[columns].T
                self.kept_IO[columns] = kept_best(score_OK, self.method, before).T
        self.values_IO[index] = rest_JO[0].masked_fill(~self.kept_IO[index], 0)
        return self.values_IO[index]
