"""Experts of a distillation, each an artefact under a digest of all that decides it: trained once, wherever.

They are trained in this process, in processes of this machine, or as tasks of the cluster that this job runs
on; the bits are the same, since each trains with the same number of threads. A process is `python -m
jobs.distill_experts INPUTS FOLDER NUMBERS`; it ends by itself when the one that started it is gone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file, save
from torch import Tensor

from axicon import __version__
from axicon.distill.augment import Augment
from axicon.distill.examples import Examples
from axicon.distill.experts import Training, train_expert
from axicon.distill.networks import NETWORKS, Network
from axicon.errors import AxiconError, RunFailed
from axicon.model import safety
from axicon.model.artefact import atomic_directory, exclusive, write_bytes, write_json, write_manifest
from axicon.model.intact import changed_files
from axicon.settings import Method
from jobs.progress import Reporter
from jobs.stop import rearm, unwrapped
from jobs.submitted import submission

TRAJECTORY, ASKED, TRAIN = "trajectory.safetensors", "asked.json", "train.safetensors"
POLL_SECONDS = 0.1


@dataclass(frozen=True, kw_only=True)
class Asked:
    """All that decides the experts of a run, but for how many there are."""

    network: Mapping[str, Any]
    """Its method and settings."""
    training: Training
    augment: tuple[str, ...]
    seed: int
    data: str
    """Digest of the examples."""
    classes: int
    machine: Mapping[str, Any]

    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.as_json(), sort_keys=True).encode()).hexdigest()

    def as_json(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return found

    @classmethod
    def read(cls, path: Path) -> Self:
        return TypeAdapter(cls).validate_python(safety.read_json(path))

    def train(
        self, train: Examples, number: int, after: Callable[[int], None] = lambda epochs: None
    ) -> Tensor:
        """One expert's (epochs + 1, P)."""
        torch.set_num_threads(self.machine["threads"])
        architecture = Method.model_validate(self.network).build(NETWORKS, "network")
        module = architecture.module(train.shape, self.classes)
        augment = Augment.of(self.augment, images=train.images)
        return train_expert(
            Network(module), train, self.training, seed=self.seed, expert=number, augment=augment, after=after
        )


@dataclass(frozen=True)
class Place:
    """Where experts of one kind lie: `FOLDER/DIGEST/0000` and so on."""

    folder: Path

    @classmethod
    def of(cls, folder: Path, asked: Asked) -> Self:
        return cls(folder / asked.digest()[:16])

    def path(self, number: int) -> Path:
        return self.folder / f"{number:04d}"

    def read(self, number: int) -> Tensor | None:
        """None where it is not there. Raises AxiconError for one that is damaged."""
        path = self.path(number)
        if not path.exists():
            return None
        if found := changed_files(path):
            raise AxiconError(f"{path}: {found[0].file} {found[0].what}; remove that folder, and run again")
        return load_file(path / TRAJECTORY)["trajectory"]

    def keep(self, asked: Asked, number: int, make: Callable[[], Tensor]) -> Tensor:
        """The expert that is there, or the one that `make` gives, which is then there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with exclusive(self.folder / f".{number:04d}.lock"):  # another run may share the folder
            found = self.read(number)
            if found is None:
                found = make()
                with atomic_directory(self.path(number)) as folder:
                    write_bytes(folder / TRAJECTORY, save({"trajectory": found}))
                    about = {"kind": "trajectory", "name": f"expert {number}", "expert": number}
                    write_manifest(folder, **about, asked=asked.as_json(), versions={"axicon": __version__})
            return found


def trained(
    asked: Asked, train: Examples, count: int, folder: Path, workers: int, reporter: Reporter
) -> list[Tensor]:
    """All experts; those that are not there yet are trained, `workers` at a time. Raises AxiconError."""
    place = Place.of(folder, asked)
    missing = [number for number in range(count) if not place.path(number).exists()]
    if len(missing) < count:
        reporter.say(f"{count - len(missing)} of {count} experts lie in {place.folder}")
    if missing:
        total = len(missing) * asked.training.epochs
        with reporter.track("experts, epochs") as advance:

            def told(epochs: int) -> None:
                kept = sum(place.path(number).exists() for number in missing)
                advance(min(epochs, total - 1), total, f"{kept} of {len(missing)} done")

            if workers == 0:
                _here(asked, train, place, missing, told)
            elif submission() is not None:
                _by_ray(asked, train, place, missing, workers, told)
            else:
                _by_processes(asked, train, place, missing, workers, told)
            advance(total, total, "")
    found = [place.read(number) for number in range(count)]
    return [one for one in found if one is not None]


def _here(
    asked: Asked, train: Examples, place: Place, missing: Iterable[int], told: Callable[[int], None]
) -> None:
    for done, number in enumerate(missing):
        before = done * asked.training.epochs

        def after(epochs: int, before: int = before) -> None:
            told(before + epochs)

        place.keep(asked, number, partial(asked.train, train, number, after))


def _by_processes(
    asked: Asked, train: Examples, place: Place, missing: list[int], workers: int, told: Callable[[int], None]
) -> None:
    """Each process has every `workers`-th of them, so what it costs to start is paid once."""
    with tempfile.TemporaryDirectory(prefix="axicon-experts-") as name:
        inputs = Path(name)
        write_json(inputs / ASKED, asked.as_json())
        tensors = {"x": train.x, "y": train.y, "mean": train.mean, "std": train.std}
        write_bytes(inputs / TRAIN, save({k: v.contiguous() for k, v in tensors.items()}))
        running = []
        for first in range(min(workers, len(missing))):
            words = [name, str(place.folder), *map(str, missing[first::workers])]
            with (inputs / f"{first}.log").open("w") as log:
                running.append(
                    subprocess.Popen(
                        [sys.executable, "-m", __name__, *words], stdout=subprocess.DEVNULL, stderr=log
                    )
                )
        try:
            while any(process.poll() is None for process in running):
                time.sleep(POLL_SECONDS)
                told(sum(_epochs(inputs / f"{number}.epochs") for number in missing))
                if any(process.poll() for process in running):
                    break
        finally:
            for process in running:
                process.terminate()
                process.wait()
        for first, process in enumerate(running):
            if process.returncode:
                raise RunFailed(_reason((inputs / f"{first}.log").read_text(), process.returncode))


def _epochs(path: Path) -> int:
    """A file grows by a byte for each epoch."""
    return path.stat().st_size if path.exists() else 0


def _reason(log: str, code: int) -> str:
    lines = log.strip().splitlines()
    said = lines[-1] if lines else f"exit code {code}"
    return said.removeprefix("experts: ") if lines else f"a process that trains experts ended ({said})"


def _by_ray(
    asked: Asked, train: Examples, place: Place, missing: list[int], workers: int, told: Callable[[int], None]
) -> None:
    """One task for each; what they find is written here, so nodes need no folder in common."""
    import ray

    ray.init(ignore_reinit_error=True, log_to_driver=False)
    rearm()
    most = max(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"])
    if most < asked.machine["threads"]:  # such tasks would wait for ever
        raise AxiconError(
            f"threads={asked.machine['threads']}: no node of the cluster has so many CPUs, the largest has "
            f"{most:g}"
        )
    task = ray.remote(num_cpus=asked.machine["threads"], max_retries=3)(_task)
    data = ray.put([train.x.numpy(), train.y.numpy(), train.mean.numpy(), train.std.numpy()])
    waiting, running = list(missing), dict[Any, int]()
    done = 0
    while waiting or running:
        while waiting and len(running) < workers:
            number = waiting.pop(0)
            running[task.remote(asked.as_json(), data, number)] = number
        with unwrapped():
            [ready], _ = ray.wait([*running], num_returns=1)
        number = running.pop(ready)
        try:
            path = torch.from_numpy(ray.get(ready).copy())
        except ray.exceptions.RayTaskError as error:
            raise RunFailed(str(error.cause)) from None
        place.keep(asked, number, partial(torch.Tensor.clone, path))
        done += 1
        told(done * asked.training.epochs)


def _task(asked: Mapping[str, Any], data: Any, number: int) -> Any:
    x, y, mean, std = (torch.from_numpy(one.copy()) for one in data)
    what = TypeAdapter(Asked).validate_python(asked)
    train = Examples(x=x, y=y, classes=tuple(map(str, range(what.classes))), mean=mean, std=std)
    return what.train(train, number).numpy()


def main(words: list[str]) -> None:
    """A process of `_by_processes`: the experts NUMBERS, from what lies in a folder, into another."""
    inputs, place = Path(words[0]), Place(Path(words[1]))
    asked, parent = Asked.read(inputs / ASKED), os.getppid()
    tensors = load_file(inputs / TRAIN)
    train = Examples(classes=tuple(map(str, range(asked.classes))), **tensors)
    for number in map(int, words[2:]):
        count = inputs / f"{number}.epochs"

        def after(epochs: int, count: Path = count) -> None:
            if os.getppid() != parent:
                shutil.rmtree(inputs, ignore_errors=True)
                sys.exit("experts: whoever started this is gone")
            with count.open("a") as file:
                file.write(".")

        place.keep(asked, number, partial(asked.train, train, number, after))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except AxiconError as error:
        sys.exit(f"experts: {error}")
