"""LocalRunner: a model and its cache in this process, behind the `Runner` seam."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from axicon.errors import AxiconError
from axicon.generate.attend import StepAttention
from axicon.generate.bounded import TILE, BoundedRow, LayeredRun, check_bounded
from axicon.generate.numerics import ANY_ROWS, bits, choose_path, padded
from axicon.generate.prefixes import check_kept, check_reuses
from axicon.generate.retention import FULL
from axicon.generate.spans import (
    Span,
    committed_paths,
    native_rows,
    nodes_before,
    renumber,
    split_spans,
)
from axicon.kernels import native
from axicon.model.adapterfile import Adapter, Added
from axicon.model.cache import KVCache, RowCache, size_class
from axicon.model.decoder import Decoder
from axicon.model.machine import available_memory
from axicon.model.native import NativeDecoder, Rows, why_not
from axicon.model.packed import formats
from axicon.step import CacheUse, Capacity, RowPolicy, StepInput, StepOutput

log = logging.getLogger("axicon")

DEFAULT_KV_BYTES = 4 << 30

Kernels = Literal["auto", "torch", "native"]
"""Who computes a step: the decoder in torch, the C++ kernels, or those where they can and torch otherwise."""


@dataclass(frozen=True, slots=True)
class Checked:
    """A step that keeps the contract, read against the rows as they will be when it is computed."""

    step: StepInput
    paths: Mapping[int, Sequence[int]]
    """Row -> offsets of the previous step's nodes that stay."""
    spans: list[Span]


class LocalRunner:
    """Computes steps with the whole model, or as one stage of it: the blocks that `decoder` holds.

    `forward` is for a whole model. A stage is driven through its three parts, `check`, `apply` and `compute`,
    by whoever carries the hidden states from stage to stage.

    kv_bytes bounds the KV cache; None takes 4 GiB, or a quarter of the memory that is free if that is less.
    Raises AxiconError when that does not hold one short request, or when `kernels` is "native" and they
    cannot run this model. The C++ kernels take the weights out of `decoder`.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        kv_bytes: int | None = None,
        max_rows: int = 64,
        prefill_chunk: int = 256,
        model_digest: str = "",
        kernels: Kernels = "torch",
    ) -> None:
        if kv_bytes is None:
            kv_bytes = min(DEFAULT_KV_BYTES, (available_memory() or DEFAULT_KV_BYTES) // 4)
        self.decoder = decoder.eval().requires_grad_(False)
        self._digest = model_digest
        blocks = decoder.shape.blocks[decoder.first : decoder.last]
        self.cache = self._new_cache([(b.kv_heads, b.head_width) for b in blocks], kv_bytes, max_rows)
        if self.cache.slots < size_class(1):
            raise AxiconError(
                f"the KV cache may take {kv_bytes >> 20} MiB, this model needs "
                f"{self.cache.bytes_per_slot * size_class(1) >> 20} MiB for one short request: raise kv_gib"
            )
        self._formats = sorted(formats(decoder))
        self._added = Added(decoder)
        self.native = _native(decoder, kernels)
        self._capacity = Capacity(
            slots=self.cache.slots, max_rows=max_rows, max_positions=decoder.shape.max_positions,
            prefill_chunk=prefill_chunk, bytes_per_slot=self.cache.bytes_per_slot,
            vocab=decoder.shape.vocab, free_chunks=self._any_rows,
            blocks=decoder.shape.layers if decoder.has_embedding and decoder.has_head else 0,
            keeps=self.cache.keeps_blocks,
        )  # fmt: skip
        self.path = ANY_ROWS if self._any_rows else choose_path(decoder, max_rows, prefill_chunk)
        self._fingerprint = digest_of(self.describe())
        self._staged: list[Span] = []
        """What the last step computed: its nodes lie in the cache and are not committed."""
        self._bounded: dict[int, BoundedRow] = {}
        self._prompts: dict[int, LayeredRun] = {}
        """Layered prompts under way."""
        self._evicted: Counter[str] = Counter()
        """Slots given up by rows that are gone, by policy."""

    @property
    def _any_rows(self) -> bool:
        """Steps need no tiles: a row's bits are its own, or nobody promises them."""
        return self.native is not None

    def _new_cache(self, shapes: Sequence[tuple[int, int]], kv_bytes: int, max_rows: int) -> KVCache:
        return KVCache(shapes, self.decoder.dtype, kv_bytes)

    def _bound(self, policy: RowPolicy) -> BoundedRow:
        windows = [block.window for block in self.decoder.shape.blocks]
        return BoundedRow(policy, self.cache, windows, self.native)

    @property
    def capacity(self) -> Capacity:
        return self._capacity

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def _held(self) -> CacheUse:
        evicted, kept = self._evicted.copy(), self.cache.bytes_kept
        held = Counter({FULL: self.cache.bytes_in_use - kept})
        for row, bounded in self._bounded.items():
            evicted[bounded.name] += bounded.evicted
            held[bounded.name] += self.cache.rows[row].bytes
            held[FULL] -= self.cache.rows[row].bytes
        heads = sum(groups for groups, _ in self.cache.shapes)
        return CacheUse(held, kept, {name: n // heads for name, n in evicted.items()})

    def slots_reserved(self, tokens: int) -> int:
        return size_class(tokens)

    def hold(self, number: int, adapter: Adapter | None) -> None:
        (self.native or self._added).hold(number, adapter)

    def positions(self, row: int) -> list[list[Tensor]] | None:
        return self.cache.positions(row) if row in self._bounded else None

    def describe(self) -> dict[str, object]:
        """What the fingerprint is made of."""
        import transformers

        from axicon import __version__

        return {
            "model": self._digest,
            "format": self._formats,
            "kernels": self.native.version if self.native else "torch",
            "sampling": native.version() or "torch",
            "kv": str(self.cache.pool.dtype).removeprefix("torch."),
            "path": str(self.path),
            "prefill_chunk": self._capacity.prefill_chunk,
            "axicon": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "plan": "1x1",
        }

    def same_bits_with(self, threads: int) -> bool:
        """Whether blocks and head compute the same bits with this many threads as now."""
        if self._any_rows:
            return True
        if self._added.held:  # nobody looked at the bits of their products
            return False
        now = torch.get_num_threads()
        ours = bits(self.decoder)
        torch.set_num_threads(threads)
        try:
            return bits(self.decoder) == ours
        finally:
            torch.set_num_threads(now)

    def set_threads(self, threads: int) -> None:
        """Compute with this many threads from now on, under a new fingerprint. Costs a probe."""
        torch.set_num_threads(threads)
        if not self._any_rows:
            self.path = choose_path(self.decoder, self._capacity.max_rows, self._capacity.prefill_chunk)
        self._fingerprint = digest_of(self.describe())

    def limit(self, slots: int) -> None:
        """Hold at most this many slots: what the smallest stage of a model in several does."""
        self._capacity = replace(self._capacity, slots=min(slots, self._capacity.slots))

    def forward(self, step: StepInput) -> StepOutput:
        """Raises ValueError, before anything changes, for a step that breaks the contract of `StepInput`.

        A failure while computing leaves the previous step's decisions applied and nothing of this step.
        """
        checked = self.check(step)
        self.apply(checked)
        return StepOutput(self.compute(checked), self._held())

    def check(self, step: StepInput) -> Checked:
        """Raises ValueError for a step that breaks the contract. Changes nothing."""
        paths = committed_paths(self._staged, step.commits)
        return Checked(step, paths, self._spans(step, paths))

    @torch.inference_mode()
    def apply(self, checked: Checked) -> None:
        """Carry out what the previous step decided, and begin the rows that this one opens."""
        for row, path in checked.paths.items():
            self.cache.commit(row, path)
        self._staged = []
        step = checked.step
        for row in step.evictions:
            self._bounded[row].evict()
        for block in step.drops:
            self.cache.drop(block)
        for kept in step.keeps:
            self.cache.keep(*kept)
        for row in step.releases:
            self.cache.release(row)
            self._prompts.pop(row, None)
            if row in self._bounded:
                self._evicted[self._bounded[row].name] += self._bounded.pop(row).evicted
        for row, slots in step.reserves:
            self.cache.open(row, slots)
        for policy in step.policies:
            self._bounded[policy.row] = self._bound(policy)
        for row, reused in itertools.groupby(step.reuses, key=lambda kept: kept.row):
            self.cache.reuse(row, [kept.block for kept in reused])

    @torch.inference_mode()
    def compute(self, checked: Checked, hidden_ND: Tensor | None = None) -> Tensor:
        """Compute the nodes of an applied step and stage them.

        A stage behind the first takes the hidden states (N, width_in) of the stage before it. Returns logits
        (W, V) of the wanted nodes where the model ends, hidden states (N, width_out) of all nodes elsewhere.
        """
        layered = {row for row, _ in checked.step.layered}
        spans = [span for span in checked.spans if span.row not in layered]
        for span in spans:
            self.cache.make_room(span.row, len(span))
        step = checked.step if len(spans) == len(checked.spans) else nodes_before(checked.step, spans)
        out = self._compute(step, spans, hidden_ND) if spans else self.out(0)
        self._staged = spans
        if not layered:
            return out
        for span in checked.spans[len(spans) :]:
            self._begin(checked.step, span)
        return torch.cat([out, *(self._advance(row, blocks) for row, blocks in checked.step.layered)])

    def unstage(self) -> None:
        """Forget the nodes of the last step, because another stage failed to compute them."""
        self._staged = []

    def out(self, rows: int) -> Tensor:
        """Room for what `compute` returns: that many wanted nodes, or nodes where the model does not end."""
        if self.decoder.has_head:
            return torch.zeros(rows, self.decoder.shape.vocab)
        width = self.decoder.shape.blocks[self.decoder.last - 1].width_out
        return torch.zeros(rows, width, dtype=self.decoder.dtype)

    def _spans(self, step: StepInput, paths: Mapping[int, Sequence[int]]) -> list[Span]:
        """The step's spans, checked against the rows as they will be when the spans are computed."""
        rows = {row: cache.committed + len(paths.get(row, ())) for row, cache in self.cache.rows.items()}
        blocks = check_kept(step, self.cache, rows)
        for row in step.releases:
            if rows.pop(row, None) is None:
                raise ValueError(f"release of request row {row}, which is not open")
        reserved = sum(self.cache.rows[row].reserved for row in rows)
        for row, slots in step.reserves:
            if row in rows:
                raise ValueError(f"request row {row} is in use")
            rows[row] = 0
            reserved += size_class(slots)
        kept = self.cache.slots_kept if blocks is self.cache.kept else sum(blocks.values())
        if reserved + kept > self._capacity.slots:
            beside = f" beside {kept} in blocks" if kept else ""
            raise ValueError(f"{reserved} slots reserved{beside}, the cache holds {self._capacity.slots}")
        check_reuses(step, blocks, rows, self.cache)
        spans = split_spans(step)
        check_bounded(step, spans, self._bounded.keys(), self._prompts, self._capacity)
        for span in spans:
            if span.adapter and span.adapter not in (self.native or self._added).held:
                raise ValueError(f"nodes {span.start}..{span.stop - 1}: no adapter {span.adapter} is held")
            if span.row not in rows:
                raise ValueError(f"nodes {span.start}..{span.stop - 1}: request row {span.row} is not open")
            span.check_positions(rows[span.row])
        return spans

    def _compute(self, step: StepInput, spans: list[Span], hidden_ND: Tensor | None) -> Tensor:
        """Logits (W, V) or hidden states (N, D), in the order of the step."""
        if self.native:
            caches = [self.cache.rows[span.row] for span in spans]
            return self.native.forward(native_rows(step, spans, caches))
        x = step.tokens_N if hidden_ND is None else hidden_ND
        passes = self._passes(spans)
        if len(passes) == 1:
            return self._pass(x, step.positions_N, step.wanted_N, spans)
        parts, nodes = [], []
        for group in passes:
            index = torch.cat([torch.arange(span.start, span.stop) for span in group])
            wanted = step.wanted_N[index]
            parts.append(self._pass(x[index], step.positions_N[index], wanted, renumber(group)))
            nodes.append(index[wanted] if self.decoder.has_head else index)
        return torch.cat(parts)[torch.cat(nodes).argsort()]

    def _begin(self, step: StepInput, span: Span) -> None:
        """A prompt that will go through the model block by block."""
        own = slice(span.start, span.stop)
        tokens_T = step.tokens_N[own]
        if self.native:
            x_TD = torch.empty(len(span), self.native.width)
        else:
            x_TD = self.decoder.embed(tokens_T, step.positions_N[own])
        self._prompts[span.row] = LayeredRun(
            self._bounded[span.row], self.cache, tokens_T, step.wanted_N[own], x_TD,
            self._capacity.prefill_chunk, span.adapter,
        )  # fmt: skip

    def _advance(self, row: int, blocks: int) -> Tensor:
        """Logits of a prompt's wanted nodes if it has passed the last block, none before."""
        run = self._prompts[row]
        through, every = (self._through_native, TILE) if self.native else (self._through, 1)
        for _ in range(blocks):
            logits = run.advance(through, every)
        if run.done < self._capacity.blocks:
            return self.out(0)
        run.finish()
        del self._prompts[row]
        return torch.cat(logits)

    def _through_native(self, run: LayeredRun, index: int, span: Span, cache: RowCache) -> Tensor:
        assert self.native is not None
        own = slice(span.positions[0], span.positions[-1] + 1)
        last = index + 1 == self._capacity.blocks
        wanted = run.wanted_T[own].nonzero().flatten().tolist() if last else []
        rows = Rows(
            run.tokens_T[own], torch.tensor(span.positions), [0] * len(span), range(len(span)), [cache],
            wanted, adapters=[run.adapter],
        )  # fmt: skip
        return self.native.block(rows, index, run.x_TD[own])

    def _through(self, run: LayeredRun, index: int, span: Span, cache: RowCache) -> Tensor:
        """As `_pass` would take the chunk through this block."""
        own = slice(span.positions[0], span.positions[-1] + 1)
        nodes = len(span)
        alone = not self.path.merged and nodes > 1
        extra = 0 if alone else padded(nodes, self.path.body_tile) - nodes
        positions_N = pad(torch.tensor(span.positions), (0, extra))
        attend = StepAttention([span], [cache], index)
        self._added.choose([(0, nodes, run.adapter)])
        block = self.decoder.blocks[index]
        y_ND = block(_more_rows(run.x_TD[own], extra), self.decoder.rotary(positions_N), attend)[:nodes]
        if index + 1 == self._capacity.blocks:  # whose width may be another one
            return self._logits(y_ND[run.wanted_T[own]], alone)
        run.x_TD[own] = y_ND
        return self.out(0)

    def _passes(self, spans: list[Span]) -> list[list[Span]]:
        """What goes through the blocks together. A prompt chunk is known by its given nodes."""
        if self.path.merged:
            return [spans]
        chunks = [[span] for span in spans if span.forced and len(span) > 1]
        decode = [span for span in spans if not (span.forced and len(span) > 1)]
        return [decode, *chunks] if decode else chunks

    def _pass(self, x: Tensor, positions_N: Tensor, wanted_N: Tensor, spans: list[Span]) -> Tensor:
        """Blocks over rows padded to the body's tile; where the model ends, the head over wanted rows padded
        to its own. `x` holds token ids (N,) or hidden states (N, D).
        """
        nodes = len(x)
        alone = not self.path.merged and spans[0].forced and nodes > 1
        extra = 0 if alone else padded(nodes, self.path.body_tile) - nodes
        attend = StepAttention(spans, [self.cache.rows[span.row] for span in spans], self.decoder.first)
        self._added.choose((span.start, span.stop, span.adapter) for span in spans)
        y_ND = self.decoder(_more_rows(x, extra), pad(positions_N, (0, extra)), attend)[:nodes]
        if not self.decoder.has_head:
            return y_ND
        return self._logits(y_ND[wanted_N], alone)

    def _logits(self, y_WD: Tensor, alone: bool) -> Tensor:
        wanted = len(y_WD)
        if wanted == 0:
            return torch.empty(0, self.decoder.shape.vocab)
        extra = 0 if alone else padded(wanted, self.path.head_tile) - wanted
        return self.decoder.head(_more_rows(y_WD, extra))[:wanted]


def digest_of(facts: Mapping[str, object]) -> str:
    """The `system_fingerprint` of what `Runner.describe` tells."""
    text = json.dumps(facts, sort_keys=True)
    return f"axicon-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _more_rows(x: Tensor, extra: int) -> Tensor:
    """`extra` rows of zeros behind x (N, ...)."""
    return pad(x, (0, 0) * (x.dim() - 1) + (0, extra))


def _native(decoder: Decoder, kernels: Kernels) -> NativeDecoder | None:
    if kernels == "torch":
        return None
    reason = why_not(decoder)
    if reason is None:
        return NativeDecoder(decoder)
    if kernels == "native":
        raise AxiconError(f"the C++ kernels cannot run this model: {reason}; kernels=torch serves it, slower")
    log.warning("steps run in torch, slower than the C++ kernels, because %s", reason)
    return None
