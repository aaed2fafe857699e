"""Speed of an engine: tokens per second of several greedy streams at once, and how long a first token takes.

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
FIRST_PROMPT_TOKENS, FIRST_ROUNDS = 256, 5
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
    _check_room(engine, prompt_tokens, new_tokens)
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


def first_token(
    engine: Engine, *, prompt_tokens: int = FIRST_PROMPT_TOKENS, rounds: int = FIRST_ROUNDS
) -> float:
    """Seconds from a prompt to its first token, with nothing else to do: the median of the rounds.

    Raises TooShort when the engine does not take such a prompt.
    """
    _check_room(engine, prompt_tokens, 1)
    seconds = []
    for round_ in range(rounds + 1):
        _add(engine, round_, prompt_tokens, 1)
        started = time.perf_counter()
        while engine.has_work:
            if _tokens(engine):
                seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])  # the first one touches memory


def _check_room(engine: Engine, prompt_tokens: int, new_tokens: int) -> None:
    if prompt_tokens + new_tokens > engine.max_model_len:
        raise TooShort(
            f"speed takes prompts of {prompt_tokens} and answers of {new_tokens} tokens, this model has room "
            f"for {engine.max_model_len} together"
        )


def _add(engine: Engine, number: int, prompt_tokens: int, new_tokens: int) -> None:
    vocab = engine.runner.capacity.vocab
    # Any tokens do, as long as each stream has its own: 31 and 7919 walk through most vocabularies.
    prompt = [(number * 7919 + place * 31 + 5) % vocab for place in range(prompt_tokens)]
    greedy = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
    engine.add(Request(id=f"speed-{number}", prompt=prompt, params=greedy))


def _tokens(engine: Engine) -> list[int]:
    """What a step generated."""
    deltas = engine.step()
    failed = next((delta.error for delta in deltas if delta.error is not None), None)
    if failed is not None:
        raise RunFailed(f"the engine failed while its speed was measured: {failed}")
    return [token for delta in deltas for token in delta.tokens]


def _decode(engine: Engine, streams: int, prompt_tokens: int, new_tokens: int) -> float:
    """Tokens per second of one round."""
    for number in range(streams):
        _add(engine, number, prompt_tokens, new_tokens)
    before = engine.stats()
    started, counted = 0.0, 0
    while engine.has_work:
        _tokens(engine)
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
