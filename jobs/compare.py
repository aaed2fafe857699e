"""`axicon compare`: models beside each other, by the figures that may be compared.

A figure comes from a model directory (its files and its `report.json`), from a results file of `axicon
evaluate` or lm-eval, or, for a directory, from earlier results of the very same weights. It carries what it
rests on: text, protocol, questions, processor. Only figures that rest on the same are set against each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import Field

from axicon.errors import AxiconError
from axicon.settings import Recipe, Words
from jobs.labels import label

WEIGHTS, BITS, PERPLEXITY = "weights", "bits per weight", "perplexity"
SPEEDS = {"tokens/s, 1 stream": "1", "tokens/s, 8 streams": "8"}
METHODS = "methods"
OF_CARDS = (
    "agreement/prefix", "agreement/equal", "first_token_ms", "peak_memory", "outliers/max_inf_norm",
    "outliers/kurtosis",
)  # fmt: skip
"""Rows of a card that are shown under their label, where they were measured."""


class CompareRecipe(Recipe):
    """What is set beside each other."""

    model: Words = Field(
        (), description="model directories, demo, or results_*.json files; the first is the base"
    )
    plot: Path | None = Field(
        Path("artifacts/compare/compare.svg"), description="picture to draw, .svg or .png; none: no picture"
    )


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One value, what it rests on, or why it is missing and which command would measure it."""

    value: float | None = None
    basis: Mapping[str, Any] = field(default_factory=dict)
    why: str = ""
    command: str = ""


@dataclass(frozen=True, kw_only=True)
class Column:
    """One model, or one results file."""

    name: str
    typed: str
    methods: str
    figures: Mapping[str, Figure]
    sha256: str = ""
    """Of the model, where it is a directory."""
    base: tuple[str, Mapping[str, Figure]] = ("", {})
    """Digest of the dense model that a card is about too, and what the card says of it."""

    def get(self, row: str) -> Figure:
        return self.figures.get(row) or Figure(why="not measured", command=self.command_for(row))

    def command_for(self, row: str) -> str:
        """What would measure a row for this model; nothing for a results file, which stays as it is."""
        if self.typed.endswith(".json"):
            return ""
        start = f"axicon evaluate {self.typed}"
        if row in SPEEDS:
            return f"{start} speed=true"
        if row == PERPLEXITY:
            return f"{start} text=FILE"
        if row in {label(name) for name in OF_CARDS}:
            return f"axicon card {self.typed}"
        return "" if row in (WEIGHTS, BITS) else f"{start} tasks={row.partition(' ')[0]} data=DIR"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A figure beside the first one of its row."""

    figure: Figure
    comparable: bool
    percent: float | None = None
    """Change against the first model, where both have the figure."""


@dataclass(frozen=True)
class Comparison:
    columns: Sequence[Column]
    rows: Mapping[str, Sequence[Cell]]


def run(recipe: CompareRecipe) -> Comparison:
    """Read everything and set it beside each other. Draws nothing and writes nothing.

    Raises AxiconError for fewer than two models, for one that cannot be read, and when no two of them have a
    figure in common.
    """
    from jobs.compare_read import read

    if len(recipe.model) < 2:
        raise AxiconError("compare takes two models or more: directories, demo, or results_*.json files")
    columns = _told_apart(_from_cards([read(typed) for typed in recipe.model]))
    names = list(dict.fromkeys(name for column in columns for name in column.figures))
    first = [WEIGHTS, BITS, PERPLEXITY]
    order = [*first, *(name for name in names if name not in (*first, *SPEEDS)), *SPEEDS]
    rows = {name: _row([column.get(name) for column in columns]) for name in order}
    if not any(sum(cell.comparable for cell in cells) > 1 for cells in rows.values()):
        raise AxiconError(
            f"{' and '.join(column.name for column in columns)} have no figure that may be compared: measure "
            "them with the same text= and windows=, the same tasks=, or speed=true"
        )
    return Comparison(columns, rows)


def _from_cards(columns: Sequence[Column]) -> list[Column]:
    """What a dense model lacks may stand in the card of another one, beside what that is compared with."""
    filled = []
    for column in columns:
        known = {row: figure for row, figure in column.figures.items() if figure.value is not None}
        for sha256, figures in (other.base for other in columns):
            if column.sha256 and sha256 == column.sha256:
                known = {**figures, **known}
        filled.append(replace(column, figures={**column.figures, **known}))
    return filled


def _told_apart(columns: Sequence[Column]) -> list[Column]:
    """Where two have one name, the last part of what was typed takes its place, or else all of it."""
    for name in (lambda column: Path(column.typed).name or column.typed, lambda column: column.typed):
        names = [column.name for column in columns]
        columns = [
            replace(column, name=name(column)) if names.count(column.name) > 1 else column
            for column in columns
        ]
    return list(columns)


def _row(figures: Sequence[Figure]) -> list[Cell]:
    """Compared with the first figure there is; percent only where that is the first model's."""
    base = next((figure for figure in figures if figure.value is not None), None)
    cells = []
    for place, figure in enumerate(figures):
        comparable = base is not None and figure.value is not None and figure.basis == base.basis
        percent = None
        if comparable and place and base is figures[0] and base.value and figure.value is not None:
            percent = 100 * (figure.value / base.value - 1)
        cells.append(Cell(figure=figure, comparable=comparable, percent=percent))
    return cells


def difference(figure: Figure, base: Figure) -> str:
    """In what two bases differ: "another text", "windows 3 instead of 20"."""
    parts = []
    for key in dict.fromkeys([*base.basis, *figure.basis]):
        ours, theirs = figure.basis.get(key), base.basis.get(key)
        if ours != theirs:
            long = any(len(str(value)) > 48 for value in (ours, theirs))
            parts.append(f"another {key}" if long else f"{key} {ours} instead of {theirs}")
    return ", ".join(parts)


def as_json(comparison: Comparison) -> dict[str, Any]:
    return {
        "models": [
            {"name": column.name, "source": column.typed, "methods": column.methods}
            for column in comparison.columns
        ],
        "figures": {
            row: [
                {
                    "value": cell.figure.value,
                    "comparable": cell.comparable,
                    "change_percent": cell.percent,
                    "basis": dict(cell.figure.basis),
                }
                | ({"reason": cell.figure.why, "command": cell.figure.command} if cell.figure.why else {})
                for cell in cells
            ]
            for row, cells in comparison.rows.items()
        },
    }
