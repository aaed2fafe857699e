"""What repair after pruning is worth: `python benchmarks/perp.py train=wiki.valid.raw text=wiki.test.raw`.

The model is pruned by magnitude in each output, and repaired in each of the ways of PERP on as many tokens
as the others get: parts of the parameters, adapters that a mask holds for, blocks one by one. Each is the
`axicon` command in a process of its own, in a folder that stays: what was stopped goes on, what is done is
only read. One table: parameters, minutes on the clock and of the processor, perplexity. Perplexity is that of
`axicon evaluate`, windows of 2048 tokens. The bar is 40 at a sparsity of 0.5, under 1 % of the parameters.

    python benchmarks/perp.py train=... text=... ways=mask_lora windows=20 steps=400
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import yaml
from measure import ROOT, complain, save, surroundings
from pydantic import Field
from rich.console import Console
from rich.table import Table

from axicon.errors import AxiconError
from axicon.settings import Recipe, Words

AXICON = Path(sysconfig.get_path("scripts")) / "axicon"
WAYS: dict[str, list[str]] = {
    "norms": ["scheme.adapters=none", "scheme.train=[norms]", "rule.lr=1e-2"],
    "lora_prune": ["scheme.adapters=lora_prune"],
    "scale_lora": ["scheme.adapters=scale_lora"],
    "mask_lora": [],
}
"""Ways to retrain, as words for recipes/perp.yaml; `wanda` is pruning without any, `blocks` reconstructs."""


class PerpBench(Recipe):
    model: str = Field("demo", description="dense model")
    train: Path = Field(description="text to repair on")
    text: Path = Field(description="text to measure on")
    windows: int | None = Field(20, ge=1, description="of 2048 tokens; none: all")
    sparsity: float = Field(0.5, gt=0, lt=1, description="of every output, by magnitude")
    ways: Words = Field(("pruned", "wanda", *WAYS, "blocks"), description="which to measure")
    steps: int = Field(400, ge=1, description="of retraining")
    batch: int = Field(2, ge=1, description="windows of a step")
    window: int = Field(256, ge=2, description="tokens of a training window")
    threads: int = Field(2, ge=1, description="compute threads")
    folder: Path = Field(Path("artifacts/perp"), description="where the models lie, and stay")
    out: Path = Field(ROOT / "benchmarks" / "results", description="folder for the JSON file")


def command(bench: PerpBench, way: str, folder: Path) -> tuple[list[str], Path]:
    """Words that make the model of a way, and where it will lie."""
    pruned = str((bench.folder / "pruned").absolute())
    threads, made = f"threads={bench.threads}", folder.absolute()
    compress = ["compress", f"model={bench.model}", f"out={made}", "measure=false", threads]
    sample = [
        f"calibration.text={bench.train.absolute()}", f"calibration.window={bench.window}",
        f"calibration.windows={bench.steps * bench.batch}",
    ]  # fmt: skip
    if way == "pruned":
        words = [compress[0], "magnitude", *compress[1:], "compressor.scope=row"]
        return [*words, f"compressor.sparsity={bench.sparsity}"], made
    if way == "wanda":
        words = [compress[0], "wanda", *compress[1:], f"compressor.sparsity={bench.sparsity}"]
        return [*words, f"calibration.text={bench.train.absolute()}"], made
    if way == "blocks":
        recipe = yaml.safe_load((ROOT / "recipes" / "perp_reconstruct.yaml").read_text())
        recipe["chain"][0]["sparsity"], recipe["chain"][1]["passes"] = bench.sparsity, 1
        file = bench.folder / "blocks.yaml"
        file.write_text(yaml.safe_dump(recipe))
        return [compress[0], str(file.absolute()), *compress[1:], *sample], made
    return [
        "finetune", "recipes/perp.yaml", f"model={pruned}", f"out={made}", f"steps={bench.steps}",
        f"batch={bench.batch}", f"schedule.warmup={bench.steps // 10}",
        f"data.train={bench.train.absolute()}", f"data.max_tokens={bench.window}", threads, *WAYS[way],
    ], made / "result"  # fmt: skip


def make(bench: PerpBench, way: str) -> dict[str, Any]:
    """Make the model of a way, unless it is there, and measure it. Raises AxiconError where that failed."""
    folder = bench.folder / way
    words, model = command(bench, way, folder)
    kept = bench.folder / f"{way}.json"
    if not kept.exists():
        seconds, processor = run(words)
        found = {"way": way, "seconds": seconds, "cpu_seconds": processor}
        if (folder / "run.json").exists():
            found["parameters"] = json.loads((folder / "run.json").read_text())["parameters"]
        evaluate = ["evaluate", str(model), f"text={bench.text.absolute()}", f"threads={bench.threads}",
                    f"out={(bench.folder / f'{way}-measured').absolute()}"]  # fmt: skip
        run([*evaluate, *([] if bench.windows is None else [f"windows={bench.windows}"])])
        [report] = sorted((bench.folder / f"{way}-measured").rglob("results_*.json"))[-1:]
        found["perplexity"] = json.loads(report.read_text())["axicon"]["perplexity"]["value"]
        kept.write_text(json.dumps(found))
    return dict(json.loads(kept.read_text()))


def run(words: list[str]) -> tuple[float, float]:
    """Seconds on the clock, and of the processor."""
    start = time.perf_counter()
    process = subprocess.Popen([AXICON, *words], cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise AxiconError(f"axicon {' '.join(words[:2])} failed; its message is above")
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime


def table(result: dict[str, Any]) -> Table:
    asked = result["recipe"]
    shown = Table(
        title=f"sparsity {asked['sparsity']}, {asked['steps'] * asked['batch'] * asked['window']:,} tokens",
        title_justify="left",
    )
    for column in ("way", "parameters", "minutes", "of the processor", "perplexity"):
        shown.add_column(column, justify="left" if column == "way" else "right")
    for one in result["ways"]:
        count = one.get("parameters")
        shown.add_row(
            one["way"], "" if count is None else f"{count:,}", f"{one['seconds'] / 60:.1f}",
            f"{one['cpu_seconds'] / 60:.1f}", f"{one['perplexity']:.1f}",
        )  # fmt: skip
    return shown


def main(words: list[str]) -> None:
    bench = PerpBench.parse(words)
    unknown = sorted(set(bench.ways) - {"pruned", "wanda", "blocks", *WAYS})
    if unknown:
        known = ", ".join(("pruned", "wanda", "blocks", *WAYS))
        raise AxiconError(f"ways: unknown {', '.join(unknown)}; known are {known}")
    bench.folder.mkdir(parents=True, exist_ok=True)
    found = []
    for way in dict.fromkeys(("pruned", *bench.ways)):
        found.append(make(bench, way))
        complain(f"{way}: {found[-1]}")
    asked = bench.model_dump(mode="json", exclude={"out", "folder", "train", "text"})
    result = surroundings() | {"recipe": asked, "ways": found}
    Console(width=None if sys.stdout.isatty() else 120).print(table(result))
    print(f"written to {save('perp', result, bench.out)}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except AxiconError as error:
        sys.exit(f"perp: {error}")
