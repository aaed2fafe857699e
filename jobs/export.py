"""`axicon export`: a model in a format that other programs read."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from axicon.compress.directory import COMPANIONS
from axicon.errors import AxiconError
from axicon.model import checkpoint
from axicon.model.artefact import atomic_directory, claim, write_bytes
from axicon.model.foreign.export import compressed_tensors
from axicon.model.foreign.gguf import write_gguf
from axicon.settings import Recipe

TERMS = ("LICENSE*", "NOTICE*")
"""What goes with a GGUF file, which has the rest in it."""
Form = Literal["compressed-tensors", "gguf"]


class ExportRecipe(Recipe):
    out: Path = Field(description="directory to make")
    zeros: Literal["plain", "packed"] = Field(
        "plain",
        description="compressed-tensors: codes with zeros take a byte, which transformers reads, or packed",
    )


def run(form: Form, model: str, recipe: ExportRecipe) -> list[str]:
    """Write the directory, whole or not at all, and say what a user should know of it. Raises AxiconError."""
    if form == "gguf" and "zeros" in recipe.model_fields_set:
        raise AxiconError("zeros: is a setting of compressed-tensors; leave it out")
    source, target = checkpoint.resolve(model), recipe.out.expanduser().absolute()
    if target.exists():
        raise AxiconError(f"out={recipe.out} exists already; choose another directory or remove it")
    with claim(target), atomic_directory(target) as folder:
        if form == "gguf":
            notes = write_gguf(source, folder / f"{target.name}.gguf")
        else:
            notes = compressed_tensors(source, folder, packed_zeros=recipe.zeros == "packed")
        for pattern in COMPANIONS if form != "gguf" else TERMS:
            for path in sorted(source.glob(pattern)):
                if path.is_file():
                    write_bytes(folder / path.name, path.read_bytes())
        if form != "gguf":
            checkpoint.check_headers(folder)
    return notes
