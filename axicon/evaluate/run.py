"""Run lm-eval tasks through lm-eval's own library, on its data or on files of the user.

`tasks/` beside this file defines the tasks that read local files. They bear the names, prompts and metrics of
lm-eval's own, so a figure from local files can stand beside a published one; with a data folder given they
win.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from axicon.errors import AxiconError

TASKS_DIR = Path(__file__).parent / "tasks"
BOOTSTRAP_ITERS = 1000
"""Resamples for the standard error of metrics that have no closed form; lm-eval's default takes minutes."""


def local_tasks() -> list[str]:
    """Names of the tasks that read local files."""
    return sorted(path.stem for path in TASKS_DIR.glob("*.yaml"))


class Tasks:
    """Tasks of lm-eval by name, found and their data loaded, so that a wrong name or file shows before the
    work.

    `data_dir` holds the files of the tasks in `local_tasks()`; without it their namesakes of the hub are
    meant. `include` are folders with further task files, whose Python runs here. Raises AxiconError for an
    unknown task and for data that cannot be had.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        data_dir: str | Path | None = None,
        include: Sequence[str | Path] = (),
    ) -> None:
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise AxiconError(f"lm-eval cannot be imported ({error}): pip install 'axicon[eval]'") from error
        if not names:
            raise AxiconError(f"no task named; those that read local files are {', '.join(local_tasks())}")
        self.names = list(names)
        self.local = data_dir is not None
        folders = [_folder("include", folder) for folder in include]
        metadata = None
        if data_dir is not None:
            metadata = {"data_dir": str(_folder("data", data_dir))}
            folders.insert(0, TASKS_DIR)
        with _quiet(), self._one_line():
            self._manager = TaskManager(include_path=folders, include_defaults=False, metadata=metadata)
            if not set(names) <= set(self._manager.all_tasks):  # reading all of lm-eval's own takes seconds
                self._manager = TaskManager(include_path=folders, metadata=metadata)
            self._check_names()
            self._loaded = self._manager.load(self.names)["tasks"]

    def run(
        self, lm: Any, *, limit: int | None = None, fewshot: int | None = None, seed: int = 1234
    ) -> dict[str, Any]:
        """Results as `lm_eval.simple_evaluate` gives them, plus the `task_hashes` of its command line.

        `lm` is an `lm_eval.api.model.LM`. `limit` takes the first so many documents of each task; `fewshot`
        is the number of worked examples of the tasks that do not fix it at 0; `seed` draws them.
        """
        import lm_eval

        self._check_examples(fewshot or 0)
        with _quiet(), _described_once():
            results = lm_eval.simple_evaluate(
                model=lm,
                tasks=self.names,
                task_manager=self._manager,
                num_fewshot=fewshot,
                limit=limit,
                bootstrap_iters=BOOTSTRAP_ITERS,
                random_seed=0,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
        results["task_hashes"] = {task: _task_hash(samples) for task, samples in results["samples"].items()}
        return dict(results)

    def _check_names(self) -> None:
        unknown = [name for name in self.names if name not in self._manager.all_tasks]
        if unknown:
            local = f"{', '.join(local_tasks())} read local files" + ("" if self.local else " with data=DIR")
            raise AxiconError(
                f"no task named {', '.join(unknown)}: {local}, `lm_eval ls tasks` lists lm-eval's own"
            )

    def _check_examples(self, fewshot: int) -> None:
        for name, task in self._loaded.items():
            if task.has_training_docs() and len(task.training_docs()) < fewshot:
                raise AxiconError(
                    f"num_fewshot={fewshot}: {name} has {len(task.training_docs())} training records to show"
                )

    @contextlib.contextmanager
    def _one_line(self) -> Iterator[None]:
        """Data that cannot be had is the user's to know in one line; anything else keeps its traceback."""
        try:
            yield
        except (OSError, LookupError, ValueError) as error:
            text = (str(error).splitlines() or [""])[0] or type(error).__name__
            ours = [name for name in self.names if name in local_tasks()]
            way_out = (
                f"; with data=DIR, {', '.join(ours)} can read local files" if ours and not self.local else ""
            )
            raise AxiconError(f"lm-eval cannot load {', '.join(self.names)}: {text}{way_out}") from error


def _folder(key: str, folder: str | Path) -> Path:
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise AxiconError(f"{key}={folder}: no such folder")
    return path


def _task_hash(samples: Sequence[dict[str, Any]]) -> str:
    parts = (sample["doc_hash"] + sample["prompt_hash"] + sample["target_hash"] for sample in samples)
    return hashlib.sha256("".join(parts).encode()).hexdigest()


@functools.cache
def _described(describe: Callable[[], str]) -> str:
    return describe()


@contextlib.contextmanager
def _described_once() -> Iterator[None]:
    """lm-eval puts torch's description of the machine into all results, which starts a dozen programs and
    takes seconds; it is the same as long as this process lives."""
    from torch.utils import collect_env

    describe = collect_env.get_pretty_env_info
    collect_env.get_pretty_env_info = functools.partial(_described, describe)
    try:
        yield
    finally:
        collect_env.get_pretty_env_info = describe


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval to errors: its notes speak of its own command line. No processes for standard errors."""
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
