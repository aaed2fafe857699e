"""`axicon evaluate`: perplexity on a text, tasks of lm-eval, speed; results in lm-eval's file format.

What is written: `OUT/MODEL/results_TIME.json`, with the keys lm-eval's own command writes and ours under
`axicon`, and `samples_TASK_TIME.jsonl` beside it. Programs that read lm-eval's results read these. A model
directory with a manifest of axicon also gets perplexity and speed into its `report.json`, and a compressed
one all of it into its card.
"""

from __future__ import annotations

import contextlib
import io
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from axicon import __version__
from axicon.data import join_rows, read_rows
from axicon.errors import AxiconError
from axicon.evaluate import Perplexity, perplexity
from axicon.evaluate.answered import Answered
from axicon.evaluate.run import Tasks
from axicon.recipe import EvaluateRecipe
from jobs.model_report import Speed
from jobs.progress import Reporter
from jobs.record import Record, figures, measure_speed, metric_name
from jobs.report import Report, writable_folder, write_json, write_json_lines
from jobs.stop import Stopped
from jobs.submitted import digest

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from axicon.model.decoder import Attend, Decoder

DEFAULT_OUT = Path("artifacts/evaluate")
RESULT_KEYS = (
    "results",
    "group_subtasks",
    "configs",
    "versions",
    "n-shot",
    "higher_is_better",
    "n-samples",
    "task_hashes",
)


def run(recipe: EvaluateRecipe, reporter: Reporter | None = None) -> Report:
    """Measure, write the results, hand them back.

    Everything that can be wrong with a recipe (a missing file, an unknown task, a folder that cannot be
    written) raises AxiconError before the model is asked anything.
    """
    if recipe.text is None and not recipe.tasks and not recipe.speed:
        raise AxiconError("nothing to measure: give text=FILE for perplexity, tasks=NAME,NAME, or speed=true")
    reporter = reporter or Reporter()
    started, clock = time.time(), time.perf_counter()
    text = None if recipe.text is None else join_rows(read_rows(recipe.text, column=recipe.column))
    tasks = Tasks(recipe.tasks, data_dir=recipe.data, include=recipe.include) if recipe.tasks else None
    subject = Subject(recipe)
    subject.prepare()
    folder = writable_folder((recipe.out or DEFAULT_OUT) / subject.name.replace("/", "__"))
    record = Record.open(subject.path) if subject.where.adapter is None else None
    if text is not None or tasks is not None:
        subject.decoder  # noqa: B018 - read now, so that what is wrong with it shows first

    answered = Answered(folder / unfinished(recipe), subject.identity())
    if answered.found:
        reporter.say(f"going on from {answered.path}, where an earlier run was stopped")
    with _kept(answered):
        measured = None if text is None else measure_perplexity(subject, text, answered, reporter)
        results = {} if tasks is None else measure_tasks(subject, tasks, answered, reporter)
        subject.release()
        served = measure_speed(recipe, subject.where.folder, reporter) if recipe.speed else None
        speed = None if served is None else Speed.of(served)

    samples = results.pop("samples", {})
    content = {**_empty_results(recipe, started), **results, **_general(subject, clock)}
    content["axicon"] = subject.describe() | {
        "perplexity": measured and measured.as_dict(),
        "tokens_per_s": speed and speed.model_dump(by_alias=True),
    }
    files = _write(folder, datetime.fromtimestamp(started), content, samples)
    if record is not None and (note := record.add(recipe, measured, results, served)):
        reporter.say(note)
    answered.remove()
    return Report(
        verb="evaluate",
        recipe=recipe,
        metrics=_metrics(measured, results, speed),
        seconds=time.perf_counter() - clock,
        files=files,
        details=content,
    )


def unfinished(recipe: EvaluateRecipe) -> str:
    """The file that a run which was stopped leaves in its folder, for the same recipe to go on from."""
    asked = recipe.model_dump(mode="json", exclude={"out", "threads"})
    return f"unfinished_{digest('evaluate', asked)}.json"


@contextlib.contextmanager
def _kept(answered: Answered) -> Iterator[None]:
    """However the block is left before its end, what is measured so far lies on disk."""
    try:
        yield
    except Stopped as stopped:
        answered.write()
        if not answered.empty:
            where = f"what is measured so far is in {answered.path}"
            stopped.kept = f"{where}; rerun the same command to continue"
        raise
    except Exception:
        with contextlib.suppress(AxiconError):  # the first error is the one to tell
            answered.write()
        raise


def table(report: Report) -> Table:
    """What a person wants to see of it first."""
    result = Table(title=f"{report.details['model_name']}, {report.seconds:.0f} s", title_justify="left")
    for column in ("measured", "metric", "value", "", "of"):
        result.add_column(column, justify="right" if column in ("value", "of") else "left")
    measured = report.details["axicon"]["perplexity"]
    if measured is not None:
        count = measured["windows"]
        of = f"{count} window{'s' if count != 1 else ''} of {measured['window']}"
        result.add_row("text", "perplexity", f"{measured['value']:.4f}", "", of)
    speed = report.details["axicon"]["tokens_per_s"]
    for streams in Speed.figures if speed is not None else ():
        value = speed[streams]
        shown = "" if value is None else f"{value:.1f}"
        of = speed["reason"].get(streams, f"{streams} stream{'s' if streams != '1' else ''}")
        result.add_row("speed", "tokens/s", shown, "", of)
    for task, scores in report.details["results"].items():
        for key, value in figures(scores):
            error = scores.get(f"{key[0]}_stderr,{key[1]}")
            spread = f"± {error:.4f}" if isinstance(error, float) else ""
            result.add_row(task, metric_name(key), f"{value:.4f}", spread, str(scores.get("sample_len", "")))
    return result


class Subject:
    """The model that is measured: found when this is made, read into memory with `decoder`."""

    def __init__(self, recipe: EvaluateRecipe) -> None:
        from axicon.compress.walk import Compress
        from axicon.model import checkpoint
        from axicon.model.adapterfile import locate

        self.recipe = recipe
        recipe.build_compressor()  # a wrong name or setting shows before a download
        self.where = locate(recipe.model, offline=recipe.offline, revision=recipe.revision)
        self.path = self.where.base
        packed, shape = checkpoint.packed_formats(self.path), checkpoint.shape_of(self.path)
        self.compressor = recipe.build_compressor(packed, shape)
        self.name = checkpoint.model_id(recipe.model)
        self.fingerprint: str | None = None
        self.digest = self.where.digest
        if self.compressor is not None:
            self.digest += f" {Compress(self.compressor)}"

    def prepare(self) -> None:
        """Threads and tokenizer, but no weights yet."""
        import torch

        from axicon.model import checkpoint
        from axicon.model.machine import cores

        torch.set_num_threads(self.recipe.threads or cores())
        self.tokenizer = checkpoint.load_tokenizer(self.path)
        self.shape = checkpoint.shape_of(self.path)

    @cached_property
    def decoder(self) -> Decoder:
        import torch

        from axicon.compress.walk import Compress
        from axicon.model import adapterfile, checkpoint

        decoder = checkpoint.load(self.path, dtype=getattr(torch, self.recipe.dtype))
        if self.compressor is not None:
            decoder = Compress(self.compressor)(decoder)
        if self.where.adapter is not None:
            adapterfile.install(decoder, adapterfile.read_adapter(self.where.adapter, decoder.shape))
        return decoder

    def release(self) -> None:
        """Give the memory of the weights back."""
        self.__dict__.pop("decoder", None)

    def make_engine(self) -> Any:
        """The engine that generates, over the same weights; its fingerprint goes into the results."""
        from axicon.generate.engine import Engine
        from axicon.generate.request import Limits
        from axicon.generate.runner import LocalRunner

        runner = LocalRunner(self.decoder, model_digest=self.digest)
        self.fingerprint = runner.fingerprint
        return Engine(runner, self.tokenizer, eos_ids=self.decoder.shape.eos_ids, limits=Limits(max_stops=64))

    def describe(self) -> dict[str, Any]:
        """How the figures came to be."""
        identity = self.identity()
        return {
            "version": identity.pop("version"),
            "recipe": self.recipe.model_dump(mode="json"),
            "model_sha256": identity.pop("model_sha256"),
            "system_fingerprint": self.fingerprint,
            **{key: value for key, value in identity.items() if key != "dtype"},
        }

    def identity(self) -> dict[str, Any]:
        """What decides the bits of an answer beside the question."""
        return identity(self.digest, self.recipe.dtype)


def identity(model_sha256: str, dtype: str) -> dict[str, Any]:
    """The same for any model, in this process."""
    import torch
    import transformers

    return {
        "version": __version__,
        "model_sha256": model_sha256,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


class WhenAsked:
    """The decoder of a subject, read into memory with the first question that is not answered yet."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self.shape = subject.shape

    @property
    def device(self) -> torch.device:
        return self._subject.decoder.device

    def __call__(self, tokens_N: Tensor, positions_N: Tensor, attend: Attend) -> Tensor:
        return self._subject.decoder(tokens_N, positions_N, attend)

    def head(self, x_ND: Tensor) -> Tensor:
        return self._subject.decoder.head(x_ND)


def measure_perplexity(
    subject: Subject, text: str, answered: Answered, reporter: Reporter, title: str = "perplexity"
) -> Perplexity:
    """By the settings of the subject's recipe."""
    recipe = subject.recipe
    with reporter.track(title) as advance:
        return perplexity(
            WhenAsked(subject),
            subject.tokenizer,
            text,
            window=recipe.window,
            windows=recipe.windows,
            batch=recipe.batch,
            progress=lambda done, total, value: advance(done, total, f"{value:.4f}"),
            answered=answered,
        )


def measure_tasks(
    subject: Subject, tasks: Tasks, answered: Answered, reporter: Reporter, title: str = ""
) -> dict[str, Any]:
    """What lm-eval says of the tasks, by the settings of the subject's recipe."""
    from axicon.evaluate.harness import AxiconLM

    recipe = subject.recipe
    with reporter.track(title or ", ".join(recipe.tasks)) as advance:
        lm = AxiconLM(
            WhenAsked(subject),
            subject.tokenizer,
            max_length=subject.shape.max_positions,
            make_engine=subject.make_engine,
            seed=recipe.seed,
            progress=lambda what, done, total: advance(done, total, what),
            answered=answered,
        )
        with _unheard(reporter):
            results = tasks.run(lm, limit=recipe.limit, fewshot=recipe.num_fewshot, seed=recipe.seed)
    results["config"] |= {"model_args": f"pretrained={recipe.model},dtype={recipe.dtype}", "device": "cpu"}
    return results


@contextlib.contextmanager
def _unheard(reporter: Reporter) -> Iterator[None]:
    """lm-eval prints bars and notes of its own; they are only of use beside a traceback."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            yield
    except AxiconError:
        raise
    except Exception:
        reporter.say(said.getvalue())
        raise


def _empty_results(recipe: EvaluateRecipe, started: float) -> dict[str, Any]:
    """The keys of a results file, as they are when no task ran."""
    return {
        **{key: {} for key in RESULT_KEYS},
        "config": {"model": "AxiconLM", "model_args": f"pretrained={recipe.model},dtype={recipe.dtype}"},
        "git_hash": None,
        "date": started,
    }


def _general(subject: Subject, clock: float) -> dict[str, Any]:
    """What lm-eval's command adds to the results of its library."""
    return {
        "model_source": "axicon",
        "model_name": subject.name,
        "model_name_sanitized": subject.name.replace("/", "__"),
        "system_instruction": None,
        "system_instruction_sha": None,
        "fewshot_as_multiturn": None,
        "chat_template": None,
        "chat_template_sha": None,
        "total_evaluation_time_seconds": str(time.perf_counter() - clock),
    }


def _write(
    folder: Path, started: datetime, content: Mapping[str, Any], samples: Mapping[str, Sequence[Any]]
) -> tuple[Path, ...]:
    """The results last: where they lie, all of a run lies."""
    stamp = started.isoformat().replace(":", "-")
    files = []
    for task, records in samples.items():
        files.append(folder / f"samples_{task}_{stamp}.jsonl")
        write_json_lines(files[-1], [_sample(record) for record in records])
    results = folder / f"results_{stamp}.json"
    write_json(results, content)
    return (results, *files)


def _sample(record: Mapping[str, Any]) -> dict[str, Any]:
    """One question as lm-eval stores it: arguments by number, responses as text."""
    arguments = {
        f"gen_args_{i}": {f"arg_{j}": value for j, value in enumerate(one)}
        for i, one in enumerate(record["arguments"])
    }
    texts = {key: _texts(record[key]) for key in ("resps", "filtered_resps")}
    return {**record, **texts, "arguments": arguments, "target": str(record["target"])}


def _texts(value: Any) -> Any:
    return [_texts(item) for item in value] if isinstance(value, list | tuple) else str(value)


def _metrics(
    measured: Perplexity | None, results: Mapping[str, Any], speed: Speed | None
) -> dict[str, float]:
    metrics = {} if measured is None else {"perplexity": measured.value}
    for streams in Speed.figures:
        if speed is not None and (value := speed.get(streams)) is not None:
            metrics[f"tokens_per_s/{streams}"] = value
    for task, scores in results.get("results", {}).items():
        metrics |= {f"{task}/{metric_name(key)}": value for key, value in figures(scores)}
    return metrics
