"""Gumbel-max sampling with counted random numbers (Maddison et al., arXiv:1411.0030, section 2).

A token drawn from q is argmax over its candidates of log q + Gumbel. The noise of a token is a hash of
(seed, choice, position, token id), so a draw depends on nothing else: not on the batch, on the order or
number of other candidates, nor on how often anything was drawn before.

With the Gumbel written as -log E, E a unit exponential, the argmax is the argmin of E / q. That needs one
logarithm per candidate instead of three.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from axicon.protocols import Draw

_MASK = (1 << 64) - 1
_GOLDEN, _MIX1, _MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _signed(n: int) -> int:
    """The int64 with the same bits."""
    n &= _MASK
    return n - (1 << 64) if n >> 63 else n


def splitmix(n: int) -> int:
    """Output function of SplitMix64 (Steele, Lea and Flood 2014): a bijection of 64-bit integers that mixes
    well.
    """
    n = ((n ^ (n >> 30)) * _MIX1) & _MASK
    n = ((n ^ (n >> 27)) * _MIX2) & _MASK
    return n ^ (n >> 31)


def stream_key(draw: Draw) -> int:
    """64-bit key of one draw; the tokens are counters of its stream."""
    key = 0
    for part in (draw.seed, draw.choice, draw.position):
        key = splitmix((key + _GOLDEN + part) & _MASK)
    return key


def exponentials(key: int, ids: Tensor) -> Tensor:
    """float32 unit exponentials, one per id: -log(1 - v), v from SplitMix64 at counter `id + 1` of the
    stream.

    v is 52 random bits as a float32, never 0. Where the exponential is small, which is where the least of
    many is found, its relative error is that of a float32.
    """
    z = torch.add(torch.tensor(_signed(key + _GOLDEN)), ids, alpha=_signed(_GOLDEN))
    for shift, factor in ((30, _MIX1), (27, _MIX2)):
        # `>>` keeps the sign of an int64, the hash wants zeros to come in.
        z.bitwise_xor_((z >> shift).bitwise_and_((1 << (64 - shift)) - 1)).mul_(_signed(factor))
    z.bitwise_xor_((z >> 31).bitwise_and_((1 << 33) - 1))
    v = (z >> 12).bitwise_and_((1 << 52) - 1).float().add_(0.5).mul_(-(2.0**-52))
    return v.log1p_().neg_()


@dataclass(frozen=True)
class GumbelMax:
    """The plain sampler: exact draws from the probabilities it is given."""

    def choose(self, probs_RC: Tensor, ids_RC: Tensor, draws: Sequence[Draw]) -> Tensor:
        # Row by row: a row fits the cache, and its arithmetic cannot depend on the batch.
        rows = zip(probs_RC, ids_RC, draws, strict=True)
        tokens = [self._one(probs_C, ids_C, draw) for probs_C, ids_C, draw in rows]
        return torch.stack(tokens) if tokens else torch.empty(0, dtype=torch.int64)

    def _one(self, probs_C: Tensor, ids_C: Tensor, draw: Draw) -> Tensor:
        arrivals = exponentials(stream_key(draw), ids_C).div_(probs_C)
        return ids_C[arrivals == arrivals.amin()].amin()
