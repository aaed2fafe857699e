"""Methods on a model that was never quantised: `python benchmarks/second_subject.py [key=value ...]`.

The embedded model was 4-bit at its source, which flatters some methods. So this trains a small OPT-shaped
model (4 blocks, width 256, a vocabulary of its own) in some 13 minutes of one core, from a fixed seed, saves
it as a usual directory, and puts the perplexity of every method, with the settings of its recipe, beside that
of the dense model. A model that is there already is not trained again:

    python benchmarks/second_subject.py                                  # train, then the table
    python benchmarks/second_subject.py train=a.txt,b.jsonl.gz test=c.txt model=DIR

Without texts it takes those of the folder AXICON_DATA: trained on WikiText-2 valid and public-domain texts,
calibrated on the former, tested on WikiText-2 test.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
import yaml
from measure import RESULTS, ROOT, complain, save, surroundings
from pydantic import Field
from rich.console import Console
from rich.table import Table
from torch import Tensor

from axicon.compress import COMPRESSORS
from axicon.compress.calibration import Calibration, choose_windows
from axicon.compress.walk import compress
from axicon.data import join_rows, read_rows
from axicon.errors import AxiconError
from axicon.evaluate.perplexity import perplexity, tokenise
from axicon.model import checkpoint
from axicon.model.artefact import atomic_directory
from axicon.settings import Method, Recipe, Words, named_method

DATA = Path(os.environ.get("AXICON_DATA", ROOT.parent / "shared" / "data"))
WIKITEXT = DATA / "wikitext-2-raw"
VOCABULARY, POSITIONS, END = 4096, 256, "</s>"
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 256, "word_embed_proj_dim": 256, "ffn_dim": 1024,
    "num_hidden_layers": 4, "num_attention_heads": 8, "max_position_embeddings": POSITIONS, "dropout": 0.0,
}  # fmt: skip


class SecondSubject(Recipe):
    model: Path = Field(Path("artifacts/models/small-opt"), description="made if it is not there")
    train: Words = Field(
        (str(WIKITEXT / "wiki.valid.raw"), str(DATA / "public-domain-text" / "documents.jsonl.gz")),
        description="texts, comma between; a sample of the first is what methods look at",
    )
    test: str = Field(str(WIKITEXT / "wiki.test.part1.raw"), description="text of the perplexity")
    methods: Words = Field(tuple(COMPRESSORS), description="comma between")
    steps: int = Field(2000, ge=1, description="of training")
    batch: int = Field(8, ge=1, description=f"windows of {POSITIONS} tokens in a step")
    rate: float = Field(2e-3, gt=0, description="learning rate at its highest")
    seed: int = Field(0, ge=0)
    threads: int = Field(2, ge=1, description="compute threads")
    out: Path = Field(RESULTS, description="folder for the JSON file")


def text_of(source: str) -> str:
    return join_rows(read_rows(source))


def train(bench: SecondSubject) -> None:
    """Write the model's directory."""
    texts = [text_of(source) for source in bench.train]
    tokenizer = _tokenizer(texts)
    ids = [tokenizer(text)["input_ids"] for text in texts]
    tokens_T = torch.tensor([token for some in ids for token in some])
    if len(tokens_T) < POSITIONS * bench.batch:
        raise AxiconError(f"train has {len(tokens_T)} tokens, too few for a step; give more text")
    torch.manual_seed(bench.seed)
    end = tokenizer.convert_tokens_to_ids(END)
    config = transformers.OPTConfig(**SHAPE, bos_token_id=end, eos_token_id=end, pad_token_id=end)
    model = transformers.OPTForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=bench.rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, bench.rate, total_steps=bench.steps, pct_start=0.1, cycle_momentum=False)  # fmt: skip
    complain(f"training {model.num_parameters() / 1e6:.1f} M parameters on {len(tokens_T)} tokens")
    start, losses = time.perf_counter(), []
    for step, batch_BT in enumerate(_batches(tokens_T, bench), 1):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(batch_BT, labels=batch_BT).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if step % 100 == 0:
            seconds = time.perf_counter() - start
            complain(f"step {step} of {bench.steps}, loss {sum(losses[-100:]) / 100:.3f}, {seconds:.0f} s")
    with atomic_directory(bench.model.absolute()) as folder:
        model.eval().save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _tokenizer(texts: list[str]) -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE, trained on the texts."""
    found = tokenizers.Tokenizer(tokenizers.models.BPE())
    found.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    lines = [line for text in texts for line in text.splitlines(keepends=True)]
    found.train_from_iterator(lines, trainer)
    if found.get_vocab_size() != VOCABULARY:
        raise AxiconError(f"train gives {found.get_vocab_size()} tokens, not {VOCABULARY}; give more text")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=found, bos_token=END, eos_token=END, pad_token=END)  # fmt: skip


def _batches(tokens_T: Tensor, bench: SecondSubject) -> Iterator[Tensor]:
    """Windows from random places."""
    drawn = torch.Generator().manual_seed(bench.seed)
    for _ in range(bench.steps):
        starts = torch.randint(len(tokens_T) - POSITIONS, (bench.batch, 1), generator=drawn)
        yield tokens_T[starts + torch.arange(POSITIONS)]


def measure(bench: SecondSubject) -> list[dict[str, Any]]:
    """A line of the table for the dense model and for each method."""
    tokenizer = checkpoint.load_tokenizer(bench.model)
    test, tokens_T = text_of(bench.test), tokenise(tokenizer, text_of(bench.train[0]))
    sample = Calibration(choose_windows(tokens_T, 32, POSITIONS, bench.seed, f"train={bench.train[0]}"))
    found: list[dict[str, Any]] = []
    for name in ("dense", *bench.methods):
        model = checkpoint.load(bench.model, dtype=torch.float32)
        settings: dict[str, Any] = {}
        start = time.perf_counter()
        if name != "dense":
            settings = _settings(name)
            method = Method.model_validate(named_method(settings)).build(COMPRESSORS, "methods")
            model = compress(method, model, sample if method.needs_inputs else None)
        seconds = time.perf_counter() - start
        value = perplexity(model, tokenizer, test, window=POSITIONS)
        packed = sum(tensor.nbytes for tensor in model.blocks.state_dict().values())
        found.append({
            "method": name, "settings": settings, "perplexity": value.value, "windows": value.windows,
            "block_bytes": packed, "seconds": seconds,
        })  # fmt: skip
        complain(f"{name}: perplexity {value.value:.3f}")
    return found


def _settings(name: str) -> dict[str, Any]:
    """What the recipe of a method says of it."""
    path = ROOT / "recipes" / f"{name}.yaml"
    if name not in COMPRESSORS or not path.exists():
        raise AxiconError(f"methods={name}: known are {', '.join(COMPRESSORS)}")
    return dict(yaml.safe_load(path.read_text())["compressor"])


def table(result: dict[str, Any]) -> Table:
    shown = Table(title=f"{Path(result['recipe']['model']).name}, {result['runs'][0]['windows']} windows of "
                  f"{POSITIONS}", title_justify="left")  # fmt: skip
    shown.add_column("")
    for column in ("perplexity", "beside dense", "bytes of blocks / float32", "s"):
        shown.add_column(column, justify="right")
    dense = result["runs"][0]
    for one in result["runs"]:
        shown.add_row(
            one["method"], f"{one['perplexity']:.3f}", f"{one['perplexity'] / dense['perplexity'] - 1:+.2%}",
            f"{one['block_bytes'] / dense['block_bytes']:.1%}", f"{one['seconds']:.1f}")  # fmt: skip
    return shown


def main(words: list[str]) -> None:
    bench = SecondSubject.parse(words)
    torch.set_num_threads(bench.threads)
    result = {"benchmark": "second_subject", **surroundings()}
    if not bench.model.exists():
        start = time.perf_counter()
        train(bench)
        result["training_seconds"] = time.perf_counter() - start
    result["recipe"] = bench.model_dump(mode="json", exclude={"out"}) | {
        "train": [Path(source).name for source in bench.train], "test": Path(bench.test).name}  # fmt: skip
    result["model_sha256"] = checkpoint.digest(bench.model)
    result["runs"] = measure(bench)
    Console(width=None if sys.stdout.isatty() else 110).print(table(result))
    print(f"written to {save('second_subject', result, bench.out)}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except AxiconError as error:
        sys.exit(f"second_subject: {error}")
