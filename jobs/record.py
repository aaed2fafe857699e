"""What `axicon evaluate` adds to the `report.json` of a model directory, and to its results about speed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from axicon.errors import AxiconError
from axicon.evaluate.card import Better, Kind
from axicon.evaluate.serving import Serving
from axicon.recipe import EvaluateRecipe
from jobs.card_file import Card, put_serving
from jobs.manifest import Manifest
from jobs.model_report import FILE, Bytes, ModelReport, PerplexityFigures, Speed, weight_bytes
from jobs.progress import Reporter

if TYPE_CHECKING:
    from axicon.evaluate import Perplexity


@dataclass(frozen=True, kw_only=True)
class TaskFigure:
    """One metric of one task, as a row of a card."""

    name: str
    value: float
    stderr: float | None
    better: Better | None
    basis: dict[str, Any]


def task_figures(results: Mapping[str, Any], dtype: str) -> Iterator[TaskFigure]:
    """Of results of lm-eval: `sst2/acc` and so on."""
    for task, scores in results.get("results", {}).items():
        for (metric, filtered), value in figures(scores):
            error = scores.get(f"{metric}_stderr,{filtered}")
            higher = results.get("higher_is_better", {}).get(task, {}).get(metric)
            yield TaskFigure(
                name=f"{task}/{metric_name((metric, filtered))}",
                value=value,
                stderr=error if isinstance(error, float) and math.isfinite(error) else None,
                better=None if higher is None else "higher" if higher else "lower",
                basis=questions(results, task) | {"dtype": dtype},
            )


def questions(results: Mapping[str, Any], task: str) -> dict[str, Any]:
    """What two scores of a task must share; the hash is over questions and prompts."""
    asked = results.get("n-samples", {}).get(task, {})
    return {
        "examples shown": results.get("n-shot", {}).get(task),
        "questions": asked.get("effective"),
        "prompts": results.get("task_hashes", {}).get(task),
    }


def figures(scores: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str], float]]:
    """((metric, filter), value) of one task, without the standard errors."""
    for key, value in scores.items():
        metric, comma, filtered = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
            yield (metric, filtered), float(value)


def metric_name(key: tuple[str, str]) -> str:
    metric, filtered = key
    return metric if filtered == "none" else f"{metric} ({filtered})"


def measure_speed(recipe: EvaluateRecipe, folder: Path, reporter: Reporter) -> Serving:
    """How fast it is when it is served, with the recipe's compressor, in a process of its own."""
    from axicon.evaluate import serving
    from axicon.model import checkpoint
    from axicon.model.adapterfile import locate

    base = locate(folder).base
    compressor = recipe.build_compressor(checkpoint.packed_formats(base), checkpoint.shape_of(base))
    with reporter.track("speed") as advance:
        return serving.measure(folder, threads=recipe.threads, compressor=compressor, progress=advance)


@dataclass(frozen=True)
class Record:
    """The report beside a model that is about to be measured."""

    folder: Path
    manifest: Manifest
    report: ModelReport

    @classmethod
    def open(cls, folder: Path) -> Record | None:
        """None for a directory without a manifest of ours. Raises AxiconError for one that cannot be read, so
        that this shows before the work.
        """
        manifest = Manifest.read(folder)
        return None if manifest is None else cls(folder, manifest, ModelReport.read(folder))

    def add(
        self,
        recipe: EvaluateRecipe,
        measured: Perplexity | None,
        results: Mapping[str, Any],
        served: Serving | None,
    ) -> str | None:
        """Write what was measured, and say in a line what became of it; None if nothing was to be written."""
        path = self.folder / FILE
        figures = list(task_figures(results, recipe.dtype)) if self.manifest.chain else []
        if measured is None and served is None and not figures:
            return None
        if recipe.compressor is not None:
            return f"{path} stays as it is: the figures are of the model after compressor={_name(recipe)}"
        kind: Kind = "compressed" if self.manifest.chain else "dense"
        perplexity = None if measured is None else PerplexityFigures.of(measured, recipe.dtype, kind)
        speed = None if served is None else Speed.of(served)
        report = self.report.updated(bytes=self._bytes(), perplexity=perplexity, tokens_per_s=speed)
        try:
            report.write(self.folder)
            self._add_to_card(figures, served)
        except OSError as error:
            return f"{path} was not updated: {error.strerror}"
        pairs = (("perplexity", perplexity), ("tokens per second", speed), ("tasks", figures))
        dropped = perplexity is not None and self._drops(perplexity)
        instead = "; the figures measured otherwise were replaced" if dropped else ""
        return f"{path} now holds {' and '.join(name for name, one in pairs if one)}{instead}"

    def _add_to_card(self, figures: Sequence[TaskFigure], served: Serving | None) -> None:
        """The rest of it, beside what the report has now. Raises OSError."""
        card = Card.of(self.folder)
        if card is None:
            return
        for one in figures:
            card.put(one.name, "compressed", one.value, one.basis, stderr=one.stderr, better=one.better)
        if served is not None:
            put_serving(card, "compressed", served)
        card.write()

    def _bytes(self) -> Bytes:
        known, total = self.report.bytes, weight_bytes(self.folder)
        if known.total == total:
            return known
        if not self.manifest.chain:
            return Bytes(total=total, dense_total=total)
        return Bytes(total=total, reason={"dense_total": "the command that compressed it did not say"})

    def _drops(self, new: PerplexityFigures) -> bool:
        old = self.report.perplexity
        return old.basis() != new.basis() and any(old.get(name) is not None for name in old.figures)


def _name(recipe: EvaluateRecipe) -> str:
    return "none" if recipe.compressor is None else recipe.compressor.method


def speed_of(results: Mapping[str, Any]) -> Speed | None:
    """The speed in the `axicon` part of a results file. Raises AxiconError."""
    stored = results.get("tokens_per_s")
    if stored is None:
        return None
    try:
        return Speed.model_validate(stored)
    except ValueError as error:
        raise AxiconError(f"tokens_per_s: {str(error).splitlines()[-1].strip()}") from None
