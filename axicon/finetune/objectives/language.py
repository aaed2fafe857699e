"""Language modelling: the mean negative log-likelihood of an example's scored tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from axicon.data.batch import Batch
from axicon.finetune.scored import mean_log_probs, scored


@dataclass(frozen=True, kw_only=True)
class Language:
    """For plain text and chats, where every example is one row."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """float32 (B,) in nats per token. Raises ValueError for examples of several rows."""
        if batch.options != 1:
            raise ValueError(f"examples of {batch.options} rows: they are texts to choose from")
        return -mean_log_probs(model, scored(model, batch), len(batch))
