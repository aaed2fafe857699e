"""Outliers of activations: how large the largest are, and how heavy the tails.

Bondarenko et al., arXiv:2306.12929. Both metrics and the list of tensors are those of the paper's code: the
output of each block, of its attention and its second MLP product, and of every norm. Each sequence is
flattened to one vector, for every family; the official figures of OPT are per token in two of these kinds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from axicon.evaluate.packed import hidden_states
from axicon.model.decoder import Block, Decoder


@dataclass(frozen=True, slots=True, kw_only=True)
class Outliers:
    max_inf_norm: float
    """Largest absolute value of a tensor, mean over sequences, then the maximum over tensors."""
    kurtosis: float
    """Mean over sequences, then over tensors; 3 for a Gaussian."""


def inf_norm(v: Tensor) -> float:
    return v.abs().max().item()


def kurtosis(v: Tensor) -> float:
    """mean((v - mu)^4) / (std(v)^4 + 1e-6) of a vector, with the unbiased std, in float64."""
    v = v.double()
    centred = v - v.mean()
    return (centred.pow(4).mean() / (v.std().pow(4) + 1e-6)).item()


@torch.inference_mode()
def outliers(decoder: Decoder, texts: Sequence[Sequence[int]]) -> Outliers:
    """Of `decoder` on sequences of token ids, which go through it together and do not see each other."""
    lengths = [len(text) for text in texts]
    norms: list[float] = []
    tails: list[float] = []

    def see(x_ND: Tensor) -> None:
        sequences = [part.flatten() for part in torch.split(x_ND, lengths)]
        norms.append(sum(map(inf_norm, sequences)) / len(sequences))
        tails.append(sum(map(kurtosis, sequences)) / len(sequences))

    with _watched(decoder, see):
        x_ND = hidden_states(decoder, texts)
        if decoder.final_norm is not None:
            decoder.final_norm(x_ND)
    return Outliers(max_inf_norm=max(norms), kurtosis=sum(tails) / len(tails))


@contextmanager
def _watched(decoder: Decoder, see: Callable[[Tensor], None]) -> Iterator[None]:
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output: see(output))
        for module in _modules(decoder)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _modules(decoder: Decoder) -> Iterator[nn.Module]:
    for block in decoder.blocks:
        assert isinstance(block, Block)
        yield from (block.attention_norm, block.out, block.mlp_norm, block.down, block)
    if decoder.final_norm is not None:
        yield decoder.final_norm
