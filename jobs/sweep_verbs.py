"""What a sweep knows of the verbs whose recipes it tries."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from axicon.errors import AxiconError
from axicon.settings import Recipe
from jobs.progress import Reporter
from jobs.report import Report

Run = Callable[[Any, Reporter], Report]


@dataclass(frozen=True, kw_only=True)
class GoesOn:
    """How a run of a verb begins where another one has ended, under other settings."""

    start: str
    """The setting that names the other one's folder."""
    steps: str
    """The setting that says how many steps there are in all."""
    varies: tuple[str, ...]
    """Patterns of settings that may be others."""
    fixed: Mapping[str, Any]
    """Settings that such trials must have."""
    needs: Mapping[str, tuple[Any, str]]
    """Settings that a base must have, each with why."""


@dataclass(frozen=True, kw_only=True)
class Verb:
    name: str
    recipe: type[Recipe]
    run: Run
    """The verb's own, as the command line calls it."""
    tables: Mapping[str, Mapping[str, type[Any]]]
    """Methods by name, of the settings that name one."""
    objectives: Mapping[str, str]
    """What is good where nothing is said: figure, and min or max."""
    check: Callable[[Any], None] = lambda recipe: None
    """Raises AxiconError for a recipe whose methods or settings do not exist."""
    derived: Callable[[Mapping[str, float]], Mapping[str, float]] = lambda metrics: {}
    """Figures that follow from those of the report."""
    has_steps: bool = False
    """Whether a run reports figures on its way, by which it may be ended early."""
    goes_on: GoesOn | None = None
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Settings that a trial must have, whatever the base says. They change no result."""
    served: Callable[[Path], Path | None] = lambda out: None
    """The model that a run with this `out` has made."""


def verb_of(name: str) -> Verb:
    """Raises AxiconError for a verb that no sweep can try."""
    if name not in VERBS:
        near = difflib.get_close_matches(name, VERBS, n=1)
        hint = f"did you mean {near[0]!r}" if near else f"sweeps try {', '.join(VERBS)}"
        raise AxiconError(f"verb={name}: {hint}")
    return VERBS[name]()


def _compress() -> Verb:
    from axicon.compress import COMPRESSORS
    from axicon.recipe import CompressRecipe
    from jobs import compress

    return Verb(
        name="compress",
        recipe=CompressRecipe,
        run=compress.run,
        tables={"compressor": COMPRESSORS, "chain": COMPRESSORS},
        objectives={"perplexity": "min", "bytes": "min"},
        check=lambda recipe: void(compress.build(recipe)),
        derived=perplexity_ratio,
        served=lambda out: out,
    )


def _evaluate() -> Verb:
    from axicon.compress import COMPRESSORS
    from axicon.recipe import EvaluateRecipe
    from jobs import evaluate

    return Verb(
        name="evaluate",
        recipe=EvaluateRecipe,
        run=evaluate.run,
        tables={"compressor": COMPRESSORS},
        objectives={"perplexity": "min"},
        check=lambda recipe: void(recipe.build_compressor()),
    )


def _finetune() -> Verb:
    from axicon.compress import COMPRESSORS
    from axicon.finetune.objectives import OBJECTIVES
    from axicon.finetune.updates import UPDATE_RULES
    from axicon.model.adapters import SCHEMES
    from jobs import finetune
    from jobs.finetune_recipe import FinetuneRecipe

    tables: dict[str, Mapping[str, type[Any]]] = {
        "rule": UPDATE_RULES,
        "scheme": SCHEMES,
        "compressor": COMPRESSORS,
        "objective": OBJECTIVES,
    }

    def check(recipe: FinetuneRecipe) -> None:
        recipe.rule.build(UPDATE_RULES, "rule")
        recipe.scheme.build(SCHEMES, "scheme")

    return Verb(
        name="finetune",
        recipe=FinetuneRecipe,
        run=finetune.run,
        tables=tables,
        objectives={"loss_after": "min"},
        check=check,
        has_steps=True,
        goes_on=GoesOn(
            start="start_from",
            steps="steps",
            varies=("rule.*", "batch"),
            fixed={"keep": "last"},  # the step that the next one begins from is the one that is judged
            needs={
                "start_from": (None, "decides itself what trials begin from"),
                "schedule.kind": ("constant", "does not know at a step how the whole run will go"),
            },
        ),
        fixed={"workers": 0, "most_workers": None},  # a trial is one process: Train within Tune leaks
        served=merged_result,
    )


def _distill() -> Verb:
    from axicon.distill.networks import NETWORKS
    from jobs import distill
    from jobs.distill_recipe import DistillRecipe
    from jobs.distill_start import VARY

    return Verb(
        name="distill",
        recipe=DistillRecipe,
        run=distill.run,
        tables={"network": NETWORKS},
        objectives={"accuracy": "max"},
        check=lambda recipe: void(recipe.network.build(NETWORKS, "network")),
        has_steps=True,
        goes_on=GoesOn(
            start="start_from",
            steps="iterations",
            varies=VARY,
            fixed={},
            needs={"start_from": (None, "decides itself what trials begin from")},
        ),
        fixed={"workers": 0},
    )


def perplexity_ratio(metrics: Mapping[str, float]) -> dict[str, float]:
    """Beside the dense model's, which a limit can be set on without knowing that."""
    both = metrics.get("perplexity"), metrics.get("dense/perplexity")
    return {} if both[0] is None or not both[1] else {"perplexity_ratio": both[0] / both[1]}


def void(value: object) -> None:
    """What was made was only to be tried."""


def merged_result(out: Path) -> Path | None:
    """The model of a finetuning run; an adapter is none that can be served."""
    from axicon.model.artefact import read_manifest

    result = out / "result"
    manifest = read_manifest(result) if result.is_dir() else None
    return result if manifest is not None and manifest.get("kind") == "model" else None


VERBS: dict[str, Callable[[], Verb]] = {
    "compress": _compress,
    "distill": _distill,
    "evaluate": _evaluate,
    "finetune": _finetune,
}
"""Modules of verbs are slow to import, so each is only with its verb."""
