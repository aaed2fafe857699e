"""Where the figures of `axicon compare` come from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from axicon.errors import AxiconError
from axicon.evaluate.card import Kind, Row
from axicon.model import checkpoint, safety
from jobs.card_file import read_rows
from jobs.compare import BITS, OF_CARDS, PERPLEXITY, SPEEDS, WEIGHTS, Column, Figure
from jobs.evaluate import DEFAULT_OUT
from jobs.labels import label
from jobs.manifest import Link, Manifest
from jobs.model_report import ModelReport, Speed, protocol, weight_bytes
from jobs.record import figures, metric_name, questions, speed_of

RESULTS_ONLY = "a results file does not hold it; name the model directory"


def read(typed: str) -> Column:
    """What is known of a model directory, of `demo`, or of what a results file measured.

    Raises AxiconError for anything else, for a newer format, and for files that cannot be read.
    """
    path = Path(typed).expanduser()
    if path.is_file() and path.suffix == ".json":
        return _results(typed, path)
    if typed != "demo" and not path.is_dir():
        raise AxiconError(
            f"{typed}: neither a model directory nor a results_*.json file; `demo` is always there"
        )
    return _directory(typed, checkpoint.resolve("demo" if typed == "demo" else path))


def _directory(typed: str, folder: Path) -> Column:
    manifest, report = Manifest.read(folder), ModelReport.read(folder)
    compressed, rows = bool(manifest and manifest.chain), read_rows(folder)
    known = _sizes(folder) | _report(typed, report, compressed=compressed) | _card(rows, "compressed")
    # A directory without a manifest has no report, and no report holds tasks: earlier results may.
    sha256 = checkpoint.digest(folder)
    for earlier in _earlier(checkpoint.model_id(typed), sha256):
        for row, figure in earlier.items():
            if row not in known or (known[row].value is None and figure.value is not None):
                known[row] = figure
    return Column(
        name=(manifest.name if manifest else "") or folder.name,
        typed=typed,
        methods=manifest.method_chain() if manifest else "not recorded",
        figures=known,
        sha256=sha256,
        base=(manifest.parents[0].sha256 if manifest and rows and manifest.parents else "", _dense(rows)),
    )


def _card(rows: Mapping[str, Row], kind: Kind) -> dict[str, Figure]:
    """What a card knows beyond report.json, as far as it was measured."""
    known = {}
    for name, row in rows.items():
        task, _, metric = name.partition("/")
        shown = f"{task} {metric}" if "examples shown" in row.basis else label(name)
        if (name in OF_CARDS or "examples shown" in row.basis) and row.get(kind) is not None:
            # Results of lm-eval's own command do not say in which numbers they were computed.
            basis = {key: value for key, value in row.basis.items() if key != "dtype"}
            known[shown] = Figure(value=row.get(kind), basis=basis)
    return known


def _dense(rows: Mapping[str, Row]) -> dict[str, Figure]:
    """What a card says of the dense model; perplexity and speed, too."""
    known = _card(rows, "dense")
    names = {PERPLEXITY: "perplexity"} | {shown: f"tokens_per_s/{s}" for shown, s in SPEEDS.items()}
    for shown, name in names.items():
        if (row := rows.get(name)) is not None and row.dense is not None:
            known[shown] = Figure(value=row.dense, basis=row.basis)
    return known


def _sizes(folder: Path) -> dict[str, Figure]:
    import torch

    from axicon.model.decoder import Decoder

    size = weight_bytes(folder)
    try:
        with torch.device("meta"):
            weights = sum(p.numel() for p in Decoder(checkpoint.shape_of(folder)).parameters())
    except AxiconError as error:
        return {WEIGHTS: Figure(value=size), BITS: Figure(why=str(error))}
    return {WEIGHTS: Figure(value=size), BITS: Figure(value=8 * size / weights)}


def _report(typed: str, report: ModelReport, *, compressed: bool) -> dict[str, Figure]:
    perplexity, speed = report.perplexity, report.tokens_per_s
    kind = "compressed" if compressed else "dense"
    basis = {
        "protocol": perplexity.protocol,
        "windows": perplexity.windows,
        "text": perplexity.text_sha256,
    }
    value = perplexity.get(kind)
    why = "" if value is not None else perplexity.why(kind)
    command = f"axicon evaluate {typed} text=FILE" if why else ""
    return {PERPLEXITY: Figure(value=value, basis=basis, why=why, command=command)} | _speeds(typed, speed)


def _speeds(typed: str, speed: Speed) -> dict[str, Figure]:
    known = {}
    for row, streams in SPEEDS.items():
        value = speed.get(streams)
        why = "" if value is not None else speed.why(streams)
        command = f"axicon evaluate {typed} speed=true" if why and typed else ""
        known[row] = Figure(value=value, basis={"conditions": speed.conditions}, why=why, command=command)
    return known


def _earlier(name: str, digest: str) -> list[dict[str, Figure]]:
    """Figures of the same weights in the default folder of results, newest first."""
    found = []
    for path in sorted((DEFAULT_OUT / name.replace("/", "__")).glob("results_*.json"), reverse=True):
        try:
            content = safety.read_json(path)
            if content.get("axicon", {}).get("model_sha256") == digest:
                found.append(_measured(content))
        except (AxiconError, AttributeError, TypeError, KeyError):
            continue  # somebody else's file; who names it gets told
    return found


def _results(typed: str, path: Path) -> Column:
    content = safety.read_json(path)
    if not isinstance(content.get("results"), dict):
        raise AxiconError(f"{path}: no results of `axicon evaluate` or lm-eval: it has no key `results`")
    try:
        measured = _measured(content)
        methods = _applied(content)
    except (AttributeError, TypeError, KeyError, ValueError) as error:
        raise AxiconError(
            f"{path}: cannot be read as results ({type(error).__name__}: {error}); evaluate again"
        ) from None
    missing = {row: Figure(why=RESULTS_ONLY) for row in (WEIGHTS, BITS)}
    name = str(content.get("model_name") or path.stem)
    return Column(name=name, typed=typed, methods=methods, figures=missing | measured)


def _applied(content: Mapping[str, Any]) -> str:
    """What was done to the model after it was loaded."""
    if not content.get("axicon"):
        return "not recorded"  # of lm-eval's own command
    compressor = content["axicon"]["recipe"].get("compressor")
    if compressor is None:
        return "as stored"
    settings = {key: value for key, value in compressor.items() if key != "method"}
    return f"loaded with {Link(method=compressor['method'], settings=settings)}"


def _measured(content: Mapping[str, Any]) -> dict[str, Figure]:
    """Perplexity, tasks and speed of a results file, as far as it has them."""
    known: dict[str, Figure] = {}
    ours = content.get("axicon") or {}
    if perplexity := ours.get("perplexity"):
        basis = {
            "protocol": protocol(perplexity["protocol"], perplexity["window"], ours["recipe"]["dtype"]),
            "windows": perplexity["windows"],
            "text": perplexity["text_sha256"],
        }
        known[PERPLEXITY] = Figure(value=float(perplexity["value"]), basis=basis)
    for task, scores in content["results"].items():
        for key, value in figures(scores):
            known[f"{task} {metric_name(key)}"] = Figure(value=value, basis=questions(content, task))
    speed = speed_of(ours)
    return known | ({} if speed is None else _speeds("", speed))
