"""A sweep at work: which trial is next, what became of each, and what is on disk of it.

It knows nothing of how trials run. Whoever runs them asks for the next one, says what it reports and how it
ended. Every answer and every ending is in the ledger first.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from axicon.errors import AxiconError, RunFailed
from axicon.model.artefact import write_atomically
from axicon.settings import unknown_key
from jobs.report import plain, write_json
from jobs.sweep_document import NAME, PAGE, document
from jobs.sweep_ledger import NAME as LEDGER
from jobs.sweep_ledger import Ledger, Trial
from jobs.sweep_page import render
from jobs.sweep_plan import Plan
from jobs.sweep_show import line_of
from jobs.sweep_tensorboard import write_events

CURVE = 200
"""Points of a learning curve that are kept."""
SURE = 2
"""Finished trials without a figure before it counts as one that no trial reports."""


class Study:
    """`with Study(plan, say) as study: while (task := study.ask()): study.told(task, result)`."""

    def __init__(self, plan: Plan, say: Callable[[str], None]) -> None:
        """Raises AxiconError for a folder with another sweep, saying what is different."""
        self.plan, self.say = plan, say
        self.folder = plan.folder
        path = self.folder / LEDGER
        plan.check_same(path)
        self.ledger = Ledger(path, plan.facts())
        self.trials = self.ledger.trials
        self.error: BaseException | None = None
        """Why no more trials are begun, where that is no good end."""
        self.waiting = [number for number, one in self.trials.items() if not one.ended]
        self.kept = len(self.trials) - len(self.waiting)
        self.reason: str | None = None
        self.cwd, self.page = os.getcwd(), True
        self.used_up = self.holds = False
        self.status, self.begun = "running", time.monotonic()
        self.started = min((one.started for one in self.trials.values()), default=now())
        self.changed: Callable[[], None] = lambda: None
        """Called after each event; a live line hangs here."""
        self.document()

    @property
    def over(self) -> bool:
        return self.error is not None or self.used_up

    @property
    def done(self) -> int:
        return sum(one.ended for one in self.trials.values())

    @property
    def best(self) -> Trial | None:
        return self.plan.ranking.best(list(self.trials.values()))

    def ended_by(self, error: BaseException) -> None:
        """Something ends the sweep: no more trials are begun, and who runs them is to stop."""
        self.error = self.error or error

    def ask(self) -> dict[str, Any] | None:
        """What to run next, as plain data with its number as `trial`; None: nothing more, or, where the study
        `holds`, nothing before some running trial has ended.

        First what an earlier run of the sweep had begun, then what the searcher suggests.
        """
        self.holds = False
        if self.error is not None:
            return None
        if self.waiting:
            old = self.trials[self.waiting.pop(0)]
            trial = Trial(old.trial, old.settings, "", parent=old.parent)
        else:
            number, before = len(self.trials) + 1, list(self.trials.values())
            if number > self.plan.wanted:
                return None
            population = self.plan.population
            if population is not None and not population.ready(number, before):
                self.holds = True
                return None
            settings = self.plan.searcher.suggest(number, before)
            if settings is None:
                if not self.used_up and self.plan.recipe.trials:
                    self.say(f"the space has no more than {number - 1} different trials")
                self.used_up = True
                return None
            parent = None if population is None else population.parent(number, before)
            trial = Trial(f"{number:04d}", settings, "", parent=parent)
        out = self.plan.out_of(trial.trial)
        recipe, problem = self.plan.trial_recipe(trial.settings, out, self.plan.segment(trial))
        trial.recipe_sha256 = sha256(self.plan.verb.name, recipe, out)
        trial.started = now()
        self.ledger.started(trial)
        if problem is not None:  # a combination that the verb refuses is a failed trial, and no work
            self.told(trial.trial, {"status": "failed", "reason": problem, "seconds": 0.0})
            return self.ask()
        self.document()
        return {
            "trial": trial.trial,
            "verb": self.plan.verb.name,
            "recipe": recipe,
            "log": f"{out}.log",
            "cwd": self.cwd,
        }

    def stepped(self, number: str, step: int, metrics: Mapping[str, float]) -> None:
        """A trial reports figures on its way."""
        trial = self.trials[number]
        before = [one for one in trial.steps if one["step"] < step]
        trial.steps = [*before, {"step": step, "metrics": dict(metrics)}]
        if len(trial.steps) > CURVE:
            trial.steps = [*trial.steps[:-1:2], trial.steps[-1]]
        self.document()

    def stopped(self, number: str) -> None:
        """The scheduler has ended a trial early."""
        trial = self.trials[number]
        last = trial.steps[-1] if trial.steps else {"step": 0, "metrics": {}}
        reason = f"ended early by {self.plan.recipe.scheduler} after step {last['step']}"
        self.told(number, {"status": "stopped", "reason": reason, "metrics": last["metrics"]})

    def told(self, number: str, result: Mapping[str, Any]) -> None:
        """A trial has ended. Raises AxiconError where the sweep ends with it, once all is on disk."""
        trial = self.trials[number]
        trial.status, trial.reason = result["status"], result.get("reason")
        figures = result.get("metrics", {})
        trial.metrics = {name: float(v) for name, v in figures.items() if math.isfinite(v)}
        seconds = result.get("seconds")
        trial.seconds = since(trial.started) if seconds is None else round(seconds, 3)
        trial.files = [self._within(path) for path in result.get("files", ())]
        trial.again = bool(result.get("again"))
        made = result.get("model")
        trial.serve = None if made is None else f"axicon serve {made}"
        self.ledger.ended(trial)
        best = self.best
        self.say(line_of(trial, self.plan, best=best is not None and best.trial == number))
        self.document()
        write_events(self.folder, trial)
        self._check(trial)

    def _within(self, path: str) -> str:
        with contextlib.suppress(ValueError):
            return str(Path(path).relative_to(self.folder))
        return path

    def _check(self, trial: Trial) -> None:
        if trial.again:
            raise RunFailed(
                f"trial {trial.trial}: {trial.reason}; {self.done} trials are kept in {self.folder}, free "
                "some space and run the same command"
            )
        failed = [one for one in self.trials.values() if one.status == "failed" and not one.again]
        most = self.plan.recipe.max_failures
        if len(failed) > most:
            raise RunFailed(
                f"{len(failed)} trials failed, more than max_failures={most}; the last one, {trial.trial}: "
                f"{failed[-1].reason}; mend that, or give max_failures={len(failed) + most} to go on"
            )
        self.check_objectives(SURE)

    def check_objectives(self, least: int = 1) -> None:
        """Raises AxiconError for a figure that none of at least so many finished trials has reported."""
        finished = [one for one in self.trials.values() if one.status == "finished"]
        known = sorted({name for one in finished for name in one.metrics})
        ranking = self.plan.ranking
        for key, names in (("objectives", ranking.objectives), ("limits", ranking.limits)):
            for name in names:
                if len(finished) >= least and name not in known:
                    hint = unknown_key(name, known).partition(": ")[2]
                    raise AxiconError(f"{key}.{name}: no trial reports it: {hint}")

    def document_now(self) -> dict[str, Any]:
        """What is known, as plain data."""
        return document(
            self.plan.about(),
            self.plan.ranking,
            list(self.trials.values()),
            status=self.status,
            reason=self.reason,
            started=self.started,
            updated=now(),
            seconds=round(time.monotonic() - self.begun, 3),
            wanted=self.plan.wanted,
        )

    def document(self) -> None:
        """Write it as `sweep.json` and as a page."""
        found = self.document_now()
        write_json(self.folder / NAME, found)
        try:
            page = render(found)
        except FileNotFoundError as error:  # parts of the page went with the folder of a job
            if self.page:
                self.say(f"the page is not made any more: {error.filename} is gone; {NAME} has everything")
            self.page = False
        else:
            write_atomically(self.folder / PAGE, page)
        self.changed()

    def close(self, status: str, reason: str | None = None) -> None:
        self.status, self.reason = status, reason
        # The ledger has everything; what is made from it must not hide why the sweep ended.
        with contextlib.suppress(AxiconError, OSError):
            self.document()
        self.ledger.close()


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def since(started: str) -> float:
    return round((datetime.now(UTC) - datetime.fromisoformat(started)).total_seconds(), 3)


def sha256(verb: str, recipe: Mapping[str, Any], out: Path) -> str:
    """Of a resolved recipe, wherever its result lies."""
    told = {key: value for key, value in recipe.items() if key != "out"}
    text = json.dumps([verb, plain(told)], sort_keys=True, ensure_ascii=False)
    text = text.replace(str(out.parent.parent), ".")
    return hashlib.sha256(text.encode()).hexdigest()
