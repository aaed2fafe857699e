"""The shape of a sliced model (SliceGPT, arXiv:2401.15024): a narrower residual stream with shortcuts around
attention and MLP, which bring it from one basis to the next.

Norms became RMS norms over the original width. The last block hands on the full width in the original basis,
so the head is the dense model's. In `config.json`, beside what the dense model's says:

    "slicing": {"version": 1, "width": 448, "projected": true}

`projected` keeps the token embedding as it was, so that the head can stay tied to it, and projects what is
embedded; without it the embedding is narrow and the head has a weight of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from axicon.errors import AxiconError

if TYPE_CHECKING:
    from axicon.model.shape import BlockShape, ModelShape

KEY = "slicing"
VERSION = 1


def why_not(shape: ModelShape) -> str | None:
    """Why a model cannot be sliced, in words that follow its name."""
    reasons = {
        "has its norms behind the residual sum, inside the path that would be rotated": not shape.norm_first,
        "has no norm before its head": not shape.final_norm,
        "has its MLP beside attention": any(block.parallel for block in shape.blocks),
        "projects between embedding and residual width": shape.project_in or shape.project_out,
        "is sliced already": any(block.attention_shortcut for block in shape.blocks),
        "has gates on its heads, which read the stream that would be rotated": any(
            block.attention.gated for block in shape.blocks
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def sliced(shape: ModelShape, width: int, *, projected: bool) -> ModelShape:
    """What becomes of a dense shape. Raises ValueError where it cannot be, and for a width out of range."""
    if (reason := why_not(shape)) is not None:
        raise ValueError(f"a model that {reason}")
    if not 0 < width <= shape.width:
        raise ValueError(f"{width} of {shape.width} channels")
    shifted = shape.norm == "layer" and shape.norm_affine  # what norms add becomes biases
    last = shape.layers - 1
    blocks = tuple(
        sliced_block(block, width, shape.width if i == last else width, shifted=shifted or block.qkv_bias)
        for i, block in enumerate(shape.blocks)
    )
    return dataclasses.replace(
        shape, blocks=blocks, embedding_width=shape.width if projected else width, norm="rms",
        norm_width=shape.width, norm_affine=True, input_projection=projected,
        head_bias=shape.head_bias or shifted, tie_head=shape.tie_head and projected,
    )  # fmt: skip


def sliced_block(block: BlockShape, width: int, width_out: int, *, shifted: bool) -> BlockShape:
    """`shifted`: the product behind each norm has a bias. The two of an MLP go together."""
    return dataclasses.replace(
        block, width_in=width, width_middle=width, width_out=width_out, attention_shortcut=True,
        mlp_shortcut=True, qkv_bias=shifted, mlp_bias=block.mlp_bias or (shifted and not block.gated),
    )  # fmt: skip


def as_config(shape: ModelShape) -> dict[str, Any] | None:
    """The value of `slicing` for a shape made by `sliced`; None for another one."""
    if not any(block.attention_shortcut for block in shape.blocks):
        return None
    return {"version": VERSION, "width": shape.blocks[0].width_in, "projected": shape.input_projection}


def read(shape: ModelShape, found: Any) -> ModelShape:
    """The shape of a model whose config has `found` beside what makes `shape`. Raises AxiconError."""
    where = f"config.json: {KEY}"
    if not isinstance(found, Mapping) or found.keys() != {"version", "width", "projected"}:
        raise AxiconError(f"{where} is not what axicon writes; make the model again")
    if found["version"] != VERSION:
        raise AxiconError(
            f"{where} has version {found['version']!r}, this axicon reads {VERSION}; update axicon"
        )
    width, projected = found["width"], found["projected"]
    if type(width) is not int or type(projected) is not bool:
        raise AxiconError(f"{where} has a width of {width!r} and is projected {projected!r}; make it again")
    try:
        return sliced(shape, width, projected=projected)
    except ValueError as e:
        raise AxiconError(f"{where}: {e}; make the model again") from None
