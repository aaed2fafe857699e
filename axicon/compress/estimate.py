"""What compressing a model will take, from one block of it: time, memory and disk."""

from __future__ import annotations

import copy
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from axicon.compress.walk import walk
from axicon.errors import AxiconError
from axicon.model import checkpoint
from axicon.model.decoder import Decoder
from axicon.model.machine import available_memory
from axicon.model.weights import stored_tensors
from axicon.protocols import Compressor

WORKING_BYTES = 16
"""Per weight of the product at hand: four float32 copies, which is what rounding to a grid takes."""
OVERHEAD = 32 << 20
OTHER_FILES = 32 << 20
"""Tokenizer, headers, manifest."""
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Estimate:
    seconds: float
    memory: int
    """Bytes on top of what the process has already."""
    disk: int
    """Bytes of the result."""
    block_seconds: float
    """Measured on one block."""

    def check(self, source: Path, target: Path) -> None:
        """Raises AxiconError when memory or disk do not suffice."""
        available = available_memory()
        if available is not None and self.memory > available:
            raise AxiconError(
                f"{source}: compressing it takes about {self.memory / GIB:.2f} GiB of memory, "
                f"{available / GIB:.2f} GiB are available; stop other programs or take a smaller model")
        place = next(path for path in (target, *target.parents) if path.exists())
        free = shutil.disk_usage(place).free
        if self.disk > free:
            raise AxiconError(
                f"{target}: the result takes about {self.disk / GIB:.2f} GiB, {free / GIB:.2f} GiB are free "
                "on that disk; free some or choose another place")


def estimate(compressor: Compressor, source: Path, dtype: torch.dtype) -> Estimate:
    """Compress one block for trial, on a copy of the compressor, and extrapolate by bytes."""
    shape = checkpoint.shape_of(source)
    probe = min(1, shape.layers - 1)
    start = time.perf_counter()
    part = checkpoint.load(source, dtype=dtype, blocks=range(probe, probe + 1))
    before = _bytes(part, dtype)
    walk(copy.deepcopy(compressor), [part])
    after = sum(tensor.nbytes for _, tensor in stored_tensors(part))
    seconds = time.perf_counter() - start
    with torch.device("meta"):
        parts = [Decoder(shape, range(i, i + 1)) for i in range(shape.layers)]
        embedding = Decoder(shape).embed_tokens.weight.numel() * dtype.itemsize
    dense = [_bytes(part, dtype) for part in parts]
    products = max(m.weight.numel() for part in parts for m in part.modules() if isinstance(m, nn.Linear))
    return Estimate(
        seconds=seconds * sum(dense) / before,
        # A part once in memory and once as pages of its file; 612 MB measured for the embedded model's 614.
        memory=2 * max(dense) + products * WORKING_BYTES + OVERHEAD,
        disk=embedding + int((sum(dense) - embedding) * after / before) + OTHER_FILES,
        block_seconds=seconds,
    )


def _bytes(part: Decoder, dtype: torch.dtype) -> int:
    return sum(p.numel() for p in part.parameters()) * dtype.itemsize
