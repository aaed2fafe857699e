"""`start_from` of a distillation: the examples by then, their step size and the moving sums of both."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from axicon.finetune.log import EARLIER, NAME, first_line
from axicon.model.artefact import sha256, write_atomically
from jobs.start_from import check_taken, copy_whole, earlier, parent_log

if TYPE_CHECKING:
    from jobs.distill import Job

EXPERTS, CHECKPOINT, JUDGED = "experts", "checkpoint.safetensors", "judged.json"
VARY = ("lr_data", "lr_alpha", "steps", "expert_epochs", "max_start", "batch", "momentum")
"""Facts of a log that may be others behind the iteration at which a run begins."""
SAME = (
    "a run goes on with the same data, experts, network and seed; what may be others are lr_data, lr_alpha "
    "and the walk of a student (steps, expert_epochs, max_start, batch, momentum)"
)


def start(job: Job, parent: Path, folder: Path) -> None:
    """Make the folder of a run that begins from what lies in `parent`; one that is made is only checked.

    Raises AxiconError for a parent without iterations, one of other data, and one that is another by now.
    """
    parent = parent.expanduser().absolute()
    header = parent_log(parent, folder, job.facts(), _alike, "distill", SAME)
    if header is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    copy_whole(parent / CHECKPOINT, folder / CHECKPOINT)
    made = job.kept()
    taken = made.iterations if made else 0
    check_taken(parent, taken, job.recipe.iterations, "iterations")
    parts, losses = earlier(parent, header, taken, VARY)
    parts[-1] = {**parts[-1], "checkpoint": sha256(folder / CHECKPOINT)}
    if job.recipe.experts.folder is None and (parent / EXPERTS).is_dir():
        # Each is an artefact of its own, that is looked at before it is taken.
        shutil.copytree(parent / EXPERTS, folder / EXPERTS, dirs_exist_ok=True)
    if (parent / JUDGED).exists():
        kept = json.loads((parent / JUDGED).read_text())
        kept["found"] = {at: found for at, found in kept["found"].items() if int(at) <= taken}
        write_atomically(folder / JUDGED, json.dumps(kept, indent=1))
    # The log last: it says that all the rest is there.
    write_atomically(folder / NAME, first_line(job.facts() | {EARLIER: parts}) + losses)
    job.reporter.say(f"beginning behind iteration {taken} of the run in {parent}")


def _alike(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in facts.items() if key not in VARY}
