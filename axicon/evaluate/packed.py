"""Causal attention over several texts laid end to end, without padding and without a cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from axicon.errors import AxiconError
from axicon.model.attention import dense_attention
from axicon.model.decoder import Attend, Block


class LanguageModel(Protocol):
    """What is asked of a `Decoder` here: hidden states of packed rows, and logits of chosen rows."""

    @property
    def device(self) -> torch.device: ...

    def __call__(self, tokens_N: Tensor, positions_N: Tensor, attend: Attend) -> Tensor: ...

    def head(self, x_ND: Tensor) -> Tensor: ...


class PackedCausal:
    """An `Attend`: the N rows of a pass are texts of the given lengths, one after the other.

    Each text attends causally to itself alone, within the block's sliding window if it has one.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = list(lengths)

    def __call__(self, block: Block, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> Tensor:
        parts = zip(*(torch.split(x[None], self.lengths, 1) for x in (q_NHK, k_NGK, v_NGK)), strict=True)
        return torch.cat([dense_attention(q, k, v, block.scale, block.window)[0] for q, k, v in parts])


def hidden_states(model: LanguageModel, texts: Sequence[Sequence[int]]) -> Tensor:
    """(N, D) of all tokens of all texts, in one pass. Raises AxiconError for a token the model has not."""
    vocab, most = getattr(getattr(model, "shape", None), "vocab", None), max(map(max, texts))
    if vocab is not None and most >= vocab:
        raise AxiconError(
            f"token id {most}, the model has {vocab} tokens: the tokenizer belongs to another model"
        )
    lengths = [len(text) for text in texts]
    tokens_N = torch.tensor([token for text in texts for token in text], device=model.device)
    positions_N = torch.cat([torch.arange(length) for length in lengths]).to(model.device)
    return model(tokens_N, positions_N, PackedCausal(lengths))
