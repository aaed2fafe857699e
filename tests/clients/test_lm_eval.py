"""lm-eval's unmodified `local-completions` over HTTP: the figures of its `hf` model of the same directory."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalCompletionsAPI

from axicon.recipe import ServeRecipe
from services.generation import engine_thread
from tests.evaluate.tiny import PROSE, make_tokenizer, save_model
from tests.services.live import Live, serving

POSITIONS = 128


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny", make_tokenizer(), POSITIONS)


@pytest.fixture(scope="module")
def live(model_dir: Path) -> Iterator[Live]:
    """The real engine, in float32."""
    recipe = ServeRecipe(model=str(model_dir), dtype="float32", threads=1, kv_gib=0.05, max_rows=8)
    with serving(recipe, engine_thread) as running:
        yield running


@pytest.fixture(scope="module")
def local(model_dir: Path) -> HFLM:
    return HFLM(pretrained=str(model_dir), dtype="float32", device="cpu", batch_size=1)


def remote(live: Live, model_dir: Path, **settings: Any) -> LocalCompletionsAPI:
    defaults = {"tokenizer_backend": "huggingface", "tokenizer": str(model_dir), "max_length": POSITIONS}
    return LocalCompletionsAPI(
        model="tiny", base_url=f"{live.url}/v1/completions", max_retries=1, **{**defaults, **settings}
    )


@pytest.fixture(
    params=[
        {"batch_size": 1},
        {"batch_size": 4},
        {"num_concurrent": 6},
        {"num_concurrent": 2, "batch_size": 3},
    ],
    ids=["one by one", "batches", "at once", "batches at once"],
)
def client(request: pytest.FixtureRequest, live: Live, model_dir: Path) -> LocalCompletionsAPI:
    return remote(live, model_dir, **request.param)


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]  # type: ignore[arg-type]


def pairs(count: int) -> list[tuple[str, str]]:
    rng = random.Random(8)
    words = PROSE.split(" ")
    cuts = [(rng.randrange(len(words) - 9), rng.randint(1, 4), rng.randint(5, 9)) for _ in range(count)]
    return [(" ".join(words[a : a + n]), " " + " ".join(words[a + n : a + m])) for a, n, m in cuts]


def same_scores(got: list[tuple[float, bool]], expected: list[tuple[float, bool]]) -> None:
    assert [score for score, _ in got] == pytest.approx([score for score, _ in expected], abs=1e-3)
    assert [greedy for _, greedy in got] == [greedy for _, greedy in expected]


def test_scores(client: LocalCompletionsAPI, local: HFLM) -> None:
    asked = [*pairs(20), ("", "The lamp"), ("Tom? ", "yes")]
    expected = [local.loglikelihood(instances("loglikelihood", [one]), disable_tqdm=True)[0] for one in asked]
    same_scores(client.loglikelihood(instances("loglikelihood", asked)), expected)


def test_a_greedy_continuation_is_recognised(client: LocalCompletionsAPI, local: HFLM) -> None:
    context = [5, 17, 301]
    asked = [(("", ""), context, [token]) for token in range(2, 40)]
    best = local._model_call(torch.tensor([context]))[0, -1].argmax().item()
    asked.append((("", ""), context, [best]))
    assert [greedy for _, greedy in client._loglikelihood_tokens(asked)] == [
        token == best for _, _, (token,) in asked
    ]


def test_whole_texts(client: LocalCompletionsAPI, local: HFLM) -> None:
    asked = [(PROSE[:120],), (PROSE[40:70],)]
    expected = local.loglikelihood_rolling(instances("loglikelihood_rolling", asked), disable_tqdm=True)
    got = client.loglikelihood_rolling(instances("loglikelihood_rolling", asked))
    assert got == pytest.approx(expected, abs=1e-3)


def test_generation(client: LocalCompletionsAPI, local: HFLM) -> None:
    kwargs = {"until": ["the", "\n"], "max_gen_toks": 12, "do_sample": False}
    asked = [(context, dict(kwargs)) for context, _ in pairs(10)]
    expected = local.generate_until(instances("generate_until", asked), disable_tqdm=True)
    assert client.generate_until(instances("generate_until", asked)) == expected
    assert any(expected)


def test_the_tokenizer_of_the_server_serves_as_well(live: Live, model_dir: Path, local: HFLM) -> None:
    client = remote(live, model_dir, tokenizer_backend="auto", tokenizer=None)
    assert client.tokenizer_backend == "remote"
    asked = pairs(5)
    expected = [local.loglikelihood(instances("loglikelihood", [one]), disable_tqdm=True)[0] for one in asked]
    same_scores(client.loglikelihood(instances("loglikelihood", asked)), expected)
    client.tokenizer.session.close()


def test_texts_instead_of_token_ids(live: Live, model_dir: Path, local: HFLM) -> None:
    client = remote(live, model_dir, tokenized_requests=False)
    asked = pairs(5)
    expected = [local.loglikelihood(instances("loglikelihood", [one]), disable_tqdm=True)[0] for one in asked]
    same_scores(client.loglikelihood(instances("loglikelihood", asked)), expected)
