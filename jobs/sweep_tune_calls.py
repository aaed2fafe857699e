"""What Ray Tune calls: for settings, with results, and to ask whether it is over. All of it is the study's.

Tune writes what it is given into files, pickled, for a restore that never comes. So these classes have names
that can be imported, and what leads to the study is left out there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

from ray.tune import Callback, Stopper
from ray.tune.schedulers import MedianStoppingRule
from ray.tune.search import Searcher

from jobs.sweep_study import Study

STEP, FIGURES, ENDED = "axicon_step", "axicon_figures", "axicon_ended"
"""Keys of a trial's results: a step with its figures, or the last word."""
LOSSES = 2
"""How often a trial is begun again whose process was lost."""


class Link:
    """The way to the study, within this process."""

    def __init__(self, study: Study | None = None) -> None:
        self._study = study

    @property
    def study(self) -> Study:
        assert self._study is not None, "this came out of a file of Tune"
        return self._study

    def guarded(self, action: Callable[[], Any]) -> Any:
        """What goes wrong in a call from Tune is kept for the sweep: Tune has reports of its own for it."""
        try:
            return action()
        except BaseException as error:
            self.study.ended_by(error)
            return None

    def __reduce__(self) -> tuple[type[Self], tuple[()]]:
        return type(self), ()

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


class Asks(Searcher):
    """The study, as Tune asks for trials."""

    def __init__(self, link: Link) -> None:
        super().__init__()
        self.link = link

    def suggest(self, trial_id: str) -> Any:
        task = self.link.guarded(self.link.study.ask)
        if task is None and self.link.study.holds:
            return None  # Tune asks again
        return Searcher.FINISHED if task is None else task

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """The listener tells the study."""

    def save(self, checkpoint_path: str) -> None:
        """There is nothing that the ledger does not have."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing is ever restored from Tune's files."""


class Tells(Callback):
    """The study, told what Tune hears of trials."""

    def __init__(self, link: Link) -> None:
        self.link = link

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **more: Any) -> None:
        number, study = trial.config["trial"], self.link.study
        if study.trials[number].ended:
            return  # its process was lost behind its last word
        if ENDED in result:
            self.link.guarded(lambda: study.told(number, result[ENDED]))
        elif STEP in result:
            self.link.guarded(lambda: study.stepped(number, result[STEP], result[FIGURES]))

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **more: Any) -> None:
        number, study = trial.config["trial"], self.link.study
        if not study.trials[number].ended and study.error is None:
            self.link.guarded(lambda: study.stopped(number))

    def on_trial_recover(self, iteration: int, trials: Any, trial: Any, **more: Any) -> None:
        number = trial.config["trial"]
        self.link.guarded(lambda: self.link.study.say(f"{number} has lost its process and begins again"))

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **more: Any) -> None:
        number, study = trial.config["trial"], self.link.study
        reason = f"its process was lost {LOSSES + 1} times: {_lost(trial)}"
        self.link.guarded(lambda: study.told(number, {"status": "failed", "reason": reason}))


def _lost(trial: Any) -> str:
    error = trial.get_error() if hasattr(trial, "get_error") else None
    lines = str(error or "no reason is known").strip().splitlines()
    return lines[-1][:300]


class Median(MedianStoppingRule):
    """Tune's, which would look for the figure in a trial's last word too."""

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: Any) -> None:
        if self._metric in result:
            super().on_trial_complete(tune_controller, trial, result)


class Ends(Stopper):
    """Ends a trial with its last word, and all of them after something ended the sweep."""

    def __init__(self, link: Link) -> None:
        self.link = link

    def __call__(self, trial_id: str, result: Any) -> bool:
        return ENDED in result or self.stop_all()

    def stop_all(self) -> bool:
        return self.link.study.error is not None
