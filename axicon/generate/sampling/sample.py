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
    plain = [i for i, row in enumerate(rows) if not row.processor.active]
    tokens: list[int | None] = [None] * len(rows)
    drawn = [i for i, row in enumerate(rows) if row.params.temperature > 0]
    greedy = [i for i in plain if rows[i].params.temperature == 0]
    if greedy:
        _argmax(logits_RV if len(greedy) == len(rows) else logits_RV[greedy], greedy, tokens)
        if len(greedy) == len(rows):
            return tokens
    processed = {i: row.processor.apply(logits_RV[i]) for i, row in enumerate(rows) if row.processor.active}
    for i, logits_V in processed.items():
        if rows[i].params.temperature == 0:
            _argmax(logits_V[None], [i], tokens)
    if drawn:
        _draw(torch.stack([processed.get(i, logits_RV[i]) for i in drawn]), drawn, rows, sampler, tokens)
    return tokens


def _argmax(logits_RV: Tensor, index: Sequence[int], tokens: list[int | None]) -> None:
    """The first of equal maxima. A NaN anywhere in a row is its maximum, which shows the row is bad."""
    values, ids = logits_RV.max(-1)
    for i, token, good in zip(index, ids.tolist(), values.isfinite().tolist(), strict=True):
        tokens[i] = token if good else None


def _draw(
    logits_RV: Tensor, index: Sequence[int], rows: Sequence[Row], sampler: Sampler, tokens: list[int | None]
) -> None:
    """Temperature, softmax, truncation, draw. `logits_RV` holds the rows `index`."""
    best_R1 = logits_RV.amax(-1, keepdim=True)
    temperature_R1 = torch.tensor([[rows[i].params.temperature] for i in index])
    probs_RV = ((logits_RV - best_R1) / temperature_R1).softmax(-1)
    good = best_R1.isfinite().flatten().tolist()
    cut = [r for r, i in enumerate(index) if good[r] and truncates(rows[i].params)]
    whole = [r for r, i in enumerate(index) if good[r] and not truncates(rows[i].params)]
    if whole:
        ids_RV = torch.arange(probs_RV.shape[1]).expand(len(whole), -1)
        chosen = sampler.choose(probs_RV[whole], ids_RV, [rows[index[r]].draw for r in whole])
        for r, token in zip(whole, chosen.tolist(), strict=True):
            tokens[index[r]] = token
    if cut:
        kept = truncate(probs_RV[cut], [rows[index[r]].params for r in cut])
        for r, (probs_C, ids_C) in zip(cut, kept, strict=True):
            tokens[index[r]] = int(sampler.choose(probs_C[None], ids_C[None], [rows[index[r]].draw]))


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
