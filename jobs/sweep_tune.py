"""Trials of a sweep on Ray Tune: function trainables in actors that are used again, a scheduler, one study.

Tune is asked to run and to end trials, and for nothing else. What is tried next, what is kept and how a sweep
goes on is the study's: Tune's own state is pickled, so it lies in a folder that goes with the sweep.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from axicon.errors import AxiconError
from axicon.model.machine import cores
from jobs import cluster, cluster_file
from jobs.command import debug
from jobs.stop import noted, rearm
from jobs.submitted import submission
from jobs.sweep_recipe import SweepRecipe
from jobs.sweep_study import Study

QUIET = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # ledger and curves are ours
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000000",  # of a state that nobody reads
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # an ending is a result without the scheduler's figure
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "1000000000",
    "RAY_AIR_NEW_OUTPUT": "0",
}


def runner(recipe: SweepRecipe) -> Callable[[Study], None]:
    """Raises AxiconError for what this machine does not have; a cluster is asked when it is there."""
    if submission() is None:
        import torch

        gpus = torch.cuda.device_count() if recipe.gpus else 0
        at_once(recipe, [{"CPU": float(cores()), "GPU": float(gpus)}], "this machine")
    return lambda study: fit(study, recipe)


def at_once(recipe: SweepRecipe, nodes: list[Mapping[str, float]], where: str) -> int:
    """How many trials run at the same time on such nodes. Raises AxiconError where not even one does."""
    fit = sum(_places(recipe, node) for node in nodes)
    if fit < (asked := recipe.at_once or 1):
        cpus, gpus = (max((node.get(name, 0) for node in nodes), default=0) for name in ("CPU", "GPU"))
        each = f"threads={recipe.threads}" + (f" gpus={recipe.gpus:g}" if recipe.gpus else "")
        raise AxiconError(
            f"{each} at_once={asked}: {where} has room for {fit} such trials at a time "
            f"({cpus:g} cores and {gpus:g} GPUs{' on a node' if len(nodes) > 1 else ''}); give less"
        )
    return recipe.at_once or fit


def _places(recipe: SweepRecipe, node: Mapping[str, float]) -> int:
    by_cpu = node.get("CPU", 0) // recipe.threads
    return int(by_cpu if not recipe.gpus else min(by_cpu, node.get("GPU", 0) // recipe.gpus))


def fit(study: Study, recipe: SweepRecipe) -> None:
    """Run trials until the study has no more. What went wrong is the study's `error`."""
    with (
        _quiet(),
        _ray(),
        _without_tales(),
        _standing_in(study.folder),
        tempfile.TemporaryDirectory(prefix="ax-tune-", ignore_cleanup_errors=True) as scratch,
    ):
        import ray
        from ray import tune

        from jobs.sweep_tune_calls import LOSSES, Asks, Ends, Link, Tells

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        most = at_once(recipe, nodes, "the cluster")
        resources: dict[str, float] = {"CPU": recipe.threads} | ({"GPU": recipe.gpus} if recipe.gpus else {})
        link = Link(study)
        tuner = tune.Tuner(
            tune.with_resources(trainable, resources),
            tune_config=tune.TuneConfig(
                search_alg=Asks(link),
                scheduler=_scheduler(study),
                num_samples=-1,
                max_concurrent_trials=most,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="sweep",
                storage_path=scratch,
                callbacks=[Tells(link)],
                stop=Ends(link),
                failure_config=tune.FailureConfig(max_failures=LOSSES),
                verbose=0,
            ),
        )
        with noted(study.ended_by):
            tuner.fit()


def trainable(config: dict[str, Any]) -> None:
    """What an actor does with one trial. Figures on the way are results, the last result is the ending."""
    from ray import tune

    from jobs.sweep_trial import run_trial
    from jobs.sweep_tune_calls import ENDED, FIGURES, STEP

    def step(number: int, metrics: Mapping[str, float]) -> None:
        tune.report({STEP: number, **metrics, FIGURES: dict(metrics)})

    tune.report({ENDED: run_trial(config, step)})


def _scheduler(study: Study) -> Any:
    """Judges trials by the first objective. It sees the steps of this run alone."""
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

    from jobs.sweep_tune_calls import Median

    recipe = study.plan.recipe
    metric, way = next(iter(study.plan.ranking.objectives.items()))
    judge: dict[str, Any] = {"time_attr": "training_iteration", "metric": metric, "mode": way}
    if recipe.scheduler == "asha":
        return ASHAScheduler(
            **judge, grace_period=recipe.grace, reduction_factor=recipe.reduction, max_t=1_000_000
        )
    if recipe.scheduler == "median":
        return Median(**judge, grace_period=recipe.grace, min_samples_required=3, hard_stop=True)
    return FIFOScheduler()


@contextlib.contextmanager
def _ray() -> Iterator[None]:
    """The cluster this job was submitted to, or a Ray of its own on this machine."""
    if submission() is not None:
        import ray

        ray.init(log_to_driver=debug(), logging_level=logging.ERROR)
        rearm()
        yield
        return
    metadata = cluster_file.read(None).metadata
    local = metadata.local.model_copy(update={"resources": {"CPU": cores()}})
    with cluster.local_ray(metadata.model_copy(update={"local": local}), debug=debug()):
        yield


@contextlib.contextmanager
def _without_tales() -> Iterator[None]:
    """Ray and Tune tell of a lost process in tracebacks, on standard output too; the study has a line."""
    if debug():
        yield
        return
    import ray.tune  # noqa: F401 - its loggers, before their levels
    from ray._private import worker

    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    printed, worker.print_to_stdstream = worker.print_to_stdstream, lambda *_, **__: None
    try:
        yield
    finally:
        worker.print_to_stdstream = printed


@contextlib.contextmanager
def _standing_in(folder: Path) -> Iterator[None]:
    """Simulated nodes share a disk: one of them removes a job's own folder when its last actor ends, and Tune
    asks where it is."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.chdir(before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Tune's settings, which it reads from the environment."""
    before = {name: os.environ.get(name) for name in QUIET}
    os.environ |= QUIET
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
