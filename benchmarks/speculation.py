"""What guessing ahead is worth: `python benchmarks/speculation.py data=DIR [key=value ...]`.

The same requests with and without speculation, in turns, in one engine: seconds from the moment every stream
has its first token. Greedy text is equal, so the ratio of seconds is the ratio of tokens per second; that it
is equal is checked. `data` holds `mt-bench` and `public-domain-text` as they are in the shared data sets:
open questions, and texts to copy or correct. A second table counts tokens per step of the target where every
guess is checked, whatever it costs: methods beside each other at equal depth and at equal nodes. Writes a
JSON file.
"""

from __future__ import annotations

import gzip
import json
import random
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from measure import RESULTS, save, surroundings
from pydantic import BeforeValidator, Field
from rich.console import Console
from rich.table import Table

from axicon.errors import AxiconError
from axicon.generate.engine import Engine
from axicon.generate.request import Request, SamplingParams, Speculation
from axicon.model.machine import cores
from axicon.recipe import ModelRecipe
from axicon.settings import Words, split_words

Counts = Annotated[tuple[int, ...], BeforeValidator(split_words)]
TASKS = (
    "Copy the following text word for word.",
    "Fix the spelling mistakes in the following text and return the whole text.",
    "Repeat the text below exactly, and then name its topic.",
)
SHAPES = (
    ("chain", 1, 4), ("rsd_c", 3, 4), ("rsd_s", 3, 4), ("multi_round", 3, 4), ("k_seq", 3, 4),
    ("chain", 1, 12), ("chain", 1, 6), ("rsd_c", 2, 3), ("rsd_s", 2, 3),
)  # fmt: skip
"""(method, width, depth): at depth 4, at 12 nodes, at 6 nodes."""


class SpeculationBench(ModelRecipe):
    data: Path = Field(description="folder with mt-bench and public-domain-text")
    methods: Words = Field(("lookup",), description="methods to time, as they are by themselves; empty: none")
    streams: Counts = Field((1, 4, 16), min_length=1, description="streams at the same time, comma between")
    prompts: int = Field(16, ge=1, description="prompts of each kind per number of streams")
    new_tokens: int = Field(128, ge=2, description="the most tokens of an answer")
    rounds: int = Field(1, ge=1, description="turns of each")
    shapes: bool = Field(True, description="false: no table of tokens per step")
    draft: str | None = Field(None, description="draft model, as axicon serve takes it")
    out: Path = Field(RESULTS, description="folder for the JSON file")


def texts(data: Path) -> dict[str, list[str]]:
    """Messages by kind."""
    questions = (data / "mt-bench" / "mt_bench_questions.jsonl").read_text().splitlines()
    packed = gzip.decompress((data / "public-domain-text" / "documents.jsonl.gz").read_bytes())
    documents = [json.loads(line)["text"].split() for line in packed.decode().splitlines()]
    source = random.Random(0)
    copies = []
    for i in range(80):
        words = documents[source.randrange(len(documents))]
        start = source.randrange(max(1, len(words) - 110))
        copies.append(f"{TASKS[i % len(TASKS)]}\n\n{' '.join(words[start : start + 110])}")
    return {"open": [json.loads(line)["turns"][0] for line in questions], "copy": copies}


def build(recipe: SpeculationBench) -> Engine:
    from axicon.compress.walk import Compress
    from axicon.generate.build import build_engine

    compressor = recipe.build_compressor()
    return build_engine(
        recipe.model, dtype=recipe.dtype, threads=recipe.threads, offline=recipe.offline,
        transform=None if compressor is None else Compress(compressor), draft=recipe.draft,
    )  # fmt: skip


def run(
    engine: Engine, prompts: Sequence[Sequence[int]], streams: int, params: SamplingParams
) -> dict[str, Any]:
    """All prompts, `streams` at a time: seconds of decoding, tokens, steps, what was guessed."""
    tokens: list[list[int]] = [[] for _ in prompts]
    seconds, steps, ends = 0.0, 0, {}
    for first in range(0, len(prompts), streams):
        group = range(first, min(first + streams, len(prompts)))
        for i in group:
            engine.add(Request(id=str(i), prompt=prompts[i], params=params))
        begun: float | None = None
        while engine.has_work:
            deltas = engine.step()
            for delta in deltas:
                tokens[int(delta.request_id)] += delta.tokens
                if delta.finish_reason is not None:
                    ends[delta.request_id] = delta
            if begun is None and all(tokens[i] for i in group):
                begun = time.perf_counter()
            elif begun is not None:
                steps += 1
        assert begun is not None
        seconds += time.perf_counter() - begun
    return {
        "seconds": seconds, "steps": steps, "tokens": tokens,
        "accepted": sum(delta.accepted for delta in ends.values()),
        "rejected": sum(delta.rejected for delta in ends.values()),
    }  # fmt: skip


def timed(
    recipe: SpeculationBench, engine: Engine, kinds: Mapping[str, Sequence[Sequence[int]]]
) -> list[Any]:
    rows = []
    for kind, prompts in kinds.items():
        for streams in recipe.streams:
            some = prompts[: max(recipe.prompts, streams)]
            runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ("none", *recipe.methods)}
            for _ in range(recipe.rounds):
                # Group by group, so that whatever else the machine does happens to all of them.
                parts: dict[str, list[dict[str, Any]]] = {name: [] for name in runs}
                for first in range(0, len(some), streams):
                    for name, found in parts.items():
                        guess = None if name == "none" else Speculation(method=name)
                        params = SamplingParams(
                            max_tokens=recipe.new_tokens, temperature=0.0, speculation=guess
                        )
                        found.append(run(engine, some[first : first + streams], streams, params))
                for name, found in parts.items():
                    runs[name].append(
                        {
                            key: sum((one[key] for one in found), [] if key == "tokens" else 0)
                            for key in found[0]
                        }
                    )
            base = statistics.median(one["seconds"] for one in runs["none"])
            for name, done in runs.items():
                last, took = done[-1], statistics.median(one["seconds"] for one in done)
                made = sum(len(t) - 1 for t in last["tokens"])
                rows.append({
                    "kind": kind, "streams": streams, "method": name, "tokens_per_s": made / took,
                    "gain": base / took, "tokens_per_step": made / max(1, last["steps"]) / streams,
                    "accepted": last["accepted"], "rejected": last["rejected"],
                    "same_text": last["tokens"] == runs["none"][-1]["tokens"],
                })  # fmt: skip
                print(rows[-1], file=sys.stderr, flush=True)
    return rows


def counted(recipe: SpeculationBench, engine: Engine, prompts: Sequence[Sequence[int]]) -> list[Any]:
    """Tokens per step of one stream where every guess is checked."""
    rows = []
    engine.speculator.always = True
    shapes = [shape for shape in SHAPES if engine.speculator.models]
    for temperature in (0.0, 0.7, 1.0):
        for method, width, depth in (*shapes, ("lookup", 5, 12)):
            guess = Speculation(method=method, width=width, depth=depth, verify="rrs")
            params = SamplingParams(
                max_tokens=recipe.new_tokens, temperature=temperature, seed=1, speculation=guess
            )
            done = run(engine, prompts, 1, params)
            made = sum(len(t) - 1 for t in done["tokens"])
            rows.append({
                "method": method, "width": width, "depth": depth, "temperature": temperature,
                "nodes": depth if method in ("chain", "lookup") else width * depth,
                "tokens_per_step": made / done["steps"], "tokens": made,
            })  # fmt: skip
            print(rows[-1], file=sys.stderr, flush=True)
    engine.speculator.always = False
    return rows


def measure(recipe: SpeculationBench) -> dict[str, Any]:
    before = surroundings()
    recipe = recipe.model_copy(update={"threads": recipe.threads or cores()})
    engine = build(recipe)
    tokenizer: Any = engine.tokenizer
    kinds = {
        kind: [
            list(tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=True,
                return_dict=False,
            ))
            for text in some
        ]
        for kind, some in texts(recipe.data).items()
    }  # fmt: skip
    run(engine, kinds["open"][:2], 1, SamplingParams(max_tokens=16, temperature=0.0))
    rows = timed(recipe, engine, kinds) if recipe.methods else []
    shapes = counted(recipe, engine, kinds["open"][: recipe.prompts]) if recipe.shapes else []
    shown = recipe.model_dump(mode="json", exclude={"data", "out"})
    if recipe.draft is not None:
        shown["draft"] = Path(recipe.draft).name  # where it lies is nobody's business
    return {**before, "recipe": shown, "rows": rows, "shapes": shapes}


def tables(result: Mapping[str, Any]) -> list[Table]:
    speed = Table(title=f"{result['recipe']['model']}, greedy, {result['recipe']['threads']} threads")
    for name in ("prompts", "streams", "method", "tokens/s", "gain", "per step", "accepted", "same text"):
        speed.add_column(name, justify="left" if name in ("prompts", "method") else "right")
    for row in result["rows"]:
        guessed = row["accepted"] + row["rejected"]
        speed.add_row(
            row["kind"], str(row["streams"]), row["method"], f"{row['tokens_per_s']:.0f}",
            f"{row['gain']:.2f}", f"{row['tokens_per_step']:.2f}",
            f"{row['accepted'] / guessed:.0%}" if guessed else "", "yes" if row["same_text"] else "NO",
        )  # fmt: skip
    shapes = Table(title="tokens per step of the target, every guess checked")
    for name in ("method", "width", "depth", "nodes", "T = 0", "T = 0.7", "T = 1"):
        shapes.add_column(name, justify="left" if name == "method" else "right")
    found: dict[tuple[Any, ...], list[float]] = {}
    for row in result["shapes"]:
        key = (row["method"], row["width"], row["depth"], row["nodes"])
        found.setdefault(key, []).append(row["tokens_per_step"])
    for key, values in found.items():
        shapes.add_row(*(str(x) for x in key), *(f"{value:.2f}" for value in values))
    return [*([speed] if result["rows"] else []), *([shapes] if found else [])]


def main(words: Sequence[str]) -> None:
    recipe = SpeculationBench.parse(words)
    result = measure(recipe)
    console = Console(width=None if sys.stdout.isatty() else 110)
    for table in tables(result):
        console.print(table)
    print(f"written to {save('speculation', result, recipe.out)}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except AxiconError as error:
        sys.exit(f"speculation: {error}")
