"""Data sets of the shipped tasks, from files in a folder the user names.

The task definitions in `axicon/evaluate/tasks/` point here (`custom_dataset`), so they work in lm-eval's own
command too: `lm_eval --include_path axicon/evaluate/tasks --metadata '{"data_dir": "DIR"}' --tasks lambada
...`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from axicon.data import read_records
from axicon.data.records import RECORD_SUFFIXES, Record
from axicon.errors import AxiconError

if TYPE_CHECKING:
    import datasets


def load(
    *,
    files: Mapping[str, Sequence[str]],
    fields: Sequence[str],
    labels: Sequence[Any] | None = None,
    optional: Sequence[str] = (),
    data_dir: str | None = None,
    **_: Any,
) -> datasets.DatasetDict:
    """The splits of one task.

    `files` lists, per split, the places to look in (relative to `data_dir`, without suffix), the first that
    exists wins. Every record must have all `fields`. With `labels`, a `label` may be one of them or already
    an index into them, and becomes the index. A split named in `optional` may be absent and is empty then.
    lm-eval adds keywords of its own.
    """
    import datasets

    if data_dir is None:
        raise AxiconError("this task reads local files: name the folder they are in with data=DIR")
    root = Path(data_dir).expanduser()
    if not root.is_dir():
        raise AxiconError(f"data={root}: no such folder")
    splits = {}
    for split, stems in files.items():
        path = _find(root, stems)
        if path is not None:
            splits[split] = datasets.Dataset.from_list(_rows(path, fields, labels))
        elif split in optional:
            splits[split] = datasets.Dataset.from_dict({field: [] for field in fields})
        else:
            wanted = " or ".join(f"{stem}{{{','.join(RECORD_SUFFIXES)}}}" for stem in stems)
            raise AxiconError(f"data={root}: holds no {wanted} (records with {', '.join(fields)})")
    return datasets.DatasetDict(splits)


def macro_f1(pairs: Sequence[tuple[int, int]]) -> float:
    """Unweighted mean over the classes of F1, from (gold, predicted) pairs."""
    hits: dict[int, int] = defaultdict(int)
    seen: dict[int, int] = defaultdict(int)
    for gold, predicted in pairs:
        hits[gold] += gold == predicted
        seen[gold] += 1
        seen[predicted] += 1
    return sum(2 * hits[label] / count for label, count in seen.items()) / len(seen)


def _find(root: Path, stems: Sequence[str]) -> Path | None:
    candidates = (root / f"{stem}{suffix}" for stem in stems for suffix in RECORD_SUFFIXES)
    return next((path for path in candidates if path.is_file()), None)


def _rows(path: Path, fields: Sequence[str], labels: Sequence[Any] | None) -> list[Record]:
    rows = []
    for number, record in enumerate(read_records(path), start=1):
        missing = [field for field in fields if field not in record]
        if missing:
            raise AxiconError(
                f"{path}, record {number}: lacks {', '.join(missing)}; it has {', '.join(record)}"
            )
        row = {field: record[field] for field in fields}
        if labels is not None:
            row["label"] = _index(row["label"], labels, f"{path}, record {number}")
        rows.append(row)
    if not rows:
        raise AxiconError(f"{path}: holds no records")
    return rows


def _index(label: Any, labels: Sequence[Any], where: str) -> int:
    if label in labels:
        return labels.index(label)
    if isinstance(label, int) and 0 <= label < len(labels):
        return label
    raise AxiconError(
        f"{where}: label {label!r} is none of {', '.join(map(str, labels))} and no index into them"
    )
