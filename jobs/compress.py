"""`axicon compress`: a smaller copy of a model, written block by block, with what is measured of it.

What is written: the model directory, with `manifest.json` over it and its card (`card.json`, `README.md`,
`report.json`) beside that. The manifest says what decides the bytes, the card what they are worth; only the
card is ever written again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import platform
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import transformers

from axicon import __version__
from axicon.compress.calibration import Calibration
from axicon.compress.chain import Chain
from axicon.compress.directory import compress_blocks, write_calibrated, write_compressed
from axicon.compress.estimate import Estimate, estimate, state_bytes
from axicon.compress.rules import check_fit
from axicon.compress.shared import Shared
from axicon.compress.walk import reshaped
from axicon.compress.work import Work, work_folder
from axicon.errors import AxiconError, RunFailed, counted
from axicon.model import checkpoint
from axicon.model.artefact import atomic_directory, claim, read_manifest, write_manifest
from axicon.model.intact import problems
from axicon.model.machine import available_memory, cores
from axicon.protocols import Compressor
from axicon.recipe import SERVED_BY_DEFAULT, CompressRecipe
from axicon.settings import Method
from jobs.calibration import Sample, shared_set
from jobs.card import report_of
from jobs.card_file import Card
from jobs.figures import Measure
from jobs.progress import Advance, Reporter
from jobs.report import Report
from jobs.shown import size
from jobs.stop import Stopped

DEFAULT_OUT = Path("artifacts/models")
ASIDE = ("activations", "shared", "shared_gib")
"""Settings of the sample that do not decide the bytes."""


def run(recipe: CompressRecipe, reporter: Reporter | None = None) -> Report:
    """Make the directory that the recipe describes, unless it is there already, and measure it.

    Raises AxiconError, with nothing written, for what can be known before the work, memory and disk among
    it, and when the directory cannot be written. Afterwards the model is whole; a figure that cannot be
    measured is null with its reason.
    """
    reporter = reporter or Reporter()
    clock = time.perf_counter()
    torch.set_num_threads(recipe.threads or cores())
    plan = Plan.of(recipe)
    measure = Measure.of(recipe, plan.source)
    with claim(plan.target):
        done = plan.is_done()
        if done:
            reporter.say(f"{plan.target} is there already, made by this recipe, and intact")
            shutil.rmtree(work_folder(plan.target), ignore_errors=True)
        elif plan.sample is None:
            _make(plan, measure, reporter)
        else:
            _make_calibrated(plan, plan.sample, measure, reporter)
    card = Card.of(plan.target) if done else measure.run(plan.target, reporter)
    assert card is not None
    return report_of(card, "compress", recipe, time.perf_counter() - clock, done=done)


@dataclass(frozen=True)
class Plan:
    """A recipe with everything found that it names."""

    recipe: CompressRecipe
    compressor: Compressor
    source: Path
    target: Path
    chain: tuple[Mapping[str, Any], ...]
    """The parent's methods, then those of this recipe."""
    parent: Mapping[str, Any]
    licence: str | None
    sample: Sample | None
    """What a method with data looks at."""

    @classmethod
    def of(cls, recipe: CompressRecipe) -> Self:
        """Raises AxiconError for what is not there or does not fit."""
        compressor = build(recipe)
        source = checkpoint.resolve(recipe.model, offline=recipe.offline, revision=recipe.revision)
        if packed := checkpoint.packed_formats(source):
            raise AxiconError(
                f"model={recipe.model} is compressed already ({', '.join(packed)}); "
                "name the dense model it was made from"
            )
        checkpoint.check_headers(source)
        steps = compressor.steps if isinstance(compressor, Chain) else (compressor,)
        for method, step in zip(method_names(recipe), steps, strict=True):
            check_fit(step, method, source)
        reshaped(compressor, checkpoint.shape_of(source))  # refuses a model that it does not take
        name = checkpoint.model_id(recipe.model)
        out = recipe.out or DEFAULT_OUT / f"{name.replace('/', '--')}-{'-'.join(method_names(recipe))}"
        sample = Sample.of(recipe, source) if compressor.needs_inputs else None
        manifest = read_manifest(source) or {}
        return cls(
            recipe=recipe,
            sample=sample,
            compressor=compressor,
            source=source,
            target=out.expanduser().absolute(),
            chain=(*manifest.get("chain", ()), *_links(recipe, compressor, sample)),
            parent={
                "name": name,
                "sha256": checkpoint.digest(source),
                "source": source_of(recipe.model, source),
            },
            licence=manifest.get("licence"),
        )

    def facts(self) -> dict[str, Any]:
        """What the manifest says beside the files."""
        threads = torch.get_num_threads()
        aside: Any = {"out": True, "calibration": set(ASIDE) if self.sample else True}
        count = len(method_names(self.recipe))
        methods = [{"method": link["method"], **link["settings"]} for link in self.chain[-count:]]
        recipe = self.recipe.model_dump(mode="json", exclude=aside) | {
            "threads": threads,
            "compressor": None if self.recipe.chain else methods[0],
            "chain": methods if self.recipe.chain else [],
        }
        return {
            "kind": "model",
            "name": self.target.name,
            "chain": list(self.chain),
            "parents": [self.parent],
            "licence": self.licence,
            "recipe": recipe,
            "versions": {
                "axicon": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
            "machine": {"isa": torch.backends.cpu.get_cpu_capability(), "threads": threads},
        }

    def is_done(self) -> bool:
        """Whether the target is what this would make. Raises AxiconError when it is something else."""
        if not self.target.exists():
            return False
        manifest = read_manifest(self.target) if self.target.is_dir() else None
        if manifest is None:
            raise AxiconError(f"out={self.target} exists already; choose another directory or remove it")
        if other := self._difference(manifest):
            raise AxiconError(
                f"out={self.target} holds another model ({other}); choose another directory or remove it"
            )
        if found := problems(self.target):
            one = found[0]
            raise RunFailed(
                f"{self.target} was made by this recipe and is damaged now ({one.file} {one.what}); "
                "remove it and run again"
            )
        return True

    def _difference(self, manifest: Mapping[str, Any]) -> str:
        """What that decides the bytes is another there; empty if nothing is."""
        recipe, [parent] = manifest.get("recipe", {}), manifest.get("parents") or [{}]
        if recipe.get("dtype") != self.recipe.dtype:
            return f"dtype {recipe.get('dtype')}, not {self.recipe.dtype}"
        if parent.get("sha256") != self.parent["sha256"]:
            return f"made from {parent.get('source')}, or from another version of it"
        theirs = [(link.get("method"), link.get("settings")) for link in manifest.get("chain", ())]
        if theirs == [(link["method"], link["settings"]) for link in self.chain]:
            samples = [[link.get("calibration") for link in c] for c in (manifest["chain"], self.chain)]
            return "" if samples[0] == samples[1] else "made with another calibration sample"
        method, settings = theirs[-1] if theirs else ("no method", {})
        ours = self.chain[-1]["settings"]
        changed = [f"{key}={value}" for key, value in (settings or {}).items() if ours.get(key) != value]
        return f"made by {method} with {', '.join(changed) or 'other methods before it'}"


def methods_of(recipe: CompressRecipe) -> tuple[Method, ...]:
    """The methods in order. Raises AxiconError for a recipe that names one and several."""
    if recipe.chain and recipe.compressor != SERVED_BY_DEFAULT:
        raise AxiconError("compressor and chain: give one; a method alone is no chain")
    return recipe.chain or (recipe.compressor,)


def method_names(recipe: CompressRecipe) -> tuple[str, ...]:
    return tuple(method.method for method in methods_of(recipe))


def build(recipe: CompressRecipe) -> Compressor:
    """The method, or the chain of them. Raises AxiconError for an unknown one (`auto` is none), and for an
    order that cannot be.
    """
    from axicon.compress import COMPRESSORS

    if not recipe.chain:
        alone = recipe.compressor.build(COMPRESSORS, "compressor")
        Chain(method_names(recipe), (alone,))  # refuses one that needs others before it
        return alone
    steps = tuple(one.build(COMPRESSORS, f"chain.{i}") for i, one in enumerate(methods_of(recipe)))
    return Chain(method_names(recipe), steps)


def _links(
    recipe: CompressRecipe, compressor: Compressor, sample: Sample | None
) -> Iterator[dict[str, Any]]:
    """What the manifest says of each method."""
    steps = compressor.steps if isinstance(compressor, Chain) else (compressor,)
    for method, step in zip(method_names(recipe), steps, strict=True):
        settings = dataclasses.asdict(step)  # type: ignore[call-overload]
        link = {"method": method, "settings": _plain(settings), "axicon": __version__}
        yield link | ({"calibration": sample.facts()} if sample is not None and step.needs_inputs else {})


def source_of(model: str, folder: Path) -> str:
    """How a model can be found again: `demo`, a path, or the hub's id with its commit."""
    path = Path(model).expanduser()
    if model == "demo":
        return model
    return str(path.resolve()) if path.exists() else f"{model.partition('@')[0]}@{folder.name}"


def _make(plan: Plan, measure: Measure, reporter: Reporter) -> None:
    dtype = getattr(torch, plan.recipe.dtype)
    need = estimate(plan.compressor, plan.source, dtype)
    _check(plan, need, reporter)
    with atomic_directory(plan.target) as folder, reporter.track("blocks") as advance:
        write_compressed(
            plan.compressor,
            plan.source,
            folder,
            dtype=dtype,
            progress=advance,
        )
        write_manifest(folder, **plan.facts())
        measure.begin(folder)


def _check(plan: Plan, need: Estimate, reporter: Reporter, about: str = "about") -> None:
    need.check(plan.source, plan.target)
    methods = ", then ".join(method_names(plan.recipe))
    reporter.say(
        f"{plan.parent['name']} by {methods} takes {about} {_seconds(need.seconds)}, "
        f"{size(need.memory)} of memory and {size(need.disk)} of disk (one block takes "
        f"{need.block_seconds:.2f} s)"
    )


def _make_calibrated(plan: Plan, sample: Sample, measure: Measure, reporter: Reporter) -> None:
    """Block by block into the work folder, and from there into the target. Finished blocks are kept whatever
    ends this.
    """
    dtype = getattr(torch, plan.recipe.dtype)
    facts = json.loads(json.dumps(plan.facts()))
    work = Work(work_folder(plan.target), facts)
    if work.cleared:
        reporter.say("finished blocks of another recipe, machine or thread count were removed")
    if work.done:
        reporter.say(f"going on after {counted(work.done, 'finished block')} in {work.folder}")
    try:
        tokens = work.sample()
        if tokens is None:
            tokens = sample.tokens(reporter)
            work.keep_sample(tokens)
        calibration = Calibration(tokens, dense=plan.recipe.calibration.inputs == "dense")
        if work.done < checkpoint.shape_of(plan.source).layers:
            with _shared(plan.source, sample, calibration, dtype, reporter) as shared:
                need = estimate(plan.compressor, plan.source, dtype, calibration)
                states = state_bytes(plan.source, dtype, calibration)
                on_disk = shared is None and _on_disk(plan.recipe, need.memory, states)
                if shared is None:
                    need = need.with_states(states, on_disk)
                # What another run has left does not take its time again.
                _check(plan, need, reporter, "about" if shared is None else "at most about")
                with reporter.track("blocks") as advance:
                    compress_blocks(
                        plan.compressor,
                        plan.source,
                        work,
                        calibration,
                        dtype=dtype,
                        on_disk=on_disk,
                        shared=shared,
                        progress=_with_time_left(advance, work.done),
                    )
        seen = {"sha256": calibration.sha256, "block_errors": work.errors()}
        with atomic_directory(plan.target) as folder:
            write_calibrated(plan.source, folder, work, dtype=dtype)
            write_manifest(folder, **facts, calibration=sample.facts() | seen)
            measure.begin(folder)
    except Stopped as stopped:
        stopped.kept = f"finished blocks kept in {work.folder}: {work.done}; run the same command to go on"
        raise
    work.remove()


@contextlib.contextmanager
def _shared(
    source: Path, sample: Sample, calibration: Calibration, dtype: torch.dtype, reporter: Reporter
) -> Iterator[Shared | None]:
    """What other runs know of the sample, and what this one adds; None where nothing is shared."""
    if sample.folder is None:
        yield None
    elif not calibration.dense:
        reporter.say(
            "calibration.shared: with inputs=sequential the sample is all that runs have in common; "
            "inputs=dense shares the statistics too"
        )
        yield None
    else:
        shared = shared_set(sample.folder, source, calibration, dtype)
        try:
            yield shared
        finally:
            shared.close()


def _on_disk(recipe: CompressRecipe, memory: int, states: int) -> bool:
    """Whether hidden states lie on disk: if asked for, or if they would take half of what is left."""
    asked, available = recipe.calibration.activations, available_memory()
    if asked != "auto":
        return asked == "disk"
    return available is not None and states > (available - memory) / 2


def _with_time_left(advance: Advance, before: int) -> Advance:
    """Says how long the rest will take by the blocks finished in this run; `before` were there already."""
    start = time.monotonic()

    def told(done: int, total: int, note: str) -> None:
        left = (time.monotonic() - start) / (done - before) * (total - done)
        rest = [f"about {_seconds(left)} left"] if done < total else []
        advance(done, total, ", ".join([note, *rest] if note else rest))

    return told


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON has it."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def next_step(report: Report) -> str:
    """Where the model lies, and how it is served."""
    [folder] = report.files
    return f"it lies in {folder}, with all of this in its README.md\nserve it: axicon serve {folder}"
