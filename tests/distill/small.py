"""Small networks and examples for tests of distillation."""

from __future__ import annotations

import torch
from torch import Tensor

from axicon.distill.examples import Examples, standardised
from axicon.distill.networks import MLP, ConvNet, Linear, Network


def clusters(count: int = 60, classes: int = 3, size: int = 4, seed: int = 0) -> Examples:
    """Grey images (count, 1, size, size), each class around a point of its own."""
    made = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % classes
    centres = torch.randn(classes, 1, size, size, generator=made)
    raw = centres[y] + 0.3 * torch.randn(count, 1, size, size, generator=made)
    return standardised(raw, y, [f"c{i}" for i in range(classes)])


def network(kind: str, data: Examples, width: int = 5) -> Network:
    architectures = {
        "convnet": ConvNet(width=width, depth=2), "mlp": MLP(width=width), "linear": Linear()
    }  # fmt: skip
    return Network(architectures[kind].module(data.shape, len(data.classes)))


def initial(net: Network, seed: int = 0) -> Tensor:
    return net.initial(torch.Generator().manual_seed(seed))
