"""Products with few bits a weight on a CUDA device, beside cuBLAS in bfloat16 and beside the memory's limit.

`python benchmarks/few_bits_gpu.py [key=value ...]` times single products in the shapes of a model: group
codes of 4 bits, binary codes of 3 by lookup and by weights, and binary codes whose weights torch makes before
it multiplies, which is what the released kernels do for more than one row. The limit is the time in which the
device copies as many bytes as a product cannot do without: packed weight, x and y once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from gpu import CACHE_BYTES, Counts, ProductBench, measure, new_table, per_product, run, show
from pydantic import Field
from rich.table import Table
from torch import Tensor

from axicon.errors import AxiconError
from axicon.model.binary_code import BinaryCodeLinear
from axicon.model.group_int import GroupIntLinear
from axicon.model.packed import PackedLinear

Product = Callable[[Tensor], Tensor]
WAYS = ("int4", "binary3_lookup", "binary3_weights", "binary3_torch", "bf16")


class FewBitsGpuBench(ProductBench):
    rows: Counts = Field((1, 4, 16, 128), min_length=1, description="rows of x, comma between")
    group: int = Field(64, ge=8, description="columns of a group")


def product(
    bench: FewBitsGpuBench, rows: int, outputs: int, inputs: int, bandwidth: float
) -> dict[str, Any]:
    """One shape. Weights and inputs are random: a device may be faster on zeros."""
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(rows, inputs, generator=generator, device="cuda", dtype=torch.bfloat16)
    # int4 weights are taken in turn from so many copies as fill any cache.
    copies = min(64, -(-2 * CACHE_BYTES // (outputs * inputs)))
    int4 = [_int4(outputs, inputs, bench.group, generator) for _ in range(copies)]
    binary = [_binary(outputs, inputs, bench.group, generator) for _ in range(copies)]
    dense = [p.unpack().bfloat16() for p in int4]
    ways: dict[str, list[Product]] = {
        "int4": list(int4),
        "binary3_lookup": [_by_lookup(p) for p in binary] if rows <= 4 and bench.group % 8 == 0 else [],
        "binary3_weights": [_by_weights(p) for p in binary],
        "binary3_torch": [_by_torch(p) for p in binary],
        "bf16": [_dense(w) for w in dense],
    }
    sources: dict[str, PackedLinear] = {name: int4[0] if name == "int4" else binary[0] for name in WAYS[:-1]}
    errors = {name: _error(way[0], sources[name], x) for name, way in ways.items() if way and name in sources}
    for name, error in errors.items():
        if not error < 0.02:
            raise AxiconError(f"{rows} rows, {outputs}x{inputs}: {name} is wrong, relative error {error}")
    with torch.inference_mode():
        times = {name: per_product(way, x, bench.repeat_ms) if way else None for name, way in ways.items()}
    moved = {name: sum(b.nbytes for b in one.buffers()) + x.nbytes + 2 * rows * outputs
             for name, one in sources.items()}  # fmt: skip
    return {
        "rows": rows, "outputs": outputs, "inputs": inputs, "relative_error": errors, "us": times,
        "limit_us": {name: 1e6 * size / bandwidth for name, size in moved.items()},
    }  # fmt: skip


def _int4(outputs: int, inputs: int, group: int, generator: torch.Generator) -> GroupIntLinear:
    made = {"generator": generator, "device": "cuda"}
    codes = torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8, **made)  # type: ignore[call-overload]
    scale = torch.rand(outputs, inputs // group, **made).half() * inputs**-0.5  # type: ignore[call-overload]
    zero = torch.randint(0, 16, scale.shape, **made)  # type: ignore[call-overload]
    return GroupIntLinear.from_codes(codes, scale, zero, bits=4, group=group)


def _binary(outputs: int, inputs: int, group: int, generator: torch.Generator) -> BinaryCodeLinear:
    made = {"generator": generator, "device": "cuda"}
    codes = torch.randint(0, 8, (outputs, inputs), dtype=torch.uint8, **made)  # type: ignore[call-overload]
    alpha = torch.rand(outputs, inputs // group, 3, **made).half() * inputs**-0.5  # type: ignore[call-overload]
    return BinaryCodeLinear.from_codes(codes, alpha, alpha[..., 0] / 8, group=group)


def _by_lookup(p: BinaryCodeLinear) -> Product:
    from axicon.kernels.binary_code_triton import by_lookup

    return lambda x: by_lookup(x, p.planes.view(torch.int32), p.alpha, p.offset, None, p.group)


def _by_weights(p: BinaryCodeLinear) -> Product:
    from axicon.kernels.binary_code_triton import by_weights

    return lambda x: by_weights(x, p.planes.view(torch.int32), p.alpha, p.offset, None, p.group)


def _by_torch(p: BinaryCodeLinear) -> Product:
    return lambda x: x @ p.unpack().to(x.dtype).T


def _dense(weight: Tensor) -> Product:
    return lambda x: x @ weight.T


def _error(way: Product, source: PackedLinear, x: Tensor) -> float:
    with torch.inference_mode():
        want = x.double() @ source.unpack().double().T
        return float((way(x).double() - want).norm() / want.norm())


def table(result: dict[str, Any]) -> Table:
    shown = new_table(result)
    for column in ("rows", "outputs x inputs", "int4", "its limit", "3 bits: lookup", "weights", "torch",
                   "their limit", "bf16 cuBLAS"):  # fmt: skip
        shown.add_column(column, justify="right")
    for one in result["products"]:
        times, limits = one["us"], one["limit_us"]
        figures = (times["int4"], limits["int4"], times["binary3_lookup"], times["binary3_weights"],
                   times["binary3_torch"], limits["binary3_weights"], times["bf16"])  # fmt: skip
        shown.add_row(
            str(one["rows"]), f"{one['outputs']} x {one['inputs']}",
            *("-" if figure is None else f"{figure:.1f}" for figure in figures),
        )  # fmt: skip
    return shown


def main(words: Sequence[str]) -> None:
    bench = FewBitsGpuBench.parse(words)
    show("few_bits_gpu", measure("few_bits_gpu", bench, partial(product, bench)), table, bench.out)


if __name__ == "__main__":
    run("few_bits_gpu", main)
