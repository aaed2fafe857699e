"""Whether a model directory is what its manifest says, down to every byte."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from axicon.errors import AxiconError
from axicon.model import checkpoint, safety
from axicon.model.artefact import MANIFEST, MEASURED, OTHER_KINDS, read_manifest, sha256
from axicon.model.tensorfile import TensorFile

AGAIN = "copy it again from where the model came from, or make the model again"
READ = (".safetensors", ".json", ".jinja", ".txt")
"""Suffixes of files that a loader may read."""


@dataclass(frozen=True, slots=True)
class Problem:
    file: str
    """Its name in the directory, or `.` for the whole."""
    what: str
    do: str
    """The way out."""


def problems(folder: Path) -> list[Problem]:
    """Everything wrong with a directory; empty for an intact one. Reads every file that its manifest lists.

    Without a manifest, only what headers tell: nothing says what the bytes should be. Raises AxiconError for
    a manifest of a newer axicon.
    """
    manifest = read_manifest(folder)
    found = [] if manifest is None else _files(folder, manifest)
    if found:
        return found  # what headers say of a damaged file is the same once more
    try:
        if manifest is not None and manifest.get("kind") in OTHER_KINDS:
            for path in folder.glob("*.safetensors"):
                TensorFile(path)
            return found
        safety.check_folder(folder)
        checkpoint.check_headers(folder)
    except AxiconError as e:
        found.append(problem_of(folder, e))
    return found


def problem_of(folder: Path, error: AxiconError) -> Problem:
    """An error about a directory as a problem: its file, what is wrong, and the way out behind the semicolon.
    """
    text = str(error).replace(f"{folder.resolve()}", f"{folder}").removeprefix(f"{folder}").lstrip("/: ")
    name, _, rest = text.partition(": ")
    if not (folder / name).is_file():
        name, rest = ".", text
    what, semicolon, do = rest.rpartition("; ")
    return Problem(name, what, do) if semicolon else Problem(name, rest, AGAIN)


def changed_files(folder: Path) -> list[Problem]:
    """The same of any directory with a manifest, whatever it holds. Raises AxiconError as `read_manifest`."""
    manifest = read_manifest(folder)
    if manifest is None:
        return [Problem(MANIFEST, "is missing", AGAIN)]
    return _files(folder, manifest)


def _files(folder: Path, manifest: dict[str, Any]) -> list[Problem]:
    """Files that are missing, changed, or were not there when the manifest was written."""
    listed = manifest.get("files")
    if not isinstance(listed, dict) or not all(isinstance(entry, dict) for entry in listed.values()):
        return [Problem(MANIFEST, "lists no files with their sizes and digests", AGAIN)]
    found = [problem for name, entry in listed.items() if (problem := _file(folder, name, entry)) is not None]
    for path in sorted(folder.iterdir()):
        known = path.name in listed or path.name in (MANIFEST, *MEASURED) or path.name.startswith(".")
        if not known and path.suffix in READ:
            found.append(Problem(path.name, "is not in the manifest", "remove it, or make the model again"))
    return found


def _file(folder: Path, name: str, entry: dict[str, Any]) -> Problem | None:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()) and not path.is_symlink():
        return Problem(MANIFEST, f"lists {name!r}, which is not in this directory", AGAIN)
    if not path.is_file():
        return Problem(name, "is missing", AGAIN)
    size = path.stat().st_size
    if size != entry.get("bytes"):
        return Problem(name, f"has {size} bytes, the manifest says {entry.get('bytes')}", AGAIN)
    if sha256(path) != entry.get("sha256"):
        return Problem(name, "has another sha256 than the manifest says: bytes were changed", AGAIN)
    return None
