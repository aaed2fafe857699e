"""Speculation over HTTP: the same text, counts in `usage`, figures by method, refusals with a sentence."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from axicon.errors import AxiconError
from axicon.generate.drafting import DRAFTERS
from axicon.recipe import ServeRecipe, SpeculationRecipe
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
    for kind in (SpeculationBody, SpeculationRecipe):
        assert sorted(get_args(kind.model_fields["method"].annotation)) == sorted(["none", *DRAFTERS])


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
        ({"method": "none", "depth": 100}, "speculation.depth", "at most 64 here"),
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


def test_a_deployment_guesses_for_requests_that_say_nothing(tmp_path: Path) -> None:
    recipe = ServeRecipe.parse(
        ["speculation=lookup", "dtype=float32", "threads=1", "kv_gib=0.05", "max_rows=4"],
        model=str(tiny_model(tmp_path / "tiny")),
    )
    greedy = {**BODY, "temperature": 0}
    with serving(recipe, engine_thread) as live:
        default = live.post("/v1/completions", **greedy).json()
        null = live.post("/v1/completions", **greedy, speculation=None).json()
        off = live.post("/v1/completions", **greedy, speculation={"method": "none"}).json()
    assert default["choices"] == null["choices"] == off["choices"]
    assert default["usage"]["completion_tokens_details"]["accepted_prediction_tokens"] > 0
    assert "completion_tokens_details" in null["usage"]
    assert "completion_tokens_details" not in off["usage"]


def test_a_default_that_cannot_be_ends_the_start() -> None:
    with pytest.raises(AxiconError, match=r"speculation: .*'rsd_s' guesses with a draft model"):
        engine_thread(ServeRecipe(speculation=SpeculationRecipe(method="rsd_s")))
