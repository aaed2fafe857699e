"""Sliced models by the fraction that goes, beside the dense one: `python benchmarks/slicing.py [key=value]`.

Weights, perplexity, and tokens per second of the engine that serves them, in bfloat16 and in int8; engines
take turns, figures are medians over the rounds. Writes a JSON file, and a PNG where matplotlib is installed.

    python benchmarks/slicing.py calibration=wiki.valid.raw text=wiki.test.raw
    python benchmarks/slicing.py calibration=wiki.valid.raw sample=2 perplexity=false       # speed alone
    python benchmarks/slicing.py calibration=wiki.valid.raw steps=true    # on a busy machine: see `steps`
    python benchmarks/slicing.py model=DIR calibration=a.txt text=b.txt window=256 speed=false
"""

from __future__ import annotations

import copy
import importlib.util
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from measure import RESULTS, complain, save, surroundings
from pydantic import BeforeValidator, Field
from rich.console import Console
from rich.table import Table

from axicon.compress import COMPRESSORS
from axicon.compress.calibration import Calibration, choose_windows
from axicon.compress.slice_gpt import SliceGPT, parameters
from axicon.compress.walk import compress
from axicon.data import join_rows, read_rows
from axicon.errors import AxiconError
from axicon.evaluate import speed
from axicon.evaluate.perplexity import perplexity, tokenise
from axicon.generate.engine import Engine
from axicon.generate.request import Limits
from axicon.generate.runner import LocalRunner
from axicon.model import checkpoint
from axicon.model.decoder import Decoder
from axicon.recipe import SERVED_BY_DEFAULT
from axicon.settings import Recipe, split_words

Fractions = Annotated[tuple[float, ...], BeforeValidator(split_words)]
KV_BYTES, ROWS, STEPS = 64 << 20, 8, 24


class Slicing(Recipe):
    model: str = Field("demo", description="demo, a model directory, a .gguf file, or a hub id")
    calibration: str = Field(min_length=1, description="text file or hub data set to fit the bases to")
    text: str | None = Field(None, description="text of the perplexity; none: that of the calibration")
    fractions: Fractions = Field((0.0, 0.1, 0.2, 0.25, 0.3), min_length=1, description="comma between")
    round_to: int = Field(16, ge=1, description="widths are multiples of it")
    tie: str = Field("project", description="what becomes of a tied head")
    sample: int = Field(32, ge=1, description="windows of the sample")
    sample_window: int = Field(512, ge=2, description="tokens in one of them")
    perplexity: bool = Field(True, description="measure it")
    window: int = Field(2048, ge=2, description="tokens per perplexity window")
    windows: int | None = Field(20, ge=1, description="only the first so many windows; none: all")
    speed: bool = Field(True, description="measure it")
    steps: bool = Field(
        False, description="only this: processor time of a step, one thread, weights at random"
    )
    rounds: int = Field(3, ge=1, description="turns of each engine")
    threads: int = Field(2, ge=1, description="compute threads")
    out: Path = Field(RESULTS, description="folder for the JSON file and the plot")


def sliced(bench: Slicing, fraction: float, sample: Calibration) -> Decoder:
    """At 0 the bases turn and nothing goes: the width is not rounded down."""
    method = SliceGPT(
        fraction=fraction, round_to=bench.round_to if fraction else 1, max_size_ratio=9.0,
        tie=bench.tie)  # type: ignore[arg-type] # the method says what it takes  # fmt: skip
    return compress(method, checkpoint.load(bench.model), sample)


def measure(bench: Slicing) -> list[dict[str, Any]]:
    """A line of the table for the dense model and for each fraction."""
    tokenizer = checkpoint.load_tokenizer(bench.model)
    names = {bench.calibration, bench.text or bench.calibration}
    texts = {name: join_rows(read_rows(name)) for name in names}
    tokens_T = tokenise(tokenizer, texts[bench.calibration])
    sample = Calibration(choose_windows(tokens_T, bench.sample, bench.sample_window, 0, bench.calibration))
    found, models = [], []
    whole = parameters(checkpoint.shape_of(bench.model))
    for fraction in (None, *bench.fractions):
        model = checkpoint.load(bench.model) if fraction is None else sliced(bench, fraction, sample)
        one: dict[str, Any] = {
            "fraction": fraction, "width": model.shape.width, "weights": parameters(model.shape) / whole
        }  # fmt: skip
        if bench.perplexity:
            text = texts[bench.text or bench.calibration]
            value = perplexity(model, tokenizer, text, window=bench.window, windows=bench.windows)
            one |= {"perplexity": value.value, "windows": value.windows}
        complain(", ".join(f"{key} {value}" for key, value in one.items()))
        found.append(one)
        models.append(model if bench.speed else None)
    if bench.speed:
        for one, rates in zip(found, speeds(models, tokenizer, bench), strict=True):
            one["tokens_per_s"] = rates
    return found


def speeds(models: list[Any], tokenizer: Any, bench: Slicing) -> list[dict[str, dict[str, float]]]:
    """Of each model by format and number of streams."""
    int8 = SERVED_BY_DEFAULT.build(COMPRESSORS, "compressor")
    found: list[dict[str, dict[str, float]]] = [{} for _ in models]
    for name in ("bfloat16", "int8"):
        engines = []
        for model in models:
            own = copy.deepcopy(model)  # the kernels take the weights out of it
            engines.append(_engine(compress(int8, own) if name == "int8" else own, tokenizer))
        rounds: list[list[Mapping[int, float]]] = [[] for _ in engines]
        for turn in range(bench.rounds):
            for i in [*range(turn % len(engines), len(engines)), *range(turn % len(engines))]:
                rates = speed.rates(engines[i], rounds=1)
                rounds[i].append({rate.streams: rate.tokens_per_s for rate in rates})
            complain(f"{name}: round {turn + 1} of {bench.rounds} done")
        for one, seen in zip(found, rounds, strict=True):
            one[name] = {str(n): statistics.median(rates[n] for rates in seen) for n in seen[0]}
    return found


def steps(bench: Slicing) -> list[dict[str, Any]]:
    """Milliseconds of processor time of a decoding step, which other programs disturb less than they do the
    clock: the median of all steps but those with prompts. Weights do not matter to it.
    """
    tokenizer, dense = checkpoint.load_tokenizer(bench.model), checkpoint.shape_of(bench.model)
    int8 = SERVED_BY_DEFAULT.build(COMPRESSORS, "compressor")
    found = []
    for fraction in (None, *bench.fractions):
        shape = dense
        if fraction is not None:
            method = SliceGPT(fraction=fraction, round_to=bench.round_to, tie="project", max_size_ratio=9.0)
            shape = method.reshaped(dense)
        one: dict[str, Any] = {
            "fraction": fraction, "width": shape.width, "weights": parameters(shape) / parameters(dense)
        }  # fmt: skip
        for name in ("bfloat16", "int8"):
            torch.manual_seed(0)
            model = Decoder(shape).bfloat16().requires_grad_(False).eval()
            engine = _engine(compress(int8, model) if name == "int8" else model, tokenizer)
            for streams in speed.STREAMS:
                taken = []
                for number in range(streams):
                    speed._add(engine, number, speed.PROMPT_TOKENS, STEPS)
                while engine.has_work:
                    start = time.process_time()
                    if len(speed._tokens(engine)) == streams:
                        taken.append(time.process_time() - start)
                one[f"{name}, {streams}"] = 1000 * statistics.median(taken[1:])
        complain(", ".join(f"{key} {value}" for key, value in one.items()))
        found.append(one)
    return found


def _engine(model: Decoder, tokenizer: Any) -> Engine:
    runner = LocalRunner(model, kv_bytes=KV_BYTES, max_rows=ROWS, kernels="auto")
    return Engine(runner, tokenizer, eos_ids=model.shape.eos_ids, limits=Limits(max_queue=ROWS))


def table(result: Mapping[str, Any]) -> Table:
    dense = result["runs"][0]
    shown = Table(title=str(result["recipe"]["model"]), title_justify="left")
    columns = ["fraction", "width", "weights"]
    columns += ["perplexity", "beside dense"] if "perplexity" in dense else []
    rates = [(form, n) for form, by in dense.get("tokens_per_s", {}).items() for n in by]
    for column in columns + [f"{form}, {n}" for form, n in rates]:
        shown.add_column(column, justify="right")
    for one in result["runs"]:
        cells = ["dense" if one["fraction"] is None else f"{one['fraction']:.0%}", str(one["width"]),
                 f"{one['weights']:.3f}"]  # fmt: skip
        if "perplexity" in one:
            cells += [f"{one['perplexity']:.2f}", f"{one['perplexity'] / dense['perplexity']:.3f}"]
        for form, n in rates:
            rate = one["tokens_per_s"][form][n]
            cells.append(f"{rate:.0f} ({rate / dense['tokens_per_s'][form][n]:.2f})")
        shown.add_row(*cells)
    return shown


def draw(result: Mapping[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    dense, *runs = result["runs"]
    figure, axes = plt.subplots(figsize=(6, 4))
    axes.plot([one["fraction"] for one in runs], [one["perplexity"] for one in runs], marker="o")
    axes.axhline(dense["perplexity"], linestyle="--", color="grey", label="dense")
    axes.set(xlabel="share of channels that went", ylabel="perplexity", title=result["recipe"]["model"])
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(words: list[str]) -> None:
    bench = Slicing.parse(words)
    torch.set_num_threads(bench.threads)
    result = {"benchmark": "slicing", **surroundings()}
    recipe = bench.model_dump(mode="json", exclude={"out"})
    for key in ("calibration", "text"):
        recipe[key] = recipe[key] and Path(recipe[key]).name
    recipe["model"] = Path(recipe["model"]).name
    if bench.steps:
        torch.set_num_threads(1)
        written = save("slicing_steps", result | {"recipe": recipe, "runs": steps(bench)}, bench.out)
        print(f"written to {written}")
        return
    result |= {"recipe": recipe, "runs": measure(bench)}
    Console(width=None if sys.stdout.isatty() else 110).print(table(result))
    written = save("slicing", result, bench.out)
    print(f"written to {written}")
    if bench.perplexity and importlib.util.find_spec("matplotlib"):
        draw(result, written.with_suffix(".png"))
        print(f"drawn: {written.with_suffix('.png')}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except AxiconError as error:
        sys.exit(f"slicing: {error}")
