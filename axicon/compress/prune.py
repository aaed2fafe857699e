"""What methods that remove weights share: their settings checked, products found, and the choice by scores.

Of n:m (2:4) the n best of every m neighbouring inputs of an output stay. Equal scores go in the order of the
columns, first ones first, so a count is exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from axicon.compress.rules import Rules, check_rules, products
from axicon.errors import AxiconError
from axicon.model.decoder import Block, Decoder
from axicon.model.masks import kept

UNSTRUCTURED = "unstructured"


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """The settings that these methods have in common. Raises AxiconError for some that mean nothing."""

    stage: ClassVar[str] = "prune"
    kind: ClassVar[str]
    """What users call the method."""
    sparsity: float = 0.5
    """Share of the weights that goes, of what the method ranks together."""
    pattern: str = UNSTRUCTURED
    """n:m, such as 2:4: the n best of every m neighbouring inputs stay."""
    continued: bool = False
    """Go on from the masks of a pruned model: what is removed stays removed, and counts."""
    rules: Rules = field(default_factory=dict)
    """Other `sparsity` or `pattern`, or skip, by patterns of product names."""

    @property
    def needs_inputs(self) -> bool:
        return True

    def __post_init__(self) -> None:
        _check(self, self.kind)

    def begin(self, model: Decoder) -> None:
        """Nothing to prepare."""

    def finish(self, model: Decoder) -> None:
        """The head stays as it is."""


T = TypeVar("T", bound=Pruning)


def _check(method: Pruning, name: str) -> None:
    """Also of settings in rules."""
    if not 0 <= method.sparsity < 1:
        raise AxiconError(
            f"{name}: sparsity={method.sparsity:g}: the share of weights that goes, from 0 to below 1"
        )
    if method.pattern != UNSTRUCTURED:
        keep, group = pattern_of(method.pattern, name)
        if abs(1 - keep / group - method.sparsity) > 1e-9:
            raise AxiconError(
                f"{name}: pattern={method.pattern} removes {1 - keep / group:g} of the weights, "
                f"sparsity={method.sparsity:g} says otherwise; set sparsity={1 - keep / group:g}"
            )
    check_rules(method, name, ("sparsity", "pattern"))


def pattern_of(text: str, name: str) -> tuple[int, int]:
    """`2:4` is (2, 4): how many stay, and of how many."""
    keep, _, group = text.partition(":")
    if not (keep.isdecimal() and group.isdecimal() and 1 <= int(keep) < int(group) <= 64):
        raise AxiconError(
            f"{name}: pattern={text}: {UNSTRUCTURED}, or n:m such as 2:4, where n of m stay, m at most 64"
        )
    return int(keep), int(group)


def to_prune(method: T, block: Block) -> Iterator[tuple[str, nn.Linear, T, Tensor | None]]:
    """Attribute, product, method as the rules change it, and with `continued` the mask so far, bool (O, I).

    Raises AxiconError for a product that is packed, for one that is pruned if that is not continued, for
    weights that are not finite, and for one whose inputs a pattern does not divide.
    """
    kind = method.kind
    for attribute, linear, one in products(method, block, kind):
        name = f"blocks.{block.index}.{attribute}"
        before = kept(linear)
        if before is not None and not method.continued:
            gone = 1 - float(before.double().mean())
            raise AxiconError(
                f"{kind}: {name} is pruned already ({gone:.1%} of its weights); start from the dense model, "
                "or go on from its mask with continued=true"
            )
        if not all(extreme.isfinite() for extreme in linear.weight.aminmax()):
            raise AxiconError(f"{kind}: {name} holds NaN or infinite weights; the model is damaged")
        if one.pattern != UNSTRUCTURED:
            _, group = pattern_of(one.pattern, kind)
            if linear.in_features % group:
                raise AxiconError(
                    f"{kind}: {name} has {linear.in_features} inputs, which groups of {group} do not divide; "
                    f"take another pattern, or leave it out: rules: {{{name!r}: skip}}"
                )
        yield attribute, linear, one, before


def matrices(block: Block, attribute: str) -> list[slice]:
    """The rows of each matrix of the checkpoint that a product of the decoder is made of."""
    if attribute in ("qkv", "gate_up"):
        return list(block.shape.parts(attribute).values())
    return [slice(None)]


def kept_best(score_RK: Tensor, method: Pruning, before_RK: Tensor | None = None) -> Tensor:
    """bool (R, K): what stays of each row by the method's sparsity or pattern. Scores are 0 or more.

    What an earlier mask `before_RK` has removed stays removed, and counts.
    """
    if method.pattern == UNSTRUCTURED:
        return without_lowest(score_RK, int(score_RK.shape[1] * method.sparsity), before_RK)
    keep, group = pattern_of(method.pattern, "pattern")
    before = None if before_RK is None else before_RK.reshape(-1, group)
    return without_lowest(score_RK.reshape(-1, group), group - keep, before).view_as(score_RK)


def without_lowest(score_RK: Tensor, count: int, before_RK: Tensor | None = None) -> Tensor:
    """bool (R, K): False for the `count` lowest of each row, which what is gone before comes first of."""
    if before_RK is not None:
        score_RK = score_RK.masked_fill(~before_RK, -1)
    order_RK = score_RK.sort(dim=1, stable=True).indices[:, :count]
    kept_RK = torch.ones_like(score_RK, dtype=torch.bool).scatter_(1, order_RK, False)
    return kept_RK if before_RK is None else kept_RK & before_RK
