"""`axicon distill`: a few examples per class, made so that training on them follows training on all.

The folder of a run holds its recipe, `log.jsonl` with the loss of every iteration, the experts, a checkpoint,
what was judged, and `result`, a data set. The same command goes on with what is there, to the same bits.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from axicon.distill.augment import Augment
from axicon.distill.choose import at_random, logits, nearest_to_centres
from axicon.distill.examples import Examples
from axicon.distill.experts import Training, generator, movement
from axicon.distill.judge import Verdict, accuracy
from axicon.distill.loop import LEAST_ALPHA, Distillation, Made, Rates
from axicon.distill.networks import Network
from axicon.distill.student import Matching
from axicon.errors import AxiconError, RunFailed
from axicon.finetune.log import EARLIER, MACHINE, NAME, Log
from axicon.model.artefact import claim, sha256, write_atomically
from jobs.distill_data import Data, read
from jobs.distill_experts import Asked, trained
from jobs.distill_judge import Judge, Judgements
from jobs.distill_output import write_result
from jobs.distill_recipe import DistillRecipe
from jobs.distill_start import CHECKPOINT, EXPERTS, JUDGED, start
from jobs.progress import Reporter
from jobs.report import Report, write_json
from jobs.start_from import parts_of
from jobs.stop import Stopped

DEFAULT_OUT = Path("artifacts/distill")
RESULT, RECIPE, SUMMARY = "result", "recipe.yaml", "run.json"
FLOOR = 1.01 * LEAST_ALPHA


def run(recipe: DistillRecipe, reporter: Reporter | None = None) -> Report:
    """Do the iterations that are left, and write what came of them.

    Raises AxiconError, with nothing lost, for what can be known before the work and when the disk is full,
    and RunFailed for losses that are not finite.
    """
    reporter = reporter or Reporter()
    clock = time.perf_counter()
    torch.set_num_threads(recipe.threads)
    check(recipe)
    folder = folder_of(recipe)
    with claim(folder):
        job = Job.of(recipe, folder, reporter)
        reporter.say(job.data.note())
        try:
            if recipe.start_from is not None:
                start(job, recipe.start_from, folder)
            job = dataclasses.replace(job, earlier=parts_of(folder, recipe.start_from))
            if (folder / NAME).exists():  # refused before anything of another run is written over
                Log(folder / NAME, job.facts(), writes=False)
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / RECIPE, recipe.as_yaml())
            report = job.finish(*job.distil())
        except Stopped as stopped:
            stopped.kept = f"experts and checkpoints are kept in {folder}; run the same command to go on"
            raise
        except OSError as e:
            raise AxiconError(
                f"{folder}: {e.strerror or e}; experts and checkpoints are kept, mend that and run the same "
                "command"
            ) from e
    return dataclasses.replace(report, seconds=time.perf_counter() - clock)


def check(recipe: DistillRecipe) -> None:
    """Raises AxiconError for settings that do not go together."""
    recipe.architecture()
    Augment.of(recipe.augment, images=recipe.modality == "images")
    last = recipe.max_start - 1 + recipe.expert_epochs
    if last > recipe.experts.epochs:
        raise AxiconError(
            f"max_start={recipe.max_start} and expert_epochs={recipe.expert_epochs} reach epoch {last}, "
            f"experts have {recipe.experts.epochs}: take experts.epochs={last}, or smaller ones"
        )
    if recipe.switches.representative and recipe.init != "real":
        raise AxiconError(
            f"switches.representative and init={recipe.init}: both say what to begin with; give one"
        )


def folder_of(recipe: DistillRecipe) -> Path:
    name = Path(recipe.data.source).name.replace(":", "-")
    out = recipe.out or DEFAULT_OUT / f"{name}-{recipe.network.method}-ipc{recipe.ipc}"
    return out.expanduser().absolute()


@dataclass
class Job:
    """A recipe with everything found that it names."""

    recipe: DistillRecipe
    folder: Path
    data: Data
    network: Network
    judge: Judge
    reporter: Reporter
    earlier: Sequence[Mapping[str, Any]] = ()
    """What the log says of the parts that `start_from` has brought."""

    @classmethod
    def of(cls, recipe: DistillRecipe, folder: Path, reporter: Reporter) -> Self:
        data = read(recipe, folder, reporter)
        module = recipe.architecture().module(data.train.shape, len(data.train.classes))
        network = Network(module)
        return cls(recipe, folder, data, network, Judge(recipe, data, network), reporter)

    def facts(self) -> dict[str, Any]:
        """What decides every bit of the result but for the number of iterations."""
        return {
            **self.recipe.deciding(),
            "data": self.data.train.sha256(),
            MACHINE: self.machine(),
            **({EARLIER: list(self.earlier)} if self.earlier else {}),
        }

    def machine(self) -> dict[str, Any]:
        return {
            "torch": torch.__version__,
            "isa": torch.backends.cpu.get_cpu_capability(),
            "threads": self.recipe.threads,
        }

    def experts(self) -> list[Tensor]:
        asked, recipe = self.recipe.experts, self.recipe
        switches = recipe.switches
        training = Training(
            epochs=asked.epochs,
            batch=asked.batch,
            lr=asked.lr,
            momentum=asked.momentum,
            weight_decay=asked.weight_decay,
            decay=asked.decay,
            clip_loss=switches.clip_loss,
            grad_penalty=switches.grad_penalty,
            penalty_norm=switches.penalty_norm,
        )
        what = Asked(
            network=recipe.deciding()["network"],
            training=training,
            augment=recipe.augment,
            seed=recipe.seed,
            data=self.data.train.sha256(),
            classes=len(self.data.train.classes),
            machine=self.machine(),
        )
        folder = self.folder / EXPERTS if asked.folder is None else asked.folder.expanduser().absolute()
        return trained(what, self.data.train, asked.count, folder, recipe.workers, self.reporter)

    def begin(self, experts: list[Tensor]) -> Examples:
        """The real examples that a distillation begins from, or noise with their labels."""
        recipe, train = self.recipe, self.data.train
        classes = len(train.classes)
        if recipe.switches.representative:
            seen = logits(self.network, experts[0][-1], train)
            return train.of(nearest_to_centres(seen, train.y, classes, recipe.ipc, recipe.seed))
        if recipe.init == "kmeans":
            return train.of(self.by_kmeans())
        found = train.of(at_random(train.y, classes, recipe.ipc, recipe.seed))
        if recipe.init == "noise":
            noise = torch.randn(found.x.shape, generator=generator(recipe.seed, "noise"))
            found = dataclasses.replace(found, x=noise)
        return found

    def by_kmeans(self) -> Tensor:
        train = self.data.train
        return nearest_to_centres(
            train.x.flatten(1), train.y, len(train.classes), self.recipe.ipc, self.recipe.seed
        )

    def distil(self) -> tuple[Examples, Made, Judgements, list[Tensor]]:
        """Do the iterations that are left; what is made, where they led, what was judged, and the experts."""
        recipe = self.recipe
        experts = self.experts()
        first = self.begin(experts)
        distillation = Distillation(
            network=self.network,
            y=first.y,
            trajectories=experts,
            matching=Matching(
                steps=recipe.steps,
                epochs=recipe.expert_epochs,
                max_start=recipe.max_start,
                batch=recipe.batch,
                momentum=recipe.momentum,
                balance=recipe.switches.balance,
                intermediate=recipe.switches.mid_match,
                perturb=recipe.switches.perturb,
            ),
            rates=Rates(data=recipe.lr_data, alpha=recipe.lr_alpha),
            augment=Augment.of(recipe.augment, images=self.data.train.images),
            seed=recipe.seed,
        )
        judgements = Judgements(self.folder / JUDGED, self.judge.facts())
        with Log(self.folder / NAME, self.facts()) as log:
            made = self._restored(first.x, log)
            if made.iterations:
                self.reporter.say(f"going on after {made.iterations} iterations in {self.folder}")
            self._judge_if_due(made, first.y, judgements)
            with self.reporter.track("iterations") as advance:
                recent: list[float] = []
                for loss in distillation.run(made, recipe.iterations):
                    log.append({"loss": loss, "alpha": float(made.alpha)})
                    recent = [*recent[-19:], loss]
                    done, last = made.iterations, made.iterations == recipe.iterations
                    mean = statistics.fmean(recent)
                    advance(done, recipe.iterations, f"loss {mean:.4f}{judgements.note()}")
                    if done % recipe.checkpoint_every == 0 or done % recipe.judge.every == 0 or last:
                        self._refuse_standstill(made)
                        write_atomically(self.folder / CHECKPOINT, made.to_bytes())
                    self._judge_if_due(made, first.y, judgements, mean)
        return dataclasses.replace(first, x=made.x), made, judgements, experts

    def _restored(self, x: Tensor, log: Log) -> Made:
        """Where a checkpoint left off; the log forgets what came after it."""
        path = self.folder / CHECKPOINT
        made = self.kept() or Made.begin(x, self.recipe.alpha)
        if made.iterations > self.recipe.iterations:
            raise AxiconError(
                f"iterations={self.recipe.iterations}: {self.folder} has gone {made.iterations} already; "
                "ask for as many or more, or give another out="
            )
        if self.earlier and made.iterations < self.earlier[-1]["until"]:
            raise AxiconError(
                f"{path}, which start_from brought, is gone; remove {self.folder} to begin again from there"
            )
        if len(log.steps) < made.iterations:  # so nothing says which recipe the checkpoint is of
            raise AxiconError(
                f"{log.path} has {len(log.steps)} iterations and {path.name} {made.iterations}: they do not "
                f"belong together; remove {path.name} to begin again from the experts"
            )
        log.cut(made.iterations)
        return made

    def kept(self) -> Made | None:
        """What the checkpoint holds; None where there is none. Raises AxiconError for one that is damaged."""
        path = self.folder / CHECKPOINT
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                iterations = int((file.metadata() or {})["iterations"])
            return Made(**load_file(path), iterations=iterations)
        except (OSError, KeyError, ValueError, TypeError, SafetensorError) as e:
            raise AxiconError(f"{path}: damaged ({e}); remove it to begin again from the experts") from None

    def _refuse_standstill(self, made: Made) -> None:
        if float(made.alpha) < FLOOR:
            raise RunFailed(
                f"iteration {made.iterations}: the step size of students has fallen to its floor, they stand "
                f"still; begin again in another out= with a smaller alpha (now {self.recipe.alpha:g}) or "
                f"lr_alpha (now {self.recipe.lr_alpha:g})"
            )

    def _judge_if_due(self, made: Made, y: Tensor, judgements: Judgements, loss: float | None = None) -> None:
        done, asked = made.iterations, self.recipe
        due = done % asked.judge.every == 0 or done == asked.iterations
        if due and not judgements.has(done):
            judgements.add(done, self.judge.verdict(made.x, y, float(made.alpha)))
        if due and done:
            figures = {"accuracy": judgements.mean(done)} | ({} if loss is None else {"loss": loss})
            self.reporter.figures(done, figures)

    def finish(self, examples: Examples, made: Made, judgements: Judgements, experts: list[Tensor]) -> Report:
        """Write the result and what it is worth."""
        recipe, alpha = self.recipe, float(made.alpha)
        last = judgements.at(made.iterations)
        verdict = Verdict(last)
        paths = [accuracy(self.network, path[-1], self.data.test) for path in experts]
        metrics = {
            "accuracy": verdict.mean,
            "accuracy_deviation": verdict.deviation,
            "accuracy_experts": statistics.fmean(paths),
            "expert_movement": statistics.fmean(movement(path) for path in experts),
            "alpha": alpha,
        }
        compared: dict[str, tuple[float, ...]] = {}
        if recipe.judge.baselines:
            self.reporter.say("judging as many real examples, chosen at random and by k-means")
            compared = judgements.compared(alpha, self.judge.baselines)
            metrics |= {f"accuracy_{name}": statistics.fmean(found) for name, found in compared.items()}
        result = write_result(self, examples, made, metrics, self.folder / RESULT)
        found: dict[str, Any] = {
            "iterations": made.iterations,
            "digest": sha256(result / "synthetic.safetensors"),
            "log_sha256": sha256(self.folder / NAME),
            "accuracies": {"distilled": list(last), **{name: list(one) for name, one in compared.items()}},
            "metrics": metrics,
        }
        write_json(self.folder / SUMMARY, found)
        return Report(
            verb="distill",
            recipe=recipe,
            metrics=metrics,
            seconds=0.0,
            files=(result, self.folder / SUMMARY, self.folder / NAME),
            details=found,
        )


def summary(report: Report) -> list[str]:
    """What a person wants to know of a run that ended."""
    m, found = report.metrics, report.details
    lines = [f"accuracy {m['accuracy']:.3f} ± {m['accuracy_deviation']:.3f} of networks trained on it alone"]
    if "accuracy_random" in m:
        lines.append(
            f"as many real examples: {m['accuracy_random']:.3f} at random, {m['accuracy_kmeans']:.3f} by "
            f"k-means; all of them: {m['accuracy_experts']:.3f}"
        )
    lines.append(
        f"{found['iterations']} iterations, step size {m['alpha']:.4g}, largest movement of an expert in an "
        f"epoch {m['expert_movement']:.3f}, digest {found['digest'][:12]}"
    )
    lines.append(f"it lies in {report.files[0]}, with how to read it in its README.md")
    return lines
