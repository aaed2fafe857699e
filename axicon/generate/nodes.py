"""The nodes of a step: what the scheduler wants computed, as the tensors of a `StepInput`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from axicon.generate.scheduler import Work


class Nodes(NamedTuple):
    """The node fields of a `StepInput`, in its order."""

    tokens_N: Tensor
    positions_N: Tensor
    rows_N: Tensor
    parents_N: Tensor
    wanted_N: Tensor
    adapters_N: Tensor
    forced_N: Tensor


def nodes_of(work: Sequence[Work]) -> Nodes:
    """Tokens of each stream as a chain, and behind them what may follow."""
    found: list[tuple[int, int, int, int, bool, int, bool]] = []
    for one in work:
        request, row, tokens, wanted = one.stream.request, one.stream.row, one.stream.tokens, wanted_of(one)
        forced = one.start < len(request.prompt)
        for position in range(one.start, one.start + one.nodes):
            parent = -1 if position == one.start else len(found) - 1
            wants = position >= wanted.start
            found.append((tokens[position], position, row, parent, wants, request.adapter, forced))
        if len(one.tree):
            last, tree = len(found) - 1, one.tree
            for token, parent, depth in zip(tree.tokens, tree.parents, tree.depths(), strict=True):
                behind = last + 1 + parent
                found.append((token, one.stop - 1 + depth, row, behind, True, request.adapter, False))
    table_7N = torch.tensor(found, dtype=torch.int64).view(len(found), 7).T.contiguous()
    tokens_N, positions_N, rows_N, parents_N, wanted_N, adapters_N, forced_N = table_7N.unbind(0)
    return Nodes(tokens_N, positions_N, rows_N, parents_N, wanted_N.bool(), adapters_N, forced_N.bool())


def wanted_of(one: Work) -> range:
    """Positions whose logits are wanted: all where a prompt is scored, else the last if a token is drawn."""
    params, prompt = one.stream.request.params, one.stream.request.prompt
    if params.prompt_logprobs is not None and one.start < len(prompt):
        return range(one.start, one.stop)
    draws = one.stop == len(one.stream.tokens) and params.max_tokens > 0
    return range(one.stop - draws, one.stop)
