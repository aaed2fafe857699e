"""Rules by product name: which products a method leaves dense, and which get other settings.

    rules: {"*.down": {bits: 8}, "blocks.0.*": skip}

A method that has a field `rules: Rules` asks `products` for what to pack in a block, each with the method as
the rules change it. Where several patterns match a name, the last one holds and the others do not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import torch
from torch import nn

from axicon.errors import AxiconError
from axicon.model import checkpoint
from axicon.model.decoder import Block, Decoder
from axicon.model.group_int import group_count
from axicon.model.packed import PackedLinear

Rules = dict[str, Literal["skip"] | dict[str, bool | int | float | str]]


@runtime_checkable
class Ruled(Protocol):
    """A method with rules. Its fields `bits` and `group` may be among what a rule changes."""

    @property
    def rules(self) -> Rules: ...


T = TypeVar("T", bound=Ruled)


def check_rules(method: Ruled, name: str, changeable: tuple[str, ...] = ("bits", "group")) -> None:
    """For `__post_init__`. Raises AxiconError for a rule that sets something else, or to what cannot be."""
    for pattern, rule in method.rules.items():
        if rule == "skip":
            continue
        for key, value in rule.items():
            if key not in changeable:
                raise AxiconError(
                    f"{name}: rules of {pattern!r}: unknown key {key!r}: known are {', '.join(changeable)}, "
                    "or skip in place of them all")
            wanted = type(getattr(method, key))
            if type(value) is not wanted:
                raise AxiconError(f"{name}: rules of {pattern!r}: {key}={value} must be {_NOUNS[wanted]}")
        _changed(method, rule)


_NOUNS: Mapping[type, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}


def _changed(method: T, rule: Mapping[str, Any]) -> T:
    return dataclasses.replace(method, rules={}, **rule)  # type: ignore[type-var]


def ruled(method: T, name: str) -> T | None:
    """The method for the product of this name, such as `blocks.0.qkv`; None: it stays dense."""
    found = [rule for pattern, rule in method.rules.items() if fnmatchcase(name, pattern)]
    if not found:
        return method
    return None if found[-1] == "skip" else _changed(method, found[-1])


def products(method: T, block: Block, kind: str) -> Iterator[tuple[str, nn.Linear, T]]:
    """What to pack of a block, in the order of its computation: attribute, product, method.

    Raises AxiconError, which begins with `kind`, for a product that is packed already, and for one that the
    method's `group` does not divide.
    """
    for attribute, module in list(block.named_children()):
        name = f"blocks.{block.index}.{attribute}"
        one = ruled(method, name)
        if one is None or not isinstance(module, nn.Linear | PackedLinear):
            continue
        if isinstance(module, PackedLinear):
            raise AxiconError(
                f"{kind}: {name} is packed already ({module.format}); start from the dense model, or skip it")
        try:
            group_count(module.in_features, getattr(one, "group", 0))
        except ValueError as e:
            raise AxiconError(f"{kind}: {name}: {e}") from None
        yield attribute, module, one


def check_fit(method: object, kind: str, source: Path) -> None:
    """Whether a method's rules, if it has any, fit the model of a directory. Raises AxiconError as `products`
    does, and for a pattern that is the name of nothing in it.
    """
    if not isinstance(method, Ruled):
        return
    with torch.device("meta"):
        blocks = [block for block in Decoder(checkpoint.shape_of(source)).blocks if isinstance(block, Block)]
    names = []
    for block in blocks:
        list(products(method, block, kind))
        weights = [name for name, m in block.named_children() if isinstance(m, nn.Linear | PackedLinear)]
        names += [f"blocks.{block.index}.{name}" for name in weights]
    for pattern in method.rules:
        if not any(fnmatchcase(name, pattern) for name in names):
            ends = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
            raise AxiconError(
                f"{kind}: rules of {pattern!r}: no product of this model has such a name; they are called "
                f"{names[0]} to {names[-1]}, with {ends} at the end")
