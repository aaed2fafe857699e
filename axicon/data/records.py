"""Records (one flat mapping each) from JSON lines, plain or gzipped, and from Parquet."""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

from axicon.errors import AxiconError

RECORD_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")

Record = dict[str, Any]


def read_records(path: Path) -> list[Record]:
    """All records of a file, in its order. Raises AxiconError for anything that is not such a file."""
    return [record for _, record in read_placed(path)]


def read_placed(path: Path) -> list[tuple[str, Record]]:
    """The same, each with the words that say where it stands, such as `line 3`."""
    if not path.exists():
        raise AxiconError(f"no such file: {path}")
    if not path.is_file():
        raise AxiconError(f"{path} is not a file: name one of its files ({', '.join(RECORD_SUFFIXES)})")
    if path.name.endswith(".parquet"):
        return [(f"record {number}", record) for number, record in enumerate(_read_parquet(path), start=1)]
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return _read_json_lines(path)
    raise AxiconError(f"{path}: unknown kind of file, records are read from {', '.join(RECORD_SUFFIXES)}")


def _read_json_lines(path: Path) -> list[tuple[str, Record]]:
    records = []
    for number, line in enumerate(read_utf8(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise AxiconError(
                f"{path}, line {number}: not JSON ({error}); one JSON object per line is expected"
            ) from None
        if not isinstance(record, dict):
            raise AxiconError(
                f"{path}, line {number}: a JSON object is expected, this is a {type(record).__name__}"
            )
        records.append((f"line {number}", record))
    return records


def _read_parquet(path: Path) -> list[Record]:
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        records: list[Record] = parquet.read_table(path).to_pylist()
        return records
    except (pyarrow.ArrowException, OSError) as error:
        raise AxiconError(f"{path}: not a readable Parquet file ({_first_line(error)})") from None


def read_utf8(path: Path) -> str:
    """The text of a file, unpacked if its name ends in .gz. Line ends are kept as they are."""
    try:
        raw = path.read_bytes()
        if path.name.endswith(".gz"):
            raw = gzip.decompress(raw)
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise AxiconError(f"{path}: not UTF-8 text (byte {error.start}); convert it first") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise AxiconError(f"{path}: broken gzip file ({_first_line(error)}); fetch it again") from None
    except OSError as error:
        raise AxiconError(f"{path}: cannot be read ({error.strerror})") from None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
