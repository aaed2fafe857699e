"""compressed-tensors: packed by that package's own code, read here, and equal to its own dequantisation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from axicon.errors import AxiconError
from axicon.model import checkpoint
from axicon.model.packed import PackedLinear
from axicon.model.weights import product_names
from tests.parity.variants import saved

compressed_tensors = pytest.importorskip("compressed_tensors", reason="`make setup` installs it")

TOKENS = torch.arange(20)[None]
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
    "int8_channel": ("int-quantized", {"num_bits": 8, "strategy": "channel"}, None),
    "int8_group_asymmetric": (
        "int-quantized", {"num_bits": 8, "strategy": "group", "group_size": 16, "symmetric": False}, None),
    "int8_rows": ("int-quantized", {"num_bits": 8, "strategy": "channel"},
                  {"num_bits": 8, "strategy": "token", "dynamic": True}),
    "packed4_group": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 16}, None),
    "packed4_asymmetric": (
        "pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 8, "symmetric": False}, None),
    "packed4_channel": ("pack-quantized", {"num_bits": 4, "strategy": "channel", "symmetric": False}, None),
    "packed8_group": ("pack-quantized", {"num_bits": 8, "strategy": "group", "group_size": 16}, None),
    "packed3_group": ("pack-quantized", {"num_bits": 3, "strategy": "group", "group_size": 16}, None),
}  # fmt: skip


def quantised(folder: Path, kind: str, variant: str = "llama_biases") -> dict[str, Tensor]:
    """A checkpoint that the package has packed; its own dequantisation of each product by name."""
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    form, weights, rows = KINDS[kind]
    args = QuantizationArgs(**weights)
    scheme = QuantizationScheme(
        targets=["Linear"], weights=args, format=form,
        input_activations=None if rows is None else QuantizationArgs(**rows))
    compressor = BaseCompressor.load_from_registry(form)
    model = saved(variant, folder)
    tensors = load_file(folder / "model.safetensors")
    exact = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or name in ("lm_head", "embed_out"):
            continue
        weight = tensors.pop(f"{name}.weight")
        grouped = weight.unflatten(1, (-1, args.group_size or weight.shape[1]))
        scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
        state = {"weight": weight, "weight_scale": scale}
        if not args.symmetric:
            state["weight_zero_point"] = zero
        packed = compressor.compress(state, scheme)
        tensors |= {f"{name}.{key}": value.contiguous() for key, value in packed.items()}
        exact[name] = compressor.decompress(packed, scheme)["weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    settings = QuantizationConfig(
        config_groups={"group_0": scheme}, quantization_status="compressed", ignore=["lm_head", "embed_out"],
        format=form)
    config["quantization_config"] = settings.to_dict()
    (folder / "config.json").write_text(json.dumps(config))
    return exact


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_weights_are_exactly_the_packages_own(kind: str, tmp_path: Path) -> None:
    exact = quantised(tmp_path, kind)
    decoder = checkpoint.load(tmp_path, dtype=torch.float32)
    seen = 0
    for path, module in decoder.named_modules():
        if isinstance(module, PackedLinear):
            names, _ = product_names(decoder.shape, path)
            # `Int8Linear` keeps 127 times the scale, which rounds once more where a scale has all of float32.
            allowed = 2**-22 if kind == "int8_rows" else 0.0
            want = torch.cat([exact[name] for name in names])
            torch.testing.assert_close(module.unpack(), want, rtol=allowed, atol=0, msg=path)
            seen += len(names)
    assert seen == len(exact) == 3 * 7
    assert checkpoint.packed_formats(tmp_path) == (("int8",) if kind == "int8_rows" else ("group_int",))


@pytest.mark.parametrize(("kind", "variant"), [
    ("int8_channel", "llama_biases"), ("packed4_group", "llama_tied"), ("packed4_group", "neox"),
    ("packed4_group", "opt"),
])  # fmt: skip
@torch.no_grad()
def test_logits_equal_transformers_on_the_same_directory(kind: str, variant: str, tmp_path: Path) -> None:
    quantised(tmp_path, kind, variant)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ours = checkpoint.load(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(ours.logits(TOKENS), theirs(TOKENS).logits, atol=1e-4, rtol=0)
    assert any(isinstance(module, PackedLinear) for module in ours.modules())


@torch.no_grad()
def test_one_block_is_read_alone(tmp_path: Path) -> None:
    quantised(tmp_path, "packed4_asymmetric")
    whole = checkpoint.load(tmp_path)
    part = checkpoint.load(tmp_path, blocks=range(1, 2))
    assert torch.equal(part.blocks[0].qkv.qweight, whole.blocks[1].qkv.qweight)
    assert torch.equal(part.blocks[0].gate_up.zero, whole.blocks[1].gate_up.zero)


def weights(config: dict[str, Any]) -> dict[str, Any]:
    return config["config_groups"]["group_0"]["weights"]


@pytest.mark.parametrize(("change", "says"), [
    (lambda q: q.update(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme is not understood"),
    (lambda q: q.update(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config 'sparse-24"),
    (lambda q: q.update(transform_config={"config_groups": {"a": 1}}), "transform_config is not understood"),
    (lambda q: q.update(format="float-quantized"), "format 'float-quantized' is not read here"),
    (lambda q: q.update(config_groups={}), "config_groups is missing"),
    (lambda q: weights(q).update(type="float"), "weights.type 'float' is not read here"),
    (lambda q: weights(q).update(num_bits=1), "weights.num_bits '1' is not read here"),
    (lambda q: weights(q).update(strategy="tensor"), "weights.strategy 'tensor' is not read here"),
    (lambda q: weights(q).update(group_size=8), r"no group of config_groups describes model\.layers\.0"),
    (lambda q: weights(q).update(symmetric=False), "no group of config_groups describes"),
    (lambda q: q["config_groups"]["group_0"].update(input_activations={"num_bits": 8, "dynamic": False}),
     "input_activations.dynamic 'False' is not read here"),
    (lambda q: q["config_groups"]["group_0"].update(output_activations={"num_bits": 8}),
     "output_activations is not understood"),
])  # fmt: skip
def test_what_is_not_understood_is_refused_by_name(change: Any, says: str, tmp_path: Path) -> None:
    quantised(tmp_path, "packed4_group")
    config = json.loads((tmp_path / "config.json").read_text())
    change(config["quantization_config"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(AxiconError, match=says) as caught:
        checkpoint.load(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("change", "says"), [
    (lambda t: t.pop("model.layers.1.self_attn.k_proj.weight_packed"), "weight_packed missing"),
    (lambda t: t.pop("model.layers.1.self_attn.k_proj.weight_shape"), "weight_shape missing"),
    (lambda t: t["model.layers.1.self_attn.k_proj.weight_shape"].fill_(1 << 40), "does not fit"),
    (lambda t: t.update({"model.layers.0.mlp.up_proj.weight_scale": torch.ones(80, 4)}), "no group of"),
    (lambda t: t["model.layers.0.mlp.up_proj.weight_scale"].fill_(torch.nan), "scale holds NaN"),
    (lambda t: t.update({"model.layers.0.mlp.up_proj.extra": torch.ones(1)}), "up_proj.extra in the weights"),
    (lambda t: t.pop("model.layers.0.mlp.up_proj.bias"), "only some of its parts have a bias"),
])  # fmt: skip
def test_wrong_tensors_are_named(change: Any, says: str, tmp_path: Path) -> None:
    quantised(tmp_path, "packed4_group")
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(AxiconError, match=says):
        checkpoint.load(tmp_path)
