"""Run lm-eval tasks through lm-eval's own library, on its data or on files of the user.

`tasks/` beside this file defines the tasks that read local files. They bear the names, prompts and metrics of
lm-eval's own, so a figure from local files can stand beside a published one; with a data folder given they
take precedence.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from axicon.errors import AxiconError

TASKS_DIR = Path(__file__).parent / "tasks"
BOOTSTRAP_ITERS = 1000
"""Resamples for the standard error of metrics that have no closed form; lm-eval's default takes minutes."""


def local_tasks() -> list[str]:
    """Names of the tasks that read local files."""
    return sorted(path.stem for path in TASKS_DIR.glob("*.yaml"))


def run_tasks(
    lm: Any,
    tasks: Sequence[str],
    *,
    data_dir: str | Path | None = None,
    include: Sequence[str | Path] = (),
    limit: int | None = None,
    fewshot: int | None = None,
    seed: int = 1234,
    log_samples: bool = True,
) -> dict[str, Any]:
    """Results as `lm_eval.simple_evaluate` gives them, plus `task_hashes` as lm-eval's command line adds
    them.

    `lm` is an `lm_eval.api.model.LM`. `include` are folders with further task files, whose Python runs here.
    `limit` takes the first so many documents of each task; `fewshot` sets the number of worked examples of
    tasks that do not fix it at 0. Raises AxiconError for an unknown task and for data that cannot be had.
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise AxiconError(f"lm-eval cannot be imported ({error}): pip install 'axicon[eval]'") from error
    if not tasks:
        raise AxiconError(f"no task named; those that read local files are {', '.join(local_tasks())}")
    if data_dir is not None and not Path(data_dir).expanduser().is_dir():
        raise AxiconError(f"data={data_dir}: no such folder")
    for folder in include:
        if not Path(folder).expanduser().is_dir():
            raise AxiconError(f"include={folder}: no such folder")
    ours = data_dir is not None
    folders = [*([TASKS_DIR] if ours else []), *(Path(folder).expanduser() for folder in include)]
    with _quiet():
        metadata = {"data_dir": str(data_dir)} if ours else None
        manager = TaskManager(include_path=folders, include_defaults=False, metadata=metadata)
        if not set(tasks) <= set(manager.all_tasks):  # reading all of lm-eval's own takes seconds
            manager = TaskManager(include_path=folders, metadata=metadata)
        _check_names(tasks, manager, ours)
        try:
            results = lm_eval.simple_evaluate(
                model=lm,
                tasks=list(tasks),
                task_manager=manager,
                num_fewshot=fewshot,
                limit=limit,
                bootstrap_iters=BOOTSTRAP_ITERS,
                log_samples=log_samples,
                random_seed=0,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
        except AxiconError:
            raise
        except (OSError, ConnectionError, KeyError, ValueError) as error:
            raise AxiconError(_reason(tasks, ours, error)) from error
    results["task_hashes"] = {
        task: _task_hash(samples) for task, samples in results.get("samples", {}).items()
    }
    return dict(results)


def _check_names(tasks: Sequence[str], manager: Any, ours: bool) -> None:
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        hint = "" if ours else "; tasks on local files need data=DIR"
        raise AxiconError(
            f"no task named {', '.join(unknown)}: local files serve {', '.join(local_tasks())}, "
            f"`lm_eval ls tasks` lists lm-eval's own{hint}"
        )


def _reason(tasks: Sequence[str], ours: bool, error: Exception) -> str:
    text = (str(error).splitlines() or [""])[0] or type(error).__name__
    local = sorted(set(tasks) & set(local_tasks()))
    way_out = f"; with data=DIR, {', '.join(local)} can read local files" if local and not ours else ""
    return f"lm-eval could not run {', '.join(tasks)}: {text}{way_out}"


def _task_hash(samples: Sequence[dict[str, Any]]) -> str:
    parts = (sample["doc_hash"] + sample["prompt_hash"] + sample["target_hash"] for sample in samples)
    return hashlib.sha256("".join(parts).encode()).hexdigest()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval to errors: its notes speak of its own command line. No worker processes for standard
    errors."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before
