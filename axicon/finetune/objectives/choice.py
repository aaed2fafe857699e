"""Choosing: the answer of a prompted task, which alone is scored.

The two training losses of MeZO (arXiv:2305.17333) and the zeroth-order benchmark (arXiv:2402.11592): over the
vocabulary, the answer's own likelihood, per token where it is a text; over the choices, the cross entropy of
those likelihoods. An answer that is a word is told by its first token. Both predict alike, by the likeliest.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from axicon.data.batch import Batch
from axicon.finetune.scored import mean_log_probs, scored


@dataclass(frozen=True, kw_only=True)
class Choice:
    over: Literal["vocabulary", "choices"] = "vocabulary"
    """What the answer's likelihood is one among."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """float32 (B,). Raises ValueError for examples without an answer."""
        if batch.answer is not None and self.over == "vocabulary" and batch.options > 1:
            # The other texts have no part in it.
            return -mean_log_probs(model, scored(model, _answers(batch, batch.answer)), len(batch))
        return self.judge(model, batch)[0]

    def judge(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss (B,), and the index (B,) of what the model would answer, from one pass."""
        if batch.answer is None:
            raise ValueError("examples without an answer: there is nothing to choose")
        likelihoods_B, scores_BC = _scores(model, batch, batch.answer)
        if self.over == "choices":
            likelihoods_B = -F.cross_entropy(scores_BC, batch.answer, reduction="none")
        return -likelihoods_B, scores_BC.argmax(1)


def _scores(model: nn.Module, batch: Batch, answer_B: Tensor) -> tuple[Tensor, Tensor]:
    """float32: log-likelihood (B,) of each answer, and of each choice (B, C) its logit if it is a token, its
    mean log-likelihood if it is a text."""
    found = scored(model, batch)
    if batch.choices is None:
        scores_BC = mean_log_probs(model, found, len(batch.labels)).view(len(batch), batch.options)
        return scores_BC.gather(1, answer_B[:, None])[:, 0], scores_BC
    if len(found.rows_S) != len(batch):
        raise ValueError("an answer that is a token has one scored token")
    logits_BV: Tensor = model.head(found.states_SD).float()  # type: ignore[operator]
    return -F.cross_entropy(logits_BV, found.targets_S, reduction="none"), logits_BV[:, batch.choices]


def _answers(batch: Batch, answer_B: Tensor) -> Batch:
    """Of each example, the row that is the answer."""
    rows_B = torch.arange(len(batch), device=answer_B.device) * batch.options + answer_B
    return replace(
        batch,
        input_ids=batch.input_ids[rows_B],
        mask=batch.mask[rows_B],
        labels=batch.labels[rows_B],
        options=1,
    )
