"""Greedy text of the embedded model against transformers, on the questions of MT-Bench."""

from __future__ import annotations

import pytest
import torch

import axicon
from axicon.model import checkpoint
from benchmarks.parity import QUESTIONS, ROUNDING, load_prompts, parting, stock_greedy

pytestmark = pytest.mark.slow


def test_greedy_text_equals_transformers(data_dir):
    """Every token is the best one, or within 1e-3 of it, in one float32 pass of transformers over prompt and
    answer.

    By induction over the tokens that is what `generate` would have said; two prompts go through `generate`
    itself.
    """
    questions = data_dir / QUESTIONS
    if not questions.is_file():
        pytest.skip(f"no {questions}")
    import transformers

    model = axicon.load("demo", dtype="float32", threads=1)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint.resolve("demo"), dtype=torch.float32
    )
    prompts = load_prompts(questions, model.tokenizer, 50)
    answers = model.generate(prompts, max_tokens=16, temperature=0)
    checked = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.inference_mode():
            ids = torch.tensor([[*prompt, *answer.tokens]])
            logits = oracle(ids, logits_to_keep=len(answer.tokens) + 1).logits[0, :-1]
        chosen = logits.gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
        assert (logits.amax(1) - chosen).max() < ROUNDING
        checked += len(answer.tokens)
    assert checked > 700
    for prompt, answer in zip(prompts[:2], answers[:2], strict=True):
        theirs = stock_greedy(oracle, prompt, 16, model.engine.eos_ids)
        part = parting(oracle, prompt, answer.tokens, theirs)
        assert part is None or part.rounding
