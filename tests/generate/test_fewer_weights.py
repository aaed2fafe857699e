"""Sliced and sparse models through the runner and its cache: the text of the same model computed whole, and
sliced ones through the C++ step.
"""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from axicon.compress.calibration import Calibration
from axicon.compress.chain import Chain
from axicon.compress.llm_int8 import LLMInt8
from axicon.compress.magnitude import Magnitude
from axicon.compress.slice_gpt import SliceGPT
from axicon.compress.tiled_sparse import TiledSparse
from axicon.compress.walk import compress
from axicon.generate.runner import LocalRunner
from axicon.model.decoder import Decoder
from axicon.model.native import why_not
from axicon.model.shape import ModelShape

TEXT = torch.randint(0, 96, (40,), generator=torch.Generator().manual_seed(9)).tolist()
CHUNKS = (16, 11, *(1,) * 13)
SIZES = {"vocab_size": 96, "num_hidden_layers": 3, "hidden_size": 64, "max_position_embeddings": 64,
         "num_attention_heads": 4, "tie_word_embeddings": True}  # fmt: skip
CONFIGS = {
    "llama": SIZES | {"model_type": "llama", "intermediate_size": 96, "num_key_value_heads": 2},
    "opt": SIZES | {"model_type": "opt", "ffn_dim": 96, "word_embed_proj_dim": 64},
}
METHODS = {
    "sliced": SliceGPT(fraction=0.25, tie="project", max_size_ratio=9.0),
    "sparse": Chain(("magnitude", "tiled_sparse"), (Magnitude(sparsity=0.6), TiledSparse())),
}


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_chunks_and_decode_equal_whole_sequences(family, method, make_step):
    torch.manual_seed(0)
    dense = Decoder(ModelShape.from_config(CONFIGS[family])).requires_grad_(False).eval()
    sample = Calibration(torch.tensor([TEXT, TEXT[::-1]]))
    model = compress(METHODS[method], dense, sample)
    want = model.logits(torch.tensor([TEXT]))[0]
    runner = LocalRunner(model, kv_bytes=8 << 20, max_rows=4, prefill_chunk=16)
    out, start, commits = [], 0, ()
    for size in CHUNKS:
        nodes = [(TEXT[start + i], start + i, 0, i - 1) for i in range(size)]
        reserves = () if start else ((0, 64),)
        step = make_step(nodes, forced=size > 1, commits=commits, reserves=reserves)
        out.append(runner.forward(step).logits_WV)
        start, commits = start + size, tuple(range(size))
    torch.testing.assert_close(torch.cat(out), want, atol=1e-4, rtol=0)


def made(family, method):
    """With heads of 32 channels, in bfloat16, weights and biases far from their initial values."""
    heads = {"num_attention_heads": 2} | ({"num_key_value_heads": 1} if family == "llama" else {})
    torch.manual_seed(0)
    model = Decoder(ModelShape.from_config(CONFIGS[family] | heads)).requires_grad_(False).eval()
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    return compress(method, model, Calibration(torch.tensor([TEXT, TEXT[::-1]]))).bfloat16()


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("tie", ["project", "untie"])
@pytest.mark.parametrize("then", [None, LLMInt8()])
@torch.no_grad()
def test_sliced_models_run_in_the_kernels(family, tie, then, make_step):
    """Nearer to exact arithmetic than torch is, rows alone and in chunks, with equal bits."""
    model = made(family, SliceGPT(fraction=0.25, tie=tie, max_size_ratio=9.0, round_to=16))
    if then is not None:
        compress(then, model)
    exact = copy.deepcopy(model).float().logits(torch.tensor([TEXT]))[0]
    torch_error = (model.logits(torch.tensor([TEXT]))[0] - exact).norm()
    runner = LocalRunner(model, kv_bytes=8 << 20, max_rows=64, prefill_chunk=64, kernels="native")
    nodes = [(token, i, 0, i - 1) for i, token in enumerate(TEXT)]
    whole = runner.forward(make_step(nodes, forced=True, reserves=((0, 64),))).logits_WV
    assert (whole - exact).norm() < torch_error
    assert torch.equal(through_the_cache(runner, make_step, row=1), whole)


def through_the_cache(runner, make_step, row=0):
    """Logits of all tokens of the text."""
    out, start, commits = [], 0, {}
    for size in CHUNKS:
        nodes = [(TEXT[start + i], start + i, row, i - 1) for i in range(size)]
        opened = {} if start else {"reserves": ((row, 64),), "releases": tuple(runner.cache.rows)}
        out.append(runner.forward(make_step(nodes, forced=size > 1, **commits, **opened)).logits_WV)
        start, commits = start + size, {"commits": tuple(range(size))}
    return torch.cat(out)


@pytest.mark.parametrize(("change", "reason"), [
    ({"mlp_shortcut": False}, "only some of its residuals have shortcuts"),
    ({"width_out": 48}, "its stream changes its width without shortcuts"),
])  # fmt: skip
def test_other_shapes_stay_in_torch(change, reason):
    shape = made("llama", SliceGPT(fraction=0.25, tie="project", max_size_ratio=9.0, round_to=16)).shape
    if "width_out" in change:
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
        shape = ModelShape.from_config(CONFIGS["llama"] | heads)
        change = change | {"mlp_shortcut": False}
    blocks = (*shape.blocks[:-1], dataclasses.replace(shape.blocks[-1], **change))
    odd = dataclasses.replace(shape, blocks=blocks, head_width=blocks[-1].width_out)
    with torch.device("meta"):
        assert why_not(Decoder(dataclasses.replace(odd, tie_head=False))) == reason


@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_the_kernels_run_sparse_weights_as_the_dense_ones_they_are(family, make_step):
    logits, kinds = [], []
    for method in (METHODS["sparse"], Magnitude(sparsity=0.6)):
        model = made(family, method)
        runner = LocalRunner(model, kv_bytes=8 << 20, max_rows=64, prefill_chunk=64, kernels="native")
        nodes = [(token, i, 0, i - 1) for i, token in enumerate(TEXT)]
        logits.append(runner.forward(make_step(nodes, forced=True, reserves=((0, 64),))).logits_WV)
        kinds.append(runner.describe()["format"])
    assert torch.equal(*logits)
    assert kinds[0] == ["bfloat16", "tiled_sparse"]
    assert kinds[1] == ["bfloat16"]


def test_sparse_weights_of_other_dtypes_stay_in_torch():
    model = made("llama", METHODS["sparse"]).float()
    assert why_not(model) == "blocks.0.qkv has values of float32, not bfloat16"
    with torch.no_grad():
        runner = LocalRunner(model, kv_bytes=8 << 20, max_rows=4, prefill_chunk=16)
    assert runner.describe()["format"] == ["float32", "tiled_sparse"]
