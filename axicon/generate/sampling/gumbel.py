"""Gumbel-max sampling with counted random numbers (Maddison et al., arXiv:1411.0030, section 2).

A token drawn from q is argmax over its candidates of log q + Gumbel. The noise of a token is a hash of
(seed, choice, position, token id), so a draw depends on nothing else: not on the batch, on the order or
number of other candidates, nor on how often anything was drawn before.

With the Gumbel written as -log E, E a unit exponential, the argmax is the argmin of E / q. That needs one
logarithm per candidate instead of three, and with E >= v, its uniform, for most of them none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from axicon.kernels import sampling
from axicon.protocols import Draw


def stream_key(draw: Draw) -> int:
    """64-bit key of one draw; the tokens are counters of its stream."""
    key = 0
    for part in (draw.seed, draw.choice, draw.position):
        key = sampling.splitmix((key + sampling.GOLDEN + part) & ((1 << 64) - 1))
    return key


@dataclass(frozen=True)
class GumbelMax:
    """The plain sampler: exact draws from the probabilities it is given."""

    def choose(self, probs_RC: Tensor, ids_RC: Tensor, draws: Sequence[Draw]) -> Tensor:
        return sampling.draw(probs_RC, ids_RC, [stream_key(draw) for draw in draws])
