"""What 24 compressions of one model cost: `python benchmarks/sweep.py text=FILE [key=value ...]`.

The same variants four times, each time into an empty folder: one after the other and two at a time, without
sharing what is known of the sample and with it (`calibration.shared`). Every process has one thread and has
imported all it needs before the clock starts; a variant is a call of `axicon compress` from reading the model
to the finished directory, without measuring its quality. The results are compared byte for byte. Processor
seconds say what sharing saves on a machine that others use too; what two at a time save is time by the clock,
for which it has to be quiet.

The model is cut to its first blocks, since all of it takes an hour. What a variant costs beside its blocks
weighs more then than it would, so sharing saves more in the whole model than here.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from measure import RESULTS, complain, save, surroundings
from pydantic import Field
from rich.console import Console
from rich.table import Table

from axicon.errors import AxiconError
from axicon.model import checkpoint, safety
from axicon.model.artefact import write_bytes, write_json
from axicon.model.tensorwriter import write_weights
from axicon.model.weights import stored_tensors
from axicon.recipe import CompressRecipe
from axicon.settings import Recipe, Words

VARIANTS: tuple[dict[str, Any], ...] = (
    *({"method": "gptq", "bits": bits, "group": group} for bits in (3, 4, 8) for group in (64, 192, -1)),
    {"method": "gptq", "bits": 4, "group": 64, "act_order": True, "static_groups": True},
    *({"method": "sparse_gpt", "sparsity": sparsity} for sparsity in (0.3, 0.5, 0.6)),
    {"method": "sparse_gpt", "sparsity": 0.5, "pattern": "2:4"},
    *({"method": "wanda", "sparsity": sparsity} for sparsity in (0.3, 0.5, 0.6)),
    {"method": "wanda", "sparsity": 0.5, "pattern": "2:4"},
    *({"method": "awq", "bits": bits, "group": 64} for bits in (3, 4)),
    *({"method": "smooth_quant", "alpha": alpha, "relative": 5.0} for alpha in (0.5, 0.8)),
    *({"method": "group_int4", "bits": bits, "group": 64} for bits in (4, 8)),
)
COMPANIONS = ("tokenizer*", "special_tokens_map.json", "vocab.json", "merges.txt", "generation_config.json")


class SweepBench(Recipe):
    model: str = Field("demo", min_length=1, description="dense model to compress")
    blocks: int | None = Field(3, ge=1, description="cut it to its first blocks; none: the whole model")
    text: str = Field(min_length=1, description="text of the sample")
    windows: int = Field(32, ge=1, description="windows of the sample")
    window: int = Field(512, ge=2, description="tokens per window")
    skip: int = Field(0, ge=0, description="so many variants are left out first: a long run in pieces")
    only: int | None = Field(None, ge=1, description="so many variants; none: all that are left")
    ways: Words = Field(("alone", "alone_two", "shared", "shared_two"), description="what to run")
    out: Path = Field(RESULTS, description="folder for the JSON file")


def first_blocks(source: Path, count: int, folder: Path) -> Path:
    """The model without its later blocks, as a directory."""
    model = checkpoint.load(source)
    gone = tuple(f"model.layers.{i}." for i in range(count, model.shape.layers))
    folder.mkdir(parents=True)
    write_weights(folder, ((name, t) for name, t in stored_tensors(model) if not name.startswith(gone)))
    write_json(
        folder / "config.json", safety.read_json(source / "config.json") | {"num_hidden_layers": count}
    )
    for pattern in COMPANIONS:
        for path in source.glob(pattern):
            write_bytes(folder / path.name, path.read_bytes())
    return folder


def ready() -> int:
    """Everything a variant needs is imported and one thread is set."""
    import jobs.compress  # noqa: F401

    with torch.device("meta"):
        torch.nn.Embedding(2, 2)  # imports what torch imports late
    torch.set_num_threads(1)
    time.sleep(0.5)  # so that no process takes the other one's turn
    return os.getpid()


def make(settings: Mapping[str, Any]) -> dict[str, Any]:
    """One variant: seconds of this process and of the clock, and the digest of the result."""
    from jobs import compress
    from jobs.progress import Reporter

    recipe = CompressRecipe.model_validate(settings)
    assert recipe.out is not None
    clock, cpu = time.perf_counter(), time.process_time()
    compress.run(recipe, Reporter(io.StringIO()))
    found = {"wall": time.perf_counter() - clock, "cpu": time.process_time() - cpu}
    digest = checkpoint.digest(recipe.out)
    shutil.rmtree(recipe.out)
    return found | {"sha256": digest}


def way(bench: SweepBench, source: Path, folder: Path, name: str, variants: Sequence[Any]) -> dict[str, Any]:
    """All variants in one of the four ways."""
    workers = 2 if name.endswith("_two") else 1
    sample = {
        "text": bench.text, "windows": bench.windows, "window": bench.window, "inputs": "dense",
        "shared": folder / "shared" if name.startswith("shared") else None,
    }  # fmt: skip
    tasks = [
        {"model": str(source), "threads": 1, "measure": False, "compressor": one, "calibration": sample,
         "out": folder / f"variant-{i}"}
        for i, one in enumerate(variants)
    ]  # fmt: skip
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for one in [pool.submit(ready) for _ in range(workers)]:
            one.result()
        load, clock = os.getloadavg()[0], time.perf_counter()
        made = list(pool.map(make, tasks))
        wall = time.perf_counter() - clock
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    shutil.rmtree(folder, ignore_errors=True)
    cpu = sum(one["cpu"] for one in made)
    complain(f"{name}: {wall:.0f} s, {cpu:.0f} s of processor time, load {load:.1f}")
    return {"wall_s": wall, "cpu_s": cpu, "load_average": load, "shared_bytes": size, "variants": made}


def run(bench: SweepBench) -> dict[str, Any]:
    variants = VARIANTS[bench.skip :][: bench.only]
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        source = checkpoint.resolve(bench.model)
        if bench.blocks is not None:
            source = first_blocks(source, bench.blocks, place / f"{source.name}-{bench.blocks}-blocks")
        ways = {name: way(bench, source, place / name, name, variants) for name in bench.ways}
    digests = {tuple(one["sha256"] for one in found["variants"]) for found in ways.values()}
    if len(digests) > 1:
        raise AxiconError("the results differ between the ways; sharing must not change a byte")
    recipe = bench.model_dump(mode="json", exclude={"out"}) | {"text": Path(bench.text).name}
    return {**surroundings(), "recipe": recipe, "settings": list(variants), "ways": ways}


def table(result: dict[str, Any]) -> Table:
    ways = result["ways"]
    shown = Table(title=f"{len(result['settings'])} variants; {result['cpu']}", title_justify="left")
    shown.add_column("processor seconds")
    for name in ways:
        shown.add_column(name, justify="right")
    for i, settings in enumerate(result["settings"]):
        words = " ".join(str(value) for value in settings.values())
        shown.add_row(words, *(f"{found['variants'][i]['cpu']:.1f}" for found in ways.values()))
    shown.add_section()
    shown.add_row("all", *(f"{found['cpu_s']:.0f}" for found in ways.values()))
    shown.add_row("all, by the clock", *(f"{found['wall_s']:.0f}" for found in ways.values()))
    return shown


def notes(ways: Mapping[str, Any]) -> list[str]:
    said = []
    with contextlib.suppress(KeyError):
        ratio = ways["alone"]["cpu_s"] / ways["shared"]["cpu_s"]
        said.append(f"sharing: {ratio:.2f} times less processor time")
    for name, how in (("alone", "without"), ("shared", "with")):
        with contextlib.suppress(KeyError):
            ratio = ways[name]["wall_s"] / ways[f"{name}_two"]["wall_s"]
            said.append(f"two at a time, {how} sharing: {ratio:.2f} times faster than one after the other")
    return said


def main(words: list[str]) -> None:
    bench = SweepBench.parse(words)
    result = run(bench)
    Console(width=None if sys.stdout.isatty() else 120).print(table(result))
    for line in notes(result["ways"]):
        print(line)
    print(f"written to {save('sweep', result, bench.out)}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except AxiconError as error:
        sys.exit(f"sweep: {error}")
