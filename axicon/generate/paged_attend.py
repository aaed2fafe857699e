"""The `attend` of a step on a GPU, and steps that are captured once and replayed.

A small model's step is some hundred kernels of a few microseconds: without a graph, launching them takes
longer than running them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from axicon.errors import AxiconError
from axicon.generate.attend import AttendingBlock
from axicon.generate.paged_step import Layout, Packed
from axicon.kernels.paged_attention import Nodes, attend, stage
from axicon.model.decoder import Decoder
from axicon.model.pages import PagedCache

Capture = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
"""Takes what computes a step from fixed buffers, and returns what does it again."""


class PagedAttention:
    """Stages the step's keys and values, then attends. Called once per block.

    first: the runner's first block. layers: those of the cache that will be attended to. keep: hold on to
    queries and denominators of `layers`, from which `receive` can tell who looked at what.
    """

    def __init__(
        self, cache: PagedCache, nodes: Nodes, heads: int, *, first: int, layers: range, keep: bool
    ) -> None:
        self.cache, self.nodes, self.first, self.layers = cache, nodes, first, layers
        rows, (_, width) = len(nodes.rows_N), cache.shapes[0]
        kept = (len(layers) if keep else 0, rows, heads)
        dtype = cache.pages.keys_PSK.dtype
        self.q_LNHK = torch.empty(*kept, width, dtype=dtype, device=cache.device)
        self.lse_LNH = torch.empty(kept, dtype=torch.float32, device=cache.device)

    def __call__(self, block: AttendingBlock, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> Tensor:
        layer = block.index - self.first
        pages = self.cache.pages
        stage(pages, self.nodes, layer, k_NGK, v_NGK)
        out_NHK, lse_NH = attend(pages, self.nodes, layer, q_NHK, block.scale, block.window)
        if len(self.q_LNHK):
            self.q_LNHK[layer - self.layers.start].copy_(q_NHK)
            self.lse_LNH[layer - self.layers.start].copy_(lse_NH)
        return out_NHK


@dataclass(frozen=True, slots=True)
class _Captured:
    flat: Tensor
    """Where the integers of a step are put before it is replayed."""
    attention: PagedAttention
    replay: Callable[[], Tensor]


class StepGraphs:
    """Steps of a whole model, one graph per layout. What a replay returns is overwritten by the next one."""

    def __init__(self, decoder: Decoder, cache: PagedCache, capture: Capture) -> None:
        self._decoder, self._cache, self._capture = decoder, cache, capture
        self._version = cache.version
        self._captured: dict[tuple[Layout, bool], _Captured] = {}

    def __len__(self) -> int:
        return len(self._captured)

    def run(self, packed: Packed, keep: bool) -> tuple[Tensor, PagedAttention]:
        """float32 logits (N, V) of all nodes, padding included, and the attention with what it kept."""
        if self._version != self._cache.version:
            self._version = self._cache.version
            self._captured.clear()  # graphs hold the address of the table
        key = (packed.layout, keep)
        host = torch.from_numpy(packed.flat)
        if key not in self._captured:
            self._captured[key] = self._make(packed, host, keep)
        captured = self._captured[key]
        captured.flat.copy_(host)
        return captured.replay(), captured.attention

    def _make(self, packed: Packed, host: Tensor, keep: bool) -> _Captured:
        decoder = self._decoder
        flat = host.to(self._cache.device, copy=True)
        tokens_N, positions_N, nodes = packed.views(flat)
        attention = PagedAttention(
            self._cache, nodes, decoder.shape.blocks[0].heads, first=0, layers=range(decoder.shape.layers),
            keep=keep,
        )  # fmt: skip
        return _Captured(
            flat, attention,
            self._capture(lambda: decoder.head(decoder(tokens_N, positions_N, attention))),
        )  # fmt: skip


class CudaCapture:
    """Captures into CUDA graphs that share their memory, so no two may be replayed at once."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Raises AxiconError where a product of the model cannot be captured."""
        current, beside = torch.cuda.current_stream(), torch.cuda.Stream()
        beside.wait_stream(current)
        with torch.cuda.stream(beside):
            compute()  # compiles kernels and makes the handles of libraries, which a capture must not
        current.wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                out = compute()
        except RuntimeError as error:
            raise AxiconError(
                f"a step of this model cannot be captured in a CUDA graph ({error}): use graphs=False"
            ) from error

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay
