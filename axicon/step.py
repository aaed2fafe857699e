"""A step of generation as data: what an engine asks of a runner, what comes back, what a runner can hold.

A flat set of integer tensors, so that a process group broadcasts exactly this. Shape letters as in
`axicon.protocols`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

STEP_VERSION = 3


class RowPolicy(NamedTuple):
    """How a row's cache is bounded. Counts are slots per head."""

    row: int
    method: int
    """Index into the names of `KV_POLICIES`, sorted."""
    budget: int
    recent: int
    sinks: int
    spare: int
    """Slots the row may hold beyond `budget` between two evictions."""
    variant: int = 0
    """Index into the policy's `variants`."""


class LayeredPrompt(NamedTuple):
    """A prompt that goes through the model block by block, so that only one block holds all of its keys.

    The step that begins it carries its nodes; they are staged nowhere, and committed by themselves when they
    have passed the last block. Its logits come with that step, behind those of the step's own nodes.
    """

    row: int
    blocks: int
    """It passes through so many further blocks in this step."""


class KeptBlock(NamedTuple):
    """Keys and values of a row's tokens `start` .. `stop - 1`, as a block that outlives the row."""

    block: int
    """Its number, never used again."""
    row: int
    start: int
    stop: int


RECORDS = (2, *(len(kind._fields) for kind in (RowPolicy, LayeredPrompt, KeptBlock, KeptBlock)))
"""Numbers per entry of a step's lists of records."""


def batched(flat: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """`flat` in pieces of `size`."""
    return (flat[i : i + size] for i in range(0, len(flat), size))


@dataclass(frozen=True, slots=True)
class StepInput:
    """One step of the model, as a flat, versioned set of integer tensors.

    This is all a process group ever broadcasts: trees, adapters, replay and shards need no other channel. A
    *node* is one token to be computed. Its *request row* is the cache row the engine gave to the request
    when it was admitted; a row number is used again only after it was released.

    Order inside a step is part of the contract: nodes of one request row are adjacent, parents come before
    children. A runner first applies what the previous step decided (`commits`, `evictions`, `drops`, `keeps`
    and `releases`, in this order), then opens the rows in `reserves`, fills them by `reuses` and computes the
    nodes.
    """

    tokens_N: Tensor
    """int64. Token ids."""
    positions_N: Tensor
    """int64. Absolute positions: time, never a cache slot."""
    rows_N: Tensor
    """int64. Request row of each node."""
    parents_N: Tensor
    """int64. Index, inside this step, of the node this one follows; -1 if it follows committed context."""
    wanted_N: Tensor
    """bool. Whether the logits of this node are wanted."""
    adapters_N: Tensor
    """int64. Adapter id, 0 for the base model."""
    forced_N: Tensor
    """bool. True where the token was given (prompt, replay), False where it was sampled or drafted."""
    commits: tuple[int, ...] = ()
    """Nodes of the *previous* step that stay, as indices into it, ascending. All others are dropped."""
    releases: tuple[int, ...] = ()
    """Request rows whose cache is given back."""
    evictions: tuple[int, ...] = ()
    """Request rows that are cut to their policy's budget now. The engine names a row only when its
    committed length is a multiple of `evict_every`.
    """
    reserves: tuple[tuple[int, int], ...] = ()
    """(row, slots): rows that begin with this step and the most slots they will ever hold per head."""
    policies: tuple[RowPolicy, ...] = ()
    """Of the rows in `reserves` whose cache is bounded. Their prompts are layered."""
    layered: tuple[LayeredPrompt, ...] = ()
    """Prompts of bounded rows that go on in this step. Nodes of those that begin stand behind all others."""
    drops: tuple[int, ...] = ()
    """Blocks that are given back. Those that are not there are ignored: after a step that failed, nobody
    knows what became of the blocks it named."""
    keeps: tuple[KeptBlock, ...] = ()
    """Committed tokens of rows without a policy that are copied into new blocks."""
    reuses: tuple[KeptBlock, ...] = ()
    """Blocks that are copied behind a row's committed tokens, as tokens of that row. The nodes of this step
    follow them."""

    version: ClassVar[int] = STEP_VERSION

    def __len__(self) -> int:
        return int(self.tokens_N.shape[0])

    def pack(self) -> Tensor:
        """One int64 tensor: version, counts, node fields in the order above, then the lists."""
        nodes = [
            self.tokens_N,
            self.positions_N,
            self.rows_N,
            self.parents_N,
            self.wanted_N.long(),
            self.adapters_N,
            self.forced_N.long(),
        ]
        flat = [[n for entry in entries for n in entry] for entries in self._records()]
        lists = [self.commits, self.releases, self.evictions, self.drops, *flat]
        header = torch.tensor([STEP_VERSION, len(self), *(len(x) for x in lists)])
        return torch.cat([header, *nodes, *(torch.tensor(list(x), dtype=torch.int64) for x in lists)])

    def _records(self) -> tuple[Sequence[tuple[int, ...]], ...]:
        return self.reserves, self.policies, self.layered, self.keeps, self.reuses

    @staticmethod
    def unpack(packed: Tensor) -> StepInput:
        """Inverse of `pack`. Raises ValueError for another version or a wrong length."""
        lists = 4 + len(RECORDS)
        size = 2 + lists
        if len(packed) < size:
            raise ValueError(f"a StepInput of {len(packed)} numbers, its header alone has {size}")
        version, n, *counts = packed[:size].tolist()
        if version != STEP_VERSION:
            known = f"this process speaks {STEP_VERSION}: run one axicon version everywhere"
            raise ValueError(f"StepInput version {version}, {known}")
        odd = any(count % width for count, width in zip(counts[4:], RECORDS, strict=True))
        if min(n, *counts) < 0 or odd or len(packed) != size + 7 * n + sum(counts):
            said = f"its header says {n} nodes and lists of {counts}"
            raise ValueError(f"a StepInput of {len(packed)} numbers, {said}")
        parts = packed[size:].split([n] * 7 + counts)
        tokens, positions, rows, parents, wanted, adapters, forced = parts[:7]
        commits, releases, evictions, drops = (tuple(p.tolist()) for p in parts[7:11])
        reserves, policies, layered, keeps, reuses = (p.tolist() for p in parts[11:])
        kept = len(KeptBlock._fields)
        return StepInput(
            tokens,
            positions,
            rows,
            parents,
            wanted.bool(),
            adapters,
            forced.bool(),
            commits,
            releases,
            evictions,
            tuple(zip(reserves[::2], reserves[1::2], strict=True)),
            tuple(RowPolicy(*one) for one in batched(policies, len(RowPolicy._fields))),
            tuple(LayeredPrompt(*one) for one in batched(layered, len(LayeredPrompt._fields))),
            drops,
            tuple(KeptBlock(*one) for one in batched(keeps, kept)),
            tuple(KeptBlock(*one) for one in batched(reuses, kept)),
        )


@dataclass(frozen=True, slots=True)
class CacheUse:
    """What the caches of all rows come to now."""

    bytes: Mapping[str, int] = field(default_factory=dict)
    """Of the keys and values of rows, by policy; `full` are those of rows without one."""
    kept_bytes: int = 0
    """Of the blocks that outlive rows."""
    evicted: Mapping[str, int] = field(default_factory=dict)
    """Slots given up since the start by policy, in the mean over layers and heads."""


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step gives back. Rows are the wanted nodes, in the order of the step."""

    logits_WV: Tensor
    """float32 (wanted nodes, vocabulary). Those of a layered prompt come behind all others, with the step in
    which it ends."""
    held: CacheUse = CacheUse()


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a runner can hold, for admission. All counts are cache slots per KV head, summed over requests."""

    slots: int
    max_rows: int
    max_positions: int
    """The longest sequence the model knows."""
    prefill_chunk: int
    """Prompts are computed in chunks of exactly this many tokens (the last may be shorter), so that chunk
    boundaries, and with them every bit of the result, depend on the request alone."""
    bytes_per_slot: int
    """Bytes of one slot over all layers and KV heads."""
    vocab: int
    """Token ids are 0 .. vocab - 1."""
    free_chunks: bool = False
    """True where no bit depends on where a prompt is cut. `prefill_chunk` is then only the most at once, and
    steps that decode as well may take less of a prompt."""
    blocks: int = 0
    """Blocks that a layered prompt passes; 0 where rows cannot have a policy."""
    keeps: bool = True
    """Whether steps may have `keeps` and `reuses`."""
