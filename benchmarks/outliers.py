"""Outliers with and without gated heads and clipped softmax: `python benchmarks/outliers.py [key=value ...]`.

Trains small OPT-shaped models on the bytes of a text, all from the same seed on the same batches, one for
each variant of attention, and puts beside each other what they predict, how large their largest activations
are, and what 8 and 6 bits per tensor cost them (arXiv:2306.12929, table 2, in small). Some minutes on a CPU:

    python benchmarks/outliers.py                                         # texts of the folder AXICON_DATA
    python benchmarks/outliers.py train=a.txt test=b.txt steps=3000 seeds=0,1,2

Outliers want long training: the direction shows here, not the size.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measure import RESULTS, ROOT, complain, save, surroundings
from pydantic import Field
from rich.console import Console
from rich.table import Table
from torch import Tensor

from axicon.data import join_rows, read_rows
from axicon.errors import AxiconError
from axicon.evaluate.outliers import outliers
from axicon.evaluate.static_bits import static_bits
from axicon.model.decoder import Block, Decoder
from axicon.model.shape import ModelShape
from axicon.model.variant import PLAIN, AttentionVariant, clipped, with_variants
from axicon.settings import Recipe, Words

DATA = Path(os.environ.get("AXICON_DATA", ROOT.parent / "shared" / "data")) / "wikitext-2-raw"
BITS = ((8, 8), (8, 6), (6, 6))
"""Of weights and activations, one scale for a tensor, fixed beforehand."""
CALIBRATION, BATCH = 16, 8
"""Batches that ranges of 8 bits are read off, and texts in one of them."""
SPREAD = 0.006
"""Standard deviation of weights at first, as OPT has it."""


class Outliers(Recipe):
    train: str = Field(str(DATA / "wiki.valid.raw"), description="text to train on")
    test: str = Field(str(DATA / "wiki.test.part1.raw"), description="text to measure on")
    variants: Words = Field(("plain", "gated", "clipped"), description="or mlp, all_heads")
    alpha: float = Field(2.0, gt=0, description="of the clip: gamma is -alpha / window")
    open: float = Field(0.25, gt=0, lt=1, description="how far gates are open at first")
    layers: int = Field(4, ge=1)
    width: int = Field(128, ge=32, multiple_of=32, description="with heads of 32 channels")
    window: int = Field(128, ge=8, description="bytes of a text in training and measurement")
    steps: int = Field(2000, ge=1)
    batch: int = Field(16, ge=1)
    rate: float = Field(2e-3, gt=0, description="learning rate at its highest")
    decay: float = Field(0.1, ge=0, description="of weights")
    decay_norms: bool = Field(True, description="of those of norms too, which alone makes outliers smaller")
    windows: int = Field(200, ge=1, description="of the test")
    seeds: Words = Field(("0",), description="comma between")
    threads: int = Field(2, ge=1, description="compute threads")
    out: Path = Field(RESULTS, description="folder for the JSON file")


def variant_of(name: str, bench: Outliers) -> AttentionVariant:
    known = {
        "plain": PLAIN,
        "gated": AttentionVariant(gate="linear"),
        "mlp": AttentionVariant(gate="mlp"),
        "all_heads": AttentionVariant(gate="all_heads"),
        "clipped": clipped(bench.alpha, bench.window),
    }
    if name not in known:
        raise AxiconError(f"variants={name}: known are {', '.join(known)}")
    return known[name]


def model_of(variant: AttentionVariant, bench: Outliers, seed: int) -> Decoder:
    """The same weights at first, whatever the variant is; gates are drawn behind all of them."""
    shape = ModelShape.from_config({
        "model_type": "opt", "vocab_size": 256, "hidden_size": bench.width, "ffn_dim": 4 * bench.width,
        "word_embed_proj_dim": bench.width, "num_hidden_layers": bench.layers,
        "num_attention_heads": bench.width // 32, "max_position_embeddings": bench.window,
    })  # fmt: skip
    model = Decoder(with_variants(shape, [variant] * bench.layers))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "head_gate" not in name:
                parameter.normal_(0, SPREAD)
            elif name.endswith(".bias"):
                parameter.zero_()
        for block in model.blocks:
            assert isinstance(block, Block)
            if (gate := block.head_gate) is not None:
                gate.start(bench.open, SPREAD)
    return model


def batches(ids_T: Tensor, bench: Outliers, seed: int) -> Iterator[Tensor]:
    """(B, window + 1) from random places."""
    drawn = torch.Generator().manual_seed(seed)
    for _ in range(bench.steps):
        starts = torch.randint(len(ids_T) - bench.window - 1, (bench.batch, 1), generator=drawn)
        yield delimited(ids_T[starts + torch.arange(bench.window + 1)])


def delimited(texts_BT: Tensor) -> Tensor:
    """With byte 0, which is in no text, for the first one: tokens of their own draw the attention of heads
    that have nothing to do.
    """
    return torch.cat([torch.zeros_like(texts_BT[:, :1]), texts_BT[:, 1:]], dim=1)


def train(model: Decoder, ids_T: Tensor, bench: Outliers, seed: int, name: str) -> None:
    parts: dict[bool, list[Tensor]] = {True: [], False: []}
    for key, p in model.named_parameters():
        parts[p.dim() > 1 or (bench.decay_norms and key.endswith("norm.weight"))].append(p)
    optimizer = torch.optim.AdamW(
        [{"params": parts[True], "weight_decay": bench.decay}, {"params": parts[False], "weight_decay": 0.0}],
        lr=bench.rate, betas=(0.9, 0.95))  # fmt: skip
    warm = max(1, bench.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, 1 - step / bench.steps))  # fmt: skip
    start, recent = time.perf_counter(), 0.0
    for step, batch_BT in enumerate(batches(ids_T, bench, seed), 1):
        loss = loss_of(model, batch_BT)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        recent += float(loss.detach())
        if step % 250 == 0:
            complain(f"{name}: step {step} of {bench.steps}, loss {recent / 250:.3f}, "
                     f"{time.perf_counter() - start:.0f} s")  # fmt: skip
            recent = 0.0


def loss_of(model: Decoder, batch_BT: Tensor) -> Tensor:
    """Mean over all but the first byte of each text."""
    logits_BTV = model.logits(batch_BT[:, :-1])
    return F.cross_entropy(logits_BTV.flatten(0, 1), batch_BT[:, 1:].flatten())


@torch.inference_mode()
def perplexity(model: Decoder, texts_WT: Tensor) -> float:
    losses = [loss_of(model, part) * len(part) for part in texts_WT.split(BATCH)]
    return float((torch.stack(losses).sum() / len(texts_WT)).exp())


def measure(model: Decoder, ids: Mapping[str, Tensor], bench: Outliers, seed: int) -> dict[str, float]:
    model.eval().requires_grad_(False)
    count = bench.window + 1
    test_WT = delimited(ids["test"][: bench.windows * count].view(-1, count))
    drawn = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(ids["train"]) - count, (CALIBRATION, BATCH, 1), generator=drawn)
    texts = delimited(ids["train"][starts + torch.arange(bench.window)].flatten(0, 1))
    sample = texts.view(CALIBRATION, BATCH, -1).tolist()
    bits = {f"w{w}a{a}": perplexity(static_bits(model, sample, weights=w, activations=a), test_WT)
            for w, a in BITS}  # fmt: skip
    seen = outliers(model, test_WT[:64, :-1].tolist())
    return {
        "perplexity": perplexity(model, test_WT),
        "max_inf_norm": seen.max_inf_norm,
        "kurtosis": seen.kurtosis,
        **bits,
        "parameters": float(sum(p.numel() for p in model.parameters())),
    }


def table(result: dict[str, Any]) -> Table:
    steps, seeds = result["recipe"]["steps"], len(result["recipe"]["seeds"])
    shown = Table(title=f"{steps} steps, means over seeds: {seeds}", title_justify="left")
    columns = {"perplexity": 3, "max_inf_norm": 1, "kurtosis": 1} | {f"w{w}a{a}": 3 for w, a in BITS}
    shown.add_column("")
    for column in columns:
        shown.add_column(column, justify="right")
    for name in result["recipe"]["variants"]:
        runs = [one for one in result["runs"] if one["variant"] == name]
        mean = {key: sum(one[key] for one in runs) / len(runs) for key in columns}
        cells = [f"{mean[key]:.{digits}f}" for key, digits in columns.items()]
        for place, key in enumerate(columns):
            if key.startswith("w"):
                cells[place] += f" ({mean[key] / mean['perplexity'] - 1:+.1%})"
        shown.add_row(name, *cells)
    return shown


def main(words: list[str]) -> None:
    bench = Outliers.parse(words)
    torch.set_num_threads(bench.threads)
    texts = {"train": bench.train, "test": bench.test}
    ids = {name: torch.tensor(list(join_rows(read_rows(path)).encode())) for name, path in texts.items()}
    needed = {"train": bench.window + 2, "test": bench.windows * (bench.window + 1)}
    for name, count in needed.items():
        if len(ids[name]) < count:
            raise AxiconError(f"{name} has {len(ids[name])} bytes, {count} are needed; give more text")
    runs = []
    for seed in map(int, bench.seeds):
        for name in bench.variants:
            start = time.perf_counter()
            model = model_of(variant_of(name, bench), bench, seed)
            train(model, ids["train"], bench, seed, name)
            found = measure(model, ids, bench, seed)
            runs.append({"variant": name, "seed": seed, **found, "seconds": time.perf_counter() - start})
            complain(f"{name}: " + ", ".join(f"{key} {value:.3f}" for key, value in found.items()))
    recipe = bench.model_dump(mode="json", exclude={"out"}) | {
        "train": Path(bench.train).name, "test": Path(bench.test).name}  # fmt: skip
    result = {"benchmark": "outliers", **surroundings(), "recipe": recipe, "runs": runs}
    Console(width=None if sys.stdout.isatty() else 110).print(table(result))
    print(f"written to {save('outliers', result, bench.out)}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except AxiconError as error:
        sys.exit(f"outliers: {error}")
