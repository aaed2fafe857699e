"""Packed models on disk: written, read back, and every way in which one can be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from axicon.compress.directory import write_compressed
from axicon.compress.llm_int8 import LLMInt8
from axicon.compress.walk import compress
from axicon.errors import AxiconError
from axicon.model import checkpoint
from axicon.model.artefact import write_manifest
from axicon.model.decoder import Decoder
from axicon.model.formats import FORMATS
from axicon.model.int8 import Int8Linear
from axicon.model.packed import PackedLinear
from tests.parity.variants import saved

pytestmark = pytest.mark.usefixtures("own_cache")

TOKENS = torch.arange(20)[None]
SETTINGS = LLMInt8(threshold=5.0, relative=4.0)


def packed(tmp_path: Path, variant: str = "llama_tied", method: LLMInt8 = SETTINGS) -> Path:
    saved(variant, tmp_path / "dense")
    folder = tmp_path / "packed"
    folder.mkdir()
    write_compressed(method, tmp_path / "dense", folder, dtype=torch.bfloat16)
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return packed(tmp_path)


def same(ours: Decoder, theirs: Decoder) -> bool:
    """Every parameter, buffer and setting, and the kinds of the modules."""
    a, b = ours.state_dict(), theirs.state_dict()
    kinds = [[(name, type(m)) for name, m in d.named_modules()] for d in (ours, theirs)]
    settings = [
        [[getattr(m, name) for name in m.settings] for m in d.modules() if isinstance(m, PackedLinear)]
        for d in (ours, theirs)
    ]
    return (
        kinds[0] == kinds[1] and settings[0] == settings[1] and a.keys() == b.keys()
        and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)
    )  # fmt: skip


@pytest.mark.parametrize("variant", [
    "llama_tied", "llama_grouped", "llama_biases", "opt", "opt_350m", "opt_projected", "opt_untied", "qwen3",
    "neox", "neox_tied",
])  # fmt: skip
@pytest.mark.parametrize("head", [True, False])
def test_what_is_read_is_what_compressing_in_memory_makes(variant: str, head: bool, tmp_path: Path) -> None:
    method = LLMInt8(relative=5.0, head=head)
    folder = packed(tmp_path, variant, method)
    want = compress(method, checkpoint.load(tmp_path / "dense"))
    got = checkpoint.load(folder)
    assert same(got, want)
    assert torch.equal(got.logits(TOKENS), want.logits(TOKENS))
    if got.shape.tie_head and not head:
        assert got.lm_head.weight is got.embed_tokens.weight


def test_some_blocks_are_read_alone(model: Path, tmp_path: Path) -> None:
    want = compress(SETTINGS, checkpoint.load(tmp_path / "dense"))
    for blocks in (range(0, 1), range(1, 2), range(2, 3), range(1, 3)):
        part = checkpoint.load(model, blocks=blocks)
        for index, block in zip(blocks, part.blocks, strict=True):
            assert torch.equal(block.qkv.qweight, want.blocks[index].qkv.qweight)
        assert part.has_head == isinstance(getattr(part, "lm_head", None), Int8Linear)


def test_names_and_sizes_on_disk(model: Path) -> None:
    stored = load_file(model / "packed.safetensors")
    assert stored["blocks.0.qkv.qweight"].dtype == torch.int8
    assert stored["blocks.2.down.absmax"].dtype == torch.float32
    assert stored["lm_head.qweight"].shape == (97, 48)
    assert stored["model.layers.0.input_layernorm.weight"].dtype == torch.bfloat16
    assert not [name for name in stored if name.endswith("proj.weight")]
    config = json.loads((model / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    [group] = config["quantization_config"]["groups"]
    assert group["settings"] == {"relative": 4.0, "threshold": 5.0}
    assert len(group["modules"]) == 3 * 4 + 1


def test_products_left_dense_stay_dense(tmp_path: Path) -> None:
    folder = packed(tmp_path, "llama", LLMInt8(skip=("blocks.1.*", "*.down")))
    decoder = checkpoint.load(folder)
    assert isinstance(decoder.blocks[0].qkv, Int8Linear)
    assert isinstance(decoder.blocks[0].down, torch.nn.Linear)
    assert isinstance(decoder.blocks[1].qkv, torch.nn.Linear)


def test_a_model_in_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("axicon.model.tensorwriter.SHARD_BYTES", 20_000)
    folder = packed(tmp_path)
    assert len(list(folder.glob("packed-*.safetensors"))) > 2
    assert same(checkpoint.load(folder), compress(SETTINGS, checkpoint.load(tmp_path / "dense")))


def test_dense_parts_take_the_dtype_that_is_asked_for(tmp_path: Path) -> None:
    folder = packed(tmp_path, "opt")
    decoder = checkpoint.load(folder, dtype=torch.float32)
    qkv = decoder.blocks[0].qkv
    assert decoder.dtype == qkv.bias.dtype == decoder.embed_tokens.weight.dtype == torch.float32
    assert qkv.absmax.dtype == torch.float32
    assert checkpoint.load(folder, dtype=None).dtype == torch.bfloat16
    assert decoder.logits(TOKENS).isfinite().all()


def test_formats_are_told_without_reading_weights(model: Path, tmp_path: Path) -> None:
    assert checkpoint.packed_formats(model) == ("int8",)
    assert checkpoint.packed_formats(tmp_path / "dense") == ()
    assert checkpoint.check(model).layers == 3
    assert len(checkpoint.digest(model)) == 64
    assert checkpoint.digest(model) != checkpoint.digest(tmp_path / "dense")


def test_other_loaders_refuse_it(model: Path) -> None:
    import transformers

    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        transformers.AutoModelForCausalLM.from_pretrained(model)


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(folder / "packed.safetensors")
    change(weights)
    save_file(weights, folder / "packed.safetensors")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w: w.pop("blocks.1.out.absmax"), r"tensor blocks\.1\.out\.absmax missing"),
        (lambda w: w.update({"blocks.0.qkv.extra": torch.ones(1)}), r"blocks\.0\.qkv\.extra in the weights"),
        (lambda w: w.update({"blocks.0.qkv.qweight": torch.ones(1, 2, dtype=torch.int8)}),
         r"qkv\.qweight has shape \[1, 2\], config\.json asks for \[144, 48\]"),
        (lambda w: w.update({"blocks.0.out.qweight": torch.ones(48, 48)}),
         r"out\.qweight is stored as torch\.float32, its format asks for torch\.int8"),
        (lambda w: w.update({"blocks.0.out.absmax": torch.ones(48, dtype=torch.bfloat16)}),
         r"out\.absmax is stored as torch\.bfloat16, its format asks for torch\.float32"),
        (lambda w: w["blocks.0.out.absmax"].fill_(torch.nan), r"out\.absmax holds NaN or infinite values"),
        (lambda w: w["lm_head.absmax"].fill_(torch.inf), r"lm_head\.absmax holds NaN or infinite values"),
        (lambda w: w.update({"lm_head.weight": torch.ones(97, 48)}), r"lm_head\.weight beside the packed"),
    ],
)  # fmt: skip
def test_wrong_tensors_are_named(
    change: Callable[[dict[str, Tensor]], object], says: str, model: Path
) -> None:
    rewrite(model, change)
    with pytest.raises(AxiconError, match=says):
        checkpoint.load(model)


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


def group(q: dict[str, Any]) -> dict[str, Any]:
    return q["groups"][0]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda q: q.update(quant_method="hqq"), r"another tool \(hqq\)"),
        (lambda q: q.update(version=2), "version 2, this axicon reads 1; update axicon"),
        (lambda q: q.update(groups=[]), "something else than a list of groups"),
        (lambda q: q.update(bits=8), "something else than a list of groups"),
        (lambda q: group(q).update(format="int3"), "format 'int3', this axicon reads .*int8,.*; update"),
        (lambda q: group(q).update(format=["int8"]), "the storage format"),
        (lambda q: group(q)["settings"].pop("relative"), "other settings for int8 than threshold, relative"),
        (lambda q: group(q)["settings"].update(bits=8), "other settings for int8"),
        (lambda q: group(q)["settings"].update(threshold=-1), r"blocks\.\d\.qkv does not fit int8"),
        (lambda q: group(q)["settings"].update(threshold="6"), r"does not fit int8"),
        (lambda q: group(q)["settings"].update(threshold=10**400), "other settings for int8"),
        (lambda q: group(q)["settings"].update(threshold=float("nan")), "other settings for int8"),
        (lambda q: group(q)["modules"].append("blocks.9.qkv"), r"'blocks\.9\.qkv', which is no product"),
        (lambda q: group(q)["modules"].append("final_norm"), r"'final_norm', which is no product"),
        (lambda q: group(q)["modules"].append("blocks.0.qkv"), r"names 'blocks\.0\.qkv' twice"),
        (lambda q: group(q)["modules"].append(1), "names 1 twice or not by a name"),
        (lambda q: group(q).update(modules=[]), "a group of int8 without modules"),
        (lambda q: group(q)["modules"].remove("blocks.0.qkv"), r"q_proj\.weight.* missing"),
    ],
)
def test_a_wrong_config_is_refused(
    change: Callable[[dict[str, Any]], object], says: str, model: Path
) -> None:
    edit(model, change)
    with pytest.raises(AxiconError, match=says) as caught:
        checkpoint.load(model)
    assert str(model) in str(caught.value)
    if "missing" not in says:
        with pytest.raises(AxiconError, match=says):
            checkpoint.load(model, blocks=range(1, 2))


def test_memory_and_digests_are_checked_as_for_dense_models(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_manifest(model, name="tiny")
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "available_memory", lambda: 50_000)
        with pytest.raises(AxiconError, match="of memory needed for the weights"):
            checkpoint.load(model)
        # 3 blocks of 27 KB of int8, a head of 5 KB, 15 KB of bfloat16: half of what dense bfloat16 needs.
        patched.setattr(checkpoint, "available_memory", lambda: 120_000)
        checkpoint.load(model)
        with pytest.raises(AxiconError, match="of memory needed"):
            checkpoint.load(model.parent / "dense")
    content = bytearray((model / "packed.safetensors").read_bytes())
    content[-5] ^= 1
    (model / "packed.safetensors").write_bytes(content)
    with pytest.raises(AxiconError, match=r"packed\.safetensors: sha256 differs from manifest\.json"):
        checkpoint.load(model, blocks=range(1, 2))


def test_a_newer_manifest_is_refused_with_advice(model: Path) -> None:
    write_manifest(model, name="tiny")
    path = model / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 2}))
    with pytest.raises(AxiconError, match="format version 2, this axicon reads 1; update axicon"):
        checkpoint.load(model)


def test_every_format_is_in_the_table_under_its_name() -> None:
    assert all(name == cls.format for name, cls in FORMATS.items())
    assert {cls for cls in PackedLinear.__subclasses__() if cls.__module__.startswith("axicon.")} == set(
        FORMATS.values()
    )
