"""Computes with parameters that are moved along a direction, without moving them.

Moved weights exist in pieces, for the products they are in: `theta + s z` is written to a buffer, multiplied
by, and forgotten. So the parameters keep every bit, no direction is stored, and a forward pass takes the
memory of one without: adding and subtracting in place would drift, by 1e-3 of a bfloat16 weight in 200 steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from axicon.finetune.directions import Direction

PIECE = 1 << 22
"""Elements of a weight that are moved at a time, where it has more."""


@dataclass(frozen=True, slots=True)
class Shift:
    direction: Direction
    scale: float

    def moved(self, name: str, value: Tensor) -> Tensor:
        out = torch.empty_like(value, memory_format=torch.contiguous_format)
        self.direction.add(name, value.detach(), out, self.scale)
        return out


@contextmanager
def shifted(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], direction: Direction, scale: float
) -> Iterator[None]:
    """Within the block, `model` computes with `parameters` + scale * direction. No gradients.

    Weights of products and embeddings are moved as they are used, all else is copied: biases, norms,
    adapters.
    A parameter that several modules share has one name, and moves the same way in all.
    """
    names = {id(p): name for name, p in parameters.items()}
    shift = Shift(direction, scale)
    with ExitStack() as undo, torch.no_grad():
        copies: dict[int, nn.Parameter] = {}
        for module in model.modules():
            for kind, p in list(module._parameters.items()):
                if p is None or id(p) not in names:
                    continue
                name = names[id(p)]
                forward = _computed(module, kind, name, shift)
                if forward is not None:
                    # An attribute of the instance hides the method of the class.
                    object.__setattr__(module, "forward", forward)
                    undo.callback(object.__delattr__, module, "forward")
                    continue
                if id(p) not in copies:
                    copies[id(p)] = nn.Parameter(shift.moved(name, p), requires_grad=False)
                module._parameters[kind] = copies[id(p)]
                undo.callback(module._parameters.__setitem__, kind, p)
        yield


def _computed(module: nn.Module, kind: str, name: str, shift: Shift) -> Callable[[Tensor], Tensor] | None:
    """A forward that moves the weight on its way; None for a module of another kind."""
    if kind == "weight" and type(module) is nn.Linear:
        return _linear(module, name, shift)
    if kind == "weight" and type(module) is nn.Embedding:
        return _embedding(module, name, shift)
    return None


def _linear(module: nn.Linear, name: str, shift: Shift) -> Callable[[Tensor], Tensor]:
    weight = module.weight.detach()
    rows, columns = weight.shape
    step = rows if weight.numel() <= PIECE else max(1, PIECE // columns)

    def forward(x: Tensor) -> Tensor:
        piece = weight.new_empty(min(step, rows), columns)
        # Read now: it may have been moved since this function was made.
        bias = module.bias
        if step >= rows:
            shift.direction.add(name, weight, piece, shift.scale)
            return F.linear(x, piece, bias)
        y = x.new_empty(*x.shape[:-1], rows)
        for begin in range(0, rows, step):
            part = weight[begin : begin + step]
            moved = piece[: len(part)]
            shift.direction.add(name, part, moved, shift.scale, where=begin * columns)
            added = None if bias is None else bias[begin : begin + step]
            y[..., begin : begin + step] = F.linear(x, moved, added)
        return y

    return forward


def _embedding(module: nn.Embedding, name: str, shift: Shift) -> Callable[[Tensor], Tensor]:
    weight = module.weight.detach()

    def forward(tokens: Tensor) -> Tensor:
        used, places = tokens.unique(return_inverse=True)
        rows = weight[used]
        shift.direction.add(name, rows, rows, shift.scale, where=used)
        return rows[places]

    return forward
