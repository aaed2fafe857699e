"""Reads one safetensors file: checks the whole header before anything is mapped, then hands out views.

The format is 8 bytes of header length N (little-endian), N bytes of JSON, then the tensors without holes
(github.com/huggingface/safetensors, "Format"). Headers come from strangers, so every rule of the format is
checked here, each with its own message. A hole or a trailing byte is refused too: a second file format can
hide there.
"""

from __future__ import annotations

import json
import mmap
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from axicon.errors import AxiconError

HEADER_LIMIT = 100_000_000
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True, slots=True)
class Entry:
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    """Offset from the start of the tensor buffer, in bytes."""
    end: int


class TensorFile:
    """One open file. Views keep the mapping alive; the file may be unlinked but must not be changed
    meanwhile."""

    def __init__(self, path: Path) -> None:
        """Raises AxiconError if the file is missing or breaks a rule of the format."""
        self.path = path
        try:
            # O_NONBLOCK: opening a named pipe must not wait for a writer.
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError as e:
            raise AxiconError(f"{path}: {e.strerror}") from e
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                self._refuse("is not a regular file")
            size = status.st_size
            if size < 8:
                self._refuse(f"has {size} bytes, too short for the header length")
            length = int.from_bytes(file.read(8), "little")
            if length > HEADER_LIMIT:
                self._refuse(f"claims a header of {length} bytes, the format allows {HEADER_LIMIT}")
            if 8 + length > size:
                self._refuse(f"claims a header of {length} bytes but has only {size - 8} after the length")
            self._start = 8 + length
            self.entries, self.metadata = self._parse(file.read(length), size - self._start)
            # Copy-on-write: torch wants writable memory, the file itself is never written.
            self._map = mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)

    def tensor(self, name: str) -> Tensor:
        """A view into the mapping, of the stored dtype and shape; pages are read when touched."""
        entry = self.entries[name]
        count = (entry.end - entry.begin) // entry.dtype.itemsize
        if count == 0:
            return torch.empty(entry.shape, dtype=entry.dtype)
        offset = self._start + entry.begin
        return torch.frombuffer(self._map, dtype=entry.dtype, count=count, offset=offset).view(entry.shape)

    def forget(self) -> None:
        """Drop the pages read so far from this process's memory; views stay valid and are read again."""
        self._map.madvise(mmap.MADV_DONTNEED)

    def _refuse(self, why: str) -> NoReturn:
        raise AxiconError(f"{self.path}: not a valid safetensors file: it {why}. Fetch or convert it again")

    def _parse(self, text: bytes, room: int) -> tuple[dict[str, Entry], dict[str, str]]:
        header = self._json(text)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            self._refuse("has metadata that is not text to text")
        entries = {name: self._entry(name, value, room) for name, value in header.items()}
        position = 0
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
            if entry.begin != position:
                problem = "overlaps the one before" if entry.begin < position else "leaves a hole before it"
                self._refuse(f"has a tensor {name!r} that {problem}")
            position = entry.end
        if position != room:
            self._refuse(f"has {room - position} bytes after the last tensor")
        return entries, metadata

    def _json(self, text: bytes) -> dict[str, Any]:
        if not text.startswith(b"{"):
            self._refuse("has a header that does not begin with '{'")

        def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            found = dict(pairs)
            if len(found) != len(pairs):
                names = [name for name, _ in pairs]
                self._refuse(f"names {next(n for n in names if names.count(n) > 1)!r} twice in its header")
            return found

        try:
            header = json.loads(text.decode("utf-8"), object_pairs_hook=no_duplicates)
        except UnicodeDecodeError:
            self._refuse("has a header that is not UTF-8")
        except (ValueError, RecursionError):
            self._refuse("has a header that is not JSON")
        assert isinstance(header, dict)
        return header

    def _entry(self, name: str, value: Any, room: int) -> Entry:
        if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
            self._refuse(f"describes {name!r} by something else than dtype, shape and data_offsets")
        dtype = DTYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
        if dtype is None:
            self._refuse(f"stores {name!r} in unknown dtype {str(value['dtype'])[:40]!r}")
        shape, offsets = value["shape"], value["data_offsets"]
        if not _whole_numbers(shape):
            self._refuse(f"gives {name!r} a shape that is not a list of whole numbers from 0")
        if not _whole_numbers(offsets) or len(offsets) != 2:
            self._refuse(f"gives {name!r} data_offsets that are not two whole numbers from 0")
        begin, end = offsets
        if begin > end:
            self._refuse(f"has {name!r} end before it begins")
        if end > room:
            self._refuse(f"has {name!r} end at byte {end} of a buffer of {room}")
        size = dtype.itemsize
        for n in shape:
            size *= n
            # Checked at each factor, and against 64 bits even where a later factor is 0.
            if size >= 1 << 63:
                self._refuse(f"gives {name!r} a shape whose size overflows")
        if size != end - begin:
            self._refuse(f"has {end - begin} bytes for {name!r}, its shape and dtype need {size}")
        return Entry(dtype, tuple(shape), begin, end)


def _whole_numbers(value: Any) -> bool:
    return (
        isinstance(value, list) and len(value) <= 64
        and all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 63 for n in value)
    )
