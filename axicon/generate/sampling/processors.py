"""Bias, bans and penalties of one request: what happens to logits before the temperature.

Presence and frequency penalties count generated tokens; the repetition penalty (Keskar et al.,
arXiv:1909.05858, section 4.1) looks at the prompt too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from axicon.generate.request import SamplingParams


class LogitProcessor:
    """Holds the counts that penalties need. `active` is False where logits pass unchanged, which costs
    nothing.

    banned: token ids that may not come before `min_tokens` tokens are there.
    """

    def __init__(
        self, params: SamplingParams, prompt: Sequence[int], vocab: int, banned: Sequence[int] = ()
    ) -> None:
        self._params = params
        self._generated = 0
        self._banned = torch.tensor(list(banned), dtype=torch.int64)
        self._bias_ids = torch.tensor(list(params.logit_bias), dtype=torch.int64)
        self._bias = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32)
        self._counts_V: Tensor | None = None
        self._prompt_V: Tensor | None = None
        self._repetition = params.repetition_penalty != 1.0
        if params.presence_penalty or params.frequency_penalty or self._repetition:
            self._counts_V = torch.zeros(vocab)
        if self._repetition:
            self._prompt_V = torch.zeros(vocab, dtype=torch.bool)
            self._prompt_V[torch.tensor(list(prompt))] = True

    @property
    def active(self) -> bool:
        return bool(len(self._bias_ids)) or self._counts_V is not None or self._bans

    @property
    def _bans(self) -> bool:
        return self._generated < self._params.min_tokens and len(self._banned) > 0

    def record(self, token: int) -> None:
        """A token was generated."""
        self._generated += 1
        if self._counts_V is not None:
            self._counts_V[token] += 1

    def apply(self, logits_V: Tensor) -> Tensor:
        """Processed copy of float32 (V,) logits."""
        logits_V = logits_V.clone()
        if len(self._bias_ids):
            logits_V[self._bias_ids] += self._bias
        if self._bans:
            logits_V[self._banned] = -torch.inf
        if self._counts_V is None:
            return logits_V
        seen_V = self._counts_V > 0
        if self._prompt_V is not None:
            penalty = self._params.repetition_penalty
            scaled_V = torch.where(logits_V > 0, logits_V / penalty, logits_V * penalty)
            logits_V = torch.where(seen_V | self._prompt_V, scaled_V, logits_V)
        logits_V -= self._params.frequency_penalty * self._counts_V
        logits_V -= self._params.presence_penalty * seen_V
        return logits_V
