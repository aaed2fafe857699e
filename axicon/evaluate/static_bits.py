"""What few bits cost a model that gets no help: one scale for a whole tensor, fixed before it runs.

Bondarenko et al., arXiv:2306.12929, section 5: the setting in which outliers show. Weights are rounded to a
symmetric grid per tensor; what goes into and comes out of products, norms and blocks to an asymmetric one,
whose range is a running mean of smallest and largest values over a calibration sample. Rounded numbers are
computed with in float: it tells what is lost, not what is gained. Differs from the paper's: the softmax's
output and the embeddings stay as they are. The head stays dense, as there.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from axicon.evaluate.packed import hidden_states
from axicon.model.decoder import Block, Decoder, Norm

MOMENTUM = 0.9
"""Of the running range: what the ranges so far keep when another batch is seen."""


class Range:
    """Smallest and largest values of batches, as a running mean; or those that so many percent lie within."""

    def __init__(self, percentile: float | None = None, bits: int = 8) -> None:
        self.percentile, self.levels = percentile, (1 << bits) - 1
        self.low, self.high = 0.0, 0.0
        self._seen = False

    def see(self, x: Tensor) -> None:
        x = x.detach().float().flatten()
        if self.percentile is None:
            low, high = (float(v) for v in x.aminmax())
        else:
            beyond = int(len(x) * (100 - self.percentile) / 100) + 1
            high, low = (float(s * (s * x).topk(beyond).values[-1]) for s in (1, -1))
        keep = MOMENTUM if self._seen else 0.0
        self.low = keep * self.low + (1 - keep) * low
        self.high = keep * self.high + (1 - keep) * high
        self._seen = True

    def round(self, x: Tensor) -> Tensor:
        """On 2^bits levels from low to high, of which 0 is one; what lies outside is clipped."""
        low, high = min(self.low, 0.0), max(self.high, 0.0)
        step = (high - low) / self.levels
        if step == 0:
            return torch.zeros_like(x)
        zero = round(-low / step)
        return ((x / step).round().clamp(-zero, self.levels - zero) * step).to(x.dtype)


def round_weight(weight: Tensor, bits: int = 8) -> Tensor:
    """To a symmetric grid, one scale for all of it."""
    step = float(weight.abs().max()) / ((1 << bits - 1) - 1)
    return weight if step == 0 else ((weight.float() / step).round() * step).to(weight.dtype)


@torch.inference_mode()
def static_bits(
    decoder: Decoder,
    sample: Sequence[Sequence[Sequence[int]]],
    *,
    weights: int = 8,
    activations: int = 8,
    percentile: float | None = None,
) -> Decoder:
    """A copy of a dense decoder that rounds as above. `sample`: batches of texts to read the ranges off.

    percentile: such as 99.999, in the place of smallest and largest values.
    """
    model = copy.deepcopy(decoder)
    ranges: list[Range] = []
    seeing = True

    def through(x: Tensor, own: Range) -> Tensor:
        if seeing:
            own.see(x)
            return x
        return own.round(x)

    for module in _rounded(model):
        before, after = Range(percentile, activations), Range(percentile, activations)
        ranges += [before, after]
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(round_weight(module.weight.detach(), weights), requires_grad=False)
            module.register_forward_pre_hook(lambda _m, given, own=before: (through(given[0], own),))
        module.register_forward_hook(lambda _m, _given, out, own=after: through(out, own))
    for texts in sample:
        hidden_states(model, texts)
    seeing = False
    return model


def _rounded(decoder: Decoder) -> Iterator[nn.Module]:
    for block in decoder.blocks:
        assert isinstance(block, Block)
        yield from (m for m in block.children() if isinstance(m, nn.Linear | Norm))
        yield block


def sqnr(x: Tensor, rounded: Tensor) -> float:
    """Signal to noise of rounding, in decibels."""
    noise = (x.double() - rounded.double()).square().mean()
    return float(10 * (x.double().square().mean() / noise).log10())
