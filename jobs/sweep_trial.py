"""One trial: the verb's own `run`, in whichever process, with plain data going in and coming out."""

from __future__ import annotations

import errno
import os
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from axicon.errors import AxiconError
from jobs.progress import Reporter
from jobs.report import plain
from jobs.sweep_ledger import FULL
from jobs.sweep_verbs import verb_of

Step = Callable[[int, Mapping[str, float]], None]
"""Called with a step and the figures at it. It may end the trial by an exception that is no Exception."""


class Listening(Reporter):
    """Writes into the trial's log, and hands figures on."""

    def __init__(self, stream: TextIO, step: Step) -> None:
        super().__init__(stream)
        self.step = step

    def figures(self, step: int, metrics: Mapping[str, float]) -> None:
        self.step(step, metrics)


def run_trial(task: Mapping[str, Any], step: Step = lambda number, metrics: None) -> dict[str, Any]:
    """Run the recipe of a task: `verb`, `recipe` as plain data, and `log`, a file for what the verb says.

    Returns what is to be kept of it: status, metrics, reason, seconds, files, the model it made, and whether
    it failed for want of room (`again`). An error of the verb is a result too.
    """
    clock, log = time.perf_counter(), Path(task["log"])
    log.parent.mkdir(parents=True, exist_ok=True)
    if os.path.isdir(task.get("cwd", "")):
        os.chdir(task["cwd"])  # Ray starts it elsewhere, and paths of a recipe may be relative
    result: dict[str, Any] = {"status": "finished", "reason": None, "metrics": {}, "files": [], "model": None}
    with log.open("a") as stream:
        try:
            verb = verb_of(task["verb"])
            recipe = verb.recipe.parse(**task["recipe"])
            report = verb.run(recipe, Listening(stream, step))
            made = verb.served(Path(task["recipe"]["out"]))
            metrics = {name: v for name, v in plain(report.metrics).items() if v is not None}
            result |= {
                "metrics": {**metrics, **verb.derived(metrics)},
                "files": [str(path) for path in report.files],
                "model": None if made is None else str(made),
            }
        except Exception as error:
            traceback.print_exc(file=stream)
            result |= {"status": "failed", "reason": _told(error), "again": _no_room(error)}
    return result | {"seconds": time.perf_counter() - clock}


def _told(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, AxiconError) else f"{type(error).__name__}: {text}"[:500]


def _no_room(error: BaseException | None) -> bool:
    """Whether a full disk is behind it, or an error that is told so."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (*FULL, errno.EIO):
            return True
        error = error.__cause__ or error.__context__
    return False
