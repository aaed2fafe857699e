"""ZO2: ZO-SGD for a model that memory does not hold (arXiv:2503.12668).

Both perturbed passes go through a block while it is in memory, and so does the update of the step before: a
block comes once per step. Every number is that of `zo_sgd`, bit for bit, and so is every weight once it is
looked at.

Differs from the authors' code: directions are keyed, so the order of parameters means nothing; blocks are not
moved by their perturbation, so they go back for updates alone; an update keeps the learning rate of its own
step; a matrix that embedding and head share is one, moved and updated once; a step whose estimate is 0 still
decays weights.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from axicon.data.batch import Batch
from axicon.errors import AxiconError
from axicon.finetune.blockstore import FileStore, HostStore, Store
from axicon.finetune.directions import Direction
from axicon.finetune.estimate import mean_losses, trained
from axicon.finetune.offload import Offload, offload, ring_of
from axicon.finetune.offloaded import load_offloaded
from axicon.finetune.shifted import shifted
from axicon.finetune.updates.zo_sgd import ZoSGD
from axicon.model.decoder import Attend, Decoder
from axicon.protocols import Mean, Moment, Objective, Scalars


class Asked(NamedTuple):
    """What a pass through a decoder is given."""

    tokens_N: Tensor
    positions_N: Tensor
    attend: Attend


Point = tuple[Direction, float] | None
"""Where the parameters are looked at: a direction and how far along it; None as they are."""


@dataclass(kw_only=True)
class ZO2(ZoSGD):
    folder: Path | None = None
    """Where blocks lie, on a disk; none: in the memory of the host."""
    buffers: int = 3
    """Blocks in memory at a time."""
    write_every: int = 8
    """Steps after which a block goes back. Until then what it lacks is done to it whenever it comes."""
    overlap: bool = True
    same_as: ClassVar[type] = ZoSGD
    """The rule whose bits these are: a log of one is a log of the other."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.blocks or self.direction == "official":
            raise ValueError("blocks and direction=official look at the whole model at once: take zo_sgd")
        if self.buffers < 2 or self.write_every < 1:
            raise ValueError("buffers must be 2 or more, write_every 1 or more")
        self._ring: Offload | None = None
        self._made = False

    def prepare(self, model: nn.Module) -> None:
        super().prepare(model)
        if not isinstance(model, Decoder):
            raise AxiconError(
                f"zo2 goes through a model block by block; {type(model).__name__} has no blocks"
            )
        self._ring = ring_of(model)
        self._made = self._ring is None
        if self._ring is None:
            self._ring = offload(model, self._store(model.device), device=model.device, **self._placement())

    def load(self, path: Path, dtype: torch.dtype, device: torch.device) -> Decoder:
        """A model that is never in memory as a whole. Raises AxiconError."""
        return load_offloaded(path, self._store(device), dtype=dtype, device=device, **self._placement())

    def _store(self, device: torch.device) -> Store:
        if self.folder is None:
            return HostStore(pinned=device.type == "cuda")
        if device.type == "cuda":
            raise AxiconError("blocks for a GPU lie in the memory of the host: leave out rule.folder")
        return FileStore(self.folder)

    def _placement(self) -> dict[str, Any]:
        return {"buffers": self.buffers, "write_every": self.write_every, "overlap": self.overlap}

    def finish(self, model: nn.Module) -> None:
        """With all updates done. Weights are in memory again if that is where they came from."""
        super().finish(model)
        if self._ring is not None:
            (self._ring.restore if self._made else self._ring.flush)()
        self._ring = None

    @torch.no_grad()
    def measure(
        self, model: nn.Module, objective: Objective, batch: Batch, mean: Mean, at: Moment
    ) -> Scalars:
        assert isinstance(model, Decoder)
        assert self._ring is not None
        shards = list(batch.shards(mean.shards))
        own = [shards[i] for i in mean.own]
        points: list[Point] = [None] if self.one_sided else []
        for _, z in self.directions(at):
            points += [(z, self.eps)] if self.one_sided else [(z, self.eps), (z, -self.eps)]
        sums_SP = self._losses(model, objective, own, points)
        means = mean_losses(sums_SP, len(batch), mean)
        if self.one_sided:
            return {"loss": means[0], "g": [(plus - means[0]) / self.eps for plus in means[1:]]}
        pairs = zip(means[::2], means[1::2], strict=True)
        return {"loss": math.fsum(means) / len(means), "g": [(p - m) / (2 * self.eps) for p, m in pairs]}

    def apply(self, model: nn.Module, scalars: Scalars, at: Moment) -> None:
        """What is in memory moves now, blocks when they come by."""
        assert self._ring is not None
        names = trained(model).keys()
        resident = {n: p for n, p in self._ring.resident().items() if n in names}
        self._plain(resident).apply(model, scalars, at)
        self._ring.defer(lambda block: self._plain(block).apply(model, scalars, at))

    def _plain(self, parameters: Mapping[str, nn.Parameter]) -> ZoSGD:
        """The rule in memory, for some of the parameters."""
        settings = {field.name: getattr(self, field.name) for field in dataclasses.fields(ZoSGD)}
        rule = ZoSGD(**settings)
        rule._groups = [parameters]
        return rule

    def _losses(
        self, model: Decoder, objective: Objective, own: Sequence[Batch], points: Sequence[Point]
    ) -> Tensor:
        """float64 (own shards, points): sums over the examples, from one visit to every block."""
        assert self._ring is not None
        resident = {n: p for n, p in self._ring.resident().items() if p.requires_grad}
        asked = [_question(model, objective, shard) for shard in own]
        rotary = [model.rotary(one.positions_N) for one in asked]
        states: list[list[Tensor]] = []
        for point in points:
            with _at(model, resident, point):
                states.append([model.embed(one.tokens_N, one.positions_N) for one in asked])
        for i, block in enumerate(model.blocks):
            with self._ring.visit(i) as parameters:
                moving = {n: p for n, p in parameters.items() if p.requires_grad}
                for point, rows in zip(points, states, strict=True):
                    with _at(block, moving, point):
                        for s, one in enumerate(asked):
                            rows[s] = block(rows[s], rotary[s], one.attend)
        columns = []
        for point, rows in zip(points, states, strict=True):
            with _at(model, resident, point):
                sums = [_answer(model, objective, *one) for one in zip(own, rows, strict=True)]
                columns.append(torch.stack(sums))
        return torch.stack(columns, dim=1)


def _at(
    module: nn.Module, parameters: Mapping[str, nn.Parameter], point: Point
) -> AbstractContextManager[None]:
    return nullcontext() if point is None else shifted(module, parameters, *point)


class _Asked(Exception):
    def __init__(self, asked: Asked) -> None:
        self.asked = asked


def _question(model: Decoder, objective: Objective, batch: Batch) -> Asked:
    """What an objective would send through the blocks."""

    def ask(*given: object) -> Tensor:
        raise _Asked(Asked(*given))  # type: ignore[arg-type]

    with _forward(model, ask):
        try:
            objective.loss(model, batch)
        except _Asked as caught:
            return caught.asked
    raise AxiconError(f"{type(objective).__name__} sends nothing through the model, zo2 has nothing to do")


def _answer(model: Decoder, objective: Objective, batch: Batch, x_ND: Tensor) -> Tensor:
    """float64: the sum of the losses, given what comes out of the blocks."""
    waiting = [x_ND]

    def answer(*_: object) -> Tensor:
        if not waiting:
            name = type(objective).__name__
            raise AxiconError(f"{name} goes through the model more than once; zo2 does once, take zo_sgd")
        return waiting.pop()

    with _forward(model, answer):
        return objective.loss(model, batch).double().sum()


@contextmanager
def _forward(model: Decoder, function: Callable[..., Tensor]) -> Iterator[None]:
    # An attribute of the instance hides the method of the class.
    object.__setattr__(model, "forward", function)
    try:
        yield
    finally:
        object.__delattr__(model, "forward")
