"""What a sweep says to a person: a line per result, the best one so far, the way on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from axicon.settings import split_words
from jobs.shown import size
from jobs.sweep_ledger import Trial

if TYPE_CHECKING:
    from jobs.sweep_plan import Plan

OTHERS = 2
"""Figures beside the objectives in a line."""


def line_of(trial: Trial, plan: Plan, *, best: bool) -> str:
    """One line about a trial that has ended."""
    took = f" {trial.seconds:.1f} s" if trial.seconds is not None else ""
    what = figures(trial.metrics, [*plan.ranking.objectives, *plan.ranking.limits])
    if trial.status != "finished":
        what = f"{trial.reason}{f' ({what})' if what else ''}"
    elif not plan.ranking.within(trial):
        what += ", beyond a limit"
    mark = ", the best so far" if best else ""
    vary = {one.key for one in plan.space.parameters if one.kind != "choice" or len(one.values) > 1}
    told = settings({key: value for key, value in trial.settings.items() if key in vary})
    return f"{trial.trial} {trial.status}{took}: {what} | {told}{mark}"


def figures(metrics: Mapping[str, float], names: list[str]) -> str:
    """Some figures by name; all if there are few."""
    known = [name for name in dict.fromkeys(names) if name in metrics]
    return ", ".join(f"{name} {figure(name, metrics[name])}" for name in known)


def figure(name: str, value: float) -> str:
    if name.partition("/")[0] in ("bytes", "peak_memory"):
        return size(round(value))
    return f"{value:.4g}" if abs(value) < 10000 else f"{value:,.0f}"


def settings(values: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={word(value)}" for key, value in values.items())


def word(value: Any) -> str:
    """A value in few words: `gptq,awq`, `adamw(lr=0.001)`."""
    if isinstance(value, list | tuple):
        return ",".join(word(one) for one in value)
    if isinstance(value, Mapping):  # a method: its name, its settings in brackets
        inner = " ".join(f"{key}={word(one)}" for key, one in value.items() if key != "method")
        return f"{value.get('method', '')}{f'({inner})' if inner else ''}"
    return "none" if value is None else ",".join(split_words(value)) if isinstance(value, str) else str(value)


def so_far(trial: Trial | None, plan: Plan) -> str:
    """The best one, for a line that is written over."""
    if trial is None:
        return ""
    return f"best {trial.trial}: {figures(trial.metrics, list(plan.ranking.objectives))}"
