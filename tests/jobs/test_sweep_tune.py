"""What of a sweep on Ray can be known without Ray: whether its trials fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from axicon.errors import AxiconError
from jobs.sweep_recipe import SweepRecipe
from jobs.sweep_tune import at_once, runner

NODES = [{"CPU": 0.0}, {"CPU": 8.0}, {"CPU": 8.0, "GPU": 1.0}]


@pytest.mark.parametrize(
    ("settings", "fit"),
    [({}, 16), ({"threads": 3}, 4), ({"threads": 4, "gpus": 0.5}, 2), ({"gpus": 1}, 1), ({"at_once": 5}, 5)],
)
def test_as_many_at_once_as_fit_on_the_nodes(settings: dict[str, Any], fit: int) -> None:
    assert at_once(SweepRecipe.parse(**settings), NODES, "the cluster") == fit


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"threads": 9},
            r"threads=9 at_once=1: the cluster has room for 0 .* \(8 cores and 1 GPUs on a node\)",
        ),
        ({"gpus": 2}, "threads=1 gpus=2 at_once=1: the cluster has room for 0"),
        (
            {"threads": 8, "at_once": 3},
            "threads=8 at_once=3: the cluster has room for 2 such trials at a time",
        ),
    ],
)
def test_what_fits_nowhere_is_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(AxiconError, match=says):
        at_once(SweepRecipe.parse(**settings), NODES, "the cluster")


def test_the_median_goes_over_trials_that_have_had_their_last_word() -> None:
    """Which has no figure; Tune's own rule falls over it and takes the sweep along."""
    from ray.tune.schedulers import TrialScheduler

    from jobs.sweep_tune_calls import ENDED, Median

    rule = Median(
        metric="loss", mode="min", time_attr="training_iteration", grace_period=1, min_samples_required=2,
        hard_stop=True,
    )  # fmt: skip
    tune: Any = Mock(get_live_trials=list)

    a, b, c, d = (Mock(trial_id=name) for name in "abcd")

    def tell(trial: Any, iteration: int, loss: float) -> str:
        return rule.on_trial_result(tune, trial, {"training_iteration": iteration, "loss": loss})

    for trial in (a, b):
        assert tell(trial, 1, 1.0) == tell(trial, 2, 1.0) == TrialScheduler.CONTINUE
        last = {"training_iteration": 3, ENDED: {"status": "finished"}}
        assert rule.on_trial_result(tune, trial, last) == TrialScheduler.CONTINUE
        rule.on_trial_complete(tune, trial, last)
    assert {tell(c, 1, 0.5), tell(c, 2, 0.5), tell(c, 3, 0.5)} == {TrialScheduler.CONTINUE}
    assert (tell(c, 4, 0.5), tell(d, 1, 2.0)) == (TrialScheduler.CONTINUE, TrialScheduler.STOP)


def test_this_machine_is_asked_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(AxiconError, match="threads=1024 at_once=1: this machine has room for 0"):
        runner(SweepRecipe.parse(threads=1024, out=tmp_path / "s"))
    assert not list(tmp_path.iterdir())
