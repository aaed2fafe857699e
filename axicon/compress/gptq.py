"""GPTQ: weights rounded column by column, each column's error made good by the columns still to come.

Frantar et al., arXiv:2210.17323, algorithm 1 and the released code: H = 2/n sum x x^T over calibration rows,
damped by a share of its mean diagonal; U the upper Cholesky factor of H^-1; columns in blocks, whose errors
reach the later blocks all at once. `act_order` takes the columns with the largest H first.

Differs from the code: groups are fitted to weights that have all updates before them in them, also where a
group is narrower than a block; the symmetric grid mirrors rows without negative weights too; where H cannot
be factored, damping grows tenfold up to 1 before plain rounding takes over, and the log says so; scales are
stored as float16, and weights are rounded with what is stored.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from axicon.compress.calibration import observe, through
from axicon.compress.grid import Grid, Kind, groups_of, packed
from axicon.compress.head import Head, pack_head
from axicon.compress.rules import Rules, check_rules, products
from axicon.errors import AxiconError
from axicon.model.decoder import Block, Decoder
from axicon.model.group_int import BITS, GroupIntLinear

log = logging.getLogger("axicon")


@dataclass(frozen=True, kw_only=True)
class GPTQ:
    bits: int = 4
    """2 to 8."""
    group: int = -1
    """Columns that share scale and zero; -1: the whole row."""
    grid: Kind = "asymmetric"
    """asymmetric, symmetric or absmax."""
    search: bool = False
    """Narrow the range of each group for the least rounding error."""
    act_order: bool = False
    """Columns with the largest diagonal of H first."""
    static_groups: bool = False
    """Fit all groups before the first column is rounded, in the weight's own order of columns: with
    `act_order`, products then need no other order of their inputs."""
    true_sequential: bool = False
    """Look again at the inputs of a block's later products once the earlier ones are rounded."""
    damping: float = 0.01
    """Share of the mean diagonal of H that is added to it."""
    block_size: int = 128
    """Columns whose updates are made at once."""
    head: Head = "dense"
    """int8: logits come from an int8 copy of the head."""
    rules: Rules = field(default_factory=dict)
    """Other `bits`, `group` or `grid`, or skip, by patterns of product names."""

    @property
    def needs_inputs(self) -> bool:
        return True

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise AxiconError(f"gptq: bits={self.bits}: must be from 2 to 8")
        if self.damping < 0 or self.block_size < 1:
            raise AxiconError(
                f"gptq: damping={self.damping} and block_size={self.block_size}: must be at least 0 and 1")
        check_rules(self, "gptq", ("bits", "group", "grid"))

    def begin(self, model: Decoder) -> None:
        """Nothing to prepare."""

    def block(self, block: Block, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        todo = list(products(self, block, "gptq"))
        rounds = [[one] for one in todo] if self.true_sequential else [todo]
        for some in rounds:
            hessians = {name: Hessian(linear.in_features) for name, linear, _ in some}
            if hessians:
                observe(block, inputs, {name: one.add for name, one in hessians.items()})
            for name, linear, method in some:
                setattr(block, name, method.round(
                    linear, hessians.pop(name).matrix(f"gptq: blocks.{block.index}.{name}"),
                    f"blocks.{block.index}.{name}"))
        return through(block, inputs)

    def finish(self, model: Decoder) -> None:
        pack_head(model, self.head)

    def round(self, linear: nn.Linear, hessian_II: Tensor, name: str = "the product") -> GroupIntLinear:
        """Round one product. `hessian_II` is used up. `name` is for the log."""
        weight_OI = linear.weight.detach().float()
        if not weight_OI.isfinite().all():
            raise AxiconError(f"gptq: {name} holds NaN or infinite weights; the model is damaged")
        # The grid of whole rows is fitted before dead columns are cleared, that of groups after it.
        whole = Grid.fit(weight_OI, self.bits, self.grid, search=self.search)
        dead_I = hessian_II.diagonal() == 0
        hessian_II.diagonal()[dead_I] = 1
        weight_OI = weight_OI.masked_fill(dead_I, 0)
        static = whole if self.group <= 0 else None
        if self.group > 0 and self.static_groups:
            static = Grid.fit(groups_of(weight_OI, self.group), self.bits, self.grid, search=self.search)
        order_I = torch.arange(linear.in_features)
        if self.act_order:
            order_I = hessian_II.diagonal().argsort(descending=True, stable=True)
            hessian_II, weight_OI = hessian_II[order_I][:, order_I], weight_OI[:, order_I]
        factor_II = inverse_factor(hessian_II, self.damping)
        if factor_II is None:
            log.warning("gptq: %s is rounded plainly: its inputs leave H singular at any damping", name)
            factor_II = torch.eye(linear.in_features)
        codes_OI, grid = self._columns(weight_OI, factor_II, static, order_I)
        if static is not None:
            codes_OI = codes_OI[:, order_I.argsort()]
        result = packed(codes_OI, grid, linear.bias, self.group)
        if self.act_order and static is None:
            return GroupIntLinear(
                result.qweight, result.scale, result.zero, result.bias, inputs=result.inputs, bits=self.bits,
                group=self.group, order=order_I.to(torch.int32))
        return result

    def _columns(
        self, weight_OI: Tensor, factor_II: Tensor, static: Grid | None, order_I: Tensor
    ) -> tuple[Tensor, Grid]:
        """Codes (O, I), in the order of the columns given, and the grid of all groups.

        With a `static` grid a column's group is that of its place in the weight's own order.
        """
        outputs, inputs = weight_OI.shape
        groups = 1 if self.group <= 0 else inputs // self.group
        scale_OG, zero_OG = torch.empty(outputs, groups), torch.empty(outputs, groups)
        if static is not None:
            scale_OG, zero_OG = static.scale.view(outputs, groups), static.zero.view(outputs, groups)
        codes_OI = torch.empty(outputs, inputs, dtype=torch.uint8)
        grid = Grid(scale_OG[:, :1], zero_OG[:, :1], self.bits, self.grid)
        weight_OI = weight_OI.clone()
        for piece in self._pieces(inputs, fitted=static is not None):
            if static is None and piece.start % self.group == 0:
                rest = weight_OI[:, piece.start : piece.start + self.group]
                grid = Grid.fit(rest, self.bits, self.grid, search=self.search)
                scale_OG[:, piece.start // self.group] = grid.scale[:, 0]
                zero_OG[:, piece.start // self.group] = grid.zero[:, 0]
            # Columns as rows: every step below reads and writes memory that lies together.
            part_JO = weight_OI[:, piece].T.contiguous()
            factor_JJ = factor_II[piece, piece]
            error_JO = torch.empty_like(part_JO)
            for j, column in enumerate(range(piece.start, piece.stop)):
                if static is not None and self.group > 0:
                    at = int(order_I[column]) // self.group
                    grid = dataclasses.replace(grid, scale=scale_OG[:, at, None], zero=zero_OG[:, at, None])
                code_O1 = grid.codes(part_JO[j, :, None])
                codes_OI[:, column] = code_O1[:, 0]
                error_JO[j] = (part_JO[j] - grid.values(code_O1)[:, 0]) / factor_JJ[j, j]
                part_JO[j + 1 :].addr_(factor_JJ[j, j + 1 :], error_JO[j], alpha=-1)
            weight_OI[:, piece.stop :].addmm_(error_JO.T, factor_II[piece, piece.stop :], alpha=-1)
        return codes_OI, Grid(scale_OG.reshape(-1, 1), zero_OG.reshape(-1, 1), self.bits, self.grid)

    def _pieces(self, inputs: int, fitted: bool) -> Iterator[slice]:
        """Columns whose updates are made at once; none goes over the edge of a group that is still to fit."""
        start = 0
        while start < inputs:
            stop = min(start + self.block_size, inputs)
            if not fitted:
                stop = min(stop, start - start % self.group + self.group)
            yield slice(start, stop)
            start = stop


class Hessian:
    """The mean of x x^T over the rows of a product's inputs, times 2, in float32."""

    def __init__(self, inputs: int) -> None:
        self.sum_II = torch.zeros(inputs, inputs)
        self.rows = 0

    def add(self, x_NI: Tensor) -> None:
        x_NI = x_NI.reshape(-1, x_NI.shape[-1]).float()
        self.sum_II.addmm_(x_NI.T, x_NI)
        self.rows += len(x_NI)

    def matrix(self, what: str) -> Tensor:
        """Raises AxiconError, which begins with `what`, where an input was not finite."""
        if not self.sum_II.diagonal().isfinite().all():
            raise AxiconError(f"{what}: its inputs hold NaN or infinite values; try dtype=float32")
        return self.sum_II.mul_(2 / max(self.rows, 1))


def inverse_factor(hessian_II: Tensor, damping: float) -> Tensor | None:
    """U upper triangular with U^T U = (H + damping * mean diagonal)^-1, H used up; None where there is none.

    Damping grows tenfold up to 1 until there is one.
    """
    mean = hessian_II.diagonal().mean()
    added = 0.0
    while True:
        hessian_II.diagonal().add_((damping - added) * mean)
        factor, failed = torch.linalg.cholesky_ex(hessian_II)
        if not failed:
            inverse = torch.cholesky_inverse(factor)
            factor, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed and factor.isfinite().all():
                return factor
        if damping >= 1:
            return None
        added, damping = damping, min(max(10 * damping, 0.01), 1.0)
