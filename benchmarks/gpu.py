"""What benchmarks of single products on a CUDA device share: shapes, timing, the limit, the frame."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from measure import RESULTS, complain, save, surroundings, version
from pydantic import BeforeValidator, Field
from rich.console import Console
from rich.table import Table
from torch import Tensor

from axicon.errors import AxiconError
from axicon.settings import Recipe, Words, split_words

P = TypeVar("P")
Counts = Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(split_words)]
CACHE_BYTES = 2**28
"""More than any device's cache: int8 weights are taken in turn from so many copies as fill it, at most 64."""


class GpuBench(Recipe):
    repeat_ms: int = Field(200, ge=1, description="time spent on one figure")
    out: Path = Field(RESULTS, description="folder for the JSON file")


class ProductBench(GpuBench):
    rows: Counts = Field((1, 16, 128), min_length=1, description="rows of x, comma between")
    shapes: Words = Field(
        ("4096x4096", "14336x4096", "4096x14336"), min_length=1, description="outputs x inputs, comma between"
    )

    def sizes(self) -> list[tuple[int, int]]:
        try:
            return [(int(n), int(k)) for n, k in (shape.split("x") for shape in self.shapes)]
        except ValueError:
            raise AxiconError(
                f"shapes={','.join(self.shapes)}: each is OUTPUTSxINPUTS, such as 4096x4096"
            ) from None


def measure(
    name: str, bench: ProductBench, product: Callable[[int, int, int, float], dict[str, Any]]
) -> dict[str, Any]:
    """`surround` for products: `product` measures one shape, given rows, outputs, inputs, and the bytes per
    second that the device copies.
    """
    sizes = bench.sizes()
    points = {
        f"{rows} rows, {outputs}x{inputs}": (rows, outputs, inputs)
        for outputs, inputs in sizes
        for rows in bench.rows
    }
    return surround(name, bench, points, lambda point, bandwidth: product(*point, bandwidth))


def surround(
    name: str, bench: GpuBench, points: Mapping[str, P], one: Callable[[P, float], dict[str, Any]]
) -> dict[str, Any]:
    """Everything that goes into the JSON file. `one` measures a point, given the bytes per second that the
    device copies.
    """
    if not torch.cuda.is_available():
        raise AxiconError("no CUDA device here; this benchmark measures nothing else")
    device = torch.cuda.get_device_properties(0)
    before = surroundings()
    bandwidth = copy_bandwidth(bench.repeat_ms)
    products = []
    for label, point in points.items():
        products.append(one(point, bandwidth))
        complain(f"{label} done")
    return {
        "benchmark": name,
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


def per_product(layers: Sequence[Callable[[Tensor], Tensor]], x: Tensor, repeat_ms: int) -> float:
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


def new_table(result: dict[str, Any]) -> Table:
    gpu = result["gpu"]
    title = f"{gpu['name']}, copies {gpu['copy_bytes_per_s'] / 1e9:.0f} GB/s; microseconds"
    return Table(title=title, title_justify="left")


def show(name: str, result: dict[str, Any], table: Callable[[dict[str, Any]], Table], out: Path) -> None:
    Console(width=None if sys.stdout.isatty() else 110).print(table(result))
    print(f"written to {save(name, result, out)}")


def run(name: str, main: Callable[[Sequence[str]], None]) -> None:
    try:
        main(sys.argv[1:])
    except AxiconError as error:
        sys.exit(f"{name}: {error}")
