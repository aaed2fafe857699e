"""From names and directories to decoders: every way in, and every clear refusal."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from axicon.errors import AxiconError
from axicon.model import cachedir, checkpoint
from axicon.model.checkpoint import check, digest, load, model_id, resolve, shape_of
from axicon.model.tensorfile import TensorFile
from tests.parity.variants import saved

TOKENS = torch.arange(20)[None]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    saved("llama_tied", folder)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AXICON_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def test_missing_tensors_are_named(model: Path) -> None:
    rewrite(model, lambda w: w.pop("model.layers.2.self_attn.k_proj.weight"))
    with pytest.raises(AxiconError, match=r"tensor model\.layers\.2\.self_attn\.k_proj\.weight missing"):
        load(model)
    with pytest.raises(AxiconError, match="missing"):
        load(model, blocks=range(1, 3))
    load(model, blocks=range(0, 2))


def test_many_missing_tensors_are_counted(model: Path) -> None:
    rewrite(model, lambda w: [w.pop(name) for name in list(w) if "layers.2" in name])
    with pytest.raises(AxiconError, match=r"tensors model\.layers\.2.* and 6 more missing"):
        load(model)


def test_unexpected_tensors_are_named(model: Path) -> None:
    rewrite(model, lambda w: w.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}))
    with pytest.raises(AxiconError, match=r"q_norm\.weight in the weights, which llama .* has not"):
        load(model)


def test_wrong_shapes_are_named_with_both_shapes(model: Path) -> None:
    rewrite(model, lambda w: w.update({"model.norm.weight": torch.ones(47)}))
    with pytest.raises(AxiconError, match=r"norm\.weight has shape \[47\], config\.json asks for \[48\]"):
        load(model)


def test_integer_weights_are_refused(model: Path) -> None:
    rewrite(model, lambda w: w.update({"model.norm.weight": torch.ones(48, dtype=torch.int8)}))
    with pytest.raises(AxiconError, match=r"norm\.weight is stored as torch\.int8"):
        load(model)


def test_old_buffers_are_ignored(model: Path) -> None:
    before = load(model).logits(TOKENS)
    rewrite(model, lambda w: w.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    assert torch.equal(load(model).logits(TOKENS), before)


def test_a_tied_head_is_one_parameter(model: Path) -> None:
    decoder = load(model, dtype=torch.float32)
    assert decoder.lm_head.weight is decoder.embed_tokens.weight
    names = [name for name, _ in decoder.named_parameters()]
    assert "lm_head.weight" not in names


def test_a_stored_head_must_be_the_embedding_it_is_tied_to(model: Path) -> None:
    rewrite(model, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    assert load(model).lm_head.weight is not None
    rewrite(model, lambda w: w["lm_head.weight"].add_(1))
    with pytest.raises(AxiconError, match="set tie_word_embeddings to false"):
        load(model)


@pytest.mark.parametrize("variant", ["opt", "llama"])
def test_names_of_the_bare_base_model_are_understood(variant: str, tmp_path: Path) -> None:
    """facebook/opt-125m and others store the model without its head, and names without the first part."""
    reference = saved(variant, tmp_path / "whole")
    config = reference.config
    config.tie_word_embeddings = True
    reference.tie_weights()
    reference.save_pretrained(tmp_path / "whole")
    reference.model.save_pretrained(tmp_path / "bare")
    assert not any(n.startswith("model.") for n in load_file(tmp_path / "bare" / "model.safetensors"))
    for name in ("whole", "bare"):
        path = tmp_path / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    whole, bare = load(tmp_path / "whole"), load(tmp_path / "bare")
    assert torch.equal(whole.logits(TOKENS), bare.logits(TOKENS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_is_cast_once(dtype: torch.dtype, model: Path) -> None:
    decoder = load(model, dtype=dtype)
    stored = load_file(model / "model.safetensors")
    assert {p.dtype for p in decoder.parameters()} == {dtype}
    assert torch.equal(decoder.embed_tokens.weight, stored["model.embed_tokens.weight"].to(dtype))
    assert decoder.logits(TOKENS).dtype == torch.float32


def test_no_dtype_keeps_the_stored_one(tmp_path: Path) -> None:
    saved("llama", tmp_path).bfloat16().save_pretrained(tmp_path)
    assert load(tmp_path, dtype=None).dtype == torch.bfloat16


def test_loaded_weights_do_not_depend_on_the_file(model: Path) -> None:
    decoder = load(model, dtype=torch.float32)
    before = decoder.logits(TOKENS)
    (model / "model.safetensors").write_bytes(b"")
    assert torch.equal(decoder.logits(TOKENS), before)


def test_too_little_memory_is_found_before_loading(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "available_memory", lambda: 1000)
    with pytest.raises(AxiconError, match=r"0\.0 GiB of memory needed .* 0\.0 GiB available"):
        load(model)
    monkeypatch.setattr(checkpoint, "available_memory", lambda: 10**9)
    load(model)


def test_a_model_can_be_checked_without_reading_its_weights(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as unread:
        unread.setattr(TensorFile, "tensor", lambda *_: pytest.fail("a weight was read"))
        assert check(model) == shape_of(model)
        unread.setattr(checkpoint, "available_memory", lambda: 1000)
        with pytest.raises(AxiconError, match="memory"):
            check(model)
    rewrite(model, lambda w: w.pop("model.norm.weight"))
    with pytest.raises(AxiconError, match="missing"):
        check(model)


def test_the_smaller_of_machine_and_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from axicon.model import machine

    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    2048 kB\n")
    monkeypatch.setattr(machine, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    assert machine.available_memory() == 2 << 20
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.available_memory() == 2 << 20
    (tmp_path / "memory.max").write_text(str(1 << 20))
    (tmp_path / "memory.current").write_text(str(900 << 10))
    (tmp_path / "memory.stat").write_text(f"anon 5\nactive_file {100 << 10}\ninactive_file {200 << 10}\n")
    assert machine.available_memory() == 424 << 10


class TestSharded:
    @pytest.fixture
    def model(self, tmp_path: Path) -> Path:
        folder = tmp_path / "sharded"
        saved("llama", folder, max_shard_size="30kB")
        return folder

    def edit_index(self, model: Path, change: Callable[[dict[str, str]], object]) -> None:
        path = model / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index["weight_map"])
        path.write_text(json.dumps(index))

    def test_a_missing_shard_is_named(self, model: Path) -> None:
        shard = sorted(model.glob("*.safetensors"))[1]
        shard.unlink()
        with pytest.raises(AxiconError, match=f"the index names {shard.name}, which is missing"):
            load(model)

    def test_a_missing_index_is_named(self, model: Path) -> None:
        (model / "model.safetensors.index.json").unlink()
        with pytest.raises(AxiconError, match=r"neither model\.safetensors nor .*index\.json"):
            load(model)

    @pytest.mark.parametrize("name", ["../evil.safetensors", "/etc/evil.safetensors", "evil.bin"])
    def test_an_index_that_leads_elsewhere_is_refused(self, name: str, model: Path) -> None:
        self.edit_index(model, lambda m: m.update({"lm_head.weight": name}))
        with pytest.raises(AxiconError, match="not the name of a safetensors file"):
            load(model)

    def test_an_index_that_contradicts_the_files_is_refused(self, model: Path) -> None:
        first, second = sorted(p.name for p in model.glob("*.safetensors"))[:2]
        self.edit_index(model, lambda m: m.update({n: second for n in m if m[n] == first}))
        with pytest.raises(AxiconError, match=f"puts tensor .* in {second}, and it is not there"):
            load(model)

    def test_a_tensor_in_two_files_is_refused(self, model: Path) -> None:
        first, second = sorted(model.glob("*.safetensors"))[:2]
        save_file(load_file(first) | load_file(second), second)
        with pytest.raises(AxiconError, match=f"is in {first.name} and in {second.name}"):
            load(model)

    def test_an_empty_index_is_refused(self, model: Path) -> None:
        (model / "model.safetensors.index.json").write_text('{"weight_map": {}}')
        with pytest.raises(AxiconError, match="weight_map is not an object of file names"):
            load(model)


def test_names_that_are_nothing_are_refused(tmp_path: Path) -> None:
    for name in (tmp_path / "none", str(tmp_path / "none"), "./none", "none.gguf", "a/b/c", "a b"):
        with pytest.raises(AxiconError, match="no such file or directory"):
            resolve(name)
    single = tmp_path / "model.safetensors"
    single.write_bytes(b"")
    with pytest.raises(AxiconError, match="give the directory that holds it"):
        resolve(single)
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(AxiconError, match="not a model"):
        resolve(tmp_path / "notes.txt")


def test_served_names(model: Path, tmp_path: Path) -> None:
    assert model_id("demo") == "SmolLM2-135M-Instruct"
    assert model_id(model) == model_id(f"{model}/") == "tiny"
    assert model_id("org/name@main") == "org/name"
    snapshot = tmp_path / "models--org--some--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    assert model_id(snapshot) == "org/some/name"


def test_end_tokens_of_the_generation_config_win(model: Path) -> None:
    (model / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert shape_of(model).eos_ids == (5, 6)


def test_digest_follows_content_and_is_remembered(
    model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = digest(model)
    assert len(first) == 64
    calls: list[Path] = []
    monkeypatch.setattr(cachedir, "sha256", lambda path: calls.append(path) or "0" * 64)
    assert digest(model) == first
    assert not calls
    os.utime(model / "model.safetensors")
    assert digest(model) != first
    assert [path.name for path in calls] == ["model.safetensors"]
    monkeypatch.undo()
    os.environ["AXICON_CACHE"] = str(cache)
    (cache / "digests.json").write_text("broken")
    assert digest(model) == first
    rewrite(model, lambda w: w["model.norm.weight"].add_(1))
    assert digest(model) != first


def test_one_flipped_bit_is_found_where_a_manifest_lists_the_file(model: Path) -> None:
    from axicon.model.artefact import write_manifest

    write_manifest(model, name="tiny")
    load(model)
    path = model / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(AxiconError, match=r"model\.safetensors: sha256 differs from manifest\.json"):
        load(model)


def test_a_manifest_of_another_version_is_refused(model: Path) -> None:
    (model / "manifest.json").write_text('{"format_version": 2}')
    with pytest.raises(AxiconError, match="format version 2, this axicon reads 1"):
        load(model)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [({"AXICON_CACHE": "/a/b", "XDG_CACHE_HOME": "/x"}, "/a/b"), ({"XDG_CACHE_HOME": "/x"}, "/x/axicon"),
     ({"HOME": "/home/someone"}, "/home/someone/.cache/axicon")],
)
def test_where_the_cache_lies(
    variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AXICON_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert checkpoint.cache_dir() == Path(expected)
