"""Where blocks lie that are not in the memory that computes: a file, or the host's memory for a GPU.

A block is one run of bytes, its tensors one behind the other, so it moves in one piece. Files are read and
written and not mapped: pages of a mapped file would count as memory of the process, and evicting them is not
ours to time.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from axicon.errors import AxiconError

ALIGN = 64
"""Bytes; what vector instructions and GPU copies like."""


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor within the bytes of its block."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    start: int

    def of(self, bytes_N: Tensor) -> Tensor:
        """The tensor, as a view."""
        stop = self.start + self.shape.numel() * self.dtype.itemsize
        return bytes_N[self.start : stop].view(self.dtype).view(self.shape)


@dataclass(frozen=True, slots=True)
class Layout:
    parts: tuple[Part, ...]
    bytes: int

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Layout:
        parts, end = [], 0
        for name, tensor in tensors.items():
            parts.append(Part(name, tensor.shape, tensor.dtype, end))
            end += -(-tensor.numel() * tensor.dtype.itemsize // ALIGN) * ALIGN
        return cls(tuple(parts), end)

    def views(self, bytes_N: Tensor) -> Iterator[tuple[str, Tensor]]:
        return ((part.name, part.of(bytes_N)) for part in self.parts)


class Store(Protocol):
    """Blocks by number. A block has the size with which it was added."""

    def add(self, content: Tensor) -> None:
        """One more block, uint8 (N,) in ordinary memory."""
        ...

    def read(self, block: int, into: Tensor) -> None:
        """Into uint8 (N,) of the block's size."""
        ...

    def write(self, block: int, content: Tensor) -> None: ...

    def close(self) -> None: ...


class FileStore:
    """In a file that nobody else sees: it has no name, and is gone when the process is.

    Raises AxiconError where the disk has no room for a block when it is added. It has room from then on.
    """

    def __init__(self, folder: Path) -> None:
        self._places: list[tuple[int, int]] = []
        self._end, self._folder = 0, folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(folder, os.O_RDWR | os.O_TMPFILE, 0o600)
        except OSError as error:
            raise AxiconError(f"{folder}: no file for blocks can be made there ({error.strerror})") from None

    def add(self, content: Tensor) -> None:
        try:
            os.posix_fallocate(self._file, self._end, len(content))
        except OSError as error:
            do = "free some, or name another folder" if error.errno == errno.ENOSPC else "name another folder"
            raise AxiconError(
                f"{self._folder}: no room for a block of {len(content) / 2**20:.0f} MiB "
                f"({error.strerror}); {do}"
            ) from None
        self._places.append((self._end, len(content)))
        self._end += len(content)
        self.write(len(self._places) - 1, content)

    def read(self, block: int, into: Tensor) -> None:
        start, size = self._places[block]
        view, done = memoryview(into.numpy().data), 0
        while done < size:
            got = os.preadv(self._file, [view[done:size]], start + done)
            if got == 0:
                raise OSError(errno.EIO, f"block {block} ends after {done} of {size} bytes")
            done += got

    def write(self, block: int, content: Tensor) -> None:
        start, size = self._places[block]
        view, done = memoryview(content.numpy().data), 0
        while done < size:
            done += os.pwrite(self._file, view[done:size], start + done)

    def close(self) -> None:
        os.close(self._file)


class HostStore:
    """In the memory of the host, pinned where a GPU copies from it."""

    def __init__(self, *, pinned: bool = False) -> None:
        self.pinned = pinned
        self._blocks: list[Tensor] = []

    def add(self, content: Tensor) -> None:
        self._blocks.append(content.pin_memory() if self.pinned else content.clone())

    def read(self, block: int, into: Tensor) -> None:
        """On a GPU the copy has only begun when this returns: it is part of the current stream."""
        into.copy_(self._blocks[block], non_blocking=self.pinned)

    def write(self, block: int, content: Tensor) -> None:
        self._blocks[block].copy_(content, non_blocking=self.pinned)

    def close(self) -> None:
        self._blocks.clear()


def together(layout: Layout, tensors: Sequence[Tensor]) -> Tensor:
    """uint8: tensors as the bytes of a block."""
    content = torch.zeros(layout.bytes, dtype=torch.uint8)
    for (_, view), tensor in zip(layout.views(content), tensors, strict=True):
        view.copy_(tensor)
    return content
