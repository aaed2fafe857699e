"""A finetuning run by the workers of Ray Train: the same function in each, agreeing on a few numbers a step.

Whoever resumes, the log says where. So Train is given no checkpoints: when a worker is lost, or their number
changes, it starts the function anew in all of them, and that reads the log.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from axicon.errors import AxiconError, RunFailed
from axicon.finetune.log import NAME, Log
from axicon.finetune.shards import Among
from jobs import cluster, cluster_file
from jobs.command import debug
from jobs.finetune_recipe import FinetuneRecipe
from jobs.finetune_work import EVALUATIONS, Evaluations, Job, threads_of
from jobs.progress import Reporter
from jobs.stop import rearm, unwrapped
from jobs.submitted import submission

FAILURES = 3
"""Losses of workers that a run survives."""


def fit(recipe: FinetuneRecipe, folder: Path, reporter: Reporter) -> None:
    """Return when the log in `folder` has all steps. Raises AxiconError where the run failed."""
    if recipe.shards < (most := max(recipe.workers, recipe.most_workers or 0)):
        raise AxiconError(f"workers: {most} of them want shards={most} or more, this run has {recipe.shards}")
    with _ray(most):
        from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
        from ray.train.torch import TorchConfig, TorchTrainer

        workers: Any = recipe.workers
        if recipe.most_workers is not None:
            workers = (recipe.workers, recipe.most_workers)
        trainer = TorchTrainer(
            loop,
            train_loop_config={"recipe": recipe.model_dump(mode="json"), "folder": str(folder)},
            torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"),
            scaling_config=ScalingConfig(num_workers=workers, use_gpu=torch.cuda.is_available()),
            run_config=RunConfig(
                name="run",
                storage_path=str(folder / "ray"),
                failure_config=FailureConfig(max_failures=FAILURES),
            ),
        )
        try:
            with _told(recipe, folder, reporter), unwrapped():
                trainer.fit()
        except TrainingFailedError as error:
            raise RunFailed(_reason(error)) from error


def loop(config: dict[str, Any]) -> None:
    """What every worker does."""
    import torch.distributed as dist

    recipe, folder = FinetuneRecipe.model_validate(config["recipe"]), Path(config["folder"])
    torch.set_num_threads(threads_of(recipe))
    job, mean = Job.of(recipe).begun_in(folder), Among(recipe.shards)
    first = mean.rank == 0
    if first:  # a line that a killed run left half written goes before the others read
        Log(folder / NAME, job.facts()).close()
    dist.barrier()
    job.run(job.model(), mean, folder, reporter=Reporter() if first else None)


@contextlib.contextmanager
def _ray(workers: int) -> Iterator[None]:
    """The cluster this job was submitted to, or a Ray of its own on this machine."""
    if submission() is not None:
        import ray

        ray.init()  # Train would, later
        rearm()
        yield
        return
    metadata = cluster_file.read(None).metadata
    local = metadata.local.model_copy(update={"resources": {"CPU": workers + 1}})
    metadata = metadata.model_copy(update={"local": local, "env": {**metadata.env, **QUICK}})
    with cluster.local_ray(metadata, debug=debug()):
        yield


QUICK = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2", "RAY_TRAIN_ENABLE_PRINT_PATCH": "0"}
"""Train looks at its workers every 2 s otherwise, and ends a run 10 s late."""


@contextlib.contextmanager
def _told(recipe: FinetuneRecipe, folder: Path, reporter: Reporter) -> Iterator[None]:
    """Says how long the log is, which another process writes."""
    done = threading.Event()

    def watch() -> None:
        with reporter.track("steps") as advance:
            while not done.wait(1.0):
                with contextlib.suppress(OSError, ValueError):
                    steps = (folder / NAME).read_bytes().count(b"\n") - 1
                    advance(steps, recipe.steps, _last(folder))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _last(folder: Path) -> str:
    found = Evaluations(folder / EVALUATIONS).found
    if not found:
        return ""
    one = found[-1]
    what = f"loss {one.loss:.4f}" if one.accuracy is None else f"accuracy {one.accuracy:.3f}"
    return f"{what} at {one.step}"


def _reason(error: Exception) -> str:
    """What a person can mend, from inside the tracebacks of workers."""
    _, found, text = str(error).rpartition("AxiconError: ")
    if not found:
        _, found, text = str(error).rpartition("RunFailed: ")
    line = (text if found else str(error)).strip().splitlines()
    return f"workers failed: {line[0] if line else type(error).__name__}; the steps taken are kept"
