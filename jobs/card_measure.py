"""The measurements of a quality card, for one of its two models or for both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from axicon.errors import AxiconError
from axicon.evaluate import agreement, outliers, serving
from axicon.evaluate.answered import Answered
from axicon.evaluate.card import Kind, expected
from axicon.evaluate.run import Tasks
from axicon.evaluate.serving import Serving
from axicon.model import checkpoint
from axicon.model.cachedir import cache_dir
from axicon.model.machine import cores
from axicon.recipe import Dtype, EvaluateRecipe
from jobs.card_file import Card, perplexity_basis, put_serving
from jobs.card_recipe import CardRecipe
from jobs.evaluate import Subject, identity, measure_perplexity, measure_tasks
from jobs.model_report import PerplexityFigures
from jobs.progress import Reporter
from jobs.record import task_figures
from jobs.submitted import digest

ANSWERS = "answers"
"""Folder of the cache."""
WATCHED = "outputs of blocks, attention, second MLP product and norms"
SERVED = ("tokens_per_s/", "first_token", "peak_memory", "agreement/")
"""Beginnings of the names of rows that `measure_serving` fills."""
TEXTS = Answered.key("continuations", [agreement.prompts_sha256(), agreement.NEW_TOKENS, serving.DTYPE])


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What of quality is measured of both models."""

    text: str | None = None
    window: int = 2048
    windows: int | None = None
    tasks: Tasks | None = None
    limit: int | None = None
    dtype: Dtype = "bfloat16"
    threads: int | None = None
    activations: bool = True

    @classmethod
    def of(cls, recipe: CardRecipe, text: str | None, tasks: Tasks | None) -> Self:
        return cls(
            text=text, window=recipe.window, windows=recipe.windows, tasks=tasks, limit=recipe.limit,
            dtype=recipe.dtype, threads=recipe.threads,
        )  # fmt: skip

    @property
    def something(self) -> bool:
        return self.text is not None or self.tasks is not None or self.activations

    def rows(self, step: str) -> list[str]:
        """Names of the rows that a step of `measure_quality` fills."""
        if step != "tasks":
            return [name for name in expected() if name.startswith(step)]
        return [name for name in expected() if self.tasks and name.partition("/")[0] in self.tasks.names]

    def recipe(self, place: Path) -> EvaluateRecipe:
        names = () if self.tasks is None else tuple(self.tasks.names)
        return EvaluateRecipe(
            model=str(place), dtype=self.dtype, compressor=None, threads=self.threads, window=self.window,
            windows=self.windows, tasks=names, limit=self.limit, num_fewshot=0 if names else None,
        )  # fmt: skip


def measure_serving(card: Card, places: Mapping[Kind, Path], asked: Asked, reporter: Reporter) -> None:
    """Speed, memory and greedy texts of both, one after the other: speeds compare within a run."""
    for kind, place in places.items():
        try:
            with reporter.track(f"speed, {kind}") as advance:
                found = serving.measure(place, threads=asked.threads, progress=advance)
        except AxiconError as error:
            reporter.say(f"speed and greedy texts of the {kind} model were not measured: {error}")
            for name in card.rows:
                if name.startswith(SERVED):
                    card.why_not(name, kind, str(error))
            continue
        put_serving(card, kind, found)
        known = _answers(place, "bfloat16", asked.threads)
        known.put(TEXTS, found.continuations)
        known.write()
        if kind == "compressed":
            _put_agreement(card, asked, found)


def _put_agreement(card: Card, asked: Asked, found: Serving) -> None:
    basis = {
        "prompts": len(agreement.PROMPTS),
        "sha256": agreement.prompts_sha256(),
        "tokens": agreement.NEW_TOKENS,
        "dtype": serving.DTYPE,
        "dense": card.base.sha256,
    }
    dense = dense_texts(card, asked)
    why = found.reason.get("continuations", "the dense model's greedy texts are not known")
    both = dense and found.continuations
    result = (
        agreement.agreement(*([text for _, text in one] for one in (dense, found.continuations)))
        if both
        else None
    )
    for name in ("prefix", "equal"):
        value = None if result is None else getattr(result, name)
        card.put(f"agreement/{name}", "compressed", value, basis, reason=why)
        card.put(
            f"agreement/{name}", "dense", None, basis, reason="it is what the other one is compared with"
        )


def dense_texts(card: Card, asked: Asked) -> list[serving.Continuation]:
    """Prompts and the dense model's greedy texts; none if they were not measured here yet."""
    known = _answers_of(card.base.sha256, "bfloat16", asked.threads).get(TEXTS)
    return [(list(prompt), list(text)) for prompt, text in known or ()]


def measure_quality(card: Card, kind: Kind, place: Path, asked: Asked, reporter: Reporter) -> None:
    """Perplexity, tasks and activations of one model, as far as they are asked for."""
    subject = Subject(asked.recipe(place))
    subject.prepare()
    answered = _answers(place, asked.dtype, asked.threads)
    texts = dense_texts(card, asked) if asked.activations else []
    steps: dict[str, Callable[[], None]] = {}
    if asked.text is not None:
        steps["perplexity"] = lambda: _perplexity(card, kind, subject, asked, answered, reporter)
    if (tasks := asked.tasks) is not None:
        steps["tasks"] = lambda: _tasks(card, kind, subject, tasks, answered, reporter)
    if texts:
        steps["outliers/"] = lambda: _activations(card, kind, subject, texts, answered, reporter)
    try:
        for name, step in steps.items():
            try:
                step()
            except AxiconError as error:
                reporter.say(f"{name.strip('/')} of the {kind} model: not measured: {error}")
                for row in asked.rows(name):
                    card.why_not(row, kind, str(error))
            card.write()
    finally:
        answered.write()
        subject.release()


def _perplexity(
    card: Card, kind: Kind, subject: Subject, asked: Asked, answered: Answered, reporter: Reporter
) -> None:
    assert asked.text is not None
    measured = measure_perplexity(subject, asked.text, answered, reporter, f"perplexity, {kind}")
    figures = PerplexityFigures.of(measured, asked.dtype, kind)
    card.put("perplexity", kind, measured.value, perplexity_basis(figures))


def _tasks(
    card: Card, kind: Kind, subject: Subject, tasks: Tasks, answered: Answered, reporter: Reporter
) -> None:
    results = measure_tasks(subject, tasks, answered, reporter, f"tasks, {kind}")
    for figure in task_figures(results, subject.recipe.dtype):
        card.put(figure.name, kind, figure.value, figure.basis, stderr=figure.stderr, better=figure.better)


def _activations(
    card: Card,
    kind: Kind,
    subject: Subject,
    texts: Sequence[serving.Continuation],
    answered: Answered,
    reporter: Reporter,
) -> None:
    sequences = [[*prompt, *text] for prompt, text in texts]
    key = answered.key("outliers", sequences)
    known = answered.get(key)
    if known is None:
        with reporter.track(f"activations, {kind}") as advance:
            known = asdict(outliers.outliers(subject.decoder, sequences))
            advance(len(sequences), len(sequences), "")
        answered.put(key, known)
    basis = {
        "tensors": WATCHED,
        "flatten": "per sequence",
        "text": f"{len(sequences)} prompts with the dense model's greedy texts",
        "tokens_sha256": hashlib.sha256(json.dumps(sequences).encode()).hexdigest(),
        "dtype": subject.recipe.dtype,
    }
    for name in ("max_inf_norm", "kurtosis"):
        card.put(f"outliers/{name}", kind, known[name], basis)


def _answers(place: Path, dtype: Dtype, threads: int | None) -> Answered:
    return _answers_of(checkpoint.digest(place), dtype, threads)


def _answers_of(sha256: str, dtype: Dtype, threads: int | None) -> Answered:
    """What the model of this digest answered before, on such a machine and with these versions."""
    who = identity(sha256, dtype) | {"threads": threads or cores()}
    return Answered(cache_dir() / ANSWERS / f"{sha256[:16]}-{digest('answers', who)}.json", who)
