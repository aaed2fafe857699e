"""Blocks come into a ring of buffers before they are computed and go back behind that, beside the computing.

On a CPU one thread reads, updates and writes. On a GPU copies have two streams of their own, and updates are
part of the stream that computes. Whoever uses a carrier says for a block in turn: fetch, arrive, leave.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from axicon.finetune.blockstore import Store

Freshen = Callable[[int, Tensor, bool], int | None]
"""Bring the bytes of a block in a buffer up to date; True for those that were just read. A number if they
should go back."""
Written = Callable[[int, int], None]
"""Called when they have, with that number."""


@dataclass
class Traffic:
    """What has been moved since the start."""

    blocks_in: int = 0
    bytes_in: int = 0
    blocks_out: int = 0
    bytes_out: int = 0
    waited: float = 0.0
    """Seconds for which there was no block to compute with."""


class Carrier(Protocol):
    traffic: Traffic

    def fetch(self, block: int, buffer: Tensor) -> None:
        """Begin to bring a block into a buffer that nothing else is in."""
        ...

    def arrive(self, block: int, buffer: Tensor) -> None:
        """Behind this the block can be computed with, up to date. Raises what went wrong on the way."""
        ...

    def leave(self, block: int, buffer: Tensor) -> None:
        """The buffer may have another block from now on."""
        ...

    def close(self) -> None: ...


class ThreadCarrier:
    """For a CPU. Computing does not change a block, so it goes back as soon as it is up to date."""

    def __init__(self, store: Store, freshen: Freshen, written: Written, *, overlap: bool = True) -> None:
        self.store, self.freshen, self.written, self.traffic = store, freshen, written, Traffic()
        self._thread = ThreadPoolExecutor(1, "axicon-blocks") if overlap else None
        self._under_way: dict[int, Future[None]] = {}

    def fetch(self, block: int, buffer: Tensor) -> None:
        if self._thread is not None:
            self._under_way[block] = self._thread.submit(self._bring, block, buffer)
        else:
            self._bring(block, buffer)

    def arrive(self, block: int, buffer: Tensor) -> None:
        began = time.perf_counter()
        if block in self._under_way:
            self._under_way.pop(block).result()
        self._update(block, buffer, False)  # what was decided after it had been brought
        self.traffic.waited += time.perf_counter() - began

    def leave(self, block: int, buffer: Tensor) -> None:
        pass

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def _bring(self, block: int, buffer: Tensor) -> None:
        self.store.read(block, buffer)
        self.traffic.blocks_in += 1
        self.traffic.bytes_in += len(buffer)
        self._update(block, buffer, True)

    def _update(self, block: int, buffer: Tensor, just_read: bool) -> None:
        number = self.freshen(block, buffer, just_read)
        if number is not None:
            self.store.write(block, buffer)
            self.written(block, number)
            self.traffic.blocks_out += 1
            self.traffic.bytes_out += len(buffer)


class StreamCarrier:
    """For a CUDA device; the store is pinned host memory."""

    def __init__(self, store: Store, freshen: Freshen, written: Written, device: torch.device) -> None:
        self.store, self.freshen, self.written, self.traffic = store, freshen, written, Traffic()
        self._up, self._down = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._compute = torch.cuda.current_stream(device)
        self._there: dict[int, torch.cuda.Event] = {}
        self._back: dict[int, torch.cuda.Event] = {}
        """By block: when it lies in host memory again."""
        self._free: dict[int, torch.cuda.Event] = {}
        """By address of a buffer: when nothing reads it any more."""
        self._dirty: dict[int, int] = {}

    def fetch(self, block: int, buffer: Tensor) -> None:
        for event in (self._free.get(buffer.data_ptr()), self._back.get(block)):
            if event is not None:
                self._up.wait_event(event)
        with torch.cuda.stream(self._up):
            self.store.read(block, buffer)
        self._there[block] = self._up.record_event()
        self.traffic.blocks_in += 1
        self.traffic.bytes_in += len(buffer)

    def arrive(self, block: int, buffer: Tensor) -> None:
        just_read = block in self._there
        if just_read:
            self._compute.wait_event(self._there.pop(block))
        number = self.freshen(block, buffer, just_read)
        if number is not None:
            self._dirty[block] = number

    def leave(self, block: int, buffer: Tensor) -> None:
        done = self._compute.record_event()
        if block in self._dirty:
            self._down.wait_event(done)
            with torch.cuda.stream(self._down):
                self.store.write(block, buffer)
            done = self._back[block] = self._down.record_event()
            self.written(block, self._dirty.pop(block))  # for whoever reads it behind that event
            self.traffic.blocks_out += 1
            self.traffic.bytes_out += len(buffer)
        self._free[buffer.data_ptr()] = done

    def close(self) -> None:
        torch.cuda.synchronize()
