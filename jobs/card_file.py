"""The quality card in a model directory: `card.json`, `README.md`, and with them `report.json`.

`report.json` keeps size, perplexity and speed in the form that other programs read; the card has these and
all the rest beside the dense model's. In memory there is one set of rows. What is read from `report.json`
wins over `card.json`, and all three files are written together, each atomically.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from pydantic import ValidationError

from axicon.errors import AxiconError
from axicon.evaluate.card import PARTS, STREAMS, Kind, Row, Rows, expected, in_order, judgement
from axicon.evaluate.serving import Serving
from axicon.model import safety
from axicon.model.artefact import CARD, README, write_atomically
from jobs.card_text import readme
from jobs.manifest import Manifest, Parent
from jobs.model_report import Block, Bytes, ModelReport, PerplexityFigures, Speed

FORMAT_VERSION = 1
MEMORY = "of a process that loads the model and decodes at 1 and 8 streams, less what it took before that"


@dataclass
class Card:
    """The card of the model in `folder`. `rows` is changed in place and then written."""

    folder: Path
    manifest: Manifest
    report: ModelReport
    rows: dict[str, Row] = field(default_factory=expected)

    @classmethod
    def of(cls, folder: Path) -> Self | None:
        """What is known of a compressed model; None for a directory that axicon did not compress.

        Raises AxiconError for files that cannot be read.
        """
        manifest = Manifest.read(folder)
        if manifest is None or not manifest.chain or not manifest.parents:
            return None
        report = ModelReport.read(folder)
        rows = expected() | read_rows(folder)
        return cls(folder, manifest, report, in_order(rows | _from_report(report, rows)))

    @property
    def base(self) -> Parent:
        return self.manifest.parents[0]

    def put(self, name: str, kind: Kind, value: float | None, basis: Mapping[str, Any], **more: Any) -> None:
        """Set one figure, as `Row.with_value` does."""
        self.rows[name] = self.rows.get(name, Row()).with_value(kind, value, basis, **more)

    def why_not(self, name: str, kind: Kind, reason: str) -> None:
        """Say why a figure is null; one that is there stays."""
        row = self.rows[name]
        if row.get(kind) is None:
            self.rows[name] = row.with_value(kind, None, row.basis, reason=reason)

    def as_json(self) -> dict[str, Any]:
        rows = in_order(self.rows)
        return {
            "format_version": FORMAT_VERSION,
            "name": self.manifest.name,
            "methods": [str(link) for link in self.manifest.chain],
            "base": {"name": self.base.name, "sha256": self.base.sha256},
            "judgement": judgement(rows),
            "figures": {name: row.as_json(name) for name, row in rows.items()},
        }

    def write(self) -> None:
        """All three files. Raises AxiconError when they cannot be written."""
        if not self.folder.is_dir():
            raise AxiconError(f"{self.folder}: is gone; its card has no place")
        self.report = _to_report(self.rows, self.report)
        text = json.dumps(self.as_json(), indent=2, ensure_ascii=False, allow_nan=False)
        try:
            self.report.write(self.folder)
            write_atomically(self.folder / CARD, text + "\n")
            write_atomically(self.folder / README, readme(self.manifest, in_order(self.rows)))
        except OSError as error:
            raise AxiconError(f"{self.folder}: its card cannot be written ({error.strerror})") from None


def read_rows(folder: Path) -> dict[str, Row]:
    """The rows of `card.json`; none without one. Raises AxiconError."""
    path = folder / CARD
    if not path.exists():
        return {}
    content = safety.read_json(path)
    if content.get("format_version") != FORMAT_VERSION:
        raise AxiconError(
            f"{path}: format version {content.get('format_version')!r}, this axicon reads {FORMAT_VERSION}; "
            "update axicon, or remove the file and measure again"
        )
    figures = content.get("figures")
    if not isinstance(figures, dict):
        raise AxiconError(f"{path}: holds no figures; remove the file and measure again")
    return {name: _read_row(path, name, row) for name, row in figures.items()}


def _read_row(path: Path, name: str, content: Any) -> Row:
    try:
        return Row.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in (name, *first["loc"]))
        raise AxiconError(
            f"{path}: {where}: {first['msg'].lower()}; remove the file and measure again"
        ) from None


def _from_report(report: ModelReport, rows: Rows) -> dict[str, Row]:
    """The rows that `report.json` has, with what only the card knows of the dense model."""
    sizes, perplexity, speed = report.bytes, report.perplexity, report.tokens_per_s
    found = {"bytes": _row("bytes", {}, sizes, "dense_total", "total")}
    for part in PARTS:
        if (size := (sizes.model_extra or {}).get(part)) is not None:
            found[f"bytes/{part}"] = rows[f"bytes/{part}"].with_value("compressed", size, {})
    basis = perplexity_basis(perplexity)
    found["perplexity"] = _row("perplexity", basis, perplexity, "dense", "compressed")
    for streams in STREAMS:
        name = f"tokens_per_s/{streams}"
        basis = {"conditions": speed.conditions} if speed.conditions else {}
        found[name] = rows[name].with_value(
            "compressed", speed.get(streams), basis, reason=speed.why(streams)
        )
    return found


def _row(name: str, basis: Mapping[str, Any], block: Block, dense: str, compressed: str) -> Row:
    """A row of two values that stand in one block of the report."""
    row = expected()[name]
    for kind, key in (("dense", dense), ("compressed", compressed)):
        row = row.with_value(kind, block.get(key), basis, reason=block.why(key))  # type: ignore[arg-type]
    return row


def perplexity_basis(figures: PerplexityFigures) -> dict[str, Any]:
    basis = {"protocol": figures.protocol, "windows": figures.windows, "text": figures.text_sha256}
    return basis if any(value is not None for value in basis.values()) else {}


def _to_report(rows: Rows, before: ModelReport) -> ModelReport:
    size, quality = rows["bytes"], rows["perplexity"]
    speeds = {streams: rows[f"tokens_per_s/{streams}"] for streams in STREAMS}
    parts = {part: rows[f"bytes/{part}"].compressed for part in PARTS}
    sizes = {
        "total": _whole(size.compressed),
        "dense_total": _whole(size.dense),
        "reason": {
            name: size.reason[kind]
            for name, kind in (("total", "compressed"), ("dense_total", "dense"))
            if kind in size.reason
        },
    }
    return before.updated(
        bytes=Bytes.model_validate(
            sizes | {p: _whole(value) for p, value in parts.items() if value is not None}
        ),
        tokens_per_s=Speed.model_validate(
            {streams: row.compressed for streams, row in speeds.items()}
            | {"conditions": speeds["1"].basis.get("conditions")}
            | {"reason": {s: row.reason["compressed"] for s, row in speeds.items() if row.compressed is None}}
        ),
    ).model_copy(
        update={
            "perplexity": PerplexityFigures(
                dense=quality.dense,
                compressed=quality.compressed,
                reason=dict(quality.reason),
                protocol=quality.basis.get("protocol"),
                windows=quality.basis.get("windows"),
                text_sha256=quality.basis.get("text"),
            )
        }
    )


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def put_serving(card: Card, kind: Kind, found: Serving) -> None:
    """Speed, first token and peak memory."""

    def put(name: str, value: float | None, field: str, basis: Mapping[str, Any]) -> None:
        card.put(name, kind, value, basis, reason=found.reason.get(field, ""))

    for streams in STREAMS:
        rate = found.tokens_per_s.get(streams)
        put(f"tokens_per_s/{streams}", rate, "tokens_per_s", {"conditions": found.conditions})
    put(
        "first_token_ms", found.first_token_ms, "first_token_ms", {"conditions": found.first_token_conditions}
    )
    put("peak_memory", found.peak_memory, "peak_memory", {"conditions": f"{MEMORY}, {found.conditions}"})
