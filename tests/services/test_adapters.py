"""Adapters join and leave a running server, over HTTP and with the engine."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch

from axicon.model import checkpoint
from axicon.model.adapters import Lora, adapted, peft_config, peft_tensors
from axicon.model.artefact import write_manifest
from axicon.model.tensorwriter import write_weights
from axicon.recipe import ServeRecipe
from services.generation import engine_thread
from tests.services.live import Live, serving
from tests.services.tiny import tiny_model

KEY, USER = "an-admin-key", "a-user-key"
ADMIN = {"Authorization": f"Bearer {KEY}"}


def sha(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def make(base: Path, target: Path, seed: int, *, parent: str | None = None, said: bool = True) -> Path:
    """An adapter as a finetuning leaves it, large enough to change every text."""
    scheme, model = Lora(r=4, targets=("q", "v", "down")), checkpoint.load(base, dtype=torch.float32)
    scheme.install(model, lambda *what: seed)
    generator = torch.Generator().manual_seed(seed)
    for _, _, product in adapted(model):
        for part in product.parts:
            product.pair(part)[1].data.normal_(0, 0.3, generator=generator)
    target.mkdir(parents=True)
    write_weights(target, sorted(peft_tensors(model).items()))
    (target / "model.safetensors").rename(target / "adapter_model.safetensors")
    (target / "adapter_config.json").write_text(json.dumps(peft_config(scheme, model, str(base))))
    if said:
        of = {"name": "base", "sha256": parent or checkpoint.digest(base), "source": str(base)}
        write_manifest(target, kind="adapter", parents=[of])
    return target


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    base = tiny_model(folder / "base")
    for i, name in enumerate(("one", "two")):
        make(base, folder / "loras" / name, i + 1)
    make(base, folder / "loras" / "foreign", 3, said=False)
    make(base, folder / "loras" / "elsewhere", 4, parent="0" * 64)
    make(base, folder / "outside", 5)
    return folder


def recipe(place: Path, **more: object) -> ServeRecipe:
    return ServeRecipe(
        model=str(place / "base"), compressor=None, dtype="float32", threads=1, kv_gib=0.02, max_rows=4,
        served_name="base", **more,  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.fixture
def live(place: Path) -> Iterator[Live]:
    with serving(with_adapters(place), engine_thread) as running:
        yield running
    for file in (place / "loras").glob(".served-*"):
        file.unlink()


@pytest.fixture(scope="module")
def shared(place: Path) -> Iterator[Live]:
    """One that nothing joins."""
    with serving(with_adapters(place), engine_thread) as running:
        yield running


def with_adapters(place: Path) -> ServeRecipe:
    return recipe(place, adapters={"folder": place / "loras", "most": 3}, admin_key_hashes=(sha(KEY),))


def load(live: Live, name: str, path: str) -> httpx.Response:
    return live.client.post(
        "/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path}, headers=ADMIN
    )


def unload(live: Live, name: str) -> httpx.Response:
    return live.client.post("/v1/unload_lora_adapter", json={"lora_name": name}, headers=ADMIN)


def ask(live: Live, model: str | None = None) -> dict[str, object]:
    named = {} if model is None else {"model": model}
    body = {"prompt": "Once", "max_tokens": 8, "temperature": 0, "ignore_eos": True, **named}
    answer = live.post("/v1/completions", **body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def text(answer: dict) -> str:
    return answer["choices"][0]["text"]


def test_adapters_join_are_chosen_and_leave(live: Live, place: Path) -> None:
    base = ask(live)
    joined = load(live, "tuned", "one").json()
    assert (joined["id"], joined["parent"], joined["root"], joined["rank"]) == ("tuned", "base", "one", 4)
    assert joined["base_verified"]
    assert load(live, "plain", "foreign").json()["base_verified"] is False
    assert [one["id"] for one in live.client.get("/v1/models").json()["data"]] == ["base", "plain", "tuned"]
    assert live.client.get("/v1/models/tuned").json()["sha256"] == joined["sha256"]
    found = live.client.get("/v1/capabilities").json()["adapters"]
    assert found == {"most": 3, "rank": 64, "loaded": ["plain", "tuned"]}
    tuned, plain = ask(live, "tuned"), ask(live, "plain")
    assert (tuned["model"], base["model"]) == ("tuned", "base")
    assert len({text(base), text(tuned), text(plain)}) == 3
    assert len({one["system_fingerprint"] for one in (base, tuned, plain)}) == 3
    assert text(ask(live, "base")) == text(base)
    itself = recipe(place).model_copy(update={"model": str(place / "loras" / "one")})
    with serving(itself, engine_thread) as alone:
        assert text(ask(alone)) == text(tuned)  # `axicon serve` of the adapter's own directory
    assert unload(live, "tuned").json() == {"id": "tuned", "object": "model", "deleted": True}
    gone = live.post("/v1/completions", prompt="Once", model="tuned")
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "model_not_found")
    assert unload(live, "tuned").status_code == 404


def test_a_merged_model_says_the_same(live: Live, place: Path) -> None:
    """In float32, where merging rounds nothing that greedy text of this model shows."""
    scheme = Lora(r=4, targets=("q", "v", "down"))
    load(live, "tuned", "one")
    from axicon.generate.engine import Engine
    from axicon.generate.request import Request, SamplingParams
    from axicon.generate.runner import LocalRunner
    from axicon.model import adapterfile

    model = checkpoint.load(place / "base", dtype=torch.float32)
    adapterfile.install(model, adapterfile.read_adapter(place / "loras" / "one", model.shape))
    scheme.merge(model)
    tokenizer = checkpoint.load_tokenizer(place / "base")
    engine = Engine(LocalRunner(model, kv_bytes=8 << 20), tokenizer, eos_ids=())
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    engine.add(Request(id="a", prompt=tokenizer.encode("Once"), params=params))
    said = ""
    while engine.has_work:
        said += "".join(delta.text for delta in engine.step())
    assert text(ask(live, "tuned")) == said


def test_a_replica_that_starts_again_serves_the_same(live: Live, place: Path) -> None:
    load(live, "tuned", "one")
    load(live, "other", "two")
    want = text(ask(live, "tuned"))
    with serving(with_adapters(place), engine_thread) as again:
        assert text(ask(again, "tuned")) == want
        unload(live, "other")  # by another replica
        assert again.post("/v1/completions", prompt="Once", model="other").status_code == 404
        config = place / "loras" / "two" / "adapter_config.json"
        load(live, "other", "two")
        before = config.read_text()
        try:
            config.write_text(before.replace('"lora_alpha": 16', '"lora_alpha": 17'))
            assert again.post("/v1/completions", prompt="Once", model="other").status_code == 404
        finally:
            config.write_text(before)


@pytest.mark.parametrize(
    ("name", "path", "why"),
    [
        ("base", "one", "not the model's own name"),
        ("a b", "one", "up to 128 letters"),
        ("x", "../outside", "no adapter there"),
        ("x", "/etc", "no adapter there"),
        ("x", "nothing", "no adapter there"),
        ("x", "a\0b", "no adapter there"),
        ("x", "elsewhere", "trained on a model with digest 000000000000"),
    ],
)
def test_what_cannot_join(shared: Live, name: str, path: str, why: str) -> None:
    refused = load(shared, name, path)
    assert refused.status_code == 400
    assert why in refused.json()["error"]["message"]
    assert [one["id"] for one in shared.client.get("/v1/models").json()["data"]] == ["base"]


def test_bad_files_and_too_many(live: Live, place: Path) -> None:
    for i in range(3):
        assert load(live, f"n{i}", "one").status_code == 200
    assert load(live, "n0", "one").status_code == 200  # the same again
    assert "unload it first" in load(live, "n0", "two").json()["error"]["message"]
    assert "the most here" in load(live, "n3", "one").json()["error"]["message"]
    bad = place / "loras" / "bad"
    shutil.copytree(place / "loras" / "foreign", bad)
    config = json.loads((bad / "adapter_config.json").read_text())
    for change, why in (
        ({"peft_type": "PREFIX_TUNING"}, "served are low-rank adapters"),
        ({"use_dora": True}, "use_dora is True"),
        ({"r": 65}, "r is 65"),
        ({"r": 3}, "adapter of another model"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
    ):
        (bad / "adapter_config.json").write_text(json.dumps(config | change))
        refused = load(live, "n4", "bad")
        assert refused.status_code == 400
        assert why in refused.json()["error"]["message"]
    shutil.rmtree(bad)


def test_only_an_admin_may(place: Path) -> None:
    body = {"lora_name": "a", "lora_path": "one"}
    with serving(recipe(place)) as shut:
        refused = shut.client.post("/v1/load_lora_adapter", json=body, headers=ADMIN)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "no_admin_keys")
        assert shut.client.post("/v1/load_lora_adapter", json=body).status_code == 401
    keyed = recipe(place, api_key_hashes=(sha(USER),), admin_key_hashes=(sha(KEY),))
    with serving(keyed) as running:
        user = {"Authorization": f"Bearer {USER}"}
        for headers, status in (({}, 401), (user, 403), ({"Authorization": "Bearer x"}, 401)):
            for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
                assert running.client.post(path, json=body, headers=headers).status_code == status
        assert running.client.get("/v1/models", headers=user).status_code == 200
        assert running.client.get("/v1/models", headers=ADMIN).status_code == 200
        assert running.client.get("/v1/models").status_code == 401
        # The key is good; there is no folder.
        refused = running.client.post("/v1/load_lora_adapter", json=body, headers=ADMIN)
        assert "without adapters.folder" in refused.json()["error"]["message"]
