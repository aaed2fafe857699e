"""The direction of a step: one number per trained element, keyed by (seed, name of the parameter, element).

`KeyedDirection` makes any part of a direction where it is needed and stores none of it. `OfficialDirection`
is the stream that MeZO and the zeroth-order benchmark draw from torch's generator, in the order of the
parameters: it can only be drawn as a whole, so it is kept for the step.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from axicon.kernels import directions as kernel
from axicon.kernels.directions import Where

Kind = Literal["rademacher", "gaussian", "official"]


class Direction(Protocol):
    def add(
        self, name: str, source: Tensor, out: Tensor, scale: float, keep: float = 1.0, where: Where = 0
    ) -> None:
        """out = source * keep + scale * z, of those elements of parameter `name`. `out` may be `source`; both
        are contiguous.
        """
        ...

    def values(self, name: str, like: Tensor) -> Tensor:
        """float32, z of a whole parameter in its shape."""
        ...


@functools.cache
def stream_of(name: str) -> int:
    """32 bits that stand for a parameter wherever it is, whatever other parameters there are."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little")


@dataclass(frozen=True, slots=True)
class Mask:
    """Which elements a sparse direction moves: each with probability `share`."""

    key: int
    share: float

    def kept(self, name: str, first: int, count: int, device: torch.device) -> Tensor:
        """bool (count,)."""
        words = kernel.uniforms(self.key, stream_of(name), first, count, device)
        return words < int(self.share * 2**32)


@dataclass(frozen=True, slots=True)
class KeyedDirection:
    key: int
    kind: Kind = "rademacher"
    mask: Mask | None = None

    def add(
        self, name: str, source: Tensor, out: Tensor, scale: float, keep: float = 1.0, where: Where = 0
    ) -> None:
        if self.kind == "rademacher" and self.mask is None:
            stream = stream_of(name)
            kernel.add_signs(source, out, scale, key=self.key, stream=stream, keep=keep, where=where)
            return
        if isinstance(where, Tensor):
            for part, to, first in kernel.each_row(source, out, where):
                self.add(name, part, to, scale, keep, first)
            return
        flat, to = source.view(-1), out.view(-1)
        for begin, end in kernel.pieces(len(flat)):
            z = self._part(name, where + begin, end - begin, source.device)
            kernel.add(flat[begin:end], to[begin:end], z, scale, keep)

    def values(self, name: str, like: Tensor) -> Tensor:
        return self._part(name, 0, like.numel(), like.device).view(like.shape)

    def _part(self, name: str, first: int, count: int, device: torch.device) -> Tensor:
        make = kernel.signs if self.kind == "rademacher" else kernel.normals
        z = make(self.key, stream_of(name), first, count, device)
        return z if self.mask is None else z * self.mask.kept(name, first, count, device)


class OfficialDirection:
    """One normal draw per parameter, in the order and dtype of `parameters`, after seeding torch."""

    def __init__(self, seed: int, parameters: Mapping[str, nn.Parameter], mask: Mask | None = None) -> None:
        generator: dict[torch.device, torch.Generator] = {}
        self._z: dict[str, Tensor] = {}
        for name, p in parameters.items():
            drawn = generator.setdefault(p.device, torch.Generator(p.device).manual_seed(seed))
            z = torch.normal(0.0, 1.0, p.shape, generator=drawn, device=p.device, dtype=p.dtype).float()
            self._z[name] = z if mask is None else z * mask.kept(name, 0, z.numel(), z.device).view(z.shape)

    def add(
        self, name: str, source: Tensor, out: Tensor, scale: float, keep: float = 1.0, where: Where = 0
    ) -> None:
        z = self._z[name]
        if isinstance(where, Tensor):
            part = z[where]
        else:
            part = z.view(-1)[where : where + source.numel()].view(source.shape)
        kernel.add(source, out, part, scale, keep)

    def values(self, name: str, like: Tensor) -> Tensor:
        return self._z[name]


def direction(
    kind: Kind, key: int, parameters: Mapping[str, nn.Parameter], mask: Mask | None = None
) -> Direction:
    """`official` takes the low 32 bits of the key for its seed."""
    if kind == "official":
        return OfficialDirection(key & 0xFFFFFFFF, parameters, mask)
    return KeyedDirection(key, kind, mask)
