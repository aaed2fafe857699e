"""A decoder whose whole step runs in one call of the C++ kernels (`axicon/kernels/cpu`).

The torch decoder stays the definition and the reference; this is the same computation with float32 between
the products, packed weights, and no Python, dispatcher or allocation between the layers. A row's result
depends on its own request alone, bit for bit, whatever else is in the step, on any number of threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from axicon.kernels import native
from axicon.model.adapterfile import Adapter
from axicon.model.cache import LayerCache, RowCache
from axicon.model.decoder import Block, Decoder, Norm, inverse_frequencies
from axicon.model.packed import PackedLinear
from axicon.model.shape import BlockShape, ModelShape
from axicon.model.variant import PLAIN

EXTENT = np.dtype(native.Extent)


def why_not(decoder: Decoder) -> str | None:
    """The reason this decoder needs the torch path, in one line; None when the kernels can run it."""
    if not (decoder.has_embedding and decoder.has_head):
        return "it is not a whole model"
    if (reason := why_not_shape(decoder.shape)) is not None:
        return reason
    if decoder.device.type != "cpu":
        return "its weights are not on a CPU"
    for name, module in decoder.named_modules():
        if isinstance(module, PackedLinear) and (why := module.why_not_native()) is not None:
            return f"{name} {why}"
        if isinstance(module, nn.Linear) and module.weight.dtype != torch.bfloat16:
            return f"{name} is {str(module.weight.dtype).removeprefix('torch.')}, not bfloat16"
    return native.why_unavailable()


def why_not_shape(shape: ModelShape) -> str | None:
    """The same of all that does not hang on weights, dtype and machine."""
    first = shape.blocks[0]
    varied = [b.attention for b in shape.blocks if not b.attention.plain]
    sliced = any(b.attention_shortcut or b.mlp_shortcut for b in shape.blocks)
    widths = (*_stream(shape), shape.embedding_width, first.hidden, shape.vocab)
    plain = {
        "its blocks differ in shape": len({_alike(b) for b in shape.blocks}) > 1,
        "its stream changes its width without shortcuts": any(
            (b.width_in, b.width_out) != (b.width_middle, shape.blocks[min(i + 1, shape.layers - 1)].width_in)
            for i, b in enumerate(shape.blocks)
            if not (sliced and b.width_in == b.width_middle and i == shape.layers - 1)
        ),
        "only some of its residuals have shortcuts": sliced
        and not all(b.attention_shortcut and b.mlp_shortcut for b in shape.blocks),
        "its norms follow the residual sum": not shape.norm_first or not shape.final_norm,
        "it projects between residual width and head": shape.project_out,
        "its attention and MLP run side by side": any(b.parallel for b in shape.blocks),
        "only some channels of a head rotate": shape.rope is not None and shape.rope.width is not None,
        f"its attention has {varied[0] if varied else PLAIN}": bool(varied),
        f"its head width is not one of {native.HEAD_WIDTHS}": first.head_width not in native.HEAD_WIDTHS,
        "a width is not a multiple of 16": any(w % 16 for w in widths),
        "its activation is not known to them": first.gated != (shape.activation == "silu"),
    }
    return next((reason for reason, holds in plain.items() if holds), None)


def _alike(block: BlockShape) -> tuple[object, ...]:
    """What all blocks must have in common."""
    return block.width_in, block.heads, block.kv_heads, block.head_width, block.hidden, block.gated


def _stream(shape: ModelShape) -> tuple[int, int]:
    """Widths of the residual stream: between blocks, and behind the last one."""
    return shape.width, shape.blocks[-1].width_out


@dataclass(frozen=True, slots=True)
class Rows:
    """The nodes of a step as the kernels want them. Requests are numbered by their place in `caches`."""

    tokens_N: Tensor
    positions_N: Tensor
    request_N: Sequence[int]
    offset_N: Sequence[int]
    """Place of the node among the staged nodes of its request."""
    caches: Sequence[RowCache]
    wanted: Sequence[int]
    hidden_NW: np.ndarray | None = None
    """uint64 bit sets of the staged nodes a row does not see; None when every span is a chain."""
    adapters: Sequence[int] = ()
    """Of each request, by the numbers that are held. Numbers that are not add nothing."""


class KeepBest(NamedTuple):
    """What an eviction leaves of each head, in slots: all of the first and the newest, and the best."""

    budget: int
    recent: int
    sinks: int


class NativeDecoder:
    """Packs the weights of `decoder`, and takes them out of it: afterwards only this object can run it."""

    def __init__(self, decoder: Decoder) -> None:
        reason = why_not(decoder)
        if reason is not None:
            raise ValueError(f"the CPU kernels cannot run this model: {reason}")
        self.library = native.library()
        self.shape = decoder.shape
        self.width = max(_stream(decoder.shape))
        """Of a row of the residual stream in memory."""
        self._window = min((b.window for b in decoder.shape.blocks if b.window is not None), default=None)
        """They tell the ages of a tree's nodes by their slots, which is right while it fits the window."""
        self._keep: list[Tensor] = []
        self._columns: dict[int, _Column] = {}
        self.held: dict[int, _Held] = {}
        self._buffers = self.library.axicon_buffers_new()
        self._arena, self._used = native.large_pages(_packed_bytes(decoder)), 0
        self._blocks = (native.Block * decoder.shape.layers)()
        for i, block in enumerate(decoder.blocks):
            assert isinstance(block, Block)
            self._fill_block(self._blocks[i], block)
        self._model = self._fill_model(decoder)
        # Nothing is left that points into the weight file, so its pages can go.
        for name, _ in list(decoder.named_children()):
            delattr(decoder, name)

    @property
    def version(self) -> str:
        """Name of the compiled kernels: source, compiler, flags and processor decide it."""
        return str(Path(self.library._name).stem)

    @property
    def weight_bytes(self) -> int:
        """Of all packed products, which each step reads once."""
        return self._used

    def seconds(self) -> dict[str, float]:
        """Time spent in all steps so far, by what it was spent on."""
        spent = (ctypes.c_double * 3)()
        self.library.axicon_seconds(self._buffers, ctypes.addressof(spent))
        return dict(zip(("products", "attention", "rest"), spent, strict=True))

    def __del__(self) -> None:
        if getattr(self, "_buffers", None):
            self.library.axicon_buffers_delete(self._buffers)

    def hold(self, number: int, adapter: Adapter | None) -> None:
        """Have an adapter by this number; None gives it up."""
        if adapter is None:
            self.held.pop(number, None)
        else:
            self.held[number] = _Held(adapter, self.shape.layers)

    def forward(self, rows: Rows) -> Tensor:
        """float32 logits (wanted, V). Keys and values of the nodes are staged in `rows.caches`."""
        extents = np.stack(self._columns_of(rows.caches), axis=1)  # (L, requests)
        return self._run(rows, extents, 0, self.shape.layers, None)

    def block(self, rows: Rows, index: int, stream_ND: Tensor) -> Tensor:
        """One block alone, for rows of one request whose residual stream, float32, is changed in place.

        The first block embeds the tokens first; only the last returns logits, if any are wanted. The layer is
        the only one in the request's cache.
        """
        return self._run(rows, _extents(rows.caches[0])[:, None], index, index + 1, stream_ND)

    def _run(
        self, rows: Rows, extents: np.ndarray, first: int, last: int, stream_ND: Tensor | None
    ) -> Tensor:
        count, wanted = len(rows.request_N), len(rows.wanted)
        if self._window is not None and rows.hidden_NW is not None and max(rows.offset_N) >= self._window:
            raise ValueError(f"a tree of more than {self._window} nodes, the sliding window of this model")
        logits_WV = torch.empty(wanted, self.shape.vocab)
        tokens, positions = rows.tokens_N.contiguous(), rows.positions_N.contiguous()
        request, offset, wanted_rows, committed = (
            np.asarray(list(values), dtype=np.int32)
            for values in (rows.request_N, rows.offset_N, rows.wanted, [c.committed for c in rows.caches])
        )
        extents = np.ascontiguousarray(extents)
        held = [self.held.get(number) for number in rows.adapters]
        adapters = np.array([one.address if one else 0 for one in held], dtype=np.uint64)
        step = native.Step(
            rows=count, wanted=wanted, threads=torch.get_num_threads(),
            tree_words=0 if rows.hidden_NW is None else rows.hidden_NW.shape[1],
            tokens=tokens.data_ptr(), positions=positions.data_ptr(), request=request.ctypes.data,
            offset=offset.ctypes.data, committed=committed.ctypes.data, requests=len(rows.caches),
            extents=extents.ctypes.data,
            hidden=None if rows.hidden_NW is None else rows.hidden_NW.ctypes.data,
            wanted_rows=wanted_rows.ctypes.data, logits=logits_WV.data_ptr(), first=first, last=last,
            stream=None if stream_ND is None else stream_ND.data_ptr(),
            adapters=adapters.ctypes.data if adapters.any() else None,
            most_low=max((one.most_low for one in held if one), default=0),
        )  # fmt: skip
        self.library.axicon_step(ctypes.addressof(self._model), ctypes.addressof(step), self._buffers)
        return logits_WV

    def evict(
        self, layers: Sequence[LayerCache], policies: Sequence[KeepBest], scores: Sequence[Tensor],
        sums: Sequence[Tensor] | None,
    ) -> None:
        """Cut ragged layers to their budgets, in place. `scores` (G, S) of each; `sums` move with the slots.
        """
        table = (native.Evicted * len(layers))()
        for i, (layer, keep, score) in enumerate(zip(layers, policies, scores, strict=True)):
            assert layer.lengths is not None
            assert layer.positions_GC is not None
            table[i] = native.Evicted(
                layer.keys_GCK.data_ptr(), layer.values_GCK.data_ptr(), layer.positions_GC.data_ptr(),
                layer.lengths.ctypes.data, score.data_ptr(), sums[i].data_ptr() if sums else None,
                layer.capacity, score.stride(0), sums[i].stride(0) if sums else 0, *keep,
            )  # fmt: skip
        groups, width = layers[0].extent.shape[1], layers[0].extent.shape[3]
        self.library.axicon_evict(
            ctypes.addressof(table), len(layers), groups, width, torch.get_num_threads()
        )

    def _columns_of(self, caches: Sequence[RowCache]) -> list[np.ndarray]:
        """Extents of each request, made again when they lie elsewhere."""
        known, self._columns = self._columns, {}
        for cache in caches:
            column = known.get(id(cache))
            if column is None or column.cache is not cache or column.version != cache.version:
                column = _Column(cache, cache.version, _extents(cache))
            self._columns[id(cache)] = column
        return [self._columns[id(cache)].extents_L for cache in caches]

    def _weights(self, packed: Tensor) -> int:
        """Address of packed weights in the arena. Every step reads all of them once: laid end to end on large
        pages, that is some percent faster."""
        size = -(-packed.nbytes // 64) * 64
        place = self._arena[self._used : self._used + packed.nbytes]
        place.copy_(packed.view(torch.uint8).view(-1))
        self._used += size
        return place.data_ptr()

    def _pointer(self, tensor: Tensor) -> int:
        """Address of a copy that lives as long as this object."""
        tensor = tensor.detach().clone(memory_format=torch.contiguous_format)
        self._keep.append(tensor)
        return tensor.data_ptr()

    def _linear(self, module: nn.Module) -> native.Linear:
        if isinstance(module, PackedLinear):
            descriptor, (packed, *others) = module.native(self.library)
            descriptor.weight = self._weights(packed)
            self._keep += others
            return descriptor
        assert isinstance(module, nn.Linear)
        outputs, inputs = module.weight.shape
        weight = module.weight.detach().contiguous()
        packed = torch.empty_like(weight)
        self.library.axicon_pack_bf16(weight.data_ptr(), outputs, inputs, packed.data_ptr())
        return native.Linear(
            native.BF16, outputs, inputs, 0.0, 0.0, self._weights(packed), None,
            None if module.bias is None else self._pointer(module.bias.float()),
        )  # fmt: skip

    def _norm(self, norm: Norm | None) -> native.Norm:
        """A gain, of a norm over more channels than are left, is in its weights."""
        if norm is None:
            return native.Norm(None, None, 0.0, 0)
        weight = None if norm.weight is None else norm.weight.float()
        if norm.gain != 1.0:
            weight = norm.gain * (torch.ones(norm.width) if weight is None else weight)
        bias = None if norm.bias is None else self._pointer(norm.bias.float())
        return native.Norm(None if weight is None else self._pointer(weight), bias, norm.eps, norm.width)

    def _fill_block(self, to: native.Block, block: Block) -> None:
        to.before_attention, to.before_mlp = self._norm(block.attention_norm), self._norm(block.mlp_norm)
        to.query, to.key = self._norm(block.q_norm), self._norm(block.k_norm)
        to.window, to.scale = block.window or 0, block.scale
        names = {"qkv": "qkv", "out": "out", "up": "gate_up" if block.gated else "up", "down": "down"}
        if block.attention_shortcut is not None:
            names |= {name: name for name in ("attention_shortcut", "mlp_shortcut")}
        for field, name in names.items():
            setattr(to, field, self._linear(getattr(block, name)))
            delattr(block, name)

    def _fill_model(self, decoder: Decoder) -> native.Model:
        shape, first = decoder.shape, decoder.shape.blocks[0]
        positions = frequencies = None
        if shape.rope is None:
            positions = self._pointer(decoder.embed_positions.weight.bfloat16())
        else:
            frequencies = self._pointer(inverse_frequencies(shape.rope, first.head_width))
        return native.Model(
            shape.layers, self.width, first.heads, first.kv_heads, first.head_width, first.hidden,
            native.RMS_NORM if shape.norm == "rms" else native.LAYER_NORM,
            native.ACTIVATIONS[shape.activation], shape.position_offset, shape.embedding_width, shape.width,
            self._pointer(decoder.embed_tokens.weight.bfloat16()), positions, frequencies,
            ctypes.addressof(self._blocks), self._norm(decoder.final_norm),
            native.Linear() if decoder.project_in is None else self._linear(decoder.project_in),
            self._linear(decoder.lm_head),
        )  # fmt: skip


class _Held:
    """An adapter as the kernels want it."""

    def __init__(self, adapter: Adapter, layers: int) -> None:
        self._blocks = (native.Adapter * layers)()
        self._keep: list[Tensor] = []
        self.most_low = 0
        """Numbers between A and B of the product that has most of them."""
        fields = {"qkv": "qkv", "out": "out", "gate_up": "up", "up": "up", "down": "down"}
        for (index, name), pairs in adapter.pairs.items():
            table = getattr(self._blocks[index], fields[name])
            for at, pair in enumerate(pairs):
                a_RI, b_RO = pair.a_RI.contiguous(), pair.b_OR.T.contiguous()
                self._keep += [a_RI, b_RO]
                table[at] = native.Pair(
                    a_RI.data_ptr(), b_RO.data_ptr(), len(a_RI), pair.rows.start or 0, b_RO.shape[1],
                    a_RI.shape[1],
                )  # fmt: skip
            self.most_low = max(self.most_low, sum(len(pair.a_RI) for pair in pairs))

    @property
    def address(self) -> int:
        return ctypes.addressof(self._blocks)


def _packed_bytes(decoder: Decoder) -> int:
    """Of all products, each rounded up to a cache line."""
    sizes = [
        m.native_bytes() if isinstance(m, PackedLinear) else m.weight.nbytes
        for m in decoder.modules()
        if isinstance(m, PackedLinear | nn.Linear)
    ]
    return sum(-(-size // 64) * 64 for size in sizes)


@dataclass(frozen=True, slots=True)
class _Column:
    cache: RowCache
    version: int
    extents_L: np.ndarray


def _extents(cache: RowCache) -> np.ndarray:
    """(L,) of `EXTENT`. It points to what the cache owns."""
    column = np.zeros(len(cache.layers), dtype=EXTENT)
    for i, layer in enumerate(cache.layers):
        one = column[i]
        one["keys"], one["values"], one["capacity"] = (
            layer.keys_GCK.data_ptr(), layer.values_GCK.data_ptr(), layer.capacity)
        if layer.lengths is not None and layer.positions_GC is not None:
            one["lengths"], one["positions"] = layer.lengths.ctypes.data, layer.positions_GC.data_ptr()
        if cache.tally is not None:
            entries_GNC = cache.tally.staged_LGNC[i]
            one["tally"], one["every"] = entries_GNC.data_ptr(), cache.tally.every
            one["entries"], one["stride"] = entries_GNC.shape[1:]
    return column
