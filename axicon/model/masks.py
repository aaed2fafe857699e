"""Masks of pruned products: which weights are kept, told apart from those that are 0 by chance.

A pruned product stays an `nn.Linear` with zeros in its weight, so what reads dense models reads it. Beside
the weight lies a buffer `mask`, uint8 (O, ceil(I / 8)): bit k % 8 of byte k // 8 of row o, least significant
first, is 1 where weight (o, k) is kept. On disk it bears the weight's name with `.mask` for `.weight`.

A mask is what later steps go by: repair trains kept weights alone, rounding leaves the others at 0. A packed
form has none of its own: what was 0 is 0 there.
"""

from __future__ import annotations

from collections.abc import Container, Iterable

import torch
from torch import Tensor, nn

from axicon.model.group_int import pack, row_bytes, unpack

MASK = "mask"


def kept(linear: nn.Module) -> Tensor | None:
    """bool (O, I), True where a weight is kept; None for a product that is not pruned."""
    mask = linear._buffers.get(MASK)
    if mask is None or not isinstance(linear, nn.Linear):
        return None
    return unpack(mask, 1, linear.in_features).bool()


@torch.no_grad()
def prune(linear: nn.Linear, kept_OI: Tensor) -> None:
    """Put 0 where the mask is False, and the mask beside the weight."""
    linear.weight.masked_fill_(~kept_OI, 0)
    linear.register_buffer(MASK, pack(kept_OI.to(torch.uint8), 1))


def make_room(linear: nn.Linear) -> None:
    """For a reader: a mask without values yet, on the weight's device."""
    size = (linear.out_features, row_bytes(linear.in_features, 1))
    linear.register_buffer(MASK, torch.empty(size, dtype=torch.uint8, device=linear.weight.device))


def have_masks(products: Iterable[str], names: Container[str]) -> bool:
    """Whether all of these products of a checkpoint have a mask among the `names` of its tensors."""
    return all(f"{product}.{MASK}" in names for product in products)
