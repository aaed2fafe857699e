"""The seams of axicon. Read this file first.

A paper plugs into one of the protocols below with one file and one line in its family's table. `Runner` and
`StepInput` are seams rather than plug points: the engine does not know whether its model lives in its own
process or in a row of actors, because both answer the same `forward`.

Shape letters: B batch, T tokens, N rows of a step, Q queries, S slots, D width, H query heads, G key/value
heads, K head width, V vocabulary, O out, I in, L layers, R request rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from axicon.model.decoder import Block, Decoder

STEP_VERSION = 1


@dataclass(frozen=True, slots=True)
class StepInput:
    """One step of the model, as a flat, versioned set of integer tensors.

    This is all a process group ever broadcasts: trees, adapters, replay and shards need no other channel. A
    *node* is one token to be computed. Its *request row* is the cache row the engine gave to the request
    when it was admitted; a row number is used again only after it was released.

    Order inside a step is part of the contract: nodes of one request row are adjacent, parents come before
    children. A runner first applies what the previous step decided (`commits`, then `evictions`, then
    `releases`) and then computes the nodes.
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

    version: ClassVar[int] = STEP_VERSION

    def __len__(self) -> int:
        return int(self.tokens_N.shape[0])

    def pack(self) -> Tensor:
        """One int64 tensor: version, counts, node fields in the order above, then the lists."""
        nodes = [
            self.tokens_N, self.positions_N, self.rows_N, self.parents_N,
            self.wanted_N.long(), self.adapters_N, self.forced_N.long(),
        ]
        flat = [n for pair in self.reserves for n in pair]
        lists = [self.commits, self.releases, self.evictions, flat]
        header = torch.tensor([STEP_VERSION, len(self), *(len(x) for x in lists)])
        return torch.cat([header, *nodes, *(torch.tensor(list(x), dtype=torch.int64) for x in lists)])

    @staticmethod
    def unpack(packed: Tensor) -> StepInput:
        """Inverse of `pack`. Raises ValueError for another version or a wrong length."""
        if len(packed) < 6:
            raise ValueError(f"a StepInput of {len(packed)} numbers, its header alone has 6")
        version, n, *counts = packed[:6].tolist()
        if version != STEP_VERSION:
            known = f"this process speaks {STEP_VERSION}: run one axicon version everywhere"
            raise ValueError(f"StepInput version {version}, {known}")
        if min(n, *counts) < 0 or counts[3] % 2 or len(packed) != 6 + 7 * n + sum(counts):
            said = f"its header says {n} nodes and lists of {counts}"
            raise ValueError(f"a StepInput of {len(packed)} numbers, {said}")
        parts = packed[6:].split([n] * 7 + counts)
        tokens, positions, rows, parents, wanted, adapters, forced = parts[:7]
        commits, releases, evictions, flat = (p.tolist() for p in parts[7:])
        return StepInput(
            tokens, positions, rows, parents, wanted.bool(), adapters, forced.bool(),
            tuple(commits), tuple(releases), tuple(evictions), tuple(zip(flat[::2], flat[1::2], strict=True)),
        )


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step gives back. Rows are the wanted nodes, in the order of the step."""

    logits_WV: Tensor
    """float32 (wanted nodes, vocabulary)."""


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


class Compressor(Protocol):
    """Changes a model block by block. Settings are the method's dataclass fields; instances are plain data.

    A walk calls `begin`, then `block` for every block in order, then `finish`. Each is called on the process
    that holds the part in question, so what must be known later travels on the compressor.
    """

    @property
    def needs_inputs(self) -> bool:
        """Whether `block` wants calibration hidden states; if not it is called with none."""
        ...

    def begin(self, model: Decoder) -> None:
        """Before the first block, where the embeddings live."""
        ...

    def block(self, block: Block, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Replace the block's products. `inputs` are hidden states (B, T, D); returns those handed to the
        next block, whose basis may have changed.
        """
        ...

    def finish(self, model: Decoder) -> None:
        """After the last block, where the head lives."""
        ...


class Runner(Protocol):
    """Computes steps. `LocalRunner` in one process, a `ShardGroup` over several: the engine cannot tell."""

    @property
    def capacity(self) -> Capacity: ...

    @property
    def fingerprint(self) -> str:
        """`system_fingerprint`: digest of model, storage format, numerics path, versions, instruction set,
        threads and plan. Equal fingerprint, request and seed give equal bytes on a CPU.
        """
        ...

    def describe(self) -> Mapping[str, object]:
        """What the fingerprint is made of; `format` and `kernels` among it."""
        ...

    def slots_reserved(self, tokens: int) -> int:
        """Slots that admission must set aside for a request that may reach `tokens` committed tokens."""
        ...

    def forward(self, step: StepInput) -> StepOutput:
        """Apply the previous step's commits, evictions and releases, then compute the nodes of this one.

        A step that breaks the contract raises ValueError before anything changes. If computing fails, what it
        applied stays applied and none of its nodes are staged; the caller gives up the rows it named.
        """
        ...


@dataclass(frozen=True, slots=True)
class Draw:
    """Where a token is drawn: the counter of the random numbers, so a draw never depends on its batch
    mates.
    """

    seed: int
    choice: int
    """Index of the choice among the `n` of a request."""
    position: int
    """Absolute position the drawn token will have."""


class Sampler(Protocol):
    """Turns probabilities into a token. Called once per tree node, so verification can ask it about any
    node.
    """

    def choose(self, probs_RC: Tensor, ids_RC: Tensor, draws: Sequence[Draw]) -> Tensor:
        """Pick one of C candidates per row.

        probs_RC float32, each row sums to 1, zero where a candidate was filtered out; ids_RC int64, the
        token ids of the candidates. Returns (R,) int64 token ids. The result depends on each row's (id,
        probability) set and `Draw` alone, not on the order of the candidates nor on the other rows.
        """
        ...
