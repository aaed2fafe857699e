"""Weights rounded column by column, each column's error made good by the columns still to come.

The loop of GPTQ, arXiv:2210.17323, algorithm 1, for any set of levels a column may be rounded to.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

ROWS_AT_ONCE = 256
"""Of a matrix whose columns are put in another order."""


class Rounding(Protocol):
    """Where weights may go."""

    def begin(self, piece: slice, rest_OJ: Tensor) -> None:
        """Called before the first column of a piece, with all columns from there on as they are now."""

    def column(self, index: int, rest_JO: Tensor) -> Tensor:
        """The values that a column's weights, `rest_JO[0]`, become. Behind them are the columns of the piece
        that are still to come, as they are now.
        """


def compensate(weight_OI: Tensor, factor_II: Tensor, pieces: Iterable[slice], rounding: Rounding) -> None:
    """`weight_OI` is used up. `factor_II` is `inverse_factor` of the Hessian; `pieces` are columns whose
    updates are made at once, in order and without gaps.
    """
    for piece in pieces:
        rounding.begin(piece, weight_OI[:, piece.start :])
        # Columns as rows: every step below reads and writes memory that lies together.
        part_JO = weight_OI[:, piece].T.contiguous()
        factor_JJ = factor_II[piece, piece]
        error_JO = torch.empty_like(part_JO)
        for j, column in enumerate(range(piece.start, piece.stop)):
            error_JO[j] = (part_JO[j] - rounding.column(column, part_JO[j:])) / factor_JJ[j, j]
            part_JO[j + 1 :].addr_(factor_JJ[j, j + 1 :], error_JO[j], alpha=-1)
        weight_OI[:, piece.stop :].addmm_(error_JO.T, factor_II[piece, piece.stop :], alpha=-1)


def inverse_factor(hessian_II: Tensor, damping: float) -> Tensor | None:
    """U upper triangular with U^T U = (H + damping * mean diagonal)^-1, H used up; None where there is none.

    Damping grows tenfold up to 1 until there is one. All three steps work in one matrix, laid out by columns
    as LAPACK wants it, or there would be four.
    """
    mean = hessian_II.diagonal().mean()
    added, failed = 0.0, torch.empty((), dtype=torch.int32)
    factor = torch.empty_like(hessian_II).T
    while True:
        hessian_II.diagonal().add_((damping - added) * mean)
        factor.copy_(hessian_II)
        torch.linalg.cholesky_ex(factor, out=(factor, failed))
        if not failed:
            torch.cholesky_inverse(factor, out=factor)
            torch.linalg.cholesky_ex(factor, upper=True, out=(factor, failed))
            # Smallest and largest are NaN if any element is: nothing allocated.
            if not failed and all(extreme.isfinite() for extreme in factor.T.aminmax()):
                return factor
        if damping >= 1:
            return None
        added, damping = damping, min(max(10 * damping, 0.01), 1.0)


def reordered(matrix_II: Tensor, order_I: Tensor) -> Tensor:
    """Rows and columns in another order, with no more than a second matrix in memory."""
    matrix_II = matrix_II[order_I]
    for rows in matrix_II.split(ROWS_AT_ONCE):
        rows.copy_(rows[:, order_I])
    return matrix_II
