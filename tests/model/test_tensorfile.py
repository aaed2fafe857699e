"""The safetensors reader: each broken rule has its own message, at once; mutations never get through as
lies."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from axicon.errors import AxiconError
from axicon.model.tensorfile import TensorFile

ROOM = 24
"""Bytes of tensors in `good`: two of three float32 values."""


def good() -> dict[str, Any]:
    return {
        "a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]},
        "b": {"dtype": "F32", "shape": [1, 3], "data_offsets": [12, 24]},
    }


def raw(header: bytes, body: bytes = bytes(ROOM), length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + body


def changed(**fields: Any) -> bytes:
    """The good file with fields of tensor `b` replaced."""
    header = good()
    header["b"] |= fields
    return raw(json.dumps(header).encode())


def with_header(change: Callable[[dict[str, Any]], object], body: bytes = bytes(ROOM)) -> bytes:
    header = good()
    change(header)
    return raw(json.dumps(header).encode(), body)


BROKEN = {
    "empty": (b"", "0 bytes, too short"),
    "short": (b"1234567", "7 bytes, too short"),
    "length_too_large": (raw(b"{}", length=100_000_001), "the format allows"),
    "length_absurd": (raw(b"{}", length=(1 << 64) - 1), "the format allows"),
    "length_beyond_file": (raw(b"{}", b"", length=3), "has only 2 after"),
    "no_brace": (raw(b" {}", b""), "does not begin with '{'"),
    "not_utf8": (raw(b'{"\xff": 1}', b""), "not UTF-8"),
    "not_json": (raw(b'{"a":', b""), "not JSON"),
    "nested_too_deep": (raw(b'{"a":' + b"[" * 100_000, b""), "not JSON"),
    "huge_number": (raw(b'{"a":' + b"9" * 100_000 + b"}", b""), "not JSON"),
    "duplicate_tensor": (
        raw(b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,12]},'
            b'"a":{"dtype":"F32","shape":[3],"data_offsets":[0,12]}}', bytes(12)), "'a' twice"),
    "duplicate_field": (
        raw(b'{"a":{"dtype":"F32","dtype":"F16","shape":[3],"data_offsets":[0,12]}}', bytes(12)),
        "'dtype' twice"),
    "metadata_not_text": (with_header(lambda h: h.update(__metadata__={"n": 1})), "not text to text"),
    "metadata_not_object": (with_header(lambda h: h.update(__metadata__=[])), "not text to text"),
    "entry_not_object": (with_header(lambda h: h.update(c=[])), "something else than"),
    "field_missing": (with_header(lambda h: h["b"].pop("shape")), "something else than"),
    "field_unknown": (changed(extra=1), "something else than"),
    "dtype_unknown": (changed(dtype="F31"), "unknown dtype 'F31'"),
    "dtype_not_text": (changed(dtype=["F32"]), "unknown dtype"),
    "shape_negative": (changed(shape=[-3]), "not a list of whole numbers"),
    "shape_fraction": (changed(shape=[3.0]), "not a list of whole numbers"),
    "shape_boolean": (changed(shape=[True, 3]), "not a list of whole numbers"),
    "shape_not_list": (changed(shape=3), "not a list of whole numbers"),
    "shape_endless": (changed(shape=[1] * 100 + [3]), "not a list of whole numbers"),
    "shape_overflows": (changed(shape=[1 << 32, 1 << 32, 0]), "size overflows"),
    "shape_wraps_to_fit": (changed(shape=[(1 << 62) + 3]), "size overflows"),
    "offsets_three": (changed(data_offsets=[12, 24, 24]), "not two whole numbers"),
    "offsets_negative": (changed(data_offsets=[-12, 0]), "not two whole numbers"),
    "offsets_backwards": (changed(data_offsets=[24, 12]), "end before it begins"),
    "offsets_beyond": (changed(data_offsets=[12, 28], shape=[4]), "end at byte 28 of a buffer of 24"),
    "size_wrong": (changed(shape=[2]), "its shape and dtype need 8"),
    "overlap": (changed(data_offsets=[8, 20]), "overlaps the one before"),
    "hole": (with_header(lambda h: h["b"].update(data_offsets=[16, 28]), bytes(28)), "leaves a hole"),
    "hole_at_start": (with_header(lambda h: h.pop("a"), bytes(24)), "leaves a hole"),
    "trailing": (raw(json.dumps(good()).encode(), bytes(25)), "1 bytes after the last tensor"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_each_broken_rule_is_named_at_once(name: str, tmp_path: Path) -> None:
    content, message = BROKEN[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    start = time.perf_counter()
    with pytest.raises(AxiconError) as error:
        TensorFile(path)
    assert time.perf_counter() - start < 0.05
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_files_and_pipes_are_refused_without_waiting(tmp_path: Path) -> None:
    with pytest.raises(AxiconError, match="No such file"):
        TensorFile(tmp_path / "none")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(AxiconError, match="not a regular file"):
        TensorFile(tmp_path / "pipe")


def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    kinds = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int8, torch.bool]
    found = {str(kind): (torch.randn(3, 5) * 3).to(kind) for kind in kinds}
    return found | {"empty": torch.empty(0, 4), "scalar": torch.tensor(1.5)}


def test_reads_what_the_library_wrote(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(tensors(), path, metadata={"format": "pt"})
    file = TensorFile(path)
    assert file.metadata == {"format": "pt"}
    assert file.entries.keys() == tensors().keys()
    for name, expected in tensors().items():
        found = file.tensor(name)
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    file.forget()
    assert torch.equal(file.tensor("scalar"), torch.tensor(1.5))


def test_the_file_on_disk_is_never_written(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(4)}, path)
    before = path.read_bytes()
    TensorFile(path).tensor("a").fill_(7)
    assert path.read_bytes() == before


@pytest.mark.parametrize("seed", range(4))
def test_random_mutations_give_equal_tensors_or_a_clean_refusal(seed: int, tmp_path: Path) -> None:
    """500 mutations of the header per seed. What still opens must be the same bytes under some name and
    shape."""
    path = tmp_path / "model.safetensors"
    save_file(tensors(), path)
    original = path.read_bytes()
    header_end = 8 + int.from_bytes(original[:8], "little")
    body = original[header_end:]
    chance = random.Random(seed)
    opened = 0
    for _ in range(500):
        mutated = bytearray(original)
        for _ in range(chance.randint(1, 3)):
            at = chance.randrange(header_end)
            match chance.randrange(4):
                case 0:
                    mutated[at] ^= 1 << chance.randrange(8)
                case 1:
                    mutated[at] = chance.randrange(256)
                case 2:
                    mutated[at:at] = bytes(chance.choice(b'0123456789{}[]",:') for _ in range(2))
                case _:
                    del mutated[at : at + chance.randint(1, 4)]
        path.write_bytes(mutated)
        try:
            file = TensorFile(path)
        except AxiconError:
            continue
        opened += 1
        assert sum(e.end - e.begin for e in file.entries.values()) == len(body)
        for name, entry in file.entries.items():
            view = file.tensor(name).contiguous().view(-1)
            if view.numel():
                assert view.view(torch.uint8).numpy().tobytes() == body[entry.begin : entry.end]
    assert 0 < opened < 400
