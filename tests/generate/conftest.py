"""Tiny random models for the engine's tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from axicon.generate.runner import LocalRunner
from axicon.model.decoder import Decoder
from axicon.model.shape import ModelShape
from axicon.step import StepInput

VOCAB = 96


def llama(dtype: torch.dtype = torch.float64, seed: int = 0, **config: object) -> Decoder:
    """2 layers, 6 query heads in 2 groups, 96 tokens; large weights, so that greedy text does not repeat."""
    shape = ModelShape.from_config(
        {
            "model_type": "llama", "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 64,
            "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2,
            "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1,
            "tie_word_embeddings": False, **config,
        }
    )  # fmt: skip
    torch.manual_seed(seed)
    decoder = Decoder(shape)
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 2.0 / parameter.shape[1] ** 0.5)
    return decoder.to(dtype).eval()


@pytest.fixture(scope="session")
def make_decoder() -> Callable[..., Decoder]:
    return llama


@pytest.fixture(scope="session")
def decoder64() -> Decoder:
    return llama()


@pytest.fixture
def runner64(decoder64: Decoder) -> LocalRunner:
    return LocalRunner(decoder64, kv_bytes=8 << 20, max_rows=8, prefill_chunk=16)


Node = tuple[int, int, int, int]


@pytest.fixture(scope="session")
def make_step() -> Callable[..., StepInput]:
    def step(nodes: Sequence[Node] = (), forced: bool = False, **lists: object) -> StepInput:
        """A step from (token, position, row, parent) nodes, all of whose logits are wanted."""
        columns = [torch.tensor([node[i] for node in nodes], dtype=torch.int64) for i in range(4)]
        flag = torch.ones(len(nodes), dtype=torch.bool)
        return StepInput(*columns, flag, torch.zeros(len(nodes), dtype=torch.int64), flag & forced, **lists)

    return step


class Letters:
    """One character per token, none special."""

    all_special_ids = ()

    def decode(self, token_ids, *, skip_special_tokens, clean_up_tokenization_spaces):
        return "".join(chr(64 + i) for i in token_ids)


@pytest.fixture(scope="session")
def letters() -> Letters:
    return Letters()
