"""Text as a list of rows, the shape in which language-modelling corpora are published.

How rows are cut and joined is part of every perplexity figure: one newline instead of two, or blank rows left
out, changes it by tenths. So the readers below reproduce the published rows exactly.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from axicon.data.records import RECORD_SUFFIXES, read_records, read_utf8
from axicon.errors import AxiconError

TEXT_SUFFIXES = (".raw", ".txt", *RECORD_SUFFIXES)


def read_rows(source: str | Path, *, column: str = "text") -> list[str]:
    """Rows of text from a file or from a data set of the Hugging Face hub.

    `.raw` is WikiText as distributed: a row per line, its newline kept, and a line of white space alone is an
    empty row. `.txt` is one row. `.jsonl`, `.jsonl.gz` and `.parquet` give `column` of every record. Any
    other name is taken for a hub data set, `name[:configuration[:split]]` with split `test` if none is given,
    for example `Salesforce/wikitext:wikitext-2-raw-v1:test`.
    """
    if is_file(source):
        rows = _file_rows(Path(source).expanduser(), column)
    else:
        rows = _hub_rows(str(source), column)
    if not any(row.strip() for row in rows):
        raise AxiconError(f"{source}: holds no text")
    return rows


def is_file(source: str | Path) -> bool:
    """Whether a source is a file, by its name, and not a data set of the hub. Nothing is read.

    Raises AxiconError for a file that is not there, or is none that text is read from.
    """
    path = Path(source).expanduser()
    if path.exists() and not path.is_file():
        raise AxiconError(f"{path} is not a file: name one of its files ({', '.join(TEXT_SUFFIXES)})")
    if not path.exists():
        if path.name.endswith(TEXT_SUFFIXES) or str(source).startswith(("/", "./", "../", "~")):
            raise AxiconError(f"no such file: {path}")
        return False
    if not path.name.endswith(TEXT_SUFFIXES):
        raise AxiconError(f"{path}: unknown kind of file, text is read from {', '.join(TEXT_SUFFIXES)}")
    return True


def join_rows(rows: Sequence[str]) -> str:
    """One text out of rows, two newlines between them: the join of the GPTQ family's WikiText-2 figures."""
    return "\n\n".join(rows)


def _file_rows(path: Path, column: str) -> list[str]:
    if path.name.endswith(RECORD_SUFFIXES):
        return _column(read_records(path), column, str(path))
    return wikitext_rows(read_utf8(path)) if path.name.endswith(".raw") else [read_utf8(path)]


def wikitext_rows(text: str) -> list[str]:
    """The rows the `wikitext-*-raw` data sets hold, from the text of the distributed file.

    Only the newline ends a row: `str.splitlines` would also cut at the Unicode line separators inside
    articles.
    """
    lines = text.split("\n")
    ended, last = lines[:-1], lines[-1]
    rows = [f"{line}\n" if line.strip() else "" for line in ended]
    return [*rows, last] if last.strip() else rows


def hub_table(source: str, split: str) -> Any:
    """A data set of the hub, `name[:configuration[:split]]`, with `split` if it names none.

    Raises AxiconError where there is none of that name.
    """
    name, _, rest = source.partition(":")
    config, _, named = rest.partition(":")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import datasets

            return datasets.load_dataset(name, config or None, split=named or split)
    except Exception as error:  # the hub client raises a dozen unrelated classes
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise AxiconError(
            f"{source}: neither a file here nor a data set the hub gives ({reason}); "
            "give a path, or name[:configuration[:split]]"
        ) from None


def _hub_rows(source: str, column: str) -> list[str]:
    table = hub_table(source, "test")
    if column not in table.column_names:
        raise AxiconError(f"{source}: no column {column!r}, it has {', '.join(table.column_names)}")
    return [str(row) for row in table[column]]


def _column(records: Sequence[dict[str, object]], column: str, where: str) -> list[str]:
    rows = []
    for number, record in enumerate(records, start=1):
        value = record.get(column)
        if not isinstance(value, str):
            raise AxiconError(
                f"{where}, record {number}: no text in field {column!r}; its fields are {', '.join(record)}"
            )
        try:
            value.encode()
        except UnicodeEncodeError:
            raise AxiconError(
                f"{where}, record {number}: {column!r} holds half of a surrogate pair"
            ) from None
        rows.append(value)
    return rows
