"""A distilled data set as an artefact: tensors, a sheet of its images, and a manifest of how it was made."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from axicon.distill.examples import EXTRA, Examples
from axicon.errors import AxiconError
from axicon.model.artefact import DATASET, write_bytes

if TYPE_CHECKING:
    from PIL.Image import Image

SHEET = "contact_sheet.png"
SIDE, GAP, LABEL = 64, 4, 48
"""Pixels of a shown image at least, between two, and for the names of classes."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Dataset:
    examples: Examples
    alpha: float
    """The learning rate to train with, which was distilled along."""

    def write(self, folder: Path) -> None:
        """`synthetic.safetensors`, and the sheet where these are images."""
        made = self.examples
        tensors = {
            "x": made.x, "y": made.y, "mean": made.mean, "std": made.std, "alpha": torch.tensor(self.alpha)
        }  # fmt: skip
        plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
        write_bytes(folder / DATASET, save(plain, {"classes": json.dumps(made.classes)}))
        if made.images:
            sheet(made).save(folder / SHEET, optimize=True)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Raises AxiconError for a folder that holds none."""
        path = folder / DATASET
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in ("x", "y", "mean", "std", "alpha")}
                classes = json.loads((file.metadata() or {})["classes"])
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            raise AxiconError(
                f"{path}: no distilled data set ({error}); run axicon verify {folder}"
            ) from None
        alpha = float(tensors.pop("alpha"))
        return cls(examples=Examples(classes=tuple(map(str, classes)), **tensors), alpha=alpha)


def sheet(made: Examples) -> Image:
    """A row for each class, its images beside each other as far as they lie within 0 .. 1; beyond is cut."""
    try:
        import PIL.Image
        import PIL.ImageDraw
    except ImportError:
        raise AxiconError(f"contact sheets are drawn by Pillow: {EXTRA}") from None
    height, width = made.x.shape[2:]
    times = max(1, -(-SIDE // max(height, width)))
    pixels = (made.raw().clamp(0, 1) * 255).round().to(torch.uint8)
    columns = max(int((made.y == label).sum()) for label in range(len(made.classes)))
    across, down = width * times + GAP, height * times + GAP
    found = PIL.Image.new("RGB", (LABEL + columns * across + GAP, len(made.classes) * down + GAP), "white")
    pen = PIL.ImageDraw.Draw(found)
    for label, name in enumerate(made.classes):
        top = GAP + label * down
        pen.text((GAP, top + (down - GAP) // 2 - 5), name[:7], fill="black")
        for column, i in enumerate((made.y == label).nonzero()[:, 0].tolist()):
            picture = _picture(pixels[i]).resize(
                (width * times, height * times), PIL.Image.Resampling.NEAREST
            )
            found.paste(picture, (LABEL + column * across, top))
    return found


def _picture(pixels: Tensor) -> Image:
    """(C, H, W) uint8; one channel is grey, of more the first three are shown."""
    import PIL.Image

    pixels = pixels.expand(3, -1, -1) if len(pixels) == 1 else pixels[:3]
    shape = (pixels.shape[2], pixels.shape[1])
    return PIL.Image.frombytes("RGB", shape, pixels.permute(1, 2, 0).contiguous().numpy().tobytes())


def facts(made: Examples, alpha: float) -> dict[str, Any]:
    """What a manifest says of it beside how it was made."""
    counts = [int((made.y == label).sum()) for label in range(len(made.classes))]
    return {
        "examples": len(made),
        "shape": list(made.shape),
        "classes": dict(zip(made.classes, counts, strict=True)),
        "alpha": alpha,
    }
