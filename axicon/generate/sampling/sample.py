"""One token per row of a step: the batch-wide part of sampling, and log-probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from axicon.generate.request import SamplingParams, TokenLogprob
from axicon.generate.sampling.processors import LogitProcessor
from axicon.kernels.sampling import Truncation, softmax, truncate
from axicon.protocols import Draw, Sampler

EVERYTHING = Truncation(top_k=0, top_p=1.0, min_p=0.0)
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
    drawn: dict[int, Tensor] = {}
    for i in sorted(set(range(len(rows))).difference(greedy)):
        logits_V, row = logits_RV[i], rows[i]
        if row.processor.active:
            logits_V = row.processor.apply(logits_V)
        if row.params.temperature:
            drawn[i] = logits_V
        elif logits_V.amax().isfinite():
            tokens[i] = int(logits_V.argmax())
    for truncated in (False, True):
        group = [i for i in drawn if (_truncation(rows[i].params) != EVERYTHING) == truncated]
        if group:
            _draw({i: drawn[i] for i in group}, rows, truncated, sampler, tokens)
    return tokens


@torch.inference_mode()
def law(logits_V: Tensor, row: Row) -> Tensor | None:
    """float32 (V,): what `sample` draws this row's token from, its temperature above 0. None where `sample`
    finds none to choose."""
    if row.processor.active:
        logits_V = row.processor.apply(logits_V)
    probs_RV, (good,) = softmax([logits_V], [row.params.temperature])
    if not good:
        return None
    if _truncation(row.params) != EVERYTHING:
        truncate(probs_RV, [_truncation(row.params)])
    return probs_RV[0]


def _draw(
    drawn: Mapping[int, Tensor], rows: Sequence[Row], truncated: bool, sampler: Sampler,
    tokens: list[int | None],
) -> None:  # fmt: skip
    """Fill in the tokens of rows that all truncate, or none of which does, from their logits."""
    probs_RV, good_R = softmax(list(drawn.values()), [rows[i].params.temperature for i in drawn])
    index = [i for i, good in zip(drawn, good_R, strict=True) if good]
    if not index:
        return
    if len(index) < len(drawn):
        probs_RV = probs_RV[torch.tensor(good_R)]
    if truncated:
        truncate(probs_RV, [_truncation(rows[i].params) for i in index])
    ids_RV = torch.arange(probs_RV.shape[1]).expand(probs_RV.shape)
    chosen = sampler.choose(probs_RV, ids_RV, [rows[i].draw for i in index])
    for i, token in zip(index, chosen.tolist(), strict=True):
        tokens[i] = token


def _truncation(params: SamplingParams) -> Truncation:
    return Truncation(params.top_k, params.top_p, params.min_p)


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
