"""`axicon lineage` on directories made for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from axicon.errors import AxiconError
from axicon.model import checkpoint
from axicon.model.artefact import sha256, write_json
from jobs import __main__ as command
from jobs import lineage
from tests.jobs.made import made_from, model_files

pytestmark = pytest.mark.usefixtures("own_cache")

INT8 = {"method": "llm_int8", "settings": {"threshold": 6.0, "relative": 5.0, "head": True, "skip": []}}


def parent(folder: Path, **change: str) -> dict[str, str]:
    known = {"name": folder.name, "sha256": checkpoint.digest(folder), "source": str(folder)}
    return known | change


def shown(*words: str) -> str:
    result = CliRunner().invoke(command.axicon, ["lineage", *words], catch_exceptions=False)
    return result.output


def test_the_tree_names_methods_by_what_is_not_a_default(tmp_path: Path) -> None:
    dense = made_from(tmp_path / "dense")
    packed = made_from(tmp_path / "packed", [parent(dense)], [INT8])
    twice = made_from(tmp_path / "twice", [parent(packed)], [{"method": "mine", "settings": {"a": 1}}, INT8])
    root = lineage.run(str(twice))
    assert root.chain == ("mine a=1", "llm_int8 relative=5.0")
    (middle,) = root.parents
    assert (middle.name, middle.chain, middle.state) == ("packed", ("llm_int8 relative=5.0",), "here")
    assert [one.name for one in middle.parents] == ["dense"]
    assert middle.parents[0].chain == ()
    text = shown(str(twice))
    assert f"`-- packed  llm_int8 relative=5.0  sha256 {checkpoint.digest(packed)[:12]}" in text
    assert f"    here: {packed}\n    `-- dense  dense  sha256" in text
    assert text.isascii()


def test_sources_that_changed_or_went_are_told_apart(tmp_path: Path) -> None:
    stays, changes, goes = (made_from(tmp_path / name) for name in ("stays", "changes", "goes"))
    child = made_from(tmp_path / "child", [parent(stays), parent(changes), parent(goes)])
    (changes / "config.json").write_text(json.dumps({"model_type": "llama"}))
    goes.rename(tmp_path / "elsewhere")
    states = {one.name: one.state for one in lineage.run(str(child)).parents}
    assert states == {"stays": "here", "changes": "changed", "goes": "gone"}
    text = shown(str(child))
    assert f"changed: {changes}\n|   sha256 is now {checkpoint.digest(changes)[:12]}" in text
    assert f"gone: {goes}" in text


def test_a_file_is_a_source_too_and_found_beside_the_child(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"GGUF")
    source = {"name": "tiny.gguf", "sha256": sha256(file), "source": "tiny.gguf"}
    (found,) = lineage.run(str(made_from(tmp_path / "child", [source]))).parents
    assert (found.state, found.bytes, found.chain) == ("here", 4, None)
    file.write_bytes(b"GGUF!")
    assert lineage.run(str(tmp_path / "child")).parents[0].state == "changed"


def test_the_first_conversions_named_their_file_elsewhere(tmp_path: Path) -> None:
    folder = model_files(tmp_path / "old")
    source = {"format": "gguf", "file": "x.gguf", "sha256": "0" * 64, "converter": 1}
    write_json(
        folder / "manifest.json",
        {"format_version": 1, "name": "old", "chain": [], "parents": [], "source": source, "files": {}},
    )
    (found,) = lineage.run(str(folder)).parents
    assert (found.name, found.sha256, found.state) == ("x.gguf", "0" * 64, "gone")


def test_a_cycle_ends_with_a_line(tmp_path: Path) -> None:
    first = made_from(
        tmp_path / "first", [{"name": "second", "sha256": "0", "source": str(tmp_path / "second")}]
    )
    made_from(tmp_path / "second", [parent(first)])
    assert shown(str(first)).count("a cycle: it is one of its own descendants") == 1


def test_a_missing_manifest_and_a_newer_one_of_a_parent_are_lines(tmp_path: Path) -> None:
    bare, newer = model_files(tmp_path / "bare"), model_files(tmp_path / "newer")
    child = made_from(tmp_path / "child", [parent(bare), parent(newer)])
    (newer / "manifest.json").write_text('{"format_version": 2}')
    notes = [one.note for one in lineage.run(str(child)).parents]
    assert notes[0] == "no manifest.json: what it was made from is not recorded"
    assert "format version 2, this axicon reads 1; update axicon" in notes[1]


def test_json_holds_the_same(tmp_path: Path) -> None:
    dense = made_from(tmp_path / "dense")
    child = made_from(tmp_path / "child", [parent(dense)], [INT8])
    content = json.loads(shown(str(child), "--json"))
    assert content["chain"] == ["llm_int8 relative=5.0"]
    assert content["bytes"] == (child / "model.safetensors").stat().st_size
    assert content["parents"][0] | {"note": ""} == content["parents"][0]
    assert content["parents"][0]["sha256"] == checkpoint.digest(dense)


@pytest.mark.parametrize(
    ("manifest", "says"),
    [
        (None, "no model directory: neither config.json nor manifest.json"),
        ('{"format_version": 2}', "format version 2, this axicon reads 1; update axicon"),
        ('{"format_version": 1, "chain": 7}', "chain: input should be a valid tuple"),
        ("{", "not valid JSON"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path: Path, manifest: str | None, says: str) -> None:
    if manifest is not None:
        (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(AxiconError, match=says) as caught:
        lineage.run(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_path_that_is_no_directory_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(AxiconError, match="no such directory"):
        lineage.run(str(tmp_path / "none"))
