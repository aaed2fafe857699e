"""Speculation over HTTP: the same text, counts in `usage`, figures by method, refusals with a sentence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

import pytest

from axicon.generate.drafting import DRAFTERS
from axicon.recipe import ServeRecipe
from services.generation import engine_thread
from services.schema import SpeculationBody
from tests.services.live import Live, serving
from tests.services.test_completions import events
from tests.services.tiny import tiny_model

BODY = {
    "prompt": "abcabcabcabcabcabc", "max_tokens": 60, "ignore_eos": True,
    "logit_bias": {"97": 30, "98": 31, "99": 30},
}  # fmt: skip


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    recipe = ServeRecipe(model=str(folder), dtype="float32", threads=1, kv_gib=0.05, max_rows=4)
    with serving(recipe, engine_thread) as running:
        yield running


def test_the_schema_names_the_methods_that_there_are() -> None:
    assert sorted(get_args(SpeculationBody.model_fields["method"].annotation)) == sorted(DRAFTERS)


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"seed": 5, "temperature": 0.8}])
def test_text_is_the_same_and_usage_says_what_was_guessed(live: Live, sampling: dict[str, float]) -> None:
    plain = live.post("/v1/completions", **BODY, **sampling).json()
    asked = {**BODY, **sampling, "speculation": {"method": "lookup"}}
    guessed = live.post("/v1/completions", **asked).json()
    assert guessed["choices"] == plain["choices"]
    assert "completion_tokens_details" not in plain["usage"]
    details = guessed["usage"].pop("completion_tokens_details")
    assert guessed["usage"] == plain["usage"]
    assert set(details) == {"accepted_prediction_tokens", "rejected_prediction_tokens"}
    assert details["accepted_prediction_tokens"] > 0
    parts = events(live.post("/v1/completions", **asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(p["choices"][0]["text"] for p in parts if p["choices"]) == plain["choices"][0]["text"]
    assert parts[-1]["usage"]["completion_tokens_details"]["accepted_prediction_tokens"] > 0
    figures = live.client.get("/metrics").text
    assert 'axicon:draft_tokens_total{depth="1",method="lookup",model_name="tiny"}' in figures
    assert 'axicon:draft_accepted_total{depth="1",method="lookup",model_name="tiny"}' in figures
    assert 'axicon:speculation_gain{method="lookup",model_name="tiny"}' in figures


def test_without_a_seed_guesses_are_verified_by_rejection(live: Live) -> None:
    answer = live.post("/v1/completions", **BODY, temperature=0.9, speculation={"method": "lookup"}).json()
    assert answer["usage"]["completion_tokens"] == 60


@pytest.mark.parametrize(
    ("speculation", "param", "sentence"),
    [
        ({"method": "oracle"}, "speculation.method", "'chain', 'k_seq'"),
        ({"method": "lookup", "depth": 0}, "speculation.depth", "greater than or equal to 1"),
        ({"method": "lookup", "depth": 100}, "speculation", "depth is 100, it must lie between 1 and"),
        ({"method": "lookup", "verify": "hope"}, "speculation.verify", "'rrs' or 'coupled'"),
        ({"method": "lookup", "speed": 2}, "speculation.speed", "unknown field"),
        ({"width": 3}, "speculation.method", "required"),
        ({"method": "rsd_s"}, "speculation", "this deployment has none"),
    ],
)
def test_what_cannot_be_done_is_a_400_with_a_sentence(
    live: Live, speculation: dict[str, object], param: str, sentence: str
) -> None:
    answer = live.post("/v1/completions", **BODY, speculation=speculation)
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert error["param"] == param
    assert sentence in error["message"]
