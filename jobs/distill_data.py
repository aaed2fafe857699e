"""The real examples of a distillation, from what a recipe says of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from axicon.data.records import RECORD_SUFFIXES
from axicon.data.table import Placed, read_table
from axicon.distill.examples import (
    DIGITS,
    Examples,
    check_enough,
    digits,
    images_of,
    labels_of,
    split,
    standardised,
)
from axicon.distill.experts import generator
from axicon.distill.features import features, texts_of
from axicon.errors import AxiconError
from axicon.model import checkpoint
from axicon.model.artefact import write_atomically
from axicon.model.cachedir import file_digest
from jobs.compress import source_of
from jobs.distill_recipe import DistillRecipe
from jobs.progress import Reporter

FEATURES = "features.safetensors"


@dataclass(frozen=True, kw_only=True)
class Data:
    train: Examples
    test: Examples
    parents: tuple[Mapping[str, Any], ...]
    """What the examples come from, as a manifest names it."""
    texts: tuple[str, ...] = ()
    """Those of `train`, where these are texts."""

    def note(self) -> str:
        shape = " x ".join(map(str, self.train.shape))
        return (
            f"{len(self.train):,} examples of {shape} to train on, {len(self.test):,} to test on, "
            f"{len(self.train.classes)} classes"
        )


def read(recipe: DistillRecipe, folder: Path, reporter: Reporter) -> Data:
    """Raises AxiconError, with the place of what is wrong. Features of texts are kept in `folder`."""
    asked = recipe.data
    if asked.source == DIGITS:
        if recipe.modality != "images" or asked.evaluate is not None or asked.limit is not None:
            raise AxiconError(
                "data.source=digits are images with a test set of their own: leave out modality, "
                "data.evaluate and data.limit, or name another source"
            )
        raw, y, classes, file = digits()
        found = _cut(recipe, raw, y, classes, (_parent(DIGITS, file),), ())
    else:
        found = _from_tables(recipe, folder, reporter)
    check_enough(found.train.y, found.train.classes, recipe.ipc)
    return found


def _from_tables(recipe: DistillRecipe, folder: Path, reporter: Reporter) -> Data:
    asked = recipe.data
    names = [asked.source] + ([] if asked.evaluate is None else [asked.evaluate])
    tables = [
        read_table(name, split=kind, limit=asked.limit if kind == "train" else None)
        for name, kind in zip(names, ("train", "test"), strict=False)
    ]
    y, classes = labels_of(tables[0], asked.label)
    check_enough(y, classes, recipe.ipc)  # before anything slow
    parents = [_parent_of(name) for name in names]
    texts: list[str] = []
    if recipe.modality == "images":
        parts = [images_of(table, asked.column or "image", asked.size) for table in tables]
        if len({part.shape[1:] for part in parts}) > 1:
            raise AxiconError(
                f"{names[1]}: its images are of another size than those of {names[0]}; data.size=N brings "
                "all to N x N pixels"
            )
    else:
        texts, parts, model = _featured(recipe, tables, folder, reporter)
        parents.append(model)
    if len(tables) == 1:
        return _cut(recipe, parts[0], y, classes, tuple(parents), texts)
    train = standardised(parts[0], y, classes)
    test_y, _ = labels_of(tables[1], asked.label, classes)
    test = standardised(parts[1], test_y, classes, train)
    return Data(train=train, test=test, parents=tuple(parents), texts=tuple(texts[: len(y)]))


def _cut(
    recipe: DistillRecipe,
    raw: Tensor,
    y: Tensor,
    classes: Sequence[str],
    parents: tuple[Mapping[str, Any], ...],
    texts: Sequence[str],
) -> Data:
    """One table cut into what is trained on, and what tells how good that was."""
    train_rows, test_rows = split(y, recipe.data.held_out, generator(recipe.seed, "held out"))
    if not len(test_rows):
        raise AxiconError(
            f"data.held_out={recipe.data.held_out}: no class has enough examples to hold one out; "
            "name data.evaluate, or give more"
        )
    train = standardised(raw[train_rows], y[train_rows], classes)
    test = standardised(raw[test_rows], y[test_rows], classes, train)
    mine = tuple(texts[i] for i in train_rows.tolist()) if texts else ()
    return Data(train=train, test=test, parents=parents, texts=mine)


def _featured(
    recipe: DistillRecipe, tables: Sequence[Sequence[Placed]], folder: Path, reporter: Reporter
) -> tuple[list[str], list[Tensor], Mapping[str, Any]]:
    """All texts, features of each table, and the model as a parent. What was computed before is read."""
    asked = recipe.text
    source = checkpoint.resolve(asked.model)
    texts = [texts_of(table, recipe.data.column or "text") for table in tables]
    base = checkpoint.digest(source)
    threads = torch.get_num_threads()
    of = json.dumps([base, asked.max_tokens, threads, torch.__version__, [_sha256(one) for one in texts]])
    kept = folder / FEATURES
    parts = _kept(kept, of)
    if parts is None:
        with reporter.track("features, texts") as advance:
            parts = features(source, texts, asked.max_tokens, advance)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(kept, save({str(i): part for i, part in enumerate(parts)}, {"of": of}))
    parent = {
        "name": checkpoint.model_id(asked.model), "sha256": base, "source": source_of(asked.model, source)
    }  # fmt: skip
    return [text for one in texts for text in one], parts, parent


def _kept(path: Path, of: str) -> list[Tensor] | None:
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("of") != of:
                return None
            return [file.get_tensor(name) for name in sorted(file.keys())]
    except (OSError, SafetensorError):
        return None


def _sha256(texts: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def _parent_of(name: str) -> Mapping[str, Any]:
    path = Path(name).expanduser()
    if path.name.endswith(RECORD_SUFFIXES):
        return _parent(path.name, path.resolve())
    # The hub's files are not at hand; what was read of them is in the manifest as the digest of the examples.
    return {"name": name, "sha256": "", "source": name}


def _parent(name: str, file: Path) -> Mapping[str, Any]:
    return {"name": name, "sha256": file_digest(file), "source": str(file)}
