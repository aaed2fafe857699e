"""`axicon card`: what a compressed model is worth beside the dense one it was made from.

Fills `card.json`, `README.md` and `report.json` of a directory that `axicon compress` made. Each figure is
written as soon as it is known. What a model has answered is remembered by its digest in the cache, so the
dense model is asked once however many models are made from it, and a stopped run goes on where it was.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from axicon.data import join_rows, read_rows
from axicon.errors import AxiconError
from axicon.evaluate.card import ZERO_SHOT, Kind, Row
from axicon.evaluate.run import Tasks
from axicon.model import checkpoint
from axicon.model.artefact import claim
from axicon.model.machine import cores
from axicon.settings import Recipe
from jobs import card_text
from jobs.card_file import Card
from jobs.card_measure import SERVED, Asked, measure_quality, measure_serving
from jobs.card_recipe import CardRecipe
from jobs.lineage import locate
from jobs.model_report import part_bytes, weight_bytes
from jobs.progress import Reporter
from jobs.report import Report
from jobs.stop import Stopped

NOT_HERE = "the dense model is not at {source} any more"


def run(recipe: CardRecipe, reporter: Reporter | None = None) -> Report:
    """Measure what the card lacks and the recipe asks for.

    Raises AxiconError before the work for what is wrong with the recipe, and for a directory without a card.
    What cannot be measured has its reason in the card.
    """
    reporter, clock = reporter or Reporter(), time.perf_counter()
    folder = Path(recipe.model or ".").expanduser()
    card = Card.of(folder)
    if card is None:
        raise AxiconError(
            f"{recipe.model or 'card'}: name a directory that axicon compress made; "
            "a dense model is measured by axicon evaluate"
        )
    text = None if recipe.text is None else join_rows(read_rows(recipe.text, column=recipe.column))
    tasks = None
    if recipe.data is not None or recipe.hub:
        tasks = Tasks(recipe.tasks or ZERO_SHOT, data_dir=recipe.data, include=recipe.include)
    torch.set_num_threads(recipe.threads or cores())
    with claim(folder.absolute()):
        Filling(card, Asked.of(recipe, text, tasks), recipe.serving, recipe.again, reporter).run()
    return report_of(card, "card", recipe, time.perf_counter() - clock)


def report_of(card: Card, verb: str, recipe: Recipe, seconds: float, **more: Any) -> Report:
    values = {name: row.compressed for name, row in card.rows.items()}
    dense = {f"dense/{name}": row.dense for name, row in card.rows.items()}
    return Report(
        verb=verb,
        recipe=recipe,
        metrics={name: value for name, value in (values | dense).items() if value is not None},
        seconds=seconds,
        files=(card.folder,),
        details=card.as_json() | {"missing": card_text.missing(card.rows)} | more,
    )


@dataclass
class Filling:
    """The work on one card."""

    card: Card
    asked: Asked
    serving: bool
    again: bool
    reporter: Reporter
    dense: Path | None = None
    """Of the parent, where it still is."""

    def run(self) -> None:
        card = self.card
        try:
            self.dense = find_dense(card) if self.dense is None else self.dense
            if self.dense is None:
                self._all_null("dense", NOT_HERE.format(source=card.base.source))
            if any(row.lacks(name) for name, row in card.rows.items() if name.startswith("bytes")):
                self.sizes()
                card.write()
            if self.serving and (self.again or self._lacks_serving()):
                measure_serving(card, self.places(), self.asked, self.reporter)
                card.write()
            if self.asked.something:
                for kind, place in self.places().items():
                    measure_quality(card, kind, place, self.asked, self.reporter)
        except Stopped as stopped:
            stopped.kept = (
                f"the model is whole; what was measured is kept, `axicon card {card.folder}` goes on"
            )
            raise

    def places(self) -> dict[Kind, Path]:
        """The dense model first, as the other one is compared with what it says."""
        found: dict[Kind, Path] = {} if self.dense is None else {"dense": self.dense}
        return found | {"compressed": self.card.folder}

    def sizes(self) -> None:
        """Bytes of both, by part."""
        for kind, place in self.places().items():
            self.card.put("bytes", kind, weight_bytes(place), {})
            for part, count in part_bytes(place).items():
                self.card.put(f"bytes/{part}", kind, count, {})

    def _lacks_serving(self) -> bool:
        served = [(name, row) for name, row in self.card.rows.items() if name.startswith(SERVED)]
        both = self.dense is not None
        return any(row.lacks(name) if both else row.compressed is None for name, row in served)

    def _all_null(self, kind: Kind, why: str) -> None:
        for name in self.card.rows:
            self.card.why_not(name, kind, why)


def find_dense(card: Card) -> Path | None:
    """The model that was compressed, if it is still there and the same."""
    try:
        place = locate(card.base.source, card.folder)
        if place is not None and place.is_dir() and checkpoint.digest(place) == card.base.sha256:
            return place
    except AxiconError:
        pass  # not on this machine
    return None


def table(report: Report) -> Table:
    """What a person wants to see of it first."""
    rows = {name: Row.model_validate(row) for name, row in report.details["figures"].items()}
    return card_text.table(rows, f"{report.details['name']}, {report.seconds:.0f} s")


def notes(report: Report) -> list[str]:
    """The judgement, and a line for what is not measured."""
    return [report.details["judgement"], *(f"not measured: {line}" for line in report.details["missing"])]
