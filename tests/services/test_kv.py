"""Cache policies over HTTP: a field of the request, a default of the deployment, figures, refusals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

import pytest

from axicon.errors import AxiconError
from axicon.generate.eviction import KV_POLICIES
from axicon.generate.request import EngineStats
from axicon.recipe import KVRecipe, ServeRecipe
from services.generation import engine_thread
from services.metrics import Metrics
from services.schema import KVBody
from tests.services.live import Live, serving
from tests.services.tiny import tiny_model

BODY = {"prompt": "What the model reads is here, and it is longer than a budget.", "temperature": 0}
MORE = {"max_tokens": 40, "ignore_eos": True}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    kv = KVRecipe(policy="window", budget=20)
    recipe = ServeRecipe(
        model=str(folder), dtype="float32", threads=1, kv_gib=0.05, max_rows=4, kv=kv, kv_floor=12
    )
    with serving(recipe, engine_thread) as running:
        yield running


def test_schema_and_recipe_name_the_policies_that_there_are() -> None:
    known = sorted(["full", *KV_POLICIES])
    for kind in (KVBody, KVRecipe):
        assert sorted(get_args(kind.model_fields["policy"].annotation)) == known


def test_a_request_has_its_own_policy_and_the_deployment_a_default(live: Live) -> None:
    def evicted(policy: str) -> float:
        line = f'axicon:kv_evicted_total{{model_name="tiny",policy="{policy}"}} '
        found = [one for one in live.client.get("/metrics").text.splitlines() if one.startswith(line)]
        return float(found[0].removeprefix(line)) if found else 0.0

    asked = {"kv": {"policy": "h2o", "budget": 0.3, "score": "decay"}}
    assert live.post("/v1/completions", **BODY, **MORE, **asked).status_code == 200
    answers = {}
    for policy in ("full", "h2o", None):
        asked = {} if policy is None else {"kv": {"policy": policy, "budget": 0.3}}
        answers[policy] = live.post("/v1/completions", **BODY, **MORE, **asked).json()
    assert len({answer["choices"][0]["text"] for answer in answers.values()}) == 3
    assert len({answer["system_fingerprint"] for answer in answers.values()}) == 1
    assert evicted("h2o") >= 40
    assert evicted("window") >= 40
    assert evicted("full") == 0
    assert 'axicon:kv_bytes{model_name="tiny",policy="full"} 0.0' in live.client.get("/metrics").text
    again = live.post("/v1/completions", **BODY, **MORE, kv={"policy": "window", "budget": 20}).json()
    assert again["choices"] == answers[None]["choices"]
    chat = {"messages": [{"role": "user", "content": BODY["prompt"]}], "temperature": 0, "max_tokens": 30}
    texts = {live.post("/v1/chat/completions", **chat, kv={"policy": p}).text for p in ("full", "tova")}
    assert len(texts) == 2


def test_figures_of_the_cache_are_by_policy() -> None:
    stats = EngineStats(
        kv_bytes={"full": 4096, "h2o": 512}, kv_slots={"full": 64, "h2o": 32}, kv_evicted_total={"h2o": 7}
    )
    told = Metrics("m", lambda: stats).render().decode()
    for name, policy, value in (
        ("bytes", "full", 4096), ("bytes", "h2o", 512), ("slots", "full", 64), ("slots", "h2o", 32),
        ("evicted_total", "h2o", 7),
    ):  # fmt: skip
        assert f'axicon:kv_{name}{{model_name="m",policy="{policy}"}} {float(value)}\n' in told


def test_a_scored_prompt_keeps_everything_unless_asked(live: Live) -> None:
    scored = {**BODY, "echo": True, "logprobs": 1, "max_tokens": 1}
    assert len(live.post("/v1/completions", **scored).json()["choices"][0]["logprobs"]["tokens"]) > 30
    answer = live.post("/v1/completions", **scored, kv={"policy": "h2o", "budget": 0.3})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "kv.policy")


@pytest.mark.parametrize(
    ("kv", "param", "sentence"),
    [
        ({}, "kv.policy", "required"),
        ({"policy": "lru"}, "kv.policy", "'h2o'"),
        ({"policy": "h2o", "budget": 0}, "kv.budget", "greater than 0"),
        ({"policy": "h2o", "budget": 11}, "kv.budget", "keeps at least 12"),
        ({"policy": "h2o", "budget": 20, "recent": 19}, "kv.budget", "too few for 19 recent ones"),
        ({"policy": "h2o", "evict_every": 0}, "kv.evict_every", "greater than or equal to 1"),
        ({"policy": "h2o", "size": 3}, "kv.size", "unknown field"),
        ({"policy": "h2o", "score": "max"}, "kv.score", "'decay'"),
        ({"policy": "tova", "score": "sum"}, "kv.score", "it has but one"),
        ("h2o", "kv", "object"),
    ],
)
def test_what_cannot_be_kept_is_a_400(live: Live, kv: object, param: str, sentence: str) -> None:
    answer = live.post("/v1/completions", **BODY, max_tokens=5, kv=kv)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert sentence in answer.json()["error"]["message"]


def test_a_default_that_cannot_be_kept_ends_the_start() -> None:
    recipe = ServeRecipe(kv=KVRecipe(policy="h2o", budget=20), kv_floor=32)
    with pytest.raises(AxiconError, match="kv budget is 20 slots, this deployment keeps at least 32"):
        engine_thread(recipe)
