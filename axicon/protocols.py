"""The seams of axicon. Read this file first.

A paper plugs into one of the protocols below with one file and one line in its family's table. `Runner` and
`StepInput` are seams rather than plug points: the engine does not know whether its model lives in its own
process or in a row of actors, because both answer the same `forward`.

Shape letters: B batch, T tokens, N rows of a step, Q queries, S slots, D width, H query heads, G key/value
heads, K head width, V vocabulary, O out, I in, L layers, R request rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn

from axicon.data.batch import Batch
from axicon.model.adapterfile import Adapter
from axicon.model.cache import LayerCache
from axicon.model.decoder import Block, Decoder
from axicon.model.shape import ModelShape
from axicon.step import Capacity, StepInput, StepOutput


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


@runtime_checkable
class Reshaping(Protocol):
    """What a compressor that changes the widths of a model has beside the rest: it hands on hidden states in
    another basis, and knows which. It wants `inputs: sequential`.
    """

    def reshaped(self, shape: ModelShape) -> ModelShape:
        """The shape that a dense one becomes. Raises AxiconError for one that it does not take."""
        ...

    def entered(self, block: Block, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """The inputs of a block as it reads them once it is changed. May be called before `block` too."""
        ...

    def carried(self) -> dict[str, Tensor]:
        """What the next block needs of what is behind, for a walk that goes on in another process."""
        ...

    def carry(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from there instead of `begin`."""
        ...


@runtime_checkable
class Repairing(Protocol):
    """What a compressor that brings a pruned block back to the dense one has beside the rest. It stands in a
    chain, which shows it the block twice.
    """

    def remember(self, block: Block) -> None:
        """The block before anything of it is pruned; `block` is called once that is done."""
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
    variants: ClassVar[tuple[str, ...]]
    """Ways to score that a request may choose from, its `kv.score`; the first is what it gets by itself.
    Empty where there is only one."""

    def __init__(self, *, budget: int, recent: int, sinks: int, variant: int = 0) -> None: ...

    @property
    def decay(self) -> float:
        """What is left of a slot's column sum when the next query is counted; 1 where it is a plain sum."""
        ...

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

    def hold(self, number: int, adapter: Adapter | None) -> None:
        """Have an adapter by this number, which nodes name; None gives it up. Number 0 is what nodes get that
        name none. Raises AxiconError where adapters cannot be.
        """
        ...

    def positions(self, row: int) -> Sequence[Sequence[Tensor]] | None:
        """What an open row holds: positions of the committed slots (S,), per layer and KV head. None where
        rows hold everything.
        """
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


class Objective(Protocol):
    """What a model is trained for. Settings are dataclass fields."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """float32 (B,), one value per example; differentiable where gradients are on."""
        ...


class Mean(Protocol):
    """How the workers of a run agree. A step's batch is cut into virtual shards, whose number is a setting of
    the run and not of how many workers there are; what is summed is summed in the order of the shards, so any
    number of workers gets the same bits.
    """

    @property
    def shards(self) -> int:
        """Virtual shards of a batch."""
        ...

    @property
    def own(self) -> range:
        """The shards this worker computes."""
        ...

    def gather(self, values_SK: Tensor) -> Tensor:
        """float64 (own shards, K) of this worker to (all shards, K), in the order of the shards."""
        ...

    def add(self, tensor: Tensor) -> None:
        """In place: the sum over workers. For gradients, whose last bits may depend on their number."""
        ...


@dataclass(frozen=True, slots=True)
class Moment:
    """Where in a run a step is. What it says is all that may differ between two steps on the same batch."""

    step: int
    """Counted from 0."""
    seed: int
    """Of the run."""
    rate: float = 1.0
    """What the schedule makes of the learning rate: a factor."""

    def key(self, *what: str | int) -> int:
        """64 random bits that are a function of the run's seed and `what`."""
        said = "/".join(map(str, (self.seed, *what)))
        return int.from_bytes(hashlib.blake2b(said.encode(), digest_size=8).digest(), "little")


class UpdateRule(Protocol):
    """How parameters change. Settings are dataclass fields; what a run adds to them is made by `prepare`.

    The parameters that train are those with `requires_grad`, which a scheme has chosen before.
    """

    def prepare(self, model: nn.Module) -> None:
        """Make what the rule keeps between steps."""
        ...

    def step(self, model: nn.Module, objective: Objective, batch: Batch, mean: Mean, at: Moment) -> float:
        """Change the parameters once; the loss on the batch."""
        ...

    def finish(self, model: nn.Module) -> None:
        """Leave a model without what `prepare` added to it."""
        ...


Scalars = Mapping[str, float | Sequence[float]]
"""A step of a scalar rule: what, with its `Moment`, is all that the step did."""


class ScalarRule(UpdateRule, Protocol):
    """An update rule whose step is a function of a few numbers, so that the numbers are the run."""

    def measure(
        self, model: nn.Module, objective: Objective, batch: Batch, mean: Mean, at: Moment
    ) -> Scalars:
        """Find the numbers of a step; `loss` is one of them. The parameters stay as they are, bit for bit."""
        ...

    def apply(self, model: nn.Module, scalars: Scalars, at: Moment) -> None:
        """Change the parameters. Equal parameters, numbers and moments give equal bits."""
        ...
