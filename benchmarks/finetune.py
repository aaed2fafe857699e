"""What a step of finetuning costs: `python benchmarks/finetune.py [key=value ...]`.

Every subject has a process of its own, where forward passes and steps take turns, so both see the same
machine. The cost of a step is in forward passes of the same model on the same batch; memory is the peak over
the steps, beside that of a process that only computes forward passes. Subjects: zeroth-order descent of this
project with LoRA and of all weights, plain MeZO as it is usually written on transformers (in place, a normal
draw per parameter), and first-order LoRA, through PEFT too where that is installed. Bars: 2.3 and 2.6 passes,
1.15 times the memory.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measure import RESULTS, complain, save, surroundings
from pydantic import Field
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from axicon.data.batch import Batch
from axicon.errors import AxiconError
from axicon.finetune.estimate import losses
from axicon.finetune.objectives.language import Language
from axicon.finetune.shards import Alone
from axicon.finetune.updates import UPDATE_RULES
from axicon.model import checkpoint
from axicon.model.adapters import SCHEMES
from axicon.model.machine import cores
from axicon.protocols import Moment
from axicon.settings import Recipe

SUBJECTS = {
    "forward": None, "zo_sgd lora": 2.3, "zo_sgd full": 2.6, "mezo lora": None, "mezo full": None,
    "adamw lora": None, "peft lora": None,
}  # fmt: skip
"""And what a step may cost at most, in forward passes."""
MEMORY_BAR = 1.15


class FinetuneBench(Recipe):
    model: str = Field("demo", description="demo or a model directory")
    batch: int = Field(16, ge=1, description="examples of a step")
    tokens: int = Field(32, ge=2, description="tokens of an example, whose last is scored")
    rounds: int = Field(7, ge=2, description="forward passes and steps, in turns; medians of them count")
    threads: int | None = Field(None, ge=1, description="compute threads; none: one per core")
    subjects: tuple[str, ...] = Field(tuple(SUBJECTS), description="which of them")
    out: Path = Field(RESULTS, description="folder for the JSON file")


Pair = tuple[Callable[[], object], Callable[[int], object] | None]
"""A forward pass, and a step."""


def ours(bench: FinetuneBench, folder: Path, rule: str | None, scheme: str) -> Pair:
    model = checkpoint.load(folder, dtype=torch.float32).requires_grad_(False)
    batch, objective, mean = batch_of(bench, model.shape.vocab), Language(), Alone()

    def forward() -> object:
        return losses(model, objective, batch, mean)

    if rule is None:
        return forward, None
    SCHEMES[scheme]().install(model, Moment(0, 0).key)
    made = UPDATE_RULES[rule](lr=1e-6)  # type: ignore[call-arg]
    made.prepare(model)
    return forward, lambda i: made.step(model, objective, batch, mean, Moment(i, 0))


def theirs(bench: FinetuneBench, folder: Path, step: str, lora: bool) -> Pair:
    """A model of transformers, with PEFT's adapters if asked."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    batch = batch_of(bench, model.config.vocab_size)

    def loss() -> Tensor:
        # As `Language` has it: logits of the scored position alone.
        logits = model(batch.input_ids[:, :-1], logits_to_keep=1).logits[:, -1]
        return F.cross_entropy(logits, batch.input_ids[:, -1])

    def forward() -> object:
        with torch.no_grad():
            return loss()

    if step == "mezo":
        return forward, lambda i: mezo(model, loss, i)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-6)

    def descend(i: int) -> None:
        loss().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    return forward, descend


@torch.no_grad()
def mezo(
    model: nn.Module, loss: Callable[[], Tensor], seed: int, lr: float = 1e-6, eps: float = 1e-3
) -> None:
    """Algorithm 1 of arXiv:2305.17333, in place."""
    trained = [p for p in model.parameters() if p.requires_grad]

    def move(scale: float) -> None:
        torch.manual_seed(seed)
        for p in trained:
            p.data.add_(torch.normal(0.0, 1.0, p.shape, dtype=p.dtype), alpha=scale)

    move(eps)
    plus = float(loss())
    move(-2 * eps)
    minus = float(loss())
    move(eps)
    move(-lr * (plus - minus) / (2 * eps))


def batch_of(bench: FinetuneBench, vocab: int) -> Batch:
    tokens = torch.randint(0, vocab, (bench.batch, bench.tokens), generator=torch.Generator().manual_seed(0))
    labels = torch.full_like(tokens, -100)
    labels[:, -1] = tokens[:, -1]
    return Batch(input_ids=tokens, mask=torch.ones_like(tokens, dtype=torch.bool), labels=labels)


def measure(bench: FinetuneBench, subject: str) -> dict[str, Any]:
    """What a process of its own finds."""
    torch.set_num_threads(bench.threads or cores())
    folder = checkpoint.resolve(bench.model)
    name, _, scheme = subject.partition(" ")
    if name in ("mezo", "peft"):
        forward, step = theirs(bench, folder, name, scheme == "lora")
    else:
        forward, step = ours(bench, folder, None if name == "forward" else name, scheme)
    times: dict[str, list[float]] = {"forward": [], "step": []}
    for i in range(bench.rounds + 1):
        if i == 1:
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        for kind, run in (("forward", forward), ("step", step and (lambda i=i: step(i)))):
            if run is not None:
                start = time.perf_counter()
                run()
                times[kind].append(time.perf_counter() - start)
    seconds = {kind: statistics.median(found[1:]) for kind, found in times.items() if found}
    return {"subject": subject, "peak_bytes": _peak(), **{f"{k}_seconds": v for k, v in seconds.items()}}


def _peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def run(bench: FinetuneBench) -> dict[str, Any]:
    found: list[dict[str, Any]] = []
    for subject in bench.subjects:
        if subject in ("mezo lora", "peft lora") and find_spec("peft") is None:
            found.append({"subject": subject, "reason": "peft is not installed"})
            continue
        command = [sys.executable, __file__, "--subject", subject, bench.model_dump_json()]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            complain(f"{subject}: {reason}")
            found.append({"subject": subject, "reason": reason})
            continue
        found.append(json.loads(done.stdout.splitlines()[-1]))
        complain(f"{subject}: {found[-1]}")
    return surroundings() | {"recipe": bench.model_dump(mode="json", exclude={"out"}), "subjects": found}


def table(result: dict[str, Any]) -> Table:
    asked = result["recipe"]
    shown = Table(
        title=f"{asked['batch']} x {asked['tokens']} tokens, float32; {result['cpu']}", title_justify="left"
    )
    base = next((one.get("peak_bytes") for one in result["subjects"] if one["subject"] == "forward"), None)
    for column in ("subject", "forward s", "step s", "passes", "bar", "peak GB", "of inference"):
        shown.add_column(column, justify="left" if column == "subject" else "right")
    for one in result["subjects"]:
        if "reason" in one:
            shown.add_row(one["subject"], one["reason"])
            continue
        step, forward, bar = one.get("step_seconds"), one["forward_seconds"], SUBJECTS[one["subject"]]
        shown.add_row(
            one["subject"], f"{forward:.3f}", f"{step:.3f}" if step else "",
            f"{step / forward:.2f}" if step else "", "" if bar is None else str(bar),
            f"{one['peak_bytes'] / 1e9:.2f}", f"{one['peak_bytes'] / base:.2f}" if base else "",
        )  # fmt: skip
    return shown


def main(words: list[str]) -> None:
    if words[:1] == ["--subject"]:
        print(json.dumps(measure(FinetuneBench.model_validate_json(words[2]), words[1])))
        return
    bench = FinetuneBench.parse(words)
    result = run(bench)
    Console(width=None if sys.stdout.isatty() else 120).print(table(result))
    print(f"written to {save('finetune', result, bench.out)}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except AxiconError as error:
        sys.exit(f"finetune: {error}")
