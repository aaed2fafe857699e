"""What a job hands back, and its results as files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from axicon.errors import AxiconError
from axicon.model.artefact import write_atomically
from axicon.settings import Recipe


@dataclass(frozen=True, kw_only=True)
class Report:
    """What `run(recipe)` of every job returns."""

    verb: str
    recipe: Recipe
    metrics: Mapping[str, float]
    """Figures by name, flat, as a sweep reports them: `perplexity`, `lambada/acc`."""
    seconds: float
    files: tuple[Path, ...] = ()
    """Written, most important first."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What the first file holds."""


def plain(value: Any) -> Any:
    """`value` as JSON knows it: numpy scalars become numbers, numbers that are not finite null, the rest
    text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(item) for item in value]
    if hasattr(value, "item") and not hasattr(value, "__len__"):  # numpy scalars
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    return str(value)


def writable_folder(folder: Path) -> Path:
    """`folder`, made if need be and tried out. Called before the work, so that results do not die with it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / ".writable", "")
        (folder / ".writable").unlink()
    except OSError as error:
        raise AxiconError(
            f"out={folder}: cannot be written ({error.strerror}); choose another folder"
        ) from None
    return folder


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Strict JSON, keys in the order given; a reader sees the whole file or none."""
    _write(path, json.dumps(plain(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_json_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    lines = (json.dumps(plain(record), ensure_ascii=False, allow_nan=False) for record in records)
    _write(path, "".join(f"{line}\n" for line in lines))


def _write(path: Path, text: str) -> None:
    try:
        write_atomically(path, text)
    except OSError as error:
        raise AxiconError(f"{path}: cannot be written ({error.strerror})") from None
