"""Who computes what in the next step: continuous batching without phases.

A stream has tokens and has computed some of them; a step closes the gap under a token budget. Streams with
one token to go (decode) are served first, then prompts in order of arrival, in chunks whose boundaries
depend on the request alone, unless the runner says that they do not matter. A stream is admitted only with
all the cache it may ever need, so nothing that runs is ever thrown out.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from axicon.generate.pace import Pace
from axicon.generate.request import Request
from axicon.protocols import Capacity, DraftTree

NO_TREE = DraftTree()


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

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)

    @property
    def prompt_left(self) -> int:
        return max(0, len(self.request.prompt) - self.computed)

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt)


@dataclass(frozen=True, slots=True)
class Work:
    """Tokens `start` .. `stop - 1` of a stream are computed in this step."""

    stream: Stream
    start: int
    stop: int
    tree: DraftTree = NO_TREE
    """What may follow token `stop - 1`: computed in the same step, and kept as far as it turns out right."""


class Scheduler:
    """Waiting and running streams, free rows and free slots. Touches no tensor."""

    def __init__(
        self, capacity: Capacity, slots_reserved: Callable[[int], int], step_tokens: int | None = None
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
        heapq.heappush(self._rows, stream.row)
        stream.row = -1

    def schedule(self) -> list[Work]:
        """What the next step computes, decode rows first. Admits streams as rows, slots and budget allow."""
        work = [Work(s, s.computed, s.computed + 1) for s in self.running if not s.prompt_left]
        free = self._capacity.free_chunks
        budget = self.pace.tokens if free and work else self._budget - len(work)
        candidates = (*(s for s in self.running if s.prompt_left), *self.waiting)
        for chunks, stream in enumerate(candidates):
            size = min(self._capacity.prefill_chunk, stream.prompt_left)
            if free:
                size = min(size, max(budget, 0 if chunks else 1))
            # At least one chunk goes, whatever the budget: prompts move on beside any number of decode rows.
            if size == 0 or (chunks and size > budget) or (stream.row < 0 and not self._admit(stream)):
                break
            work.append(Work(stream, stream.computed, stream.computed + size))
            budget -= size
        return work

    def _admit(self, stream: Stream) -> bool:
        """Give the first waiting stream a row and all the slots it may ever need."""
        slots = self._slots_reserved(len(stream.tokens) + stream.request.params.max_tokens)
        if not self._rows or slots > self.slots_free:
            return False
        assert self.waiting[0] is stream
        self.waiting.popleft()
        self.running.append(stream)
        stream.row, stream.slots = heapq.heappop(self._rows), slots
        self.slots_free -= slots
        self.reserves.append((stream.row, slots))
        return True
