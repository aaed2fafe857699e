"""Which nodes of a draft tree stay, so that what comes out has exactly the law of the target.

At a node with law q of the target, p of the draft and children x_1 .. x_m in the order drawn, `rrs` accepts
one child after the other, each by chance; if none is accepted, the token is drawn from what q has left. The
rules differ in how the children were drawn: without replacement (Jeon et al., arXiv:2402.14160, algorithm 1;
with one child, Leviathan et al., arXiv:2211.17192), independently and in rounds (Miao et al.,
arXiv:2305.09781), or independently with one threshold for all (K-SEQ: Sun et al., arXiv:2310.15141).

`coupled` needs no rule: the token is drawn from q with the noise of its position, as without a tree, and a
child is accepted if it is that token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Trial(NamedTuple):
    """One child is put to the test."""

    accept: float
    """Probability that it is accepted, given that those before it were not."""
    rest_V: Tensor
    """The law that is left if it is not."""


Rule = Callable[[Tensor, Tensor | None, Sequence[int]], Iterator[Trial]]
"""(q (V,), p (V,) or None for children chosen without chance, the children's tokens) -> a trial of each."""


def without_replacement(q_V: Tensor, p_V: Tensor | None, children: Sequence[int]) -> Iterator[Trial]:
    """Each child was drawn from what its elder siblings left of p."""
    for token in children:
        if p_V is None:
            accept, rest_V = float(q_V[token]), _without(q_V, token)
        else:
            accept, rest_V = _ratio(q_V, p_V, token), _normal(q_V - p_V, q_V)
        yield Trial(accept, rest_V)
        q_V = rest_V
        if p_V is not None:
            p_V = _without(p_V, token)


def multi_round(q_V: Tensor, p_V: Tensor | None, children: Sequence[int]) -> Iterator[Trial]:
    """Each child was drawn from p."""
    if p_V is None:
        yield from without_replacement(q_V, p_V, list(dict.fromkeys(children)))
        return
    for token in children:
        rest_V = _normal(q_V - p_V, q_V)
        yield Trial(_ratio(q_V, p_V, token), rest_V)
        q_V = rest_V


def k_seq(q_V: Tensor, p_V: Tensor | None, children: Sequence[int]) -> Iterator[Trial]:
    """Each child was drawn from p; one threshold for all of them."""
    if p_V is None or not children:
        yield from multi_round(q_V, p_V, children)
        return
    k = len(children)
    factor = k_seq_factor(q_V, p_V, k)
    taken_V = torch.minimum(p_V, q_V / factor)
    beta = float(taken_V.sum())
    rest_V = _normal(q_V - taken_V * ((1 - (1 - beta) ** k) / beta), q_V) if beta > 0 else q_V
    for token in children:
        yield Trial(_ratio(q_V / factor, p_V, token), rest_V)


def k_seq_factor(q_V: Tensor, p_V: Tensor, k: int) -> float:
    """The r in [1, k] with 1 - (1 - beta(r))^k = r beta(r), beta(r) the sum of min(p, q / r)."""
    low, high = 1.0, float(k)
    for _ in range(60):
        r = (low + high) / 2
        beta = float(torch.minimum(p_V, q_V / r).sum())
        low, high = (r, high) if 1 - (1 - beta) ** k > r * beta else (low, r)
    return high


RULES: dict[str, Rule] = {
    "without_replacement": without_replacement,
    "multi_round": multi_round,
    "k_seq": k_seq,
}


def reject(
    rule: Rule, q_V: Tensor, p_V: Tensor | None, children: Sequence[int], chances: Iterator[float]
) -> tuple[int | None, Tensor]:
    """(index of the accepted child, or None; the law its token is drawn from in that case).

    `chances` are uniform in [0, 1), one for each child that is tried.
    """
    rest_V = q_V
    for index, trial in enumerate(rule(q_V, p_V, children)):
        if next(chances) < trial.accept:
            return index, q_V
        rest_V = trial.rest_V
    return None, rest_V


def _ratio(q_V: Tensor, p_V: Tensor, token: int) -> float:
    q, p = float(q_V[token]), float(p_V[token])
    return min(1.0, q / p) if p > 0 else float(q > 0)


def _normal(law_V: Tensor, otherwise_V: Tensor) -> Tensor:
    """The positive part, summing to 1. Where nothing is left acceptance was certain, but for rounding."""
    law_V = law_V.clamp(min=0)
    total = law_V.sum()
    return law_V / total if total > 0 else otherwise_V


def _without(law_V: Tensor, token: int) -> Tensor:
    """The law given that it is not this token. Summed anew, as 1 - p would lose what is left beside p = 1."""
    law_V = law_V.clone()
    law_V[token] = 0
    total = law_V.sum()
    return law_V / total if total > 0 else law_V
