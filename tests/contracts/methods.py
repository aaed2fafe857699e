"""Every compression method as the contracts run it: its defaults, and what one cannot do without."""

from __future__ import annotations

from typing import Any

from axicon.compress import COMPRESSORS
from axicon.compress.chain import Chain
from axicon.protocols import Compressor

NEEDED: dict[str, dict[str, Any]] = {
    # The head of the models here is tied, and they are so small that shortcuts make them larger.
    "slice_gpt": {"tie": "project", "max_size_ratio": 2.0},
}

PRUNED = ("reconstruct", "tiled_sparse")
"""They repair or pack what another method has pruned."""


def made(method: str, **settings: Any) -> Compressor:
    one = COMPRESSORS[method](**NEEDED.get(method, {}) | settings)
    if method not in PRUNED:
        return one
    return Chain(("magnitude", method), (COMPRESSORS["magnitude"](), one))
