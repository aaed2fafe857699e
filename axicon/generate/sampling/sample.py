"""One token per row of a step: the batch-wide part of sampling, and log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from axicon.generate.request import SamplingParams, TokenLogprob
from axicon.generate.sampling.processors import LogitProcessor
from axicon.generate.sampling.truncation import truncate, truncates
from axicon.protocols import Draw, Sampler

UNLIKELY = -9999.0
"""Log-probability reported for what cannot be, as minus infinity has no place in JSON."""


@dataclass(frozen=True, slots=True)
class Row:
    """How one row of logits becomes a token."""

    params: SamplingParams
    processor: LogitProcessor
    draw: Draw


@torch.inference_mode()
def sample(logits_RV: Tensor, rows: Sequence[Row], sampler: Sampler) -> list[int | None]:
    """Token ids; None for a row whose logits hold a NaN or leave no token to choose."""
    tokens: list[int | None] = [None] * len(rows)
    greedy = [i for i, row in enumerate(rows) if row.params.temperature == 0 and not row.processor.active]
    if greedy:
        # The maximum of a row with a NaN is the NaN, which shows that the row is bad.
        best_R, ids_R = (logits_RV if len(greedy) == len(rows) else logits_RV[greedy]).max(-1)
        for i, token, good in zip(greedy, ids_R.tolist(), best_R.isfinite().tolist(), strict=True):
            tokens[i] = token if good else None
    for i in set(range(len(rows))).difference(greedy):
        tokens[i] = _one(logits_RV[i], rows[i], sampler)
    return tokens


def _one(logits_V: Tensor, row: Row, sampler: Sampler) -> int | None:
    """Row by row, as a row and what is made of it fit into the cache of a core and a batch does not."""
    if row.processor.active:
        logits_V = row.processor.apply(logits_V)
    best = logits_V.amax()
    if not best.isfinite():
        return None
    if row.params.temperature == 0:
        return int(logits_V.argmax())
    probs_V = logits_V.sub(best)
    if row.params.temperature != 1:
        probs_V.div_(row.params.temperature)
    probs_V = probs_V.softmax(-1)
    if truncates(row.params):
        probs_C, ids_C = truncate(probs_V, row.params)
    else:
        probs_C, ids_C = probs_V, torch.arange(len(probs_V))
    return int(sampler.choose(probs_C[None], ids_C[None], [row.draw]))


@torch.inference_mode()
def logprobs(logits_RV: Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprob]:
    """Log-probability of each row's token and its `top` best alternatives, from raw logits.

    Raises ValueError where the logits hold a NaN.
    """
    logprobs_RV = logits_RV.log_softmax(-1).clamp_(min=UNLIKELY)
    if logprobs_RV.isnan().any():
        raise ValueError("log-probabilities that are not numbers")
    chosen = logprobs_RV.gather(1, torch.tensor(tokens)[:, None]).flatten().tolist()
    values, ids = (x.tolist() for x in logprobs_RV.topk(min(top, logits_RV.shape[1]), dim=-1))
    return [
        TokenLogprob(token, logprob, tuple(zip(ids[r], values[r], strict=True)))
        for r, (token, logprob) in enumerate(zip(tokens, chosen, strict=True))
    ]
