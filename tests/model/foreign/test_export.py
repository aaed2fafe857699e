"""What we write as compressed-tensors: loaded by transformers with that package, and read back here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from axicon.compress.directory import write_compressed
from axicon.compress.group_int4 import GroupInt4
from axicon.compress.llm_int8 import LLMInt8
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
}


def exported(tmp_path: Path, method: str, variant: str) -> tuple[Path, Path]:
    source, folder = tmp_path / "packed", tmp_path / "out"
    saved(variant, tmp_path / "dense")
    source.mkdir()
    folder.mkdir()
    write_compressed(METHODS[method], tmp_path / "dense", source, dtype=torch.float32)
    export(source, folder)
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


@pytest.mark.parametrize(("method", "variant"), [("int4", "llama_biases"), ("int8", "neox")])
@torch.no_grad()
def test_what_is_written_is_read_back(method: str, variant: str, tmp_path: Path) -> None:
    source, folder = exported(tmp_path, method, variant)
    ours, back = (checkpoint.load(one, dtype=torch.float32) for one in (source, folder))
    seen = 0
    for path, module in back.named_modules():
        if isinstance(module, PackedLinear):
            want = ours.get_submodule(path).unpack()
            torch.testing.assert_close(module.unpack(), want, rtol=2**-22 if method == "int8" else 0, atol=0)
            seen += 1
    assert seen >= 3 * 4
    form = json.loads((folder / "config.json").read_text())["quantization_config"]["format"]
    assert form == ("int-quantized" if method == "int8" else "pack-quantized")


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    saved("opt", tmp_path / "dense")
    (tmp_path / "out").mkdir()
    with pytest.raises(AxiconError, match="is not compressed"):
        export(tmp_path / "dense", tmp_path / "out")
