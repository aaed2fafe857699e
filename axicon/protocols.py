"""The seams of axicon. Read this file first.

A paper plugs into one of the protocols below with one file and one line in its family's table. `Runner` and
`StepInput` are seams rather than plug points: the engine does not know whether its model lives in its own
process or in a row of actors, because both answer the same `forward`.

Shape letters: B batch, T tokens, N rows of a step, Q queries, S slots, D width, H query heads, G key/value
heads, K head width, V vocabulary, O out, I in, L layers, R request rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from axicon.model.cache import LayerCache
from axicon.model.decoder import Block, Decoder

STEP_VERSION = 2


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


class LayeredPrompt(NamedTuple):
    """A prompt that goes through the model block by block, so that only one block holds all of its keys.

    The step that begins it carries its nodes; they are staged nowhere, and committed by themselves when they
    have passed the last block. Its logits come with that step, behind those of the step's own nodes.
    """

    row: int
    blocks: int
    """It passes through so many further blocks in this step."""


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
    policies: tuple[RowPolicy, ...] = ()
    """Of the rows in `reserves` whose cache is bounded. Their prompts are layered."""
    layered: tuple[LayeredPrompt, ...] = ()
    """Prompts of bounded rows that go on in this step. Nodes of those that begin stand behind all others."""

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
        lists = [self.commits, self.releases, self.evictions, *flat]
        header = torch.tensor([STEP_VERSION, len(self), *(len(x) for x in lists)])
        return torch.cat([header, *nodes, *(torch.tensor(list(x), dtype=torch.int64) for x in lists)])

    def _records(self) -> tuple[Sequence[tuple[int, ...]], ...]:
        return self.reserves, self.policies, self.layered

    @staticmethod
    def unpack(packed: Tensor) -> StepInput:
        """Inverse of `pack`. Raises ValueError for another version or a wrong length."""
        if len(packed) < 8:
            raise ValueError(f"a StepInput of {len(packed)} numbers, its header alone has 8")
        version, n, *counts = packed[:8].tolist()
        if version != STEP_VERSION:
            known = f"this process speaks {STEP_VERSION}: run one axicon version everywhere"
            raise ValueError(f"StepInput version {version}, {known}")
        odd = counts[3] % 2 or counts[4] % len(RowPolicy._fields) or counts[5] % len(LayeredPrompt._fields)
        if min(n, *counts) < 0 or odd or len(packed) != 8 + 7 * n + sum(counts):
            said = f"its header says {n} nodes and lists of {counts}"
            raise ValueError(f"a StepInput of {len(packed)} numbers, {said}")
        parts = packed[8:].split([n] * 7 + counts)
        tokens, positions, rows, parents, wanted, adapters, forced = parts[:7]
        commits, releases, evictions = (tuple(p.tolist()) for p in parts[7:10])
        reserves, policies, layered = (p.tolist() for p in parts[10:])
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
        )


@dataclass(frozen=True, slots=True)
class CacheUse:
    """What the caches of all rows come to now."""

    bytes: int = 0
    """Of keys and values."""
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


@dataclass(frozen=True, slots=True)
class LastRows:
    """The attention of the last `count` committed queries, summed. More than one only for a policy that
    evicts once."""

    count: int


Needs = Literal["none", "column_sums"] | LastRows
"""Statistics of attention that a policy scores by, made by the runner for committed queries only: nothing,
the attention every slot has received so far, or that of the last queries. Summed over the query heads of a
group."""


class KVPolicy(Protocol):
    """Which slots of a bounded row stay. Settings are slots per head."""

    @property
    def budget(self) -> int:
        """Slots kept, everything included."""
        ...

    @property
    def recent(self) -> int:
        """Newest slots, kept whatever their score."""
        ...

    @property
    def sinks(self) -> int:
        """First positions, kept whatever their score."""
        ...

    needs: ClassVar[Needs]
    once: ClassVar[bool]
    """Evicts at the end of the prompt and never again."""
    recent_share: ClassVar[float]
    """Of the budget, for a request that does not say how many recent slots it wants."""

    def __init__(self, *, budget: int, recent: int, sinks: int) -> None: ...

    def score(self, cache: LayerCache, stats_GS: Tensor | None, slots: int) -> Tensor:
        """(G, S) of the first `slots` slots: higher stays. `stats_GS` is what `needs` asks for.

        Slots lie in the order of their positions. A head that has fewer slots has anything behind them.
        """
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


@dataclass(frozen=True, slots=True)
class DraftTree:
    """What may follow a request's last token: a guess that one step of the target checks as a whole.

    Node i holds `tokens[i]` and follows node `parents[i]`, -1 for the last token itself. Parents come before
    children, and the children of one node stand in the order in which they were drawn: recursive rejection
    is exact in that order alone.
    """

    tokens: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    laws: Mapping[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Node or -1 -> (token ids, probabilities), both (C,): what its children were drawn from. A node that is
    not here has children that were chosen without chance."""

    def __len__(self) -> int:
        return len(self.tokens)

    def children(self, node: int) -> list[int]:
        """Nodes that follow `node`, in the order in which they were drawn."""
        return [i for i, parent in enumerate(self.parents) if parent == node]

    def follow(self, tokens: Sequence[int]) -> list[int]:
        """The nodes from the root on that hold these tokens, as far as there are any."""
        path: list[int] = []
        for token in tokens:
            behind = path[-1] if path else -1
            found = (i for i in self.children(behind) if self.tokens[i] == token)
            child = next(found, None)
            if child is None:
                break
            path.append(child)
        return path

    def depths(self) -> list[int]:
        """Of each node, from 1."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent < 0 else depths[parent] + 1)
        return depths


class Level(NamedTuple):
    """Nodes of one depth of a tree that grows, F of them. The first is the root, whose parent is -1."""

    parents: Tensor
    """int64 (F,). Place of each one's parent in the level above."""
    tokens: Tensor
    """int64 (F,). Place of each one's token among the candidates of its parent."""
    log_probs: Tensor
    """(F,). Of the path from the root, under the draft model."""
    perturbed: Tensor
    """(F,). The same plus noise, as the method defines it."""


class Drafter(Protocol):
    """A way to guess. Settings are the dataclass fields `width` and `depth`, as in a request.

    It either reads `guess` off a request's own tokens, or grows a tree level by level from the laws of a
    draft model.
    """

    needs_model: ClassVar[bool]
    rule: ClassVar[str]
    """How `verify: rrs` accepts its children: a name in `RULES` of `axicon.generate.verify`."""

    @property
    def width(self) -> int: ...

    @property
    def depth(self) -> int: ...

    @property
    def nodes(self) -> int:
        """The most nodes a tree of these settings has."""
        ...


class Reader(Drafter, Protocol):
    """Guesses from the tokens that are there."""

    def guess(self, tokens: Sequence[int]) -> Sequence[int]:
        """Tokens that may follow, at most `depth`."""
        ...


class Grower(Drafter, Protocol):
    """Guesses with a draft model."""

    @property
    def draws(self) -> int:
        """Sets of noise it wants per node."""
        ...

    def grow(self, log_probs_FC: Tensor, noise_DFC: Tensor | None, above: Level) -> Level:
        """The next level. log_probs (F, C): the law over the candidates of each node of `above`, -inf for
        what cannot be drawn; noise (draws, F, C): independent Gumbel variables, None for the likeliest nodes
        instead of drawn ones. Siblings come in the order in which they were drawn.
        """
        ...
