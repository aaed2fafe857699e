"""`axicon export`: a compressed model in a format that other programs read."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from axicon.compress.directory import COMPANIONS
from axicon.errors import AxiconError
from axicon.model import checkpoint
from axicon.model.artefact import atomic_directory, claim, write_bytes
from axicon.model.foreign.export import compressed_tensors
from axicon.recipe import Recipe


class ExportRecipe(Recipe):
    out: Path = Field(description="directory to make")
    zeros: Literal["plain", "packed"] = Field(
        "plain", description="codes with zeros: a byte each, which transformers reads, or packed"
    )


def run(model: str, recipe: ExportRecipe) -> list[str]:
    """Write the directory, whole or not at all, and say what a user should know of it. Raises AxiconError."""
    source, target = checkpoint.resolve(model), recipe.out.expanduser().absolute()
    if target.exists():
        raise AxiconError(f"out={recipe.out} exists already; choose another directory or remove it")
    with claim(target), atomic_directory(target) as folder:
        notes = compressed_tensors(source, folder, packed_zeros=recipe.zeros == "packed")
        for pattern in COMPANIONS:
            for path in sorted(source.glob(pattern)):
                if path.is_file():
                    write_bytes(folder / path.name, path.read_bytes())
        checkpoint.check_headers(folder)
    return notes
