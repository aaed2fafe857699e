"""A finetuning run from its recipe, in one process: alone, or as one of the workers of Ray Train."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch

from axicon.compress import COMPRESSORS
from axicon.compress.walk import Compress
from axicon.errors import AxiconError
from axicon.finetune.accuracy import quality
from axicon.finetune.checkpoint import TensorCheckpoints
from axicon.finetune.estimate import trained
from axicon.finetune.log import EARLIER, MACHINE, NAME, Log, read
from axicon.finetune.loop import Earlier, Run, Schedule, digest, is_scalar, retrace, schedule, train
from axicon.finetune.offload import ring_of
from axicon.finetune.offloaded import Streamed
from axicon.finetune.updates import UPDATE_RULES
from axicon.finetune.updates.zo2 import ZO2
from axicon.model import checkpoint
from axicon.model.adapters import SCHEMES, Scheme
from axicon.model.artefact import write_atomically
from axicon.model.decoder import Decoder
from axicon.model.machine import cores, return_freed_memory
from axicon.protocols import Mean, Moment, UpdateRule
from jobs.finetune_data import Data
from jobs.finetune_data import read as read_data
from jobs.finetune_parts import Part
from jobs.finetune_recipe import FinetuneRecipe
from jobs.progress import Reporter
from jobs.start_from import parts_of

EVALUATIONS, COST = "evaluations.json", "cost.json"


@dataclass(frozen=True)
class Evaluation:
    step: int
    loss: float
    accuracy: float | None
    examples: int

    def figures(self) -> dict[str, float]:
        """As a report has them of the model that a run ends with."""
        accuracy = {} if self.accuracy is None else {"accuracy_after": self.accuracy}
        return {"loss_after": self.loss, **accuracy}

    @property
    def rank(self) -> tuple[float, float, int]:
        """Higher is better: the accuracy where there is one, then the loss, then the earlier step."""
        return (-1.0 if self.accuracy is None else self.accuracy, -self.loss, -self.step)


@dataclass
class Trainee:
    """What is trained, and how; all that a log can be replayed on."""

    recipe: FinetuneRecipe
    source: Path
    base: str
    """Digest of the model that the run begins from."""
    scheme: Scheme
    rule: UpdateRule
    earlier: tuple[Part, ...] = field(default=(), kw_only=True)
    """What `start_from` has brought: the first parts of the log. Known once the run has a log."""

    @classmethod
    def of(cls, recipe: FinetuneRecipe) -> Self:
        """Raises AxiconError for what is not there or does not fit. The weights are not read."""
        scheme = recipe.scheme.build(SCHEMES, "scheme")
        rule = recipe.rule.build(UPDATE_RULES, "rule")
        if recipe.compressor is not None and recipe.compressor.build(COMPRESSORS, "compressor").needs_inputs:
            raise AxiconError(
                f"compressor={recipe.compressor.method} looks at data, which is done once: "
                f"axicon compress {recipe.compressor.method} model={recipe.model} out=DIR, then model=DIR"
            )
        source = checkpoint.resolve(recipe.model, offline=recipe.offline, revision=recipe.revision)
        return cls(recipe, source, checkpoint.digest(source), scheme, rule)

    def facts(self) -> dict[str, Any]:
        """What decides the parameters, given the numbers of a log."""
        earlier = {EARLIER: [one.facts for one in self.earlier]} if self.earlier else {}
        return {
            "base": self.base,
            "scheme": _as_dict(self.scheme),
            "rule": _as_dict(self.rule),
            **self.recipe.deciding(),
            **earlier,
        }

    def begun_in(self, folder: Path) -> Self:
        """The same, with what the log in a folder says of parts that another run has taken. Raises
        AxiconError.
        """
        found = (Part.of(facts, self.recipe.rule) for facts in parts_of(folder, self.recipe.start_from))
        return dataclasses.replace(self, earlier=tuple(found))

    def schedule(self) -> Schedule:
        kind = self.recipe.schedule
        return schedule(kind.kind, kind.warmup, self.recipe.steps)

    def model(self) -> Decoder:
        """The base with what trains in it, as it is before the first step."""
        recipe = self.recipe
        if isinstance(self.rule, ZO2):
            return self._offloaded(self.rule)
        model = checkpoint.load(self.source, dtype=getattr(torch, recipe.dtype), masks=True)
        model.requires_grad_(False)
        if recipe.compressor is not None:
            packed = checkpoint.packed_formats(self.source)
            if packed:
                raise AxiconError(
                    f"compressor={recipe.compressor.method}: {recipe.model} is compressed already "
                    f"({', '.join(packed)}); leave compressor out"
                )
            model = Compress(recipe.compressor.build(COMPRESSORS, "compressor"))(model)
        self.scheme.install(model, Moment(0, recipe.seed).key)
        if torch.cuda.is_available():
            model = model.cuda()
        return model

    def _offloaded(self, rule: ZO2) -> Decoder:
        """The same, of a base that is read block by block into a file, or the memory beside a GPU."""
        recipe, cuda = self.recipe, torch.cuda.is_available()
        if recipe.compressor is not None:
            raise AxiconError(
                f"rule.method=zo2 reads a model as it is stored: axicon compress {recipe.compressor.method} "
                f"model={recipe.model} out=DIR, then model=DIR"
            )
        if checkpoint.is_pruned(self.source):
            raise AxiconError(
                f"rule.method=zo2 does not keep what is pruned in {recipe.model}; take rule.method=zo_sgd, "
                "the same steps in memory"
            )
        if rule.folder is None and not cuda:
            rule = dataclasses.replace(rule, folder=(recipe.out or Path("artifacts")).expanduser())
        device = torch.device("cuda" if cuda else "cpu")
        model = rule.load(self.source, getattr(torch, recipe.dtype), device)
        self.scheme.install(model, Moment(0, recipe.seed).key)
        return model

    def rebuild(self, folder: Path, step: int) -> Decoder:
        """The model as it was behind a step, from the log or what was kept. Raises AxiconError."""
        model, rule = self.model(), self.rule
        if is_scalar(rule):
            _, steps, _ = read(folder / NAME)
            if not 0 <= step <= len(steps):
                raise AxiconError(f"step={step}: the log in {folder} has steps 0 to {len(steps)}")
            parts = [*(one.part for one in self.earlier), Earlier(len(steps), rule, self.schedule())]
            at = next(i for i, one in enumerate(parts) if step <= one.until)
            last = parts[at]
            assert is_scalar(last.rule)
            retrace(model, last.rule, steps[:step], self.recipe.seed, last.schedule, parts[:at])
            last.rule.finish(model)
        else:
            TensorCheckpoints(folder, 1).restore_parameters(model, step)
        return model


@dataclass
class Job(Trainee):
    """A recipe with everything found that it names."""

    data: Data

    @classmethod
    def of(cls, recipe: FinetuneRecipe) -> Self:
        found = Trainee.of(recipe)
        most = checkpoint.shape_of(found.source).max_positions
        data = read_data(recipe, checkpoint.load_tokenizer(found.source), most)
        return cls(recipe, found.source, found.base, found.scheme, found.rule, data)

    def facts(self) -> dict[str, Any]:
        """What decides the numbers of the log, and `machine`, which decides their last bits."""
        return super().facts() | {
            "data": self.data.sha256,
            "objective": _as_dict(self.data.objective),
            MACHINE: {
                "torch": torch.__version__,
                "isa": torch.backends.cpu.get_cpu_capability(),
                "threads": torch.get_num_threads(),
            },
        }

    def run(
        self, model: Decoder, mean: Mean, folder: Path, *, reporter: Reporter | None = None
    ) -> list[Evaluation]:
        """Take the steps that are left; the evaluations, those of earlier runs among them.

        One worker of a run has the `reporter`: it alone writes and evaluates.
        """
        recipe, first = self.recipe, reporter is not None
        evaluations = Evaluations(folder / EVALUATIONS, self.data.evaluate_sha256)
        with Log(folder / NAME, self.facts(), writes=first) as log:
            began = len(log.steps)
            run = Run(
                model=model,
                rule=self.rule,
                objective=self.data.objective,
                source=_On(self.data.train, model.device),
                mean=mean,
                log=log,
                steps=recipe.steps,
                seed=recipe.seed,
                schedule=self.schedule(),
                earlier=[one.part for one in self.earlier],
                checkpoints=TensorCheckpoints(folder, recipe.checkpoint_every, writes=first),
            )
            if reporter is None:
                train(run)
                return []
            if began:
                reporter.say(f"going on after {began} steps in {log.path}")
            if log.moved:
                reporter.say(
                    "another machine or number of threads than before: last bits of losses may differ"
                )
            _forget_peak()  # another run may have been here before
            after = _After(self, model, evaluations, reporter)
            with reporter.track("steps") as after.advance:
                train(run, after, before=after.before)
            if after.seconds:
                Cost.of(after.seconds).write(folder)
        return evaluations.found

    def evaluate(self, model: Decoder, step: int) -> Evaluation | None:
        if self.data.evaluate is None:
            return None
        found = quality(model, self.data.objective, self.data.evaluate)
        return Evaluation(step, found.loss, found.accuracy, found.examples)


@dataclass(frozen=True)
class Cost:
    """What steps have taken, evaluations and loading aside, in the process that took the last of them."""

    step_seconds: float
    """The median."""
    peak_bytes: int
    """The most memory that the process had since the run began, or ever where the system cannot say that."""

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Self:
        return cls(statistics.median(seconds), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        path = folder / COST
        return cls(**json.loads(path.read_text())) if path.exists() else None

    def write(self, folder: Path) -> None:
        write_atomically(folder / COST, json.dumps(dataclasses.asdict(self)))


def _forget_peak() -> None:
    """Let the most memory this process had be what it has now (Linux: proc(5), clear_refs)."""
    return_freed_memory()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


class Evaluations:
    """What was found at which step, in a file of the run."""

    def __init__(self, path: Path, of: str | None = None) -> None:
        """`of` is the digest of what is evaluated on: figures of something else are not these."""
        self.path = path
        kept = json.loads(path.read_text()) if path.exists() else {"of": of, "found": []}
        self.of: str | None = kept["of"] if of is None else of
        same = kept["of"] == self.of
        self.found = [Evaluation(**one) for one in kept["found"]] if same else []

    def has(self, step: int) -> bool:
        return any(one.step == step for one in self.found)

    def add(self, one: Evaluation) -> bool:
        """Whether it is the best so far."""
        self.found = sorted([*self.found, one], key=lambda each: each.step)
        content = {"of": self.of, "found": [dataclasses.asdict(each) for each in self.found]}
        write_atomically(self.path, json.dumps(content, indent=1))
        return max(self.found, key=lambda each: each.rank) == one


@dataclass
class _After:
    """What is done behind a step: told, and every so often evaluated."""

    job: Job
    model: Decoder
    evaluations: Evaluations
    reporter: Reporter
    advance: Callable[[int, int, str], None] = lambda done, total, note: None
    recent: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    """Of each step."""
    since: float = 0.0

    def before(self, steps: int) -> None:
        """Called once the model is where the run goes on; it may have ended before it evaluated there."""
        self._evaluate_if_due(steps)
        self.since = time.perf_counter()

    def __call__(self, steps: int, loss: float | None) -> None:
        self.seconds.append(time.perf_counter() - self.since)
        recipe = self.job.recipe
        self.recent = [*self.recent[-19:], *([] if loss is None else [loss])]
        mean = f"{math.fsum(self.recent) / len(self.recent):.4f}" if self.recent else "none"
        self.advance(steps, recipe.steps, f"loss {mean}{self._last()}")
        self._evaluate_if_due(steps)
        self.since = time.perf_counter()

    def _last(self) -> str:
        if not self.evaluations.found:
            return ""
        last = self.evaluations.found[-1]
        what = f"loss {last.loss:.4f}" if last.accuracy is None else f"accuracy {last.accuracy:.3f}"
        return f", {what} at {last.step}"

    def _evaluate_if_due(self, step: int) -> None:
        recipe = self.job.recipe
        due = step % recipe.evaluate_every == 0 or step == recipe.steps
        if not due or self.evaluations.has(step):
            return
        found = self.job.evaluate(self.model, step)
        if found is not None and self.evaluations.add(found):
            folder = self.evaluations.path.parent
            if not is_scalar(self.job.rule):
                TensorCheckpoints(folder, 1).keep_parameters(self.model, step)
        if found is not None and step:
            self.reporter.figures(step, found.figures())


@dataclass(frozen=True)
class _On:
    """A source whose batches are on a device."""

    data: Any
    device: torch.device

    def batch(self, step: int) -> Any:
        return self.data.batch(step).to(self.device)


def threads_of(recipe: FinetuneRecipe) -> int:
    """Compute threads of a process. They decide last bits, so their number does not depend on how many
    workers there are, but on how many there may be.
    """
    return recipe.threads or max(1, cores() // recipe.shards)


def digest_of(model: Decoder) -> str:
    """Of what trained."""
    held = trained(model)
    return digest(held if ring_of(model) is None else Streamed(model, held))


def _as_dict(method: Any) -> dict[str, Any]:
    """What of a method decides the bits of a run."""
    cls = getattr(method, "same_as", type(method))
    return {"name": cls.__name__, **{f.name: getattr(method, f.name) for f in dataclasses.fields(cls)}}
