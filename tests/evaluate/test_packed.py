"""Packed texts through a real decoder: each text as if it were alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from axicon.errors import AxiconError
from axicon.evaluate import perplexity
from axicon.evaluate.packed import hidden_states
from axicon.model.decoder import Decoder
from axicon.model.shape import ModelShape

SMALL = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "vocab_size": 97,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**SMALL, "model_type": "llama", "intermediate_size": 48, "num_key_value_heads": 2},
    "sliding": {
        **SMALL,
        "model_type": "mistral",
        "intermediate_size": 48,
        "num_key_value_heads": 2,
        "sliding_window": 7,
    },
    "opt": {**SMALL, "model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 32},
}


@pytest.fixture(params=list(CONFIGS))
def decoder(request: pytest.FixtureRequest) -> Decoder:
    torch.manual_seed(0)
    return Decoder(ModelShape.from_config(CONFIGS[request.param])).eval()


@torch.inference_mode()
def test_packed_texts_do_not_see_each_other(decoder: Decoder) -> None:
    texts = [torch.randint(97, (length,)).tolist() for length in (5, 1, 33, 64, 12)]
    logits_NV = decoder.head(hidden_states(decoder, texts))
    parts = torch.split(logits_NV, [len(text) for text in texts])
    for text, logits_TV in zip(texts, parts, strict=True):
        alone = decoder.logits(torch.tensor([text]))[0]
        torch.testing.assert_close(logits_TV, alone, atol=1e-5, rtol=1e-5)


def test_a_token_the_model_does_not_have_is_refused(decoder: Decoder) -> None:
    with pytest.raises(AxiconError, match="token id 97, the model has 97 tokens: the tokenizer belongs to"):
        hidden_states(decoder, [[1, 2], [97]])


@torch.inference_mode()
def test_perplexity_is_that_of_the_dense_path(decoder: Decoder) -> None:
    ids = torch.randint(97, (200,))
    windows = ids[: 4 * 48].view(4, 48)
    losses = [F.cross_entropy(decoder.logits(window[None])[0, :-1], window[1:]).item() for window in windows]
    expected = math.exp(sum(losses) / 4)

    def tokenizer(text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": ids.tolist()}

    for batch in (1, 3):
        assert perplexity(decoder, tokenizer, "-", window=48, batch=batch).value == pytest.approx(
            expected, rel=1e-5
        )
