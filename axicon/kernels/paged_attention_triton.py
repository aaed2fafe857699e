"""Attention over pages on a CUDA device: the arithmetic of `paged_attention.py` in four kernels.

`attend_part` computes one tile of nodes and one part of the slots. The query heads of a group, and the nodes
of a tree, are the rows of one matrix product, so keys and values are read once per KV head. `merge` puts the
parts of a tile together by the logarithms of their denominators. `receive_slots` computes probabilities again
from the merged ones and sums them by slot; attention is the same kernel with and without it. Every number is
written by one program: no atomics, so the same bits every time.

Loops have constant bounds and parts are cut at fixed slots, so a row's bits do not depend on its neighbours,
and the kernels can be captured in a graph: lengths, tables and tiles are read on the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from axicon.kernels.paged_attention import PAGE, Givers, Nodes, Pages

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
BLOCK = 64
"""Slots of one matrix product."""
INTS = ("rows_N", "offsets_N", "positions_N", "ancestors_NW", "tiles_T4", "windows_L")
"""Views of a step's integers, wherever they begin: not a reason to compile again."""


def stage(pages: Pages, nodes: Nodes, layer: int, k_NGK: Tensor, v_NGK: Tensor) -> None:
    _, layers, groups, _ = pages.table_RLGM.shape
    k_NGK, v_NGK = _heads_contiguous(k_NGK), _heads_contiguous(v_NGK)
    width = k_NGK.shape[2]
    with torch.cuda.device_of(k_NGK):
        stage_node[(len(k_NGK),)](
            k_NGK, v_NGK, pages.keys_PSK, pages.values_PSK, pages.positions_PS, pages.received_PS,
            pages.table_RLGM, pages.lengths_RLG, nodes.rows_N, nodes.offsets_N, nodes.positions_N,
            layer, k_NGK.stride(0), v_NGK.stride(0), pages.table_RLGM.stride(2),
            LAYERS=layers, GROUPS=groups, WIDTH=width, SLOTS=PAGE,
            HEADS=triton.next_power_of_2(groups), WIDE=triton.next_power_of_2(width), num_warps=4,
        )  # fmt: skip


def attend(
    pages: Pages, nodes: Nodes, layer: int, q_NHK: Tensor, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    _, layers, groups, _ = pages.table_RLGM.shape
    q_NHK = _heads_contiguous(q_NHK)
    count, heads, width = q_NHK.shape
    out_NHK = torch.empty(count, heads, width, dtype=q_NHK.dtype, device=q_NHK.device)
    lse_NH = torch.empty(count, heads, dtype=torch.float32, device=q_NHK.device)
    wide = max(16, triton.next_power_of_2(width))
    # Of float32 and wide heads less at once, or the shared memory of small devices does not hold it.
    block = BLOCK // 2 if wide * q_NHK.itemsize > 256 else BLOCK
    with torch.cuda.device_of(q_NHK):
        for tiles in nodes.groups:
            number, alone = len(tiles.tiles_T4), tiles.splits == 1
            if number == 0:
                continue
            shared = {
                "GROUPS": groups, "SHARE": heads // groups, "WIDTH": width, "WIDE": wide, "ROWS": tiles.rows,
                "num_warps": 4 if tiles.rows <= 32 else 8, "enable_fp_fusion": False,
            }  # fmt: skip
            parts = (tiles.splits, number, groups, tiles.rows)
            part, part_lse = (out_NHK, lse_NH) if alone else (
                torch.empty(shape, dtype=torch.float32, device=q_NHK.device)
                for shape in ((*parts, width), parts)
            )  # fmt: skip
            attend_part[(number, groups, tiles.splits)](
                q_NHK, pages.keys_PSK, pages.values_PSK, pages.positions_PS, pages.table_RLGM,
                pages.lengths_RLG, tiles.tiles_T4, nodes.ancestors_NW, nodes.positions_N, part, part_lse,
                layer, q_NHK.stride(0), pages.table_RLGM.stride(2),
                window or 0, number,
                LAYERS=layers, SLOTS=PAGE, WORDS=nodes.ancestors_NW.shape[1], SCALE=scale,
                WINDOW=window is not None, ALONE=alone, SPLIT=tiles.split, BLOCK=block,
                num_stages=2 if q_NHK.dtype == torch.float32 else 3, **shared,
            )  # fmt: skip
            if not alone:
                merge[(number, groups)](
                    part, part_lse, tiles.tiles_T4, out_NHK, lse_NH, number, SPLITS=tiles.splits, **shared
                )
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
    _, all_layers, groups, _ = pages.table_RLGM.shape
    _, count, heads, width = q_LNHK.shape
    share = heads // groups
    jobs = len(givers.jobs_J4)
    if jobs == 0:
        return
    with torch.cuda.device_of(q_LNHK):
        receive_slots[(jobs * len(layers), groups, triton.cdiv(givers.slots, BLOCK))](
            q_LNHK, lse_LNH, pages.keys_PSK, pages.positions_PS, pages.received_PS, pages.table_RLGM,
            pages.lengths_RLG, givers.jobs_J4, givers.carry_J, givers.nodes_C, givers.weights_C,
            nodes.ancestors_NW, nodes.positions_N, windows_L,
            layers.start, len(layers), count, pages.table_RLGM.stride(2),
            LAYERS=all_layers, WORDS=nodes.ancestors_NW.shape[1], GROUPS=groups, SHARE=share, WIDTH=width,
            WIDE=max(16, triton.next_power_of_2(width)), SLOTS=PAGE, SCALE=scale,
            ROWS=max(16, triton.next_power_of_2(share)), BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


def _heads_contiguous(x_NGK: Tensor) -> Tensor:
    return x_NGK if x_NGK.stride()[1:] == (x_NGK.shape[2], 1) else x_NGK.contiguous()


@triton.jit(do_not_specialize=["layer"], do_not_specialize_on_alignment=INTS)
def stage_node(
    k_NGK: tl.tensor, v_NGK: tl.tensor, keys_PSK: tl.tensor, values_PSK: tl.tensor, positions_PS: tl.tensor,
    received_PS: tl.tensor, table_RLGM: tl.tensor, lengths_RLG: tl.tensor, rows_N: tl.tensor,
    offsets_N: tl.tensor, positions_N: tl.tensor,
    layer: tl.tensor, k_stride: tl.tensor, v_stride: tl.tensor, table_stride: tl.tensor,
    LAYERS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, SLOTS: tl.constexpr,
    HEADS: tl.constexpr, WIDE: tl.constexpr,
) -> None:  # fmt: skip
    """All heads of one node."""
    node = tl.program_id(0).to(tl.int64)
    g = tl.arange(0, HEADS)
    head = g < GROUPS
    row = tl.load(rows_N + node).to(tl.int64)
    at = (row * LAYERS + layer) * GROUPS + g
    slot = tl.load(lengths_RLG + at, mask=head, other=0) + tl.load(offsets_N + node)
    page = tl.load(table_RLGM + at * table_stride + slot // SLOTS, mask=head, other=0).to(tl.int64)
    place = page * SLOTS + slot % SLOTS
    c = tl.arange(0, WIDE)[None, :]
    inside = head[:, None] & (c < WIDTH)
    source, target = g[:, None] * WIDTH + c, place[:, None] * WIDTH + c
    tl.store(keys_PSK + target, tl.load(k_NGK + node * k_stride + source, mask=inside), mask=inside)
    tl.store(values_PSK + target, tl.load(v_NGK + node * v_stride + source, mask=inside), mask=inside)
    # `g * 0`: a scalar spread over a block, in a way that every interpreter takes.
    tl.store(positions_PS + place, g * 0 + tl.load(positions_N + node), mask=head)
    tl.store(received_PS + place, g * 0.0, mask=head)


@triton.jit
def places(
    table_M: tl.tensor, slot: tl.tensor, live: tl.tensor, SLOTS: tl.constexpr
) -> tl.tensor:  # fmt: skip
    page = tl.load(table_M + slot // SLOTS, mask=live, other=0).to(tl.int64)
    return page * SLOTS + slot % SLOTS


@triton.jit
def seen(
    ancestors_NW: tl.tensor, node: tl.tensor, inside: tl.tensor, staged: tl.tensor, live: tl.tensor,
    WORDS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """bool (nodes, slots). `staged` is a slot's offset among the staged ones, negative if it is committed."""
    if WORDS == 1:
        word = tl.load(ancestors_NW + node, mask=inside, other=0)[:, None]
    else:
        word = tl.load(
            ancestors_NW + node[:, None] * WORDS + staged[None, :] // 32,
            mask=inside[:, None] & (live & (staged >= 0))[None, :], other=0,
        )  # fmt: skip
    ancestor = ((word >> (staged & 31)[None, :]) & 1) == 1
    return live[None, :] & ((staged < 0)[None, :] | ancestor)


@triton.jit(do_not_specialize=["layer", "number"], do_not_specialize_on_alignment=INTS)
def attend_part(
    q_NHK: tl.tensor, keys_PSK: tl.tensor, values_PSK: tl.tensor, positions_PS: tl.tensor,
    table_RLGM: tl.tensor, lengths_RLG: tl.tensor, tiles_T4: tl.tensor, ancestors_NW: tl.tensor,
    positions_N: tl.tensor, out: tl.tensor, lse: tl.tensor,
    layer: tl.tensor, q_stride: tl.tensor, table_stride: tl.tensor, window: tl.tensor, number: tl.tensor,
    LAYERS: tl.constexpr, GROUPS: tl.constexpr, SHARE: tl.constexpr, WIDTH: tl.constexpr,
    WIDE: tl.constexpr, SLOTS: tl.constexpr, WORDS: tl.constexpr, SCALE: tl.constexpr, WINDOW: tl.constexpr,
    ALONE: tl.constexpr, ROWS: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """One tile, one KV head, one part of the slots. ALONE: there is one part, and this is the result.

    Otherwise out is (splits, tiles, G, ROWS, K) and lse, to base 2, (splits, tiles, G, ROWS).
    """
    tile, g, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tl.load(tiles_T4 + tile * 4).to(tl.int64)
    first, count = tl.load(tiles_T4 + tile * 4 + 1), tl.load(tiles_T4 + tile * 4 + 2)
    at = (row * LAYERS + layer) * GROUPS + g
    length = tl.load(lengths_RLG + at)
    begin = 0
    stop = tl.where(count > 0, length + tl.load(tiles_T4 + tile * 4 + 3) + count, 0)
    if WINDOW:
        # Slots lie in the order of their positions, so no more than the newest can be in the window.
        begin = tl.maximum(length - window + 1, 0)

    m = tl.arange(0, ROWS)
    inside = m // SHARE < count
    node = (first + m // SHARE).to(tl.int64)
    head = g * SHARE + m % SHARE
    c = tl.arange(0, WIDE)
    channel = c < WIDTH
    top = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    found = tl.zeros((ROWS, WIDE), tl.float32)
    if (split * SPLIT < stop) & ((split + 1) * SPLIT > begin):
        q = tl.load(
            q_NHK + (node * q_stride + head * WIDTH)[:, None] + c[None, :],
            mask=inside[:, None] & channel[None, :], other=0.0,
        )  # fmt: skip
        if WINDOW:
            oldest = tl.load(positions_N + node, mask=inside, other=0) - window
        table_M = table_RLGM + at * table_stride
        for block in range(0, SPLIT, BLOCK):
            slot = split * SPLIT + block + tl.arange(0, BLOCK)
            live = (slot < stop) & (slot >= begin)
            place = places(table_M, slot, live, SLOTS)
            k = tl.load(
                keys_PSK + place[None, :] * WIDTH + c[:, None],
                mask=channel[:, None] & live[None, :], other=0.0,
            )  # fmt: skip
            v = tl.load(
                values_PSK + place[:, None] * WIDTH + c[None, :],
                mask=live[:, None] & channel[None, :], other=0.0,
            )  # fmt: skip
            sees = seen(ancestors_NW, node, inside, slot - length, live, WORDS)
            if WINDOW:
                held = tl.load(positions_PS + place, mask=live, other=0)
                sees = sees & (held[None, :] > oldest[:, None])
            score = tl.dot(q, k, input_precision="ieee") * (SCALE * LOG2E)
            score = tl.where(sees, score, -float("inf"))
            higher = tl.maximum(top, tl.max(score, 1))
            base = tl.where(higher == -float("inf"), 0.0, higher)
            share = tl.exp2(score - base[:, None])
            fade = tl.exp2(top - base)
            total = total * fade + tl.sum(share, 1)
            found = tl.dot(share.to(v.dtype), v, found * fade[:, None], input_precision="ieee")
            top = higher
    safe = tl.where(total > 0, total, 1.0)
    found = found / safe[:, None]
    level = tl.where(total > 0, top + tl.log2(safe), -float("inf"))
    if ALONE:
        target = (node * GROUPS * SHARE + head) * WIDTH
        tl.store(lse + node * GROUPS * SHARE + head, level * LN2, mask=inside)
    else:
        part = ((split.to(tl.int64) * number + tile) * GROUPS + g) * ROWS + m
        target = part * WIDTH
        tl.store(lse + part, level, mask=inside)
    tl.store(
        out + target[:, None] + c[None, :], found.to(out.dtype.element_ty),
        mask=inside[:, None] & channel[None, :],
    )  # fmt: skip


@triton.jit(do_not_specialize=["number"], do_not_specialize_on_alignment=INTS)
def merge(
    part_STGMK: tl.tensor, level_STGM: tl.tensor, tiles_T4: tl.tensor, out_NHK: tl.tensor, lse_NH: tl.tensor,
    number: tl.tensor,
    SPLITS: tl.constexpr, GROUPS: tl.constexpr, SHARE: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:  # fmt: skip
    """One tile and one KV head: the parts weighted by their shares of the softmax's denominator."""
    tile, g = tl.program_id(0), tl.program_id(1)
    first, count = tl.load(tiles_T4 + tile * 4 + 1), tl.load(tiles_T4 + tile * 4 + 2)
    m = tl.arange(0, ROWS)
    inside = m // SHARE < count
    head = (first + m // SHARE).to(tl.int64) * GROUPS * SHARE + g * SHARE + m % SHARE
    c = tl.arange(0, WIDE)
    within = inside[:, None] & (c < WIDTH)[None, :]
    top = tl.full((ROWS,), -float("inf"), tl.float32)
    for split in range(0, SPLITS):
        part = ((number.to(tl.int64) * split + tile) * GROUPS + g) * ROWS + m
        top = tl.maximum(top, tl.load(level_STGM + part, mask=inside, other=0.0))
    total = tl.zeros((ROWS,), tl.float32)
    found = tl.zeros((ROWS, WIDE), tl.float32)
    for split in range(0, SPLITS):
        part = ((number.to(tl.int64) * split + tile) * GROUPS + g) * ROWS + m
        weight = tl.exp2(tl.load(level_STGM + part, mask=inside, other=0.0) - top)
        total += weight
        value = tl.load(part_STGMK + part[:, None] * WIDTH + c[None, :], mask=within, other=0.0)
        found += weight[:, None] * value
    tl.store(
        out_NHK + head[:, None] * WIDTH + c[None, :], (found / total[:, None]).to(out_NHK.dtype.element_ty),
        mask=within,
    )  # fmt: skip
    tl.store(lse_NH + head, (top + tl.log2(total)) * LN2, mask=inside)


@triton.jit(do_not_specialize=["first_layer", "layers", "count"], do_not_specialize_on_alignment=INTS)
def receive_slots(
    q_LNHK: tl.tensor, lse_LNH: tl.tensor, keys_PSK: tl.tensor, positions_PS: tl.tensor,
    received_PS: tl.tensor, table_RLGM: tl.tensor, lengths_RLG: tl.tensor, jobs_J4: tl.tensor,
    carry_J: tl.tensor, nodes_C: tl.tensor, weights_C: tl.tensor, ancestors_NW: tl.tensor,
    positions_N: tl.tensor, windows_L: tl.tensor,
    first_layer: tl.tensor, layers: tl.tensor, count: tl.tensor, table_stride: tl.tensor,
    LAYERS: tl.constexpr, GROUPS: tl.constexpr, SHARE: tl.constexpr, WIDTH: tl.constexpr,
    WIDE: tl.constexpr, SLOTS: tl.constexpr, WORDS: tl.constexpr, SCALE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """What one block of slots of one row, layer and KV head receives from the row's givers."""
    job, local, g = tl.program_id(0) // layers, tl.program_id(0) % layers, tl.program_id(1)
    row = tl.load(jobs_J4 + job * 4).to(tl.int64)
    entry, givers = tl.load(jobs_J4 + job * 4 + 1), tl.load(jobs_J4 + job * 4 + 2)
    at = (row * LAYERS + first_layer + local) * GROUPS + g
    length = tl.load(lengths_RLG + at)
    stop = length + tl.load(jobs_J4 + job * 4 + 3)
    slot = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    live = slot < stop
    if tl.program_id(2) * BLOCK < stop:
        place = places(table_RLGM + at * table_stride, slot, live, SLOTS)
        c = tl.arange(0, WIDE)
        channel = c < WIDTH
        k = tl.load(
            keys_PSK + place[None, :] * WIDTH + c[:, None], mask=channel[:, None] & live[None, :], other=0.0
        )
        held = tl.load(positions_PS + place, mask=live, other=0)
        window = tl.load(windows_L + local)
        window = tl.where(window > 0, window, 2147483647)
        m = tl.arange(0, ROWS)
        received = tl.load(received_PS + place, mask=live, other=0.0) * tl.load(carry_J + job)
        done = 0
        while done < givers:
            which = done + m // SHARE
            inside = (which < givers) & (m < ROWS // SHARE * SHARE)
            node = tl.load(nodes_C + entry + which, mask=inside, other=0).to(tl.int64)
            head = (local.to(tl.int64) * count + node) * GROUPS * SHARE + g * SHARE + m % SHARE
            q = tl.load(
                q_LNHK + head[:, None] * WIDTH + c[None, :],
                mask=inside[:, None] & channel[None, :], other=0.0,
            )  # fmt: skip
            level = tl.load(lse_LNH + head, mask=inside, other=0.0) * LOG2E
            sees = seen(ancestors_NW, node, inside, slot - length, live, WORDS) & inside[:, None]
            own = tl.load(positions_N + node, mask=inside, other=0)
            sees = sees & (held[None, :] > own[:, None] - window)
            score = tl.dot(q, k, input_precision="ieee") * (SCALE * LOG2E) - level[:, None]
            weight = tl.load(weights_C + entry + which, mask=inside, other=0.0)
            received += tl.sum(tl.where(sees, tl.exp2(score) * weight[:, None], 0.0), 0)
            done += ROWS // SHARE
        tl.store(received_PS + place, received, mask=live)
