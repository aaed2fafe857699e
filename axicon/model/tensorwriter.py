"""Writes the weights of a model directory tensor by tensor, so that only the tensor at hand is in memory.

A safetensors file begins with a header that names every tensor, and here they come one after the other. So
room is left for the header, which is written last and padded with spaces, as the format allows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from axicon.model.artefact import write_all, write_json
from axicon.model.tensorfile import DTYPES

DENSE, PACKED = "model", "packed"
"""How the names of weight files begin. transformers skips a quantization_config that it does not know and
fills what it misses with random numbers; under another name it finds no weights and says so."""
SHARD_BYTES = 2 << 30
HEADER_ROOM = (64 << 10) - 8
"""Bytes of a file's header; with its length before it, tensors begin on a page. A file that would need more
is followed by another one."""


def single(stem: str) -> str:
    """Name of the file that holds all weights."""
    return f"{stem}.safetensors"


def index_of(stem: str) -> str:
    """Name of the index where there are several files."""
    return f"{stem}.safetensors.index.json"


_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorWriter:
    """`with TensorWriter(folder) as weights: weights.add(name, tensor)`.

    The files and, if there are several, their index have their names when the block ends without an
    exception. What is written depends on names, tensors and their order alone. Raises OSError.
    """

    def __init__(self, folder: Path, shard_bytes: int | None = None) -> None:
        self.folder, self.shard_bytes = folder, SHARD_BYTES if shard_bytes is None else shard_bytes
        self.stem = DENSE
        """May be set until the block ends."""
        self._shards: list[_Shard] = []
        self.names: set[str] = set()
        """Of all tensors so far."""

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor. Raises ValueError for a name that was written already."""
        if name in self.names:
            raise ValueError(f"tensor {name} is written twice")
        if not self._shards or not self._shards[-1].has_room(name, tensor, self.shard_bytes):
            if self._shards:
                self._shards[-1].finish()
            self._shards.append(_Shard(self.folder / f"{len(self._shards) + 1:05d}.part"))
        self._shards[-1].add(name, tensor)
        self.names.add(name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            for shard in self._shards:
                shard.close()

    def _finish(self) -> None:
        count = len(self._shards)
        if count:
            self._shards[-1].finish()
        index: dict[str, str] = {}
        for number, shard in enumerate(self._shards, 1):
            file = single(self.stem) if count == 1 else f"{self.stem}-{number:05d}-of-{count:05d}.safetensors"
            shard.path.rename(self.folder / file)
            index |= dict.fromkeys(shard.entries, file)
        if count > 1:
            metadata = {"total_size": sum(shard.filled for shard in self._shards)}
            write_json(self.folder / index_of(self.stem), {"metadata": metadata, "weight_map": index})


class _Shard:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, Any] = {}
        self.filled = 0
        self._header = len(_header({}))
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        os.lseek(self._descriptor, 8 + HEADER_ROOM, os.SEEK_SET)

    def has_room(self, name: str, tensor: Tensor, most: int) -> bool:
        """Whether the tensor may follow the others: few enough bytes, and a place that its dtype divides."""
        header = self._header + len(_header({name: self._entry(tensor)}))
        aligned = self.filled % tensor.dtype.itemsize == 0
        return aligned and header <= HEADER_ROOM and (not self.filled or self.filled + tensor.nbytes <= most)

    def add(self, name: str, tensor: Tensor) -> None:
        self.entries[name] = entry = self._entry(tensor)
        self._header += len(_header({name: entry}))
        if tensor.numel():
            data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
            write_all(self._descriptor, data.data)
        self.filled += tensor.nbytes

    def finish(self) -> None:
        header = _header(self.entries).ljust(HEADER_ROOM)
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        write_all(self._descriptor, HEADER_ROOM.to_bytes(8, "little") + header)
        self.close()

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _entry(self, tensor: Tensor) -> dict[str, Any]:
        offsets = [self.filled, self.filled + tensor.nbytes]
        return {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}


def _header(entries: dict[str, Any]) -> bytes:
    return json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()


def write_weights(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int | None = None
) -> None:
    """Write tensors by name in the order in which they come, each made when it is its turn."""
    with TensorWriter(folder, shard_bytes) as weights:
        for name, tensor in tensors:
            weights.add(name, tensor)
