"""GPTQ and AWQ: packed here from the formats' descriptions, word by word, and read back.

Neither AutoGPTQ nor AutoAWQ runs without its own kernels, so the packers below are written for these tests,
from the layouts that the tools document, and share nothing with the readers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from axicon.errors import AxiconError
from axicon.model import checkpoint
from axicon.model.config import FOREIGN
from axicon.model.foreign import SCHEMES
from axicon.model.packed import PackedLinear
from axicon.model.weights import product_names
from tests.parity.variants import saved

GROUP = 16
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
AUTO_ROUND = {
    "provider": "auto-round", "autoround_version": "0.16.1", "data_type": "int", "iters": 0,
    "enable_quanted_input": False, "to_quant_block_names": "model.layers",
}  # fmt: skip


def words(codes: list[list[int]], bits: int, order: list[int] | None = None) -> Tensor:
    """int32 words of 32 / bits neighbouring codes of each row, `order[i]` at place i."""
    per = 32 // bits
    packed = []
    for row in codes:
        line = []
        for start in range(0, len(row), per):
            word = 0
            for i in range(per):
                word |= row[start + (order[i] if order else i)] << (bits * i)
            line.append(word - (1 << 32) if word >= 1 << 31 else word)
        packed.append(line)
    return torch.tensor(packed, dtype=torch.int32)


def quantised(
    folder: Path, method: str, bits: int = 4, version: int = 1, act_order: bool = False, variant: str = "opt",
    **settings: Any,
) -> dict[str, Tensor]:
    """The directory, and the weight (O, I) of each product as float32 by name."""
    model = saved(variant, folder)
    tensors = load_file(folder / "model.safetensors")
    made = torch.Generator().manual_seed(1)
    exact = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or name in ("lm_head", "embed_out"):
            continue
        del tensors[f"{name}.weight"]
        outputs, inputs = module.weight.shape
        groups = inputs // GROUP
        codes = torch.randint(0, 2**bits, (inputs, outputs), generator=made)
        zeros = torch.randint(1, 2**bits, (groups, outputs), generator=made)
        scales = (torch.rand(groups, outputs, generator=made) * 0.1).half()
        group_of = torch.arange(inputs) // GROUP
        if act_order:
            shuffled = torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs))
            group_of = group_of[shuffled]
        exact[name] = ((codes - zeros[group_of]) * scales[group_of].float()).T
        if method == "awq":
            tensors[f"{name}.qweight"] = words(codes.tolist(), 4, AWQ_ORDER)
            tensors[f"{name}.qzeros"] = words(zeros.tolist(), 4, AWQ_ORDER)
        else:
            tensors[f"{name}.qweight"] = words(codes.T.tolist(), bits).T.contiguous()
            tensors[f"{name}.qzeros"] = words((zeros - int(version == 1)).tolist(), bits)
            tensors[f"{name}.g_idx"] = group_of.int()
        tensors[f"{name}.scales"] = scales
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    form = "gptq" if version == 1 else "gptq_v2"
    own = {"gptq": {"desc_act": act_order, "sym": False, "checkpoint_format": form},
           "awq": {"zero_point": True, "version": "gemm"}}[method]
    config = json.loads((folder / "config.json").read_text())
    base = {"quant_method": method, "bits": bits, "group_size": GROUP}
    config["quantization_config"] = base | own | settings
    (folder / "config.json").write_text(json.dumps(config))
    return exact


@pytest.mark.parametrize(("method", "more"), [
    ("gptq", {}), ("gptq", {"version": 2}), ("gptq", {"bits": 8}), ("gptq", {"bits": 2, "version": 2}),
    ("gptq", {"act_order": True, "version": 2}), ("gptq", {"variant": "llama_biases", "act_order": True}),
    ("awq", {}), ("awq", {"variant": "llama_biases"}), ("gptq", AUTO_ROUND),
    ("awq", AUTO_ROUND | {"sym": False}),
])  # fmt: skip
@torch.no_grad()
def test_weights_are_those_of_the_format(method: str, more: dict[str, Any], tmp_path: Path) -> None:
    exact = quantised(tmp_path, method, **more)
    decoder = checkpoint.load(tmp_path, dtype=torch.float32)
    seen = 0
    for path, module in decoder.named_modules():
        if isinstance(module, PackedLinear):
            names, _ = product_names(decoder.shape, path)
            assert torch.equal(module.unpack(), torch.cat([exact[name] for name in names])), path
            assert module.permuted == more.get("act_order", False)
            seen += len(names)
    assert seen == len(exact)
    assert checkpoint.packed_formats(tmp_path) == ("group_int",)


@pytest.mark.parametrize("method", ["gptq", "awq"])
@torch.no_grad()
def test_logits_equal_the_dense_model_of_the_same_weights(method: str, tmp_path: Path) -> None:
    """Through a product whose rows lie in another order in the file (GPT-NeoX)."""
    exact = quantised(tmp_path / "small", method, variant="neox")
    model = saved("neox", tmp_path / "dense")
    for name, weight in exact.items():
        model.get_submodule(name).weight.copy_(weight)
    tokens = torch.arange(20)[None]
    ours = checkpoint.load(tmp_path / "small", dtype=torch.float32).logits(tokens)
    torch.testing.assert_close(ours, model(tokens).logits, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(("method", "settings", "says"), [
    ("gptq", {"bits": 3}, "bits '3' is not read here"),
    ("gptq", {"bits": "4"}, "bits '4' is not read here"),
    ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is not read here"),
    ("gptq", {"dynamic": {"+:.*": {"bits": 8}}}, "dynamic is not understood"),
    ("gptq", {"data_type": "mx_fp"}, "data_type 'mx_fp' is not read here"),
    ("gptq", {"group_size": 0}, "group_size are missing"),
    ("gptq", {"group_size": 32}, "do not divide"),
    ("awq", {"version": "gemv"}, "version 'gemv' is not read here"),
    ("awq", {"zero_point": False}, "zero_point 'False' is not read here"),
    ("awq", {"group_size": 8}, r"qzeros is torch\.int32 \[3, 6\], its format asks for .*\[6, 6\]"),
])  # fmt: skip
def test_what_is_not_understood_is_refused_by_name(
    method: str, settings: dict[str, Any], says: str, tmp_path: Path
) -> None:
    quantised(tmp_path, method)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] |= settings
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(AxiconError, match=says) as caught:
        checkpoint.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_tensors_that_mean_nothing_are_named(tmp_path: Path) -> None:
    quantised(tmp_path, "gptq", act_order=True)
    file, prefix = tmp_path / "model.safetensors", "model.decoder.layers.1.fc1"
    whole = load_file(file)

    def fails(says: str, **changes: Tensor) -> None:
        save_file(whole | {f"{prefix}.{key}": value for key, value in changes.items()}, file)
        with pytest.raises(AxiconError, match=says):
            checkpoint.load(tmp_path)

    fails("gives the groups different numbers of inputs", g_idx=torch.zeros(48, dtype=torch.int32))
    fails("gives the groups different numbers of inputs", g_idx=torch.full((48,), -1, dtype=torch.int32))
    fails("qzeros holds a zero of all ones", qzeros=torch.full((3, 10), -1, dtype=torch.int32))
    fails(r"scales is torch\.float64", scales=torch.ones(3, 80, dtype=torch.float64))
    fails("scale holds NaN", scales=torch.full((3, 80), torch.nan, dtype=torch.float16))
    save_file({name: value for name, value in whole.items() if name != f"{prefix}.scales"}, file)
    with pytest.raises(AxiconError, match="scales missing"):
        checkpoint.load(tmp_path)


def test_parts_of_one_product_have_to_agree(tmp_path: Path) -> None:
    quantised(tmp_path, "gptq", act_order=True)
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    name = "model.decoder.layers.0.self_attn.k_proj.g_idx"
    save_file(whole | {name: whole[name].flip(0).contiguous()}, file)
    with pytest.raises(AxiconError, match="are one product here and are not quantised alike"):
        checkpoint.load(tmp_path)


def test_the_config_names_every_reader() -> None:
    assert tuple(SCHEMES) == FOREIGN
