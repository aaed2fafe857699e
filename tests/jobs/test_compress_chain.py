"""`axicon compress` with several methods: one walk, one directory, going on after an end."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import LlamaForCausalLM

from axicon.errors import AxiconError
from axicon.model import checkpoint
from axicon.recipe import CompressRecipe
from jobs import compress
from jobs.progress import Reporter
from tests.jobs.compressing import dense_model

pytestmark = pytest.mark.usefixtures("own_cache")

CHAIN = [{"method": "wanda", "sparsity": 0.5}, {"method": "gptq", "group": 32}]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dense_model(tmp_path_factory.mktemp("models") / "tiny")


def run(dense: Path, out: Path, **settings: Any) -> str:
    said = io.StringIO()
    recipe = CompressRecipe.model_validate({
        "model": str(dense), "out": out, "threads": 1, "measure": False,
        "calibration": {"windows": 4, "window": 32}, **settings})  # fmt: skip
    compress.run(recipe, Reporter(said))
    return said.getvalue()


def test_one_directory_with_all_methods_in_its_manifest(dense: Path, tmp_path: Path) -> None:
    said = run(dense, tmp_path / "small", chain=CHAIN)
    assert "tiny by wanda, then gptq takes about " in said
    assert checkpoint.packed_formats(tmp_path / "small") == ("group_int",)
    manifest = json.loads((tmp_path / "small" / "manifest.json").read_text())
    assert [link["method"] for link in manifest["chain"]] == ["wanda", "gptq"]
    assert [one["method"] for one in manifest["recipe"]["chain"]] == ["wanda", "gptq"]
    assert manifest["recipe"]["compressor"] is None
    weight = checkpoint.load(tmp_path / "small").blocks[2].down.unpack()
    assert (weight == 0).sum(1).min() >= 80
    assert "is there already" in run(dense, tmp_path / "small", chain=CHAIN)


def test_what_was_stopped_goes_on_to_the_same_bytes(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(dense, tmp_path / "whole", chain=CHAIN)
    with monkeypatch.context() as patch:
        write = compress.compress_blocks

        def stopped(*args: Any, progress: Any, **settings: Any) -> None:
            def told(done: int, total: int, note: str) -> None:
                if done == 2:
                    raise KeyboardInterrupt

            write(*args, progress=told, **settings)

        patch.setattr(compress, "compress_blocks", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(dense, tmp_path / "again", chain=CHAIN)
    assert "going on after 2 finished blocks" in run(dense, tmp_path / "again", chain=CHAIN)
    assert checkpoint.digest(tmp_path / "again") == checkpoint.digest(tmp_path / "whole")


def test_steps_one_after_the_other_keep_masks_on_disk(dense: Path, tmp_path: Path) -> None:
    run(dense, tmp_path / "pruned", compressor=CHAIN[0])
    with pytest.raises(AxiconError, match="is pruned already"):
        run(dense=tmp_path / "pruned", out=tmp_path / "twice", compressor=CHAIN[0])
    run(dense=tmp_path / "pruned", out=tmp_path / "small", compressor=CHAIN[1])
    weight = checkpoint.load(tmp_path / "pruned").blocks[1].out.weight
    packed = checkpoint.load(tmp_path / "small").blocks[1].out.unpack()
    assert not packed[weight == 0].any()
    manifest = json.loads((tmp_path / "small" / "manifest.json").read_text())
    assert [link["method"] for link in manifest["chain"]] == ["wanda", "gptq"]


def test_a_pruned_directory_is_a_dense_model_to_other_programs(dense: Path, tmp_path: Path) -> None:
    run(dense, tmp_path / "pruned", compressor=CHAIN[0])
    tokens = torch.arange(2, 40)[None]
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "pruned", dtype=torch.float32)
    ours = checkpoint.load(tmp_path / "pruned", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)


def test_a_resolved_recipe_is_a_recipe() -> None:
    recipe = CompressRecipe.parse(["chain=wanda,gptq"])
    again = CompressRecipe.parse((), **yaml.safe_load(recipe.as_yaml()))
    assert compress.build(again) == compress.build(recipe)
    assert compress.method_names(again) == ("wanda", "gptq")


def test_what_cannot_be_is_refused_before_anything_is_written(dense: Path, tmp_path: Path) -> None:
    for settings, says in (
        ({"chain": CHAIN[::-1]}, "the order is wanda, gptq"),
        ({"chain": CHAIN, "compressor": "gptq"}, "compressor and chain: give one"),
        ({"chain": ["wanda", "nothing"]}, "chain.1=nothing: known are"),
    ):
        with pytest.raises(AxiconError, match=says):
            run(dense, tmp_path / "out", **settings)
    assert not list(tmp_path.glob("*out*"))
