"""Decoder and engine behind lm-eval, against lm-eval's own `hf` model of the same directory."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from axicon.evaluate.harness import AxiconLM
from axicon.recipe import EvaluateRecipe
from jobs.evaluate import Subject


@pytest.fixture
def ours(model_dir: Path) -> AxiconLM:
    subject = Subject(EvaluateRecipe(model=str(model_dir), threads=1, dtype="float32"))
    subject.prepare()
    shape = subject.decoder.shape
    return AxiconLM(
        subject.decoder, subject.tokenizer, max_length=shape.max_positions, make_engine=subject.make_engine
    )


@pytest.fixture
def theirs(model_dir: Path) -> HFLM:
    return HFLM(pretrained=str(model_dir), dtype="float32", device="cpu", batch_size=1)


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]  # type: ignore[arg-type]


def pieces(prose: str, count: int) -> list[tuple[str, str]]:
    rng = random.Random(2)
    words = prose.split(" ")
    cuts = [(rng.randrange(len(words) - 9), rng.randint(1, 7)) for _ in range(count)]
    return [(" ".join(words[a : a + n]), " " + " ".join(words[a + n : a + 9])) for a, n in cuts]


def test_scores(ours: AxiconLM, theirs: HFLM, prose: str) -> None:
    asked = pieces(prose, 25)
    # One by one: together, lm-eval 0.4.13 scores one text cut at two places with the wrong rows.
    expected = [
        theirs.loglikelihood(instances("loglikelihood", [one]), disable_tqdm=True)[0] for one in asked
    ]
    got = ours.loglikelihood(instances("loglikelihood", asked))
    torch.testing.assert_close(
        torch.tensor([score for score, _ in got]),
        torch.tensor([score for score, _ in expected]),
        atol=1e-4,
        rtol=0,
    )
    assert [greedy for _, greedy in got] == [greedy for _, greedy in expected]


def test_whole_texts(ours: AxiconLM, theirs: HFLM, prose: str) -> None:
    asked = [(prose,), (prose[:90],)]
    expected = theirs.loglikelihood_rolling(instances("loglikelihood_rolling", asked), disable_tqdm=True)
    assert ours.loglikelihood_rolling(instances("loglikelihood_rolling", asked)) == pytest.approx(
        expected, abs=1e-3
    )


def test_generation(ours: AxiconLM, theirs: HFLM, prose: str) -> None:
    contexts = [context for context, _ in pieces(prose, 8)] + [prose]
    for until in ([], ["e"], ["the", "\n", "a"]):
        kwargs = {"until": until, "max_gen_toks": 12, "do_sample": False}
        asked = [(context, dict(kwargs)) for context in contexts]
        expected = theirs.generate_until(instances("generate_until", asked), disable_tqdm=True)
        got = ours.generate_until(instances("generate_until", asked))
        assert got == expected
    assert any(expected)
