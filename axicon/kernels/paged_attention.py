"""Attention over pages: what the cache of a GPU is made of, and the kernels that read it, in torch.

Every KV head of every layer of a row has pages of its own, of 16 slots each, so heads may hold different
numbers of slots and an eviction gives whole pages back. The nodes of a step are staged in the slots behind
the committed ones. A node sees the committed slots of its row and its own ancestors among the staged ones.

`stage`, `attend` and `receive` run as Triton kernels where the pages are on a GPU, and in torch elsewhere;
that is slow, obvious, and what the kernels are compared with.

Shape letters beyond those of `axicon.protocols`: P pages, M pages of a head in the table, W words of 32
nodes, J rows whose slots receive attention, C nodes that give it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from axicon.errors import AxiconError

PAGE = 16
"""Slots of a page."""
NOBODYS = 0
"""The page that belongs to no head. Table entries without a page point to it, so what padding writes and what
a mask hides always has a place.
"""


class Pages(NamedTuple):
    """The cache of all rows. A step's kernels change it in place."""

    keys_PSK: Tensor
    values_PSK: Tensor
    positions_PS: Tensor
    """int32. Position held by each slot."""
    received_PS: Tensor
    """float32. Attention that each slot has received; zero where it is staged."""
    table_RLGM: Tensor
    """int32. Page of each 16 slots."""
    lengths_RLG: Tensor
    """int32. Committed slots."""


class Tiles(NamedTuple):
    """Nodes that one program attends for together, and how the slots are cut among programs.

    Results do not depend on who shares a step: slots are cut at multiples of `split` whatever their number.
    """

    tiles_T4: Tensor
    """int32: table row, first node, number of nodes (0 for padding), offset of the first."""
    rows: int
    """Rows of the matrix product, query heads times nodes: 16, 32, 64, ..."""
    split: int
    """Slots of a program."""
    splits: int
    """Programs that a tile's slots may need, at least."""


class Nodes(NamedTuple):
    """Where the nodes of a step belong, on the device of the pages."""

    rows_N: Tensor
    """int32. Row of the table."""
    offsets_N: Tensor
    """int32. Place among the staged nodes of its row."""
    positions_N: Tensor
    """int32."""
    ancestors_NW: Tensor
    """int32. Bit j % 32 of word j // 32: the node sees the staged node at offset j of its row."""
    groups: tuple[Tiles, ...]
    """Every node lies in one tile."""


class Givers(NamedTuple):
    """Committed nodes whose attention is counted."""

    jobs_J4: Tensor
    """int32: table row, first entry of `nodes_C`, number of entries, staged slots that are counted."""
    carry_J: Tensor
    """float32. What is left of what the row's slots have received before: 1 for a sum, 0 to begin again."""
    nodes_C: Tensor
    """int32. Nodes, those of a row in ascending order."""
    weights_C: Tensor
    """float32. What each one's attention counts."""
    slots: int
    """Slots of the fullest head, counted staged ones included."""


def stage(pages: Pages, nodes: Nodes, layer: int, k_NGK: Tensor, v_NGK: Tensor) -> None:
    """Write the nodes' keys, values and positions into their slots, which have received nothing."""
    if k_NGK.is_cuda:
        kernels().stage(pages, nodes, layer, k_NGK, v_NGK)
        return
    place_NG = _staged_slots(pages, nodes, layer)
    pages.keys_PSK.view(-1, k_NGK.shape[2])[place_NG] = k_NGK
    pages.values_PSK.view(-1, v_NGK.shape[2])[place_NG] = v_NGK
    pages.positions_PS.view(-1)[place_NG] = nodes.positions_N[:, None].expand_as(place_NG)
    pages.received_PS.view(-1)[place_NG] = 0.0


def attend(
    pages: Pages, nodes: Nodes, layer: int, q_NHK: Tensor, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """(N, H, K) in the dtype of q, and float32 (N, H): the logarithm of each softmax's denominator."""
    if q_NHK.is_cuda:
        return kernels().attend(pages, nodes, layer, q_NHK, scale, window)
    groups = pages.table_RLGM.shape[2]
    exact = torch.promote_types(q_NHK.dtype, torch.float32)
    out_NHK = torch.empty(q_NHK.shape, dtype=q_NHK.dtype, device=q_NHK.device)
    lse_NH = torch.empty(q_NHK.shape[:2], dtype=torch.float32, device=q_NHK.device)
    for row, start, stop in _row_nodes(nodes):
        for g in range(groups):
            place_S, sees_TS = _visible(pages, nodes, layer, row, g, range(start, stop), window)
            heads = slice(g * q_NHK.shape[1] // groups, (g + 1) * q_NHK.shape[1] // groups)
            q_RTK = q_NHK[start:stop, heads].transpose(0, 1).to(exact)
            scores_RTS = q_RTK @ pages.keys_PSK.flatten(0, 1)[place_S].to(exact).T * scale
            scores_RTS = scores_RTS.masked_fill(~sees_TS, -torch.inf)
            o_RTK = scores_RTS.softmax(-1) @ pages.values_PSK.flatten(0, 1)[place_S].to(exact)
            out_NHK[start:stop, heads] = o_RTK.transpose(0, 1).to(out_NHK.dtype)
            lse_NH[start:stop, heads] = scores_RTS.logsumexp(-1).T.float()
    return out_NHK, lse_NH


def receive(
    pages: Pages,
    nodes: Nodes,
    givers: Givers,
    layers: range,
    q_LNHK: Tensor,
    lse_LNH: Tensor,
    scale: float,
    windows_L: Tensor,
) -> None:
    """Add what the givers attend to, summed over a group's query heads, to what `received_PS` carries over.

    layers: which layers of the table L stands for. windows_L: int32, 0 for none.
    """
    if q_LNHK.is_cuda:
        kernels().receive(pages, nodes, givers, layers, q_LNHK, lse_LNH, scale, windows_L)
        return
    groups = pages.table_RLGM.shape[2]
    for (row, first, count, _), carry in zip(givers.jobs_J4.tolist(), givers.carry_J.tolist(), strict=True):
        picked = givers.nodes_C[first : first + count].tolist()
        weights_T1 = givers.weights_C[first : first + count, None]
        for at, layer in enumerate(layers):
            window = int(windows_L[at]) or None
            for g in range(groups):
                place_S, sees_TS = _visible(pages, nodes, layer, row, g, picked, window)
                heads = slice(g * q_LNHK.shape[2] // groups, (g + 1) * q_LNHK.shape[2] // groups)
                q_RTK = q_LNHK[at, picked, heads].transpose(0, 1).float()
                scores_RTS = q_RTK @ pages.keys_PSK.flatten(0, 1)[place_S].float().T * scale
                lse_RT1 = lse_LNH[at, picked, heads].T[..., None]
                shares_RTS = (scores_RTS - lse_RT1).exp().masked_fill(~sees_TS, 0.0)
                before_S = pages.received_PS.flatten()[place_S]
                pages.received_PS.view(-1)[place_S] = before_S * carry + (shares_RTS * weights_T1).sum((0, 1))


def _row_nodes(nodes: Nodes) -> Iterator[tuple[int, int, int]]:
    """(table row, first node, behind the last) of each row's nodes, which are adjacent."""
    rows, start = nodes.rows_N.tolist(), 0
    for stop in range(1, len(rows) + 1):
        if stop == len(rows) or rows[stop] != rows[start] or int(nodes.offsets_N[stop]) == 0:
            yield rows[start], start, stop
            start = stop


def _visible(
    pages: Pages, nodes: Nodes, layer: int, row: int, g: int, picked: range | list[int], window: int | None
) -> tuple[Tensor, Tensor]:
    """Slots up to the last picked node, as places among all slots, and bool (T, S): who sees which."""
    length = int(pages.lengths_RLG[row, layer, g])
    slot_S = torch.arange(length + int(nodes.offsets_N[picked[-1]]) + 1, device=pages.keys_PSK.device)
    place_S = pages.table_RLGM[row, layer, g].long()[slot_S // PAGE] * PAGE + slot_S % PAGE
    index = torch.tensor(list(picked), device=slot_S.device)
    bit = torch.arange(32, device=slot_S.device)
    staged_TJ = (((nodes.ancestors_NW[index, :, None] >> bit) & 1) == 1).flatten(1)
    sees_TS = torch.ones(len(index), len(slot_S), dtype=torch.bool, device=slot_S.device)
    sees_TS[:, length:] = staged_TJ[:, : len(slot_S) - length]
    if window is not None:
        held_S = pages.positions_PS.flatten()[place_S]
        sees_TS &= held_S[None, :] > nodes.positions_N[index, None] - window
    return place_S, sees_TS


def _staged_slots(pages: Pages, nodes: Nodes, layer: int) -> Tensor:
    """int64 (N, G): the place of each node's slots among all slots."""
    rows_N = nodes.rows_N.long()
    slot_NG = pages.lengths_RLG[rows_N, layer].long() + nodes.offsets_N[:, None]
    page_NG = pages.table_RLGM[rows_N, layer].gather(2, slot_NG[..., None] // PAGE)[..., 0]
    return page_NG.long() * PAGE + slot_NG % PAGE


def kernels() -> Any:
    """The Triton kernels, imported late: Triton is not on every system."""
    try:
        from axicon.kernels import paged_attention_triton
    except ImportError as error:
        raise AxiconError(
            f"attention on a GPU needs Triton, which cannot be imported ({error}): pip install triton"
        ) from error
    return paged_attention_triton
