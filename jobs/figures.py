"""What is measured of a compressed model right after it was made: sizes, perplexity, speed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch

from axicon.data import join_rows, read_rows
from axicon.errors import AxiconError
from axicon.evaluate import perplexity
from axicon.evaluate.perplexity import cut_windows, tokenise
from axicon.model import checkpoint
from axicon.model.shards import open_weights
from axicon.recipe import CompressRecipe, EvaluateRecipe
from jobs.model_report import Bytes, Kind, ModelReport, PerplexityFigures, Speed, weight_bytes
from jobs.progress import Reporter
from jobs.record import measure_speed


def sizes(folder: Path, source: Path) -> Bytes:
    """Bytes of the weight files of both, and of the parts of the compressed one without the file's header."""
    parts = {"embedding": 0, "blocks": 0, "head": 0}
    for name, stored in open_weights(folder, {}).items():
        parts[_part(name)] += stored.entry.end - stored.entry.begin
    return Bytes.model_validate({"total": weight_bytes(folder), "dense_total": weight_bytes(source), **parts})


def _part(name: str) -> str:
    if "layers." in name or name.startswith("blocks."):
        return "blocks"
    return "embedding" if "embed" in name or "project_in" in name else "head"


@dataclass
class Measure:
    """What a recipe asks to be measured, and the reasons for what is not."""

    recipe: CompressRecipe
    source: Path
    text: str | None
    sizes: Bytes = field(default_factory=Bytes)

    @classmethod
    def of(cls, recipe: CompressRecipe, source: Path) -> Self:
        """Raises AxiconError for a text that is not there or too short, before the work."""
        if recipe.text is None:
            return cls(recipe, source, None)
        text = join_rows(read_rows(recipe.text, column=recipe.column))
        most = checkpoint.shape_of(source).max_positions
        if recipe.window > most:
            raise AxiconError(f"window={recipe.window}: the model knows {most} positions; give window={most}")
        cut_windows(tokenise(checkpoint.load_tokenizer(source), text), recipe.window, recipe.windows)
        return cls(recipe, source, text)

    def report(self, reason: str) -> ModelReport:
        """Nothing but sizes; the rest is null for `reason`, or because nobody asked."""
        speed = dict.fromkeys(Speed.figures, reason if self.recipe.measure else "measure=false")
        quality = "no text was given: axicon evaluate DIR text=FILE measures it"
        reasons = dict.fromkeys(PerplexityFigures.figures, quality if self.text is None else reason)
        return ModelReport(
            bytes=self.sizes,
            perplexity=PerplexityFigures(reason=reasons),
            tokens_per_s=Speed(reason=speed),
        )

    def run(self, folder: Path, reporter: Reporter) -> ModelReport:
        """Measure the finished model and write its report after each figure.

        What cannot be measured is said and has its reason in the report: the model is there all the same.
        """
        report = self.report("the run ended before it was measured")
        if self.text is not None:
            for figures in self._perplexities(folder, self.text, reporter):
                report = report.updated(perplexity=figures)
                report.write(folder)
        if self.recipe.measure:
            try:
                plain = EvaluateRecipe(model=str(folder), threads=torch.get_num_threads())
                speed = measure_speed(plain, folder, reporter)
            except AxiconError as error:
                speed = Speed(reason=dict.fromkeys(Speed.figures, str(error)))
                reporter.say(f"tokens per second were not measured: {error}")
            report = report.updated(tokens_per_s=speed)
            report.write(folder)
        return report

    def _perplexities(self, folder: Path, text: str, reporter: Reporter) -> Iterator[PerplexityFigures]:
        """Before compression and after, each with what is known by then."""
        recipe = self.recipe
        models: tuple[tuple[Kind, Path], ...] = (("dense", self.source), ("compressed", folder))
        for kind, path in models:
            try:
                decoder = checkpoint.load(path, dtype=getattr(torch, recipe.dtype))
                with reporter.track(f"perplexity, {kind}") as advance:

                    def said(done: int, total: int, value: float, tell: Any = advance) -> None:
                        tell(done, total, f"{value:.4f}")

                    measured = perplexity(
                        decoder,
                        checkpoint.load_tokenizer(path),
                        text,
                        window=recipe.window,
                        windows=recipe.windows,
                        progress=said,
                    )
                yield PerplexityFigures.of(measured, recipe.dtype, kind)
            except AxiconError as error:
                reporter.say(f"perplexity of the {kind} model was not measured: {error}")
                yield PerplexityFigures(reason={kind: str(error)})
            decoder = None  # type: ignore[assignment] # before the other one is read
