"""`axicon finetune rule.method=zo2`: the run in memory, by other means."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from axicon.errors import AxiconError
from axicon.model import checkpoint
from axicon.recipe import CompressRecipe
from jobs import compress, finetune, replay
from jobs.finetune_recipe import FinetuneRecipe, ReplayRecipe
from tests.services.tiny import tiny_model


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("offload")
    tiny_model(folder / "model", positions=128)
    records = [{"text": f"number {i} is {'odd' if i % 2 else 'even'}", "label": i % 2} for i in range(20)]
    (folder / "data.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    return folder


def recipe(place: Path, method: str, **changes: Any) -> FinetuneRecipe:
    values: dict[str, Any] = {
        "model": str(place / "model"),
        "data": {
            "train": str(place / "data.jsonl"), "evaluate": str(place / "data.jsonl"),
            "template": "{{ text }}:", "verbalizer": {"0": " no", "1": "yes"}, "evaluate_limit": 4,
        },
        "rule": {"method": method, "lr": 1e-3, "eps": 1e-2, "weight_decay": 0.1},
        "scheme": {"method": "full"}, "steps": 4, "batch": 4, "shards": 2, "evaluate_every": 2,
        "threads": 1, "keep": "last",
    }  # fmt: skip
    return FinetuneRecipe.parse(**(values | changes))


def test_log_evaluations_and_result_are_those_in_memory(place: Path, tmp_path: Path) -> None:
    memory = finetune.run(recipe(place, "zo_sgd", out=tmp_path / "memory"))
    ring = finetune.run(recipe(place, "zo2", out=tmp_path / "ring"))
    assert (tmp_path / "ring/log.jsonl").read_bytes() == (tmp_path / "memory/log.jsonl").read_bytes()
    for name in ("digest", "evaluations", "parameters"):
        assert ring.details[name] == memory.details[name]
    ours, theirs = (checkpoint.load(r.files[0], dtype=torch.float32).state_dict() for r in (ring, memory))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    found = replay.run(tmp_path / "ring", ReplayRecipe.parse(["step=4"]))
    assert found.digest == memory.details["digest"]


def test_either_goes_on_where_the_other_stopped(place: Path, tmp_path: Path) -> None:
    whole = finetune.run(recipe(place, "zo_sgd", out=tmp_path / "whole"))
    finetune.run(recipe(place, "zo2", out=tmp_path / "part", steps=2))
    finetune.run(recipe(place, "zo_sgd", out=tmp_path / "part", steps=3))
    ended = finetune.run(recipe(place, "zo2", out=tmp_path / "part"))
    assert ended.details["digest"] == whole.details["digest"]


def test_adapters_are_what_is_left_of_a_base_that_is_elsewhere(place: Path, tmp_path: Path) -> None:
    scheme = {"method": "lora", "r": 2}
    memory = finetune.run(recipe(place, "zo_sgd", out=tmp_path / "memory", scheme=scheme, output="adapter"))
    ring = finetune.run(recipe(place, "zo2", out=tmp_path / "ring", scheme=scheme))
    assert ring.details["digest"] == memory.details["digest"]
    one, two = (r.files[0] / "adapter_model.safetensors" for r in (ring, memory))
    assert one.read_bytes() == two.read_bytes()
    with pytest.raises(AxiconError, match="take output=adapter"):
        finetune.run(recipe(place, "zo2", out=tmp_path / "ring", scheme=scheme, output="merged"))


def test_a_base_is_compressed_before(place: Path, tmp_path: Path) -> None:
    asked = recipe(place, "zo2", out=tmp_path / "run", compressor="llm_int8", scheme={"method": "lora"})
    with pytest.raises(AxiconError, match=r"axicon compress llm_int8 model=.* out=DIR, then model=DIR"):
        finetune.run(asked)


def test_a_pruned_base_stays_in_memory(place: Path, tmp_path: Path) -> None:
    pruned = tmp_path / "pruned"
    compress.run(
        CompressRecipe.parse(
            model=str(place / "model"), compressor={"method": "magnitude"}, out=str(pruned), measure=False
        )
    )
    with pytest.raises(AxiconError, match=r"zo2 does not keep what is pruned .* take rule.method=zo_sgd"):
        finetune.run(recipe(place, "zo2", model=str(pruned), out=tmp_path / "run"))
