"""The head beside the products of the blocks: dense as it was, or with a packed copy for logits."""

from __future__ import annotations

from typing import Literal

from axicon.model.decoder import Decoder
from axicon.model.int8 import Int8Linear

Head = Literal["dense", "int8"]


def pack_head(model: Decoder, head: Head) -> None:
    """A tied embedding keeps its own weight: only the product is replaced."""
    if head == "int8":
        packed = Int8Linear.from_linear(model.lm_head, threshold=0.0, relative=5.0)
        model.lm_head = packed  # type: ignore[assignment]
