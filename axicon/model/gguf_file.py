"""A bounded reader of GGUF files (github.com/ggml-org/ggml, docs/gguf.md, versions 2 and 3).

Every count, length and offset is compared with the bytes that are really there before it is used, so a
broken or hostile file is refused quickly and without large allocations. Dequantising is left to the `gguf`
package.
"""

from __future__ import annotations

import mmap
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from axicon.errors import AxiconError

MOST_FIELDS = 1 << 14
MOST_TENSORS = 1 << 16
MOST_NAME = 256
MOST_ELEMENTS = 1 << 40
DEFAULT_ALIGNMENT = 32

# Value types of the format: name of each scalar in `struct`, by number; 8 is text, 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    shape: tuple[int, ...]
    """As in torch: slowest dimension first."""
    kind: int
    """GGML quantisation type."""
    offset: int
    """From the start of the file."""
    size: int
    """Bytes."""


class GGUFFile:
    """`fields` (name -> number, text or list) and `tensors` (name -> GGUFTensor) of one open file."""

    def __init__(self, path: Path) -> None:
        """Raises AxiconError if the file is missing, not GGUF, or contradicts itself."""
        self.path = path
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError as e:
            raise AxiconError(f"{path}: {e.strerror}") from e
        with os.fdopen(descriptor, "rb"):
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_size < 24:
                self._refuse("it is not a regular file of at least 24 bytes")
            self._map = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        self._size, self._at = status.st_size, 0
        if self._take(4) != b"GGUF":
            self._refuse("it does not begin with GGUF")
        version = self._scalar("I")
        if version not in (2, 3):
            self._refuse(
                f"version {version if version < 1 << 16 else 'of a big-endian file'}, known are 2 and 3")
        tensors, fields = self._scalar("Q"), self._scalar("Q")
        if tensors > MOST_TENSORS or fields > MOST_FIELDS:
            self._refuse(
                f"it claims {tensors} tensors and {fields} fields, at most {MOST_TENSORS} and {MOST_FIELDS}")
        self.fields: dict[str, Any] = {}
        for _ in range(fields):
            name = self._text(MOST_NAME)
            if name in self.fields:
                self._refuse(f"field {name!r} comes twice")
            self.fields[name] = self._value(self._scalar("I"))
        self.tensors = self._tensors(tensors)

    def array(self, name: str) -> npt.NDArray[np.float32]:
        """One tensor as float32, dequantised."""
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        t = self.tensors[name]
        kind = GGMLQuantizationType(t.kind)
        data = np.frombuffer(self._map, np.uint8, offset=t.offset, count=t.size)
        plain = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16,
                 GGMLQuantizationType.F64: np.float64}
        if kind in plain:
            return data.view(plain[kind]).reshape(t.shape).astype(np.float32)
        try:
            return np.asarray(dequantize(data.reshape(*t.shape[:-1], -1), kind), np.float32).reshape(t.shape)
        except NotImplementedError:
            self._refuse(
                f"tensor {name!r} is stored as {kind.name}, which the gguf package cannot dequantise")

    def _refuse(self, why: str) -> NoReturn:
        raise AxiconError(
            f"{self.path}: not a GGUF file that can be read: {why}. Fetch it again or take another")

    def _take(self, size: int) -> bytes:
        if size > self._size - self._at:
            self._refuse(f"it ends at byte {self._size}, {size} more were expected at {self._at}")
        self._at += size
        return self._map[self._at - size : self._at]

    def _scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self._take(struct.calcsize(code)))[0]

    def _text(self, most: int | None = None) -> str:
        length = self._scalar("Q")
        if most is not None and length > most:
            self._refuse(f"a name of {length} bytes at {self._at}, at most {most}")
        try:
            return self._take(length).decode("utf-8")
        except UnicodeDecodeError:
            self._refuse(f"text before byte {self._at} is not UTF-8")

    def _value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self._text()
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind != _ARRAY:
            self._refuse(f"unknown value type {kind} at byte {self._at}")
        kind, count = self._scalar("I"), self._scalar("Q")
        if kind in _SCALARS:
            data = self._take(count * struct.calcsize(_SCALARS[kind]))
            return list(struct.unpack(f"<{count}{_SCALARS[kind]}", data))
        if kind != _TEXT:
            self._refuse(f"an array of value type {kind} at byte {self._at}")
        if count * 8 > self._size - self._at:
            self._refuse(f"an array of {count} texts at byte {self._at} does not fit into the file")
        return [self._text() for _ in range(count)]

    def _tensors(self, count: int) -> dict[str, GGUFTensor]:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        described: dict[str, tuple[tuple[int, ...], int, int, int]] = {}
        for _ in range(count):
            name = self._text(MOST_NAME)
            if name in described:
                self._refuse(f"tensor {name!r} comes twice")
            dimensions = self._scalar("I")
            if not 1 <= dimensions <= 4:
                self._refuse(f"tensor {name!r} has {dimensions} dimensions")
            sizes = [self._scalar("Q") for _ in range(dimensions)]
            kind, offset = self._scalar("I"), self._scalar("Q")
            elements = 1
            for n in sizes:
                elements *= n
                if not 0 < elements <= MOST_ELEMENTS:
                    self._refuse(f"tensor {name!r} has dimensions {sizes}")
            try:
                block, bytes_per_block = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
            except (ValueError, KeyError):
                self._refuse(f"tensor {name!r} is stored in unknown type {kind}")
            if sizes[0] % block:
                self._refuse(f"rows of tensor {name!r} have {sizes[0]} values, not a multiple of {block}")
            described[name] = (tuple(reversed(sizes)), kind, offset, elements // block * bytes_per_block)
        alignment = self.fields.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or not 8 <= alignment <= 1 << 16 or alignment & (alignment - 1):
            self._refuse(f"alignment is {alignment!r}")
        start = -(-self._at // alignment) * alignment
        tensors = {
            name: GGUFTensor(shape, kind, start + offset, size)
            for name, (shape, kind, offset, size) in described.items()
        }
        self._check_places(tensors, alignment)
        return tensors

    def _check_places(self, tensors: dict[str, GGUFTensor], alignment: int) -> None:
        end = 0
        for name, t in sorted(tensors.items(), key=lambda item: item[1].offset):
            if t.offset % alignment or t.offset < end or t.offset + t.size > self._size:
                self._refuse(
                    f"tensor {name!r} at bytes {t.offset}..{t.offset + t.size} overlaps another, is not "
                    f"aligned, or lies outside the {self._size} bytes there are")
            end = t.offset + t.size
