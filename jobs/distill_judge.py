"""How a distillation is judged, by which baselines, and what was found at which iteration."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from axicon.distill.augment import Augment
from axicon.distill.choose import at_random, nearest_to_centres
from axicon.distill.judge import BASELINE_RATES, Judging, judge, judge_one
from axicon.distill.networks import Network
from axicon.model.artefact import write_atomically
from jobs.distill_data import Data
from jobs.distill_recipe import DistillRecipe


@dataclass(frozen=True)
class Judge:
    """Fresh networks, as a recipe asks for them."""

    recipe: DistillRecipe
    data: Data
    network: Network

    @property
    def how(self) -> Judging:
        asked = self.recipe.judge
        return Judging(
            nets=asked.nets,
            epochs=asked.epochs,
            momentum=asked.momentum,
            weight_decay=asked.weight_decay,
            decay=asked.decay,
        )

    @property
    def augment(self) -> Augment | None:
        return Augment.of(self.recipe.augment, images=self.data.train.images)

    def facts(self) -> dict[str, Any]:
        """What figures rest on: with another of these they are other figures."""
        return dataclasses.asdict(self.how) | {"test": self.data.test.sha256()}

    def verdict(self, x: Tensor, y: Tensor, lr: float) -> tuple[float, ...]:
        """Accuracies of networks that were trained on (x, y) alone."""
        seed = self.recipe.seed
        return judge(
            self.network, x, y, lr, self.data.test, self.how, seed=seed, augment=self.augment
        ).accuracies

    def baselines(self, alpha: float) -> dict[str, tuple[float, ...]]:
        """Accuracies with as many real examples: drawn anew for each network, and chosen by k-means."""
        train, seed, ipc, nets = self.data.train, self.recipe.seed, self.recipe.ipc, self.how.nets
        classes = len(train.classes)
        draws = [at_random(train.y, classes, ipc, seed + 1 + net) for net in range(nets)]
        centres = nearest_to_centres(train.x.flatten(1), train.y, classes, ipc, seed)
        sets = {"random": draws, "kmeans": [centres] * nets}
        rates = (*BASELINE_RATES, alpha)
        return {
            name: max((self._real(chosen, rate) for rate in rates), key=statistics.fmean)
            for name, chosen in sets.items()
        }

    def _real(self, sets: list[Tensor], lr: float) -> tuple[float, ...]:
        """A network for each set of real examples."""
        train, seed = self.data.train, self.recipe.seed
        return tuple(
            judge_one(
                self.network,
                train.x[rows],
                train.y[rows],
                lr,
                self.data.test,
                self.how,
                seed=seed,
                net=net,
                augment=self.augment,
            )
            for net, rows in enumerate(sets)
        )


class Judgements:
    """Accuracies by iteration, in a file of the run."""

    def __init__(self, path: Path, of: dict[str, Any]) -> None:
        self.path, self.of = path, json.loads(json.dumps(of))
        kept = json.loads(path.read_text()) if path.exists() else {}
        same = kept.get("of") == self.of
        self.found: dict[str, list[float]] = kept.get("found", {}) if same else {}
        self.others: dict[str, Any] = kept.get("compared", {}) if same else {}

    def has(self, iteration: int) -> bool:
        return str(iteration) in self.found

    def at(self, iteration: int) -> tuple[float, ...]:
        return tuple(self.found[str(iteration)])

    def mean(self, iteration: int) -> float:
        return statistics.fmean(self.at(iteration))

    def add(self, iteration: int, accuracies: tuple[float, ...]) -> None:
        self.found[str(iteration)] = list(accuracies)
        self._write()

    def compared(
        self, alpha: float, judged: Callable[[float], dict[str, tuple[float, ...]]]
    ) -> dict[str, tuple[float, ...]]:
        """Those of real examples, computed once for a distilled step size, which is among their rates."""
        if self.others.get("alpha") != alpha:
            self.others = {"alpha": alpha, "found": judged(alpha)}
            self._write()
        return {name: tuple(found) for name, found in self.others["found"].items()}

    def note(self) -> str:
        if not self.found:
            return ""
        last = max(map(int, self.found))
        return f", accuracy {self.mean(last):.3f} at {last}"

    def _write(self) -> None:
        content = {"of": self.of, "found": self.found, "compared": self.others}
        write_atomically(self.path, json.dumps(content, indent=1))
