"""Networks whose parameters are one flat vector, so that a trajectory is a matrix and a step is one sum.

The matched vector holds every parameter, affine ones of norms among them, and no buffers: the networks here
have none. Initial values come from a generator of their own, so they are a function of a seed alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from axicon.errors import AxiconError


class Architecture(Protocol):
    """Settings of a network as dataclass fields; the data say the rest."""

    def module(self, shape: Sequence[int], classes: int) -> nn.Module:
        """A module from (B, *shape) to logits (B, classes). Raises AxiconError for a shape it cannot take."""
        ...


@dataclass(frozen=True, kw_only=True)
class ConvNet:
    """Blocks of 3 x 3 convolution, instance norm, ReLU and average pooling by 2, then a linear head: the
    network of the dataset distillation literature (Zhao et al., 2021), which has width 128 and depth 3.
    """

    width: int = 128
    depth: int = 3

    def module(self, shape: Sequence[int], classes: int) -> nn.Module:
        if len(shape) != 3:
            raise AxiconError(
                f"network=convnet wants images, these examples are vectors of {shape[0]}: "
                "take network=mlp or network=linear"
            )
        channels, height, width = shape
        least = 1 << self.depth
        if self.width < 1 or self.depth < 1 or min(height, width) < least:
            raise AxiconError(
                f"network.depth={self.depth}: halving {height} x {width} so often leaves nothing; "
                "take a smaller depth"
            )
        layers: list[nn.Module] = []
        for _ in range(self.depth):
            layers += [
                nn.Conv2d(channels, self.width, 3, padding=1),
                nn.InstanceNorm2d(self.width, affine=True),
                nn.ReLU(),
                nn.AvgPool2d(2),
            ]
            channels, height, width = self.width, height // 2, width // 2
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * height * width, classes))


@dataclass(frozen=True, kw_only=True)
class MLP:
    """Hidden layers with ReLU."""

    width: int = 128
    depth: int = 1

    def module(self, shape: Sequence[int], classes: int) -> nn.Module:
        if self.width < 1 or self.depth < 1:
            raise AxiconError("network=mlp wants network.width and network.depth of 1 or more")
        layers: list[nn.Module] = [nn.Flatten()]
        inputs = math.prod(shape)
        for _ in range(self.depth):
            layers += [nn.Linear(inputs, self.width), nn.ReLU()]
            inputs = self.width
        return nn.Sequential(*layers, nn.Linear(inputs, classes))


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A linear probe: softmax regression."""

    def module(self, shape: Sequence[int], classes: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), classes))


NETWORKS: dict[str, type[Architecture]] = {"convnet": ConvNet, "linear": Linear, "mlp": MLP}


class Network:
    """A module as a function of inputs and one vector (P,)."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module.requires_grad_(False)
        self.shapes = {name: p.shape for name, p in module.named_parameters()}
        self._sizes = [shape.numel() for shape in self.shapes.values()]

    @property
    def size(self) -> int:
        """P, the number of parameters."""
        return sum(self._sizes)

    def parameters(self, flat_P: Tensor) -> dict[str, Tensor]:
        """Views of the vector, by name."""
        parts = flat_P.split(self._sizes)
        return {
            name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def __call__(self, flat_P: Tensor, x: Tensor) -> Tensor:
        """Logits (B, classes)."""
        logits: Tensor = functional_call(self.module, self.parameters(flat_P), (x,))
        return logits

    def initial(self, generator: torch.Generator) -> Tensor:
        """(P,): products uniform within 1 / sqrt(inputs), as torch has it; norms at 1 and 0."""
        parts = []
        for module in self.module.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                bound = 1 / math.sqrt(module.weight[0].numel())
                for p in module.parameters():
                    parts.append((torch.rand(p.numel(), generator=generator) * 2 - 1) * bound)
            elif isinstance(module, nn.InstanceNorm2d):
                parts += [torch.ones(module.num_features), torch.zeros(module.num_features)]
        return torch.cat(parts)

    def convolutions(self) -> list[slice]:
        """Where in the vector the weights of convolutions lie, the only ones with four dimensions."""
        found, begin = [], 0
        for shape, size in zip(self.shapes.values(), self._sizes, strict=True):
            if len(shape) == 4:
                found.append(slice(begin, begin + size))
            begin += size
        return found
