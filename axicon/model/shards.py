"""The weight files of a model directory as one mapping from tensor name to stored tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from axicon.errors import AxiconError
from axicon.model import safety
from axicon.model.cachedir import file_digest
from axicon.model.tensorfile import Entry, TensorFile
from axicon.model.tensorwriter import DENSE, PACKED, index_of, single
from axicon.model.weights import PREFIX


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of one file."""

    file: TensorFile
    name: str
    """As the file has it."""

    @property
    def entry(self) -> Entry:
        return self.file.entries[self.name]

    @property
    def place(self) -> tuple[str, int]:
        """Sorts tensors in the order in which they are read from disk."""
        return str(self.file.path), self.entry.begin

    def tensor(self) -> Tensor:
        """A view into the mapped file."""
        return self.file.tensor(self.name)


def weight_files(folder: Path) -> list[str]:
    """Names of the weight files: the single one, or those the index names. Raises AxiconError."""
    for stem in (DENSE, PACKED):
        if (folder / single(stem)).exists():
            return [single(stem)]
    if (path := _index_path(folder)) is None:
        found = sorted(p.name for p in folder.glob("*.safetensors"))
        raise AxiconError(
            f"{folder}: neither {single(DENSE)} nor {index_of(DENSE)}, only {', '.join(found[:5])}; "
            "fetch the rest")
    names = sorted(set(_index(path).values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise AxiconError(
                f"{path}: {name!r} is not the name of a safetensors file in this directory")
        if not (folder / name).exists():
            raise AxiconError(f"{folder}: the index names {name}, which is missing; fetch it")
    return names


def open_weights(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Stored]:
    """Every tensor by its name in a whole model's checkpoint; headers are checked, nothing is read yet.

    Raises AxiconError for a broken file, for an index that the files contradict, and where sha256 of a file
    differs from the manifest (what is hashed is what will be mapped).
    """
    names = weight_files(folder)
    for name in ["config.json", *names]:
        expected = manifest.get("files", {}).get(name, {}).get("sha256")
        if expected is not None and file_digest(folder / name) != expected:
            raise AxiconError(
                f"{folder / name}: sha256 differs from manifest.json; the file was changed or damaged, "
                "make it again")
    found: dict[str, Stored] = {}
    for file in [TensorFile(folder / name) for name in names]:
        for name in file.entries:
            if name in found:
                first = found[name].file.path.name
                raise AxiconError(f"{folder}: tensor {name} is in {first} and in {file.path.name}")
            found[name] = Stored(file, name)
    path = _index_path(folder)
    if path is not None and names not in ([single(DENSE)], [single(PACKED)]):
        for name, file_name in _index(path).items():
            if name not in found or found[name].file.path.name != file_name:
                raise AxiconError(
                    f"{folder}: the index puts tensor {name} in {file_name}, and it is not there")
    if any(name.startswith((PREFIX, "lm_head", "gpt_neox.", "embed_out")) for name in found):
        return found
    return {PREFIX + name: stored for name, stored in found.items()}


def _index_path(folder: Path) -> Path | None:
    return next((p for stem in (DENSE, PACKED) if (p := folder / index_of(stem)).exists()), None)


def _index(path: Path) -> dict[str, str]:
    index = safety.read_json(path).get("weight_map")
    if not isinstance(index, dict) or not index or not all(isinstance(name, str) for name in index.values()):
        raise AxiconError(f"{path}: weight_map is not an object of file names; fetch it again")
    return index
