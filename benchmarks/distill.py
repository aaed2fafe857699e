"""What distilled digits are worth: `python benchmarks/distill.py [key=value ...]`.

The shipped recipe as plain MTT and with switches of AST, once for each seed, in a folder that stays: what was
stopped goes on, what is done is only read. A seed is another split, other experts and other fresh networks.
One table: accuracy of networks trained on one made image per class, beside one real image at random and by
k-means, and how far experts move in an epoch at most. Bars: 10 points above random, 3 above k-means; with the
switches, experts move at least a fifth less, and the accuracy is not lower than that of MTT by more than two
standard errors of the difference.
"""

from __future__ import annotations

import math
import statistics
import sys
from pathlib import Path
from typing import Any

from measure import RESULTS, complain, save, surroundings
from pydantic import Field
from rich.console import Console
from rich.table import Table

from axicon.errors import AxiconError
from axicon.settings import Recipe, Words, laid
from jobs import distill
from jobs.command import read_file, shipped
from jobs.distill_recipe import DistillRecipe

PLAIN = "MTT"
OFF = {"clip_loss": False, "grad_penalty": 0.0, "representative": False}
EVERY = {"balance": True, "mid_match": "agg"}
VARIANTS: dict[str, dict[str, Any]] = {
    PLAIN: {"switches": OFF, "expert_epochs": 2, "max_start": 14},
    "AST experts and start": {},
    "all of AST": {
        "switches": EVERY, "expert_epochs": 2, "max_start": 14,
        "momentum": 0.9, "alpha": 0.005, "lr_alpha": 1e-6, "lr_data": 5.0,
    },
}  # fmt: skip
"""Epochs, starts and rates are those that did best of a few that were tried for each."""
BARS = {"random": 0.10, "kmeans": 0.03, "movement": 0.2}


class DistillBench(Recipe):
    variants: Words = Field(tuple(VARIANTS), description="which, with MTT first")
    seeds: Words = Field(("0", "1", "2"), description="of each variant")
    iterations: int | None = Field(None, ge=1, description="of each run; none: as the recipe says")
    folder: Path = Field(Path("artifacts/distill_bench"), description="where the runs lie, and stay")
    out: Path = Field(RESULTS, description="folder for the JSON file")


def run_one(bench: DistillBench, name: str, seed: str) -> dict[str, float]:
    file = shipped("distill_digits.yaml")
    assert file is not None
    out = bench.folder / f"{name.replace(' ', '-').replace(',', '')}-{seed}"
    more: dict[str, Any] = {
        "seed": int(seed),
        "out": out,
        "experts": {"folder": bench.folder / "experts"},
        "judge": {
            "every": 100_000,
            "baselines": name == PLAIN,
        },  # real examples are the same for all variants
        "workers": 0,
    }
    if bench.iterations is not None:
        more["iterations"] = bench.iterations
    recipe = DistillRecipe.parse(**laid(laid(read_file(file), VARIANTS[name]), more))
    return dict(distill.run(recipe).metrics)


def summarise(runs: list[dict[str, float]]) -> dict[str, Any]:
    """Means over seeds, and the standard error of the accuracy."""
    found: dict[str, Any] = {key: statistics.fmean(run[key] for run in runs) for key in runs[0]}
    all_of = [run["accuracy"] for run in runs]
    found["standard_error"] = statistics.stdev(all_of) / math.sqrt(len(all_of)) if len(all_of) > 1 else None
    found["runs"] = runs
    return found


def run(bench: DistillBench) -> dict[str, Any]:
    variants = {}
    for name in bench.variants:
        runs = []
        for seed in bench.seeds:
            runs.append(run_one(bench, name, seed))
            complain(f"{name}, seed {seed}: accuracy {runs[-1]['accuracy']:.3f}")
        variants[name] = summarise(runs)
    plain = variants[PLAIN]
    for one in variants.values():
        for baseline in ("random", "kmeans"):
            one[f"above_{baseline}"] = one["accuracy"] - plain[f"accuracy_{baseline}"]
        one["movement_cut"] = 1 - one["expert_movement"] / plain["expert_movement"]
        # The same seeds, so differences are taken run by run.
        apart = [a["accuracy"] - b["accuracy"] for a, b in zip(one["runs"], plain["runs"], strict=True)]
        one["against_mtt"] = statistics.fmean(apart)
        one["against_mtt_error"] = statistics.stdev(apart) / math.sqrt(len(apart)) if len(apart) > 1 else None
    recipe = bench.model_dump(mode="json", exclude={"out", "folder"})
    return surroundings() | {"recipe": recipe, "bars": BARS, "variants": variants}


def table(result: dict[str, Any]) -> Table:
    seeds = len(result["recipe"]["seeds"])
    shown = Table(title=f"digits, one image per class, {seeds} seeds of 5 networks", title_justify="left")
    columns = ("", "accuracy", "s.e.", "above random", "above k-means", "against MTT", "movement", "cut")
    for column in columns:
        shown.add_column(column, justify="right" if column else "left")
    for name, one in result["variants"].items():
        apart, error = one["against_mtt"], one["against_mtt_error"]
        shown.add_row(
            name,
            f"{one['accuracy']:.1%}",
            "" if one["standard_error"] is None else f"{one['standard_error']:.1%}",
            f"{one['above_random']:+.1%}",
            f"{one['above_kmeans']:+.1%}",
            "" if name == PLAIN else f"{apart:+.1%}" + ("" if error is None else f" ± {error:.1%}"),
            f"{one['expert_movement']:.3f}",
            "" if name == PLAIN else f"{one['movement_cut']:.0%}",
        )
    return shown


def main(words: list[str]) -> None:
    bench = DistillBench.parse(words)
    bench.folder.mkdir(parents=True, exist_ok=True)
    result = run(bench)
    Console(width=None if sys.stdout.isatty() else 120).print(table(result))
    print(f"written to {save('distill', result, bench.out)}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except AxiconError as error:
        sys.exit(f"distill: {error}")
