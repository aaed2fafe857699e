"""Small problems whose answers are known, and a small decoder to finetune."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from axicon.data.batch import Batch
from axicon.data.tokenised import Example, Row, Tokenised
from axicon.model.decoder import Decoder
from axicon.model.shape import ModelShape

LLAMA = {
    "model_type": "llama", "vocab_size": 64, "num_hidden_layers": 2, "hidden_size": 32,
    "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip
OPT = {
    "model_type": "opt", "vocab_size": 64, "num_hidden_layers": 2, "hidden_size": 32, "ffn_dim": 48,
    "num_attention_heads": 4, "max_position_embeddings": 64, "word_embed_proj_dim": 32,
}  # fmt: skip


def decoder(config: dict[str, Any] | None = None) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(ModelShape.from_config(config or LLAMA)).requires_grad_(False)
    return model.eval()


def source(batch: int = 4, seed: int = 0) -> Tokenised:
    """Rows of 3 to 9 tokens, the last of which is scored."""
    generator = torch.Generator().manual_seed(5)
    examples = []
    for i in range(12):
        tokens = torch.randint(0, 64, (3 + i % 7,), generator=generator).tolist()
        examples.append(Example((Row(tuple(tokens), (False,) * (len(tokens) - 1) + (True,)),)))
    return Tokenised(examples, batch_size=batch, seed=seed)


class Vectors(nn.Module):
    """Parameters of a function, without a model around them."""

    def __init__(self, *sizes: int, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        for i, size in enumerate(sizes):
            self.register_parameter(
                f"x{i}", nn.Parameter(torch.randn(size, generator=generator, dtype=torch.float64).to(dtype))
            )

    def flat(self) -> Tensor:
        return torch.cat(list(self.parameters()))


@dataclass(frozen=True)
class Quadratic:
    """x^T H x / 2 with eigenvalues from `least` to 1; the batch says nothing."""

    least: float = 0.1

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        assert isinstance(model, Vectors)
        x = model.flat()
        h = torch.linspace(self.least, 1.0, len(x), dtype=x.dtype)
        return (0.5 * (h * x * x).sum()).expand(len(batch))


def empty(size: int = 4) -> Batch:
    """Examples that say nothing."""
    tokens = torch.zeros(size, 2, dtype=torch.int64)
    return Batch(input_ids=tokens, mask=tokens == 0, labels=tokens)


class Nothing:
    def batch(self, step: int) -> Batch:
        return replace(empty())
