"""Where the parts of a model go."""

from __future__ import annotations

from axicon.place.plan import Plan, Stage, balanced

__all__ = ["Plan", "Stage", "balanced"]
