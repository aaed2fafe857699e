"""Weights written tensor by tensor: what safetensors' own reader and ours make of the files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from axicon.model import tensorwriter
from axicon.model.tensorfile import TensorFile
from axicon.model.tensorwriter import write_weights

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "a": torch.randn(3, 5), "b": torch.randn(7).bfloat16(), "c": torch.arange(8, dtype=torch.int8),
        "none": torch.empty(0, 4), "one": torch.tensor(2.5), "bits": torch.tensor([True, False] * 4),
        "rows": torch.randn(6, 4)[2:4], "turned": torch.randn(4, 6).T,
    }  # fmt: skip


def test_both_readers_find_every_tensor(tmp_path: Path) -> None:
    order = sorted(tensors().items(), key=lambda item: -item[1].dtype.itemsize)
    write_weights(tmp_path, order)
    theirs, ours = load_file(tmp_path / SINGLE), TensorFile(tmp_path / SINGLE)
    assert theirs.keys() == ours.entries.keys() == tensors().keys()
    for name, want in tensors().items():
        assert torch.equal(theirs[name], want)
        assert torch.equal(ours.tensor(name), want)
        assert theirs[name].dtype == ours.tensor(name).dtype == want.dtype


def test_shards_are_filled_one_at_a_time(tmp_path: Path) -> None:
    made: list[str] = []

    def each() -> Iterator[tuple[str, Tensor]]:
        for name in "01234":
            made.append(name)
            yield name, torch.full((10,), float(name))
            assert (tmp_path / "00001.part").exists()

    write_weights(tmp_path, each(), shard_bytes=100)
    assert made == ["0", "1", "2", "3", "4"]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["weight_map"]["4"] == "model-00003-of-00003.safetensors"
    assert index["metadata"]["total_size"] == 200
    for name, file in index["weight_map"].items():
        assert TensorFile(tmp_path / file).tensor(name).tolist() == [float(name)] * 10


def test_a_tensor_that_would_lie_askew_begins_another_file(tmp_path: Path) -> None:
    askew = [("odd", torch.ones(3, dtype=torch.int8)), ("wide", torch.ones(2))]
    write_weights(tmp_path, askew)
    for name, tensor in askew:
        file = json.loads((tmp_path / INDEX).read_text())["weight_map"][name]
        assert torch.equal(load_file(tmp_path / file)[name], tensor)


def test_more_names_than_the_header_holds_begin_another_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorwriter, "HEADER_ROOM", 512)
    many = {f"tensor.{i}": torch.full((2,), float(i)) for i in range(20)}
    write_weights(tmp_path, many.items())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        name: tensor.tolist() for name, tensor in many.items()
    }


def test_equal_tensors_are_equal_bytes(tmp_path: Path) -> None:
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        write_weights(tmp_path / name, [("a", torch.ones(3)), ("b", torch.zeros(2))])
    assert (tmp_path / "x" / SINGLE).read_bytes() == (tmp_path / "y" / SINGLE).read_bytes()


def test_a_system_that_takes_little_at_a_time_gets_every_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:1000]))
    wide = torch.randn(50, 40)
    write_weights(tmp_path, [("wide", wide)])
    monkeypatch.undo()
    assert torch.equal(load_file(tmp_path / SINGLE)["wide"], wide)


def test_a_name_is_written_once_and_a_failure_leaves_no_whole_file(tmp_path: Path) -> None:
    twice = [("a", torch.ones(1))] * 2
    with pytest.raises(ValueError, match="tensor a is written twice"):
        write_weights(tmp_path, twice)
    assert [path.name for path in tmp_path.iterdir()] == ["00001.part"]
