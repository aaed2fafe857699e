"""`axicon lineage`: where a model came from, and whether its sources are still there."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.text import Text
from rich.tree import Tree

from axicon.errors import AxiconError
from axicon.model import adapterfile, checkpoint, interchange
from axicon.model.artefact import DATASET
from axicon.model.cachedir import file_digest
from jobs.manifest import Manifest, Parent
from jobs.model_report import weight_bytes
from jobs.shown import console, size

State = Literal["here", "changed", "gone"]

GUIDES = ("    ", "|   ", "+-- ", "`-- ")


@dataclass(frozen=True, kw_only=True)
class Ancestor:
    """A model or a file, with what it was made from."""

    name: str
    chain: tuple[str, ...] | None = None
    """Methods with what is not a default; empty for a dense model, None where no manifest says."""
    sha256: str | None
    """As the child's manifest has it; of the root, as it is now."""
    bytes: int | None = None
    """Of its weights, as they are now."""
    source: str
    state: State = "here"
    """here: found, with the digest the child's manifest has."""
    note: str = ""
    """What a reader should know beside it."""
    parents: tuple[Ancestor, ...] = ()


def run(model: str) -> Ancestor:
    """The lineage of a model directory or of `demo`. Nothing is fetched.

    Raises AxiconError for what is no model directory, and for a manifest that cannot be read.
    """
    folder = Path(model).expanduser()
    if model == "demo":
        folder = checkpoint.resolve(model)
    elif not folder.is_dir():
        raise AxiconError(f"{model}: no such directory; give a model directory, or demo")
    elif not (folder / "config.json").exists() and not (folder / "manifest.json").exists():
        raise AxiconError(f"{model}: no model directory: neither config.json nor manifest.json is in it")
    folder = folder.resolve()
    manifest = Manifest.read(folder)
    root = Ancestor(name=folder.name, sha256=_digest(folder), bytes=_size(folder), source=str(folder))
    return _with_manifest(root, folder, manifest, (folder,))


def _with_manifest(
    ancestor: Ancestor, folder: Path, manifest: Manifest | None, above: tuple[Path, ...]
) -> Ancestor:
    """What the manifest of `folder` adds; `above` are the directories on the way to it, itself included."""
    if manifest is None:
        return dataclasses.replace(ancestor, note="no manifest.json: what it was made from is not recorded")
    return dataclasses.replace(
        ancestor,
        name=manifest.name or ancestor.name,
        chain=tuple(map(str, manifest.chain)),
        parents=tuple(_parent(parent, folder, above) for parent in manifest.parents),
    )


def _parent(parent: Parent, child: Path, above: tuple[Path, ...]) -> Ancestor:
    ancestor = Ancestor(name=parent.name, sha256=parent.sha256, source=parent.source)
    try:
        place = locate(parent.source, child)
    except AxiconError as error:
        return dataclasses.replace(ancestor, state="gone", note=str(error))
    if place is None:
        return dataclasses.replace(ancestor, state="gone")
    if place in above:
        return dataclasses.replace(ancestor, note="a cycle: it is one of its own descendants")
    now = _digest(place)
    state: State = "here" if now == parent.sha256 else "changed"
    note = "" if state == "here" else f"sha256 is now {now[:12] if now else 'not to be had'}"
    ancestor = dataclasses.replace(ancestor, bytes=_size(place), state=state, note=note)
    if place.is_file():
        return ancestor
    try:
        manifest = Manifest.read(place)
    except AxiconError as error:
        return dataclasses.replace(ancestor, note=str(error))
    whole = _with_manifest(ancestor, place, manifest, (*above, place))
    return dataclasses.replace(whole, note="; ".join(filter(None, dict.fromkeys([note, whole.note]))))


def locate(source: str, child: Path) -> Path | None:
    """Directory or file of a source, without fetching or converting anything. Raises AxiconError.

    A relative path is looked for from here and from beside the child.
    """
    if source == "demo":
        place = interchange.converted_place(interchange.demo_file(), name=interchange.DEMO_NAME)
        if not place.exists():
            raise AxiconError("not in the cache now; any command on `demo` makes it again")
        return place
    path = Path(source).expanduser()
    for candidate in (path, child.parent / path):
        if candidate.exists():
            return candidate.resolve()
    if path.is_absolute() or path.suffix == ".gguf" or source.startswith("."):
        # The file of the embedded model may lie elsewhere than when it was converted.
        return _embedded(path.name)
    return checkpoint.resolve(source, offline=True)


def _embedded(name: str) -> Path | None:
    try:
        file = interchange.demo_file()
    except AxiconError:
        return None
    return file.resolve() if file.name == name else None


def _digest(place: Path) -> str | None:
    """None where there is nothing to hash, such as missing weights."""
    place = _whole(place)
    try:
        if adapterfile.is_adapter(place):
            return adapterfile.digest(place)
        return file_digest(place) if place.is_file() else checkpoint.digest(place)
    except AxiconError:
        return None


def _whole(place: Path) -> Path:
    """A distilled data set is one file of its directory."""
    return place / DATASET if (place / DATASET).is_file() else place


def _size(place: Path) -> int | None:
    place = _whole(place)
    try:
        return place.stat().st_size if place.is_file() else weight_bytes(place)
    except (AxiconError, OSError):
        return None


class PlainTree(Tree):
    """A tree whose lines survive every terminal and log file."""

    TREE_GUIDES = [GUIDES] * 3


def draw(root: Ancestor) -> None:
    """Print the tree."""
    console().print(tree(root))


def tree(root: Ancestor) -> Tree:
    """The lineage for a person: a model, beneath it what it was made from."""
    drawn = PlainTree(_label(root), highlight=False)
    _grow(drawn, root)
    return drawn


def _grow(drawn: Tree, ancestor: Ancestor) -> None:
    for parent in ancestor.parents:
        _grow(drawn.add(_label(parent)), parent)


def _label(ancestor: Ancestor) -> Text:
    """Two lines: what it is, and where."""
    facts = [ancestor.name]
    if ancestor.chain is not None:
        facts.append(", then ".join(ancestor.chain) or "dense")
    facts.append(f"sha256 {ancestor.sha256[:12]}" if ancestor.sha256 else "no digest: weights are missing")
    if ancestor.bytes is not None:
        facts.append(size(ancestor.bytes))
    label = Text("  ".join(facts))
    style = {"here": "", "changed": "yellow", "gone": "red"}[ancestor.state]
    label.append(f"\n{ancestor.state}", style)
    label.append(f": {_from_here(ancestor.source)}")
    if ancestor.note:
        label.append(f"\n{ancestor.note}")
    return label


def _from_here(source: str) -> str:
    """A path beneath the current folder or the home, shorter."""
    for base, mark in ((os.getcwd(), "."), (os.path.expanduser("~"), "~")):
        if base != "/" and source.startswith(base + os.sep):
            return mark + source[len(base) :]
    return source


def as_json(root: Ancestor) -> dict[str, Any]:
    return dataclasses.asdict(root)
