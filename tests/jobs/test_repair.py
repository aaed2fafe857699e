"""A model that is pruned, repaired, and rounded or packed: three commands, or a chain, from directory to
directory."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from axicon.errors import AxiconError
from axicon.model import checkpoint
from axicon.model.decoder import Decoder
from axicon.model.masks import kept
from axicon.recipe import CompressRecipe
from jobs import compress, finetune
from jobs.finetune_recipe import FinetuneRecipe
from jobs.lineage import run as lineage
from jobs.progress import Reporter
from tests.services.tiny import tiny_model

pytestmark = pytest.mark.usefixtures("own_cache")

TEXT = "The quick brown fox jumps over the lazy dog. " * 40
QUICK = {"method": "reconstruct", "r": 2, "passes": 1}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repair")
    tiny_model(folder / "model", positions=128)
    (folder / "text.txt").write_text(TEXT)
    return folder


def pack(model: Path, out: Path, **settings: Any) -> Path:
    text = out.with_suffix(".txt")
    text.write_text(TEXT)
    sample = {"text": str(text), "windows": 4, "window": 32}
    values = {"model": str(model), "out": out, "threads": 1, "measure": False, "calibration": sample}
    compress.run(CompressRecipe.model_validate(values | settings), Reporter(io.StringIO()))
    return out


def repair(place: Path, model: Path | str, out: Path, **changes: Any) -> Path:
    values: dict[str, Any] = {
        "model": str(model), "out": out, "threads": 1, "dtype": "bfloat16", "steps": 3, "batch": 2,
        "data": {"train": str(place / "text.txt"), "form": "text", "max_tokens": 32}, "keep": "last",
        "scheme": {"method": "perp", "r": 2, "alpha": 4}, "rule": {"method": "adamw", "lr": 1e-2},
    }  # fmt: skip
    return finetune.run(FinetuneRecipe.parse(**(values | changes))).files[0]


def masks(folder: Path) -> tuple[Decoder, dict[str, torch.Tensor]]:
    model = checkpoint.load(folder, masks=True)
    return model, {n: mask for n, m in model.named_modules() if (mask := kept(m)) is not None}


def test_pruned_then_repaired_then_packed_and_served(place: Path, tmp_path: Path) -> None:
    pruned = pack(place / "model", tmp_path / "pruned", compressor={"method": "wanda", "pattern": "2:4"})
    repaired = repair(place, pruned, tmp_path / "run")
    before, want = masks(pruned)
    model, got = masks(repaired)
    assert got.keys() == want.keys()
    for name, mask in want.items():
        assert torch.equal(got[name], mask)
        weight = model.get_parameter(f"{name}.weight")
        assert not weight[~mask].any()
        assert not torch.equal(weight, before.get_parameter(f"{name}.weight"))
    manifest = json.loads((repaired / "manifest.json").read_text())
    assert [link["method"] for link in manifest["chain"]] == ["wanda", "perp"]
    assert lineage(str(repaired)).chain == (
        "wanda pattern=2:4",
        f"perp data={manifest['chain'][1]['settings']['data'][:12]} rule=adamw rule.lr=0.01 scheme=perp "
        "scheme.alpha=4.0 scheme.r=2 steps=3",
    )
    rounded = pack(repaired, tmp_path / "rounded", compressor={"method": "gptq", "group": 32})
    codes = checkpoint.load(rounded)
    tiles = {"method": "tiled_sparse", "min_saving": -1.0}
    sparse = pack(repaired, tmp_path / "sparse", compressor=tiles)
    assert checkpoint.packed_formats(sparse) == ("tiled_sparse",)
    for name, mask in want.items():
        assert not codes.get_submodule(name).unpack()[~mask].any()
    tokens = torch.arange(2, 34)[None]
    assert torch.equal(checkpoint.load(sparse).logits(tokens), model.logits(tokens))
    with pytest.raises(AxiconError, match=r"is pruned already .*; start from the dense model, or go on from"):
        pack(repaired, tmp_path / "again", compressor="magnitude")
    further = pack(
        repaired, tmp_path / "further", compressor={"method": "magnitude", "sparsity": 0.7, "continued": True}
    )
    for name, mask in masks(further)[1].items():
        assert not (mask & ~want[name]).any()
        assert float(mask.double().mean()) == pytest.approx(0.3, abs=0.02)


def test_one_command_prunes_and_repairs(place: Path, tmp_path: Path) -> None:
    made = {"method": "magnitude", "sparsity": 0.5}
    folder = repair(place, place / "model", tmp_path / "run", compressor=made)
    chain = json.loads((folder / "manifest.json").read_text())["chain"]
    assert [link["method"] for link in chain] == ["magnitude", "perp"]
    assert len(masks(folder)[1]) == 8


def test_adapters_of_a_pruned_model_stay_beside_it(place: Path, tmp_path: Path) -> None:
    pruned = pack(place / "model", tmp_path / "pruned", compressor="magnitude")
    lora = {"method": "lora", "r": 2}
    folder = repair(place, pruned, tmp_path / "run", scheme=lora)
    assert json.loads((folder / "manifest.json").read_text())["kind"] == "adapter"
    with pytest.raises(AxiconError, match="adapters would fill what was pruned; take scheme=perp"):
        repair(place, pruned, tmp_path / "other", scheme=lora, output="merged")
    whole = repair(place, pruned, tmp_path / "full", scheme="full", rule="zo_sgd")
    model, got = masks(whole)
    assert got
    assert all(not model.get_parameter(f"{name}.weight")[~mask].any() for name, mask in got.items())


def test_what_is_not_pruned_or_is_packed_is_refused_with_the_way(place: Path, tmp_path: Path) -> None:
    with pytest.raises(AxiconError, match=r"nothing says what is pruned; prune it first \(axicon compress"):
        repair(place, place / "model", tmp_path / "run")
    with pytest.raises(AxiconError, match=r"reconstruct brings a block back .* chain=wanda,reconstruct"):
        pack(place / "model", tmp_path / "out", compressor=QUICK)
    packed = pack(place / "model", tmp_path / "packed", chain=["magnitude", "group_int4"])
    with pytest.raises(AxiconError, match="stored as group_int here; repair the pruned model first"):
        repair(place, packed, tmp_path / "late")


def test_a_chain_that_reconstructs_goes_on_after_a_stop(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = [{"method": "magnitude", "sparsity": 0.5}, QUICK]
    whole = pack(place / "model", tmp_path / "whole", chain=chain)
    with monkeypatch.context() as patch:
        write = compress.compress_blocks

        def stopped(*args: Any, progress: Any, **settings: Any) -> None:
            def told(done: int, total: int, note: str) -> None:
                raise KeyboardInterrupt

            write(*args, progress=told, **settings)

        patch.setattr(compress, "compress_blocks", stopped)
        with pytest.raises(KeyboardInterrupt):
            pack(place / "model", tmp_path / "parts", chain=chain)
    parts = pack(place / "model", tmp_path / "parts", chain=chain)
    assert checkpoint.digest(parts) == checkpoint.digest(whole)
    links = json.loads((whole / "manifest.json").read_text())["chain"]
    assert [link["method"] for link in links] == ["magnitude", "reconstruct"]
    assert links[1]["settings"]["r"] == 2
