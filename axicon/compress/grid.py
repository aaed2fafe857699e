"""Evenly spaced grids for weights: fitted to a group, and weights put on them.

Three kinds, all of which hold 0 exactly, so that pruned weights stay 0:

    absmax      GLM-130B: largest magnitude / (2^(bits - 1) - 1); the lowest code stays unused
    symmetric   GPTQ's: 2 * largest magnitude / (2^bits - 1); the largest positive weights are clipped
    asymmetric  from the smallest to the largest weight, 0 included, with a zero of its own

Unlike GPTQ's code, `symmetric` mirrors groups without negative weights too. Scales are rounded to the dtype
they are stored in before weights are divided by them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from axicon.model.group_int import GroupIntLinear

Kind = Literal["absmax", "symmetric", "asymmetric"]
SHRINKS, EXPONENT = 80, 2.4
"""Of the search for the best range, as in GPTQ's code."""


@dataclass(frozen=True)
class Grid:
    """Scale and zero of each of R groups, float32 (R, 1); zero is whole numbers 0 .. 2^bits - 1."""

    scale: Tensor
    zero: Tensor
    bits: int
    kind: Kind

    @classmethod
    def fit(
        cls, weight_RK: Tensor, bits: int, kind: Kind, *, search: bool = False,
        scale_dtype: torch.dtype = torch.float16,
    ) -> Grid:
        """For R groups of K float32 weights. `search` tries to narrow the range, for the least error."""
        low = weight_RK.amin(1, keepdim=True).clamp(max=0)
        high = weight_RK.amax(1, keepdim=True).clamp(min=0)
        if kind != "asymmetric":
            high = torch.maximum(high, -low)
            low = -high
        best = cls._of(low, high, bits, kind, scale_dtype)
        if not search:
            return best
        least = (best.round(weight_RK) - weight_RK).abs().pow(EXPONENT).sum(1, keepdim=True)
        scale, zero = best.scale.clone(), best.zero.clone()
        for i in range(1, SHRINKS):
            share = 1 - i / 100
            grid = cls._of(share * low, share * high, bits, kind, scale_dtype)
            error = (grid.round(weight_RK) - weight_RK).abs().pow(EXPONENT).sum(1, keepdim=True)
            better = error < least
            least = torch.where(better, error, least)
            scale, zero = torch.where(better, grid.scale, scale), torch.where(better, grid.zero, zero)
        return cls(scale, zero, bits, kind)

    @classmethod
    def _of(cls, low: Tensor, high: Tensor, bits: int, kind: Kind, scale_dtype: torch.dtype) -> Grid:
        top = 2**bits - 1
        if kind == "absmax":
            scale = (high / (2 ** (bits - 1) - 1)).to(scale_dtype).float()
        else:
            scale = ((high - low) / top).to(scale_dtype).float()
        if kind == "asymmetric":
            zero = (-low / torch.where(scale > 0, scale, 1.0)).round().clamp(0, top)
        else:
            zero = torch.full_like(scale, 2 ** (bits - 1))
        return cls(scale, zero, bits, kind)

    def codes(self, weight_RK: Tensor) -> Tensor:
        """float32 (R, K), whole numbers 0 .. 2^bits - 1. All weights of a group of scale 0 are 0."""
        # Not a multiplication by 1 / scale, which for the smallest scales is infinite.
        steps = (weight_RK / torch.where(self.scale > 0, self.scale, torch.inf)).round()
        lowest = 1 if self.kind == "absmax" else 0
        return (steps + self.zero).clamp(lowest, 2**self.bits - 1)

    def values(self, codes_RK: Tensor) -> Tensor:
        return self.scale * (codes_RK - self.zero)

    def round(self, weight_RK: Tensor) -> Tensor:
        """Every weight's nearest value on the grid."""
        return self.values(self.codes(weight_RK))


def groups_of(weight_OI: Tensor, group: int) -> Tensor:
    """(O * G, K): the groups of all rows, row after row. `group` divides the inputs, or is 0 or less."""
    return weight_OI.reshape(-1, group if group > 0 else weight_OI.shape[1])


def packed(
    codes_OI: Tensor, grid: Grid, bias: Tensor | None, group: int, scale_dtype: torch.dtype = torch.float16
) -> GroupIntLinear:
    """The stored form of codes and the grid of `groups_of`."""
    outputs = len(codes_OI)
    zero = grid.zero.view(outputs, -1) if grid.kind == "asymmetric" else None
    return GroupIntLinear.from_codes(
        codes_OI, grid.scale.view(outputs, -1).to(scale_dtype), zero, bias, bits=grid.bits, group=group)
