"""What update rules are worth on a task: `python benchmarks/finetune_quality.py [key=value ...]`.

Every rule is a shipped recipe, run by the `axicon` command in a process of its own, for each seed, in a
folder that stays: what was stopped goes on, what is done is only read. One table: accuracy before and after
with the standard error over seeds, the share of the first-order gain, seconds per step and peak memory. The
bar of `zo_sgd` is 60 % of what `adamw` gains.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

from measure import ROOT, complain, save, surroundings
from pydantic import Field
from rich.console import Console
from rich.table import Table

from axicon.errors import AxiconError
from axicon.settings import Recipe, Words

AXICON = Path(sysconfig.get_path("scripts")) / "axicon"
RULES = (
    "adamw", "sgd", "zo_sgd", "zo_momentum", "zo_sign", "zo_conservative", "zo_adam", "zo_sparse",
    "zo_blocks", "forward_grad", "hybrid",
)  # fmt: skip
BASELINE, BAR = "adamw", 0.6


class QualityBench(Recipe):
    rules: Words = Field(RULES, description="names of shipped recipes")
    seeds: Words = Field(("0",), description="seeds of each")
    steps: int | None = Field(500, ge=1, description="of every rule; none: as its recipe says")
    task: str = Field("sst2", description="a task that comes with axicon")
    folder: Path = Field(Path("artifacts/finetune_quality"), description="where the runs lie, and stay")
    more: Words = Field((), description="further key=value words for every run, comma between")
    out: Path = Field(ROOT / "benchmarks" / "results", description="folder for the JSON file")


def run_one(bench: QualityBench, rule: str, seed: str) -> dict[str, Any]:
    """What a run found. Raises AxiconError where it failed."""
    out = bench.folder / f"{bench.task}-{rule}-{seed}"
    words = [f"recipes/{rule}.yaml", f"data.task={bench.task}", f"seed={seed}", f"out={out.absolute()}"]
    words += [] if bench.steps is None else [f"steps={bench.steps}"]
    began = _steps(out)
    start = time.perf_counter()
    process = subprocess.Popen([AXICON, "finetune", *words, *bench.more], cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise AxiconError(f"{rule} with seed {seed} failed; its message is above")
    found: dict[str, Any] = json.loads((out / "run.json").read_text())
    taken = found["steps"] - began
    if taken:
        # Loading and evaluating are in it; a run of hundreds of steps does not notice.
        cost = {"step_seconds": (time.perf_counter() - start) / taken, "peak_bytes": usage.ru_maxrss * 1024}
        (out / "cost.json").write_text(json.dumps(cost))
    cost = json.loads((out / "cost.json").read_text()) if (out / "cost.json").exists() else {}
    return found | cost


def _steps(out: Path) -> int:
    log = out / "log.jsonl"
    return max(0, log.read_bytes().count(b"\n") - 1) if log.exists() else 0


def summarise(rule: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    before = [one["evaluations"][0]["accuracy"] for one in runs]
    after = [_at(one, one["result_step"]) for one in runs]
    error = statistics.stdev(after) / math.sqrt(len(after)) if len(after) > 1 else None
    seconds = [one["step_seconds"] for one in runs if "step_seconds" in one]
    return {
        "rule": rule,
        "before": statistics.mean(before),
        "after": statistics.mean(after),
        "standard_error": error,
        "runs": after,
        "step_seconds": statistics.median(seconds) if seconds else None,
        "peak_bytes": max((one.get("peak_bytes", 0) for one in runs), default=0),
    }


def _at(run: dict[str, Any], step: int) -> float:
    return next(float(one["accuracy"]) for one in run["evaluations"] if one["step"] == step)


def run(bench: QualityBench) -> dict[str, Any]:
    found = []
    for rule in bench.rules:
        found.append(summarise(rule, [run_one(bench, rule, seed) for seed in bench.seeds]))
        complain(f"{rule}: {found[-1]}")
    return surroundings() | {
        "recipe": bench.model_dump(mode="json", exclude={"out", "folder"}),
        "rules": found,
    }


def table(result: dict[str, Any]) -> Table:
    asked, rows = result["recipe"], result["rules"]
    steps = "as their recipes say" if asked["steps"] is None else asked["steps"]
    shown = Table(
        title=f"{asked['task']}, steps: {steps}, seeds: {len(asked['seeds'])}", title_justify="left"
    )
    best = next((one["after"] - one["before"] for one in rows if one["rule"] == BASELINE), None)
    for column in ("rule", "before", "after", "s.e.", f"of {BASELINE}'s gain", "s/step", "peak GB"):
        shown.add_column(column, justify="left" if column == "rule" else "right")
    for one in rows:
        share = (one["after"] - one["before"]) / best if best else None
        shown.add_row(
            one["rule"], f"{one['before']:.3f}", f"{one['after']:.3f}",
            "" if one["standard_error"] is None else f"{one['standard_error']:.3f}",
            "" if share is None else f"{share:.0%}",
            "" if one["step_seconds"] is None else f"{one['step_seconds']:.2f}",
            f"{one['peak_bytes'] / 1e9:.2f}",
        )  # fmt: skip
    return shown


def main(words: list[str]) -> None:
    bench = QualityBench.parse(words)
    bench.folder.mkdir(parents=True, exist_ok=True)
    result = run(bench)
    Console(width=None if sys.stdout.isatty() else 120).print(table(result))
    print(f"written to {save('finetune_quality', result, bench.out)}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except AxiconError as error:
        sys.exit(f"finetune_quality: {error}")
