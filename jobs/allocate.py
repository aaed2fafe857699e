"""`axicon allocate`: settings block by block under a budget of bytes, from models that have them everywhere.

Compressed with `inputs: dense`, a block sees what the dense model shows it, so its error in the manifest
depends on its own settings alone. A few models, each made with one setting for all blocks, say what each
block loses by each of them; the best mixture for any size is then a matter of arithmetic. Errors are
|y - dense| / |dense| of a block's output, and the sum of their squares is what becomes least: a stand-in for
the model's loss, which a trial of the result measures.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import Field

from axicon.compress.allocate import allocate
from axicon.errors import AxiconError
from axicon.model.artefact import read_manifest, write_atomically
from axicon.model.shards import open_weights
from axicon.recipe import CompressRecipe
from axicon.settings import Recipe
from jobs.compress import build

BLOCK = re.compile(r"(?:^|\.)(?:blocks|layers)\.(\d+)\.")
"""The number of a block in names of ours and of checkpoints."""


class AllocateRecipe(Recipe):
    bytes: int = Field(ge=1, description="the most that all tensors of the model may take")
    out: Path = Field(description="recipe file to write, for axicon compress")


@dataclass(frozen=True)
class Uniform:
    """A model with the same settings in all its blocks."""

    folder: Path
    settings: Mapping[str, Any]
    """The method's, without rules."""
    recipe: Mapping[str, Any]
    same: tuple[Any, ...]
    """What has to be equal for errors of blocks to be comparable."""
    errors: Sequence[float]
    sizes: Sequence[int]
    rest: int
    """Bytes outside of the blocks."""

    @classmethod
    def of(cls, folder: Path) -> Self:
        """Raises AxiconError for a directory that says nothing of its blocks' errors, or mixes settings."""
        manifest = read_manifest(folder) or {}
        recipe, sample = manifest.get("recipe", {}), manifest.get("calibration", {})
        errors, settings = sample.get("block_errors"), dict(recipe.get("compressor") or {})
        if not errors or sample.get("inputs") != "dense" or any(error is None for error in errors):
            raise AxiconError(
                f"{folder}: needs the errors of its blocks on dense inputs: a model that axicon compress "
                "made with one method that looks at data, and calibration.inputs=dense"
            )
        if settings.pop("rules", None) or recipe.get("chain"):
            raise AxiconError(
                f"{folder}: has other settings in some blocks, or a chain of methods; name one without"
            )
        sizes, rest = [0] * len(errors), 0
        for name, stored in open_weights(folder, {}).items():
            size, found = stored.entry.end - stored.entry.begin, BLOCK.search(name)
            if found is None:
                rest += size
            else:
                sizes[int(found[1])] += size
        parent = manifest["parents"][0]["sha256"]
        same = (parent, sample["sha256"], recipe.get("dtype"), settings["method"])
        return cls(folder, settings, recipe, same, errors, sizes, rest)

    @property
    def squares(self) -> list[float]:
        return [error**2 for error in self.errors]

    @property
    def bytes(self) -> int:
        return self.rest + sum(self.sizes)


def run(folders: Sequence[Path], recipe: AllocateRecipe) -> list[str]:
    """Write the recipe and say what it promises. Raises AxiconError."""
    if len(folders) < 2:
        raise AxiconError("allocate: name two models at least, with different settings")
    found = [Uniform.of(folder) for folder in folders]
    for one in found[1:]:
        if one.same != found[0].same:
            raise AxiconError(
                f"{one.folder}: is not of the same model, sample, dtype and method as {folders[0]}, so "
                "errors of their blocks do not compare"
            )
    rest = max(one.rest for one in found)
    errors = list(zip(*(one.squares for one in found), strict=True))
    sizes = list(zip(*(one.sizes for one in found), strict=True))
    if recipe.bytes < rest + sum(map(min, sizes)):
        raise AxiconError(
            f"bytes={recipe.bytes}: with the smallest of these settings everywhere it is "
            f"{rest + sum(map(min, sizes))} bytes; allow that, or add a model with smaller ones"
        )
    chosen = allocate(errors, sizes, recipe.bytes - rest)
    made = mixture(found, chosen)
    try:
        write_atomically(recipe.out.expanduser(), yaml.safe_dump(made, sort_keys=False))
    except OSError as e:
        raise AxiconError(f"out={recipe.out}: cannot be written ({e.strerror})") from None
    total, error = (sum(one[c] for one, c in zip(all_, chosen, strict=True)) for all_ in (sizes, errors))
    said = [f"{total + rest:.0f} bytes of {recipe.bytes}, sum of squared block errors {error:.5f}"]
    fitting = [one for one in found if one.bytes <= recipe.bytes]
    if fitting:
        best = min(fitting, key=lambda one: sum(one.squares))
        said.append(f"the best of one setting for all that fits is {best.folder}: {sum(best.squares):.5f}")
    counts = Counter(chosen)
    said += [f"{counts[i]} blocks as in {one.folder}" for i, one in enumerate(found)]
    return said


def mixture(found: Sequence[Uniform], chosen: Sequence[int]) -> dict[str, Any]:
    """The recipe: the most frequent settings, and rules for the blocks that have others. Raises AxiconError
    where a rule cannot change what they differ in.
    """
    base = found[Counter(chosen).most_common(1)[0][0]]
    rules = {}
    for block, choice in enumerate(chosen):
        settings = found[choice].settings
        if changed := {key: value for key, value in settings.items() if value != base.settings[key]}:
            rules[f"blocks.{block}.*"] = changed
    kept = ("model", "revision", "dtype", "calibration")
    made = {key: base.recipe[key] for key in kept} | {"compressor": {**base.settings, "rules": rules}}
    build(CompressRecipe.model_validate(made))
    return made
