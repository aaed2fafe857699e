"""Records from a file or a data set of the hub, each with the words that say where it stands."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from axicon.data.records import RECORD_SUFFIXES, Record, read_placed
from axicon.data.text import hub_table
from axicon.errors import AxiconError


@dataclass(frozen=True, slots=True)
class Placed:
    """A record, and where it was found: `train.jsonl, line 3`."""

    where: str
    record: Record

    def refuse(self, reason: str) -> NoReturn:
        """Raise AxiconError about this record."""
        raise AxiconError(f"{self.where}: {reason}")


def read_table(source: str | Path, *, split: str = "train", limit: int | None = None) -> list[Placed]:
    """The records of a file (JSON lines, plain or gzipped; Parquet) or of a data set of the hub,
    `name[:configuration[:split]]`; the first `limit` of them.

    Raises AxiconError for what cannot be read, and where there are none.
    """
    path = Path(source).expanduser()
    looks_like_a_file = path.name.endswith(RECORD_SUFFIXES) or str(source).startswith(("/", "./", "../", "~"))
    if path.exists() or looks_like_a_file:
        rows = [Placed(f"{path}, {place}", record) for place, record in read_placed(path)[:limit]]
    else:
        table = hub_table(str(source), split)
        chosen = table if limit is None else table.select(range(min(limit, len(table))))
        rows = [Placed(f"{source}, record {i}", dict(record)) for i, record in enumerate(chosen, start=1)]
    if not rows:
        raise AxiconError(f"{source}: holds no records")
    return rows
