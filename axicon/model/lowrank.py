"""Low-rank adapters on the products of a decoder, and which products there are.

Adapters are float32 whatever the model is. Random starts are functions of a key and a parameter's name, so no
order of making them matters.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from axicon.errors import AxiconError
from axicon.kernels.directions import uniforms
from axicon.model.decoder import Block, Decoder
from axicon.model.masks import kept
from axicon.model.packed import PackedLinear

Key = Callable[..., int]
"""64 random bits for words, as `Moment.key` has them."""

PRODUCTS = ("qkv", "out", "gate_up", "up", "down")
TARGETS = ("q", "k", "v", "out", "gate", "up", "down")
"""Products of a block by the names they have before some are made one."""


def freeze(model: nn.Module) -> None:
    for p in model.parameters():
        p.requires_grad_(False)


def untie(model: Decoder) -> None:
    """Make a head that is tied to the embedding a matrix of its own."""
    if model.shape.tie_head:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone(), requires_grad=False)
        model.shape = dataclasses.replace(model.shape, tie_head=False)


def products(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The products of a block by the attributes they are."""
    for name in PRODUCTS:
        if (module := getattr(block, name, None)) is not None:
            yield name, module


def parts_of(block: Block, name: str) -> dict[str, slice]:
    """Rows of each target within a product."""
    return block.shape.parts(name) if name in ("qkv", "gate_up") else {name: slice(None)}


class LoraLinear(nn.Module):
    """A product with adapters on parts of its rows: `q_a` (r, I) and `q_b` (rows, r) for part q."""

    def __init__(
        self, base: nn.Module, parts: dict[str, slice], r: int, alpha: float, seed: int, place: str
    ) -> None:
        super().__init__()
        self.base, self.parts, self.scale = base, parts, alpha / r
        if isinstance(base, PackedLinear):
            outputs, inputs, device = base.outputs, base.inputs, next(base.buffers()).device
        else:
            assert isinstance(base, nn.Linear)
            outputs, inputs, device = base.out_features, base.in_features, base.weight.device
        if device.type == "meta":  # beside a product without values, adapters have theirs all the same
            device = torch.device("cpu")
        for part, rows in parts.items():
            a = uniform(seed, f"{place}.{part}_a", (r, inputs), 1 / math.sqrt(inputs), device)
            b = torch.zeros(len(range(outputs)[rows]), r, device=device)
            self.register_parameter(f"{part}_a", nn.Parameter(a))
            self.register_parameter(f"{part}_b", nn.Parameter(b))

    def pair(self, part: str) -> tuple[Tensor, Tensor]:
        return getattr(self, f"{part}_a"), getattr(self, f"{part}_b")

    def forward(self, x: Tensor) -> Tensor:
        return self.add_low(x, self.base(x))

    def add_low(self, x: Tensor, y: Tensor) -> Tensor:
        """`y` with what the adapters make of x; `y` is used up."""
        for part, rows in self.parts.items():
            a, b = self.pair(part)
            low = F.linear(F.linear(x.to(a.dtype), a), b * self.scale).to(y.dtype)
            if rows == slice(None):
                y = y + low
            else:
                y[..., rows] += low
        return y

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The product with its adapters inside."""
        if not isinstance(self.base, nn.Linear):
            raise AxiconError(
                "adapters cannot become part of packed weights without rounding these again; "
                "take output=adapter, or train on the dense model"
            )
        if kept(self.base) is not None:
            raise AxiconError(
                "adapters would fill what was pruned; take output=adapter, or scheme=perp, which keeps masks"
            )
        for part, rows in self.parts.items():
            a, b = self.pair(part)
            weight = self.base.weight[rows]
            weight.copy_(weight.float() + self.scale * (b @ a))
        return self.base


def uniform(seed: int, name: str, shape: tuple[int, int], bound: float, device: torch.device) -> Tensor:
    """float32, uniform in -bound .. bound."""
    stream = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little")
    words = uniforms(seed, stream, 0, shape[0] * shape[1])
    return (((words.double() + 0.5) * 2.0**-31 - 1) * bound).float().view(shape).to(device)
