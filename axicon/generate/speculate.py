"""The drafting side of the engine: what is guessed, what of it is checked, and what became of it.

Before a step, streams that decode get a `DraftTree` each; the step computes their nodes beside the last
tokens. Then the engine draws token after token as it always does, each from the logits of the node that the
last one led to, until one leads nowhere. Drawn with the noise of its position that is `coupled` verification,
and the tokens are those of a run without guesses; `judge` is the other way, recursive rejection.
"""

from __future__ import annotations

import logging
import math
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, count
from operator import mul
from typing import cast

import torch
from torch import Tensor

from axicon.generate.drafting import DRAFTERS
from axicon.generate.draftmodel import Ask, DraftModel
from axicon.generate.gain import DraftCost, Odds, StepCost, worth_checking
from axicon.generate.request import DraftStats, RequestError, Speculation
from axicon.generate.sampling.gumbel import stream_key
from axicon.generate.sampling.sample import Row, law
from axicon.generate.scheduler import Stream, Work
from axicon.generate.verify import RULES, reject
from axicon.kernels.sampling import GOLDEN, splitmix
from axicon.protocols import Drafter, DraftTree, Grower, Reader, Sampler

log = logging.getLogger("axicon")

MOST_NODES = 64
"""Of one tree, unless the deployment says otherwise."""
MATCHES = (0.0, 0.25, 0.6, 0.7, 0.8, 0.9)
"""Odds of a guess by the length of the match it comes from, before anything was measured."""
ACCEPTED = 0.6
"""Odds of a draft model's node, given its parent was right, before anything was measured."""
PATIENCE = 64
"""Guesses in a row that were not checked after which guessing counts as switched off."""
RETRY = 256
"""Steps after which a draft model that did not pay is tried again; twice as many each time it is in vain."""


def read(asked: Speculation, most_nodes: int, models: bool) -> Drafter:
    """The method with its settings. Raises RequestError for what cannot be done here."""
    cls = DRAFTERS.get(asked.method)
    if cls is None:
        known = ", ".join(sorted(DRAFTERS))
        raise RequestError(f"unknown speculation method {asked.method!r}, known are {known}", "speculation")
    if cls.needs_model and not models:
        raise RequestError(
            f"speculation {asked.method!r} guesses with a draft model, and this deployment has none",
            "speculation",
        )
    settings = {"width": asked.width, "depth": asked.depth}
    for name, value in settings.items():
        if value is not None and not (isinstance(value, int) and 1 <= value <= most_nodes):
            raise RequestError(
                f"speculation {name} is {value}, it must lie between 1 and {most_nodes}", "speculation"
            )
    method = cls(**{name: value for name, value in settings.items() if value is not None})
    if method.nodes > most_nodes:
        raise RequestError(
            f"a tree of width {method.width} and depth {method.depth} may have {method.nodes} nodes, and at "
            f"most {most_nodes} are checked at once",
            "speculation",
        )
    return method


@dataclass(slots=True)
class Guesser:
    """One stream's method, and what it guessed last."""

    name: str
    method: Drafter
    exact: bool
    """Coupled verification: the tokens are those of a run without guesses."""
    seed: int
    """Of the noise that drafts are drawn with."""
    guess: tuple[int, ...] = ()
    """What was read off the text, whether it is checked or not."""
    kind: int = 0
    """What its odds are known by."""
    accepted: int = 0
    rejected: int = 0


@dataclass(slots=True)
class Record:
    """What one method has come to, over all streams."""

    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    left_out: int = 0
    failed: int = 0
    gain: float = 1.0
    idle: int = 0
    """Guesses since one was checked."""
    pause: int = RETRY
    odds: Odds = field(default_factory=lambda: Odds([ACCEPTED] * MOST_NODES))
    """Of a draft model's nodes, by depth."""
    draft: DraftCost = field(default_factory=DraftCost)

    def read(self) -> DraftStats:
        return DraftStats(
            drafted=tuple(self.drafted), accepted=tuple(self.accepted), left_out=self.left_out,
            failed=self.failed, gain=self.gain,
        )  # fmt: skip


class Speculator:
    """Guesses for the streams of one engine, the simple ones read off the text, the others with a draft model
    if there is one.
    """

    def __init__(
        self, draft: DraftModel | None = None, most_nodes: int = MOST_NODES, always: bool = False
    ) -> None:
        self.most_nodes = most_nodes
        self.always = always
        """Check every guess, whatever it costs: for comparisons and tests."""
        self.models = draft is not None
        """Whether methods that need a draft model can be asked for."""
        self._draft = draft
        self._cost = StepCost()
        self._drafting_s = 0.0
        """Seconds of this step that the draft model took."""
        self._guessers: dict[Stream, Guesser] = {}
        self._odds = Odds(MATCHES)
        self._records: dict[str, Record] = {}

    def note(self, nodes: int, seconds: float) -> None:
        """A step without prompts took so long, with all that was guessed in it."""
        self._cost.note(nodes, seconds - self._drafting_s)

    def begin(self, stream: Stream) -> None:
        """A request came in. Raises RequestError for a way to guess that is not there."""
        params = stream.request.params
        asked = params.speculation
        if asked is None:
            return
        method = read(asked, self.most_nodes, self.models)
        verify = asked.verify or ("rrs" if params.seed is None else "coupled")
        exact = params.temperature == 0 or verify == "coupled"
        seed = secrets.randbits(63) if params.seed is None else params.seed
        self._guessers[stream] = Guesser(asked.method, method, exact, seed)
        self._records.setdefault(asked.method, Record())

    def forget(self, stream: Stream) -> None:
        self._guessers.pop(stream, None)
        if self._draft is not None:
            self._draft.forget(stream)

    def stats(self) -> Mapping[str, DraftStats]:
        """What each method has come to. Any thread may ask."""
        return {name: record.read() for name, record in tuple(self._records.items())}

    def counts(self, stream: Stream) -> tuple[int, int] | None:
        """Guessed tokens of a stream that were right and wrong; None where it does not guess."""
        guesser = self._guessers.get(stream)
        return None if guesser is None else (guesser.accepted, guesser.rejected)

    def propose(self, work: list[Work]) -> list[Work]:
        """The same work with trees where they pay."""
        self._drafting_s = 0.0
        if not self._guessers:
            if self._draft is not None:
                self._draft.flush()
            return work
        decoding = [one.stream for one in work if not one.stream.prompt_left]
        trees = self._read(decoding)
        if self._draft is not None:
            trees |= self._grow(decoding)
        return [replace(one, tree=trees[one.stream]) if one.stream in trees else one for one in work]

    def _read(self, decoding: Sequence[Stream]) -> dict[Stream, DraftTree]:
        """Guesses that are read off the text."""
        guessing = []
        for stream in decoding:
            guesser = self._guessers.get(stream)
            if guesser is not None and not guesser.method.needs_model:
                guesser.guess = self._guess(stream, guesser)
                if guesser.guess:
                    guessing.append((stream, guesser))
        if not guessing:
            return {}
        lengths = self._lengths([guesser for _, guesser in guessing], len(decoding))
        return {
            stream: DraftTree(guesser.guess[:length], tuple(range(-1, length - 1)))
            for (stream, guesser), length in zip(guessing, lengths, strict=True)
            if length
        }

    def _grow(self, decoding: Sequence[Stream]) -> dict[Stream, DraftTree]:
        """Guesses of the draft model."""
        assert self._draft is not None
        groups: dict[str, list[Stream]] = {}
        for stream in decoding:
            guesser = self._guessers.get(stream)
            if guesser is not None and guesser.method.needs_model:
                groups.setdefault(guesser.name, []).append(stream)
        asks = []
        for name, streams in groups.items():
            depth = self._depth(name, streams, len(decoding))
            asks += [ask for ask in (self._ask(stream, depth) for stream in streams) if ask.depth > 0]
        started = time.perf_counter()
        try:
            if not asks:
                self._draft.flush()
                return {}
            trees = self._draft.draft(asks)
        except Exception:
            self._break([ask.stream for ask in asks])
            return {}
        self._drafting_s = time.perf_counter() - started
        deepest = max((max(tree.depths(), default=0) for tree in trees.values()), default=0)
        for name in groups:
            self._records[name].draft.note(deepest, self._drafting_s)
        return {stream: tree for stream, tree in trees.items() if len(tree)}

    def _ask(self, stream: Stream, depth: int) -> Ask:
        guesser = self._guessers[stream]
        method = cast(Grower, guesser.method)
        depth = min(
            depth, method.depth, _tokens_left(stream), _slots_left(stream) * method.depth // method.nodes
        )
        return Ask(stream, method, depth, stream.request.params.temperature, guesser.seed, guesser.exact)

    def _depth(self, name: str, streams: Sequence[Stream], decoding: int) -> int:
        """How deep the trees of one method pay, 0 where they do not."""
        record, method = self._records[name], self._guessers[streams[0]].method
        deepest = max(self._guessers[stream].method.depth for stream in streams)
        if self.always:
            return deepest
        alone = self._cost.seconds(decoding) / decoding
        best, gain, right = 0, 1.0, 0.0
        for depth in range(1, deepest + 1) if alone else ():
            right += math.prod(record.odds.of(kind) for kind in range(depth))
            nodes = decoding + len(streams) * depth * method.nodes / method.depth
            seconds = self._cost.seconds(nodes) + record.draft.seconds(depth)
            found = alone * (decoding + len(streams) * right) / seconds
            if found > gain or (depth == 1 and best == 0):
                record.gain = found
            if found > gain:
                best, gain = depth, found
        if not alone or (best == 0 and record.idle >= record.pause):
            # Nothing is known, or nothing new for a long time.
            record.pause *= 2
            record.idle = 0
            return deepest
        if best:
            record.pause = RETRY
        self._switch(name, record, best > 0, record.gain, decoding)
        return best

    def _break(self, streams: Sequence[Stream]) -> None:
        """Drafting raised: these requests go on without, and the draft model forgets all it holds."""
        assert self._draft is not None
        for stream in streams:
            self._fail(stream, self._guessers[stream])
        try:
            self._draft.reset()
        except Exception:
            log.exception("the draft model is given up")
            for stream, guesser in list(self._guessers.items()):
                if guesser.method.needs_model:
                    self._fail(stream, guesser)
            self._draft = None

    def _guess(self, stream: Stream, guesser: Guesser) -> tuple[int, ...]:
        try:
            guess = tuple(cast(Reader, guesser.method).guess(stream.tokens))
        except Exception:
            self._fail(stream, guesser)
            return ()
        guesser.kind = min(len(MATCHES) - 1, len(guess).bit_length())
        return guess[: max(0, min(_tokens_left(stream), _slots_left(stream)))]

    def _fail(self, stream: Stream, guesser: Guesser) -> None:
        log.exception("request %s goes on without speculation: %s failed", stream.request.id, guesser.name)
        self._records[guesser.name].failed += 1
        self._guessers.pop(stream)

    def _lengths(self, guessers: Sequence[Guesser], streams: int) -> list[int]:
        """How much of each guess is checked."""
        if self.always:
            return [len(one.guess) for one in guessers]
        odds = [list(accumulate([self._odds.of(one.kind)] * len(one.guess), mul)) for one in guessers]
        lengths, gain = worth_checking(odds, streams, self._cost)
        for one, length in zip(guessers, lengths, strict=True):
            self._switch(one.name, self._records[one.name], bool(length), gain, streams)
        return lengths

    def _switch(self, name: str, record: Record, used: bool, gain: float, streams: int) -> None:
        """Count, and say when guessing begins or ceases to pay."""
        record.gain = gain
        record.left_out += not used
        if used and record.idle >= PATIENCE:
            log.info("speculation %s is on again: estimated gain %.2f with %d streams", name, gain, streams)
        record.idle = 0 if used else record.idle + 1
        if record.idle == PATIENCE:
            log.info("speculation %s is off: it does not pay with %d streams", name, streams)

    def judges(self, one: Work, node: int) -> bool:
        """Whether `judge` decides about the children of this node, rather than a draw."""
        guesser = self._guessers.get(one.stream)
        return guesser is not None and not guesser.exact and node in one.tree.parents

    def judge(self, one: Work, node: int, logits_V: Tensor, row: Row, sampler: Sampler) -> int | None:
        """The token behind a node: one of its children, or one drawn from what they leave of its law."""
        q_V = law(logits_V, row)
        if q_V is None:
            return None
        rule, tree = RULES[self._guessers[one.stream].method.rule], one.tree
        children, p_V = [tree.tokens[child] for child in tree.children(node)], None
        if node in tree.laws:
            ids_C, probs_C = tree.laws[node]
            p_V = torch.zeros_like(q_V).scatter_(0, ids_C, probs_C)
        accepted, rest_V = reject(rule, q_V, p_V, children, chances(stream_key(row.draw)))
        if accepted is not None:
            return children[accepted]
        return int(sampler.choose(rest_V[None], torch.arange(len(rest_V))[None], [row.draw]))

    def settle(self, one: Work, emitted: Sequence[int]) -> None:
        """What became of a step: the tokens that came out of it for this stream."""
        guesser = self._guessers.get(one.stream)
        if guesser is None:
            return
        # Also what was not checked shows how good it was, as far as tokens came.
        for guessed, token in zip(guesser.guess, emitted, strict=False):
            self._odds.note(guesser.kind, guessed == token)
            if guessed != token:
                break
        guesser.guess = ()
        path = one.tree.follow(emitted)
        record = self._records[guesser.name]
        if guesser.method.needs_model and len(one.tree):
            deepest = max(one.tree.depths())
            for kind in range(min(len(path) + 1, deepest, len(emitted))):
                record.odds.note(kind, kind < len(path))
            if self._draft is not None:
                self._draft.settle(one.stream, path)
        guesser.accepted += len(path)
        guesser.rejected += len(one.tree) - len(path)
        _add(record.drafted, one.tree.depths())
        _add(record.accepted, range(1, len(path) + 1))


def _tokens_left(stream: Stream) -> int:
    """Tokens that may be guessed: one is drawn behind them."""
    return stream.request.params.max_tokens - stream.generated - 1


def _slots_left(stream: Stream) -> int:
    """Nodes that fit behind the last token. No guess reaches past a length at which a bounded cache is cut,
    so that it is cut where it is without guesses.
    """
    bounded = stream.retention
    if bounded is None:
        return stream.slots - len(stream.tokens)
    if bounded.once:
        return stream.slots - bounded.budget - stream.generated
    return -len(stream.tokens) % bounded.evict_every


def _add(counts: list[int], depths: Sequence[int]) -> None:
    for depth in depths:
        counts.extend([0] * (depth - len(counts)))
        counts[depth - 1] += 1


def chances(key: int) -> Iterator[float]:
    """Uniform numbers in [0, 1), from a stream that no token's noise comes from."""
    key = splitmix(key ^ GOLDEN)
    return (splitmix((key + GOLDEN * n) & ((1 << 64) - 1)) / 2**64 for n in count(1))
