"""What compressing a model will take, from one block of it: time, memory and disk."""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from axicon.compress.calibration import Calibration, sequences
from axicon.compress.walk import walk
from axicon.errors import AxiconError
from axicon.model import checkpoint
from axicon.model.decoder import Block, Decoder
from axicon.model.machine import available_memory
from axicon.model.weights import stored_tensors
from axicon.protocols import Compressor

WORKING_BYTES = 16
"""Per weight of the product at hand: four float32 copies, which is what rounding to a grid takes."""
OVERHEAD = 32 << 20
OTHER_FILES = 32 << 20
"""Tokenizer, headers, manifest."""
TRIED_TOKENS, PASSES = 64, 3
"""A method looks at the inputs of a block about twice, which costs more than one pass; one more makes its
output."""
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

    def with_states(self, states: int, on_disk: bool) -> Estimate:
        """With hidden states of so many bytes in memory or on disk."""
        if on_disk:
            return replace(self, disk=self.disk + states)
        return replace(self, memory=self.memory + states)

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


@torch.no_grad()
def estimate(
    compressor: Compressor, source: Path, dtype: torch.dtype, calibration: Calibration | None = None
) -> Estimate:
    """Compress one block for trial, on a copy of the compressor, and extrapolate by bytes.

    Of a calibration sample the trial sees a little. Disk and memory are without the hidden states, for which
    see `state_bytes`.
    """
    shape = checkpoint.shape_of(source)
    probe = min(1, shape.layers - 1)
    start = time.perf_counter()
    part = checkpoint.load(source, dtype=dtype, blocks=range(probe, probe + 1), masks=True)
    before = _bytes(part, dtype)
    grams, passes = 0, 0.0
    if calibration is None:
        walk(copy.deepcopy(compressor), [part])
    else:
        grams = _gram_bytes(part) + _training_bytes(compressor, part, calibration)
        passes = _try_calibrated(copy.deepcopy(compressor), part, calibration)
    after = sum(tensor.nbytes for _, tensor in stored_tensors(part))
    seconds = time.perf_counter() - start
    with torch.device("meta"):
        parts = [Decoder(shape, range(i, i + 1)) for i in range(shape.layers)]
        embedding = Decoder(shape).embed_tokens.weight.numel() * dtype.itemsize
    dense = [_bytes(part, dtype) for part in parts]
    blocks = [block for part in parts for block in part.blocks]
    products = max(m.weight.numel() for block in blocks for m in block.modules() if isinstance(m, nn.Linear))
    head = parts[-1].lm_head.weight.numel()
    disk = embedding + int((sum(dense) - embedding) * after / before) + OTHER_FILES
    return Estimate(
        seconds=seconds * sum(dense) / before + passes * shape.layers,
        # A part once in memory and once as pages of its file, and a copy of the head of 8 bits. With data the
        # OPT-1.3B shape takes four fifths of it, without data all: benchmarks/walk.py.
        memory=2 * max(dense) + products * WORKING_BYTES + head + OVERHEAD + grams,
        disk=disk if calibration is None else 2 * disk,
        block_seconds=seconds + passes,
    )


def state_bytes(source: Path, dtype: torch.dtype, calibration: Calibration) -> int:
    """Bytes of the hidden states of a sample before a block and behind it."""
    shape = checkpoint.shape_of(source)
    widest = max(max(block.width_in, block.width_out) for block in shape.blocks)
    return 2 * calibration.tokens_WT.numel() * widest * dtype.itemsize


def _try_calibrated(compressor: Compressor, part: Decoder, calibration: Calibration) -> float:
    """Compress the block of `part` on a short made-up window, or on as many tokens as a method's field
    `tokens` says that it looks at many times. Returns the seconds that all windows of the sample would take
    to go through the block, as often as the walk and a method send them: one that trains says so in
    `more_passes`.
    """
    block = part.blocks[0]
    assert isinstance(block, Block)
    windows, length = calibration.tokens_WT.shape
    made = torch.Generator().manual_seed(0)
    x_BTD = torch.randn(1, length, block.shape.width_in, generator=made).to(part.dtype)
    once = min(_seconds(lambda: sequences(block, x_BTD)) for _ in range(3))  # the first touches new memory
    tokens = getattr(compressor, "tokens", TRIED_TOKENS)
    shown = [x_BTD[:, :tokens]] * min(windows, max(1, tokens // length))
    compressor.block(block, shown)
    return (PASSES + getattr(compressor, "more_passes", 0)) * once * windows


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _gram_bytes(part: Decoder) -> int:
    """Of the x x^T of all products of a block in float32, and of one more of the largest: its factor."""
    widths = [m.in_features for block in part.blocks for m in block.children() if isinstance(m, nn.Linear)]
    return 4 * (sum(width**2 for width in widths) + max(widths) ** 2)


def _training_bytes(compressor: Compressor, part: Decoder, calibration: Calibration) -> int:
    """Of a method that trains a block, the dense one beside it, on `trained_windows` at once: both blocks
    once more, and what every product of one is given and returns, for the backward pass.
    """
    tokens = getattr(compressor, "trained_windows", 0) * calibration.tokens_WT.shape[1]
    linears = [m for block in part.blocks for m in block.children() if isinstance(m, nn.Linear)]
    widths = sum(m.in_features + m.out_features for m in linears)
    return 2 * _bytes(part, part.dtype) + 2 * part.dtype.itemsize * tokens * widths if tokens else 0


def _bytes(part: Decoder, dtype: torch.dtype) -> int:
    return sum(p.numel() for p in part.parameters()) * dtype.itemsize
