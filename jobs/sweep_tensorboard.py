"""Files that TensorBoard reads: a folder for each trial, with its curves, and a row among its HParams."""

from __future__ import annotations

import shutil
from pathlib import Path

from jobs.sweep_ledger import Trial
from jobs.sweep_show import word

NAME = "tensorboard"


def write_events(folder: Path, trial: Trial) -> None:
    """Write all of a trial that has ended; what an earlier try of it left is replaced."""
    from tensorboardX import SummaryWriter
    from tensorboardX.summary import hparams

    place = folder / NAME / trial.trial
    shutil.rmtree(place, ignore_errors=True)
    with SummaryWriter(logdir=str(place)) as writer:
        for one in trial.steps:
            for name, value in one["metrics"].items():
                writer.add_scalar(name, value, one["step"])
        plain = {
            key: value if isinstance(value, bool | int | float | str) else word(value)
            for key, value in trial.settings.items()
        }
        last = trial.steps[-1]["step"] if trial.steps else 0
        # `add_hparams` would write beside the curves, as a run of its own.
        for part in hparams(plain, dict(trial.metrics)):
            writer.file_writer.add_summary(part)
        for name, value in trial.metrics.items():
            writer.add_scalar(name, value, last)
