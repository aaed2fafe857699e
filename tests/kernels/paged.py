"""Random ragged caches for tests of attention over pages, and the same written with masks and SDPA."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from axicon.generate.paged_step import pack
from axicon.generate.spans import Span
from axicon.kernels import paged_attention
from axicon.kernels.paged_attention import PAGE, Givers, Nodes, Pages

CHAIN, TREE = "chain", "tree"


@dataclass
class Case:
    """`rows` of (committed tokens, nodes). Heads hold random subsets of the committed tokens if `ragged`."""

    rows: tuple[tuple[int, int], ...]
    kind: str = TREE
    width: int = 64
    share: int = 3
    groups: int = 2
    layers: int = 2
    ragged: bool = True
    window: int | None = None
    dtype: torch.dtype = torch.float32
    padding: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        made = torch.Generator().manual_seed(self.seed)
        most = max(committed + nodes for committed, nodes in self.rows) // PAGE + 1
        shape = (len(self.rows) + 1, self.layers, self.groups)
        count = len(self.rows) * self.layers * self.groups * most + 1
        order = rng.permutation(np.arange(1, count)).reshape(len(self.rows), self.layers, self.groups, most)
        table = torch.zeros(*shape, most, dtype=torch.int32)
        table[:-1] = torch.from_numpy(order.astype(np.int32))
        lengths = torch.zeros(shape, dtype=torch.int32)
        positions = torch.zeros(count, PAGE, dtype=torch.int32)
        for r, (committed, _) in enumerate(self.rows):
            for l in range(self.layers):
                for g in range(self.groups):
                    held = np.arange(committed)
                    if self.ragged and committed:
                        held = np.sort(rng.choice(committed, rng.integers(0, committed + 1), replace=False))
                    lengths[r, l, g] = len(held)
                    slot = np.arange(len(held))
                    positions[table[r, l, g].numpy()[slot // PAGE], slot % PAGE] = torch.from_numpy(
                        held.astype(np.int32)
                    )
        store = [torch.randn(count, PAGE, self.width, generator=made).to(self.dtype) for _ in range(2)]
        self.pages = Pages(*store, positions, torch.rand(count, PAGE, generator=made), table, lengths)
        self.spans, start = [], 0
        for r, (committed, nodes) in enumerate(self.rows):
            parents = [-1]
            for i in range(1, nodes):
                parents.append(i - 1 if self.kind == CHAIN else int(rng.integers(-1, i)))
            depth: list[int] = []
            for parent in parents:
                depth.append(0 if parent < 0 else depth[parent] + 1)
            at = tuple(committed + d for d in depth)
            self.spans.append(Span(r, start, start + nodes, at, tuple(parents), False))
            start += nodes
        self.packed = pack(
            [0] * start,
            self.spans,
            range(len(self.rows)),
            [c for c, _ in self.rows],
            self.share,
            len(self.rows) if self.padding else None,
        )
        _, _, self.nodes = self.packed.views(torch.from_numpy(self.packed.flat))
        self.real = start
        n = len(self.nodes.rows_N)
        heads = self.groups * self.share
        self.q = torch.randn(self.layers, n, heads, self.width, generator=made).to(self.dtype)
        self.k, self.v = (
            torch.randn(n, self.groups, self.width, generator=made).to(self.dtype) for _ in range(2)
        )

    def path(self, span: Span) -> list[int]:
        """Offsets from a root to the last node."""
        path = [len(span) - 1]
        while span.parents[path[0]] >= 0:
            path.insert(0, span.parents[path[0]])
        return path

    def givers(self, carry: float) -> Givers:
        """The path of every second row, from the first on, each node with a weight of its own."""
        jobs, nodes, slots = [], [], 0
        for span in self.spans[::2]:
            path = self.path(span)
            jobs.append([span.row, len(nodes), len(path), path[-1] + 1])
            nodes += [span.start + offset for offset in path]
            slots = max(slots, int(self.pages.lengths_RLG[span.row].max()) + path[-1] + 1)
        weights = torch.rand(len(nodes), generator=torch.Generator().manual_seed(2))
        return Givers(
            torch.tensor(jobs, dtype=torch.int32), torch.full((len(jobs),), carry),
            torch.tensor(nodes, dtype=torch.int32), weights, slots,
        )  # fmt: skip

    def probabilities(self, layer: int, span: Span, g: int) -> tuple[Tensor, Tensor]:
        """By SDPA over the identity: float64 (share, T, S), and the places of these slots."""
        length, nodes = int(self.pages.lengths_RLG[span.row, layer, g]), len(span)
        slot = torch.arange(length + nodes)
        place = self.pages.table_RLGM[span.row, layer, g].long()[slot // PAGE] * PAGE + slot % PAGE
        sees = torch.ones(nodes, length + nodes, dtype=torch.bool)
        sees[:, length:] = span.ancestors()
        if self.window is not None:
            held = self.pages.positions_PS.flatten()[place]
            sees &= held[None] > torch.tensor(span.positions)[:, None] - self.window
        q = self.q[layer, span.start : span.stop, g * self.share : (g + 1) * self.share].double()
        k = self.pages.keys_PSK.flatten(0, 1)[place].double()
        one = torch.eye(len(slot), dtype=torch.float64)
        return scaled_dot_product_attention(
            q.transpose(0, 1), k.expand(self.share, -1, -1), one.expand(self.share, -1, -1),
            attn_mask=sees, scale=self.width**-0.5,
        ), place  # fmt: skip

    def oracle(self, layer: int) -> Tensor:
        """float64 (N, H, K) of the staged nodes."""
        out = torch.zeros(self.real, self.groups * self.share, self.width, dtype=torch.float64)
        for span in self.spans:
            for g in range(self.groups):
                shares, place = self.probabilities(layer, span, g)
                values = self.pages.values_PSK.flatten(0, 1)[place].double()
                heads = slice(g * self.share, (g + 1) * self.share)
                out[span.start : span.stop, heads] = (shares @ values).transpose(0, 1)
        return out

    def stage(self, layer: int) -> None:
        paged_attention.stage(self.pages, self.nodes, layer, self.k, self.v)


def staged(pages: Pages, nodes: Nodes, layer: int, k: Tensor, v: Tensor, triton: bool) -> Pages:
    module = paged_attention
    if triton:
        from axicon.kernels import paged_attention_triton as module  # type: ignore[no-redef]
    module.stage(pages, nodes, layer, k, v)
    return pages


def attended(
    pages: Pages, nodes: Nodes, layer: int, q: Tensor, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    from axicon.kernels import paged_attention_triton

    return paged_attention_triton.attend(pages, nodes, layer, q, scale, window)


def received(pages: Pages, *given: object) -> Tensor:
    from axicon.kernels import paged_attention_triton

    paged_attention_triton.receive(pages, *given)  # type: ignore[arg-type]
    return pages.received_PS
