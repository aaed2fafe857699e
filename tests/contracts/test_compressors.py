"""What every compressor promises, over the table of methods."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from axicon.compress import COMPRESSORS
from axicon.compress.calibration import Calibration
from axicon.compress.directory import compress_blocks, write_calibrated, write_compressed
from axicon.compress.walk import compress
from axicon.compress.work import Work
from axicon.model import checkpoint
from axicon.model.artefact import write_json
from axicon.model.decoder import Decoder
from axicon.model.formats import packing_of
from axicon.model.masks import kept
from axicon.model.packed import PackedLinear
from axicon.model.shape import ModelShape
from axicon.model.tensorwriter import write_weights
from axicon.model.weights import stored_tensors
from tests.contracts.methods import PRUNED, made

SIZES = {"vocab_size": 160, "num_hidden_layers": 2, "hidden_size": 128, "max_position_embeddings": 64}
CONFIGS = {
    "llama": SIZES | {"model_type": "llama", "intermediate_size": 256, "num_attention_heads": 4,
                      "num_key_value_heads": 2, "tie_word_embeddings": True},
    "opt": SIZES | {"model_type": "opt", "ffn_dim": 256, "num_attention_heads": 4,
                    "word_embed_proj_dim": 128},
}


SAMPLE = Calibration(torch.randint(0, 160, (8, 32), generator=torch.Generator().manual_seed(3)))
"""For methods that look at data; the others do not see it."""


GENTLE: dict[str, dict[str, Any]] = {
    **{method: {"sparsity": 0.02} for method in ("magnitude", "sparse_gpt", "wanda")},
    "slice_gpt": {"fraction": 0.01, "round_to": 1},
}
"""Of methods whose defaults change a random model more than a little."""


def decoder(family: str) -> Decoder:
    torch.manual_seed(0)
    return Decoder(ModelShape.from_config(CONFIGS[family])).requires_grad_(False)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("method", COMPRESSORS)
class TestEveryCompressor:
    def test_stays_near_the_dense_model(self, method: str, family: str) -> None:
        dense = decoder(family)
        tokens = torch.randint(0, 160, (2, 32), generator=torch.Generator().manual_seed(1))
        want = dense.logits(tokens)
        one = made(method, **GENTLE.get(method, {}))
        got = compress(one, copy.deepcopy(dense), SAMPLE).logits(tokens)
        assert not torch.equal(got, want)
        # What is packed sparse, or repaired, is pruned before, by its half.
        assert (got - want).norm() / want.norm() < (0.5 if method in PRUNED else 0.05)

    def test_forward_equals_unpack(self, method: str, family: str) -> None:
        model = compress(made(method), decoder(family), SAMPLE)
        packed = [m for m in model.modules() if isinstance(m, PackedLinear)]
        pruned = [m for m in model.modules() if kept(m) is not None]
        assert packed or pruned or model.shape != ModelShape.from_config(CONFIGS[family])
        for module in packed:
            x = torch.randn(4, module.inputs, generator=torch.Generator().manual_seed(2))
            want = nn.functional.linear(x, module.unpack(), module.bias)
            assert (module(x) - want).norm() / want.norm() < 0.02

    @pytest.mark.usefixtures("own_cache")
    def test_survives_save_and_load(self, method: str, family: str, tmp_path: Path) -> None:
        dense, folder = tmp_path / "dense", tmp_path / "small"
        dense.mkdir()
        folder.mkdir()
        write_weights(dense, stored_tensors(decoder(family)))
        write_json(dense / "config.json", CONFIGS[family])
        if made(method).needs_inputs:
            work = Work(tmp_path / "work", {})
            compress_blocks(made(method), dense, work, SAMPLE, dtype=torch.bfloat16, on_disk=True)
            write_calibrated(dense, folder, work, dtype=torch.bfloat16)
        else:
            write_compressed(made(method), dense, folder, dtype=torch.bfloat16)
        want = compress(made(method), checkpoint.load(dense), SAMPLE)
        got = checkpoint.load(folder, masks=True)
        assert packing_of(got) == packing_of(want)
        assert got.state_dict().keys() == want.state_dict().keys()
        assert all(torch.equal(value, want.state_dict()[name]) for name, value in got.state_dict().items())
        tokens = torch.randint(0, 160, (2, 32), generator=torch.Generator().manual_seed(1))
        assert torch.equal(got.logits(tokens), want.logits(tokens))

    def test_leaves_the_embedding_alone(self, method: str, family: str) -> None:
        dense = decoder(family)
        model = compress(made(method), copy.deepcopy(dense), SAMPLE)
        assert torch.equal(model.embed_tokens.weight, dense.embed_tokens.weight)
