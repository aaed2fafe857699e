"""A node of a draft tree has, bit for bit, the logits of a step that computes its path alone."""

from __future__ import annotations

import pytest
import torch

from axicon.compress.llm_int8 import LLMInt8
from axicon.compress.walk import Compress
from axicon.generate.runner import LocalRunner
from axicon.kernels import native
from axicon.model.decoder import Decoder
from axicon.model.shape import ModelShape

CONFIG = {
    "model_type": "llama", "vocab_size": 160, "hidden_size": 96, "num_hidden_layers": 3,
    "intermediate_size": 160, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32,
    "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def runner():
    try:
        native.library()
    except native.Unavailable as reason:
        pytest.skip(f"no CPU kernels here: {reason}")
    torch.manual_seed(0)
    decoder = Decoder(ModelShape.from_config(CONFIG)).requires_grad_(False)
    for parameter in decoder.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 0.3)
    # In int8 the scale of a row shows a last bit that rounding to bfloat16 would mostly hide.
    decoder = Compress(LLMInt8())(decoder.to(torch.bfloat16))
    return LocalRunner(decoder, kv_bytes=8 << 20, max_rows=8, kernels="native")


@pytest.mark.parametrize("length", [1, 13, 14, 15, 16, 31, 70])
def test_the_bits_of_a_tree_are_those_of_its_paths(runner, make_step, length):
    """Prompts end at different places of the blocks of 16 slots that attention sums by."""
    torch.manual_seed(length)
    prompt = [(token, i, 0, i - 1) for i, token in enumerate(torch.randint(160, (length,)).tolist())]
    parents = [-1, 0, 0, 0, 1, 1, 2, 4, 4, 5, 7, 8]
    tokens = torch.randint(160, (len(parents),)).tolist()
    depths = []
    for parent in parents:
        depths.append(depths[parent] + 1 if parent >= 0 else 0)
    tree = [(tokens[i], length + depths[i], 0, parents[i]) for i in range(len(parents))]
    committed = tuple(range(length))
    try:
        runner.forward(make_step(prompt, forced=True, reserves=((0, 128),)))
        found = runner.forward(make_step(tree, commits=committed)).logits_WV
        for leaf in range(len(parents)):
            path = [leaf]
            while parents[path[0]] >= 0:
                path.insert(0, parents[path[0]])
            nodes = [(tokens[i], length + d, 0, d - 1) for d, i in enumerate(path)]
            alone = runner.forward(make_step(nodes)).logits_WV
            assert torch.equal(alone, found[path]), f"path {path}"
        # What is committed out of a tree has the bits of a chain, too.
        runner.forward(make_step(tree))
        after = runner.forward(make_step([(7, length + 5, 0, -1)], commits=(0, 1, 4, 7, 10))).logits_WV
        runner.forward(make_step(releases=(0,)))
        runner.forward(make_step(prompt, forced=True, reserves=((0, 128),)))
        chain = [(tokens[i], length + d, 0, d - 1) for d, i in enumerate((0, 1, 4, 7, 10))]
        runner.forward(make_step(chain, commits=committed))
        want = runner.forward(make_step([(7, length + 5, 0, -1)], commits=(0, 1, 2, 3, 4))).logits_WV
        assert torch.equal(after, want)
    finally:
        runner.forward(make_step(releases=(0,)))
