"""Causal attention over several texts laid end to end, without padding and without a cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from axicon.errors import AxiconError
from axicon.model.decoder import Attend, packed_attend


class LanguageModel(Protocol):
    """What is asked of a `Decoder` here: hidden states of packed rows, and logits of chosen rows."""

    @property
    def device(self) -> torch.device: ...

    def __call__(self, tokens_N: Tensor, positions_N: Tensor, attend: Attend) -> Tensor: ...

    def head(self, x_ND: Tensor) -> Tensor: ...


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
    return model(tokens_N, positions_N, packed_attend(lengths))
