"""What an adapter costs in a step: `python benchmarks/adapters.py [key=value ...]`.

Requests without and with a random adapter take turns in one engine, in the format in which a model is served
by itself. Of each kind the fastest decode step is compared, which other programs disturb least.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from measure import save, surroundings
from pydantic import Field

from axicon.compress.walk import Compress
from axicon.errors import AxiconError
from axicon.generate.build import build_engine
from axicon.generate.engine import Engine
from axicon.generate.request import Request, SamplingParams
from axicon.model import checkpoint
from axicon.model.adapterfile import Adapter, Pair
from axicon.model.decoder import Block, Decoder
from axicon.model.lowrank import parts_of, products
from axicon.recipe import ServeRecipe
from axicon.settings import Recipe, Words


class AdaptersBench(Recipe):
    model: str = Field("demo", description="demo, a directory, or a hub id")
    rank: int = Field(8, ge=1, description="of the adapter")
    targets: Words = Field(("q", "v"), description="products it adds to")
    streams: Words = Field(("1", "4"), description="requests at once")
    rounds: int = Field(60, ge=1, description="turns of each kind")
    steps: int = Field(10, ge=2, description="decode steps of a turn")
    threads: int = Field(1, ge=1, description="compute threads")


def random_adapter(bench: AdaptersBench) -> Adapter:
    with torch.device("meta"):
        model = Decoder(checkpoint.shape_of(bench.model))
    generator = torch.Generator().manual_seed(0)
    pairs: dict[tuple[int, str], tuple[Pair, ...]] = {}
    for i, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        for name, product in products(block):
            rows = [rows for part, rows in parts_of(block, name).items() if part in bench.targets]
            sizes = [(one, len(range(product.out_features)[one])) for one in rows]
            pairs[i, name] = tuple(
                Pair(
                    one,
                    torch.randn(bench.rank, product.in_features, generator=generator) * 0.01,
                    torch.randn(size, bench.rank, generator=generator) * 0.01,
                )
                for one, size in sizes
            )
    return Adapter({place: some for place, some in pairs.items() if some}, "random", None)


def turn(engine: Engine, bench: AdaptersBench, streams: int, adapter: int, name: str) -> list[float]:
    """Seconds of each decode step."""
    params = SamplingParams(max_tokens=bench.steps + 1, temperature=0, ignore_eos=True)
    for i in range(streams):
        engine.add(Request(id=f"{name}-{i}", prompt=range(100, 132), params=params, adapter=adapter))
    seconds = []
    while engine.has_work:
        start = time.perf_counter()
        engine.step()
        if engine.decode_only:
            seconds.append(time.perf_counter() - start)
    return seconds


def run(bench: AdaptersBench) -> dict[str, Any]:
    compressor = ServeRecipe(model=bench.model).build_compressor()
    engine = build_engine(
        bench.model, threads=bench.threads, kv_gib=0.5,
        transform=None if compressor is None else Compress(compressor),
    )  # fmt: skip
    engine.hold(1, random_adapter(bench))
    found = []
    for streams in map(int, bench.streams):
        seconds: dict[int, list[float]] = {0: [], 1: []}
        for i in range(bench.rounds):
            for adapter, kept in seconds.items():
                kept += turn(engine, bench, streams, adapter, f"{i}-{adapter}")
        plain, adapted = map(min, seconds.values())
        found.append({"streams": streams, "plain_ms": plain * 1e3, "adapted_ms": adapted * 1e3})
        print(
            f"{streams} streams: {plain * 1e3:.2f} ms a step, with adapters {adapted * 1e3:.2f} ms, "
            f"{adapted / plain - 1:+.1%}",
            flush=True,
        )
    return surroundings() | {"recipe": bench.model_dump(mode="json"), "steps": found}


if __name__ == "__main__":
    try:
        print(f"written to {save('adapters', run(AdaptersBench.parse(sys.argv[1:])))}")
    except AxiconError as error:
        sys.exit(f"adapters: {error}")
