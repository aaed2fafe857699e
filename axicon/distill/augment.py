"""Augmentation that a gradient goes through, another one for every example and every time it is seen.

After differentiable siamese augmentation (Zhao and Bilen, arXiv:2102.08259): `shift` moves an image by up to
an eighth of its side, `scale` stretches it by up to 1.2 each way, `rotate` turns it by up to 15 degrees,
`flip` mirrors it, and `cutout` hides a square of half its side; what comes in from outside is 0. Vectors take
`noise` (a standard deviation of 0.01) and `dropout` (a tenth of the features).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from axicon.errors import AxiconError

IMAGES = ("shift", "scale", "rotate", "flip", "cutout", "noise")
VECTORS = ("noise", "dropout")
SHIFT, SCALE, DEGREES, CUTOUT, NOISE, DROPOUT = 1 / 8, 1.2, 15.0, 0.5, 0.01, 0.1


@dataclass(frozen=True)
class Augment:
    """Called with inputs (B, ...) and a generator."""

    names: tuple[str, ...]

    @classmethod
    def of(cls, names: tuple[str, ...], *, images: bool) -> Augment | None:
        """None where nothing is asked for. Raises AxiconError for a name that these inputs do not know."""
        known = IMAGES if images else VECTORS
        for name in names:
            if name not in known:
                what = "images" if images else "vectors"
                raise AxiconError(f"augment={name}: known for {what} are {', '.join(known)}")
        return cls(tuple(name for name in known if name in names)) if names else None

    def __call__(self, x: Tensor, chance: torch.Generator) -> Tensor:
        if {"shift", "scale", "rotate", "flip"} & {*self.names}:
            x = self._moved(x, chance)
        if "cutout" in self.names:
            x = x * _holes(x, chance)
        if "dropout" in self.names:
            keep = torch.rand(x.shape, generator=chance) >= DROPOUT
            x = x * keep / (1 - DROPOUT)
        if "noise" in self.names:
            x = x + NOISE * torch.randn(x.shape, generator=chance)
        return x

    def _moved(self, x: Tensor, chance: torch.Generator) -> Tensor:
        """One resampling for all that moves pixels."""

        def uniform() -> Tensor:
            return torch.rand(len(x), generator=chance) * 2 - 1

        zero, one = torch.zeros(len(x)), torch.ones(len(x))
        angle = uniform() * math.radians(DEGREES) if "rotate" in self.names else zero
        wide, high = (SCALE ** uniform() for _ in range(2)) if "scale" in self.names else (one, one)
        if "flip" in self.names:
            wide = wide * torch.where(uniform() < 0, -1.0, 1.0)
        # The grid is from -1 to 1, so a side is 2.
        right, down = (2 * SHIFT * uniform() for _ in range(2)) if "shift" in self.names else (zero, zero)
        rows = [
            torch.stack([angle.cos() * wide, -angle.sin() * high, right], dim=1),
            torch.stack([angle.sin() * wide, angle.cos() * high, down], dim=1),
        ]
        grid = F.affine_grid(torch.stack(rows, dim=1), list(x.shape), align_corners=False)
        return F.grid_sample(x, grid, align_corners=False)


def _holes(x: Tensor, chance: torch.Generator) -> Tensor:
    """(B, 1, H, W): 0 in a square around a random pixel, 1 elsewhere."""
    height, width = x.shape[-2:]
    masks = []
    for side in (height, width):
        centre = torch.randint(side, (len(x), 1), generator=chance)
        masks.append((torch.arange(side) - centre).abs() < max(1, round(side * CUTOUT / 2)))
    return 1 - (masks[0][:, None, :, None] & masks[1][:, None, None, :]).float()
