"""What bounded caches cost and save: `python benchmarks/eviction.py [key=value ...]`.

Quality: perplexity of tokens behind a long prompt, each fed to the model whatever it would have said, and how
often a key hidden in filler text is found again. Speed: streams with long prompts, decoding together, the
policies taking turns. Admission: how many such streams run at once in the memory of a few full ones. Shares
of the budget are of the prompt. Writes a JSON file, and a PNG where matplotlib
is installed.
"""

from __future__ import annotations

import importlib.util
import math
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from measure import RESULTS, complain, save, surroundings
from pydantic import BeforeValidator, Field
from rich.console import Console
from rich.table import Table

from axicon.data.text import join_rows, read_rows
from axicon.errors import AxiconError
from axicon.generate.build import build_engine
from axicon.generate.engine import Engine
from axicon.generate.eviction import KV_POLICIES
from axicon.generate.request import KVSettings, Limits, Request, SamplingParams
from axicon.generate.retention import Retention, retention
from axicon.generate.runner import LocalRunner
from axicon.recipe import ModelRecipe
from axicon.settings import Words, split_words
from axicon.step import KeptBlock, LayeredPrompt, StepInput, batched

Shares = Annotated[tuple[float, ...], BeforeValidator(split_words)]
FLOOR = 16
MOST = 48
"""Streams that ask for a cache that does not hold all of them."""
EVERY = 16
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "


class EvictionBench(ModelRecipe):
    policies: Words = Field(tuple(KV_POLICIES), description="policies, comma between; h2o:decay for a score")
    budgets: Shares = Field((0.05, 0.1, 0.2, 0.5, 1.0), description="shares of the prompt, comma between")
    text: str = Field("wiki.test.raw", description="text for perplexity")
    windows: int = Field(4, ge=0, description="windows of it; 0: no perplexity")
    prompt_tokens: int = Field(1280, ge=64, description="tokens of each window's prompt")
    scored_tokens: int = Field(256, ge=1, description="tokens behind it that are scored")
    keys: int = Field(10, ge=0, description="hidden keys; 0: none")
    filler: Literal["sentences", "text"] = Field("sentences", description="repeated ones, or the text")
    streams: int = Field(8, ge=0, description="streams of the speed test; 0: none")
    context: int = Field(2000, ge=64, description="tokens of their prompts")
    new_tokens: int = Field(96, ge=16, description="tokens each of them generates")
    speed_policies: Words = Field(("window", "h2o"), description="policies beside the full cache")
    speed_budget: float = Field(0.2, gt=0, description="their budget")
    rounds: int = Field(2, ge=0, description="turns of each through the whole engine")
    memory_of: int = Field(0, ge=0, description="full caches of such streams that fit; how many bounded do?")
    out: Path = Field(RESULTS, description="folder for the JSON file and the plot")


def settings(name: str, budget: float) -> KVSettings | None:
    """A policy by its name, behind a colon its score: h2o:decay."""
    policy, _, score = name.partition(":")
    if policy == "full":
        return None
    return KVSettings(policy=policy, budget=budget, evict_every=EVERY, score=score or None)


def step(nodes: Sequence[tuple[int, int, int]], **lists: Any) -> StepInput:
    """A step of (token, position, row) nodes. Adjacent nodes of one row are a chain, whose last is wanted."""
    table = torch.tensor(nodes, dtype=torch.int64).view(-1, 3)
    follows = torch.tensor(
        [i > 0 and nodes[i - 1][2] == node[2] for i, node in enumerate(nodes)], dtype=torch.bool
    )
    place, none = torch.arange(len(nodes)), torch.zeros(len(nodes), dtype=torch.int64)
    parents = torch.where(follows, place - 1, -1)
    wanted = ~torch.cat([follows[1:], torch.zeros(1, dtype=torch.bool)])[: len(nodes)]
    return StepInput(*table.T.contiguous().unbind(0), parents, wanted, none, wanted | True, **lists)


def mean_loss(runner: LocalRunner, ids: Sequence[Sequence[int]], prompt: int, kv: KVSettings | None) -> float:
    """Mean negative log-likelihood of what lies behind the prompts, in nats, all of them together."""
    rows, total = tuple(range(len(ids))), len(ids[0])
    bounded = retention(kv, prompt, total - prompt, FLOOR)
    most = total if bounded is None else bounded.most
    first = []
    for row in rows:
        opened: dict[str, Any] = {"reserves": ((row, most),)}
        if bounded is not None:
            opened["policies"] = (bounded.of_row(row),)
            opened["layered"] = (LayeredPrompt(row, runner.capacity.blocks),)
        begun = step([(token, i, row) for i, token in enumerate(ids[row][:prompt])], **opened)
        first.append(runner.forward(begun).logits_WV)
        if bounded is None:
            runner.forward(step([], commits=tuple(range(prompt))))
    logits_RV, losses = torch.cat(first), []
    for position in range(prompt, total):
        target_R = torch.tensor([ids[row][position] for row in rows])
        losses.append(torch.nn.functional.cross_entropy(logits_RV, target_R).item())
        due = bounded is not None and bounded.due(prompt, position)
        nodes = [(ids[row][position], position, row) for row in rows]
        commits = rows if position > prompt else ()
        logits_RV = runner.forward(step(nodes, commits=commits, evictions=rows if due else ())).logits_WV
    runner.forward(step([], releases=rows))
    return statistics.fmean(losses)


def keys_found(engine: Engine, recipe: EvictionBench, kv: KVSettings | None) -> float:
    """Share of hidden keys that come back, each hidden elsewhere in as much filler as a window has tokens."""
    source = random.Random(0)
    length = len(engine.tokenizer.encode(FILLER))
    count = recipe.prompt_tokens // length
    pieces = [FILLER] * count
    if recipe.filler == "text":
        ids = engine.tokenizer.encode(join_rows(read_rows(recipe.text)))[: count * length]
        pieces = [engine.tokenizer.decode(ids[i * length : (i + 1) * length]) for i in range(count)]
    found, keys = {}, {}
    for i in range(recipe.keys):
        key = str(source.randrange(10000, 100000))
        depth = int((i + 0.5) / recipe.keys * count)
        hidden = f"The pass key is {key}. Remember it. {key} is the pass key. "
        text = "".join((*pieces[:depth], hidden, *pieces[depth:]))
        ids = engine.tokenizer.encode(text + "What is the pass key? The pass key is")
        keys[str(i)], found[str(i)] = key, ""
        engine.add(
            Request(id=str(i), prompt=ids, params=SamplingParams(max_tokens=10, temperature=0.0), kv=kv)
        )
    while engine.has_work:
        for delta in engine.step():
            found[delta.request_id] += delta.text
    return statistics.fmean(key in found[name] for name, key in keys.items())


def quality(engine: Engine, recipe: EvictionBench) -> Iterator[dict[str, Any]]:
    """A row for the full cache, and for each policy at each budget."""
    runner = engine.runner
    assert isinstance(runner, LocalRunner)
    ids: list[list[int]] = []
    if recipe.windows:
        size = recipe.prompt_tokens + recipe.scored_tokens
        tokens = engine.tokenizer.encode(join_rows(read_rows(recipe.text)))
        if len(tokens) < recipe.windows * size:
            raise AxiconError(
                f"text={recipe.text}: {len(tokens)} tokens, {recipe.windows} windows of {size} need more"
            )
        ids = [tokens[i * size : (i + 1) * size] for i in range(recipe.windows)]
    for policy, budget in [("full", 1.0), *((p, b) for b in recipe.budgets for p in recipe.policies)]:
        kv = settings(policy, budget)
        row: dict[str, Any] = {"policy": policy, "budget": budget}
        if ids:
            row["perplexity"] = math.exp(mean_loss(runner, ids, recipe.prompt_tokens, kv))
        if recipe.keys:
            row["keys_found"] = keys_found(engine, recipe, kv)
        complain(f"{policy} {budget:g}: {row}")
        yield row


def decode(engine: Engine, recipe: EvictionBench, kv: KVSettings | None) -> dict[str, float]:
    """All streams together, from the step behind the last prompt on."""
    vocab = engine.runner.capacity.vocab
    for i in range(recipe.streams):
        prompt = [(31 * j + 7919 * (i + 1)) % vocab for j in range(recipe.context)]
        # The first ones decode while the last prompts are computed, and must not end before.
        most = recipe.new_tokens + recipe.context
        params = SamplingParams(max_tokens=most, temperature=0.0, ignore_eos=True)
        engine.add(Request(id=str(i), prompt=prompt, params=params, kv=kv))
    begun: set[str] = set()
    started = time.perf_counter()
    while len(begun) < recipe.streams:
        begun |= {delta.request_id for delta in engine.step() if delta.tokens}
    prompts_s = time.perf_counter() - started
    seconds, kv_bytes = [], 0
    for _ in range(recipe.new_tokens - 1):
        started = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - started)
        kv_bytes = max(kv_bytes, sum(engine.stats().kv_bytes.values()))
    for i in range(recipe.streams):
        engine.cancel(str(i))
    while engine.has_work:
        engine.step()
    mean = statistics.fmean(seconds)
    return {
        "tokens_per_s": recipe.streams / mean, "step_s": mean, "median_step_s": statistics.median(seconds),
        "slowest_step_s": max(seconds), "prompts_s": prompts_s, "kv_bytes": kv_bytes,
    }  # fmt: skip


def speed(engine: Engine, recipe: EvictionBench) -> dict[str, dict[str, float]]:
    runs: dict[str, list[dict[str, float]]] = {}
    names = ("full", *recipe.speed_policies)
    for turn in range(recipe.rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            kv = settings(name, recipe.speed_budget)
            runs.setdefault(name, []).append(decode(engine, recipe, kv))
            complain(f"{name}: {runs[name][-1]}")
    return {
        name: {key: statistics.median(one[key] for one in found) for key in found[0]}
        for name, found in runs.items()
    }


def prompts_read(
    runner: LocalRunner, recipe: EvictionBench, kv: KVSettings | None, rows: Sequence[int]
) -> Retention | None:
    """Rows of equal prompts. Whole caches are computed once and copied."""
    prompt = [(31 * j + 7919) % runner.capacity.vocab for j in range(recipe.context)]
    bounded = retention(kv, recipe.context, recipe.new_tokens + 1, FLOOR)
    most = recipe.context + recipe.new_tokens + 1 if bounded is None else bounded.most
    for row in rows:
        opened: dict[str, Any] = {"reserves": ((row, most),)}
        if bounded is not None:
            opened["policies"] = (bounded.of_row(row),)
            opened["layered"] = (LayeredPrompt(row, runner.capacity.blocks),)
        elif row != rows[0]:
            runner.forward(step([], **opened, reuses=(KeptBlock(0, row, 0, recipe.context),)))
            continue
        runner.forward(step([(token, i, row) for i, token in enumerate(prompt)], **opened))
        if bounded is None:
            kept = KeptBlock(0, row, 0, recipe.context)
            runner.forward(step([], commits=tuple(range(recipe.context)), keeps=(kept,)))
    if bounded is None:
        runner.forward(step([], drops=(0,)))
    return bounded


def step_by_step(engine: Engine, recipe: EvictionBench) -> dict[str, dict[str, list[float]]]:
    """Seconds of each decode step of the model, with what it cuts: the policies take turns step by step, so
    that what else the machine does falls on all of them. cpu_s: of this process, on one thread."""
    runner = engine.runner
    assert isinstance(runner, LocalRunner)
    names = ("full", *recipe.speed_policies)
    groups: dict[str, tuple[tuple[int, ...], Retention | None]] = {}
    for i, name in enumerate(names):
        kv = settings(name, recipe.speed_budget)
        rows = tuple(range(i * recipe.streams, (i + 1) * recipe.streams))
        groups[name] = rows, prompts_read(runner, recipe, kv, rows)
        complain(f"{name}: {recipe.streams} prompts are read")
    found = {name: {"wall_s": [], "cpu_s": []} for name in names}
    for position in range(recipe.context, recipe.context + recipe.new_tokens):
        for name in names[position % len(names) :] + names[: position % len(names)]:
            rows, bounded = groups[name]
            nodes = step([(7 * position % 1000, position, row) for row in rows])
            due = bounded is not None and bounded.due(recipe.context, position + 1)
            commits = tuple(range(len(rows)))
            wall, cpu = time.perf_counter(), time.process_time()
            runner.forward(nodes)
            runner.forward(step([], commits=commits, evictions=rows if due else ()))
            found[name]["wall_s"].append(time.perf_counter() - wall)
            found[name]["cpu_s"].append(time.process_time() - cpu)
    runner.forward(step([], releases=[row for rows, _ in groups.values() for row in rows]))
    return found


def beside(times: dict[str, dict[str, list[float]]], name: str, other: str, key: str) -> list[float]:
    """Seconds of one policy over those of the other, in rounds of as many steps as lie between two cuts."""
    rounds = zip(*(batched(times[who][key], EVERY) for who in (name, other)), strict=True)
    return sorted(sum(ours) / sum(others) for ours, others in rounds)


def admitted(whole: Engine, recipe: EvictionBench) -> dict[str, dict[str, float]]:
    """Streams that run at once where so many full caches fit, and the bytes that their caches come to."""
    output, runner = recipe.context // 2, whole.runner
    assert isinstance(runner, LocalRunner)
    runner.limit(recipe.memory_of * runner.slots_reserved(recipe.context + output))
    engine = Engine(runner, whole.tokenizer, eos_ids=(), limits=whole.limits)
    vocab, found = engine.runner.capacity.vocab, {}
    for name in ("full", *recipe.speed_policies):
        kv = settings(name, recipe.speed_budget)
        params = SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True)
        for i in range(MOST):
            prompt = [(31 * j + 7919 * (i + 1)) % vocab for j in range(recipe.context)]
            engine.add(Request(id=str(i), prompt=prompt, params=params, kv=kv))
        engine.step()
        while not engine.decode_only:
            # A prompt that finds no room lets the step go on without one.
            engine.step()
        stats = engine.stats()
        if stats.finished_total.get("length") or not stats.waiting:
            raise AxiconError(f"memory_of={recipe.memory_of}: all {MOST} {name} streams find room, give less")
        held = sum(stats.kv_bytes.values())
        found[name] = {"streams": stats.running, "kv_bytes": held, "slots": stats.slots}
        for i in range(MOST):
            engine.cancel(str(i))
        while engine.has_work:
            engine.step()
        complain(f"{name}: {found[name]}")
    return found


def engine_of(recipe: EvictionBench) -> Engine:
    from axicon.compress.walk import Compress

    compressor = recipe.build_compressor()
    return build_engine(
        recipe.model, dtype=recipe.dtype, threads=recipe.threads, kv_gib=1.0, max_rows=MOST,
        limits=Limits(kv_floor=FLOOR), transform=None if compressor is None else Compress(compressor),
    )  # fmt: skip


def tables(result: dict[str, Any]) -> Iterator[Table]:
    if result["quality"]:
        shown = Table(title="behind long prompts", title_justify="left")
        for column in ("policy", "budget", "perplexity", "keys found"):
            shown.add_column(column, justify="left" if column == "policy" else "right")
        for row in result["quality"]:
            ppl, keys = row.get("perplexity"), row.get("keys_found")
            shown.add_row(
                row["policy"], f"{row['budget']:.0%}", "" if ppl is None else f"{ppl:.2f}",
                "" if keys is None else f"{keys:.0%}",
            )  # fmt: skip
        yield shown
    if result["speed"]:
        shown = Table(title="decoding", title_justify="left")
        for column in (
            "policy",
            "tokens/s",
            "of full",
            "step ms",
            "slowest",
            "prompts s",
            "KV MiB",
            "of full",
        ):
            shown.add_column(column, justify="left" if column == "policy" else "right")
        full = result["speed"]["full"]
        for name, row in result["speed"].items():
            shown.add_row(
                name, f"{row['tokens_per_s']:.0f}", f"{row['tokens_per_s'] / full['tokens_per_s']:.2f}",
                f"{row['step_s'] * 1e3:.1f}", f"{row['slowest_step_s'] * 1e3:.0f}", f"{row['prompts_s']:.1f}",
                f"{row['kv_bytes'] / 2**20:.0f}", f"{row['kv_bytes'] / full['kv_bytes']:.0%}",
            )  # fmt: skip
        yield shown
    if result["turns"]:
        scored = [
            name
            for name in result["turns"]
            if name != "full" and KV_POLICIES[name.partition(":")[0]].needs != "none"
        ]
        pairs = [("full", name) for name in result["turns"] if name != "full"]
        pairs += [(name, "window") for name in scored if "window" in result["turns"]]
        shown = Table(title=f"seconds of {EVERY} steps, taking turns", title_justify="left")
        for column in ("of", "over", "clock", "least", "median", "most"):
            shown.add_column(column, justify="right" if column in ("least", "median", "most") else "left")
        for name, other in pairs:
            for key in ("wall_s", "cpu_s"):
                ratios = beside(result["turns"], name, other, key)
                numbers = (ratios[0], statistics.median(ratios), ratios[-1])
                shown.add_row(name, other, key, *(f"{number:.3f}" for number in numbers))
        yield shown
    if result["admitted"]:
        shown = Table(title="running at once in one memory", title_justify="left")
        for column in ("policy", "streams", "KV MiB", "slots"):
            shown.add_column(column, justify="left" if column == "policy" else "right")
        for name, row in result["admitted"].items():
            shown.add_row(
                name, f"{row['streams']}", f"{row['kv_bytes'] / 2**20:.0f}", f"{row['slots']}"
            )  # fmt: skip
        yield shown


def plot(result: dict[str, Any], path: Path) -> bool:
    """Perplexity and keys found over the budget. False without matplotlib."""
    rows = result["quality"]
    if importlib.util.find_spec("matplotlib") is None or not rows:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    names = dict.fromkeys(row["policy"] for row in rows if row["policy"] != "full")
    measured = [key for key in ("perplexity", "keys_found") if key in rows[0]]
    for axes, key in zip(figure.subplots(1, len(measured), squeeze=False)[0], measured, strict=True):
        for name in names:
            points = [(row["budget"], row[key]) for row in rows if row["policy"] == name]
            axes.plot([100 * b for b, _ in points], [value for _, value in points], marker="o", label=name)
        axes.axhline(rows[0][key], color="gray", linestyle="--", label="full")
        axes.set_xscale("log")
        axes.set_xticks(
            [100 * b for b in result["recipe"]["budgets"]],
            [f"{100 * b:g} %" for b in result["recipe"]["budgets"]],
        )
        axes.minorticks_off()
        axes.set_xlabel("budget, of the prompt")
        axes.set_ylabel(key.replace("_", " "))
        if key == "perplexity":
            axes.set_yscale("log")
    figure.axes[0].legend()
    figure.savefig(path, dpi=120)
    return True


def main(words: Sequence[str]) -> None:
    recipe = EvictionBench.parse(words)
    about = surroundings()
    engine = engine_of(recipe)
    wants_quality = recipe.windows or recipe.keys
    result: dict[str, Any] = {
        "benchmark": "eviction", **about,
        "recipe": recipe.model_dump(mode="json") | {"out": None, "text": Path(recipe.text).name},
        "threads": torch.get_num_threads(), "model": dict(engine.runner.describe()),
        "quality": list(quality(engine, recipe)) if wants_quality else [],
        "speed": speed(engine, recipe) if recipe.streams and recipe.rounds else {},
        "turns": step_by_step(engine, recipe) if recipe.streams else {},
        "admitted": admitted(engine, recipe) if recipe.memory_of else {},
    }  # fmt: skip
    console = Console(width=None if sys.stdout.isatty() else 110)
    for shown in tables(result):
        console.print(shown)
    path = save("eviction", result, recipe.out)
    drawn = plot(result, path.with_suffix(".png"))
    print(f"written to {path}" + (f" and {path.with_suffix('.png').name}" if drawn else ""))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except AxiconError as error:
        sys.exit(f"eviction: {error}")
