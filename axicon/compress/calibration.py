"""Calibration: the tokens that a method looks at, and the hidden states they become from block to block.

Hidden states are sequences of windows (1, T, D), in the order of the sample. They are a list, a file, or
computed when they are asked for; whoever iterates over them holds one window at a time.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast, overload

import torch
from torch import Tensor

from axicon.errors import AxiconError
from axicon.model.artefact import write_all
from axicon.model.decoder import Block, Decoder, Rotary, dense_attend, inverse_frequencies, rotary

States = Sequence[Tensor]
Store = Callable[[Iterable[Tensor]], States]
"""Keeps hidden states somewhere; `list` keeps them in memory."""


@dataclass(frozen=True)
class Calibration:
    """A sample, and what a block is shown of it."""

    tokens_WT: Tensor
    """int64: W windows of T tokens."""
    dense: bool = False
    """A block is shown what the dense blocks before it hand on, instead of what the compressed ones do."""

    @property
    def sha256(self) -> str:
        """Of the tokens, as little-endian int64 behind their shape."""
        content = self.tokens_WT.to(torch.int64).contiguous()
        shape = " ".join(map(str, content.shape))
        return hashlib.sha256(shape.encode() + b"\n" + content.numpy().astype("<i8").tobytes()).hexdigest()


def choose_windows(tokens_T: Tensor, windows: int, window: int, seed: int, what: str) -> Tensor:
    """(W, T): some of the whole windows that a text can be cut into, without repetition, in a random order.

    `what` names the text for a message. Raises AxiconError for one that is too short.
    """
    whole = len(tokens_T) // window
    if whole < windows:
        advice = f"ask for windows={whole}" if whole else "take a shorter window"
        raise AxiconError(
            f"{what} has {len(tokens_T)} tokens, which is {whole} windows of {window} tokens and not "
            f"{windows}: {advice}, or give more text")
    chosen = torch.randperm(whole, generator=torch.Generator().manual_seed(seed))[:windows]
    return tokens_T[: whole * window].view(whole, window)[chosen]


class Computed(Sequence[Tensor]):
    """`function` of every item, computed whenever it is asked for."""

    def __init__(self, function: Callable[[Tensor], Tensor], items: Sequence[Tensor]) -> None:
        self.function, self.items = function, items

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor]:
        if isinstance(index, slice):
            return Computed(self.function, self.items[index])
        return self.function(self.items[index])


class OnDisk(Sequence[Tensor]):
    """Equal windows one after the other in a file. Read and not mapped, so that memory stays what it is.

    A file that is renamed or removed can still be read through an object made before.
    """

    def __init__(self, path: Path, shape: Sequence[int], dtype: torch.dtype) -> None:
        """Raises ValueError for a file that is no whole number of windows, and OSError."""
        self.shape, self.dtype = tuple(shape), dtype
        self._bytes = torch.Size(self.shape).numel() * dtype.itemsize
        self._file = path.open("rb", buffering=0)
        size = os.fstat(self._file.fileno()).st_size
        if size % self._bytes:
            raise ValueError(f"{path} has {size} bytes, windows have {self._bytes}")
        self._count = size // self._bytes

    @classmethod
    def write(cls, path: Path, items: Iterable[Tensor]) -> OnDisk:
        """Raises OSError."""
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            for item in items:
                write_all(descriptor, item.contiguous().view(-1).view(torch.uint8).numpy().data)
        finally:
            os.close(descriptor)
        return cls(path, item.shape, item.dtype)

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._count))]
        place = range(self._count)[index]  # IndexError beyond the end, which ends an iteration
        content = bytearray(self._bytes)
        read = os.preadv(self._file.fileno(), [content], place * self._bytes)
        if read != self._bytes:
            raise OSError(f"{self._file.name}: {read} of {self._bytes} bytes could be read")
        return torch.frombuffer(content, dtype=self.dtype).view(self.shape)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()


def embedded(part: Decoder, tokens_WT: Tensor) -> States:
    """What the first block is shown."""
    positions_T = torch.arange(tokens_WT.shape[1])
    return Computed(lambda tokens_T: part.embed(tokens_T, positions_T)[None], list(tokens_WT))


def sequences(block: Block, x_BTD: Tensor) -> Tensor:
    """Whole sequences through one block, causal, from position 0: (B, T, width out)."""
    batch, length, width = x_BTD.shape
    y_ND = block(x_BTD.reshape(-1, width), rotation(block, batch, length, x_BTD.dtype), dense_attend(batch))
    return cast(Tensor, y_ND.view(batch, length, -1))


def rotation(block: Block, batch: int, length: int, dtype: torch.dtype) -> Rotary | None:
    """Of whole sequences one after the other; None with learned positions."""
    if block.rope is None:
        return None
    positions_N = torch.arange(length).repeat(batch)
    return rotary(positions_N, inverse_frequencies(block.rope, block.shape.head_width), dtype)


def through(block: Block, inputs: States) -> States:
    """What the block, as it is when it is asked, makes of its inputs."""
    return Computed(lambda x_BTD: sequences(block, x_BTD), inputs)


def observe(block: Block, inputs: States, visits: Mapping[str, Callable[[Tensor], object]]) -> None:
    """Send all inputs through the block. What a product of a name in `visits` multiplies, (N, I), goes to the
    function there.
    """
    def hook(visit: Callable[[Tensor], object]) -> Callable[[object, tuple[Tensor, ...]], None]:
        def before(_: object, arguments: tuple[Tensor, ...]) -> None:
            visit(arguments[0])

        return before

    hooks = [getattr(block, name).register_forward_pre_hook(hook(visit)) for name, visit in visits.items()]
    try:
        for x_BTD in inputs:
            sequences(block, x_BTD)
    finally:
        for one in hooks:
            one.remove()


def finite(items: Iterable[Tensor], where: str) -> Iterator[Tensor]:
    """The same. Raises AxiconError, with the window's number, at the first that is not finite."""
    for number, item in enumerate(items):
        # Smallest and largest are NaN if any element is.
        if not all(extreme.isfinite() for extreme in item.aminmax()):
            raise AxiconError(
                f"{where} holds NaN or infinite values for calibration window {number}; try dtype=float32, "
                "or look at the model: axicon evaluate says whether it still predicts")
        yield item
