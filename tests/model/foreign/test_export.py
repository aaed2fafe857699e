"""What we write as compressed-tensors: loaded by transformers with that package, and read back here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from axicon.compress.calibration import Calibration
from axicon.compress.directory import compress_blocks, write_calibrated, write_compressed
from axicon.compress.gptq import GPTQ
from axicon.compress.group_int4 import GroupInt4
from axicon.compress.llm_int8 import LLMInt8
from axicon.compress.work import Work
from axicon.errors import AxiconError
from axicon.model import checkpoint
from axicon.model.foreign.export import compressed_tensors as export
from axicon.model.packed import PackedLinear
from axicon.protocols import Compressor
from tests.parity.variants import saved

METHODS: dict[str, Compressor] = {
    "int8": LLMInt8(head=False),
    "int8 head": LLMInt8(),
    "int4": GroupInt4(group=16),
    "int4 zeros": GPTQ(group=16, act_order=True, static_groups=True),
    "mixed": GroupInt4(rules={"*.down": {"bits": 8}, "blocks.1.out": "skip"}),
}


def exported(
    tmp_path: Path, method: str, variant: str, dtype: torch.dtype = torch.float32, **options: bool
) -> tuple[Path, Path]:
    source, folder, compressor = tmp_path / "packed", tmp_path / "out", METHODS[method]
    saved(variant, tmp_path / "dense")
    source.mkdir()
    folder.mkdir()
    if compressor.needs_inputs:
        sample = torch.randint(0, 97, (4, 24), generator=torch.Generator().manual_seed(1))
        work = Work(tmp_path / "work", {})
        compress_blocks(
            compressor, tmp_path / "dense", work, Calibration(sample), dtype=dtype, on_disk=False)
        write_calibrated(tmp_path / "dense", source, work, dtype=dtype)
    else:
        write_compressed(compressor, tmp_path / "dense", source, dtype=dtype)
    export(source, folder, **options)
    return source, folder


@pytest.mark.parametrize("variant", ["llama_tied", "llama_biases", "opt", "neox"])
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_transformers_computes_what_our_dequantised_weights_do(
    method: str, variant: str, tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors", reason="`make setup` installs compressed-tensors")
    source, folder = exported(tmp_path, method, variant)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = dense(source)
    tokens = torch.arange(20)[None]
    torch.testing.assert_close(theirs(tokens).logits, ours.logits(tokens), atol=1e-4, rtol=0)
    ids = theirs.generate(
        tokens[:, 5:10], max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    mine = tokens[:, 5:10]
    for _ in range(20):
        mine = torch.cat([mine, ours.logits(mine)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(ids, mine)


def dense(folder: Path) -> torch.nn.Module:
    """Our model with every product multiplied by the weight that it stands for, a tied head by the embedding.
    """
    model = checkpoint.load(folder, dtype=torch.float32)
    for path, module in list(model.named_modules()):
        if isinstance(module, PackedLinear):
            linear = torch.nn.Linear(module.inputs, module.outputs, bias=module.bias is not None)
            tied = path == "lm_head" and model.shape.tie_head
            linear.weight.copy_(model.embed_tokens.weight if tied else module.unpack())
            if module.bias is not None:
                linear.bias.copy_(module.bias)
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, linear)
    return model


@pytest.mark.parametrize("method", ["int8", "int4", "int4 zeros"])
@torch.no_grad()
def test_bfloat16_is_equal_within_its_rounding(method: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="`make setup` installs compressed-tensors")
    source, folder = exported(tmp_path, method, "llama_tied", torch.bfloat16)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    tokens = torch.arange(20)[None]
    wanted = dense(source).logits(tokens)
    # 8 bits of a mantissa: twenty steps of the grid for three blocks.
    near = float(wanted.max()) * 20 / 512
    torch.testing.assert_close(theirs(tokens).logits.float(), wanted, rtol=0, atol=near)


@pytest.mark.parametrize(("method", "variant", "form", "options"), [
    ("int4", "llama_biases", "pack-quantized", {}),
    ("int8", "neox", "int-quantized", {}),
    ("int4 zeros", "llama_biases", "int-quantized", {}),
    ("int4 zeros", "neox", "pack-quantized", {"packed_zeros": True}),
    ("mixed", "opt", "mixed-precision", {}),
])  # fmt: skip
@torch.no_grad()
def test_what_is_written_is_read_back(
    method: str, variant: str, form: str, options: dict[str, bool], tmp_path: Path
) -> None:
    source, folder = exported(tmp_path, method, variant, **options)
    ours, back = (checkpoint.load(one, dtype=torch.float32) for one in (source, folder))
    seen = 0
    for path, module in back.named_modules():
        if isinstance(module, PackedLinear):
            want = ours.get_submodule(path).unpack()
            torch.testing.assert_close(module.unpack(), want, rtol=2**-22 if method == "int8" else 0, atol=0)
            seen += 1
    assert seen >= 3 * 4 - (method == "mixed")
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["format"] == form


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    saved("opt", tmp_path / "dense")
    (tmp_path / "out").mkdir()
    with pytest.raises(AxiconError, match="is not compressed"):
        export(tmp_path / "dense", tmp_path / "out")
