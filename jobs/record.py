"""What `axicon evaluate` adds to the `report.json` of a model directory, and to its results about speed."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from axicon.errors import AxiconError
from axicon.recipe import Dtype, EvaluateRecipe
from jobs.manifest import Manifest
from jobs.model_report import FILE, Bytes, ModelReport, PerplexityFigures, Speed, weight_bytes
from jobs.progress import Reporter

if TYPE_CHECKING:
    from axicon.evaluate import Perplexity

SPEED_DTYPE: Dtype = "bfloat16"
"""Speed is measured as a model would be served, whatever its perplexity is computed in."""


def measure_speed(recipe: EvaluateRecipe, folder: Path, reporter: Reporter) -> Speed:
    """Tokens per second at 1 and 8 streams, greedy, in an engine of its own, with the recipe's compressor.

    A model too short for the prompts gets nulls and the reason.
    """
    import torch

    from axicon.compress.walk import Compress
    from axicon.evaluate import speed
    from axicon.generate.build import build_engine
    from axicon.model import checkpoint

    compressor = recipe.build_compressor(checkpoint.packed_formats(folder))
    engine = build_engine(
        str(folder),
        dtype=SPEED_DTYPE,
        threads=recipe.threads,
        transform=None if compressor is None else Compress(compressor),
    )
    conditions = (
        f"{processor()}, {torch.get_num_threads()} threads, {SPEED_DTYPE}, greedy, prompts of "
        f"{speed.PROMPT_TOKENS} tokens, {speed.NEW_TOKENS} new ones"
    )
    try:
        with reporter.track("speed") as advance:
            rates = speed.rates(engine, progress=advance)
    except speed.TooShort as reason:
        return Speed(reason=dict.fromkeys(Speed.figures, str(reason)), conditions=conditions)
    return Speed.model_validate(
        {str(rate.streams): round(rate.tokens_per_s, 2) for rate in rates} | {"conditions": conditions}
    )


def processor() -> str:
    """The processor's name, or its kind where the system has no name for it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return name or platform.machine()


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

    def add(self, recipe: EvaluateRecipe, measured: Perplexity | None, speed: Speed | None) -> str | None:
        """Write what was measured, and say in a line what became of it; None if nothing was to be written."""
        path = self.folder / FILE
        if measured is None and speed is None:
            return None
        if recipe.compressor is not None:
            return f"{path} stays as it is: the figures are of the model after compressor={_name(recipe)}"
        perplexity = None
        if measured is not None:
            kind = "compressed" if self.manifest.chain else "dense"
            perplexity = PerplexityFigures.of(measured, recipe.dtype, kind)  # type: ignore[arg-type]
        report = self.report.updated(bytes=self._bytes(), perplexity=perplexity, tokens_per_s=speed)
        try:
            report.write(self.folder)
        except OSError as error:
            return f"{path} was not updated: {error.strerror}"
        what = [name for name, one in (("perplexity", perplexity), ("tokens per second", speed)) if one]
        dropped = perplexity is not None and self._drops(perplexity)
        instead = "; the figures measured otherwise were replaced" if dropped else ""
        return f"{path} now holds {' and '.join(what)}{instead}"

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
