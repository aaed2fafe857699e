"""int8 x int8 products with exact integer results, in torch: what runs where the C++ kernels do not.

`ProductPath`s differ in speed only. oneDNN's prepacked product (activations as unsigned bytes around 128;
the signed form falls into a reference loop on processors without AMX) is taken where it exists, is exact on
a probe and is faster than the plain one.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable

import torch
from torch import Tensor

log = logging.getLogger("axicon")

Product = Callable[[Tensor], Tensor]
"""(M, K) int8 activations to (M, N) float32, each entry the integer dot product (rounded once above 2^24)."""

EXACT_SPAN = (1 << 24) // (127 * 127)
"""Most terms of 127 x 127 whose sum is exact in float32, in whatever order they are added."""


def exact_product(weight_NK: Tensor) -> Product:
    """Through float32 matmuls short enough to be exact. Converts the weight at every call: the reference."""

    def product(q_MK: Tensor) -> Tensor:
        total = torch.zeros(q_MK.shape[0], weight_NK.shape[0], dtype=torch.float64)
        for q, w in zip(q_MK.split(EXACT_SPAN, 1), weight_NK.split(EXACT_SPAN, 1), strict=True):
            total += q.float() @ w.float().T
        return total.float()

    return product


def onednn_product(weight_NK: Tensor) -> Product:
    """oneDNN with the weight packed once."""
    ops = torch.ops.onednn
    packed = ops.qlinear_prepack(weight_NK.contiguous(), None)
    ones = torch.ones(weight_NK.shape[0])
    zeros = torch.zeros(weight_NK.shape[0], dtype=torch.int32)

    def product(q_MK: Tensor) -> Tensor:
        unsigned = q_MK.view(torch.uint8) ^ 128  # two's complement to offset 128
        return ops.qlinear_pointwise(
            unsigned, 1.0, 128, packed, ones, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )

    return product


PRODUCTS: dict[str, Callable[[Tensor], Product]] = {"onednn": onednn_product, "exact": exact_product}


def probe() -> tuple[Tensor, Tensor]:
    """A weight (512, 512) and activations (8, 512) that tell a product with wrong sums."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (512, 512), dtype=torch.int8, generator=generator)
    x = torch.randint(-127, 128, (8, 512), dtype=torch.int8, generator=generator)
    # Without VNNI, oneDNN adds products in pairs of 16 bits, which the largest bytes do not fit.
    x[0] = weight[0] = 127
    return weight, x


@functools.cache
def choose() -> str:
    """The path of this machine, by correctness first and then a short measurement. Logged once."""
    weight, x = probe()
    plain = exact_product(weight)
    try:
        fast = onednn_product(weight)
        same = torch.equal(fast(x), plain(x))
    except (RuntimeError, AttributeError) as reason:
        why = str(reason).splitlines()[0]
        log.info("int8 products: exact float32 path; oneDNN's is not available (%s)", why)
        return "exact"
    if not same:
        log.warning("int8 products: exact float32 path; oneDNN's gave wrong sums on a probe")
        return "exact"
    times = {"onednn": _seconds(lambda: fast(x)), "exact": _seconds(lambda: plain(x))}
    best = min(times, key=lambda name: times[name])
    log.info("int8 products: %s (%s)", best, ", ".join(f"{n} {t * 1e6:.0f} us" for n, t in times.items()))
    return best


def _seconds(call: Callable[[], object], runs: int = 5) -> float:
    call()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return sorted(times)[runs // 2]
