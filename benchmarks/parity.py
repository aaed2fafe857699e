"""Greedy text of axicon beside transformers' `generate`, prompt by prompt.

    python -m benchmarks.parity [model] [--dtype float32] [--prompts 50] [--tokens 64] [--questions FILE]

Prompts are the first turns of MT-Bench in the model's chat template. Where the two texts part, the margin
between the two best logits of transformers at that place is printed: below 1e-3 the difference is rounding.
Parity is claimed for float32. In bfloat16 logits near 16 lie 0.125 apart, so two right programs often part;
there two such steps count as rounding.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROUNDING = 1e-3
QUESTIONS = Path("mt-bench", "mt_bench_questions.jsonl")


@dataclass(frozen=True)
class Parting:
    """Where two greedy texts part: after how many tokens, and how close the two best tokens were."""

    at: int
    margin: float
    step: float
    """Distance of neighbouring numbers at the best logit, in the format of the model."""

    @property
    def rounding(self) -> bool:
        return self.margin < ROUNDING or self.margin <= 2 * self.step


def load_prompts(questions: Path, tokenizer: Any, count: int) -> list[list[int]]:
    lines = questions.read_text().splitlines()[:count]
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": json.loads(line)["turns"][0]}],
            add_generation_prompt=True, tokenize=True, return_dict=False,
        )
        for line in lines
    ]  # fmt: skip


@torch.inference_mode()
def parting(oracle: Any, prompt: Sequence[int], ours: Sequence[int], theirs: Sequence[int]) -> Parting | None:
    """None if the texts are equal. `oracle` is the transformers model."""
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    if at is None:
        if len(ours) == len(theirs):
            return None
        at = min(len(ours), len(theirs))
    logits = oracle(torch.tensor([[*prompt, *ours[:at]]]), logits_to_keep=1).logits[0, -1].float()
    first, second = logits.topk(2).values.tolist()
    step = torch.finfo(oracle.dtype).eps * 2.0 ** math.floor(math.log2(abs(first)))
    return Parting(at, first - second, step)


@torch.inference_mode()
def stock_greedy(oracle: Any, prompt: Sequence[int], tokens: int, eos: Sequence[int]) -> list[int]:
    ids = torch.tensor([list(prompt)])
    out = oracle.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=list(eos),
        pad_token_id=eos[0],
    )
    return out[0, len(prompt) :].tolist()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int)
    default = Path(os.environ.get("AXICON_DATA", "../shared/data")) / QUESTIONS
    parser.add_argument("--questions", type=Path, default=default)
    args = parser.parse_args()

    import transformers

    import axicon
    from axicon.model import checkpoint

    folder = checkpoint.resolve(args.model)
    model = axicon.load(args.model, dtype=args.dtype, threads=args.threads)
    prompts = load_prompts(args.questions, model.tokenizer, args.prompts)
    started = time.perf_counter()
    answers = model.generate(prompts, max_tokens=args.tokens, temperature=0)
    ours_s = time.perf_counter() - started
    oracle = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, args.dtype))
    eos = model.engine.eos_ids
    started = time.perf_counter()
    theirs = [stock_greedy(oracle, prompt, args.tokens, eos) for prompt in prompts]
    theirs_s = time.perf_counter() - started
    found = [
        parting(oracle, prompt, answer.tokens, tokens)
        for prompt, answer, tokens in zip(prompts, answers, theirs, strict=True)
    ]
    for i, part in enumerate(found):
        if part is not None:
            kind = "rounding" if part.rounding else "a different choice"
            print(f"prompt {i}: parts after {part.at} tokens, margin {part.margin:.2e}: {kind}")
    equal = sum(part is None for part in found)
    rounding = sum(part is not None and part.rounding for part in found)
    print(
        f"{model.engine.model_name} {args.dtype}: {equal} of {len(prompts)} texts of {args.tokens} "
        "tokens equal, "
        f"{rounding} part within rounding, {len(prompts) - equal - rounding} elsewhere"
    )
    print(
        f"axicon {ours_s:.1f} s for all together, transformers {theirs_s:.1f} s one by one; "
        f"{platform.machine()}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, "
        f"{model.fingerprint}"
    )


if __name__ == "__main__":
    main()
