"""What we write as GGUF: dequantised by the `gguf` package, loaded by transformers, and read back here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

from axicon.compress.directory import write_compressed
from axicon.compress.group_int4 import GroupInt4
from axicon.compress.llm_int8 import LLMInt8
from axicon.errors import AxiconError
from axicon.model import checkpoint
from axicon.model.foreign.gguf import as_ggml, write_gguf
from axicon.model.gguf_tokenizer import SPLITTINGS
from axicon.model.group_int import GroupIntLinear
from axicon.model.int8 import Int8Linear
from axicon.model.interchange import convert_gguf
from axicon.model.packed import PackedLinear
from axicon.protocols import Compressor
from tests.model.ggufs import reference, write
from tests.parity.variants import saved

pytestmark = pytest.mark.usefixtures("own_cache")

TEXT = "hello 1234 hell\n  wörld <|start|>x<|user|>"
METHODS: dict[str, Compressor | None] = {
    "dense": None, "int4": GroupInt4(group=32), "int4 rows": GroupInt4(),
    "mixed": GroupInt4(group=32, head="int8", rules={"*.down": {"bits": 8}, "blocks.1.out": "skip"}),
    "int8": LLMInt8(),
}  # fmt: skip


def exported(
    tmp_path: Path, architecture: str, method: str, pre: str = "smollm"
) -> tuple[Path, Path, list[str]]:
    """A directory, the file made of it, and what was said."""
    source = dense = convert_gguf(write(tmp_path / "dense.gguf", reference(architecture), pre=pre))
    if (compressor := METHODS[method]) is not None:
        source = tmp_path / "packed"
        source.mkdir()
        write_compressed(compressor, dense, source, dtype=torch.bfloat16)
    path = tmp_path / "out" / "model.gguf"
    path.parent.mkdir()
    return source, path, write_gguf(source, path)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("group", [32, 64, 0])
@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_are_those_of_ggml(bits: int, group: int, zeros: bool) -> None:
    made = torch.Generator().manual_seed(bits)
    groups = 128 // (group or 128)
    codes = torch.randint(2**bits, (6, 128), generator=made)
    scale = torch.rand(6, groups, generator=made).half()
    zero = torch.randint(2**bits, (6, groups), generator=made) if zeros else None
    linear = GroupIntLinear.from_codes(codes, scale, zero, bits=bits, group=group)
    notes: dict[str, None] = {}
    kind, rows = as_ggml(linear, notes)
    got = torch.from_numpy(gguf.quants.dequantize(rows.numpy(), gguf.GGMLQuantizationType(kind)))
    want, step = linear.unpack().float(), scale.float().repeat_interleave(128 // groups, 1)
    if zeros and (bits <= 4 or bits == 8):
        assert notes
        assert ((got - want).abs() / step).max() < (0.01 if bits <= 4 else 1.5)
    else:
        assert notes == {}
        assert torch.equal(got, want)
    assert rows.shape[1] / 128 == {2: 18, 3: 20, 8: 34}[kind] / 32


def test_other_products_are_rounded_to_bytes() -> None:
    made = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 96, generator=made)
    dense = torch.nn.Linear(96, 5, bias=False)
    dense.weight = torch.nn.Parameter(weight, requires_grad=False)
    int8 = Int8Linear.from_linear(dense)
    odd = GroupIntLinear.from_codes(
        torch.randint(16, (5, 96), generator=made), torch.rand(5, 2, generator=made).half(), bits=4, group=48)
    for linear in (int8, odd):
        notes: dict[str, None] = {}
        kind, rows = as_ggml(linear, notes)
        got = torch.from_numpy(gguf.quants.dequantize(rows.numpy(), gguf.GGMLQuantizationType(kind)))
        want = linear.unpack().float()
        assert len(notes) == 1
        assert kind == gguf.GGMLQuantizationType.Q8_0
        assert (got - want).abs().max() < 0.005 * want.abs().max()


@pytest.mark.parametrize(("architecture", "method"), [
    ("llama", "dense"), ("llama", "int4"), ("llama", "mixed"), ("llama", "int8"),
    ("qwen2", "int4 rows"), ("qwen3", "int4"),
])  # fmt: skip
@torch.no_grad()
def test_transformers_and_axicon_load_the_weights(architecture: str, method: str, tmp_path: Path) -> None:
    source, path, notes = exported(tmp_path, architecture, method)
    ours = checkpoint.load(source)
    back = checkpoint.load(convert_gguf(path))
    config = transformers.AutoConfig.from_pretrained(convert_gguf(path))  # else heads of Qwen3 are 128 wide
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, config=config).state_dict()
    close: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-4} if method == "int8" else {"rtol": 0, "atol": 0}
    shape = ours.shape
    for name, got in back.state_dict().items():
        place = name.rpartition(".")[0]
        module = ours.get_submodule(place)
        want = ours.embed_tokens.weight if place == "lm_head" else ours.state_dict().get(name)
        if isinstance(module, PackedLinear) and place != "lm_head" and name.endswith("weight"):
            want = module.unpack()
        assert want is not None
        step = {"rtol": 1e-2} if method == "int8" else close  # bfloat16 rounds the other way now and then
        assert torch.allclose(got.float(), want.bfloat16().float(), **step)
    for index, block in enumerate(ours.blocks):
        for fused, parts in {"qkv": "self_attn", "gate_up": "mlp"}.items():
            product = getattr(block, fused)
            weight = product.unpack() if isinstance(product, PackedLinear) else product.weight
            for part, rows in shape.blocks[index].parts(fused).items():
                got = theirs[f"model.layers.{index}.{parts}.{part}_proj.weight"]
                assert torch.allclose(got, weight[rows].float(), **close)
    assert any("head is the embedding" in note for note in notes) == (method in ("mixed", "int8"))


@pytest.mark.parametrize("pre", SPLITTINGS)
def test_text_becomes_the_same_tokens(pre: str, tmp_path: Path) -> None:
    source, path, _ = exported(tmp_path, "llama", "dense", pre)
    ours, back = (checkpoint.load_tokenizer(one) for one in (source, convert_gguf(path)))
    assert ours(TEXT)["input_ids"] == back(TEXT)["input_ids"]
    for role in ("bos_token_id", "eos_token_id", "pad_token_id", "chat_template"):
        assert getattr(ours, role) == getattr(back, role)


def test_the_file_says_where_it_comes_from(tmp_path: Path) -> None:
    source, path, _ = exported(tmp_path, "llama", "int4")
    fields = gguf.GGUFReader(path).fields
    assert bytes(fields["general.name"].parts[-1]).decode() == source.name
    assert np.array_equal(fields["llama.block_count"].parts[-1], [2])


@pytest.mark.parametrize("scaling", [
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 8192},
])  # fmt: skip
def test_scaled_positions_and_a_head_of_its_own_come_back(scaling: dict[str, Any], tmp_path: Path) -> None:
    dense = convert_gguf(write(tmp_path / "dense.gguf", reference("llama", tie_word_embeddings=False)))
    source, path = tmp_path / "scaled", tmp_path / "scaled.gguf"
    shutil.copytree(dense, source)
    (source / "manifest.json").unlink()  # it guards the config
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"rope_scaling": scaling}))
    write_gguf(source, path)
    ours, back = checkpoint.load(source), checkpoint.load(convert_gguf(path))
    assert back.shape == ours.shape
    assert all(torch.equal(value, back.state_dict()[name]) for name, value in ours.state_dict().items())


@pytest.mark.parametrize(("variant", "says"), [
    ("opt", "opt cannot be written as GGUF here; known are llama, mistral, qwen2, qwen3"),
    ("mistral_window", "without sliding windows"),
])  # fmt: skip
def test_what_has_no_place_there_is_refused(variant: str, says: str, tmp_path: Path) -> None:
    saved(variant, tmp_path / "dense")
    with pytest.raises(AxiconError, match=says):
        write_gguf(tmp_path / "dense", tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


def test_a_tokenizer_without_a_name_is_refused(tmp_path: Path) -> None:
    source, _, _ = exported(tmp_path, "llama", "dense")
    content = json.loads((source / "tokenizer.json").read_text())
    content["pre_tokenizer"] = {"type": "Whitespace"}
    (source / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(AxiconError, match="split text as gpt-2, smollm, qwen2, llama-bpe do"):
        write_gguf(source, tmp_path / "second.gguf")
