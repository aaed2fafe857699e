"""The bounded reader: what a file claims is compared with what it has before anything is allocated."""

from __future__ import annotations

import random
import struct
import time
from pathlib import Path

import pytest

from axicon.errors import AxiconError
from axicon.model.gguf_file import GGUFFile
from tests.model.ggufs import reference, write


@pytest.fixture
def good(tmp_path: Path) -> bytes:
    return write(tmp_path / "good.gguf", reference("llama")).read_bytes()


def refuse(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    start = time.perf_counter()
    with pytest.raises(AxiconError, match=message) as error:
        GGUFFile(path)
    assert time.perf_counter() - start < 0.5
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "regular file of at least 24 bytes"),
        (b"GGML" + bytes(40), "does not begin with GGUF"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "it claims"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60), "it claims"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 62), "a name of"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 100), "it ends at byte"),
        (b"GGUF" + struct.pack("<IQQQ1sIQ", 3, 0, 1, 1, b"a", 8, 1 << 62), "it ends at byte"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 4, 1 << 61), "it ends at byte"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 8, 1 << 61), "does not fit"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 9, 1), "an array of value type 9"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"a", 77), "unknown value type 77"),
        (b"GGUF" + struct.pack("<IQQQ1sIB", 3, 0, 1, 1, b"\xff", 0, 1), "not UTF-8"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + 2 * struct.pack("<Q1sIB", 1, b"a", 0, 1),
         "comes twice"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 1, 0, 1, b"t", 9), "9 dimensions"),
        (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 1, 1 << 50, 0, 0), "has dimensions"),
        (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 1, 0, 0, 0), "has dimensions"),
        (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 1, 8, 999, 0), "unknown type 999"),
        (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 1, 33, 2, 0), "not a multiple of 32"),
        (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 1, 8, 0, 0), "lies outside"),
        (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 1, 1, 0, 7) + bytes(99), "not aligned"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2, 0)
         + b"".join(struct.pack("<Q1sIQIQ", 1, n, 1, 16, 0, o) for n, o in ((b"s", 0), (b"t", 32)))
         + bytes(200), "overlaps"),
    ],
)
def test_each_claim_is_checked(content: bytes, message: str, tmp_path: Path) -> None:
    refuse(content, message, tmp_path)


def test_every_shortened_file_is_refused(good: bytes, tmp_path: Path) -> None:
    for size in random.Random(0).sample(range(24, len(good) - 64), 40):
        refuse(good[:size], "not a GGUF file that can be read", tmp_path)


def test_random_mutations_end_in_a_file_or_a_clean_refusal(good: bytes, tmp_path: Path) -> None:
    header_end = good.index(b"blk.1.ffn_norm.weight") + 60
    chance = random.Random(1)
    path = tmp_path / "bad.gguf"
    refused = 0
    for _ in range(200):
        mutated = bytearray(good)
        for _ in range(3):
            mutated[chance.randrange(header_end)] = chance.randrange(256)
        path.write_bytes(mutated)
        try:
            file = GGUFFile(path)
            for name in file.tensors:
                assert file.array(name).shape == file.tensors[name].shape
        except AxiconError:
            refused += 1
    assert 20 < refused < 200
