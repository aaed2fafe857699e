"""The quality card as text: `README.md` of a model directory, and the table on a terminal."""

from __future__ import annotations

import json
from collections.abc import Iterator

from rich.table import Table

from axicon.evaluate.card import ZERO_SHOT, Kind, Row, Rows, command_for, judgement
from jobs.labels import label, written
from jobs.manifest import Link, Manifest

MANY_TIMES = 10


def cell(name: str, row: Row, kind: Kind) -> str:
    value, error = row.get(kind), row.stderr.get(kind)
    if value is None:
        return "–"
    shown = written(name, value)
    if not error:
        return shown
    number, _, unit = shown.partition(" ")
    return f"{number} ± {written(name, error).partition(' ')[0]} {unit}".rstrip()


def change(name: str, row: Row) -> str:
    """Of the compressed model against dense: in percent, or in points where the figure is a percentage."""
    if row.ratio is None:
        return ""
    if name.endswith(("/acc", "/acc_norm")):
        return f"{100 * ((row.compressed or 0.0) - (row.dense or 0.0)):+.1f} points"
    if row.ratio >= MANY_TIMES:  # a tied head that got weights of its own
        return "+" + written(name, (row.compressed or 0.0) - (row.dense or 0.0))
    return f"{100 * (row.ratio - 1):+.1f} %".replace("+0.0", "0.0").replace("-0.0", "0.0")


def table(rows: Rows, title: str = "") -> Table:
    """What was measured, for a terminal."""
    result = Table(title=title or None, title_justify="left")
    result.add_column("")
    for column in ("dense", "compressed", "change"):
        result.add_column(column, justify="right")
    for name, row in _shown(rows):
        cells = (cell(name, row, "dense"), cell(name, row, "compressed"), change(name, row))
        result.add_row(_indented(name), *cells)
    return result


def _indented(name: str) -> str:
    return f"  {name.partition('/')[2]}" if name.startswith("bytes/") else label(name)


def _shown(rows: Rows) -> Iterator[tuple[str, Row]]:
    return ((name, row) for name, row in rows.items() if row.dense is not None or row.compressed is not None)


def missing(rows: Rows) -> list[str]:
    """A line for each command that would measure something, with what and why not yet."""
    by_command: dict[tuple[str, str], list[str]] = {}
    for name, row in rows.items():
        if row.lacks(name):
            kind: Kind = "compressed" if row.compressed is None else "dense"
            why = row.reason[kind] + (" (dense)" if kind == "dense" else "")
            shown = name.removesuffix("/acc") if name.endswith("/acc") else label(name)
            by_command.setdefault((why, command_for(name)), []).append(shown)
    return [f"{'; '.join(names)}: {why}. `{command}`" for (why, command), names in by_command.items()]


def readme(manifest: Manifest, rows: Rows) -> str:
    """The whole of README.md."""
    base = manifest.parents[0]
    parts = [
        f"# {manifest.name}",
        f"{base.name}, made smaller by {manifest.method_chain()}, with axicon {manifest.chain[-1].axicon}.",
        f"**{judgement(rows)}**",
        _markdown_table(rows),
        "A missing figure is –. Change is against dense; of percentages it is the difference in points.",
        "## Serve it",
        f"    axicon serve ./{manifest.name}",
        "Run that beside this directory; the endpoint speaks OpenAI's HTTP interface. `axicon verify "
        f"./{manifest.name}` checks every byte.",
        "## How it was made",
        "\n".join(_method(number, link) for number, link in enumerate(manifest.chain, 1)),
        f"The dense model is {base.name}, sha256 `{base.sha256}`.",
        "## How the figures were measured",
        "\n".join(f"- {line}" for line in protocols(rows)),
    ]
    if lines := missing(rows):
        parts += ["## Not measured", "\n".join(f"- {line}" for line in lines), "DIR is this directory."]
    if manifest.licence:
        parts += ["## Licence", str(manifest.licence)]
    parts.append("This file is written from `card.json`, and again whenever more is measured.")
    return "\n\n".join(parts) + "\n"


def _markdown_table(rows: Rows) -> str:
    lines = ["| | dense | this model | change |", "|---|--:|--:|--:|"]
    for name, row in _shown(rows):
        cells = (cell(name, row, "dense"), cell(name, row, "compressed"), change(name, row))
        lines.append(f"| {label(name)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _method(number: int, link: Link) -> str:
    settings = ", ".join(f"{key} {json.dumps(value)}" for key, value in link.settings.items())
    return f"{number}. `{link.method}`" + (f": {settings}" if settings else "") + _sample(link)


def _sample(link: Link) -> str:
    """What the method looked at; empty if it looked at nothing."""
    seen = link.calibration
    if not seen:
        return ""
    text = seen.get("text_sha256")
    source = f"from the text with sha256 {str(text)[:16]}…" if text else "that the dense model wrote"
    return (
        f". It looked at {seen.get('windows')} windows of {seen.get('window')} tokens {source} "
        f"(seed {seen.get('seed')}, {seen.get('inputs')} inputs)"
    )


def protocols(rows: Rows) -> Iterator[str]:
    """What each figure rests on, in words."""
    yield "Weights: bytes of the weight files; parts without the files' headers."
    if basis := rows["perplexity"].basis:
        text = str(basis.get("text") or "")[:16]
        yield (
            f"Perplexity: protocol {basis.get('protocol')}, {basis.get('windows')} windows of the text with "
            f"sha256 {text}…"
        )
    tasks = {name.partition("/")[0]: row for name, row in rows.items() if "examples shown" in row.basis}
    for task in [name for name in ZERO_SHOT if name in tasks] + [t for t in tasks if t not in ZERO_SHOT]:
        asked = tasks[task].basis
        shown = "zero-shot" if not asked["examples shown"] else f"{asked['examples shown']} examples shown"
        yield (
            f"{task}: lm-eval, {shown}, {asked['questions']} questions, {asked.get('dtype')}, prompts with "
            f"hash {str(asked['prompts'])[:16]}…; ± is the standard error"
        )
    if basis := rows["agreement/prefix"].basis:
        yield (
            f"Greedy continuations: {basis['prompts']} prompts (sha256 {basis['sha256'][:16]}…), at most "
            f"{basis['tokens']} tokens each, {basis['dtype']}, beside those of the dense model"
        )
    if basis := rows["tokens_per_s/1"].basis:
        yield f"Tokens/s: all streams together, median of 3 rounds, {basis['conditions']}"
    if basis := rows["first_token_ms"].basis:
        yield f"First token: median of 5 rounds, {basis['conditions']}"
    if basis := rows["peak_memory"].basis:
        yield f"Peak memory: {basis['conditions']}"
    if basis := rows["outliers/kurtosis"].basis:
        yield (
            f"Activations: {basis['tensors']}, each flattened {basis['flatten']}, on {basis['text']}, "
            f"{basis['dtype']}; the largest absolute value (mean over sequences, maximum over tensors) and "
            "the kurtosis (mean over both; 3 for a Gaussian), as in arXiv:2306.12929"
        )
