"""axicon: compress an open language model, repair it, prove it, serve it."""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from axicon.generate.local import LocalModel, load

__all__ = ["LocalModel", "__version__", "load"]


def __getattr__(name: str) -> object:
    """`load` and `LocalModel` on first use: importing axicon does not import torch."""
    if name in ("LocalModel", "load"):
        from axicon.generate import local

        return getattr(local, name)
    raise AttributeError(f"module 'axicon' has no attribute {name!r}")
