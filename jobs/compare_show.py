"""`axicon compare` as a table and as a picture."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from axicon.errors import AxiconError
from jobs import labels
from jobs.compare import (
    BITS,
    METHODS,
    OF_CARDS,
    PERPLEXITY,
    SPEEDS,
    WEIGHTS,
    Cell,
    Comparison,
    Figure,
    difference,
)
from jobs.shown import size

SUFFIXES = (".svg", ".png")
LOG_FROM = 8.0
"""Sizes further apart than this are drawn on a logarithmic axis."""
NAME_LETTERS = 28
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#7a7a7a", "#999933")
"""Of Okabe and Ito: told apart by everybody."""


def table(comparison: Comparison) -> tuple[Table, list[str]]:
    """The table, and beneath it a line for each cell that has no figure or one that does not compare."""
    notes: list[str] = []
    result = Table()
    result.add_column("")
    for column in comparison.columns:
        result.add_column(column.name, justify="right", overflow="fold")
    for row, cells in comparison.rows.items():
        result.add_row(row, *(_cell(comparison, row, place, notes) for place in range(len(cells))))
    result.add_row(METHODS, *(column.methods for column in comparison.columns))
    return result, [f"({number}) {note}" for number, note in enumerate(notes, 1)]


def _cell(comparison: Comparison, row: str, place: int, notes: list[str]) -> str:
    cell, column = comparison.rows[row][place], comparison.columns[place]
    figure = cell.figure
    if figure.value is None:
        command = f": {figure.command}" if figure.command else ""
        return f"- {_note(f'{column.name}, {figure.why}{command}', notes)}"
    if not cell.comparable:
        base = next(one.figure for one in comparison.rows[row] if one.comparable)
        kinds = [key for key in base.basis if base.basis[key] != figure.basis.get(key)]
        said = f"{column.name}, {row} {written(row, figure.value)}, not comparable: "
        said += difference(figure, base)
        if command := column.command_for(row):
            said += f"; {command}{measured_like(base) if row == PERPLEXITY else ''}"
        return f"other {' and '.join(kinds)} {_note(said, notes)}"
    percent = "" if cell.percent is None else f" ({cell.percent:+.1f} %)"
    return written(row, figure.value) + percent


def measured_like(figure: Figure) -> str:
    """The settings of `axicon evaluate` for a perplexity that compares with this one."""
    settings = f" windows={figure.basis.get('windows')}"
    known = re.fullmatch(r".*, window (\d+), (\w+)", str(figure.basis.get("protocol")))
    return settings + (f" window={known[1]} dtype={known[2]}" if known else "")


def _note(text: str, notes: list[str]) -> str:
    if text not in notes:
        notes.append(text)
    return f"({notes.index(text) + 1})"


def written(row: str, value: float) -> str:
    if row == WEIGHTS:
        return size(int(value))
    if (name := next((name for name in OF_CARDS if labels.label(name) == row), None)) is not None:
        return labels.written(name, value)
    digits = {BITS: 2, PERPLEXITY: 3} | dict.fromkeys(SPEEDS, 1)
    return f"{value:.{digits.get(row, 4)}f}"


def check_plot(path: Path) -> None:
    if path.suffix not in SUFFIXES:
        raise AxiconError(f"plot={path}: the picture is {' or '.join(SUFFIXES)}; name such a file")


def why_no_picture(comparison: Comparison) -> str | None:
    """A sentence, or None where a picture can be drawn."""
    if not _points(comparison) and not _speeds(comparison):
        return "no picture: no model has a perplexity and a size, or a speed"
    if importlib.util.find_spec("matplotlib") is None:
        return "no picture: matplotlib is not installed (pip install matplotlib)"
    return None


def draw(comparison: Comparison, path: Path) -> None:
    """Size against perplexity, and speeds, as far as there are any. Raises AxiconError."""
    import matplotlib
    from matplotlib.figure import Figure as Sheet

    points, speeds = _points(comparison), _speeds(comparison)
    panels = [panel for panel, there in ((_draw_quality, points), (_draw_speeds, speeds)) if there]
    height = max(3.6, 1.4 + 0.62 * len(speeds))
    figure = Sheet(figsize=(6.2 * len(panels), height), layout="constrained", dpi=140)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    with matplotlib.rc_context({"svg.hashsalt": "axicon", "svg.fonttype": "none"}):
        for panel, axis in zip(panels, axes, strict=True):
            axis.spines[["top", "right"]].set_visible(False)
            panel(axis, comparison)
        if points:
            # Last, and with the layout fixed: only now is it known how much room the names have.
            figure.draw_without_rendering()
            figure.set_layout_engine("none")
            _label(axes[0], [(x / 1e6, y, _short(comparison.columns[place].name)) for place, x, y in points])
        _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.{secrets.token_hex(4)}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(temporary, metadata={"Date": None} if path.suffix == ".svg" else None)
        temporary.replace(path)
    except OSError as error:
        raise AxiconError(f"plot={path}: cannot be written ({error.strerror})") from None
    finally:
        temporary.unlink(missing_ok=True)


def _points(comparison: Comparison) -> list[tuple[int, float, float]]:
    """(column, bytes, perplexity) of those that compare."""
    rows = comparison.rows
    return [
        (place, size.figure.value, quality.figure.value)
        for place, (size, quality) in enumerate(zip(rows[WEIGHTS], rows[PERPLEXITY], strict=True))
        if size.figure.value is not None and quality.comparable and quality.figure.value is not None
    ]


def _speeds(comparison: Comparison) -> list[tuple[int, list[float | None]]]:
    """(column, tokens/s at each number of streams) of those that compare."""

    def value(cell: Cell) -> float | None:
        return cell.figure.value if cell.comparable else None

    found = []
    for place in range(len(comparison.columns)):
        values = [value(comparison.rows[row][place]) for row in SPEEDS]
        if any(one is not None for one in values):
            found.append((place, values))
    return found


def _draw_quality(axis: Any, comparison: Comparison) -> None:
    points = _points(comparison)
    sizes = [value / 1e6 for _, value, _ in points]
    for (place, _, quality), megabytes in zip(points, sizes, strict=True):
        axis.scatter(megabytes, quality, s=46, color=COLOURS[place % len(COLOURS)], zorder=3)
    if max(sizes) > LOG_FROM * min(sizes):
        axis.set_xscale("log")
    axis.margins(0.18)
    if len(points) == 1:
        axis.set_ylim(points[0][2] * 0.95, points[0][2] * 1.05)
    axis.set_xlabel("weights, MB")
    axis.set_ylabel("perplexity (lower is better)")
    axis.grid(alpha=0.25)
    axis.ticklabel_format(axis="y", useOffset=False)


def _label(axis: Any, labels: Sequence[tuple[float, float, str]]) -> None:
    """A name at each point: the best place around it, with a line to it where that is far."""
    from matplotlib.text import Text

    dots = axis.transData.transform([(x, y) for x, y, _ in labels])
    taken: list[Any] = []
    for number, (x, y, name) in enumerate(labels):
        best: tuple[float, Any, Any] | None = None
        for distance, angle in ((d, a) for d in (10, 20, 32, 46, 62) for a in range(0, 360, 30)):
            dx, dy = distance * math.cos(math.radians(angle)), distance * math.sin(math.radians(angle))
            text = axis.annotate(
                name,
                (x, y),
                (dx, dy),
                textcoords="offset points",
                ha="left" if dx > 1 else "right" if dx < -1 else "center",
                va="center",
                fontsize=9,
                arrowprops=None if distance == 10 else {"arrowstyle": "-", "color": "0.6", "lw": 0.7},
            )
            text.get_window_extent()  # puts it where it will be drawn
            box = Text.get_window_extent(text)  # without the line
            cost = distance / 100 + _in_the_way(axis.get_window_extent(), box, taken, dots, number)
            if best is not None and cost >= best[0]:
                text.remove()
                continue
            if best is not None:
                best[1].remove()
            best = (cost, text, box)
        assert best is not None
        taken.append(best[2])


def _in_the_way(room: Any, box: Any, taken: Sequence[Any], dots: Any, own: int) -> float:
    """How bad a place for a name is: over others, outside the axes, or nearer to another point."""
    wide = box.padded(3)
    cost = 10.0 * sum(wide.overlaps(other) for other in taken)
    cost += 10.0 * sum(wide.padded(5).contains(*dot) for number, dot in enumerate(dots) if number != own)
    cost += 5.0 * (room.x0 > box.x0 or box.x1 > room.x1 or room.y0 > box.y0 or box.y1 > room.y1)

    def away(dot: Any) -> float:
        across = max(box.x0 - dot[0], 0.0, dot[0] - box.x1)
        return math.hypot(across, max(box.y0 - dot[1], 0.0, dot[1] - box.y1))

    return cost + sum(away(dot) < away(dots[own]) for number, dot in enumerate(dots) if number != own)


def _draw_speeds(axis: Any, comparison: Comparison) -> None:
    speeds = _speeds(comparison)
    most = max(value for _, values in speeds for value in values if value is not None)
    for number, streams in enumerate(SPEEDS.values()):
        for line, (_, values) in enumerate(speeds):
            value = values[number]
            if value is None:
                continue
            label = f"{streams} stream{'s' if streams != '1' else ''}" if line == 0 else None
            place = line + (number - 0.5) * 0.38
            axis.barh(place, value, 0.34, color=COLOURS[number], label=label)
            axis.text(value + 0.012 * most, place, f"{value:.0f}", va="center", fontsize=9)
    names = [_short(comparison.columns[place].name) for place, _ in speeds]
    axis.set_yticks(range(len(speeds)), names)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.12 * most)
    axis.set_xlabel("tokens per second over all streams")
    axis.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, 1.12), ncols=len(SPEEDS))


def _short(name: str) -> str:
    """The two ends of a long name."""
    half = (NAME_LETTERS - 1) // 2
    return name if len(name) <= NAME_LETTERS else f"{name[:half]}…{name[-half:]}"
