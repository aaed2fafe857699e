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

from axicon.compress.calibration import through
from axicon.compress.columns import compensate, inverse_factor, reordered
from axicon.compress.grid import Grid, Kind, groups_of, packed
from axicon.compress.head import Head, pack_head
from axicon.compress.moments import Hessian
from axicon.compress.rules import Rules, check_rules, products
from axicon.compress.shared import gather
from axicon.errors import AxiconError
from axicon.model.decoder import Block, Decoder
from axicon.model.group_int import BITS, GroupIntLinear
from axicon.model.masks import kept

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
                gather(block, inputs, {name: [one] for name, one in hessians.items()})
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
            hessian_II, weight_OI = reordered(hessian_II, order_I), weight_OI[:, order_I]
        factor_II = inverse_factor(hessian_II, self.damping)
        del hessian_II
        if factor_II is None:
            log.warning("gptq: %s is rounded plainly: its inputs leave H singular at any damping", name)
            factor_II = torch.eye(linear.in_features)
        kept_OI = kept(linear)
        if kept_OI is not None:
            kept_OI = kept_OI[:, order_I]
        codes_OI, grid = self._columns(weight_OI, factor_II, static, order_I, kept_OI)
        if static is not None:
            codes_OI = codes_OI[:, order_I.argsort()]
        result = packed(codes_OI, grid, linear.bias, self.group)
        if self.act_order and static is None:
            return GroupIntLinear(
                result.qweight, result.scale, result.zero, result.bias, inputs=result.inputs, bits=self.bits,
                group=self.group, order=order_I.to(torch.int32))
        return result

    def _columns(
        self, weight_OI: Tensor, factor_II: Tensor, static: Grid | None, order_I: Tensor,
        kept_OI: Tensor | None,
    ) -> tuple[Tensor, Grid]:
        """Codes (O, I), in the order of the columns given, and the grid of all groups.

        With a `static` grid a column's group is that of its place in the weight's own order. What a mask says
        is gone stays 0.
        """
        columns = _Columns(self, weight_OI.shape, static, order_I, kept_OI)
        pieces = self._pieces(weight_OI.shape[1], fitted=static is not None)
        compensate(weight_OI.clone(), factor_II, pieces, columns)
        grid = Grid(columns.scale_OG.reshape(-1, 1), columns.zero_OG.reshape(-1, 1), self.bits, self.grid)
        return columns.codes_OI, grid

    def _pieces(self, inputs: int, fitted: bool) -> Iterator[slice]:
        """Columns whose updates are made at once; none goes over the edge of a group that is still to fit."""
        start = 0
        while start < inputs:
            stop = min(start + self.block_size, inputs)
            if not fitted:
                stop = min(stop, start - start % self.group + self.group)
            yield slice(start, stop)
            start = stop


class _Columns:
    """Rounds columns to the grid of their group, fitted when the loop comes to it unless it is static."""

    def __init__(
        self, method: GPTQ, shape: torch.Size, static: Grid | None, order_I: Tensor, kept_OI: Tensor | None
    ) -> None:
        outputs, inputs = shape
        groups = 1 if method.group <= 0 else inputs // method.group
        self.method, self.static, self.order_I, self.kept_OI = method, static, order_I, kept_OI
        self.scale_OG, self.zero_OG = torch.empty(outputs, groups), torch.empty(outputs, groups)
        if static is not None:
            self.scale_OG = static.scale.view(outputs, groups)
            self.zero_OG = static.zero.view(outputs, groups)
        self.codes_OI = torch.empty(outputs, inputs, dtype=torch.uint8)
        self.grid = Grid(self.scale_OG[:, :1], self.zero_OG[:, :1], method.bits, method.grid)

    def begin(self, piece: slice, rest_OJ: Tensor) -> None:
        group = self.method.group
        if self.static is None and piece.start % group == 0:
            self.grid = Grid.fit(
                rest_OJ[:, :group], self.method.bits, self.method.grid, search=self.method.search)
            self.scale_OG[:, piece.start // group] = self.grid.scale[:, 0]
            self.zero_OG[:, piece.start // group] = self.grid.zero[:, 0]

    def column(self, index: int, rest_JO: Tensor) -> Tensor:
        if self.static is not None and self.method.group > 0:
            at = int(self.order_I[index]) // self.method.group
            self.grid = dataclasses.replace(
                self.grid, scale=self.scale_OG[:, at, None], zero=self.zero_OG[:, at, None])
        weight_O = rest_JO[0]
        if self.kept_OI is not None:
            weight_O = weight_O.masked_fill(~self.kept_OI[:, index], 0)
        code_O1 = self.grid.codes(weight_O[:, None])
        self.codes_OI[:, index] = code_O1[:, 0]
        return self.grid.values(code_O1)[:, 0]
