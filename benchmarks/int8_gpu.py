"""LLM.int8() products on a CUDA device beside cuBLAS in bfloat16 and beside the memory's limit.

`python benchmarks/int8_gpu.py [key=value ...]` times single products in the shapes of a model. The limit is
the time in which the device copies as many bytes as the product cannot do without: weight, x and y once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from measure import RESULTS, complain, save, surroundings, version
from pydantic import BeforeValidator, Field
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from axicon.errors import AxiconError
from axicon.model.int8 import Int8Linear
from axicon.recipe import Recipe, Words, split_words

Counts = Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(split_words)]
CACHE_BYTES = 2**28
"""More than any device's cache: int8 weights are taken in turn from so many copies as fill it, at most 64."""


class Int8GpuBench(Recipe):
    rows: Counts = Field((1, 16, 128, 2048), min_length=1, description="rows of x, comma between")
    shapes: Words = Field(
        ("4096x4096", "14336x4096", "4096x14336"), min_length=1, description="outputs x inputs, comma between"
    )
    outlier_columns: int = Field(6, ge=0, description="columns of x in which every row has an outlier")
    repeat_ms: int = Field(200, ge=1, description="time spent on one figure")
    out: Path = Field(RESULTS, description="folder for the JSON file")

    def sizes(self) -> list[tuple[int, int]]:
        try:
            return [(int(n), int(k)) for n, k in (shape.split("x") for shape in self.shapes)]
        except ValueError:
            raise AxiconError(
                f"shapes={','.join(self.shapes)}: each is OUTPUTSxINPUTS, such as 4096x4096"
            ) from None


def measure(bench: Int8GpuBench) -> dict[str, Any]:
    """Everything that goes into the JSON file."""
    sizes = bench.sizes()
    if not torch.cuda.is_available():
        raise AxiconError("no CUDA device here; this benchmark measures nothing else")
    device = torch.cuda.get_device_properties(0)
    before = surroundings()
    bandwidth = copy_bandwidth(bench.repeat_ms)
    products = []
    for outputs, inputs in sizes:
        for rows in bench.rows:
            products.append(product(bench, rows, outputs, inputs, bandwidth))
            complain(f"{rows} rows, {outputs}x{inputs}: {products[-1]['int8_us']:.1f} us in int8")
    return {
        "benchmark": "int8_gpu",
        **before,
        "gpu": {
            "name": device.name,
            "memory_gib": round(device.total_memory / 2**30, 1),
            "processors": device.multi_processor_count,
            "cuda": torch.version.cuda,
            "triton": version("triton"),
            "copy_bytes_per_s": bandwidth,
        },
        "recipe": bench.model_dump(mode="json", exclude={"out"}),
        "products": products,
    }


def copy_bandwidth(repeat_ms: int) -> float:
    """Bytes read plus bytes written per second while the device copies 1 GiB."""
    source = torch.randint(0, 256, (2**30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (1e-6 * microseconds(lambda: target.copy_(source), repeat_ms))


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


def per_product(layers: Sequence[nn.Module], x: Tensor, repeat_ms: int) -> float:
    """Microseconds of one product. All layers in one graph, so that the host's launches do not count."""
    for layer in layers:
        layer(x)  # compiles, and makes the handles of the libraries
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in layers:
            layer(x)
    return microseconds(graph.replay, repeat_ms) / len(layers)


def microseconds(call: Callable[[], object], repeat_ms: int) -> float:
    """The median of as many runs as fit into the time."""
    from triton.testing import do_bench

    return 1e3 * do_bench(call, warmup=50, rep=repeat_ms, return_mode="median")


def table(result: dict[str, Any]) -> Table:
    gpu = result["gpu"]
    title = f"{gpu['name']}, copies {gpu['copy_bytes_per_s'] / 1e9:.0f} GB/s; microseconds"
    shown = Table(title=title, title_justify="left")
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
    result = measure(bench)
    Console(width=None if sys.stdout.isatty() else 110).print(table(result))
    print(f"written to {save('int8_gpu', result, bench.out)}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except AxiconError as error:
        sys.exit(f"int8_gpu: {error}")
