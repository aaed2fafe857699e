"""Rows whose cache is bounded by a policy: cutting them, and their prompts, which pass block by block."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from axicon.generate.eviction import KV_POLICIES, METHODS
from axicon.generate.spans import Span
from axicon.kernels.eviction import select
from axicon.model.cache import KVCache, LayerCache, RowCache, size_class
from axicon.model.native import KeepBest, NativeDecoder
from axicon.model.tally import Tally
from axicon.protocols import KVPolicy, LastRows
from axicon.step import Capacity, RowPolicy, StepInput

NOTHING = 1e-6
"""Weight below which a query of the prompt is left out of a sum that decays."""
TILE = 8
"""Adjacent nodes of a prompt whose attention the kernels add up by themselves."""


class BoundedRow:
    """A row's policy. Reads and changes the row in `cache`.

    windows: the sliding window of each layer, or None. A layer that slides keeps its newest slots, whatever
    the policy: what lies outside the window is never seen again.
    """

    def __init__(
        self, policy: RowPolicy, cache: KVCache, windows: Sequence[int | None], native: NativeDecoder | None
    ) -> None:
        method = KV_POLICIES[METHODS[policy.method]]
        self.row, self.spare = policy.row, policy.spare
        self.policy: KVPolicy = method(
            budget=policy.budget, recent=policy.recent, sinks=policy.sinks, variant=policy.variant
        )
        self.name = METHODS[policy.method]
        self.evicted = 0
        """Slots given up so far, over all layers and heads."""
        self._cache, self._windows, self._native = cache, windows, native
        cache.rows[policy.row].ragged()

    def tally(self) -> Tally | None:
        """Where the answer's attention is counted, if the policy looks at it."""
        row, needs = self._cache.rows[self.row], self.policy.needs
        if needs == "none" or self.policy.once:
            return None
        assert row.lengths_LG is not None
        layers, groups = row.lengths_LG.shape
        last = isinstance(needs, LastRows)
        return Tally(layers, groups, row.reserved, last=last, decay=self.policy.decay)

    def evict(self) -> None:
        """Cut every layer to the budget."""
        row = self._cache.rows[self.row]
        stats = None if row.tally is None else list(row.tally.sums_LGC.unbind(0))
        self._cut(row, range(len(row.layers)), stats)

    def settle(self, layer: int, stats_GS: Tensor | None) -> None:
        """Cut one layer behind the prompt; `stats_GS` moves with the slots."""
        self._cut(self._cache.rows[self.row], [layer], None if stats_GS is None else [stats_GS])

    def _cut(self, row: RowCache, indices: Sequence[int], stats: Sequence[Tensor] | None) -> None:
        layers = [row.layers[i] for i in indices]
        keeps = [self._keep(i) for i in indices]
        assert row.lengths_LG is not None
        before = int(row.lengths_LG.sum())
        if all(layer.used(row.committed) <= keep.budget for layer, keep in zip(layers, keeps, strict=True)):
            return
        scores = [
            self._score(i, layer, None if stats is None else stats[at])
            for at, (i, layer) in enumerate(zip(indices, layers, strict=True))
        ]
        if self._native is not None:
            self._native.evict(layers, keeps, scores, stats)
        else:
            for at, (layer, keep) in enumerate(zip(layers, keeps, strict=True)):
                evict_in_torch(layer, keep, scores[at], None if stats is None else stats[at])
        self._cache.fit(self.row, list(indices), self.spare)
        self.evicted += before - int(row.lengths_LG.sum())

    def _keep(self, layer: int) -> KeepBest:
        policy, window = self.policy, self._windows[layer]
        if window is not None:
            return KeepBest(min(policy.budget, window), 0, 0)
        return KeepBest(policy.budget, policy.recent, policy.sinks)

    def _score(self, index: int, layer: LayerCache, stats_GC: Tensor | None) -> Tensor:
        slots = layer.used(0)
        if self._windows[index] is not None:
            return layer.positions(slots).float()
        stats_GS = None if stats_GC is None else stats_GC[: layer.extent.shape[1], :slots]
        return self.policy.score(layer, stats_GS, slots).float().contiguous()


def evict_in_torch(layer: LayerCache, keep: KeepBest, scores_GS: Tensor, sums_GC: Tensor | None) -> None:
    """What `NativeDecoder.evict` does, for one layer."""
    lengths, positions_GC = layer.lengths, layer.positions_GC
    assert lengths is not None
    assert positions_GC is not None
    slots = scores_GS.shape[1]
    kept_GS = select(scores_GS, positions_GC[:, :slots], torch.from_numpy(lengths), *keep)
    for g, length in enumerate(lengths.tolist()):
        kept = kept_GS[g].nonzero().flatten()
        layer.extent[:, g, : len(kept)] = layer.extent[:, g, kept]
        positions_GC[g, : len(kept)] = positions_GC[g, kept]
        if sums_GC is not None:
            sums_GC[g, : len(kept)] = sums_GC[g, kept]
            sums_GC[g, len(kept) : length] = 0
        lengths[g] = len(kept)


class LayeredRun:
    """A prompt on its way through the model, one block after the other.

    Inside a block it goes in the chunks in which it would go without a policy, so its bits are the same. When
    it has passed a block, that block's cache is cut to the budget: only one ever holds the whole prompt.
    """

    def __init__(
        self,
        bounded: BoundedRow,
        cache: KVCache,
        tokens_T: Tensor,
        wanted_T: Tensor,
        x_TD: Tensor,
        chunk: int,
        adapter: int = 0,
    ) -> None:
        self.adapter = adapter
        self.bounded, self.tokens_T, self.wanted_T = bounded, tokens_T, wanted_T
        self.done = 0
        """Blocks passed."""
        self.x_TD = x_TD
        """The residual stream, changed in place. What stands in it before the first block is the pass's."""
        self._cache, self._chunk = cache, chunk
        self._tally = bounded.tally()

    def advance(self, through: BlockPass, every: int) -> list[Tensor]:
        """Pass one block. every: nodes whose attention the pass adds up by itself, where all of them count.

        Returns what the pass gave for each chunk.
        """
        length, index = len(self.tokens_T), self.done
        row = self._cache.rows[self.bounded.row]
        alone = LayerCache(self._cache.exchange(self.bounded.row, index, length))
        view = RowCache([alone], length)
        heads = alone.extent.shape[1]
        needs, decay = self.bounded.policy.needs, self.bounded.policy.decay
        first, weights_T1 = 0, None
        if isinstance(needs, LastRows):
            first = max(0, length - needs.count)
        elif decay != 1.0:
            first = max(0, length - math.ceil(math.log(NOTHING, decay)))
            weights_T1 = decay ** torch.arange(length - 1, -1, -1.0)[:, None]
        sums_GS = None if needs == "none" else torch.zeros(heads, alone.capacity)
        found = []
        for start in range(0, length, self._chunk):
            stop = min(length, start + self._chunk)
            view.committed, view.tally = start, None
            if sums_GS is not None and stop > first:
                grain = every if first <= start and weights_T1 is None else 1
                view.tally = Tally(1, heads, alone.capacity, nodes=stop - start, every=grain)
            positions, parents = tuple(range(start, stop)), tuple(range(-1, stop - start - 1))
            span = Span(self.bounded.row, 0, len(positions), positions, parents, True, self.adapter)
            found.append(through(self, index, span, view))
            if sums_GS is not None and view.tally is not None:
                begin = max(0, first - start)
                entries_GNC = view.tally.staged_LGNC[0, :, begin:]
                if weights_T1 is not None:
                    entries_GNC = entries_GNC * weights_T1[start + begin : stop]
                sums_GS += entries_GNC.sum(1)
        lengths = row.layers[index].lengths
        assert lengths is not None
        lengths[:] = length
        self.bounded.settle(index, sums_GS)
        if self._tally is not None and sums_GS is not None:
            width = min(self._tally.sums_LGC.shape[2], sums_GS.shape[1])
            self._tally.sums_LGC[index, :heads, :width] = sums_GS[:, :width]
        self.done += 1
        return found

    def finish(self) -> None:
        """The prompt is committed."""
        row = self._cache.rows[self.bounded.row]
        row.committed, row.tally = len(self.tokens_T), self._tally
        row.measure()


class BlockPass(Protocol):
    """Takes a chunk of a prompt through one block, changing its rows of the residual stream in place.

    `span` is the chunk, from node 0; `cache` holds this one layer, and the tally to fill if there is one.
    """

    def __call__(self, run: LayeredRun, index: int, span: Span, cache: RowCache) -> Tensor: ...


def check_bounded(
    step: StepInput,
    spans: Sequence[Span],
    bounded: Collection[int],
    prompts: Mapping[int, LayeredRun],
    capacity: Capacity,
) -> None:
    """Raises ValueError where a step breaks the contract of bounded rows. `bounded` are those before it."""
    if step.policies and not capacity.blocks:
        raise ValueError(f"policies {step.policies}, and this runner is one stage of several")
    loose = [row for row in step.evictions if row not in bounded or row in prompts]
    if loose:
        raise ValueError(f"rows {loose} to evict, which have no KV policy or are not behind their prompt")
    opened = {row for row, _ in step.reserves}
    for policy in step.policies:
        room = policy.budget - policy.recent - policy.sinks
        known = policy.method < len(METHODS)
        known = known and policy.variant < max(1, len(KV_POLICIES[METHODS[policy.method]].variants))
        if policy.row not in opened or not known or min(policy) < 0 or room < 0:
            raise ValueError(f"{policy}: no row that begins with this step, or no policy")
    rows = {policy.row for policy in step.policies} | (set(bounded) - set(step.releases))
    lengths = {span.row: len(span) for span in spans}
    layered = dict(step.layered)
    for row, blocks in layered.items():
        begins, goes_on = row in lengths and row in opened, row in prompts and row not in lengths
        if row not in rows or begins == goes_on:
            raise ValueError(f"row {row} has no layered prompt to begin or to go on with")
        left = capacity.blocks - (0 if begins else prompts[row].done)
        if not 1 <= blocks <= left:
            raise ValueError(f"row {row}: {blocks} blocks to pass, {left} are left")
        if begins and size_class(lengths[row]) > capacity.slots:
            raise ValueError(f"row {row}: one layer does not hold {lengths[row]} tokens")
    for span in spans:
        if span.row in rows and span.row not in layered and (span.row in opened or span.row in prompts):
            raise ValueError(f"row {span.row} has a policy: its prompt is layered")
    behind = [span.row in layered for span in spans]
    if behind != sorted(behind):
        raise ValueError("nodes of layered prompts stand behind all others")
