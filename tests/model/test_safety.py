"""The gate: what can run, leads out of the folder, or is not what it says is refused with reason and way
out."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from axicon.errors import AxiconError
from axicon.model import safety
from axicon.model.checkpoint import load, load_tokenizer, resolve
from tests.parity.variants import saved


class Payload:
    """Unpickling it leaves a marker that must never appear."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.marker),))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A small model directory that passes."""
    folder = tmp_path / "model"
    saved("llama_tied", folder)
    return folder


def edit(path: Path, **values: Any) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | values))


def test_a_plain_model_passes(model: Path) -> None:
    assert resolve(model) == model
    assert load(model).shape.layers == 3


@pytest.mark.parametrize("suffix", ["bin", "pt", "pth", "ckpt", "pkl", "joblib", "npy", "nemo", "mar", "pt2"])
def test_weights_that_are_only_a_pickle_are_refused_unopened(
    suffix: str, model: Path, tmp_path: Path
) -> None:
    marker = tmp_path / "marker"
    (model / "model.safetensors").unlink()
    evil = model / f"pytorch_model.{suffix}"
    evil.write_bytes(pickle.dumps(Payload(marker)))
    with pytest.raises(AxiconError, match=f"pytorch_model.{suffix}.*can run code.*save_pretrained"):
        load(model)
    with pytest.raises(AxiconError, match="can run code"):
        resolve(str(evil))
    assert not marker.exists()
    pickle.loads(evil.read_bytes())  # the payload itself works, so the check above means something
    assert marker.exists()


def test_object_arrays_are_refused_unopened(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").unlink()
    np.save(model / "weights.npy", np.array([Payload(tmp_path / "marker")], dtype=object), allow_pickle=True)
    with pytest.raises(AxiconError, match=r"weights\.npy"):
        load(model)
    assert not (tmp_path / "marker").exists()


def test_a_pickle_beside_safetensors_is_left_alone(model: Path, tmp_path: Path) -> None:
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(tmp_path / "marker")))
    load(model)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("name", ["modeling_own.py", "deep/er/hook.PY", "lib.so", "x.dll", "run.ipynb"])
def test_code_in_the_folder_is_refused(name: str, model: Path) -> None:
    (model / name).parent.mkdir(parents=True, exist_ok=True)
    (model / name).write_text("raise SystemExit")
    with pytest.raises(AxiconError, match="must not hold code"):
        resolve(model)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("key", ["auto_map", "custom_code", "trust_remote_code"])
def test_a_config_that_asks_for_code_is_refused(file: str, key: str, model: Path) -> None:
    edit(model / file, **{key: {"AutoModelForCausalLM": "own--model.Own"}})
    with pytest.raises(AxiconError, match=f"{key}.*never does"):
        load(model)


def test_links_out_of_the_folder_are_refused(model: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.safetensors"
    (model / "model.safetensors").rename(outside)
    (model / "model.safetensors").symlink_to(outside)
    with pytest.raises(AxiconError, match="leads out of the model folder"):
        resolve(model)
    (model / "model.safetensors").unlink()
    outside.rename(model / "real.safetensors")
    (model / "model.safetensors").symlink_to("real.safetensors")
    assert resolve(model) == model


def test_a_linked_directory_counts_as_a_link(model: Path, tmp_path: Path) -> None:
    (model / "more").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(AxiconError, match="leads out"):
        resolve(model)


def test_links_inside_the_hub_cache_are_its_way_to_store_files(model: Path, tmp_path: Path) -> None:
    """snapshots/<commit>/file -> ../../blobs/<hash>; into the blobs of another repository is out."""
    repository = tmp_path / "models--org--tiny"
    snapshot = repository / "snapshots" / "abc"
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, file in enumerate(model.iterdir()):
        file.rename(repository / "blobs" / str(i))
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    assert load(snapshot).shape.layers == 3
    other = tmp_path / "models--org--other" / "blobs" / "0"
    other.parent.mkdir(parents=True)
    other.write_text("{}")
    (snapshot / "extra.json").symlink_to("../../../models--org--other/blobs/0")
    with pytest.raises(AxiconError, match="leads out"):
        resolve(snapshot)


def test_a_folder_that_only_looks_like_the_hub_cache_is_no_exception(model: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "anything" / "snapshots" / "abc"
    snapshot.parent.mkdir(parents=True)
    model.rename(snapshot)
    (tmp_path / "anything" / "secret.json").write_text("{}")
    (snapshot / "extra.json").symlink_to("../../secret.json")
    with pytest.raises(AxiconError, match="leads out"):
        resolve(snapshot)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "not valid JSON"), (b"{", "not valid JSON"), (b"[1]", "expected a JSON object"),
     (b"[" * 100_000, "not valid JSON"), (b'{"model_type": "\xff"}', "not valid JSON")],
)
def test_broken_config_files_are_named(content: bytes, message: str, model: Path) -> None:
    (model / "config.json").write_bytes(content)
    with pytest.raises(AxiconError, match=message):
        load(model)


def test_a_folder_without_config_or_weights_says_so(tmp_path: Path) -> None:
    with pytest.raises(AxiconError, match=r"no config\.json"):
        resolve(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(AxiconError, match=r"no \.safetensors"):
        resolve(tmp_path)


BAD_TEMPLATES = {
    "{{ ''.__class__ }}": "'__class__'",
    "{{ messages['__class__'] }}": "'__class__'",
    "{{ ''|attr('__class__') }}": "filter 'attr'",
    "{{ messages._private }}": "'_private'",
    "{% include 'other' %}": "loads other templates",
    "{% import 'other' as o %}": "loads other templates",
    "{% for %}": "not valid Jinja",
    "x" * (256 * 1024 + 1): "characters, more than",
}


@pytest.mark.parametrize("template", BAD_TEMPLATES, ids=range(len(BAD_TEMPLATES)))
def test_templates_that_reach_beyond_their_messages_are_refused(template: str) -> None:
    with pytest.raises(AxiconError, match=BAD_TEMPLATES[template].replace("'", ".")):
        safety.check_chat_template(template, "here")


def test_ordinary_templates_pass() -> None:
    safety.check_chat_template(
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m['content'] | trim }}"
        "{% endgeneration %}{% else %}{{ m.content.split('x')[-1] }}{% continue %}{% endif %}{% endfor %}",
        "here")


def test_a_tokenizer_with_an_evil_template_is_refused(model: Path) -> None:
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(model / "tokenizer.json"))
    edit(model / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", chat_template="{{ x }}")
    assert load_tokenizer(model)("b").input_ids == [1]
    edit(model / "tokenizer_config.json", chat_template="{{ x.__init__ }}")
    with pytest.raises(AxiconError, match="__init__"):
        load_tokenizer(model)
    (model / "tokenizer.json").write_text('{"version": 5}')
    with pytest.raises(AxiconError, match="cannot be read"):
        load_tokenizer(model)
    (model / "tokenizer.json").unlink()
    with pytest.raises(AxiconError, match=r"no tokenizer\.json"):
        load_tokenizer(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused_unless_declared(value: float, model: Path) -> None:
    from safetensors.torch import load_file

    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(weights, model / "model.safetensors")
    with pytest.raises(AxiconError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN or infinite"):
        load(model)
    edit(model / "manifest.json", format_version=1, non_finite=["model.layers.1.mlp.up_proj.weight"])
    assert not load(model).blocks[1].gate_up.weight.isfinite().all()


def test_values_too_large_for_the_asked_type_are_found(model: Path) -> None:
    from safetensors.torch import load_file

    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][0] = 1e6
    save_file(weights, model / "model.safetensors")
    load(model, dtype=torch.bfloat16)
    with pytest.raises(AxiconError, match=r"norm\.weight holds NaN or infinite values as float16"):
        load(model, dtype=torch.float16)
