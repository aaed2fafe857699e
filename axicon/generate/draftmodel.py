"""A draft model beside the target: grows trees, and keeps a cache of its own in step with the target's.

Any model with the target's vocabulary. Trees grow level by level; each level's step computes the whole tree
so far, so that the last one holds every node that may be committed, and a row is never rolled back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor

from axicon.generate.runner import LocalRunner
from axicon.generate.sampling.gumbel import stream_key
from axicon.generate.scheduler import Stream
from axicon.kernels.sampling import GOLDEN, exponentials, splitmix
from axicon.protocols import DraftTree, Draw, Grower, Level
from axicon.step import StepInput

CANDIDATES = 32
"""Tokens a node's children are drawn from, the likeliest ones. Their law is what verification divides by."""
BLOCK = 64
"""Logits of a row are looked through in blocks of so many: only the best blocks are sorted."""
MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Ask:
    """A stream that wants a tree."""

    stream: Stream
    method: Grower
    depth: int
    temperature: float
    """0: the likeliest nodes instead of drawn ones."""
    seed: int
    exact: bool
    """Drawn with the noise of the target's own draws, so that they agree more often."""

    def law(self, logits_FV: Tensor) -> tuple[Tensor, Tensor]:
        """(log-probabilities, token ids) of the candidates, both (F, C): the likeliest tokens, truncated
        about as the target's law will be."""
        params = self.stream.request.params
        if not self.temperature:
            values_FC, ids_FC = best(logits_FV, self.method.width)
            return values_FC.log_softmax(-1), ids_FC
        values_FC, ids_FC = best(logits_FV, min(params.top_k or CANDIDATES, CANDIDATES))
        log_probs_FC = (values_FC / self.temperature).log_softmax(-1)
        if params.top_p < 1:
            probs_FC = log_probs_FC.exp()
            before_FC = probs_FC.cumsum(-1) - probs_FC
            beyond_FC = before_FC >= params.top_p
            beyond_FC[:, 0] = False
            log_probs_FC = log_probs_FC.masked_fill(beyond_FC, -torch.inf).log_softmax(-1)
        return log_probs_FC, ids_FC

    def draw(self, position: int) -> Draw:
        return Draw(self.seed, self.stream.request.choice, position)


@dataclass(slots=True)
class Growth:
    """One tree while it grows."""

    ask: Ask
    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    laws: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    frontier: list[int] = field(default_factory=lambda: [-1])
    """Nodes of the last level."""
    level: Level = field(
        default_factory=lambda: Level(torch.tensor([-1]), torch.tensor([0]), torch.zeros(1), torch.zeros(1))
    )

    def grow(self, logits_FV: Tensor, depth: int) -> None:
        """One more level from the logits of the frontier."""
        ask, first = self.ask, len(self.tokens)
        log_probs_FC, ids_FC = ask.law(logits_FV)
        noise = self._noise(ids_FC, depth) if ask.temperature else None
        level = ask.method.grow(log_probs_FC, noise, self.level)
        places, tokens = level.parents.tolist(), ids_FC[level.parents, level.tokens].tolist()
        if ask.temperature and not ask.exact:
            probs_FC = log_probs_FC.exp()
            self.laws |= {node: (ids_FC[i], probs_FC[i]) for i, node in enumerate(self.frontier)}
        self.parents += [self.frontier[place] for place in places]
        self.tokens += tokens
        self.frontier = list(range(first, len(self.tokens)))
        self.level = level

    def _noise(self, ids_FC: Tensor, depth: int) -> Tensor:
        """Gumbel variables (draws, F, C), from counters that say where in text and tree they are."""
        length = len(self.ask.stream.tokens)
        if self.ask.exact:
            key = stream_key(self.ask.draw(length + depth))
            noise_FC = -exponentials(key, ids_FC.flatten()).log().view(ids_FC.shape)
            return noise_FC.expand(self.ask.method.draws, -1, -1)
        root = splitmix(stream_key(self.ask.draw(length)) ^ (GOLDEN >> 1))
        sets = []
        for n in range(self.ask.method.draws):
            keys = [splitmix((root + GOLDEN * (2 + node + n * 4096)) & MASK) for node in self.frontier]
            sets.append(torch.stack([exponentials(k, ids_C) for k, ids_C in zip(keys, ids_FC, strict=True)]))
        return -torch.stack(sets).log()


class DraftModel:
    """Grows trees for several streams at once. A stream's row is opened when it asks first."""

    def __init__(self, runner: LocalRunner) -> None:
        self.runner = runner
        self._rows: dict[Stream, int] = {}
        self._slots: dict[Stream, int] = {}
        """Set aside for them."""
        self._computed: dict[Stream, int] = {}
        """Tokens in the cache, those among them that the next step commits."""
        self._commits: list[int] = []
        """Nodes of the last step that stay."""
        self._staged: dict[Stream, tuple[int, int]] = {}
        """First node of each stream's tree in the last step, and how many of its nodes are there."""
        self._releases: list[int] = []
        self._reserves: list[tuple[int, int]] = []

    def draft(self, asks: Sequence[Ask]) -> dict[Stream, DraftTree]:
        """A tree for each whose prompt was read and who found room. Raises what computing raises."""
        self._staged = {}
        ready = self._catch_up([ask for ask in asks if ask.stream in self._rows or self._open(ask)])
        deepest = max((one.ask.depth for one, _ in ready), default=0)
        growing = ready
        for depth in range(deepest):
            for one, logits_FV in growing:
                one.grow(logits_FV, depth)
            going = [one for one, _ in growing if depth + 1 < one.ask.depth and one.frontier]
            if not going:
                break
            growing = self._deepen(going)
        return {
            one.ask.stream: DraftTree(tuple(one.tokens), tuple(one.parents), one.laws) for one, _ in ready
        }

    def settle(self, stream: Stream, path: Sequence[int]) -> None:
        """The nodes of its tree that were right: those that were computed stay in the cache."""
        place = self._staged.pop(stream, None)
        if place is None:
            return
        first, size = place
        kept = [first + node for node in path if node < size]
        self._commits = sorted([*self._commits, *kept])
        self._computed[stream] += len(kept)

    def forget(self, stream: Stream) -> None:
        """A stream ended. Its row is free with the next step."""
        self._staged.pop(stream, None)
        self._computed.pop(stream, None)
        self._slots.pop(stream, None)
        row = self._rows.pop(stream, None)
        if row is not None:
            self._releases.append(row)

    def flush(self) -> None:
        """Give back what ended streams held, where no step is to come."""
        if self._releases:
            self._forward([], [])

    def reset(self) -> None:
        """Give up every row: after a failure nobody knows what is in the cache."""
        self._rows, self._slots, self._computed, self._staged = {}, {}, {}, {}
        self._commits, self._reserves = [], []
        self._releases = list(self.runner.cache.rows)
        self.flush()

    def _open(self, ask: Ask) -> bool:
        """Take a row for a stream, with room for all of its text and a tree. False where none is left."""
        request = ask.stream.request
        most = len(request.prompt) + request.params.max_tokens + ask.method.nodes
        slots = self.runner.slots_reserved(most)
        if slots + sum(self._slots.values()) > self.runner.capacity.slots:
            return False
        taken = {*self._rows.values(), *self._releases}
        row = next(row for row in count() if row not in taken)
        self._rows[ask.stream], self._computed[ask.stream], self._slots[ask.stream] = row, 0, slots
        self._reserves.append((row, slots))
        return True

    def _catch_up(self, asks: Sequence[Ask]) -> list[tuple[Growth, Tensor]]:
        """Compute what came since the last time, a chunk of prompts at the most. Those who have caught up,
        with the logits of their last token."""
        nodes: list[Node] = []
        wanted, budget = [], self.runner.capacity.prefill_chunk
        for ask in sorted(asks, key=lambda one: len(one.stream.tokens) - self._computed[one.stream]):
            stream, start = ask.stream, self._computed[ask.stream]
            stop = min(len(stream.tokens), start + max(1, budget))
            budget -= stop - start
            whole = stop == len(stream.tokens)
            for position in range(start, stop):
                parent = -1 if position == start else len(nodes) - 1
                wants = whole and position == stop - 1
                nodes.append((stream.tokens[position], position, self._rows[stream], parent, wants))
            self._computed[stream] = stop
            if whole:
                wanted.append(Growth(ask))
        logits_WV = self._forward(nodes, range(len(nodes)))
        return [(one, logits_WV[i : i + 1]) for i, one in enumerate(wanted)]

    def _deepen(self, growing: Sequence[Growth]) -> list[tuple[Growth, Tensor]]:
        """Compute the trees; each with the logits of its last level."""
        nodes: list[Node] = []
        self._staged = {}
        for one in growing:
            first, length = len(nodes), len(one.ask.stream.tokens)
            self._staged[one.ask.stream] = (first, len(one.tokens))
            depths = DraftTree(tuple(one.tokens), tuple(one.parents)).depths()
            last = set(one.frontier)
            for i, (token, parent, depth) in enumerate(zip(one.tokens, one.parents, depths, strict=True)):
                behind = first + parent if parent >= 0 else -1
                nodes.append((token, length - 1 + depth, self._rows[one.ask.stream], behind, i in last))
        logits_WV = self._forward(nodes, ())
        found, row = [], 0
        for one in growing:
            found.append((one, logits_WV[row : row + len(one.frontier)]))
            row += len(one.frontier)
        return found

    def _forward(self, nodes: Sequence[Node], commits: Sequence[int]) -> Tensor:
        """Logits of the wanted nodes. `commits` are those of these nodes that the next step commits."""
        table_N5 = torch.tensor(nodes, dtype=torch.int64).view(len(nodes), 5)
        tokens_N, positions_N, rows_N, parents_N, wanted_N = table_N5.T.contiguous().unbind(0)
        step = StepInput(
            tokens_N, positions_N, rows_N, parents_N, wanted_N.bool(), torch.zeros_like(tokens_N),
            torch.zeros(len(nodes), dtype=torch.bool), commits=tuple(self._commits),
            releases=tuple(self._releases), reserves=tuple(self._reserves),
        )  # fmt: skip
        logits_WV = self.runner.forward(step).logits_WV
        self._commits, self._releases, self._reserves = list(commits), [], []
        return logits_WV


Node = tuple[int, int, int, int, bool]
"""Token, position, row, parent, whether its logits are wanted."""


def best(logits_FV: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The largest `most` of each row, and where they are. They lie in the `most` blocks with the largest
    maxima, so a vocabulary is not sorted for them."""
    rows, vocab = logits_FV.shape
    if most == 1:
        values_F, ids_F = logits_FV.max(-1)
        return values_F[:, None], ids_F[:, None]
    if vocab % BLOCK or most >= vocab // BLOCK:
        values_FC, ids_FC = logits_FV.topk(min(most, vocab), dim=-1)
        return values_FC, ids_FC
    blocks_FB = logits_FV.view(rows, -1, BLOCK).amax(-1).topk(most, dim=-1).indices
    ids_FN = (blocks_FB[:, :, None] * BLOCK + torch.arange(BLOCK)).flatten(1)
    values_FC, places_FC = logits_FV.gather(1, ids_FN).topk(most, dim=-1)
    return values_FC, ids_FN.gather(1, places_FC)
