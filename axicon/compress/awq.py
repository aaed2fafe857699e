"""AWQ: inputs that are large get finer steps, by scaling their weights before rounding to a grid.

Lin et al., arXiv:2306.00978, and the released code. The inputs of each product get scales mean(|x|)^ratio,
made even around 1, and of the ratios 0, 1/20 ... 19/20 the one is taken with which the rounded product errs
least: in the output of attention for `qkv`, of the MLP for gate and up, of the product itself for the others.
All of a block are searched before any is scaled. Then the range of each group is narrowed by the share of 0,
1/20 ... 9/20 that adds the least error, not for queries and keys, and weights are rounded.

Differs from the code: grids hold 0; ratios are chosen on `tokens` of the sample, ranges on all of it; query
heads that share values share scales too, where the code leaves the output product alone; weights of norms
are rounded before the product that reads them is scaled, so that storing them adds no error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from axicon.compress.calibration import observe, rotation, through
from axicon.compress.grid import Grid, Kind, groups_of, packed
from axicon.compress.head import Head, pack_head
from axicon.compress.moments import GroupHessian, Magnitude
from axicon.compress.rules import Rules, check_rules, products
from axicon.compress.scaling import Pair, float_copy, fold, keep_norms, living, norm_pairs, product_pairs
from axicon.compress.shared import gather
from axicon.errors import AxiconError
from axicon.model.decoder import Block, Decoder, dense_attend
from axicon.model.group_int import BITS, GroupIntLinear

RATIOS, SHRINKS = 20, 10


@dataclass(frozen=True, kw_only=True)
class AWQ:
    bits: int = 4
    """2 to 8."""
    group: int = 128
    """Columns that share scale and zero; -1: the whole row."""
    grid: Kind = "asymmetric"
    """asymmetric, symmetric or absmax."""
    clip: bool = True
    """Narrow the range of each group for the least error on the sample."""
    tokens: int = 1024
    """Of the sample, for the choice of ratios: whole windows, one at least."""
    head: Head = "dense"
    """int8: logits come from an int8 copy of the head."""
    rules: Rules = field(default_factory=dict)
    """Other `bits`, `group` or `grid`, or skip, by patterns of product names."""

    @property
    def needs_inputs(self) -> bool:
        return True

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise AxiconError(f"awq: bits={self.bits}: must be from 2 to 8")
        if self.tokens < 1:
            raise AxiconError(f"awq: tokens={self.tokens}: must be at least 1")
        check_rules(self, "awq", ("bits", "group", "grid"))

    def begin(self, model: Decoder) -> None:
        """Nothing to prepare."""

    def block(self, block: Block, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        todo = {name: method for name, _, method in products(self, block, "awq")}
        if not todo:
            return through(block, inputs)
        pairs = [
            pair
            for pair in (*norm_pairs(block, "awq"), *product_pairs(block))
            if pair.product in todo and (pair.from_norm or pair.producer in todo)
        ]
        scaled = float_copy(block, "awq")
        seen = {
            name: _Inputs(getattr(block, name).in_features, method.group) for name, method in todo.items()
        }
        gather(block, inputs, {name: (one.size, one.hessian) for name, one in seen.items()})
        sizes = {name: one.size.mean(f"awq: blocks.{block.index}.{name}") for name, one in seen.items()}
        errors = _Errors(scaled, _some(inputs, self.tokens), todo)
        found = []
        for pair in pairs:
            name = pair.product
            size_C = living(pair.largest(sizes[name]))
            found.append(todo[name].search(getattr(scaled, name), pair, size_C, partial(errors.of, name)))
        del errors
        dtype = next(block.parameters()).dtype
        for pair, scale_C in zip(pairs, found, strict=True):
            seen[pair.product].hessian.divide(fold(scaled, pair, scale_C, dtype))
        keep_norms(block, scaled, pairs)
        for name, method in todo.items():
            loose = block.shape.parts("qkv")["v"] if name == "qkv" else slice(0, None)
            hessian_GKK = seen.pop(name).hessian.sum_GKK
            setattr(block, name, method.round(getattr(scaled, name), hessian_GKK, loose, dtype))
        return through(block, inputs)

    def finish(self, model: Decoder) -> None:
        pack_head(model, self.head)

    def search(
        self, product: nn.Linear, pair: Pair, size_C: Tensor, error: Callable[[Tensor], float]
    ) -> Tensor:
        """(C,): the scales of the best ratio for one product of a float32 block. `error` is that of a weight
        in the product's place.
        """
        best, least = torch.ones_like(size_C), torch.inf
        for i in range(RATIOS):
            scale_C = size_C.pow(i / RATIOS).clamp(min=1e-4)
            scale_C /= (scale_C.max() * scale_C.min()).sqrt()
            scale_I = pair.spread(scale_C)
            groups = groups_of(product.weight * scale_I, self.group)
            rounded = Grid.fit(groups, self.bits, self.grid).round(groups).view_as(product.weight)
            loss = error(rounded / scale_I)
            if loss < least:
                best, least = scale_C, loss
        return best

    def round(
        self, product: nn.Linear, hessian_GKK: Tensor, loose: slice, dtype: torch.dtype
    ) -> GroupIntLinear:
        """Round one float32 product. Only rows in `loose` are clipped. The bias is stored as `dtype`."""
        weight_OI = product.weight.clone()
        if self.clip:
            weight_OI[loose] = self.clipped(weight_OI[loose], hessian_GKK)
        groups = groups_of(weight_OI, self.group)
        grid = Grid.fit(groups, self.bits, self.grid)
        bias = None if product.bias is None else product.bias.to(dtype)
        return packed(grid.codes(groups).view_as(weight_OI), grid, bias, self.group)

    def clipped(self, weight_OI: Tensor, hessian_GKK: Tensor) -> Tensor:
        """Each group's weights within the share of their largest magnitude that errs least."""
        outputs, inputs = weight_OI.shape
        width = hessian_GKK.shape[1]
        weight_GOK = weight_OI.view(outputs, -1, width).transpose(0, 1)
        top_GO1 = weight_GOK.abs().amax(2, keepdim=True)
        best, least = weight_GOK, torch.full_like(top_GO1, torch.inf)
        for i in range(SHRINKS):
            limit_GO1 = top_GO1 * (1 - i / RATIOS)
            narrow = torch.minimum(torch.maximum(weight_GOK, -limit_GO1), limit_GO1)
            rows = narrow.reshape(-1, width)
            off = Grid.fit(rows, self.bits, self.grid).round(rows).view_as(narrow) - weight_GOK
            loss = ((off @ hessian_GKK) * off).sum(2, keepdim=True)
            best = torch.where(loss < least, narrow, best)
            least = torch.minimum(loss, least)
        return best.transpose(0, 1).reshape(outputs, inputs)


class _Inputs:
    """What is asked of all inputs of a product: their mean magnitude, and x x^T of each group."""

    def __init__(self, inputs: int, group: int) -> None:
        self.size, self.hessian = Magnitude(inputs), GroupHessian(inputs, group)


def _some(inputs: Sequence[Tensor], tokens: int) -> Tensor:
    """(B, T, D) float32: evenly chosen windows with about so many tokens in all."""
    count = min(len(inputs), max(1, tokens // inputs[0].shape[1]))
    return torch.cat([inputs[i * len(inputs) // count] for i in range(count)]).float()


class _Errors:
    """What a weight in the place of a product of a float32 block costs: in the output of attention for `qkv`,
    of the MLP for `gate_up`, else of the product itself.
    """

    def __init__(self, block: Block, shown_BTD: Tensor, names: Iterable[str]) -> None:
        self.block = block
        self.read: dict[str, Tensor] = {}
        observe(block, [shown_BTD], {name: partial(self.read.__setitem__, name) for name in names})
        batch, length, _ = shown_BTD.shape
        self.turns, self.attend = rotation(block, batch, length, shown_BTD.dtype), dense_attend(batch)
        self.wanted = {name: self._output(name) for name in self.read}

    def _output(self, name: str) -> Tensor:
        x_NI = self.read[name]
        if name == "qkv":
            return self.block.attention(x_NI, self.turns, self.attend)
        return self.block.mlp(x_NI) if name == "gate_up" else getattr(self.block, name)(x_NI)

    def of(self, name: str, weight_OI: Tensor) -> float:
        product = getattr(self.block, name)
        dense, product.weight = product.weight, nn.Parameter(weight_OI, requires_grad=False)
        output = self._output(name)
        product.weight = dense
        return float((output - self.wanted[name]).square().mean())
