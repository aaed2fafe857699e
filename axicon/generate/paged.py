"""PagedRunner: a `LocalRunner` whose model and cache are on a GPU.

The cache lies in pages, attention runs over them in kernels of its own, and steps without long prompt chunks
are replayed from CUDA graphs. What comes in and goes out are tensors of the host, as everywhere.

Bits are not promised on a GPU, so steps are computed as they come: no tiles, prompts may be cut anywhere.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from axicon.errors import AxiconError
from axicon.generate.bounded import NOTHING, BoundedRow, LayeredRun
from axicon.generate.paged_attend import Capture, CudaCapture, PagedAttention, StepGraphs
from axicon.generate.paged_step import pack
from axicon.generate.runner import DEFAULT_KV_BYTES, Checked, LocalRunner
from axicon.generate.spans import Span
from axicon.kernels.eviction import select
from axicon.kernels.paged_attention import Givers, receive
from axicon.model.adapterfile import Adapter
from axicon.model.cache import KVCache, LayerCache, size_class
from axicon.model.decoder import Decoder
from axicon.model.native import KeepBest
from axicon.model.pages import PagedCache
from axicon.model.tally import Tally
from axicon.protocols import LastRows
from axicon.step import RowPolicy, StepInput


class Job(NamedTuple):
    """Committed nodes of a row whose attention is counted."""

    row: int
    """Of the table."""
    nodes: list[int]
    weights: list[float]
    staged: int
    carry: float
    slots: int
    """Of its fullest head, those staged ones included."""


class PagedRunner(LocalRunner):
    """`decoder` is where it is to run. A CPU will do, slowly, for tests.

    graphs: replay steps; `capture` says how, None for CUDA graphs. Raises AxiconError for models whose layers
    differ in their heads, and where the cache does not hold one short request.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        kv_bytes: int | None = None,
        max_rows: int = 64,
        prefill_chunk: int = 256,
        model_digest: str = "",
        graphs: bool = True,
        capture: Capture | None = None,
    ) -> None:
        if any(b.attention.clipped for b in decoder.shape.blocks):
            raise AxiconError(
                "a clipped softmax has no attention on a GPU: its clip wants all scores of a row, which the "
                "kernel sees piece by piece; serve this model with device=cpu"
            )
        heads = {(b.heads, b.kv_heads, b.head_width, b.scale) for b in decoder.shape.blocks}
        if len(heads) != 1:
            raise AxiconError(
                f"the cache of a GPU wants the same heads in all layers, these are {sorted(heads)}"
            )
        self._device = decoder.device
        if kv_bytes is None and self._device.type == "cuda":
            kv_bytes = min(DEFAULT_KV_BYTES, torch.cuda.mem_get_info(self._device)[0] // 4)
        super().__init__(
            decoder,
            kv_bytes=kv_bytes,
            max_rows=max_rows,
            prefill_chunk=prefill_chunk,
            model_digest=model_digest,
        )
        blocks = decoder.shape.blocks[decoder.first : decoder.last]
        self._heads, _, _, self._scale = next(iter(heads))
        self._share = self._heads // blocks[0].kv_heads
        self._windows_L = torch.tensor(
            [block.window or 0 for block in blocks], dtype=torch.int32, device=self._device
        )
        self._attention: PagedAttention | None = None
        """Of the last step."""
        whole = decoder.has_embedding and decoder.has_head
        self.graphs = StepGraphs(decoder, self.paged, capture or CudaCapture()) if graphs and whole else None

    @property
    def paged(self) -> PagedCache:
        assert isinstance(self.cache, PagedCache)
        return self.cache

    def describe(self) -> dict[str, object]:
        told = {**super().describe(), "cache": "pages"}
        if self._device.type == "cuda":
            name = torch.cuda.get_device_name(self._device)
            told |= {"kernels": "torch, with attention in Triton", "device": name}
        return told

    def hold(self, number: int, adapter: Adapter | None) -> None:
        if adapter is not None:
            raise AxiconError("device=cuda serves no adapters yet; device=cpu does, or output=merged")

    def warm_up(self) -> None:
        """Compute a step of every number of rows that has a graph of its own, and forget it."""
        most = min(self._capacity.max_rows, self._capacity.slots // size_class(1))
        for count in sorted({*(1 << i for i in range(most.bit_length())), most}):
            row_N, flag_N = torch.arange(count), torch.ones(count, dtype=torch.bool)
            nought_N, rows = torch.zeros_like(row_N), range(count)
            self.forward(StepInput(
                nought_N, nought_N, row_N, nought_N - 1, flag_N, nought_N, flag_N,
                reserves=tuple((row, 1) for row in rows),
            ))  # fmt: skip
            none, no = nought_N[:0], flag_N[:0]
            self.forward(StepInput(none, none, none, none, no, none, no, releases=tuple(rows)))

    @property
    def _any_rows(self) -> bool:
        return True

    def _new_cache(self, shapes: Sequence[tuple[int, int]], kv_bytes: int, max_rows: int) -> KVCache:
        return PagedCache(shapes, self.decoder.dtype, kv_bytes, device=self._device, max_rows=max_rows)

    def _bound(self, policy: RowPolicy) -> BoundedRow:
        return PagedBound(policy, self.paged, [block.window for block in self.decoder.shape.blocks])

    @torch.inference_mode()
    def apply(self, checked: Checked) -> None:
        self._count(checked.paths)
        super().apply(checked)

    def _count(self, paths: Mapping[int, Sequence[int]]) -> None:
        """What slots receive from the nodes that are about to be committed, in rows that want to know."""
        jobs, layers = [], range(len(self.paged.shapes))
        for span in self._staged:
            bounded = self._bounded.get(span.row)
            if span.row not in paths or not isinstance(bounded, PagedBound) or not bounded.counts:
                continue
            path = paths[span.row][-1:] if bounded.last else paths[span.row]
            staged = path[-1] + 1
            jobs.append(Job(
                self.paged.paged(span.row).index, [span.start + offset for offset in path],
                [bounded.decay**age for age in range(len(path) - 1, -1, -1)], staged,
                0.0 if bounded.last else bounded.decay ** len(path),
                int(self.paged.lengths(span.row, layers).max()) + staged,
            ))  # fmt: skip
        if jobs:
            assert self._attention is not None
            self._receive(self._attention, jobs)

    def _receive(self, attention: PagedAttention, jobs: Sequence[Job]) -> None:
        self.paged.sync()
        firsts = itertools.accumulate((len(job.nodes) for job in jobs), initial=0)
        jobs_J4 = [
            [job.row, first, len(job.nodes), job.staged] for job, first in zip(jobs, firsts, strict=False)
        ]
        givers = Givers(
            torch.tensor(jobs_J4, dtype=torch.int32, device=self._device),
            torch.tensor([job.carry for job in jobs], device=self._device),
            torch.tensor([n for job in jobs for n in job.nodes], dtype=torch.int32, device=self._device),
            torch.tensor([w for job in jobs for w in job.weights], device=self._device),
            max(job.slots for job in jobs),
        )
        layers = attention.layers
        receive(
            self.paged.pages, attention.nodes, givers, layers, attention.q_LNHK, attention.lse_LNH,
            self._scale, self._windows_L[layers.start : layers.stop],
        )  # fmt: skip

    def _compute(self, step: StepInput, spans: list[Span], hidden_ND: Tensor | None) -> Tensor:
        cache = self.paged
        rows = [cache.paged(span.row) for span in spans]
        layers = range(len(cache.shapes))
        slots = [int(cache.lengths(span.row, layers).max()) for span in spans]
        nobodys = None if self.graphs is None else cache.max_rows
        packed = pack(step.tokens_N.tolist(), spans, [row.index for row in rows], slots, self._share, nobodys)
        keep = any(
            isinstance(bounded := self._bounded.get(span.row), PagedBound) and bounded.counts
            for span in spans
        )
        wanted = step.wanted_N.nonzero().flatten().to(self._device)
        cache.sync()
        if self.graphs is not None and packed.layout.padded:
            logits_NV, self._attention = self.graphs.run(packed, keep)
            return logits_NV[wanted].cpu()
        tokens_N, positions_N, nodes = packed.views(torch.from_numpy(packed.flat).to(self._device))
        self._attention = PagedAttention(
            cache, nodes, self._heads, first=self.decoder.first, layers=layers, keep=keep
        )
        x = tokens_N if hidden_ND is None else hidden_ND.to(self._device)
        if hidden_ND is not None:
            x = pad(x, (0, 0, 0, len(tokens_N) - len(x)))
        y_ND = self.decoder(x, positions_N, self._attention)[: len(step)]
        return self.decoder.head(y_ND[wanted]).cpu() if self.decoder.has_head else y_ND.cpu()

    def _begin(self, step: StepInput, span: Span) -> None:
        own = slice(span.start, span.stop)
        tokens_T = step.tokens_N[own]
        x_TD = self.decoder.embed(tokens_T.to(self._device), step.positions_N[own].to(self._device))
        self._prompts[span.row] = LayeredRun(
            self._bounded[span.row], self.cache, tokens_T, step.wanted_N[own], x_TD,
            self._capacity.prefill_chunk,
        )  # fmt: skip

    def _advance(self, row: int, blocks: int) -> Tensor:
        run = self._prompts[row]
        for _ in range(blocks):
            self._pass_block(run)
        if run.done < self._capacity.blocks:
            return self.out(0)
        run.finish()
        del self._prompts[row]
        return self.decoder.head(run.x_TD[run.wanted_T.nonzero().flatten().to(self._device)]).cpu()

    def _pass_block(self, run: LayeredRun) -> None:
        """A prompt through one block, chunk by chunk; then that layer is cut."""
        bounded, cache, index = run.bounded, self.paged, run.done
        assert isinstance(bounded, PagedBound)
        row, layers, length = bounded.row, range(index, index + 1), len(run.tokens_T)
        needs = bounded.policy.needs
        first = 0
        if isinstance(needs, LastRows):
            first = max(0, length - needs.count)
        elif bounded.decay != 1.0:
            first = max(0, length - math.ceil(math.log(NOTHING, bounded.decay)))
        cache.make_room(row, length, layers)
        passed = []
        for start in range(0, length, self._capacity.prefill_chunk):
            stop = min(length, start + self._capacity.prefill_chunk)
            count = stop - start
            span = Span(row, 0, count, tuple(range(start, stop)), tuple(range(-1, count - 1)), True)
            packed = pack([0] * count, [span], [cache.paged(row).index], [start], self._share)
            cache.sync()
            _, positions_N, nodes = packed.views(torch.from_numpy(packed.flat).to(self._device))
            counted = needs != "none" and stop > first
            attend = PagedAttention(cache, nodes, self._heads, first=0, layers=layers, keep=counted)
            block = self.decoder.blocks[index]
            passed.append(block(run.x_TD[start:stop], self.decoder.rotary(positions_N), attend))
            if counted:
                givers = range(max(0, first - start), count)
                weights = [bounded.decay ** (length - 1 - start - node) for node in givers]
                job = Job(cache.paged(row).index, list(givers), weights, count, 1.0, stop)
                self._receive(attend, [job])
            cache.grow(row, layers, count)
        run.x_TD = torch.cat(passed)
        bounded.cut(layers)
        run.done += 1


class PagedBound(BoundedRow):
    """A policy of a row whose slots lie in pages. What they receive is counted there."""

    def __init__(self, policy: RowPolicy, cache: PagedCache, windows: Sequence[int | None]) -> None:
        super().__init__(policy, cache, windows, None)
        self._pages = cache
        needs = self.policy.needs
        self.decay = self.policy.decay
        self.counts = needs != "none" and not self.policy.once
        self.last = isinstance(needs, LastRows)

    def tally(self) -> Tally | None:
        return None

    def evict(self) -> None:
        self.cut(range(len(self._pages.shapes)))

    def cut(self, layers: range) -> None:
        """These layers to the budget, all at once."""
        keeps = [self._keep(layer) for layer in layers]
        before_LG = self._pages.lengths(self.row, layers)
        after_LG = np.minimum(before_LG, np.array([[keep.budget] for keep in keeps], np.int32))
        if (after_LG == before_LG).all():
            return
        dense = self._pages.dense(self.row, layers)
        received_LGS = self._pages.received(self.row, layers)
        kept_LGS = torch.zeros_like(received_LGS, dtype=torch.bool)
        for keep in set(keeps):
            which = [at for at, one in enumerate(keeps) if one == keep]
            kept_LGS[which] = self._kept(keep, layers, which, dense, received_LGS)
        self._pages.cut(self.row, layers, kept_LGS, after_LG)
        self.evicted += int(before_LG.sum() - after_LG.sum())

    def _kept(
        self,
        keep: KeepBest,
        layers: range,
        which: Sequence[int],
        dense: Sequence[LayerCache],
        received_LGS: Tensor,
    ) -> Tensor:
        """bool (W, G, S): the slots that stay in these of the layers."""
        chosen, heads, slots = [dense[at] for at in which], *received_LGS.shape[1:]
        scores_WGS = torch.full_like(received_LGS[: len(which)], -torch.inf)
        for scores_GS, at, layer in zip(scores_WGS, which, chosen, strict=True):
            found_GS = self._score(layers[at], layer, received_LGS[at])
            scores_GS[:, : found_GS.shape[1]] = found_GS
        positions_WGS = torch.stack([layer.positions(slots) for layer in chosen])
        lengths_WG = torch.from_numpy(
            np.stack([layer.lengths for layer in chosen if layer.lengths is not None])
        )
        kept = select(
            scores_WGS.flatten(0, 1), positions_WGS.flatten(0, 1),
            lengths_WG.flatten().to(scores_WGS.device), *keep,
        )  # fmt: skip
        return kept.view(len(which), heads, slots)
