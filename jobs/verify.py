"""`axicon verify`: whether a model directory is what its manifest says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from axicon.errors import AxiconError
from axicon.model import checkpoint
from axicon.model.artefact import MANIFEST, MEASURED, OTHER_KINDS, read_manifest
from axicon.model.intact import Problem, problem_of, problems
from jobs.card_file import read_rows
from jobs.model_report import ModelReport
from jobs.shown import size


@dataclass(frozen=True)
class Verdict:
    folder: Path
    problems: list[Problem]
    summary: str
    """One line about an intact directory."""


def run(name: str) -> Verdict:
    """Look at a directory, or at what `demo` or a hub id stands for; nothing is written.

    Raises AxiconError for what is no model directory, and for one of a newer axicon.
    """
    path = Path(name).expanduser()
    folder = path if path.is_dir() else checkpoint.resolve(name)
    if not any((folder / file).exists() for file in ("config.json", MANIFEST)):
        raise AxiconError(f"{folder}: neither config.json nor {MANIFEST} in it; give a model directory")
    found = problems(folder)
    for read in (ModelReport.read, read_rows):
        try:
            read(folder)
        except AxiconError as e:
            found.append(problem_of(folder, e))
    return Verdict(folder, found, "" if found else _summary(folder))


def table(verdict: Verdict) -> Table:
    """A line for each problem, with the way out."""
    result = Table(title=f"{verdict.folder} is damaged", title_justify="left")
    for column in ("file", "problem", "what to do"):
        result.add_column(column, overflow="fold")
    for problem in verdict.problems:
        result.add_row(problem.file, problem.what, problem.do)
    return result


def _summary(folder: Path) -> str:
    manifest = read_manifest(folder) or {}
    if kind := OTHER_KINDS.get(manifest.get("kind", "")):
        files = manifest["files"]
        total = size(sum(entry["bytes"] for entry in files.values()))
        return f"{folder} is intact: {kind} of {total}, every byte as its {MANIFEST} says"
    shape = checkpoint.shape_of(folder)
    kind = "+".join(checkpoint.packed_formats(folder)) or "dense"
    what = f"{shape.architecture} of {shape.layers} blocks, {kind}"
    if not (folder / MANIFEST).exists():
        return (
            f"{folder}: {what}; its headers, names and shapes are in order. It has no {MANIFEST}, so nothing "
            "says what its bytes should be"
        )
    files = [p for p in folder.iterdir() if p.is_file() and p.name not in (MANIFEST, *MEASURED)]
    total = size(sum(p.stat().st_size for p in files))
    return f"{folder} is intact: {what}, {len(files)} files of {total}, every byte as its {MANIFEST} says"
