"""Random directions that are counted instead of drawn: element i of the direction of a parameter is a
function of a key, the parameter's stream and i. So any part of one can be made anywhere, in any order, and
none is stored.

The random bits are Philox-4x32-10 (Salmon et al., SC 2011). Directions of plus and minus ones take one bit
per element, and what they do to a weight is exact but for one rounding, so every device gets the same bits.
In C++ they are added to weights as those are read; the torch functions here are the definition.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from axicon.kernels import native

BITS = 128
"""Bits of one call of Philox: elements of a direction of signs."""
_PIECE = 1 << 15
"""Elements the torch functions make at a time: too few for torch to share among threads."""
_GRAIN = 1 << 10
"""Normal variables are computed in whole grains wherever they begin, so no bit depends on how a direction is
cut: torch computes what a vector of the processor does not fill by another function."""
_LOW = 0xFFFFFFFF
_MULTIPLIERS, _STEPS = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)


def philox(key: int, stream: int, first: int, count: int, device: torch.device | None = None) -> Tensor:
    """int64 (count, 4): words of 32 bits for counters (block, stream, 0, 0), block = first, first + 1, ..."""
    if (device is None or device.type == "cpu") and native.why_unavailable() is None:
        words = torch.empty(count, 4, dtype=torch.int32)
        native.library().axicon_philox(key, stream, first, count, words.data_ptr())
        return words.long() & _LOW
    return philox_torch(key, stream, torch.arange(first, first + count, device=device))


def philox_torch(key: int, stream: int, blocks: Tensor) -> Tensor:
    """The reference of `philox`, of any int64 block numbers."""
    c0, c1 = blocks & _LOW, torch.full_like(blocks, stream)
    c2, c3 = torch.zeros_like(blocks), torch.zeros_like(blocks)
    k0, k1 = key & _LOW, key >> 32 & _LOW
    for _ in range(10):
        (a_high, a_low), (b_high, b_low) = _product(c0, _MULTIPLIERS[0]), _product(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = b_high ^ c1 ^ k0, b_low, a_high ^ c3 ^ k1, a_low
        k0, k1 = (k0 + _STEPS[0]) & _LOW, (k1 + _STEPS[1]) & _LOW
    return torch.stack([c0, c1, c2, c3], dim=-1)


def _product(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low words of products of 32-bit numbers, which an int64 alone does not hold."""
    high, low = (x >> 16) * factor, (x & 0xFFFF) * factor
    return (high + (low >> 16)) >> 16, ((high << 16) + low) & _LOW


def signs(key: int, stream: int, first: int, count: int, device: torch.device | None = None) -> Tensor:
    """float32 (count,): elements first .. of the direction of plus and minus ones."""
    start = first // BITS
    words = philox(key, stream, start, -(-(first + count) // BITS) - start, device)
    bits = (words[:, :, None] >> torch.arange(32, device=device)) & 1
    return bits.flatten()[first - start * BITS :][:count].float() * 2 - 1


def normals(key: int, stream: int, first: int, count: int, device: torch.device | None = None) -> Tensor:
    """float32 (count,): elements first .. of the standard normal direction, by Box and Muller.

    Equal bits are promised on one device only.
    """
    start, stop = first // _GRAIN * _GRAIN, -(-(first + count) // _GRAIN) * _GRAIN
    parts = [_normals(key, stream, i, min(i + _PIECE, stop), device) for i in range(start, stop, _PIECE)]
    return torch.cat([torch.empty(0, device=device), *parts])[first - start :][:count]


def _normals(key: int, stream: int, start: int, stop: int, device: torch.device | None) -> Tensor:
    words = philox(key, stream, start // 4, (stop - start) // 4, device).double()
    uniform = (words + 0.5) * 2.0**-32
    radius, angle = (-2 * uniform[:, 0::2].log()).sqrt(), (2 * math.pi) * uniform[:, 1::2]
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1).flatten().float()


def uniforms(key: int, stream: int, first: int, count: int, device: torch.device | None = None) -> Tensor:
    """int64 (count,): 32 random bits each, elements first .. of a stream."""
    start = first // 4
    words = philox(key, stream, start, -(-(first + count) // 4) - start, device)
    return words.flatten()[first - start * 4 :][:count]


Where = int | Tensor
"""Which elements of a parameter something is: those from a number on; or rows of it by their numbers, int64
(R,), so that row i of a source (R, D) is row where[i] of the parameter."""


def add_signs(
    source: Tensor, out: Tensor, scale: float, *, key: int, stream: int, keep: float = 1.0, where: Where = 0
) -> None:
    """out = source * keep + scale * z of the direction of signs, contiguous and of one dtype; `out` may be
    `source`. The product is rounded to float32, then the sum, then to the dtype.
    """
    if not source.numel():
        return
    if source.device.type != "cpu" or source.dtype not in _NARROW or native.why_unavailable() is not None:
        return add_signs_torch(source, out, scale, key=key, stream=stream, keep=keep, where=where)
    if isinstance(where, Tensor):
        width = source[0].numel()
        firsts = where.to(torch.int64) * width
    else:
        width, firsts = source.numel(), torch.tensor([where])
    assert source.is_contiguous()
    assert out.is_contiguous()
    assert out.dtype == source.dtype
    native.library().axicon_add_signs(
        source.data_ptr(), out.data_ptr(), len(firsts), width, firsts.data_ptr(), keep, scale, key, stream,
        _NARROW[source.dtype], torch.get_num_threads(),
    )  # fmt: skip


_NARROW = {torch.float32: 0, torch.bfloat16: 1}


def add_signs_torch(
    source: Tensor, out: Tensor, scale: float, *, key: int, stream: int, keep: float = 1.0, where: Where = 0
) -> None:
    """The reference of `add_signs`."""
    if isinstance(where, Tensor):
        for part, to, first in each_row(source, out, where):
            add_signs_torch(part, to, scale, key=key, stream=stream, keep=keep, where=first)
        return
    flat, to = source.view(-1), out.view(-1)
    for begin, end in pieces(len(flat)):
        z = signs(key, stream, where + begin, end - begin, source.device)
        add(flat[begin:end], to[begin:end], z, scale, keep)


def each_row(source: Tensor, out: Tensor, rows_R: Tensor) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Rows of both, with the number of the first element of each in the parameter."""
    for part, to, row in zip(source, out, rows_R.tolist(), strict=True):
        yield part, to, row * part.numel()


def add(source: Tensor, out: Tensor, z: Tensor, scale: float, keep: float = 1.0) -> None:
    """out = source * keep + scale * z of a direction that is there, rounded as in `add_signs`."""
    wide = torch.promote_types(source.dtype, torch.float32)
    kept = source.to(wide)
    if keep != 1.0:
        kept = kept * keep
    out.copy_(kept + z.to(wide) * scale)


def pieces(count: int) -> Iterator[tuple[int, int]]:
    """Ranges of elements to be made at a time."""
    return ((begin, min(begin + _PIECE, count)) for begin in range(0, count, _PIECE))
