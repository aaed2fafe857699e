"""Block reconstruction: a pruned block is brought near the dense one on the inputs that it now gets.

Zimmer et al., arXiv:2312.15230, the reconstruction of PERP: targets are the outputs of the block before it
was pruned, on the inputs from blocks that are pruned and repaired already; norms, biases and adapters of this
block alone (`axicon.model.perp`) train on the mean squared error by AdamW, with a linear schedule behind a
warm-up, and are merged. Nothing goes back through the model: memory is that of two blocks and one batch.

Differs from the released code: targets are made when they are needed instead of kept; what trains is float32;
a block whose error did not become smaller is left as it was pruned, and the log says so.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from axicon.compress.calibration import sequences, through
from axicon.errors import AxiconError, RunFailed
from axicon.model.decoder import Block, Decoder
from axicon.model.lowrank import freeze
from axicon.model.perp import Kind, Perp, Subset, check_pruned

log = logging.getLogger("axicon")


@dataclass(frozen=True, kw_only=True)
class Reconstruct:
    stage: ClassVar[str] = "repair"
    train: tuple[Subset, ...] = ("norms", "biases")
    """Of norms and biases, beside the adapters."""
    adapters: Kind = "mask_lora"
    """mask_lora, lora_prune, scale_lora or none."""
    r: int = 16
    alpha: float = 32.0
    """Over r: the scale of mask_lora and lora_prune."""
    lr: float = 1e-3
    warmup: float = 0.1
    """Share of the steps in which the learning rate rises."""
    passes: int = 2
    """Over the windows of the sample."""
    batch: int = 2
    """Windows of a step."""
    seed: int = 0
    """Of the order of windows, and of adapters."""

    @property
    def needs_inputs(self) -> bool:
        return True

    def __post_init__(self) -> None:
        if not (self.lr > 0 and 0 <= self.warmup < 1 and self.passes >= 1 and self.batch >= 1):
            raise AxiconError(
                f"reconstruct: lr={self.lr:g}, warmup={self.warmup:g}, passes={self.passes}, "
                f"batch={self.batch}: lr more than 0, warmup from 0 to below 1, passes and batch at least 1"
            )
        if "head" in self.train:
            raise AxiconError("reconstruct: train takes norms and biases, the head is in no block")
        try:
            self._perp()
        except ValueError as e:
            raise AxiconError(f"reconstruct: {e}") from None
        object.__setattr__(self, "_dense", None)

    def _perp(self) -> Perp:
        return Perp(train=self.train, adapters=self.adapters, r=self.r, alpha=self.alpha)

    @property
    def more_passes(self) -> float:
        """Forward passes of the sample that this takes: dense, repaired, and twice that backwards, for each
        pass; and two errors."""
        return 4 * self.passes + 4

    @property
    def trained_windows(self) -> int:
        """Windows that go forward and back through a block at once."""
        return self.batch

    def begin(self, model: Decoder) -> None:
        """Nothing to prepare."""

    def remember(self, block: Block) -> None:
        object.__setattr__(self, "_dense", copy.deepcopy(block))

    def block(self, block: Block, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        dense: Block | None = getattr(self, "_dense", None)
        if dense is None:
            raise AxiconError(
                "reconstruct brings a block back to what it was before it was pruned: put it behind the "
                "pruning, as chain=wanda,reconstruct"
            )
        object.__setattr__(self, "_dense", None)
        pruned = {name: p.detach().clone() for name, p in block.named_parameters()}
        before = mean_squared_error(block, dense, inputs)
        if before:  # or rules left all of it dense
            if self.adapters is not None:
                check_pruned(block, self.adapters)
            freeze(block)
            perp = self._perp()
            perp.install_block(block, self.seed)
            self._train(block, dense, inputs, before)
            perp.merge_block(block)
            after = mean_squared_error(block, dense, inputs)
            if after < before:
                log.info("reconstruct: blocks.%d: error %.3g, was %.3g", block.index, after, before)
            else:
                for name, p in block.named_parameters():
                    p.data.copy_(pruned[name])
                log.warning(
                    "reconstruct: blocks.%d stays as it was pruned: its error of %.3g would become %.3g; "
                    "a smaller lr may do better",
                    block.index,
                    before,
                    after,
                )
        return through(block, inputs)

    def finish(self, model: Decoder) -> None:
        """The head stays as it is."""

    def _train(self, block: Block, dense: Block, inputs: Sequence[Tensor], before: float) -> None:
        """`before` is the error at first, which the loss is counted in."""
        trains = [p for p in block.parameters() if p.requires_grad]
        if not trains:
            raise AxiconError(
                f"reconstruct: blocks.{block.index} has nothing that trains: no biases; add norms or adapters"
            )
        optimizer = torch.optim.AdamW(trains, lr=self.lr, weight_decay=0.0)
        batches = list(self._batches(len(inputs), block.index))
        rise = int(self.warmup * len(batches))
        for step, chosen in enumerate(batches):
            x_BTD = torch.cat([inputs[i] for i in chosen])
            target_BTD = sequences(dense, x_BTD)
            with torch.enable_grad():
                loss = (sequences(block, x_BTD).float() - target_BTD.float()).square().mean() / before
                if not bool(loss.isfinite()):
                    raise RunFailed(
                        f"reconstruct: blocks.{block.index} has no finite error after {step} steps; take a "
                        "smaller lr, or dtype=float32"
                    )
                loss.backward()
            for group in optimizer.param_groups:
                left = (len(batches) - step) / (len(batches) - rise)
                group["lr"] = self.lr * ((step + 1) / (rise + 1) if step < rise else left)
            optimizer.step()
            optimizer.zero_grad()

    def _batches(self, windows: int, index: int) -> Iterator[list[int]]:
        made = torch.Generator().manual_seed(self.seed * 2**20 + index)
        for _ in range(self.passes):
            order = torch.randperm(windows, generator=made).tolist()
            for start in range(0, windows, self.batch):
                yield order[start : start + self.batch]


def mean_squared_error(block: Block, dense: Block, inputs: Sequence[Tensor]) -> float:
    """Mean over all elements of the outputs of the sample."""
    total = count = 0.0
    for x_BTD in inputs:
        total += float((sequences(block, x_BTD).float() - sequences(dense, x_BTD).float()).square().sum())
        count += x_BTD.numel() / x_BTD.shape[-1]
    return total / (count * block.shape.width_out)
