"""`start_from`: a finetuning run that begins where another one ended, with settings of its own.

Its folder is made as if it had taken the other's steps itself: their lines in its log, the checkpoint of a
rule that has one, what was evaluated. From there on it is a run like any other, and needs the other's folder
no longer. The first line of its log says of each earlier part how far it goes, by which settings, and the
digest of the log that it is from.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from axicon.errors import AxiconError
from axicon.finetune.checkpoint import TensorCheckpoints
from axicon.finetune.log import EARLIER, MACHINE, NAME, difference, first_line, head, read
from axicon.finetune.loop import is_scalar
from axicon.model.artefact import sha256, write_atomically
from jobs.finetune_work import EVALUATIONS, Job
from jobs.progress import Reporter

VARY = ("rule", "schedule", "batch", "shards", "data", "objective")
"""Facts of a log that may be others behind the step at which a run begins."""


def start(job: Job, parent: Path, folder: Path, reporter: Reporter) -> None:
    """Make the folder of a run that begins from what lies in `parent`; one that is made is only checked.

    Raises AxiconError for a parent without steps, one of another model, and one that is another by now.
    """
    parent = parent.expanduser().absolute()
    own = read(folder / NAME)[0] if (folder / NAME).exists() else {}
    if own:
        _check_same(own.get(EARLIER), parent, folder)
        return
    if parent == folder:
        raise AxiconError(f"start_from={parent} is the run's own folder; give another out=")
    if not (parent / NAME).exists():
        raise AxiconError(f"start_from={parent}: no run of axicon finetune lies there ({NAME} is missing)")
    header = read(parent / NAME)[0]
    if not header:
        raise AxiconError(f"start_from={parent}: no steps lie there")
    theirs, ours = (_unvarying(one) for one in (header, json.loads(json.dumps(job.facts()))))
    if theirs != ours:
        raise AxiconError(
            f"start_from={parent}: {difference(theirs, ours)}; a run goes on with the same model, rule and "
            "seed, under other settings of the rule, batch, data or schedule"
        )
    folder.mkdir(parents=True, exist_ok=True)
    scalar = is_scalar(job.rule)
    if not scalar:  # before its log is read: that has at least the steps of the checkpoint
        for name in (TensorCheckpoints(folder, 1).newest.name, TensorCheckpoints(folder, 1).best.name):
            _copy(parent / name, folder / name)
    taken = len(read(parent / NAME)[1]) if scalar else TensorCheckpoints(folder, 1).steps
    if not 0 < taken <= job.recipe.steps:
        how = f"{taken} steps were taken there; give steps={taken} or more" if taken else "no steps lie there"
        raise AxiconError(f"start_from={parent}: {how}")
    first, steps = head(parent / NAME, taken)
    facts = {"until": taken, "log": hashlib.sha256(first + steps).hexdigest()}
    if not scalar:
        facts["checkpoint"] = sha256(TensorCheckpoints(folder, 1).newest)
    earlier = [*header.get(EARLIER, ()), facts | {key: header[key] for key in VARY}]
    if (parent / EVALUATIONS).exists():
        kept = json.loads((parent / EVALUATIONS).read_text())
        kept["found"] = [one for one in kept["found"] if one["step"] <= taken]
        write_atomically(folder / EVALUATIONS, json.dumps(kept, indent=1))
    # The log last: it says that all the rest is there.
    write_atomically(folder / NAME, first_line(job.facts() | {EARLIER: earlier}) + steps)
    reporter.say(f"beginning behind step {taken} of the run in {parent}")


def _unvarying(header: Mapping[str, Any]) -> dict[str, Any]:
    """What both runs must have alike."""
    kept = {key: value for key, value in header.items() if key not in (*VARY, MACHINE, EARLIER, "axicon_log")}
    return {**kept, "rule": {"name": header["rule"]["name"]}}


def _check_same(earlier: Any, parent: Path, folder: Path) -> None:
    """A parent that has gone on since is the same; one that is gone cannot be asked."""
    if not earlier or not (parent / NAME).exists():
        return
    last = earlier[-1]
    first, steps = head(parent / NAME, last["until"])
    if hashlib.sha256(first + steps).hexdigest() != last["log"]:
        raise AxiconError(
            f"{folder / NAME} began from another run than lies in start_from={parent} now; give another out="
        )


def _copy(source: Path, target: Path) -> None:
    """Whole or not at all."""
    if source.exists():
        temporary = target.with_name(f".{target.name}.tmp")
        shutil.copyfile(source, temporary)
        temporary.replace(target)
    else:
        target.unlink(missing_ok=True)
