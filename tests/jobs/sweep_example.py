"""A document of a sweep as it may look: 40 compressions with some that failed, and one of finetunings."""

from __future__ import annotations

import math
import random
from typing import Any

METHODS = ["gptq", "awq", "group_int4"]
START = "2026-03-01T10:00:00+00:00"


def compressions(count: int = 40, seed: int = 0, **changes: Any) -> dict[str, Any]:
    """Compressions of a model over method, bits, group and dampening, for bytes, perplexity and speed."""
    draw = random.Random(seed)
    trials = [_compression(draw, number + 1, count) for number in range(count)]
    able = [t for t in trials if t["status"] == "finished" and t["within_limits"]]
    for trial in able:
        trial["front"] = not any(_beats(other["metrics"], trial["metrics"]) for other in able)
    best = min(able, key=lambda t: t["metrics"]["bytes"], default=None)
    return {
        "format_version": 1,
        "name": "smaller-demo",
        "verb": "compress",
        "command": "axicon sweep recipes/sweep_compress.yaml model=demo out=artifacts/sweeps/smaller-demo",
        "base": {"model": "demo", "dtype": "bfloat16", "calibration": {"windows": 32, "inputs": "dense"}},
        "status": "running" if any(t["status"] == "running" for t in trials) else "finished",
        "reason": None,
        "started": START,
        "updated": "2026-03-01T10:31:07+00:00",
        "seconds": 1867.0,
        "wanted": count + 8,
        "search": "optuna",
        "scheduler": "none",
        "objectives": [
            {"metric": "bytes", "direction": "min"},
            {"metric": "perplexity", "direction": "min"},
            {"metric": "tokens_per_s.1", "direction": "max"},
        ],
        "limits": [{"metric": "perplexity", "max": 30.0}],
        "parameters": [
            {"key": "compressor.method", "kind": "choice", "values": METHODS, "when": None},
            {"key": "compressor.bits", "kind": "choice", "values": [2, 3, 4, 8], "when": None},
            {"key": "compressor.group", "kind": "choice", "values": [32, 64, 128], "when": None},
            {
                "key": "compressor.damp", "kind": "log_uniform", "low": 1e-4, "high": 1e-1,
                "when": {"compressor.method": "gptq"},
            },
            {"key": "calibration.windows", "kind": "integer", "low": 8, "high": 128},
        ],
        "trials": trials,
        "best": best["trial"] if best else None,
        **changes,
    }  # fmt: skip


def _compression(draw: random.Random, number: int, count: int) -> dict[str, Any]:
    method = draw.choice(METHODS)
    bits, group = draw.choice([2, 3, 3, 4, 4, 8]), draw.choice([32, 64, 128])
    settings: dict[str, Any] = {"compressor.method": method, "compressor.bits": bits}
    settings["compressor.group"] = group
    if method == "gptq":
        settings["compressor.damp"] = 10 ** draw.uniform(-4, -1)
    settings["calibration.windows"] = draw.randint(8, 128)
    size = 135e6 * (bits + 32 / group) / 8 + 28e6 + draw.uniform(-1, 1) * 1e5
    worse = {"gptq": 1.0, "awq": 1.15, "group_int4": 1.7}[method]
    loss = 17.1 + worse * (60 / 3.4**bits) * (1 + group / 200) * (1.1 - settings["calibration.windows"] / 700)
    trial = f"{number:04d}"
    row: dict[str, Any] = {
        "trial": trial,
        "status": "finished",
        "settings": settings,
        "metrics": {
            "bytes": size,
            "perplexity": loss * math.exp(draw.gauss(0, 0.02)),
            "tokens_per_s.1": 4.1e9 / size * draw.uniform(0.94, 1.06),
            "peak_gib": 0.9 + draw.uniform(0, 0.2),
        },
        "steps": [],
        "reason": None,
        "started": START,
        "seconds": draw.uniform(24, 80) + 40 * (method == "gptq"),
        "files": [f"trials/{trial}", f"trials/{trial}/report.json"],
        "serve": f"axicon serve artifacts/sweeps/smaller-demo/trials/{trial}",
        "recipe_sha256": f"{draw.getrandbits(256):064x}",
        "front": False,
        "within_limits": True,
    }
    if number % 13 == 6:
        row |= {"status": "failed", "metrics": {}, "files": [], "serve": None, "seconds": 3.1}
        row["reason"] = f"compressor.group={group}: 576 inputs of blocks.3.attn.q are no multiple of {group}"
    elif number > count - 2 and count > 5:
        row |= {"status": "running", "metrics": {}, "files": [], "serve": None, "seconds": None}
    elif number % 11 == 3:
        del row["metrics"]["tokens_per_s.1"]
    row["within_limits"] = row["metrics"].get("perplexity", math.inf) <= 30
    return row


def _beats(one: dict[str, float], other: dict[str, float]) -> bool:
    names = {"bytes": 1, "perplexity": 1, "tokens_per_s.1": -1}
    if any(name not in one or name not in other for name in names):
        return "tokens_per_s.1" not in other and "tokens_per_s.1" in one
    signed = [(way * one[name], way * other[name]) for name, way in names.items()]
    return all(a <= b for a, b in signed) and any(a < b for a, b in signed)


def finetunings(count: int = 18, seed: int = 1) -> dict[str, Any]:
    """Finetunings over the learning rate and the rank, stopped early by ASHA, for the loss."""
    draw = random.Random(seed)
    trials = []
    for number in range(1, count + 1):
        rate, rank = 10 ** draw.uniform(-5, -2), draw.choice([4, 8, 16, 32])
        floor = 0.35 + 0.12 * abs(math.log10(rate) + 3.3) + 0.4 / rank
        last = draw.choice([3, 9, 27]) if number % 3 else 27
        steps: list[dict[str, Any]] = []
        for i in range(1, last + 1):
            loss = floor + 1.6 * math.exp(-i * rate * 300) + draw.gauss(0, 0.01)
            steps.append({"step": 20 * i, "metrics": {"loss": loss, "accuracy": 0.93 - 0.2 * loss}})
        diverged = rate > 6e-3
        if diverged:
            steps = [*steps[:2], {"step": 60, "metrics": {"loss": None, "accuracy": None}}]
        status = "failed" if diverged else "finished" if last == 27 else "stopped"
        reason = {
            "failed": "the loss is not a number at step 60; a smaller rule.lr may help",
            "stopped": f"scheduler: loss at step {20 * last} is not in the best third of its rung",
        }.get(status)
        metrics = steps[-1]["metrics"]
        trials.append({
            "trial": f"{number:04d}", "status": status, "settings": {"rule.lr": rate, "scheme.rank": rank},
            "metrics": metrics, "steps": steps, "reason": reason, "started": START,
            "seconds": 4.0 * len(steps), "files": [f"trials/{number:04d}"], "serve": None,
            "recipe_sha256": "0" * 64, "front": False, "within_limits": True,
        })  # fmt: skip
    able = [t for t in trials if t["status"] == "finished"]
    best = min(able, key=lambda t: t["metrics"]["loss"])
    best["front"] = True
    return compressions(0) | {
        "name": "learning-rate", "verb": "finetune", "search": "random", "scheduler": "asha",
        "status": "finished", "wanted": count, "limits": [],
        "objectives": [{"metric": "loss", "direction": "min"}],
        "parameters": [
            {"key": "rule.lr", "kind": "log_uniform", "low": 1e-5, "high": 1e-2},
            {"key": "scheme.rank", "kind": "choice", "values": [4, 8, 16, 32], "when": None},
        ],
        "trials": trials, "best": best["trial"],
    }  # fmt: skip


def population(members: int = 4, generations: int = 3) -> dict[str, Any]:
    """Segments of 10 steps, in which the last member always goes on from the end of the first one."""
    trials = []
    for number in range(members * generations):
        generation, member = divmod(number, members)
        begun = (generation - 1) * members + (0 if member == members - 1 else member) + 1
        loss = 2.0 - 0.4 * generation + 0.1 * member
        trials.append({
            "trial": f"{number + 1:04d}", "status": "finished", "settings": {"rule.lr": 1e-3 * (member + 1)},
            "metrics": {"loss": loss}, "steps": [{"step": 10 * generation + 10, "metrics": {"loss": loss}}],
            "parent": f"{begun:04d}" if generation else None, "reason": None, "started": START,
            "seconds": 4.0, "files": [], "serve": None, "recipe_sha256": "0" * 64, "front": False,
            "within_limits": True,
        })  # fmt: skip
    best = min(trials, key=lambda one: one["metrics"]["loss"])
    return finetunings() | {"scheduler": "pbt", "trials": trials, "best": best["trial"]}
