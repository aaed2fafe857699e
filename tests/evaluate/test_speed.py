"""Rates of an engine whose clock is counted instead of read."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from axicon.errors import RunFailed
from axicon.evaluate import speed
from axicon.generate.build import build_engine
from axicon.generate.engine import Engine
from tests.evaluate.tiny import make_tokenizer, save_model


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    tokenizer: PreTrainedTokenizerFast = make_tokenizer()
    folder: Path = save_model(tmp_path_factory.mktemp("speed") / "tiny", tokenizer)
    return build_engine(str(folder), dtype="float32", threads=1, kv_gib=0.01, prefill_chunk=16)


def test_a_rate_counts_from_the_first_token_of_the_last_stream(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tick is a second, and the engine takes two in a step: n - 1 steps are timed for one stream."""
    ticks = itertools.count()
    monkeypatch.setattr("time.perf_counter", lambda: float(next(ticks)))
    one, three = speed.rates(engine, (1, 3), prompt_tokens=16, new_tokens=9, rounds=2)
    assert one.rounds[0] == one.rounds[1] == one.tokens_per_s
    assert one.tokens_per_s == pytest.approx(8 / (2 * 8 + 1))
    assert (one.streams, three.streams) == (1, 3)
    assert three.tokens_per_s > 2 * one.tokens_per_s
    assert not engine.has_work


def test_progress_counts_rounds(engine: Engine) -> None:
    told: list[tuple[int, int]] = []
    speed.rates(
        engine, (1, 2), prompt_tokens=4, new_tokens=3, rounds=2, progress=lambda d, t, _: told.append((d, t))
    )
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_what_does_not_fit_is_refused_before_anything_runs(engine: Engine) -> None:
    steps = engine.stats().steps_total
    with pytest.raises(
        speed.TooShort, match="prompts of 60 and answers of 8 tokens, this model has room for 64"
    ):
        speed.rates(engine, prompt_tokens=60, new_tokens=8)
    assert engine.stats().steps_total == steps


def test_an_engine_that_fails_is_no_rate(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(step: object) -> object:
        raise RuntimeError("broken")

    monkeypatch.setattr(engine.runner, "forward", fail)
    with pytest.raises(RunFailed, match="the engine failed while its speed was measured"):
        speed.rates(engine, (1,), prompt_tokens=4, new_tokens=3)
