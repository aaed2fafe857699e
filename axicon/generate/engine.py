"""The engine: requests in, deltas out, one step of the model at a time.

A step is: take out what was cancelled or is too late, schedule, compute, sample, commit, turn into text. The
engine belongs to one thread. After the forward pass every request is handled by itself, so one that fails
ends alone.
"""

from __future__ import annotations

import bisect
import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from axicon.generate.answer import Answer
from axicon.generate.details import pictured
from axicon.generate.detokenize import Tokenizer
from axicon.generate.nodes import nodes_of, wanted_of
from axicon.generate.prefixes import Prefixes
from axicon.generate.request import (
    Delta,
    EngineStats,
    FinishReason,
    Limits,
    Origin,
    Overloaded,
    Request,
    RequestError,
)
from axicon.generate.retention import retention
from axicon.generate.sampling import SAMPLERS
from axicon.generate.sampling.sample import logprobs
from axicon.generate.scheduler import Scheduler, Stream, Work
from axicon.generate.speculate import Speculator, read
from axicon.generate.spots import Spot, choose, rows_of
from axicon.generate.steptimes import StepClock
from axicon.generate.validate import check_request
from axicon.model.adapterfile import Adapter
from axicon.protocols import Runner, Sampler
from axicon.step import CacheUse, LayeredPrompt, StepInput

log = logging.getLogger("axicon")

FAILURES_BORNE = 8
"""Failed steps in a row after which the engine gives up, so that whoever watches it can start another."""


class Engine:
    """Continuous batching over a `Runner`.

    eos_ids end a request unless it asks to ignore them. `sampler` draws the tokens of requests with a
    temperature.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer,
        *,
        eos_ids: Sequence[int],
        limits: Limits | None = None,
        sampler: Sampler | None = None,
        speculator: Speculator | None = None,
        model_name: str = "",
    ) -> None:
        self.runner = runner
        self.tokenizer = tokenizer
        self.eos_ids = tuple(eos_ids)
        self.limits = limits or Limits()
        self.model_name = model_name
        self.max_model_len = _longest(runner, self.limits)
        """The most tokens a prompt and its answer may have together."""
        self.most_requests = runner.capacity.max_rows + self.limits.max_queue
        """Requests that may be here at once."""
        self.decode_only = False
        """Whether the last step computed no prompt tokens."""
        self.speculator = speculator or Speculator()
        self._sampler = sampler or SAMPLERS["gumbel"]()
        prefixes = Prefixes(runner.capacity, self.limits.prefix_cache)
        self._scheduler = Scheduler(runner.capacity, runner.slots_reserved, prefixes=prefixes)
        self._answers: dict[Stream, Answer] = {}
        self._streams: dict[tuple[str, int], Stream] = {}
        self._cancelled: set[Stream] = set()
        self._cut: frozenset[int] = frozenset()
        """Rows that the last step cut."""
        self._staged: list[Work] = []
        """What the last step computed: its nodes lie in the cache and are not committed."""
        self._kept: dict[Stream, list[int]] = {}
        """Nodes of its trees that turned out right."""
        self._gone: list[Stream] = []
        """Streams that ended since the last step began."""
        self._failures = 0
        self._adapters: frozenset[int] = frozenset()
        """That requests may name."""
        self._leaving: set[int] = set()
        """Adapters that only running requests still have."""
        self._held = CacheUse()
        self._steps = self._prompt_tokens = self._generated = self._step_tokens = 0
        self._step_seconds = 0.0
        self._decode_steps = StepClock()
        self._finished: Counter[FinishReason] = Counter()

    @property
    def has_work(self) -> bool:
        return bool(self._streams or self._scheduler.releases)

    def check(self, request: Request) -> None:
        """Raises RequestError for a request that cannot be served as asked. Any thread may call it."""
        if request.params.speculation is not None:
            read(request.params.speculation, self.speculator.most_nodes, self.speculator.models)
        capacity = self.runner.capacity
        check_request(
            request, capacity.vocab, self.max_model_len, self.limits, capacity.blocks, self._adapters
        )

    def hold(self, number: int, adapter: Adapter) -> None:
        """Have an adapter that requests name by this number. Numbers are not used again. Raises AxiconError
        where adapters cannot be."""
        self.runner.hold(number, adapter)
        self._adapters |= {number}

    def give_up(self, number: int) -> None:
        """Take no more requests for an adapter. It goes when the last one that has it ends."""
        self._adapters -= {number}
        self._leaving.add(number)

    def add(self, request: Request) -> None:
        """Queue a request. Raises RequestError for what cannot be served, Overloaded when it is full here."""
        self.check(request)
        key = (request.id, request.choice)
        if key in self._streams:
            raise RequestError(f"request {request.id!r}, choice {request.choice}, is already running", "id")
        if len(self._streams) >= self.most_requests:
            raise Overloaded(f"{len(self._streams)} requests are running or waiting, try again later")
        stream = Stream(request)
        prompt, output = len(request.prompt), request.params.max_tokens
        stream.retention = retention(request.kv, prompt, output, self.limits.kv_floor)
        self.speculator.begin(stream)
        self._answers[stream] = Answer(request, self.tokenizer, self.runner.capacity.vocab, self.eos_ids)
        self._streams[key] = stream
        self._scheduler.add(stream)

    def cancel(self, request_id: str) -> None:
        """End all choices of a request with the next step; its cache is given back in that step.

        Unknown ids are ignored.
        """
        self._cancelled.update(stream for (name, _), stream in self._streams.items() if name == request_id)

    def step(self) -> list[Delta]:
        """Compute one step and return what it added to every request it touched."""
        self.decode_only = False
        deltas = self._sweep()
        if self._leaving:
            for number in self._leaving - {stream.request.adapter for stream in self._streams.values()}:
                self.runner.hold(number, None)
                self._leaving.discard(number)
        while self._gone:
            self.speculator.forget(self._gone.pop())
        for one in self._staged:
            self._scheduler.offer(one.stream)
        work = self._scheduler.schedule()
        if not work and not self._scheduler.releases:
            return deltas
        started = time.perf_counter()
        work = self.speculator.propose(work)
        step = self._build(work)
        try:
            out = self.runner.forward(step)
        except Exception as error:
            return deltas + self._give_up(work, error)
        self._failures = 0
        self._staged = work
        self._cut = frozenset(step.evictions)
        self._held = out.held
        if work:
            deltas += self._advance(work, out.logits_WV)
            self._count(work, time.perf_counter() - started)
        return deltas

    def stats(self) -> EngineStats:
        scheduler, capacity = self._scheduler, self.runner.capacity
        return EngineStats(
            running=len(scheduler.running), waiting=len(scheduler.waiting),
            slots_reserved=capacity.slots - scheduler.slots_free, slots=capacity.slots,
            steps_total=self._steps, prompt_tokens_total=self._prompt_tokens,
            generated_tokens_total=self._generated, finished_total=dict(self._finished),
            step_seconds=self._step_seconds, step_tokens=self._step_tokens,
            decode_steps=self._decode_steps.read(), kv_slots=scheduler.slots_by_policy(),
            kv_bytes=self._held.bytes, kept_bytes=self._held.kept_bytes,
            prefixes=scheduler.prefixes.stats(), kv_evicted_total=self._held.evicted,
            drafts=self.speculator.stats(),
        )  # fmt: skip

    def _sweep(self) -> list[Delta]:
        """End what was cancelled or is too late."""
        now = time.monotonic()
        deltas = []
        for stream in list(self._streams.values()):
            deadline = stream.request.deadline
            if stream in self._cancelled:
                deltas.append(self._close(stream, "cancelled"))
            elif deadline is not None and now > deadline:
                deltas.append(self._close(stream, "deadline"))
        self._cancelled.clear()
        return deltas

    def _build(self, work: Sequence[Work]) -> StepInput:
        """The step's nodes, and what became of the nodes of the step before."""
        nodes = nodes_of(work)
        scheduler = self._scheduler
        drops, keeps, reuses = scheduler.prefixes.flush()
        step = StepInput(
            *nodes,
            commits=self._commits(),
            releases=tuple(scheduler.releases),
            evictions=tuple(one.stream.row for one in self._staged if one.stream.due),
            reserves=tuple(scheduler.reserves),
            policies=tuple(one.policy for one in work if one.policy is not None),
            layered=tuple(LayeredPrompt(one.stream.row, one.blocks) for one in work if one.blocks),
            drops=drops,
            keeps=keeps,
            reuses=reuses,
        )
        scheduler.releases, scheduler.reserves = [], []
        return step

    def _commits(self) -> tuple[int, ...]:
        """Nodes of the last step that stay: all but wrong guesses, also of streams that ended and whose row
        this step releases, as blocks may be kept of it."""
        commits: list[int] = []
        first = 0
        for one in self._staged:
            if one.stream.commits and not one.blocks:
                commits += range(first, first + one.nodes)
                commits += [first + one.nodes + node for node in self._kept.get(one.stream, ())]
            first += one.nodes + len(one.tree)
        return tuple(commits)

    def _advance(self, work: Sequence[Work], logits_WV: Tensor) -> list[Delta]:
        """Everything behind the forward pass, for each stream by itself."""
        deltas: list[Delta] = []
        self._kept = {}
        drawing: list[Spot] = []
        row = 0
        for one in work:
            stream, wanted = one.stream, wanted_of(one)
            stream.passed += one.blocks
            if not one.finished:
                continue
            stream.computed = one.stop
            self._answers[stream].cached = stream.beginning.reused
            logits_TV = logits_WV[row : row + len(wanted)]
            row += len(wanted) + len(one.tree)
            try:
                self._read_prompt(stream, wanted, logits_TV)
            except Exception:
                deltas.append(self._defect(stream))
                continue
            if stream.computed == len(stream.tokens):
                if stream.request.params.max_tokens:
                    drawing.append(Spot(one, row - len(one.tree) - 1))
                else:
                    deltas.append(self._close(stream, "length"))
        return deltas + self._draw(drawing, logits_WV)

    def _read_prompt(self, stream: Stream, wanted: range, logits_TV: Tensor) -> None:
        params, prompt = stream.request.params, stream.request.prompt
        following = prompt[wanted.start + 1 : wanted.stop + 1]
        if params.prompt_logprobs is None or not following:
            return
        found = logprobs(logits_TV[: len(following)], following, params.prompt_logprobs)
        self._answers[stream].add_prompt_logprobs(found)

    def _draw(self, drawing: Sequence[Spot], logits_WV: Tensor) -> list[Delta]:
        """One more token for each of these streams, and one more for every guess that turns out right."""
        deltas: dict[Stream, Delta] = {}
        spots = drawing
        while spots:
            spots = self._draw_once(spots, logits_WV, deltas)
        for one, _, _ in drawing:
            if one.stream.request.params.speculation is not None:
                self.speculator.settle(one, one.stream.tokens[one.stop :])
                deltas[one.stream] = self._counted(one.stream, deltas[one.stream])
            if one.stream.request.details and one.stream.retention is not None:
                deltas[one.stream] = pictured(deltas[one.stream], one, self.runner, self._cut)
        return list(deltas.values())

    def _draw_once(self, spots: Sequence[Spot], logits_WV: Tensor, deltas: dict[Stream, Delta]) -> list[Spot]:
        """The token behind each spot, added to the deltas; the spots whose children hold it come next."""
        logits_RV = rows_of(logits_WV, [spot.row for spot in spots])
        rows = [self._answers[spot.work.stream].sampling(len(spot.work.stream.tokens)) for spot in spots]
        tokens = choose(spots, logits_RV, rows, self._sampler, self.speculator)
        onward: list[Spot] = []
        for r, (spot, token) in enumerate(zip(spots, tokens, strict=True)):
            stream, child = spot.work.stream, None if token is None else spot.child(token)
            top = stream.request.params.logprobs
            if token is None:
                delta = self._close(
                    stream, "error", "the model's probabilities for this request are not numbers"
                )
            else:
                try:
                    logprob = None if top is None else logprobs(logits_RV[r : r + 1], [token], top)[0]
                    delta = self._answers[stream].accept(token, logprob)
                except Exception:
                    delta = self._defect(stream)
                else:
                    stream.tokens.append(token)
                    self._generated += 1
                    if delta.finish_reason is not None:
                        self._forget(stream, delta.finish_reason)
                    elif child is not None:
                        stream.computed += 1
                        self._kept.setdefault(stream, []).append(child)
                        onward.append(Spot(spot.work, spot.root, child))
            if stream.request.details and delta.tokens:
                delta = replace(delta, origins=(Origin(delta.text, child is not None),))
            before = deltas.get(stream)
            deltas[stream] = delta if before is None else before.followed_by(delta)
        return onward

    def _close(self, stream: Stream, reason: FinishReason, error: str | None = None) -> Delta:
        """End a stream without another token."""
        try:
            delta = self._counted(stream, self._answers[stream].close(reason, error))
        except Exception:
            return self._defect(stream)
        self._forget(stream, delta.finish_reason or reason)
        return delta

    def _counted(self, stream: Stream, delta: Delta) -> Delta:
        counts = self.speculator.counts(stream)
        return delta if counts is None else replace(delta, accepted=counts[0], rejected=counts[1])

    def _defect(self, stream: Stream) -> Delta:
        """End a stream that raised; the others do not notice."""
        log.exception("request %s failed", stream.request.id)
        request = stream.request
        self._forget(stream, "error")
        return Delta(
            request_id=request.id, choice=request.choice, finish_reason="error", error="internal error",
            prompt_tokens=len(request.prompt), completion_tokens=stream.generated,
        )  # fmt: skip

    def _give_up(self, work: Sequence[Work], error: Exception) -> list[Delta]:
        """A forward pass failed: end every stream it touched, keep the others. Raises when too many did."""
        log.exception("a step of %d streams failed", len(work))
        self._failures += 1
        if self._failures >= FAILURES_BORNE:
            raise error
        self._scheduler.prefixes.forget(self._scheduler.running)
        touched = {one.stream: None for one in (*work, *self._staged) if one.stream.row >= 0}
        self._staged = []
        return [
            self._close(stream, "error", "the model failed to compute this request") for stream in touched
        ]

    def _forget(self, stream: Stream, reason: FinishReason) -> None:
        self._scheduler.remove(stream)
        if reason == "error":
            stream.left = -1  # Nobody shall go on from what it computed.
        self._gone.append(stream)
        self._finished[reason] += 1
        del self._answers[stream], self._streams[stream.request.id, stream.request.choice]

    def _count(self, work: Sequence[Work], seconds: float) -> None:
        self._steps += 1
        self._step_seconds = seconds
        self._step_tokens = sum(self._scheduler.cost(one) + len(one.tree) for one in work)
        pieces = [one for one in work if one.start < len(one.stream.request.prompt)]
        prompt = sum(self._scheduler.cost(one) for one in pieces)
        self._prompt_tokens += sum(one.stop - one.start for one in pieces if one.finished)
        self._scheduler.pace.note(seconds, prompt, self._step_tokens - prompt)
        self.decode_only = prompt == 0
        if self.decode_only:
            self._decode_steps.note(seconds)
            self.speculator.note(self._step_tokens, seconds)


def _longest(runner: Runner, limits: Limits) -> int:
    """Tokens the model knows, the limits allow and the cache holds."""
    capacity = runner.capacity
    longest = min(capacity.max_positions, limits.max_model_len or capacity.max_positions)
    return bisect.bisect_right(range(1, longest + 1), capacity.slots, key=runner.slots_reserved)
