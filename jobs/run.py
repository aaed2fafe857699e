"""`axicon run`: verbs one after another, each on what those before it made.

A step is the verb's own `run`, so it goes on where it was stopped if the verb can. `run.json` says which
steps are done and as which recipe; those are not done again.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from axicon.errors import AxiconError
from axicon.model import checkpoint
from axicon.model.artefact import claim, write_atomically
from axicon.model.machine import cores
from axicon.settings import Recipe, laid
from jobs.command import read_file, shipped
from jobs.progress import Reporter
from jobs.report import Report, write_json
from jobs.run_recipe import RunRecipe, StepRecipe
from jobs.shown import size
from jobs.stop import Stopped
from jobs.sweep_text import write_text
from jobs.sweep_verbs import VERBS, verb_of

DEFAULT_OUT = Path("artifacts/runs")
DONE, RECIPE = "run.json", "run.yaml"
NAME = re.compile(r"(?<!\{)\{([a-z][a-z0-9_]*)\}(?!\})")
WINDOW = 256
WRITTEN = {"text": (8, 0, "text to measure on"), "train": (32, 1, "text to train on")}
"""Windows of the texts that the model writes, the seed that makes them different, and what they are for."""
GIVEN = ("model", *WRITTEN)


@dataclass(frozen=True)
class Step:
    name: str
    verb: str
    settings: Mapping[str, Any]
    """Names not put in yet."""
    recipe: type[Recipe]
    run: Callable[[Any, Reporter], Report]
    made: Callable[[Report], Path]
    """What later steps mean by its name."""

    @classmethod
    def of(cls, step: StepRecipe, threads: int | None) -> Step:
        """Raises AxiconError for a verb, a recipe or a setting that does not exist."""
        recipe, run, made = _verb(step.verb)
        values: Mapping[str, Any] = step.settings
        if step.recipe is not None:
            file = step.recipe if step.recipe.endswith((".yaml", ".yml")) else f"{step.recipe}.yaml"
            values = laid(read_file(shipped(file) or Path(file)), step.settings)
        if "out" in values:
            raise AxiconError(f"steps.{step.name}: out is given by the run; leave it out")
        if threads is not None and "threads" in recipe.model_fields:
            values = {"threads": threads} | dict(values)
        return cls(step.name, step.verb, values, recipe, run, made)

    def resolved(self, places: Mapping[str, Path | str], out: Path) -> Recipe:
        """Its recipe with names put in. Raises AxiconError for an unknown name and a wrong setting."""
        values = _put_in(self.settings, places, self.name)
        try:
            return self.recipe.parse(**values, out=str(out))
        except AxiconError as error:
            raise AxiconError(f"steps.{self.name}: {error}") from None


def _verb(name: str) -> tuple[type[Recipe], Callable[[Any, Reporter], Report], Callable[[Report], Path]]:
    if name == "sweep":
        from jobs import sweep
        from jobs.sweep_recipe import SweepRecipe

        return SweepRecipe, sweep.run, _winner
    if name == "ask":
        from jobs import ask

        return ask.AskRecipe, ask.run, _first_file
    if name not in VERBS:
        raise AxiconError(f"verb={name}: a step is one of {', '.join([*VERBS, 'sweep', 'ask'])}")
    verb = verb_of(name)
    return verb.recipe, verb.run, _first_file


def _first_file(report: Report) -> Path:
    return report.files[0]


def _winner(report: Report) -> Path:
    """The model of the best trial. Raises AxiconError where there is none."""
    best, folder = report.details["best"], report.files[0].parent
    if best is None:
        raise AxiconError(f"{folder}: no trial ended within the limits, so there is no winner to go on with")
    [trial] = [one for one in report.details["trials"] if one["trial"] == best]
    return folder / str(trial["files"][0])


def run(recipe: RunRecipe, reporter: Reporter | None = None) -> Report:
    """Do the steps that are left. Raises AxiconError for what is wrong with any of them before the first one
    begins, and whatever a step raises, with its name.
    """
    reporter, clock = reporter or Reporter(), time.perf_counter()
    if not recipe.steps:
        raise AxiconError("steps: there is none; name a recipe, such as axicon run recipes/tour.yaml")
    steps = [Step.of(step, recipe.threads) for step in recipe.steps]
    folder = _folder(recipe)
    _check(steps, recipe, folder)
    with claim(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / RECIPE, recipe.model_copy(update={"out": folder}).as_yaml())
        done = _done(folder)
        places = _given(recipe, steps, folder, reporter)
        for number, step in enumerate(steps, 1):
            found = _do(step, f"{number}/{len(steps)}", places, folder, done.get(step.name), reporter)
            done[step.name], places[step.name] = found, found["made"]
            write_json(folder / DONE, {"steps": done})
    return Report(
        verb="run",
        recipe=recipe,
        metrics={
            f"{name}/{key}": value for name, one in done.items() for key, value in one["metrics"].items()
        },
        seconds=time.perf_counter() - clock,
        files=(folder / DONE,),
        details={"steps": done},
    )


def _folder(recipe: RunRecipe) -> Path:
    name = checkpoint.model_id(recipe.model).replace("/", "--")
    return (recipe.out or DEFAULT_OUT / name).expanduser().absolute()


def _check(steps: list[Step], recipe: RunRecipe, folder: Path) -> None:
    """Every step's recipe, with what is not made yet at the place where it will be."""
    places: dict[str, Path | str] = dict.fromkeys(GIVEN, folder) | {"model": recipe.model}
    for step in steps:
        if step.name in places:
            raise AxiconError(f"steps: {step.name} is a name already; give each step its own")
        step.resolved(places, folder / step.name)
        places[step.name] = folder / step.name


def _done(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / DONE
    try:
        found: dict[str, dict[str, Any]] = json.loads(path.read_text())["steps"]
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError) as error:
        raise AxiconError(
            f"{path}: cannot be read ({error}); remove it, and the steps are looked at again"
        ) from None
    return found


def _given(recipe: RunRecipe, steps: list[Step], folder: Path, reporter: Reporter) -> dict[str, Path | str]:
    """What names stand for before the first step. Texts nobody named are written by the model, if a step
    asks for them."""
    places: dict[str, Path | str] = {"model": recipe.model}
    asked = {name for step in steps for name in _names(step.settings)}
    for name, (windows, seed, what) in WRITTEN.items():
        own: Path | None = getattr(recipe, name)
        places[name] = folder / f"{name}.txt" if own is None else own.expanduser().absolute()
        if own is None and name in asked:
            source = checkpoint.resolve(recipe.model)
            write_text(
                folder / f"{name}.txt",
                source,
                windows=windows,
                window=min(WINDOW, checkpoint.shape_of(source).max_positions),
                seed=seed,
                dtype="bfloat16",
                threads=recipe.threads or cores(),
                reporter=reporter,
                what=what,
            )
    return places


def _do(
    step: Step,
    number: str,
    places: Mapping[str, Path | str],
    folder: Path,
    before: Mapping[str, Any] | None,
    reporter: Reporter,
) -> dict[str, Any]:
    """What `run.json` says of a step, after it is done."""
    recipe = step.resolved(places, folder / step.name)
    plain = json.loads(recipe.model_dump_json())
    if before is not None:
        if differ := [key for key in plain if plain[key] != before["recipe"].get(key)]:
            raise AxiconError(
                f"step {step.name} was done with another {differ[0]} ({before['recipe'].get(differ[0])}, now "
                f"{plain[differ[0]]}); give that, or a new folder with out="
            )
        if Path(before["made"]).exists():
            reporter.say(f"step {number}, {step.name}: done before")
            return dict(before)
    reporter.say(f"step {number}, {step.name}: {step.verb}")
    try:
        report = step.run(recipe, reporter)
    except Stopped as stopped:
        stopped.kept = f"in step {step.name}, {stopped.kept}; {folder} goes on from there"
        raise
    except AxiconError as error:
        raise type(error)(f"step {step.name}: {error}") from error
    metrics = {key: float(value) for key, value in report.metrics.items()}
    made = str(step.made(report))
    return {"verb": step.verb, "recipe": plain, "seconds": report.seconds, "metrics": metrics, "made": made}


def _put_in(value: Any, places: Mapping[str, Path | str], step: str) -> Any:
    """`value` with names in its texts replaced."""
    if isinstance(value, Mapping):
        return {key: _put_in(one, places, step) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_put_in(one, places, step) for one in value]
    if not isinstance(value, str):
        return value

    def place(found: re.Match[str]) -> str:
        if found[1] not in places:
            raise AxiconError(
                f"steps.{step}: no step before it is named {found[1]}; known are {', '.join(places)}"
            )
        return str(places[found[1]])

    return NAME.sub(place, value)


def _names(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping | list | tuple):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from _names(one)
    elif isinstance(value, str):
        yield from NAME.findall(value)


def table(report: Report) -> Table:
    """A line for each step: how long it took, and the figures that say most."""
    shown = Table(
        title=f"{len(report.details['steps'])} steps, {report.seconds:.0f} s now", title_justify="left"
    )
    for column in ("step", "verb", "seconds", "bytes", "perplexity", "tokens/s"):
        shown.add_column(column, justify="left" if column in ("step", "verb") else "right")
    for name, one in report.details["steps"].items():
        m = one["metrics"]
        speed = m.get("tokens_per_s", m.get("tokens_per_s/1"))
        shown.add_row(
            name,
            one["verb"],
            f"{one['seconds']:.0f}",
            size(int(m["bytes"])) if "bytes" in m else "",
            f"{m['perplexity']:.2f}" if "perplexity" in m else "",
            "" if speed is None else f"{speed:.0f}",
        )
    return shown


def summary(report: Report) -> list[str]:
    """Where things lie, and what to do with them."""
    folder = report.files[0].parent
    lines = [f"all of it is in {folder}"]
    models = [
        one["made"]
        for one in report.details["steps"].values()
        if one["verb"] in ("compress", "finetune", "sweep")
    ]
    if models:
        lines += [
            f"serve the last model: axicon serve {models[-1]}",
            f"its parents: axicon lineage {models[-1]}",
        ]
    return lines
