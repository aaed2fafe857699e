"""PERP: a few parameters repair a pruned model, and what is pruned stays so.

Zimmer et al., arXiv:2312.15230. Norms, biases, and low-rank adapters on the pruned products train, each a
switch of its own. With W pruned, M its mask, s = alpha / r, B (O, r) and A (r, I), a product computes with

    mask_lora     W + s M o (B A)        and merges to the same
    lora_prune    W + s B A              and merges to W + s M o (B A), so its loss jumps there
    scale_lora    W o (B A)              and merges to the same; B A is all ones at first

Differs from the released code: the mask is the explicit one of `axicon.model.masks` and not where W is 0, so
that a kept 0 may change; what trains is float32 in a model of any dtype; the masked sum is made again in the
backward pass instead of kept. The head trains through a plain adapter, untied from the embedding first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from axicon.errors import AxiconError
from axicon.model.decoder import Block, Decoder, Norm
from axicon.model.lowrank import TARGETS, Key, LoraLinear, freeze, parts_of, products, untie
from axicon.model.masks import kept, prune
from axicon.model.packed import PackedLinear

Kind = Literal["mask_lora", "lora_prune", "scale_lora"] | None
Subset = Literal["norms", "biases", "head"]
Pairs = tuple[Tensor, ...]
"""A and B of each part in turn: (r, I), (rows, r), ..."""


@dataclass(frozen=True, kw_only=True)
class Perp:
    train: tuple[Subset, ...] = ("norms", "biases")
    """Of norms, biases (those of layer norms too) and head, beside the adapters."""
    adapters: Kind = "mask_lora"
    """mask_lora, lora_prune, scale_lora or none."""
    r: int = 16
    alpha: float = 32.0
    """Over r: the scale s. scale_lora has none."""
    targets: tuple[str, ...] = TARGETS
    """Of q, k, v, out, gate, up, down, where a model has them."""
    mask: Literal["stored", "zeros"] = "stored"
    """zeros: in products without a mask, of a model that another program pruned, what is 0 is pruned."""
    untie: bool = False
    """Let a head that is tied to the embedding become a matrix of its own, which `head` asks for."""

    def __post_init__(self) -> None:
        if self.r < 1 or not self.alpha > 0:
            raise ValueError("r and alpha must be more than 0")
        for name, given, known in (
            ("train", self.train, ("norms", "biases", "head")), ("targets", self.targets, TARGETS)
        ):  # fmt: skip
            if set(given) - set(known) or (name == "targets" and not given):
                raise ValueError(f"{name} are some of {', '.join(known)}")
        if self.adapters not in (None, "mask_lora", "lora_prune", "scale_lora"):
            raise ValueError(
                "adapters are mask_lora, lora_prune, scale_lora or none; scheme=lora leaves plain ones "
                "beside the model"
            )

    def install(self, model: Decoder, key: Key) -> None:
        """Raises AxiconError for adapters on a model without masks, or one that is packed."""
        freeze(model)
        seed = key("adapters")
        if "head" in self.train:
            self._head(model, seed)
        if self.mask == "zeros":
            for block in model.blocks:
                prune_zeros(block)
        if self.adapters is not None:
            check_pruned(model, self.adapters)
        found: set[str] = set()
        for block in model.blocks:
            assert isinstance(block, Block)
            self.install_block(block, seed)
            found |= {part for _, one in products(block) if isinstance(one, Repaired) for part in one.parts}
        missing = set() if self.adapters is None or self.targets == TARGETS else set(self.targets) - found
        if missing:
            raise AxiconError(f"scheme.targets: this model has no product {', '.join(sorted(missing))}")
        if model.has_head and model.final_norm is not None:
            model.final_norm = cast(Norm, self._norm(model.final_norm))

    def install_block(self, block: Block, seed: int) -> None:
        """Put what trains into a frozen block."""
        biases = "biases" in self.train
        for name, product in list(products(block)):
            parts = {} if self.adapters is None else {
                part: rows for part, rows in parts_of(block, name).items() if part in self.targets
            }  # fmt: skip
            biased = biases and getattr(product, "bias", None) is not None
            if biased and not isinstance(product, nn.Linear):
                raise AxiconError("biases of packed products do not train; leave biases out of scheme.train")
            if isinstance(product, nn.Linear) and (parts or biased):
                place = f"blocks.{block.index}.{name}"
                setattr(block, name, Repaired(product, parts, self, seed, place, biased))
        for name, module in list(block.named_children()):
            if isinstance(module, Norm):
                setattr(block, name, self._norm(module))

    def merge(self, model: Decoder) -> None:
        for block in model.blocks:
            self.merge_block(block)
        if model.has_head and isinstance(model.final_norm, TrainedNorm):
            model.final_norm = model.final_norm.merged()
        if model.has_head and isinstance(model.lm_head, LoraLinear):
            model.lm_head = model.lm_head.merged()
        freeze(model)

    def merge_block(self, block: nn.Module) -> None:
        """Plain products and norms again, with what was trained in them and their masks kept."""
        for name, module in list(block.named_children()):
            if isinstance(module, Repaired | TrainedNorm):
                setattr(block, name, module.merged())

    def _norm(self, norm: Norm) -> nn.Module:
        trains = [
            name for name, subsets in (("weight", {"norms"}), ("bias", {"norms", "biases"}))
            if getattr(norm, name) is not None and subsets & set(self.train)
        ]  # fmt: skip
        return TrainedNorm(norm, trains) if trains else norm

    def _head(self, model: Decoder, seed: int) -> None:
        if not isinstance(model.lm_head, nn.Linear):
            raise AxiconError("scheme.train=head: the head is packed here; leave head out")
        if model.shape.tie_head and not self.untie:
            raise AxiconError(
                "scheme.train=head: the head is tied to the embedding, which would change with it; "
                "scheme.untie=true makes it a matrix of its own, or leave head out"
            )
        untie(model)
        head = LoraLinear(model.lm_head, {"head": slice(None)}, self.r, self.alpha, seed, "lm_head")
        model.lm_head = cast(nn.Linear, head)


def check_pruned(model: nn.Module, kind: str) -> None:
    """Raises AxiconError where adapters of this kind have nothing to keep."""
    packed = sorted({m.format for m in model.modules() if isinstance(m, PackedLinear)})
    if packed:
        raise AxiconError(
            f"adapters={kind}: products are stored as {', '.join(packed)} here; repair the pruned model "
            "first, and pack it after that"
        )
    if not any(kept(m) is not None for m in model.modules()):
        raise AxiconError(
            f"adapters={kind}: no product of this model has a mask, so nothing says what is pruned; prune it "
            "first (axicon compress magnitude), or give scheme.mask=zeros for one that another program pruned"
        )


def prune_zeros(block: nn.Module) -> None:
    """A mask for every product that has none and has zeros."""
    for _, product in products(block):
        if isinstance(product, nn.Linear) and kept(product) is None and bool((product.weight == 0).any()):
            prune(product, product.weight != 0)


class _Product(torch.autograd.Function):
    """x of a product with adapters that its mask holds for. Between the passes only what there was before is
    kept: the sum of weight and adapters is as large as the weight."""

    @staticmethod
    def forward(
        x: Tensor, weight_OI: Tensor, bias: Tensor | None, keep_OI: Tensor, kind: str, scale: float,
        rows: tuple[slice, ...], *pairs: Tensor,
    ) -> Tensor:  # fmt: skip
        return F.linear(x, effective(weight_OI, keep_OI, kind, scale, rows, pairs), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, keep, ctx.kind, ctx.scale, ctx.rows, *pairs = inputs
        ctx.has_bias = bias is not None
        ctx.save_for_backward(x, weight, keep, *pairs)
        ctx.save_for_forward(x, weight, keep, *pairs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, keep, *pairs = ctx.saved_tensors
        wants_x, _, wants_bias, *_ = ctx.needs_input_grad
        grad_x = grad_bias = None
        if wants_x:
            grad_x = grad @ effective(weight, keep, ctx.kind, ctx.scale, ctx.rows, tuple(pairs))
        if wants_bias:
            grad_bias = grad.flatten(0, -2).sum(0)
        slope = (grad.flatten(0, -2).T @ x.flatten(0, -2)).float().mul_(keep)
        slope = slope.mul_(ctx.scale if ctx.kind == "mask_lora" else weight)
        found: list[Tensor] = []
        for part, a, b in zip(ctx.rows, pairs[::2], pairs[1::2], strict=True):
            found += [b.T @ slope[part], slope[part] @ a.T]
        return grad_x, None, grad_bias, None, None, None, None, *found

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        x, weight, keep, *pairs = ctx.saved_tensors
        by_x, _, by_bias, _, _, _, _, *by_pairs = tangents
        low = torch.zeros_like(weight, dtype=torch.float32)
        for part, a, b, by_a, by_b in zip(
            ctx.rows, pairs[::2], pairs[1::2], by_pairs[::2], by_pairs[1::2], strict=True
        ):
            low[part] = (0 if by_b is None else by_b @ a) + (0 if by_a is None else b @ by_a)
        low.mul_(keep).mul_(ctx.scale if ctx.kind == "mask_lora" else weight)
        y = F.linear(x, low.to(weight.dtype), by_bias)
        if by_x is not None:
            y = y + F.linear(by_x, effective(weight, keep, ctx.kind, ctx.scale, ctx.rows, tuple(pairs)))
        return y


def effective(
    weight_OI: Tensor, keep_OI: Tensor, kind: str, scale: float, rows: tuple[slice, ...], pairs: Pairs
) -> Tensor:
    """The weight that a product computes with, and that it is merged to."""
    low_OI = torch.full_like(weight_OI, float(kind == "scale_lora"), dtype=torch.float32)
    for part, a, b in zip(rows, pairs[::2], pairs[1::2], strict=True):
        torch.mm(b, a, out=low_OI[part])
    if kind == "mask_lora":
        low_OI.mul_(keep_OI).mul_(scale).add_(weight_OI)
    else:
        low_OI.mul_(weight_OI)
    return low_OI.to(weight_OI.dtype)


def factors(mask_OI: Tensor) -> Tensor:
    """1 where a weight is kept, else 0. On a CPU a product with it takes a fifteenth of `masked_fill`."""
    return mask_OI.to(torch.bfloat16)


class Repaired(LoraLinear):
    """A product with adapters on parts of its rows that leave its mask, and a bias that may train."""

    base: nn.Linear
    keep_OI: Tensor

    def __init__(
        self, base: nn.Linear, parts: dict[str, slice], perp: Perp, seed: int, place: str, biased: bool
    ) -> None:
        super().__init__(base, parts, perp.r, perp.alpha, seed, place)
        self.kind = perp.adapters
        mask = kept(base)
        mask = torch.ones_like(base.weight, dtype=torch.bool) if mask is None else mask
        self.register_buffer("keep_OI", factors(mask), persistent=False)
        bias = base.bias.detach().float() if biased else None
        self.bias = None if bias is None else nn.Parameter(bias.clone())
        if self.kind == "scale_lora":
            for value in (value for part in parts for value in self.pair(part)):
                nn.init.constant_(value, 1 / math.sqrt(perp.r))

    def forward(self, x: Tensor) -> Tensor:
        bias = self.base.bias if self.bias is None else self.bias.to(x.dtype)
        if self.parts and self.kind != "lora_prune":
            y = _Product.apply(x, self.base.weight, bias, self.keep_OI, *self._adapters())
            return cast(Tensor, y)
        return self.add_low(x, F.linear(x, self.base.weight, bias))

    def _adapters(self) -> tuple[Any, ...]:
        pairs = [value for part in self.parts for value in self.pair(part)]
        return self.kind, self.scale, tuple(self.parts.values()), *pairs

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        base = self.base
        if self.parts:
            kind, scale, rows, *pairs = self._adapters()
            kind = "mask_lora" if kind == "lora_prune" else kind
            base.weight.copy_(effective(base.weight, self.keep_OI, kind, scale, rows, tuple(pairs)))
            if (mask := kept(base)) is not None:
                prune(base, mask)
        if self.bias is not None:
            base.bias.copy_(self.bias)
        return base


class TrainedNorm(nn.Module):
    """A norm whose scale or shift trains in float32, and is rounded to the model's dtype where it is used."""

    def __init__(self, norm: Norm, trains: list[str]) -> None:
        super().__init__()
        self.norm = norm
        for name in trains:
            self.register_parameter(name, nn.Parameter(getattr(norm, name).detach().float().clone()))

    def forward(self, x: Tensor) -> Tensor:
        own = {name: p.to(x.dtype) for name, p in self.named_parameters(recurse=False)}
        return cast(Tensor, functional_call(self.norm, own, (x,)))

    @torch.no_grad()
    def merged(self) -> Norm:
        for name, p in self.named_parameters(recurse=False):
            self.norm.get_parameter(name).copy_(p)
        return self.norm


class MaskedLinear(nn.Module):
    """A pruned product all of whose kept weights train: what an update makes of the others is not seen."""

    keep_OI: Tensor

    def __init__(self, base: nn.Linear, mask_OI: Tensor) -> None:
        super().__init__()
        self.base = base
        self.register_buffer("keep_OI", factors(mask_OI), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.base.weight * self.keep_OI, self.base.bias)

    @staticmethod
    def install(block: nn.Module) -> None:
        for name, product in list(products(block)):
            if (mask := kept(product)) is not None:
                setattr(block, name, MaskedLinear(cast(nn.Linear, product), mask))

    @staticmethod
    def merge(block: nn.Module) -> None:
        for name, product in list(products(block)):
            if isinstance(product, MaskedLinear):
                prune(product.base, product.keep_OI != 0)
                setattr(block, name, product.base)
