"""Attention over pages on a CUDA device, beside SDPA over rectangles and beside the memory's limit.

`python benchmarks/attention_gpu.py [key=value ...]` times one layer's attention of steps that decode (one
node per stream) and of steps that check trees, at several lengths; the same with caches cut to a fifth; and
the pass that counts what slots receive. SDPA reads keys and values as they lie best for it, (streams, KV
heads, slots, width), with a mask where there are trees. The limit is the time in which the device copies as
many bytes as live keys and values, queries and outputs have.

`model=demo` also times whole steps, replayed from graphs and launched one by one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from gpu import CACHE_BYTES, Counts, GpuBench, new_table, per_product, run, show, surround
from pydantic import Field
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from axicon.errors import AxiconError
from axicon.generate.paged_step import pack
from axicon.generate.spans import Span
from axicon.kernels.paged_attention import Givers, Nodes, attend, receive
from axicon.model.pages import PagedCache
from axicon.settings import Words

DEVICE = "cuda"


class AttentionGpuBench(GpuBench):
    streams: Counts = Field((1, 8, 64), min_length=1, description="streams, comma between")
    slots: Counts = Field((512, 2048, 8192), min_length=1, description="tokens of each stream, comma between")
    heads: Words = Field(
        ("9x3x64", "32x8x128"), min_length=1, description="query heads x KV heads x width, comma between"
    )
    nodes: Counts = Field((1, 8), min_length=1, description="nodes of a stream in a step, comma between")
    model: str = Field("", description="time whole steps of this model too")

    def shapes(self) -> list[tuple[int, ...]]:
        try:
            found = [tuple(int(n) for n in heads.split("x")) for heads in self.heads]
        except ValueError:
            found = []
        if not found or any(len(one) != 3 or min(one) < 1 or one[0] % one[1] for one in found):
            raise AxiconError(f"heads={','.join(self.heads)}: each is QUERYxKVxWIDTH, such as 9x3x64")
        return found


class Point(NamedTuple):
    heads: int
    groups: int
    width: int
    streams: int
    slots: int
    nodes: int


class Filled(NamedTuple):
    """Layers enough to fill any cache, so that nothing is read twice from there."""

    cache: PagedCache
    nodes: Nodes
    live: int
    """Slots of all streams and KV heads of one layer, staged ones included."""


def filled(point: Point, layers: int, share: float, generator: torch.Generator) -> Filled:
    """Streams that hold `share` of their slots, layers a few less if it is not all of them."""
    most = point.slots + point.nodes + 32
    per_slot = 2 * point.groups * point.width * 2 + 8 * point.groups
    cache = PagedCache(
        [(point.groups, point.width)] * layers, torch.bfloat16,
        2 * (layers + 1) * (point.streams + 1) * most * per_slot,
        device=torch.device(DEVICE), max_rows=point.streams,
    )  # fmt: skip
    for store in (cache.pages.keys_PSK, cache.pages.values_PSK):
        store.normal_(generator=generator)
    spans = []
    for row in range(point.streams):
        cache.open(row, most)
        for layer in range(layers):
            kept = int(point.slots * share) - (layer % 16 if share < 1 else 0)
            cache.make_room(row, kept + point.nodes, range(layer, layer + 1))
            cache.grow(row, range(layer, layer + 1), kept)
        parents = [-1, *(i // 2 for i in range(point.nodes - 1))]
        depth = [0] * point.nodes
        for i, parent in enumerate(parents[1:], 1):
            depth[i] = depth[parent] + 1
        start = row * point.nodes
        at = tuple(point.slots + d for d in depth)
        spans.append(Span(row, start, start + point.nodes, at, tuple(parents), False))
    cache.sync()
    rows = [cache.paged(row).index for row in range(point.streams)]
    packed = pack(
        [0] * (point.streams * point.nodes), spans, rows, [int(point.slots * share)] * point.streams,
        point.heads // point.groups,
    )  # fmt: skip
    _, _, nodes = packed.views(torch.from_numpy(packed.flat).to(DEVICE))
    live = sum(int(cache.lengths(row, range(1)).sum()) for row in range(point.streams))
    return Filled(cache, nodes, live + point.streams * point.groups * point.nodes)


def ours(point: Point, made: Filled, layers: int) -> list[Callable[[Tensor], Tensor]]:
    def one(layer: int) -> Callable[[Tensor], Tensor]:
        return lambda q: attend(made.cache.pages, made.nodes, layer, q, point.width**-0.5, None)[0]

    return [one(layer) for layer in range(layers)]


def rectangles(point: Point, made: Filled, layers: int) -> list[Callable[[Tensor], Tensor]]:
    """SDPA over copies of the same keys and values."""
    index = [made.cache.paged(row).index for row in range(point.streams)]
    slot = torch.arange(point.slots + point.nodes, device=DEVICE)
    table = made.cache.pages.table_RLGM[index]
    mask = None
    if point.nodes > 1:
        sees = torch.ones(point.nodes, len(slot), dtype=torch.bool, device=DEVICE)
        bits = made.nodes.ancestors_NW[: point.nodes, 0, None] >> torch.arange(point.nodes, device=DEVICE)
        sees[:, point.slots :] = (bits & 1) == 1
        mask = sees

    def one(layer: int) -> Callable[[Tensor], Tensor]:
        place = table[:, layer, :, :].long()[:, :, slot // 16] * 16 + slot % 16
        k, v = (
            store.view(-1, point.width)[place]
            for store in (made.cache.pages.keys_PSK, made.cache.pages.values_PSK)
        )

        def sdpa(q: Tensor) -> Tensor:
            q_BHTK = q.view(point.streams, point.nodes, point.heads, point.width).transpose(1, 2)
            out = scaled_dot_product_attention(
                q_BHTK, k, v, attn_mask=mask, enable_gqa=point.heads != point.groups
            )
            return out.transpose(1, 2).reshape(q.shape)

        return sdpa

    return [one(layer) for layer in range(layers)]


def counting(point: Point, made: Filled, layers: int, q: Tensor) -> Callable[[Tensor], Tensor]:
    """What all slots of all layers receive from one node per stream, in one call."""
    _, lse_NH = attend(made.cache.pages, made.nodes, 0, q, point.width**-0.5, None)
    q_LNHK, lse_LNH = (
        q.expand(layers, *q.shape).contiguous(),
        lse_NH.expand(layers, *lse_NH.shape).contiguous(),
    )
    jobs = [[made.cache.paged(row).index, row, 1, 1] for row in range(point.streams)]
    nodes = [row * point.nodes for row in range(point.streams)]
    jobs_J4, nodes_C, windows_L = (
        torch.tensor(given, dtype=torch.int32, device=DEVICE) for given in (jobs, nodes, [0] * layers)
    )
    one = torch.ones(point.streams, device=DEVICE)
    givers = Givers(jobs_J4, one, nodes_C, one, point.slots + point.nodes)

    def count(_: Tensor) -> Tensor:
        receive(
            made.cache.pages, made.nodes, givers, range(layers), q_LNHK, lse_LNH, point.width**-0.5,
            windows_L,
        )  # fmt: skip
        return made.cache.pages.received_PS

    return count


def measure_point(bench: AttentionGpuBench, point: Point, bandwidth: float) -> dict[str, Any]:
    """Inputs are random: a device may be faster on zeros."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    layer_bytes = point.streams * point.slots * point.groups * point.width * 4
    layers = max(1, min(64, -(-CACHE_BYTES // layer_bytes)))
    q = torch.randn(
        point.streams * point.nodes, point.heads, point.width, generator=generator, device=DEVICE,
        dtype=torch.bfloat16,
    )  # fmt: skip

    def limit(made: Filled) -> float:
        return 1e6 * (made.live * point.width * 4 + 2 * q.nbytes) / bandwidth

    with torch.inference_mode():
        whole = filled(point, layers, 1.0, generator)
        dense = rectangles(point, whole, layers)
        got, want = ours(point, whole, layers)[-1](q).double(), dense[-1](q).double()
        error = float((got - want).norm() / want.norm())
        if not error < 0.02:
            raise AxiconError(f"{point}: wrong result, relative error {error}")
        result: dict[str, Any] = {
            **point._asdict(), "layers": layers, "relative_error": error,
            "paged_us": per_product(ours(point, whole, layers), q, bench.repeat_ms),
            "receive_us": per_product([counting(point, whole, layers, q)], q, bench.repeat_ms) / layers,
            "limit_us": limit(whole),
            "sdpa_us": per_product(dense, q, bench.repeat_ms),
        }  # fmt: skip
        del whole, dense
        cut = filled(point, layers, 0.2, generator)
        result["cut_us"] = per_product(ours(point, cut, layers), q, bench.repeat_ms)
        result["cut_limit_us"] = limit(cut)
    return result


def whole_steps(
    model: str, streams: Sequence[int], slots: int = 512, steps: int = 50
) -> list[dict[str, Any]]:
    """Milliseconds of a decode step, host included, replayed and not."""
    from axicon.generate.paged import PagedRunner
    from axicon.model import checkpoint
    from axicon.step import StepInput

    decoder = checkpoint.load(checkpoint.resolve(model), dtype=torch.bfloat16).to(DEVICE)
    found = []
    for count in streams:
        times: dict[str, Any] = {"streams": count, "slots": slots}
        for graphs in (False, True):
            runner = PagedRunner(decoder, max_rows=count, graphs=graphs)
            commits: tuple[int, ...] = ()
            seconds = []
            reserves = tuple((row, slots + steps + 1) for row in range(count))
            for position in range(slots + steps):
                # The prompt is given one node per step too: simple, and every step is alike.
                row = torch.arange(count)
                flags = torch.ones(count, dtype=torch.bool)
                step = StepInput(
                    row + 5, torch.full((count,), position), row, row * 0 - 1, flags, row * 0, flags,
                    commits=commits, reserves=() if position else reserves,
                )  # fmt: skip
                started = time.perf_counter()
                runner.forward(step)
                seconds.append(time.perf_counter() - started)
                commits = tuple(range(count))
            times["graphs_ms" if graphs else "launched_ms"] = 1e3 * sorted(seconds[-steps:])[steps // 2]
        found.append(times)
    return found


def table(result: dict[str, Any]) -> Table:
    shown = new_table(result)
    for column in ("heads", "streams", "slots", "nodes", "paged", "limit", "of it", "SDPA", "SDPA / paged",
                   "counting", "a fifth", "its limit"):  # fmt: skip
        shown.add_column(column, justify="right")
    for one in result["products"]:
        shown.add_row(
            f"{one['heads']}x{one['groups']}x{one['width']}",
            *(str(one[key]) for key in ("streams", "slots", "nodes")),
            f"{one['paged_us']:.1f}", f"{one['limit_us']:.1f}", f"{one['limit_us'] / one['paged_us']:.0%}",
            f"{one['sdpa_us']:.1f}", f"{one['sdpa_us'] / one['paged_us']:.2f}",
            *(f"{one[key]:.1f}" for key in ("receive_us", "cut_us", "cut_limit_us")),
        )  # fmt: skip
    return shown


def main(words: Sequence[str]) -> None:
    bench = AttentionGpuBench.parse(words)
    points = {
        f"{heads}x{groups}x{width}, {streams} streams of {slots}, {nodes} nodes": Point(
            heads, groups, width, streams, slots, nodes
        )
        for heads, groups, width in bench.shapes()
        for streams in bench.streams
        for slots in bench.slots
        for nodes in bench.nodes
    }
    result = surround("attention_gpu", bench, points, lambda p, bandwidth: measure_point(bench, p, bandwidth))
    if bench.model:
        result["steps"] = whole_steps(bench.model, bench.streams)
        for one in result["steps"]:
            print(f"{one['streams']} streams: {one['graphs_ms']:.2f} ms a step, launched one by one "
                  f"{one['launched_ms']:.2f}")  # fmt: skip
    show("attention_gpu", result, table, bench.out)


if __name__ == "__main__":
    run("attention_gpu", main)
