"""How far a changed model says what it said before: its greedy continuations beside those of the original.

Greedy decoding is deterministic, so two models that compute the same give the same tokens, and the first
token that differs shows where the change was felt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from axicon.errors import RunFailed
from axicon.evaluate.speed import TooShort
from axicon.generate.engine import Engine
from axicon.generate.request import Request, SamplingParams

NEW_TOKENS = 64

PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "The three states of matter are",
    "Photosynthesis is the process by which",
    "The first person to walk on the Moon was",
    "In 1789, the people of Paris",
    "The largest planet of the solar system is",
    "A good breakfast for a child consists of",
    "Once upon a time, in a village by the sea, there lived",
    "She opened the letter with trembling hands and read:",
    "The old clockmaker looked up from his bench and said,",
    "It was raining when the train finally arrived, and",
    "Dear Sir or Madam,\nI am writing to",
    "Ingredients: flour, sugar, butter, eggs.\nStep 1:",
    "Question: What is 17 + 25?\nAnswer:",
    "If a train travels 60 miles in one hour, then in three hours it travels",
    "Monday, Tuesday, Wednesday,",
    "def fibonacci(n):\n",
    "import json\n\ndef read_config(path):\n",
    "SELECT name, age FROM users WHERE",
    "Translate to French.\nEnglish: Good morning.\nFrench:",
    "The most important advantage of a bicycle over a car is",
    "Many people are afraid of spiders because",
    "In my opinion, the best way to learn a new language is",
)  # fmt: skip
"""Beginnings of many kinds of text, written for this list. Another list makes figures that do not compare."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    prefix: float
    """Tokens before the first difference, as a share of all tokens of the original."""
    equal: float
    """Share of prompts whose whole continuations are equal."""


def agreement(original: Sequence[Sequence[int]], changed: Sequence[Sequence[int]]) -> Agreement:
    """Of the continuations of the same prompts by two models."""
    pairs = list(zip(original, changed, strict=True))
    kept = sum(_common(one, other) for one, other in pairs)
    equal = sum(list(one) == list(other) for one, other in pairs)
    return Agreement(prefix=kept / sum(map(len, original)), equal=equal / len(pairs))


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = zip(one, other, strict=False)  # the shorter one ended
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def prompts_sha256() -> str:
    return hashlib.sha256("\0".join(PROMPTS).encode()).hexdigest()


def continuations(engine: Engine, tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """(prompt, at most NEW_TOKENS greedy tokens, the end of the text among them) of each of PROMPTS.

    The engine is idle, and stepped in this thread; `tokenizer` is transformers' of the model. Raises TooShort
    when the engine does not take so many tokens.
    """
    asked = [list(tokenizer.encode(text)) for text in PROMPTS]
    longest = max(map(len, asked)) + NEW_TOKENS
    if longest > engine.max_model_len:
        raise TooShort(
            f"greedy continuations take {longest} tokens, this model has room for {engine.max_model_len}"
        )
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0)
    found: dict[str, list[int]] = {str(number): [] for number in range(len(asked))}
    waiting = [Request(id=str(number), prompt=prompt, params=params) for number, prompt in enumerate(asked)]
    while waiting or engine.has_work:
        while waiting and engine.stats().running + engine.stats().waiting < engine.most_requests:
            engine.add(waiting.pop(0))
        for delta in engine.step():
            if delta.error is not None:
                raise RunFailed(f"the engine failed while it continued the prompts: {delta.error}")
            found[delta.request_id].extend(delta.tokens)
    return [(prompt, found[str(number)]) for number, prompt in enumerate(asked)]
