"""Sparse weights on a CPU by the share that is gone: `python benchmarks/sparse.py [key=value ...]`.

The model is pruned by magnitude in each output and stored as `tiled_sparse`. Bytes of all products as the
C++ step has them, and tokens per second of the engine that serves them, beside the dense model in bfloat16;
engines take turns, figures are medians over the rounds. Text is that of the dense pruned model, bit for bit,
so what a share costs in quality is the matter of whatever chose the weights.

    python benchmarks/sparse.py sparsities=0.3,0.5,0.7,0.9 rounds=5
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from measure import RESULTS, complain, save, surroundings
from pydantic import BeforeValidator, Field
from rich.console import Console
from rich.table import Table

from axicon.compress.chain import Chain
from axicon.compress.magnitude import Magnitude
from axicon.compress.tiled_sparse import TiledSparse
from axicon.compress.walk import compress
from axicon.errors import AxiconError
from axicon.evaluate import speed
from axicon.generate.engine import Engine
from axicon.generate.request import Limits
from axicon.generate.runner import LocalRunner
from axicon.model import checkpoint
from axicon.settings import Recipe, split_words

KV_BYTES, ROWS = 64 << 20, 8


class Sparse(Recipe):
    model: str = Field("demo", description="demo, a model directory, a .gguf file, or a hub id")
    sparsities: Annotated[tuple[float, ...], BeforeValidator(split_words)] = Field(
        (0.3, 0.5, 0.7, 0.8, 0.9), min_length=1, description="shares of each output that go, comma between"
    )
    rounds: int = Field(5, ge=1, description="turns of each engine")
    threads: int = Field(2, ge=1, description="compute threads")
    out: Path = Field(RESULTS, description="folder for the JSON file")


def engine_of(bench: Sparse, tokenizer: Any, sparsity: float | None) -> Engine:
    """Raises AxiconError where the kernels do not run here: torch is another story."""
    model = checkpoint.load(bench.model).bfloat16().requires_grad_(False).eval()
    if sparsity is not None:
        steps = Magnitude(sparsity=sparsity, scope="row"), TiledSparse(min_saving=-1.0)
        model = compress(Chain(("magnitude", "tiled_sparse"), steps), model)
    runner = LocalRunner(model, kv_bytes=KV_BYTES, max_rows=ROWS, kernels="native")
    return Engine(runner, tokenizer, eos_ids=model.shape.eos_ids, limits=Limits(max_queue=ROWS))


def measure(bench: Sparse) -> list[dict[str, Any]]:
    """Of the dense model, then of each sparsity."""
    tokenizer = checkpoint.load_tokenizer(bench.model)
    shares = (None, *bench.sparsities)
    engines = [engine_of(bench, tokenizer, share) for share in shares]
    seen: list[list[dict[int, float]]] = [[] for _ in engines]
    for turn in range(bench.rounds):
        for i in [*range(turn % len(engines), len(engines)), *range(turn % len(engines))]:
            seen[i].append({rate.streams: rate.tokens_per_s for rate in speed.rates(engines[i], rounds=1)})
        complain(f"round {turn + 1} of {bench.rounds} done")
    return [
        {
            "sparsity": share,
            "product_bytes": engine.runner.native.weight_bytes,
            "tokens_per_s": {str(n): statistics.median(one[n] for one in rounds) for n in rounds[0]},
            "tokens_per_s_all": [{str(n): rate for n, rate in one.items()} for one in rounds],
        }
        for share, engine, rounds in zip(shares, engines, seen, strict=True)
    ]


def table(runs: Sequence[dict[str, Any]]) -> Table:
    dense = runs[0]
    shown = Table(title="tokens/s, and beside dense", title_justify="left")
    for column in ("weights gone", "products, MB", *(f"{n} streams" for n in dense["tokens_per_s"])):
        shown.add_column(column, justify="right")
    for one in runs:
        name = "dense" if one["sparsity"] is None else f"{one['sparsity']:.0%}"
        rates = [
            f"{rate:.0f} ({rate / dense['tokens_per_s'][n]:.2f})" for n, rate in one["tokens_per_s"].items()
        ]
        shown.add_row(name, f"{one['product_bytes'] / 1e6:.0f}", *rates)
    return shown


def main(words: list[str]) -> None:
    bench = Sparse.parse(words)
    torch.set_num_threads(bench.threads)
    result = {"benchmark": "sparse", **surroundings()}
    recipe = bench.model_dump(mode="json", exclude={"out"}) | {"model": Path(bench.model).name}
    runs = measure(bench)
    Console(width=None if sys.stdout.isatty() else 110).print(table(runs))
    print(f"written to {save('sparse', result | {'recipe': recipe, 'runs': runs}, bench.out)}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except AxiconError as error:
        sys.exit(f"sparse: {error}")
