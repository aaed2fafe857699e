"""Attention of one step over the KV cache: the `attend` a decoder is called with.

Every request is attended to by itself, over its live slots only, so the bits of its result cannot depend on
what else is in the batch. Query heads of one group are folded into rows, so keys and values are never
repeated.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from axicon.generate.spans import Span
from axicon.model.attention import attend, clip
from axicon.model.cache import LayerCache, RowCache
from axicon.model.variant import AttentionVariant


class AttendingBlock(Protocol):
    """What attention asks of the block that calls it."""

    @property
    def index(self) -> int: ...

    @property
    def scale(self) -> float: ...

    @property
    def window(self) -> int | None: ...

    @property
    def variant(self) -> AttentionVariant: ...


class StepAttention:
    """Stages the step's keys and values, then attends. Called once per block of one step.

    `first` is the index of the runner's first block. Rows behind the last span are padding and come back as
    zeros.
    """

    def __init__(self, spans: Sequence[Span], caches: Sequence[RowCache], first: int = 0) -> None:
        self.first = first
        self._single: list[tuple[int, RowCache]] = []
        self._other: list[_SpanAttention] = []
        self._tallied: list[_SpanAttention] = []
        for span, cache in zip(spans, caches, strict=True):
            if cache.tally is not None:
                self._tallied.append(_SpanAttention(span, cache))
            if len(span) == 1 and cache.whole:
                self._single.append((span.start, cache))
            else:
                self._other.append(_SpanAttention(span, cache))
        starts = [start for start, _ in self._single]
        self._packed = starts == list(range(len(starts)))

    def __call__(self, block: AttendingBlock, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> Tensor:
        out_NHK = self._attend(block, q_NHK, k_NGK, v_NGK)
        for one in self._tallied:
            one.tally(block, block.index - self.first, q_NHK[one.span.start : one.span.stop])
        return out_NHK

    def _attend(self, block: AttendingBlock, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> Tensor:
        layer = block.index - self.first
        single = len(self._single)
        if single == len(q_NHK) and self._packed:
            return self._decode(block, layer, q_NHK, k_NGK, v_NGK)
        out_NHK = torch.zeros_like(q_NHK, memory_format=torch.contiguous_format)
        if single and self._packed:
            out_NHK[:single] = self._decode(block, layer, q_NHK[:single], k_NGK[:single], v_NGK[:single])
        elif single:
            index = torch.tensor([start for start, _ in self._single])
            out_NHK[index] = self._decode(block, layer, q_NHK[index], k_NGK[index], v_NGK[index])
        for one in self._other:
            rows = slice(one.span.start, one.span.stop)
            out_NHK[rows] = one.attend(block, layer, q_NHK[rows], k_NGK[rows], v_NGK[rows])
        return out_NHK

    def _decode(
        self, block: AttendingBlock, layer: int, q_RHK: Tensor, k_RGK: Tensor, v_RGK: Tensor
    ) -> Tensor:
        """One node per row, nothing evicted: no masks, and as little Python as there can be."""
        rows, heads, width = q_RHK.shape
        groups = k_RGK.shape[1]
        window = block.window
        caches = [(cache.layers[layer].extent, cache.committed) for _, cache in self._single]
        staged = [extent.select(2, committed) for extent, committed in caches]
        torch._foreach_copy_(staged, torch.stack((k_RGK, v_RGK), dim=1).unbind(0))
        queries = q_RHK.reshape(rows, groups, heads // groups, width).unbind(0)
        outs = []
        for q_RK, (extent, committed) in zip(queries, caches, strict=True):
            begin = 0 if window is None else max(0, committed + 1 - window)
            k_SK, v_SK = extent.narrow(2, begin, committed + 1 - begin).unbind(0)
            outs.append(attend(q_RK, k_SK, v_SK, scale=block.scale, variant=block.variant))
        return torch.stack(outs).view(rows, heads, width)


class _SpanAttention:
    """Several nodes of one row (prompt chunk or tree), or a row whose heads hold different positions."""

    def __init__(self, span: Span, cache: RowCache) -> None:
        self.span = span
        self.cache = cache
        self._causal = span.chain and cache.committed == 0
        self._masks: dict[int | None, Tensor] = {}

    def attend(
        self, block: AttendingBlock, layer: int, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor
    ) -> Tensor:
        tokens, heads, width = q_THK.shape
        groups = k_TGK.shape[1]
        store = self.cache.layers[layer]
        store.stage(k_TGK, v_TGK, self.cache.committed)
        live = store.used(self.cache.committed) + tokens
        # (KV heads, query heads of the group, T, K): the group's one key head is seen by all its query heads.
        q_GRTK = q_THK.reshape(tokens, groups, heads // groups, width).permute(1, 2, 0, 3)
        k_GRSK = store.keys_GCK.narrow(1, 0, live)[:, None].expand(-1, heads // groups, -1, -1)
        v_GRSK = store.values_GCK.narrow(1, 0, live)[:, None].expand(-1, heads // groups, -1, -1)
        causal = self._causal and store.lengths is None and (block.window is None or block.window >= tokens)
        mask = None if causal else self._mask(store, block.window, live)
        out_GRTK = attend(
            q_GRTK, k_GRSK, v_GRSK, scale=block.scale, variant=block.variant, mask=mask, causal=causal
        )
        return out_GRTK.permute(2, 0, 1, 3).reshape(tokens, heads, width)

    def tally(self, block: AttendingBlock, layer: int, q_THK: Tensor) -> None:
        """Write down what each node gave to each slot, in a pass of its own behind the attention."""
        tally, store = self.cache.tally, self.cache.layers[layer]
        assert tally is not None
        tokens, heads, width = q_THK.shape
        groups = store.extent.shape[1]
        live = store.used(self.cache.committed) + tokens
        mask = self._mask(store, block.window, live)
        mask_GTS = mask.view(-1, tokens, live).expand(groups, -1, -1)
        q_GRTK = q_THK.float().reshape(tokens, groups, heads // groups, width).permute(1, 2, 0, 3)
        entries_GNC = tally.staged_LGNC[layer]
        entries_GNC.zero_()
        for g in range(groups):
            scores_RTS = q_GRTK[g] @ store.keys_GCK[g, :live].float().T * block.scale
            shares_RTS = clip(scores_RTS.masked_fill(~mask_GTS[g], -torch.inf).softmax(-1), block.variant)
            entries_GNC[g, :tokens, :live] = shares_RTS.sum(0)

    def _mask(self, store: LayerCache, window: int | None, live: int) -> Tensor:
        """bool, what each node sees: (T, S), or (G, 1, T, S) where heads differ."""
        if store.lengths is not None:
            return self._ragged_mask(store, store.lengths.tolist(), window, live)
        mask = self._masks.get(window)
        if mask is None:
            slots = torch.cat([torch.arange(self.cache.committed), torch.tensor(self.span.positions)])
            mask = self._masks[window] = self._sees(slots, self.cache.committed, window)
        return mask

    def _ragged_mask(
        self, store: LayerCache, lengths: Iterable[int], window: int | None, live: int
    ) -> Tensor:
        assert store.positions_GC is not None
        tokens = len(self.span)
        mask = torch.zeros(store.extent.shape[1], 1, tokens, live, dtype=torch.bool)
        for g, length in enumerate(lengths):
            positions = torch.cat([store.positions_GC[g, :length].long(), torch.tensor(self.span.positions)])
            mask[g, 0, :, : length + tokens] = self._sees(positions, length, window)
        return mask

    def _sees(self, positions_S: Tensor, committed: int, window: int | None) -> Tensor:
        """bool (T, S): a node sees every committed slot and its own ancestors, inside its window."""
        tokens = len(self.span)
        sees_TS = torch.ones(tokens, committed + tokens, dtype=torch.bool)
        sees_TS[:, committed:] = (
            torch.ones(tokens, tokens, dtype=torch.bool).tril() if self.span.chain else self.span.ancestors()
        )
        if window is not None:
            own_T = torch.tensor(self.span.positions)
            sees_TS &= positions_S[None, :] > own_T[:, None] - window
        return sees_TS
