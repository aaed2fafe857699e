"""LLM.int8() products on a CUDA device beside cuBLAS in bfloat16 and beside the memory's limit.

`python benchmarks/int8_gpu.py [key=value ...]` times single products in the shapes of a model. The limit is
the time in which the device copies as many bytes as the product cannot do without: weight, x and y once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from gpu import CACHE_BYTES, Counts, ProductBench, measure, new_table, per_product, run, show
from pydantic import Field
from rich.table import Table
from torch import nn

from axicon.errors import AxiconError
from axicon.model.int8 import Int8Linear


class Int8GpuBench(ProductBench):
    rows: Counts = Field((1, 16, 128, 2048), min_length=1, description="rows of x, comma between")
    outlier_columns: int = Field(6, ge=0, description="columns of x in which every row has an outlier")


def product(bench: Int8GpuBench, rows: int, outputs: int, inputs: int, bandwidth: float) -> dict[str, Any]:
    """One shape. Inputs are random: a device may be faster on zeros."""
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(rows, inputs, generator=generator, device="cuda", dtype=torch.bfloat16)
    x[:, torch.randperm(inputs, generator=generator, device="cuda")[: bench.outlier_columns]] = 20.0
    copies = min(64, -(-CACHE_BYTES // (outputs * inputs)))
    dense = [_linear(outputs, inputs, generator) for _ in range(copies)]
    packed = {
        threshold: [Int8Linear.from_linear(linear, threshold) for linear in dense] for threshold in (6.0, 0.0)
    }
    want = packed[6.0][0].unpack().double() @ x.double().T
    error = float((packed[6.0][0](x).double().T - want).norm() / want.norm())
    if not error < 0.05:
        raise AxiconError(f"{rows} rows, {outputs}x{inputs}: wrong result, relative error {error}")
    moved = outputs * inputs + x.nbytes + 2 * rows * outputs
    with torch.inference_mode():
        return {
            "rows": rows,
            "outputs": outputs,
            "inputs": inputs,
            "relative_error": error,
            "int8_us": per_product(packed[6.0], x, bench.repeat_ms),
            "int8_no_outlier_path_us": per_product(packed[0.0], x, bench.repeat_ms),
            "bf16_us": per_product(dense, x, bench.repeat_ms),
            "limit_us": 1e6 * moved / bandwidth,
        }


def _linear(outputs: int, inputs: int, generator: torch.Generator) -> nn.Linear:
    linear = nn.Linear(inputs, outputs, bias=False, device="meta", dtype=torch.bfloat16)
    linear.to_empty(device="cuda").requires_grad_(False)
    linear.weight.normal_(0, inputs**-0.5, generator=generator)
    return linear


def table(result: dict[str, Any]) -> Table:
    shown = new_table(result)
    for column in ("rows", "outputs x inputs", "int8", "threshold=0", "bf16 cuBLAS", "limit", "int8 / bf16"):
        shown.add_column(column, justify="right")
    for one in result["products"]:
        shown.add_row(
            str(one["rows"]),
            f"{one['outputs']} x {one['inputs']}",
            *(f"{one[key]:.1f}" for key in ("int8_us", "int8_no_outlier_path_us", "bf16_us", "limit_us")),
            f"{one['int8_us'] / one['bf16_us']:.2f}",
        )
    return shown


def main(words: Sequence[str]) -> None:
    bench = Int8GpuBench.parse(words)
    show("int8_gpu", measure("int8_gpu", bench, partial(product, bench)), table, bench.out)


if __name__ == "__main__":
    run("int8_gpu", main)
