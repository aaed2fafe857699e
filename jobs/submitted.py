"""What is different when a verb runs as a job of a cluster: its log, and the cores it may use.

A log is whole lines. The first says what runs where, the last what came of it.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any, TypeVar

from axicon.errors import AxiconError
from axicon.model.presence import living, present
from axicon.recipe import ModelRecipe
from axicon.settings import Recipe

R = TypeVar("R", bound=Recipe)

_signs = contextlib.ExitStack()
atexit.register(_signs.close)

JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Where Ray tells the entrypoint of a job what it was submitted as."""
SUBMITTED_FROM = "AXICON_SUBMITTED_FROM"
"""The folder in which `axicon submit` was typed, where that is on the machine of the cluster."""
SESSION = Path("/proc/self/autogroup")
"""The weight of this process's session against others."""
WHOLE_LINES = {
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "NO_COLOR": "1",
    "COLUMNS": "110",
}
"""Without a terminal: no bars of libraries, which are one endless line in a file, and no colours."""


def submission() -> str | None:
    """The id this process was submitted under, or None when it is no job."""
    try:
        metadata = json.loads(os.environ.get(JOB_CONFIG, "{}"))["metadata"]
        return str(metadata["job_submission_id"])
    except (ValueError, KeyError, TypeError):
        return None


def stand_where_submitted() -> None:
    """Relative paths, however deep in a recipe, mean the same to a job as to whoever submitted it.

    Raises AxiconError where that folder is gone.
    """
    folder = os.environ.get(SUBMITTED_FROM)
    if folder is None or submission() is None:
        return
    try:
        os.chdir(folder)
    except OSError as error:
        raise AxiconError(
            f"{folder}: this was submitted from there ({error.strerror}); submit it from another folder"
        ) from None


def digest(verb: str, recipe: Any) -> str:
    """8 hex digits of a resolved recipe, given as plain data."""
    text = json.dumps([verb, recipe], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def keep_lines_whole() -> None:
    """Before anything imports what these variables are for; whoever set one of them meant it."""
    if not sys.stderr.isatty():
        for name, value in WHOLE_LINES.items():
            os.environ.setdefault(name, value)


def begin(verb: str, recipe: R) -> R:
    """Say what runs where, and leave the cores to a server of ours. Outside a job this does nothing.

    Returns the recipe with its threads pinned if it left them open and a server runs on this machine: with
    one thread each, neither waits for a core the other has (measured: a busy neighbour takes two threads from
    13 to 98 ms per step, one thread not at all).
    """
    name = submission()
    if name is None:
        return recipe
    node = os.environ.get("RAY_NODE_TYPE_NAME")
    place = f"{platform.node()}{f' ({node})' if node else ''}"
    said = f"axicon {verb}, job {name}, recipe {digest(verb, recipe.model_dump(mode='json'))}, on {place}"
    if isinstance(recipe, ModelRecipe):
        _signs.enter_context(present("job"))
        servers = living("server")
        if recipe.threads is not None:
            said += f", threads={recipe.threads}"
        elif servers:
            recipe = recipe.model_copy(update={"threads": 1})
            step_back()
            said += f", 1 thread: a server runs on this machine (process {servers[0]})"
        else:
            said += ", one thread per core"
    print(said, file=sys.stderr, flush=True)
    return recipe


def step_back() -> None:
    """Run only when no server wants the core, and give it back the moment one does.

    Priority alone does not do that: a thread that wakes up waits for the end of a slice. Threads started
    from here on are like this one. Ray runs its workers, a server's replica too, at 15 unless it is told
    otherwise, and a job at 0. Where Linux shares the cores between sessions first, a job has one of its own,
    since Ray starts it so, and what its threads are does not count outside of it: its session steps back too.
    """
    os.nice(19)
    if hasattr(os, "SCHED_IDLE"):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    with contextlib.suppress(OSError):  # no Linux, or one that does not group by session
        SESSION.write_text("19")


def succeeded(verb: str, seconds: float) -> None:
    """The last line of the log of a job. One that fails or is stopped ends with its reason."""
    if submission() is not None:
        print(f"{verb} finished after {seconds:.0f} s", file=sys.stderr, flush=True)
