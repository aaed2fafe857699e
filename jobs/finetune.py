"""`axicon finetune`: a model trained for a task, in the memory it takes to run it.

The folder of a run holds its recipe, `log.jsonl` with the numbers of every step, what was evaluated, curves,
and `result`, a model directory or an adapter. The same command goes on with what is there.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from axicon.errors import AxiconError
from axicon.finetune.log import NAME, Log, read
from axicon.finetune.loop import loss_of
from axicon.finetune.offloaded import trained_elements
from axicon.finetune.shards import Alone
from axicon.model import checkpoint
from axicon.model.artefact import claim, read_manifest, sha256, write_atomically
from jobs.finetune_curves import write_curves
from jobs.finetune_output import write
from jobs.finetune_recipe import FinetuneRecipe
from jobs.finetune_start import start
from jobs.finetune_work import EVALUATIONS, Cost, Evaluation, Evaluations, Job, digest_of, threads_of
from jobs.progress import Reporter
from jobs.report import Report, write_json
from jobs.stop import Stopped

DEFAULT_OUT = Path("artifacts/finetune")
RESULT, RECIPE, SUMMARY = "result", "recipe.yaml", "run.json"


def run(recipe: FinetuneRecipe, reporter: Reporter | None = None) -> Report:
    """Take the steps that are left, and write what came of them.

    Raises AxiconError, with nothing lost, for what can be known before the work and when the disk is full.
    """
    reporter = reporter or Reporter()
    clock = time.perf_counter()
    torch.set_num_threads(threads_of(recipe))
    job = Job.of(recipe)
    folder = folder_of(recipe)
    for note in job.data.notes:
        reporter.say(note)
    with claim(folder):
        try:
            if recipe.start_from is not None:
                start(job, recipe.start_from, folder, reporter)
            job = job.begun_in(folder)
            if (folder / NAME).exists():  # refused before anything of another run is written over
                Log(folder / NAME, job.facts(), writes=False)
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / RECIPE, recipe.as_yaml())
            evaluations, model = _train(job, folder, reporter)
            report = _finish(job, folder, evaluations, model, reporter)
        except Stopped as stopped:
            stopped.kept = f"{_kept(folder)} steps are kept in {folder}; run the same command to go on"
            raise
        except OSError as e:
            raise AxiconError(
                f"{folder}: {e.strerror or e}; {_kept(folder)} steps are kept, mend that and run the same "
                "command"
            ) from e
    return dataclasses.replace(report, seconds=time.perf_counter() - clock)


def _kept(folder: Path) -> int:
    return len(read(folder / NAME)[1]) if (folder / NAME).exists() else 0


def folder_of(recipe: FinetuneRecipe) -> Path:
    name = checkpoint.model_id(recipe.model).replace("/", "--")
    out = recipe.out or DEFAULT_OUT / f"{name}-{recipe.rule.method}-{recipe.scheme.method}"
    return out.expanduser().absolute()


def _train(job: Job, folder: Path, reporter: Reporter) -> tuple[list[Evaluation], Any]:
    """The evaluations, and the model behind the last step; None for one in other processes."""
    if job.recipe.workers:
        from jobs import finetune_ray

        finetune_ray.fit(job.recipe, folder, reporter)
        return Evaluations(folder / EVALUATIONS).found, None
    model = job.model()
    return job.run(model, Alone(job.recipe.shards), folder, reporter=reporter), model


def _finish(job: Job, folder: Path, evaluations: list[Evaluation], model: Any, reporter: Reporter) -> Report:
    recipe = job.recipe
    _, steps, _ = read(folder / NAME)
    last = min(len(steps), recipe.steps)
    evaluations = [one for one in evaluations if one.step <= last]
    best = max(evaluations, key=lambda one: one.rank).step if evaluations else last
    chosen = best if recipe.keep == "best" else last
    if model is None or chosen != last:
        reporter.say(f"the result is the model behind step {chosen}, which is made again")
        model = job.rebuild(folder, chosen)
    found: dict[str, Any] = {
        "steps": last,
        "skipped": sum(one is None for one in steps[:last]),
        "result_step": chosen,
        "parameters": trained_elements(model),
        "digest": digest_of(model),
        "log_bytes": (folder / NAME).stat().st_size,
        "log_sha256": sha256(folder / NAME),
        "evaluations": [dataclasses.asdict(one) for one in evaluations],
    }
    _write_result(job, model, chosen, folder, found["digest"])
    cost = Cost.read(folder)
    if cost is not None:
        found |= dataclasses.asdict(cost)
    losses = [(i + 1, loss) for i, one in enumerate(steps[:last]) if (loss := loss_of(one)) is not None]
    write_curves(folder, recipe, losses, evaluations, chosen)
    write_json(folder / SUMMARY, found)
    return Report(
        verb="finetune",
        recipe=recipe,
        metrics=metrics(evaluations, chosen, losses) | ({} if cost is None else dataclasses.asdict(cost)),
        seconds=0.0,
        files=(folder / RESULT, folder / SUMMARY, folder / NAME),
        details=found,
    )


def _write_result(job: Job, model: Any, step: int, folder: Path, digest: str) -> None:
    """Write the result anew, unless what is there is the same."""
    target, stamp = folder / RESULT, folder / f"{RESULT}.json"
    of = {"step": step, "digest": digest, "output": job.recipe.output}
    if target.exists():
        if stamp.exists() and json.loads(stamp.read_text()) == of and read_manifest(target) is not None:
            return
        old = folder / f".{RESULT}.old"
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        shutil.rmtree(old)
    write(job, model, step, job.data.sha256, target)
    write_atomically(stamp, json.dumps(of))


def metrics(evaluations: list[Evaluation], step: int, losses: list[tuple[int, float]]) -> dict[str, float]:
    """Of the result, and of the model before the first step."""
    found: dict[str, float] = {}
    for name, at in (("before", 0), ("after", step)):
        one = next((one for one in evaluations if one.step == at), None)
        if one is not None:
            found[f"loss_{name}"] = one.loss
            if one.accuracy is not None:
                found[f"accuracy_{name}"] = one.accuracy
    if losses:
        recent = [loss for _, loss in losses[-20:]]
        found["train_loss"] = sum(recent) / len(recent)
    return found


def summary(report: Report) -> list[str]:
    """What a person wants to know of a run that ended."""
    found, m = report.details, report.metrics
    lines = []
    for name, digits in (("accuracy", 3), ("loss", 4)):
        told = [f"{m[key]:.{digits}f} {at}" for at in ("before", "after") if (key := f"{name}_{at}") in m]
        lines += [f"{name} {', '.join(told)}"] if told else []
    skipped = f", {found['skipped']} of them skipped" if found["skipped"] else ""
    lines.append(
        f"{found['steps']} steps{skipped}; the result is of step {found['result_step']}, "
        f"{found['parameters']:,} parameters trained, digest {found['digest'][:12]}"
    )
    if "step_seconds" in m:
        lines.append(f"{m['step_seconds']:.2f} s a step, at most {m['peak_bytes'] / 1e9:.2f} GB of memory")
    folder = report.files[0].parent
    lines.append(
        f"it lies in {report.files[0]}, the log ({found['log_bytes']:,} bytes) and curves in {folder}"
    )
    manifest = read_manifest(report.files[0]) or {}
    if manifest.get("kind") == "adapter":
        lines.append("it is an adapter: PEFT reads it, and output=merged puts it into the weights")
    if manifest.get("kind") != "adapter" or (manifest.get("recipe") or {})["scheme"]["method"] == "lora":
        lines.append(f"serve it: axicon serve {report.files[0]}")
    return lines
