"""Rows of text: cut as the published data sets are, and refused with a sentence where they cannot be read."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from axicon.data import join_rows, read_records, read_rows
from axicon.errors import AxiconError


def test_wikitext_rows_keep_newlines_and_empty_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "wiki.raw"
    path.write_bytes(b" \n = A = \n \n text one\x0c here\n")
    assert read_rows(path) == ["", " = A = \n", "", " text one\x0c here\n"]
    assert join_rows(read_rows(path)) == "\n\n = A = \n\n\n\n\n text one\x0c here\n"


def test_wikitext_rows_end_only_at_newlines(tmp_path: Path) -> None:
    path = tmp_path / "wiki.raw"
    path.write_text("a\u2028b\u0085c\nlast without newline", encoding="utf-8")
    assert read_rows(path) == ["a\u2028b\u0085c\n", "last without newline"]


def test_wikitext_test_part_has_the_published_rows(data_dir: Path) -> None:
    rows = read_rows(data_dir / "wikitext-2-raw" / "wiki.test.part1.raw")
    assert len(rows) == 2226
    assert rows[:3] == ["", " = Robert Boulter = \n", ""]
    assert len(read_rows(data_dir / "wikitext-2-raw" / "wiki.valid.raw")) == 3760


def test_a_text_file_is_one_row(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("one\n\ntwo\n")
    assert read_rows(path) == ["one\n\ntwo\n"]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_records_give_the_named_column(tmp_path: Path, kind: str) -> None:
    records = [{"id": 1, "text": "caf\u00e9", "other": "x"}, {"id": 2, "text": "b\nc", "other": "y"}]
    path = tmp_path / f"part.{kind}"
    lines = "\n".join(json.dumps(record) for record in records).encode()
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    else:
        path.write_bytes(gzip.compress(lines) if kind.endswith("gz") else lines)
    assert read_records(path) == records
    assert read_rows(path) == ["caf\u00e9", "b\nc"]
    assert read_rows(path, column="other") == ["x", "y"]
    with pytest.raises(
        AxiconError, match=r"record 1: no text in field 'body'; its fields are id, text, other"
    ):
        read_rows(path, column="body")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b'{"text": "x"}\nnot json\n', r"line 2: not JSON"),
        ("a.jsonl", b'{"text": "\\ud800"}', r"record 1: 'text' holds half of a surrogate pair"),
        ("a.jsonl", b"[1, 2]\n", r"line 1: a JSON object is expected, this is a list"),
        ("a.jsonl.gz", gzip.compress(b"{}" * 99, mtime=0)[:20], r"broken gzip file"),
        ("a.jsonl.gz", b"plain", r"broken gzip file"),
        ("a.parquet", b"PAR1 but not really", r"not a readable Parquet file"),
        ("a.txt", b"\xff\xfe text", r"not UTF-8 text \(byte 0\)"),
        ("a.raw", b" \n \n", r"holds no text"),
        ("a.pt", b"x", r"unknown kind of file"),
    ],
)
def test_unreadable_files_are_named(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AxiconError, match=says) as caught:
        read_rows(tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.raw", "a.txt", "a.jsonl", "a.parquet"])
def test_a_missing_file_is_not_taken_for_a_data_set(tmp_path: Path, name: str) -> None:
    with pytest.raises(AxiconError, match="no such file"):
        read_rows(tmp_path / name)


def test_a_folder_asks_for_one_of_its_files(tmp_path: Path) -> None:
    with pytest.raises(AxiconError, match="not a file: name one of its files"):
        read_rows(tmp_path)


def test_a_data_set_that_cannot_be_had_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load_dataset(*names: object, **options: object) -> object:
        asked.append((names, options))
        raise ConnectionError("no route\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(AxiconError, match=r"some/set:small:train: neither a file .*\(no route\)") as caught:
        read_rows("some/set:small:train")
    assert asked == [(("some/set", "small"), {"split": "train"})]
    assert "\n" not in str(caught.value)


def test_a_data_set_gives_its_column(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    table = datasets.Dataset.from_list([{"text": "a\n"}, {"text": ""}])
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, split: table)
    assert read_rows("some/set") == ["a\n", ""]
    with pytest.raises(AxiconError, match=r"no column 'body', it has text"):
        read_rows("some/set", column="body")
