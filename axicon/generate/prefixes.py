"""Prompts that begin alike: which blocks of keys and values outlive their rows, and who takes them over.

A block is `grain` adjacent tokens. It is known by a digest of its tokens, all tokens before it and the
request's namespace, so equal digests are equal keys and values, bit for bit: the grain is such that no bit
depends on who computed a block. Blocks lie in what rows have not reserved. The one that was used longest ago
goes first, whenever a request needs the room.
"""

from __future__ import annotations

import array
import hashlib
import itertools
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from axicon.generate.request import PrefixStats
from axicon.model.cache import KVCache
from axicon.step import Capacity, KeptBlock, StepInput

if TYPE_CHECKING:
    from axicon.generate.scheduler import Stream

GRAIN = 64
"""Tokens of a block where prompts may be cut anywhere. Elsewhere it is a chunk of a prompt."""


@dataclass(slots=True)
class Beginning:
    """What a stream has to do with blocks."""

    digests: list[bytes] = field(default_factory=list)
    """Of its own blocks from the first on, as far as they were asked for."""
    offered: int = 0
    """Blocks that it gave to others or found there."""
    reused: int = 0
    """Tokens that it took over."""
    asked: bool = False


class Prefixes:
    """The blocks of one engine. Touches no tensor: it says what a step's `keeps`, `reuses` and `drops` are.

    share: the most of the cache's slots that blocks may take; 0 keeps none.
    """

    def __init__(self, capacity: Capacity, share: float = 0.0) -> None:
        self._free = capacity.free_chunks
        self.grain = GRAIN if self._free else capacity.prefill_chunk
        self.most = int(capacity.slots * share) if capacity.keeps else 0
        self._blocks: OrderedDict[bytes, int] = OrderedDict()
        """Digest -> number of the block, used longest ago first."""
        self._numbers = itertools.count()
        self._fixed: set[bytes] = set()
        """Blocks that the next step copies into rows."""
        self.drops: list[int] = []
        self._flushed: tuple[int, ...] = ()
        """What the last step dropped."""
        self.keeps: dict[int, KeptBlock] = {}
        self.reuses: list[KeptBlock] = []
        self._asked = self._reused = self._requests = self._dropped = 0

    @property
    def slots(self) -> int:
        return len(self._blocks) * self.grain

    def stats(self) -> PrefixStats:
        return PrefixStats(
            slots=self.slots, asked_total=self._asked, reused_total=self._reused,
            requests_total=self._requests, dropped_total=self._dropped,
        )  # fmt: skip

    def find(self, stream: Stream) -> int:
        """Tokens behind those that the stream has computed that blocks hold. At least one token of the prompt
        is left to compute, as its logits are wanted."""
        first, last = self._rest(stream)
        if first == last:
            return 0
        digests = self._digests(stream, last)
        stop = next((i for i in range(first, last) if digests[i] not in self._blocks), last)
        self._touch(digests[:stop])
        return (stop - first) * self.grain

    def next_of(self, stream: Stream, found: int) -> bytes | None:
        """The block behind those `found` that the stream would take over if it were there."""
        first, last = self._rest(stream)
        index = first + found // self.grain
        return self._digests(stream, last)[index] if index < last else None

    def coming(self, stream: Stream) -> Sequence[bytes]:
        """Blocks of a stream's prompt that it has not computed."""
        if not self.most:
            return ()
        stop = len(stream.request.prompt) // self.grain
        return self._digests(stream, stop)[stream.computed // self.grain : stop]

    def take(self, stream: Stream, tokens: int) -> None:
        """The next step copies so many tokens, as `find` found them, into the stream's row."""
        beginning = stream.beginning
        if self.most and not beginning.asked and stream.request.params.prompt_logprobs is None:
            beginning.asked = True
            self._asked += len(stream.request.prompt)
        if not tokens:
            return
        self._requests += not beginning.reused
        beginning.reused += tokens
        self._reused += tokens
        for start in range(stream.computed, stream.computed + tokens, self.grain):
            digest = beginning.digests[start // self.grain]
            self._fixed.add(digest)
            self.reuses.append(KeptBlock(self._blocks[digest], stream.row, start, start + self.grain))
        stream.computed += tokens
        beginning.offered = max(beginning.offered, stream.computed // self.grain)

    def offer(self, stream: Stream, row: int, room: int) -> None:
        """Keep what the stream has committed in `row` since the last time. room: slots that no row holds."""
        beginning = stream.beginning
        tokens = stream.computed if self._free else min(stream.computed, len(stream.request.prompt))
        stop = tokens // self.grain if self.most and stream.retention is None else 0
        if stop <= beginning.offered:
            return
        digests = self._digests(stream, stop)
        for index in range(beginning.offered, stop):
            if digests[index] not in self._blocks:
                if not self.shrink(min(room, self.most) - self.grain, digests[:index]):
                    stop = index
                    break
                number = self._blocks[digests[index]] = next(self._numbers)
                start = index * self.grain
                self.keeps[number] = KeptBlock(number, row, start, start + self.grain)
        beginning.offered = stop
        self._touch(digests[:stop])

    def shrink(self, slots: int, spared: Collection[bytes] = ()) -> bool:
        """Give back what was used longest ago until blocks hold at most so many slots. False, with nothing
        given back, where the next step needs more of them, or more are spared."""
        excess = -(-(self.slots - slots) // self.grain)
        if excess <= 0:
            return True
        free = (digest for digest in self._blocks if digest not in self._fixed and digest not in spared)
        gone = list(itertools.islice(free, excess))
        if len(gone) < excess:
            return False
        for digest in gone:
            number = self._blocks.pop(digest)
            if self.keeps.pop(number, None) is None:
                self.drops.append(number)
        self._dropped += len(gone) * self.grain
        return True

    def forget(self, running: Iterable[Stream] = ()) -> None:
        """Give everything back: a step failed, and nobody knows what became of its blocks. Those of `running`
        that go on offer what they have computed again."""
        self.drops = [*self._flushed, *self.drops, *self._blocks.values()]
        self._blocks.clear()
        self._fixed.clear()
        self.keeps, self.reuses = {}, []
        for stream in running:
            stream.beginning.offered = 0

    def flush(self) -> tuple[tuple[int, ...], tuple[KeptBlock, ...], tuple[KeptBlock, ...]]:
        """What the step that is built now drops, keeps and reuses."""
        found = tuple(self.drops), tuple(self.keeps.values()), tuple(self.reuses)
        self._flushed = found[0]
        self.drops, self.keeps, self.reuses = [], {}, []
        self._fixed.clear()
        return found

    def _touch(self, digests: Sequence[bytes]) -> None:
        """A text was used. Its end is of no use without its beginning, so that goes last."""
        for digest in reversed(digests):
            if digest in self._blocks:
                self._blocks.move_to_end(digest)

    def _rest(self, stream: Stream) -> tuple[int, int]:
        """Blocks of the prompt that the stream may still take over: from .. to."""
        request = stream.request
        first = stream.computed // self.grain
        able = self.most and stream.retention is None and request.params.prompt_logprobs is None
        if not able or stream.computed % self.grain:
            return first, first
        return first, max(first, (len(request.prompt) - 1) // self.grain)

    def _digests(self, stream: Stream, count: int) -> list[bytes]:
        """Of the stream's first blocks, at least so many of them."""
        digests = stream.beginning.digests
        if not digests and count:
            about = f"{stream.request.adapter} {stream.request.namespace}"
            before = hashlib.blake2b(about.encode(), digest_size=16).digest()
        elif count:
            before = digests[-1]
        for start in range(len(digests) * self.grain, count * self.grain, self.grain):
            tokens = array.array("q", stream.tokens[start : start + self.grain]).tobytes()
            before = hashlib.blake2b(before + tokens, digest_size=16).digest()
            digests.append(before)
        return digests


def check_kept(step: StepInput, cache: KVCache, committed: Mapping[int, int]) -> Mapping[int, int]:
    """Tokens of each block behind this step. Raises ValueError for what cannot be kept. `committed` are the
    tokens of the rows that are open before it."""
    if not (step.drops or step.keeps):
        return cache.kept
    blocks = dict(cache.kept)
    for number in step.drops:
        blocks.pop(number, None)
    for kept in step.keeps:
        whole = kept.row in committed and cache.rows[kept.row].whole
        if kept.block in blocks or not whole or not 0 <= kept.start < kept.stop <= committed[kept.row]:
            raise ValueError(f"{kept}: no committed tokens of a whole row, or no new block")
        blocks[kept.block] = kept.stop - kept.start
    held = sum(cache.rows[row].reserved for row in committed) + sum(blocks.values())
    if step.keeps and held > cache.slots:
        raise ValueError(f"{held} slots with the blocks to keep, the cache holds {cache.slots}")
    return blocks


def check_reuses(
    step: StepInput, blocks: Mapping[int, int], committed: dict[int, int], cache: KVCache
) -> None:
    """Raises ValueError for blocks that cannot be copied into their rows; `committed` grows by the others."""
    opened, barred = dict(step.reserves), {policy.row for policy in step.policies}
    for kept in step.reuses:
        row = None if kept.row in opened else cache.rows.get(kept.row)
        whole = kept.row not in barred and (row is None or row.whole)
        follows = whole and kept.start == committed.get(kept.row)
        if not follows or blocks.get(kept.block) != kept.stop - kept.start:
            raise ValueError(f"{kept}: no such block, or it does not follow what its row has committed")
        if kept.stop > (opened[kept.row] if row is None else row.reserved):
            raise ValueError(f"{kept}: its row reserves fewer slots")
        committed[kept.row] = kept.stop
