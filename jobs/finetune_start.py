"""`start_from` of finetuning: the checkpoint of a rule that has one, and what was evaluated, come along."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from axicon.finetune.checkpoint import TensorCheckpoints
from axicon.finetune.log import EARLIER, NAME, first_line, read
from axicon.finetune.loop import is_scalar
from axicon.model.artefact import sha256, write_atomically
from jobs.finetune_work import EVALUATIONS, Job
from jobs.progress import Reporter
from jobs.start_from import check_taken, copy_whole, earlier, parent_log

VARY = ("rule", "schedule", "batch", "shards", "data", "objective")
"""Facts of a log that may be others behind the step at which a run begins."""
SAME = (
    "a run goes on with the same model, rule and seed, under other settings of the rule, batch, data or "
    "schedule"
)


def start(job: Job, parent: Path, folder: Path, reporter: Reporter) -> None:
    """Make the folder of a run that begins from what lies in `parent`; one that is made is only checked.

    Raises AxiconError for a parent without steps, one of another model, and one that is another by now.
    """
    parent = parent.expanduser().absolute()
    header = parent_log(parent, folder, job.facts(), _alike, "finetune", SAME)
    if header is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    scalar = is_scalar(job.rule)
    if not scalar:  # before its log is read: that has at least the steps of the checkpoint
        for name in (TensorCheckpoints(folder, 1).newest.name, TensorCheckpoints(folder, 1).best.name):
            copy_whole(parent / name, folder / name)
    taken = len(read(parent / NAME)[1]) if scalar else TensorCheckpoints(folder, 1).steps
    check_taken(parent, taken, job.recipe.steps, "steps")
    parts, steps = earlier(parent, header, taken, VARY)
    if not scalar:
        parts[-1] = {**parts[-1], "checkpoint": sha256(TensorCheckpoints(folder, 1).newest)}
    if (parent / EVALUATIONS).exists():
        kept = json.loads((parent / EVALUATIONS).read_text())
        kept["found"] = [one for one in kept["found"] if one["step"] <= taken]
        write_atomically(folder / EVALUATIONS, json.dumps(kept, indent=1))
    # The log last: it says that all the rest is there.
    write_atomically(folder / NAME, first_line(job.facts() | {EARLIER: parts}) + steps)
    reporter.say(f"beginning behind step {taken} of the run in {parent}")


def _alike(facts: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in facts.items() if key not in VARY}
    return {**kept, "rule": {"name": facts["rule"]["name"]}}
