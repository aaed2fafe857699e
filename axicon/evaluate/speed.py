"""Tokens per second of an engine: greedy decoding of several streams at once.

A rate counts the tokens of all streams from the moment when every stream has its first one, so neither the
prompts nor the first step's memory are in it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from axicon.errors import AxiconError, RunFailed
from axicon.generate.engine import Engine
from axicon.generate.request import Request, SamplingParams

STREAMS = (1, 8)
PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 64, 128, 3
WARM_TOKENS = 8


class TooShort(AxiconError):
    """The model has no room for the prompt and the answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    streams: int
    tokens_per_s: float
    """Median of the rounds, over all streams."""
    rounds: tuple[float, ...]


def rates(
    engine: Engine,
    streams: Sequence[int] = STREAMS,
    *,
    prompt_tokens: int = PROMPT_TOKENS,
    new_tokens: int = NEW_TOKENS,
    rounds: int = ROUNDS,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[Rate]:
    """A rate for each number of streams. Call it in the thread that made the engine, which must be idle.

    Raises TooShort when the engine does not take so many tokens.
    """
    if prompt_tokens + new_tokens > engine.max_model_len:
        raise TooShort(
            f"speed takes prompts of {prompt_tokens} and answers of {new_tokens} tokens, this model has room "
            f"for {engine.max_model_len} together"
        )
    found: list[Rate] = []
    for count in streams:
        _decode(engine, count, prompt_tokens, WARM_TOKENS)  # first touches of memory
        seconds = []
        for done in range(rounds):
            seconds.append(_decode(engine, count, prompt_tokens, new_tokens))
            if progress is not None:
                progress(len(found) * rounds + done + 1, len(streams) * rounds, f"{seconds[-1]:.0f} tokens/s")
        found.append(Rate(streams=count, tokens_per_s=statistics.median(seconds), rounds=tuple(seconds)))
    return found


def _decode(engine: Engine, streams: int, prompt_tokens: int, new_tokens: int) -> float:
    """Tokens per second of one round."""
    vocab = engine.runner.capacity.vocab
    greedy = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
    for number in range(streams):
        # Any tokens do, as long as each stream has its own: 31 and 7919 walk through most vocabularies.
        prompt = [(number * 7919 + place * 31 + 5) % vocab for place in range(prompt_tokens)]
        engine.add(Request(id=f"speed-{number}", prompt=prompt, params=greedy))
    before = engine.stats()
    started, counted = 0.0, 0
    while engine.has_work:
        failed = next((delta.error for delta in engine.step() if delta.error is not None), None)
        if failed is not None:
            raise RunFailed(f"the engine failed while its speed was measured: {failed}")
        now = engine.stats()
        generated = now.generated_tokens_total - before.generated_tokens_total
        prompted = now.prompt_tokens_total - before.prompt_tokens_total
        if not started and prompted == streams * prompt_tokens:
            started, counted = time.perf_counter(), generated
        if generated < streams * new_tokens:
            continue
        ended = time.perf_counter()
        while engine.has_work:  # the step that gives the cache back
            engine.step()
    return (streams * new_tokens - counted) / (ended - started)
