"""`axicon sweep`: a recipe of any verb tried with different settings, one trial each, on Ray Tune.

What is written, in the folder of the sweep: `ledger.jsonl`, from which everything else follows; `sweep.json`
and `sweep.html`, what is found so far; `trials/NUMBER`, what the verb wrote, with its log beside it;
`tensorboard/`; `sweep.yaml`, which goes on with the sweep; and `best.yaml`, which runs the winner in full.
"""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from axicon.errors import RunFailed
from axicon.model import checkpoint
from axicon.model.artefact import claim, write_atomically
from jobs.progress import Reporter
from jobs.report import Report
from jobs.stop import Stopped
from jobs.sweep_document import NAME, PAGE
from jobs.sweep_ledger import FULL, Trial
from jobs.sweep_plan import BEST, RECIPE, SHARED, TEXT, WINDOWS, Plan
from jobs.sweep_recipe import SweepRecipe
from jobs.sweep_show import settings, so_far
from jobs.sweep_study import Study

DISK = (*FULL, errno.EIO, errno.EROFS, errno.EACCES)
"""Of errors of the system, those that a person can mend."""

Runner = Callable[[Study], None]
"""Asks a study for trials, runs them and tells what became of them, until there is none left."""


def run(recipe: SweepRecipe, reporter: Reporter | None = None, runner: Runner | None = None) -> Report:
    """Run the trials that are left, and the best one in full if that is asked for.

    Raises AxiconError, before the first trial, for what can be known by then, and RunFailed when too many
    trials failed or the disk is full. Whatever ends it, the same command goes on.
    """
    reporter, clock = reporter or Reporter(), time.perf_counter()
    plan = Plan.of(recipe)
    if runner is None:
        from jobs import sweep_tune

        runner = sweep_tune.runner(recipe)
    with claim(plan.folder):
        study = Study(plan, reporter.say)
        try:
            _prepare(plan, reporter)
            if study.trials:
                reporter.say(f"going on with {study.kept} trials in {study.ledger.path}")
            _run_trials(study, runner, reporter)
            study.close("finished")
            shutil.rmtree(plan.folder / SHARED, ignore_errors=True)
        except Stopped as stopped:
            study.close("stopped", "someone asked it to end")
            stopped.kept = f"{study.done} trials are kept in {plan.folder}; run the same command to go on"
            raise
        except OSError as error:
            study.close("failed", error.strerror)
            if error.errno not in DISK:
                raise
            raise RunFailed(
                f"{plan.folder}: {error.strerror or error}; {study.done} trials are kept, mend that and run "
                "the same command"
            ) from error
        except BaseException as error:
            study.close("failed", str(error) or type(error).__name__)
            raise
    found = study.document_now()
    _write_best(study)
    report = Report(
        verb="sweep",
        recipe=recipe,
        metrics={} if study.best is None else dict(study.best.metrics),
        seconds=time.perf_counter() - clock,
        files=(plan.folder / NAME, plan.folder / PAGE),
        details=found,
    )
    if recipe.run_best and study.best is not None:
        reporter.say(f"running the best trial, {study.best.trial}, in full")
        run_best(plan, study.best, reporter)
    return report


def _prepare(plan: Plan, reporter: Reporter) -> None:
    """What trials need beside their recipes, and what a person needs to go on."""
    write_atomically(plan.folder / RECIPE, plan.recipe.model_copy(update={"out": plan.folder}).as_yaml())
    if plan.writes_text:
        from jobs.sweep_text import write_text

        base = plan.base
        write_text(
            plan.folder / TEXT,
            checkpoint.resolve(base["model"], offline=base["offline"], revision=base["revision"]),
            windows=WINDOWS,
            window=base["window"],
            seed=plan.recipe.seed,
            dtype=base["dtype"],
            threads=plan.recipe.threads,
            reporter=reporter,
        )


def _run_trials(study: Study, runner: Runner, reporter: Reporter) -> None:
    if not study.waiting and len(study.trials) >= study.plan.wanted:
        reporter.say("all of them have ended: nothing is left to run")
        return
    with reporter.track("trials") as advance:
        study.changed = lambda: advance(study.done, study.plan.wanted, so_far(study.best, study.plan))
        study.changed()
        try:
            runner(study)
        finally:
            study.changed = lambda: None
    if study.error is not None:
        raise study.error
    study.check_objectives()


def _write_best(study: Study) -> None:
    if study.best is not None:
        full = study.plan.full_recipe(study.best.settings, study.plan.segment(study.best))
        write_atomically(study.folder / BEST, yaml.safe_dump(full, sort_keys=False))


def run_best(plan: Plan, best: Trial, reporter: Reporter) -> Report:
    """The verb's own run, here; one that is done already, or was begun, is gone on with by the verb."""
    full = plan.full_recipe(best.settings, plan.segment(best))
    return plan.verb.run(plan.verb.recipe.parse(**full), reporter)


def summary(report: Report) -> list[str]:
    """What a person wants to know of a sweep that ended."""
    found, folder = report.details, Path(report.files[0]).parent
    trials = {one["trial"]: one for one in found["trials"]}
    count = {status: sum(one["status"] == status for one in trials.values()) for status in STATUSES}
    told = ", ".join(f"{number} {status}" for status, number in count.items() if number)
    front = [one["trial"] for one in found["trials"] if one["front"]]
    lines = [f"{told}; {report.seconds:.0f} s"]
    if len(found["objectives"]) > 1 and front:
        lines.append(f"none is better in all objectives than {', '.join(front)}")
    best = found["best"]
    if best is None:
        lines.append("no trial ended within the limits, so there is no best one")
    else:
        lines.append(f"the best is {best}: {settings(trials[best]['settings'])}")
        if trials[best].get("parent"):
            lines.append(f"it began from {', which began from '.join(descent(best, trials)[1:])}")
        if trials[best]["serve"]:
            lines.append(f"serve it: {trials[best]['serve']}")
        lines.append(f"run it in full: axicon {found['verb']} {folder / BEST}")
    lines.append(f"all of it: {folder / PAGE}; curves: tensorboard --logdir {folder / 'tensorboard'}")
    return lines


def descent(number: str, trials: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A trial and those from whose ends it came, itself first."""
    found = [number]
    while (parent := trials[found[-1]].get("parent")) is not None:
        found.append(parent)
    return found


STATUSES = ("finished", "stopped", "failed", "running")
