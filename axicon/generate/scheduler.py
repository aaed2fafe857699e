"""Who computes what in the next step: continuous batching without phases.

A stream has tokens and has computed some of them; a step closes the gap under a token budget. Streams with
one token to go (decode) are served first, then prompts in order of arrival, in chunks whose boundaries
depend on the request alone, unless the runner says that they do not matter. A stream is admitted only with
all the cache it may ever need, so nothing that runs is ever thrown out.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from axicon.generate.pace import Pace
from axicon.generate.prefixes import Beginning, Prefixes
from axicon.generate.request import Request
from axicon.generate.retention import FULL, Retention
from axicon.protocols import DraftTree
from axicon.step import Capacity, RowPolicy

NO_TREE = DraftTree()
COPIED = 32
"""Tokens taken over from an earlier request that cost as much as one that is computed, or less."""


@dataclass(eq=False, slots=True)
class Stream:
    """One request on its way: the scheduler's view."""

    request: Request
    tokens: list[int] = field(init=False)
    """Prompt and output."""
    computed: int = 0
    """Tokens whose keys and values are in the cache."""
    row: int = -1
    """Request row while admitted."""
    slots: int = 0
    """Cache slots set aside."""
    retention: Retention | None = None
    """How its cache is bounded. Its prompt then passes block by block instead of chunk by chunk."""
    passed: int = 0
    """Blocks that such a prompt has passed."""
    beginning: Beginning = field(default_factory=Beginning)
    left: int = -1
    """Row that it gave up, whose release the next step carries."""

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)

    @property
    def prompt_left(self) -> int:
        return max(0, len(self.request.prompt) - self.computed)

    @property
    def due(self) -> bool:
        """Whether its cache is cut at the length that it has now."""
        bounded = self.retention
        return bounded is not None and self.row >= 0 and bounded.due(len(self.request.prompt), self.computed)

    @property
    def commits(self) -> bool:
        """Whether its row keeps what the last step computed, if only to be copied from before it goes."""
        return self.row >= 0 or (self.left >= 0 and self.retention is None)

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt)


@dataclass(frozen=True, slots=True)
class Work:
    """Tokens `start` .. `stop - 1` of a stream are computed in this step."""

    stream: Stream
    start: int
    stop: int
    first: int = 0
    blocks: int = 0
    """Of a layered prompt: it passes through so many blocks from `first` on. 0 elsewhere: through all."""
    finished: bool = True
    """False while a layered prompt has not passed the last block."""
    tree: DraftTree = NO_TREE
    """What may follow token `stop - 1`: computed in the same step, and kept as far as it turns out right."""

    @property
    def policy(self) -> RowPolicy | None:
        """What the step that begins a layered prompt says of its row."""
        bounded = self.stream.retention
        begins = bounded is not None and self.blocks and not self.first
        return bounded.of_row(self.stream.row) if bounded is not None and begins else None

    @property
    def nodes(self) -> int:
        """How many the step carries for it: a layered prompt's come with its first block."""
        return 0 if self.first else self.stop - self.start


class Scheduler:
    """Waiting and running streams, free rows and free slots. Touches no tensor."""

    def __init__(
        self,
        capacity: Capacity,
        slots_reserved: Callable[[int], int],
        step_tokens: int | None = None,
        prefixes: Prefixes | None = None,
    ) -> None:
        self._capacity = capacity
        self._slots_reserved = slots_reserved
        # A whole chunk fits beside every decode row, so a long prompt never starves.
        self._budget = step_tokens or capacity.max_rows + capacity.prefill_chunk
        self.pace = Pace(capacity.prefill_chunk)
        self._rows = list(range(capacity.max_rows))
        self.waiting: deque[Stream] = deque()
        self.running: list[Stream] = []
        self.slots_free = capacity.slots
        """Slots that no stream has set aside; `prefixes` may lie in them."""
        self.prefixes = prefixes or Prefixes(capacity)
        self._leaving: dict[int, int] = {}
        """Slots of the rows in `releases`."""
        self.releases: list[int] = []
        """Rows given up since the last step was built."""
        self.reserves: list[tuple[int, int]] = []
        """(row, slots) admitted since then."""

    def add(self, stream: Stream) -> None:
        self.waiting.append(stream)

    def remove(self, stream: Stream) -> None:
        """Take out a stream that ended. Its row and slots are free for the step that carries the release."""
        if stream.row < 0:
            self.waiting.remove(stream)
            return
        self.running.remove(stream)
        self.slots_free += stream.slots
        self.releases.append(stream.row)
        self._leaving[stream.row] = stream.slots
        heapq.heappush(self._rows, stream.row)
        stream.row, stream.left = -1, stream.row

    def offer(self, stream: Stream) -> None:
        """Keep what a stream has computed for later ones that begin like it. It may just have ended."""
        row = stream.row if stream.row >= 0 else stream.left
        if row >= 0:
            # Blocks are copied before rows are released.
            self.prefixes.offer(stream, row, self.slots_free - sum(self._leaving[r] for r in self.releases))

    def schedule(self) -> list[Work]:
        """What the next step computes, decode rows first. Admits streams as rows, slots and budget allow."""
        work = [Work(s, s.computed, s.computed + 1) for s in self.running if not s.prompt_left]
        free = self._capacity.free_chunks
        budget = self.pace.tokens if free and work else self._budget - len(work)
        candidates = (*(s for s in self.running if s.prompt_left), *self.waiting)
        coming: set[bytes] = set()
        """Blocks that prompts before this one compute now or later."""
        for chunks, stream in enumerate(candidates):
            if stream.retention is not None:
                # The last of a step: its nodes stand behind all others, and the next prompt waits for it.
                if budget > 0 and (stream.row >= 0 or self._admit(stream)):
                    work.append(self._layered(stream, budget))
                break
            found, size = self._piece(stream, budget, chunks == 0)
            # At least one chunk goes, whatever the budget: prompts move on beside any number of decode rows.
            if size == 0 or (stream.row < 0 and not self._admit(stream)):
                break
            # Room for it may have been found among the blocks.
            found, size = self._piece(stream, budget, chunks == 0)
            waits = self.prefixes.next_of(stream, found) in coming
            coming.update(self.prefixes.coming(stream))
            if waits or size == 0:
                continue
            self.prefixes.take(stream, found)
            work.append(Work(stream, stream.computed, stream.computed + size))
            budget -= size + found // COPIED
        return work

    def _piece(self, stream: Stream, budget: int, must: bool) -> tuple[int, int]:
        """Tokens of a prompt that blocks hold, and how many behind them are computed in a step that has
        `budget` left; 0 if it is too small, unless something must go."""
        found = self.prefixes.find(stream)
        budget -= found // COPIED
        size = min(self._capacity.prefill_chunk, stream.prompt_left - found)
        if self._capacity.free_chunks:
            return found, min(size, max(budget, int(must)))
        return found, size if must or size <= budget else 0

    def _layered(self, stream: Stream, budget: int) -> Work:
        """As many blocks as cost what `budget` tokens cost in all of them, and at least one."""
        tokens, blocks = len(stream.tokens), self._capacity.blocks
        count = min(blocks - stream.passed, max(1, budget * blocks // tokens))
        finished = stream.passed + count == blocks
        return Work(stream, 0, tokens, stream.passed, count, finished)

    def slots_by_policy(self) -> dict[str, int]:
        """Slots that running streams have set aside. Any thread may ask."""
        found: Counter[str] = Counter()
        for stream in tuple(self.running):
            found[FULL if stream.retention is None else stream.retention.policy] += stream.slots
        return dict(found)

    def cost(self, one: Work) -> int:
        """What a piece of a prompt costs, in tokens through the whole model."""
        tokens = one.stop - one.start
        return max(1, tokens * one.blocks // self._capacity.blocks) if one.blocks else tokens

    def _admit(self, stream: Stream) -> bool:
        """Give the first waiting stream a row and all the slots it may ever need."""
        bounded = stream.retention
        most = len(stream.tokens) + stream.request.params.max_tokens if bounded is None else bounded.most
        slots = self._slots_reserved(most)
        if not self._rows or slots > self.slots_free or not self.prefixes.shrink(self.slots_free - slots):
            return False
        assert self.waiting[0] is stream
        self.waiting.popleft()
        self.running.append(stream)
        stream.row, stream.slots = heapq.heappop(self._rows), slots
        self.slots_free -= slots
        self.reserves.append((stream.row, slots))
        return True
