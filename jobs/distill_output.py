"""What a distillation leaves: a data set as an artefact, with a sheet of its images and a card."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from axicon import __version__
from axicon.distill.dataset import SHEET, Dataset, facts
from axicon.distill.examples import Examples
from axicon.distill.judge import BASELINE_RATES
from axicon.distill.loop import Made
from axicon.model.artefact import (
    DATASET,
    README,
    atomic_directory,
    read_manifest,
    write_atomically,
    write_manifest,
)
from axicon.model.intact import changed_files
from jobs.distill_recipe import flat

if TYPE_CHECKING:
    from jobs.distill import Job


def write_result(
    job: Job, examples: Examples, made: Made, metrics: Mapping[str, float], target: Path
) -> Path:
    """Write the data set anew, unless it is there and intact. The card is written in any case."""
    dataset = Dataset(examples=examples, alpha=float(made.alpha))
    about = _about(job, dataset, made)
    if not _is_there(target, about):
        if target.exists():
            old = target.with_name(f".{target.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
            shutil.rmtree(old)
        with atomic_directory(target) as folder:
            dataset.write(folder)
            write_manifest(folder, **about)
    write_atomically(target / README, _card(job, dataset, made, metrics))
    return target


def _is_there(target: Path, about: Mapping[str, Any]) -> bool:
    manifest = read_manifest(target) if target.is_dir() else None
    if manifest is None:
        return False
    same = all(manifest.get(key) == json.loads(json.dumps(value)) for key, value in about.items())
    return same and not changed_files(target)


def _about(job: Job, dataset: Dataset, made: Made) -> dict[str, Any]:
    """What the manifest says beside the files."""
    recipe = job.recipe
    return {
        "kind": "dataset",
        "name": job.folder.name,
        "chain": [{"method": "distill", "settings": settings(job, made), "axicon": __version__}],
        "parents": [dict(parent) for parent in job.data.parents],
        "licence": None,
        "dataset": facts(dataset.examples, dataset.alpha) | {"test_sha256": job.data.test.sha256()},
        "recipe": recipe.model_dump(mode="json", exclude={"out"}),
        "versions": {"axicon": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": job.machine(),
    }


def settings(job: Job, made: Made) -> dict[str, Any]:
    """All that decides the examples, flat, as `experts.lr`."""
    before = {"start_from": job.earlier[-1]["log"]} if job.earlier else {}
    return flat(job.recipe.deciding()) | {
        "iterations": made.iterations, "data": job.data.train.sha256(), **before
    }  # fmt: skip


def _card(job: Job, dataset: Dataset, made: Made, metrics: Mapping[str, float]) -> str:
    recipe, examples = job.recipe, dataset.examples
    nets, epochs = recipe.judge.nets, recipe.judge.epochs
    rows = [("these", metrics["accuracy"])]
    rows += [
        (name, metrics[key])
        for name, key in (("as many real ones at random", "accuracy_random"),
                          ("as many real ones by k-means", "accuracy_kmeans"),
                          ("all real ones", "accuracy_experts"))
        if key in metrics
    ]  # fmt: skip
    table = "\n".join(f"| {name} | {value:.1%} |" for name, value in rows)
    picture = f"![the images, a row for each class]({SHEET})\n\n" if examples.images else ""
    nearest = "" if examples.images or not job.data.texts else _nearest(job, examples)
    source = Path(recipe.data.source).name
    return f"""# {job.folder.name}

{len(examples)} distilled examples, {recipe.ipc} of each of {len(examples.classes)} classes: made so that a
network trained on them goes where training on {len(job.data.train):,} real examples of {source} takes it.

{picture}| trained on | accuracy |
|---|---|
{table}

Mean of {nets} fresh networks ({recipe.network.method}) behind the last of {epochs} epochs, on
{len(job.data.test):,} held-out examples; {metrics["accuracy_deviation"]:.1%} standard deviation. Real
examples are judged at the best of {len(BASELINE_RATES) + 1} learning rates.

## Reading it

    from safetensors.torch import load_file

    data = load_file("{DATASET}")
    x, y = data["x"], data["y"]             # standardised, {tuple(examples.x.shape)}, and labels
    raw = x * data["std"] + data["mean"]    # in the units of the source
    lr = float(data["alpha"])               # the learning rate that was distilled along, {dataset.alpha:.4g}

Classes in order: {", ".join(examples.classes)}. `manifest.json` says how it was made, from what, and by which
versions; `axicon verify` checks every byte, `axicon lineage` shows the sources. Inputs of your own are
standardised by the same `mean` and `std`.
{nearest}"""


def _nearest(job: Job, examples: Examples) -> str:
    """A real text for each made vector, to look at; the vector is not that text."""
    apart = torch.cdist(examples.x, job.data.train.x)
    lines = []
    for i, place in enumerate(apart.argmin(dim=1).tolist()):
        text = " ".join(job.data.texts[place].split())[:100]
        lines.append(f"| {examples.classes[int(examples.y[i])]} | {text.replace('|', chr(92) + '|')} |")
    rows = "\n".join(lines)
    return f"\nThe real text nearest to each, to get an idea:\n\n| class | text |\n|---|---|\n{rows}\n"
