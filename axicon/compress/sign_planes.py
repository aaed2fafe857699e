"""Sums of scaled signs fitted to groups of weights: the solver of binary codes, as `grid.py` is of even ones.

A group's weights are put on 2^bits levels, offset + sum_i +-alpha_i. Scales (and offset) and signs are made
better in turn: the scales by weighted least squares, exactly, then every weight goes to its nearest level.
Neither can make the error larger, wherever they start.

What the scales need of the weights is how much importance, and how much weight times importance, lies on each
level. Levels cut the sorted weights into runs, so running sums over each group, made once, answer that for
any levels: a round costs the number of levels, not that of weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from axicon.compress.grid import Grid

Start = Literal["greedy", "rtn", "best"]
AT_ONCE = 1 << 20
"""Weights that are fitted together, which bounds the memory of the running sums."""
DAMPING = 1e-10
"""Share of the mean diagonal that keeps scales which no weight decides where they are."""


@dataclass(frozen=True)
class Planes:
    """The levels of R groups: `alpha` (R, bits) from 0 on and ascending, `offset` (R, 1), float32."""

    alpha: Tensor
    offset: Tensor

    @cached_property
    def levels(self) -> Tensor:
        """(R, 2^bits): the value of every code. Bit i of a code is the sign of plane i, 1 for +."""
        return self.offset + self.alpha @ signs(self.alpha.shape[1]).T

    @cached_property
    def _edges(self) -> tuple[Tensor, Tensor]:
        """What lies halfway between neighbouring levels (R, 2^bits - 1), and the codes in their order."""
        levels_RL, order_RL = self.levels.sort(1)
        return (levels_RL[:, 1:] + levels_RL[:, :-1]) / 2, order_RL

    def nearest(self, weight_RK: Tensor) -> Tensor:
        """uint8 (R, K)."""
        between, order_RL = self._edges
        return order_RL.gather(1, torch.searchsorted(between, weight_RK.contiguous())).to(torch.uint8)

    def values(self, codes_RK: Tensor) -> Tensor:
        return self.levels.gather(1, codes_RK.long())

    def stored(self, dtype: torch.dtype) -> Planes:
        """As they are once they were kept in that dtype."""
        return Planes(self.alpha.to(dtype).float(), self.offset.to(dtype).float())


def signs(bits: int) -> Tensor:
    """(2^bits, bits): -1.0 or 1.0, of every code's planes."""
    return ((torch.arange(2**bits)[:, None] >> torch.arange(bits)) & 1) * 2.0 - 1.0


def fit(
    weight_RK: Tensor, bits: int, *, rounds: int = 15, start: Start = "best", shifted: bool = True,
    importance_RK: Tensor | None = None,
) -> tuple[Planes, Tensor]:
    """For R groups of K float32 weights: the levels, and uint8 codes (R, K).

    `rounds` of 0 returns the start. `importance_RK`, or (1, K), is what a squared error counts for.
    """
    pieces = max(1, AT_ONCE // weight_RK.shape[1])
    importance = torch.ones(1, 1) if importance_RK is None else importance_RK
    importance = importance.expand_as(weight_RK)
    found = [
        _fit(weight, part, bits, rounds, start, shifted)
        for weight, part in zip(weight_RK.split(pieces), importance.split(pieces), strict=True)
    ]
    planes = Planes(torch.cat([p.alpha for p, _ in found]), torch.cat([p.offset for p, _ in found]))
    return planes, torch.cat([codes for _, codes in found])


def _fit(
    weight_RK: Tensor, importance_RK: Tensor, bits: int, rounds: int, start: Start, shifted: bool
) -> tuple[Planes, Tensor]:
    begun = []
    if start != "rtn":
        begun.append(greedy(weight_RK, importance_RK, bits))
    if start != "greedy":
        begun.append(even(weight_RK, bits, shifted))
    if rounds:
        sums = _Sums(weight_RK, importance_RK)
        ended = [sums.improve(*one, rounds, shifted) for one in begun]
        begun = [(planes, planes.nearest(weight_RK)) for planes in ended]
    best, codes = begun[0]
    for planes, other in begun[1:]:
        better = (_error(planes, other, weight_RK, importance_RK)
                  < _error(best, codes, weight_RK, importance_RK))
        best = Planes(torch.where(better, planes.alpha, best.alpha),
                      torch.where(better, planes.offset, best.offset))
        codes = torch.where(better, other, codes)
    return best, codes


def _error(planes: Planes, codes_RK: Tensor, weight_RK: Tensor, importance_RK: Tensor) -> Tensor:
    return ((planes.values(codes_RK) - weight_RK).square() * importance_RK).sum(1, keepdim=True)


def greedy(weight_RK: Tensor, importance_RK: Tensor, bits: int) -> tuple[Planes, Tensor]:
    """Each plane takes the signs of what the ones before it left over, and their mean magnitude. 0 is +."""
    rest, total = weight_RK, importance_RK.sum(1, keepdim=True)
    codes = torch.zeros(weight_RK.shape, dtype=torch.uint8)
    alphas: list[Tensor] = []
    for i in range(bits - 1, -1, -1):
        alpha = (rest.abs() * importance_RK).sum(1, keepdim=True) / torch.where(total > 0, total, 1.0)
        positive = rest >= 0
        rest = rest - torch.where(positive, alpha, -alpha)
        codes |= positive.to(torch.uint8) << i
        alphas.insert(0, alpha)
    return Planes(torch.cat(alphas, 1), torch.zeros(len(weight_RK), 1)), codes


def even(weight_RK: Tensor, bits: int, shifted: bool) -> tuple[Planes, Tensor]:
    """Rounding to the asymmetric grid; without offset to one that is even around 0 and has no 0."""
    if shifted:
        grid = Grid.fit(weight_RK, bits, "asymmetric")
    else:
        scale = 2 * weight_RK.abs().amax(1, keepdim=True) / (2**bits - 1)
        grid = Grid(scale, torch.full_like(scale, (2**bits - 1) / 2), bits, "symmetric")
    alpha = grid.scale * 2.0 ** (torch.arange(bits) - 1)
    planes = Planes(alpha, grid.scale * ((2**bits - 1) / 2 - grid.zero))
    return planes, planes.nearest(weight_RK)


class _Sums:
    """Running sums over the sorted weights of R groups, in float64."""

    def __init__(self, weight_RK: Tensor, importance_RK: Tensor) -> None:
        importance_RK = importance_RK.double()
        self.given = importance_RK, importance_RK * weight_RK
        self.sorted_RK, order_RK = weight_RK.sort(1)
        importance_RK = importance_RK.gather(1, order_RK)
        self.importance = torch.nn.functional.pad(importance_RK.cumsum(1), (1, 0))
        self.product = torch.nn.functional.pad((importance_RK * self.sorted_RK).cumsum(1), (1, 0))

    def of_levels(self, planes: Planes) -> tuple[Tensor, Tensor]:
        """Importance, and importance times weight, whose nearest level is that of each code: (R, 2^bits)."""
        between, order_RL = planes._edges
        ends = torch.nn.functional.pad(torch.searchsorted(self.sorted_RK, between), (1, 1))
        ends[:, -1] = self.sorted_RK.shape[1]
        parts = (values.gather(1, ends).diff(dim=1) for values in (self.importance, self.product))
        counts, totals = (torch.empty_like(part).scatter_(1, order_RL, part) for part in parts)
        return counts, totals

    def improve(self, planes: Planes, codes_RK: Tensor, rounds: int, shifted: bool) -> Planes:
        """Scales for the codes given, then codes and scales in turn: the scales of the last round."""
        counts, totals = (
            values.new_zeros(len(values), 2 ** planes.alpha.shape[1]).scatter_add_(1, codes_RK.long(), values)
            for values in self.given
        )
        for _ in range(rounds - 1):
            planes = _scales(planes, counts, totals, shifted)
            counts, totals = self.of_levels(planes)
        return _scales(planes, counts, totals, shifted)


def _scales(planes: Planes, counts_RL: Tensor, totals_RL: Tensor, shifted: bool) -> Planes:
    """The scales of least squares, where every level has this importance and importance times weight."""
    bits = planes.alpha.shape[1]
    unknowns_LP = torch.cat([signs(bits), torch.ones(2**bits, 1)], 1).double()[:, : bits + shifted]
    now = torch.cat([planes.alpha, planes.offset], 1)[:, : bits + shifted].double()
    size = unknowns_LP.shape[1]
    products_LPP = (unknowns_LP[:, :, None] * unknowns_LP[:, None, :]).view(-1, size * size)
    matrix = (counts_RL @ products_LPP).view(-1, size, size)
    wanted = totals_RL @ unknowns_LP - (matrix @ now[..., None])[..., 0]
    found = (now + solve(matrix, wanted)).float()
    # A negative scale is the same plane with all its signs turned.
    alpha = found[:, :bits].abs().sort(1).values
    return Planes(alpha, found[:, bits:] if shifted else planes.offset)


def solve(matrix_RPP: Tensor, wanted_RP: Tensor) -> Tensor:
    """Small symmetric systems by elimination, many at once. What a matrix does not decide is 0."""
    columns = list(wanted_RP.unbind(1))
    size = len(columns)
    rows = [[matrix_RPP[:, i, j] for j in range(size)] for i in range(size)]
    added = DAMPING * matrix_RPP.diagonal(dim1=1, dim2=2).mean(1)
    pivots = []
    for i in range(size):
        pivot = rows[i][i] + added
        pivots.append(torch.where(pivot > 0, pivot, 1.0))
        for j in range(i + 1, size):
            share = rows[i][j] / pivots[i]
            columns[j] = columns[j] - share * columns[i]
            for k in range(j, size):
                rows[j][k] = rows[j][k] - share * rows[i][k]
    for i in range(size - 1, -1, -1):
        for j in range(i + 1, size):
            columns[i] = columns[i] - rows[i][j] * columns[j]
        columns[i] = columns[i] / pivots[i]
    return torch.stack(columns, 1)
