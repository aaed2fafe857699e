"""`GET /v1/capabilities` says what is true of the deployment; details of a request are what they say."""

from __future__ import annotations

from collections.abc import Iterator

import jsonschema
import pytest

from axicon.generate.drafting import DRAFTERS
from axicon.generate.eviction import KV_POLICIES
from axicon.recipe import KVRecipe, ServeRecipe
from services.generation import engine_thread
from tests.services.live import Live, serving
from tests.services.test_completions import events
from tests.services.tiny import tiny_model

PROMPT = "What the model reads is here. " * 9
BODY = {"prompt": PROMPT, "temperature": 0, "max_tokens": 30, "ignore_eos": True}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    kv = KVRecipe(policy="window", budget=0.5)
    recipe = ServeRecipe(
        model=str(folder), dtype="float32", threads=1, kv_gib=0.05, max_rows=4, kv=kv, kv_floor=12,
        draft="skip:1",
    )  # fmt: skip
    with serving(recipe, engine_thread) as running:
        yield running


def test_capabilities_are_those_of_the_tables_and_the_recipe(live: Live) -> None:
    found = live.client.get("/v1/capabilities").json()
    schema = live.client.get("/openapi.json").json()["components"]["schemas"]
    jsonschema.validate(found, schema["Capabilities"])
    assert (found["model"], found["max_model_len"]) == ("tiny", 512)
    assert [one["name"] for one in found["kv"]["policies"]] == ["full", *KV_POLICIES]
    scores = {one["name"]: tuple(one["scores"]) for one in found["kv"]["policies"]}
    assert scores == {"full": (), **{name: cls.variants for name, cls in KV_POLICIES.items()}}
    score = found["kv"]["fields"]["score"]
    assert score["anyOf"][0]["enum"] == [name for names in scores.values() for name in names]
    assert [name for name in scores if name in score["description"]] == [n for n in scores if scores[n]]
    assert found["kv"]["default"]["policy"] == "window"
    assert found["kv"]["floor"] == 12
    assert found["kv"]["fields"]["budget"]["anyOf"][1]["minimum"] == 12
    assert [one["name"] for one in found["speculation"]["methods"]] == list(DRAFTERS)
    assert found["speculation"]["default"]["method"] == "none"
    assert found["sampling"]["n"]["anyOf"][0]["maximum"] == found["limits"]["n"]
    assert found["sampling"] == {
        name: schema["CompletionBody"]["properties"][name] for name in found["sampling"]
    }


def test_what_is_refused_is_refused_with_that_sentence(live: Live) -> None:
    found = live.client.get("/v1/capabilities").json()["refused"]
    assert len(found) == len(KV_POLICIES), "each with the prompt's log-probabilities, and nothing else"
    for one in found:
        answer = live.post("/v1/completions", **BODY, **one["fields"])
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == one["param"]
        assert one["message"] in answer.json()["error"]["message"]


def test_without_a_draft_model_its_methods_are_refused() -> None:
    with serving() as live:
        found = live.client.get("/v1/capabilities").json()
        assert [one["name"] for one in found["speculation"]["methods"]] == ["lookup"]
        assert found["speculation"]["draft_model"] is False
        refused = {one["fields"]["speculation"]["method"] for one in found["refused"]}
        assert refused == {name for name, cls in DRAFTERS.items() if cls.needs_model}
        for one in found["refused"]:
            answer = live.post("/v1/completions", prompt="a", **one["fields"])
            assert one["message"] in answer.json()["error"]["message"]


def test_capabilities_need_the_key_that_models_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AXICON_TEST_KEYS", "sk-one")
    with serving(ServeRecipe(api_keys_env="AXICON_TEST_KEYS")) as live:
        assert live.client.get("/v1/capabilities").status_code == 401
        answer = live.client.get("/v1/capabilities", headers={"Authorization": "Bearer sk-one"})
        assert answer.status_code == 200


@pytest.mark.parametrize("method", ["lookup", "rsd_s"])
def test_details_tell_where_tokens_come_from_and_what_is_kept(live: Live, method: str) -> None:
    kv = {"policy": "h2o", "budget": 0.2, "evict_every": 8}
    plain = live.post("/v1/completions", **BODY, kv=kv, speculation={"method": method}).json()
    assert "details" not in plain["choices"][0]
    asked = {**BODY, "kv": kv, "speculation": {"method": method}, "details": True}
    whole = live.post("/v1/completions", **asked).json()
    details = whole["choices"][0].pop("details")
    assert whole["choices"] == plain["choices"]
    assert "".join(one["text"] for one in details["tokens"]) == whole["choices"][0]["text"]
    assert len(details["tokens"]) == 30
    assert {one["origin"] for one in details["tokens"]} <= {"draft", "target"}
    drafted = sum(one["origin"] == "draft" for one in details["tokens"])
    assert drafted == whole["usage"]["completion_tokens_details"]["accepted_prediction_tokens"]
    assert details["kept"]["positions"] > 270
    assert [len(layer) for layer in details["kept"]["layers"]] == [-(-details["kept"]["positions"] // 2)] * 2

    parts = events(live.post("/v1/completions", **asked, stream=True))
    told = [part["choices"][0]["details"] for part in parts]
    assert [one for part in told for one in part["tokens"]] == details["tokens"]
    pictures = [part["kept"] for part in told if part["kept"] is not None]
    assert len(pictures) >= 4, "behind the prompt, at multiples of eight, at the end"
    assert pictures[0]["positions"] == len(PROMPT)
    assert pictures[-1] == details["kept"]


def test_a_full_cache_is_not_shown(live: Live) -> None:
    asked = {**BODY, "kv": {"policy": "full"}, "details": True}
    details = live.post("/v1/completions", **asked).json()["choices"][0]["details"]
    assert details["kept"] is None
    assert {one["origin"] for one in details["tokens"]} == {"target"}
