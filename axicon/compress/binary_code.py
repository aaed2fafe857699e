"""Binary codes: every group of weights as a sum of 2 to 4 scaled planes of signs, and an offset.

LUT-GEMM, arXiv:2206.09557, section 2, after Xu et al., arXiv:1802.00150: a greedy start, then scales by least
squares and signs by the nearest level in turn, 15 rounds. Section 3.2, uniform codes as binary ones, is in
`axicon/model/binary_code.py`. The levels need not be evenly spaced, which is what 2 and 3 bits gain from.

Differs from the released code: groups are of columns; scales are solved for exactly instead of by steps that
depend on the size of the weights; the alternation also begins at plain rounding and the better end is kept,
since from the greedy start alone it loses to rounding at 4 bits; an offset is fitted with the scales; 0
counts as +, so planes have no third value.

The paper's fit sees no data. With `compensate` it is the choice of levels in GPTQ's loop (algorithm 1 of
arXiv:2210.17323): a group is fitted when the loop comes to it, to weights that have the updates of all
columns before it, and each column's error is made good by the columns still to come. With `act_order` all
groups are fitted before the loop, which takes the columns with the largest diagonal of H first.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from axicon.compress import sign_planes
from axicon.compress.calibration import through
from axicon.compress.columns import compensate, inverse_factor, reordered
from axicon.compress.grid import groups_of
from axicon.compress.head import Head, pack_head
from axicon.compress.moments import Hessian
from axicon.compress.rules import Rules, check_rules, products
from axicon.compress.shared import gather
from axicon.compress.sign_planes import Planes, Start
from axicon.errors import AxiconError
from axicon.model.binary_code import BinaryCodeLinear
from axicon.model.decoder import Block, Decoder
from axicon.model.masks import kept

log = logging.getLogger("axicon")

SCALE_DTYPE = torch.float16


@dataclass(frozen=True, kw_only=True)
class BinaryCode:
    bits: int = 4
    """Planes: 2 to 4."""
    group: int = -1
    """Columns that share scales and offset; -1: the whole row. They take 16 * (bits + 1) bits a group."""
    rounds: int = 15
    """Of scales and signs in turn; 0: the start as it is."""
    start: Start = "best"
    """greedy, rtn (plain rounding), or best: both, and for every group the better end."""
    offset: Literal["fit", "none"] = "fit"
    """none: levels are symmetric around 0."""
    importance: Literal["none", "magnitude", "hessian_diag"] = "none"
    """What a weight's squared error counts for: its size, or the mean square of what it multiplies. With
    `compensate` alone, hessian_diag is what of that the columns still to come cannot make good."""
    compensate: bool = False
    """Each column's error is made good by the columns still to come, as in GPTQ."""
    act_order: bool = False
    """With `compensate`: columns with the largest diagonal of H first, all groups fitted before the first."""
    damping: float = 0.01
    """Share of the mean diagonal of H that is added to it."""
    block_size: int = 64
    """Columns whose updates are made at once."""
    head: Head = "dense"
    """int8: logits come from an int8 copy of the head."""
    rules: Rules = field(default_factory=dict)
    """Other `bits` or `group`, or skip, by patterns of product names."""

    @property
    def needs_inputs(self) -> bool:
        return self.compensate or self.importance == "hessian_diag"

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4):
            raise AxiconError(f"binary_code: bits={self.bits}: known are 2, 3 and 4")
        if self.rounds < 0 or self.damping < 0 or self.block_size < 1:
            raise AxiconError(
                f"binary_code: rounds={self.rounds}, damping={self.damping}, block_size={self.block_size}: "
                "must be at least 0, 0 and 1")
        if self.compensate and self.importance == "magnitude":
            raise AxiconError("binary_code: with compensate, importance is none or hessian_diag")
        if self.act_order and not self.compensate:
            raise AxiconError("binary_code: act_order is an order of the loop; it needs compensate=true")
        check_rules(self, "binary_code")

    def begin(self, model: Decoder) -> None:
        """Nothing to prepare."""

    def block(self, block: Block, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        todo = list(products(self, block, "binary_code"))
        for name, linear, _ in todo:
            if kept(linear) is not None:
                raise AxiconError(
                    f"binary_code: blocks.{block.index}.{name} is pruned, and levels of binary codes "
                    "have no 0; pack it by gptq or group_int4, or start from the dense model")
        hessians = {name: Hessian(linear.in_features) for name, linear, _ in todo if self.needs_inputs}
        if hessians:
            gather(block, inputs, {name: [one] for name, one in hessians.items()})
        for name, linear, method in todo:
            where = f"blocks.{block.index}.{name}"
            found = hessians.pop(name, None)
            hessian_II = None if found is None else found.matrix(f"binary_code: {where}")
            setattr(block, name, method.fit(linear, hessian_II, where))
        return through(block, inputs) if self.needs_inputs else inputs

    def finish(self, model: Decoder) -> None:
        pack_head(model, self.head)

    def fit(
        self, linear: nn.Linear, hessian_II: Tensor | None = None, name: str = "the product"
    ) -> BinaryCodeLinear:
        """Fit one product. `hessian_II` is used up, and wanted where `needs_inputs`. `name` is for messages.
        """
        weight_OI = linear.weight.detach().float()
        if not weight_OI.isfinite().all():
            raise AxiconError(f"binary_code: {name} holds NaN or infinite weights; the model is damaged")
        if self.compensate:
            assert hessian_II is not None
            planes, codes_OI = self._compensated(weight_OI, hessian_II, name)
        else:
            weight_RK = groups_of(weight_OI, self.group)
            planes = self._planes(weight_RK, self._importance(weight_OI, hessian_II))
            codes_OI = planes.nearest(weight_RK).view_as(weight_OI)
        outputs = len(weight_OI)
        offset = planes.offset.view(outputs, -1).to(SCALE_DTYPE) if self.offset == "fit" else None
        return BinaryCodeLinear.from_codes(
            codes_OI, planes.alpha.view(outputs, -1, self.bits).to(SCALE_DTYPE), offset, linear.bias,
            group=self.group)

    def _planes(self, weight_RK: Tensor, importance_RK: Tensor | None) -> Planes:
        """As they are stored."""
        planes, _ = sign_planes.fit(
            weight_RK, self.bits, rounds=self.rounds, start=self.start, shifted=self.offset == "fit",
            importance_RK=importance_RK)
        return planes.stored(SCALE_DTYPE)

    def _importance(self, weight_OI: Tensor, hessian_II: Tensor | None) -> Tensor | None:
        """(R, K), for `groups_of` the weight."""
        if self.importance == "magnitude":
            return groups_of(weight_OI.abs(), self.group)
        if self.importance == "none" or hessian_II is None:
            return None
        square_I = hessian_II.diagonal()
        return groups_of((square_I + self.damping * square_I.mean()).repeat(len(weight_OI), 1), self.group)

    def _compensated(self, weight_OI: Tensor, hessian_II: Tensor, name: str) -> tuple[Planes, Tensor]:
        """Levels of all groups, row after row, and codes (O, I)."""
        inputs = weight_OI.shape[1]
        dead_I = hessian_II.diagonal() == 0
        weight_OI, order_I, fitted = weight_OI.masked_fill(dead_I, 0), torch.arange(inputs), None
        if self.act_order:
            importance = self._importance(weight_OI, hessian_II)
            fitted = self._planes(groups_of(weight_OI, self.group), importance)
        hessian_II.diagonal()[dead_I] = 1
        if self.act_order:
            order_I = hessian_II.diagonal().argsort(descending=True, stable=True)
            hessian_II.copy_(reordered(hessian_II, order_I))  # the caller's, of which there is to be one
            weight_OI = weight_OI[:, order_I]
        factor_II = inverse_factor(hessian_II, self.damping)
        if factor_II is None:
            log.warning(
                "binary_code: %s has nothing made good: its inputs leave H singular at any damping", name)
            factor_II = torch.eye(inputs)
        levels = _Levels(self, inputs, factor_II.diagonal(), fitted, order_I)
        width = levels.width if fitted is None else inputs  # no piece goes over the edge of a group to fit
        pieces = [
            slice(first, min(first + self.block_size, start + width))
            for start in range(0, inputs, width)
            for first in range(start, start + width, self.block_size)
        ]
        compensate(weight_OI, factor_II, pieces, levels)
        alpha = torch.stack([one.alpha for one in levels.found], 1).flatten(0, 1)
        offset = torch.stack([one.offset for one in levels.found], 1).flatten(0, 1)
        return Planes(alpha, offset), torch.stack(levels.codes, 1)[:, order_I.argsort()]


class _Levels:
    """Rounds columns to the levels of their group, which are fitted when the loop comes to it unless they are
    there already. `order_I` is the place of each of the loop's columns in the weight.
    """

    def __init__(
        self, method: BinaryCode, inputs: int, factor_I: Tensor, fitted: Planes | None, order_I: Tensor
    ) -> None:
        self.method, self.width = method, method.group if method.group > 0 else inputs
        self.importance_I, self.group_of = factor_I.square().reciprocal(), (order_I // self.width).tolist()
        self.fit = fitted is None
        self.found: list[Planes] = []
        if fitted is not None:
            groups = inputs // self.width
            parts = (values.unflatten(0, (-1, groups)).unbind(1) for values in (fitted.alpha, fitted.offset))
            self.found = [Planes(*one) for one in zip(*parts, strict=True)]
        self.codes: list[Tensor] = []

    def begin(self, piece: slice, rest_OJ: Tensor) -> None:
        if self.fit and piece.start % self.width == 0:
            importance = None
            if self.method.importance == "hessian_diag":
                importance = self.importance_I[None, piece.start : piece.start + self.width]
            self.found.append(self.method._planes(rest_OJ[:, : self.width].contiguous(), importance))

    def column(self, index: int, rest_JO: Tensor) -> Tensor:
        planes = self.found[self.group_of[index]]
        codes_O1 = planes.nearest(rest_JO[0][:, None])
        self.codes.append(codes_O1[:, 0])
        return planes.values(codes_O1)[:, 0]
