"""Decoding speed beside other programs on this machine: `python benchmarks/decode.py [key=value ...]`.

All peers are loaded first and then take turns, so that whatever else happens on the machine happens to all
of them; figures are medians over the rounds. Rates are tokens per second over all streams, counted from the
moment every stream has its first token. The roofline is the step that only reads every weight once, at the
bandwidth measured in the same run. Writes a JSON file, and a PNG where matplotlib is installed.
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from measure import RESULTS, complain, read_bandwidth, save, surroundings
from peer import PEERS, Worker, peer_class, workers
from pydantic import BeforeValidator, Field
from rich.console import Console
from rich.table import Table

from axicon.errors import AxiconError
from axicon.model.machine import cores
from axicon.recipe import Dtype
from axicon.settings import Recipe, Words, split_words

Counts = Annotated[tuple[int, ...], BeforeValidator(split_words)]
WARM_TOKENS = 8
REST_S = 0.5
"""Before each turn: threads of the peer before may still spin, those of vLLM for 0.2 s."""


class DecodeBench(Recipe):
    model: str = Field("demo", description="demo, a model directory, a .gguf file, or a hub id")
    peers: Words = Field(tuple(PEERS), description="programs to measure, comma between")
    streams: Counts = Field((1, 8, 16), min_length=1, description="streams at the same time, comma between")
    prompt_tokens: int = Field(64, ge=1, description="tokens of each prompt")
    new_tokens: int = Field(64, ge=2, description="tokens each stream generates")
    dtype: Dtype = Field("bfloat16", description="numbers the model computes in")
    threads: int | None = Field(None, ge=1, description="compute threads; none: one per core")
    rounds: int = Field(3, ge=1, description="turns of each peer at each number of streams")
    temperature: float = Field(0.0, ge=0, description="0 is greedy")
    top_p: float = Field(1.0, gt=0, le=1, description="for sampling")
    out: Path = Field(RESULTS, description="folder for the JSON file and the plot")


def measure(recipe: DecodeBench) -> dict[str, Any]:
    """Everything that goes into the JSON file."""
    threads = recipe.threads or cores()
    present = [name for name in recipe.peers if _is_present(name)]
    before = surroundings()
    with workers(present, recipe.model, recipe.dtype, threads) as running:
        for streams in recipe.streams:
            for worker in running.values():
                _run(worker, recipe, streams, WARM_TOKENS)
        runs: dict[str, dict[int, list[dict[str, Any]]]] = {
            name: {streams: [] for streams in recipe.streams} for name in present
        }
        bandwidth = 0.0
        for turn in range(recipe.rounds):
            bandwidth = max(bandwidth, read_bandwidth(threads))
            for streams in recipe.streams:
                # Who goes first changes from round to round.
                for name in present[turn % len(present) :] + present[: turn % len(present)]:
                    runs[name][streams].append(_run(running[name], recipe, streams, recipe.new_tokens))
            complain(f"round {turn + 1} of {recipe.rounds} done")
        about = {name: worker.about for name, worker in running.items()}
    return {
        "benchmark": "decode",
        **before,
        "load_average_after": surroundings()["load_average"],
        "recipe": recipe.model_dump(mode="json") | {"threads": threads, "out": None},
        "bandwidth_bytes_per_s": bandwidth,
        "peers": {
            name: about[name]
            | {
                "roofline_step_s": about[name]["weight_bytes"] / bandwidth,
                "streams": {streams: _summary(done, streams) for streams, done in runs[name].items()},
            }
            for name in present
        },
        "same_text": _same_text(runs),
    }


def _is_present(name: str) -> bool:
    if name not in PEERS:
        raise AxiconError(f"peers={name}: known are {', '.join(PEERS)}")
    needs = peer_class(name).needs
    if importlib.util.find_spec(needs) is None:
        complain(f"{name} is not measured: the package {needs} is not installed")
        return False
    return True


def _run(worker: Worker, recipe: DecodeBench, streams: int, new_tokens: int) -> dict[str, Any]:
    time.sleep(REST_S)
    return worker.run(
        streams=streams,
        prompt_tokens=recipe.prompt_tokens,
        new_tokens=new_tokens,
        temperature=recipe.temperature,
        top_p=recipe.top_p,
    )


def _summary(runs: Sequence[Mapping[str, Any]], streams: int) -> dict[str, Any]:
    rates = [run["decode_rate"] for run in runs]
    rate = statistics.median(rates)
    return {
        "tokens_per_s": rate,
        "tokens_per_s_all": rates,
        "step_s": streams / rate,
        "first_token_s": statistics.median(run["first_token"] for run in runs),
        "pss_bytes": max(run["pss_bytes"] for run in runs),
        "parts_s": _median_parts([run["parts_s"] for run in runs if run["parts_s"]]),
    }


def _median_parts(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: statistics.median(part[name] for part in parts) for name in (parts[0] if parts else ())}


def _same_text(runs: Mapping[str, Mapping[int, Sequence[Mapping[str, Any]]]]) -> dict[str, dict[int, float]]:
    """Share of streams whose text is that of the first peer; greedy decoding in low precision splits at
    near ties."""
    reference = next(iter(runs.values()))
    return {
        name: {
            streams: statistics.mean(
                ours == theirs
                for ours, theirs in zip(done[0]["tokens"], reference[streams][0]["tokens"], strict=True)
            )
            for streams, done in rows.items()
        }
        for name, rows in runs.items()
    }


def table(result: Mapping[str, Any]) -> Table:
    recipe = result["recipe"]
    title = (
        f"{recipe['model']} in {recipe['dtype']}, {recipe['threads']} threads, {recipe['prompt_tokens']} + "
        f"{recipe['new_tokens']} tokens, medians of {recipe['rounds']}"
    )
    shown = Table(title=title, title_justify="left")
    columns = (
        "streams",
        "program",
        "tokens/s",
        "lowest",
        "step ms",
        "of roofline",
        "first token ms",
        "memory MiB",
    )
    for column in columns:
        shown.add_column(column, justify="left" if column == "program" else "right")
    for streams in recipe["streams"]:
        for name, peer in result["peers"].items():
            row = peer["streams"][streams]
            shown.add_row(
                str(streams),
                name,
                f"{row['tokens_per_s']:.1f}",
                f"{min(row['tokens_per_s_all']):.1f}",
                f"{row['step_s'] * 1e3:.1f}",
                f"{peer['roofline_step_s'] / row['step_s']:.0%}",
                f"{row['first_token_s'] * 1e3:.0f}",
                f"{row['pss_bytes'] / 2**20:.0f}",
            )
        shown.add_section()
    gigabytes = result["bandwidth_bytes_per_s"] / 1e9
    steps = ", ".join(
        f"{name} {peer['roofline_step_s'] * 1e3:.1f} ms" for name, peer in result["peers"].items()
    )
    lines = [f"reads {gigabytes:.1f} GB/s; a step that reads each weight once: {steps}"]
    for name, peer in result["peers"].items():
        for streams, row in peer["streams"].items():
            if row["parts_s"]:
                split = ", ".join(f"{part} {seconds * 1e3:.2f}" for part, seconds in row["parts_s"].items())
                lines.append(f"{name}, {streams} streams, ms per step: {split}")
    shown.caption = "\n".join(lines)
    return shown


def plot(result: Mapping[str, Any], path: Path) -> bool:
    """Bars of tokens/s, whiskers from the lowest to the highest round. False without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    counts, peers = result["recipe"]["streams"], result["peers"]
    width = 0.8 / len(peers)
    for place, (name, peer) in enumerate(peers.items()):
        rows = [peer["streams"][streams] for streams in counts]
        rates = [row["tokens_per_s"] for row in rows]
        low = [row["tokens_per_s"] - min(row["tokens_per_s_all"]) for row in rows]
        high = [max(row["tokens_per_s_all"]) - row["tokens_per_s"] for row in rows]
        at = [i + (place - (len(peers) - 1) / 2) * width for i in range(len(counts))]
        bars = axes.bar(at, rates, width, yerr=[low, high], label=name, capsize=3)
        axes.bar_label(bars, fmt="{:.0f}", padding=3, fontsize=8)
    axes.set_xticks(range(len(counts)), [f"{n} stream{'s' if n > 1 else ''}" for n in counts])
    axes.set_ylabel("tokens/s over all streams")
    recipe = result["recipe"]
    axes.set_title(
        f"{recipe['model']}, {recipe['dtype']}, {recipe['threads']} threads\n{result['cpu']}", fontsize=9
    )
    axes.legend()
    figure.savefig(path, dpi=120)
    return True


def main(words: Sequence[str]) -> None:
    recipe = DecodeBench.parse(words)
    result = measure(recipe)
    Console(width=None if sys.stdout.isatty() else 110).print(table(result))
    path = save("decode", result, recipe.out)
    drawn = plot(result, path.with_suffix(".png"))
    print(
        f"written to {path}"
        + (f" and {path.with_suffix('.png').name}" if drawn else "; no matplotlib, no plot")
    )


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except AxiconError as error:
        sys.exit(f"decode: {error}")
