"""The drafting side of the engine: what is guessed, what of it is checked, and what became of it.

Before a step, streams that decode get a `DraftTree` each; the step computes their nodes beside the last
tokens. Then the engine draws token after token as it always does, each from the logits of the node that the
last one led to, until one leads nowhere. Drawn with the noise of its position that is `coupled` verification,
and the tokens are those of a run without guesses; `judge` is the other way, recursive rejection.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, count
from operator import mul
from typing import cast

import torch
from torch import Tensor

from axicon.generate.drafting import DRAFTERS
from axicon.generate.gain import Odds, StepCost, worth_checking
from axicon.generate.request import DraftStats, RequestError, Speculation
from axicon.generate.sampling.gumbel import stream_key
from axicon.generate.sampling.sample import Row, law
from axicon.generate.scheduler import Stream, Work
from axicon.generate.verify import RULES, reject
from axicon.kernels.sampling import GOLDEN, splitmix
from axicon.protocols import Drafter, DraftTree, Reader, Sampler

log = logging.getLogger("axicon")

MOST_NODES = 64
"""Of one tree, unless the deployment says otherwise."""
MATCHES = (0.0, 0.25, 0.6, 0.7, 0.8, 0.9)
"""Odds of a guess by the length of the match it comes from, before anything was measured."""
PATIENCE = 64
"""Guesses in a row that were not checked after which guessing counts as switched off."""


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
    guess: tuple[int, ...] = ()
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

    def read(self) -> DraftStats:
        return DraftStats(
            drafted=tuple(self.drafted), accepted=tuple(self.accepted), left_out=self.left_out,
            failed=self.failed, gain=self.gain,
        )  # fmt: skip


class Speculator:
    """Guesses for the streams of one engine."""

    def __init__(self, most_nodes: int = MOST_NODES, always: bool = False) -> None:
        self.most_nodes = most_nodes
        self.cost = StepCost()
        self.always = always
        """Check every guess, whatever it costs: for comparisons and tests."""
        self._guessers: dict[Stream, Guesser] = {}
        self._odds = Odds(MATCHES)
        self._records: dict[str, Record] = {}

    @property
    def models(self) -> bool:
        """Whether methods that need a draft model can be asked for."""
        return False

    def begin(self, stream: Stream) -> None:
        """A request came in. Raises RequestError for a way to guess that is not there."""
        params = stream.request.params
        asked = params.speculation
        if asked is None:
            return
        method = read(asked, self.most_nodes, self.models)
        verify = asked.verify or ("rrs" if params.seed is None else "coupled")
        exact = params.temperature == 0 or verify == "coupled"
        self._guessers[stream] = Guesser(asked.method, method, exact)
        self._records.setdefault(asked.method, Record())

    def forget(self, stream: Stream) -> None:
        self._guessers.pop(stream, None)

    def stats(self) -> Mapping[str, DraftStats]:
        return {name: record.read() for name, record in self._records.items()}

    def counts(self, stream: Stream) -> tuple[int, int] | None:
        """Guessed tokens of a stream that were right and wrong; None where it does not guess."""
        guesser = self._guessers.get(stream)
        return None if guesser is None else (guesser.accepted, guesser.rejected)

    def propose(self, work: list[Work]) -> list[Work]:
        """The same work with trees where they pay."""
        if not self._guessers:
            return work
        guessing = []
        for place, one in enumerate(work):
            guesser = self._guessers.get(one.stream)
            if guesser is not None and not one.stream.prompt_left:
                guesser.guess = self._guess(one.stream, guesser)
                if guesser.guess:
                    guessing.append((place, guesser))
        if not guessing:
            return work
        decoding = sum(not one.stream.prompt_left for one in work)
        lengths = self._lengths([guesser for _, guesser in guessing], decoding)
        result = list(work)
        for (place, guesser), length in zip(guessing, lengths, strict=True):
            if length:
                parents = tuple(range(-1, length - 1))
                result[place] = replace(work[place], tree=DraftTree(guesser.guess[:length], parents))
        return result

    def _guess(self, stream: Stream, guesser: Guesser) -> tuple[int, ...]:
        try:
            guess = tuple(cast(Reader, guesser.method).guess(stream.tokens))
        except Exception:
            self._fail(stream, guesser)
            return ()
        guesser.kind = min(len(MATCHES) - 1, len(guess).bit_length())
        return guess[: _room(stream)]

    def _fail(self, stream: Stream, guesser: Guesser) -> None:
        log.exception("request %s goes on without speculation: %s failed", stream.request.id, guesser.name)
        self._records[guesser.name].failed += 1
        self._guessers.pop(stream)

    def _lengths(self, guessers: Sequence[Guesser], streams: int) -> list[int]:
        """How much of each guess is checked."""
        if self.always:
            return [len(one.guess) for one in guessers]
        odds = [list(accumulate([self._odds.of(one.kind)] * len(one.guess), mul)) for one in guessers]
        lengths, gain = worth_checking(odds, streams, self.cost)
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
        guesser.accepted += len(path)
        guesser.rejected += len(one.tree) - len(path)
        record = self._records[guesser.name]
        _add(record.drafted, one.tree.depths())
        _add(record.accepted, range(1, len(path) + 1))


def _room(stream: Stream) -> int:
    """Tokens that may be guessed: one is drawn behind them, and what is computed must fit."""
    left = stream.request.params.max_tokens - stream.generated - 1
    return max(0, min(left, stream.slots - len(stream.tokens)))


def _add(counts: list[int], depths: Sequence[int]) -> None:
    for depth in depths:
        counts.extend([0] * (depth - len(counts)))
        counts[depth - 1] += 1


def chances(key: int) -> Iterator[float]:
    """Uniform numbers in [0, 1), from a stream that no token's noise comes from."""
    key = splitmix(key ^ GOLDEN)
    return (splitmix((key + GOLDEN * n) & ((1 << 64) - 1)) / 2**64 for n in count(1))
