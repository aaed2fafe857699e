"""ShardGroup: a model in stages, several processes that together are one Runner.

Rank 0 is the caller: it schedules and computes the first stage. The others are Ray actors, each in its
bundle of a placement group. Ray starts them, has them load their weights, asks after their health and ends
them; what a step needs goes through the process group alone, for an actor call costs many times as much.

A group that lost a shard stays lost: `forward` says so at once, and `close` ends what is left.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import ray
import torch
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.shard import Shard, StageSettings, loaded, versions
from actors.topology import reserve
from actors.transport import Lost, Op, RankFailed, Transport, open_meeting
from axicon.errors import AxiconError, RunFailed
from axicon.generate.build import Dtype
from axicon.generate.runner import Checked, digest_of
from axicon.model import checkpoint
from axicon.model.adapterfile import Adapter
from axicon.place import Plan, balanced
from axicon.step import Capacity, StepInput, StepOutput

log = logging.getLogger("axicon")

GONE = "its process has ended"
PING_S = 2.0
"""How long the shards have to say what went wrong, after something did."""


class ShardGroup:
    """Starts the shards and holds stage 0. Ray must be running; the thread that starts it steps it.

    stages: how many, or a plan that says which blocks each holds. threads: of each process; a shard asks for
    as many CPUs. kv_bytes: of each process, None for what `LocalRunner` takes. timeout_s: the longest a step
    may wait for a shard. start_timeout_s: the longest that starting and loading may take. Raises AxiconError
    for what cannot be started, RunFailed when a shard fails on the way; nothing is left then.
    """

    def __init__(
        self,
        model: str,
        stages: int | Plan,
        *,
        dtype: Dtype = "bfloat16",
        threads: int = 1,
        kv_bytes: int | None = None,
        max_rows: int = 64,
        prefill_chunk: int = 256,
        timeout_s: float = 60.0,
        start_timeout_s: float = 600.0,
    ) -> None:
        folder = checkpoint.resolve(model)
        shape = checkpoint.shape_of(folder)
        self.plan = balanced(shape, stages) if isinstance(stages, int) else stages
        if len(self.plan) < 2 or self.plan.layers != shape.layers:
            raise ValueError(f"plan {self.plan}: not the model's {shape.layers} blocks in several stages")
        self._timeout_s = timeout_s
        self._shards: list[Any] = []
        self._placement: PlacementGroup | None = None
        self._link: Transport | None = None
        self._lock = threading.Lock()
        self._under_way = False
        self._failure = ""
        self._closing = threading.Event()
        self._beating = threading.Thread(target=self._beat, name="shards-heartbeat", daemon=True)
        settings = StageSettings(
            # A directory is named by its path; what is no directory, every machine finds for itself.
            model=str(folder) if Path(model).expanduser().exists() else model, first=0, last=shape.layers,
            dtype=dtype, threads=threads, kv_bytes=kv_bytes, max_rows=max_rows, prefill_chunk=prefill_chunk,
        )  # fmt: skip
        try:
            self._start(settings, time.monotonic() + start_timeout_s)
        except BaseException:
            self.close()
            raise

    @property
    def capacity(self) -> Capacity:
        return self._capacity

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def describe(self) -> Mapping[str, object]:
        return self._facts

    def slots_reserved(self, tokens: int) -> int:
        return self._runner.slots_reserved(tokens)

    def hold(self, number: int, adapter: Adapter | None) -> None:
        if adapter is not None:
            raise AxiconError("a model in stages serves no adapters; serve it in one process, or merged")

    def positions(self, row: int) -> None:
        """Rows hold everything."""

    def forward(self, step: StepInput) -> StepOutput:
        """Raises ValueError as `Runner.forward` does, RunFailed when a shard fails or is lost."""
        with self._lock:
            if self._failure:
                raise RunFailed(self._failure)
            checked = self._runner.check(step)
            self._under_way = True
            try:
                return self._round(self._linked, checked)
            except Lost as error:
                raise self._lose(str(error)) from error
            finally:
                if self._under_way and not self._failure:
                    # Ctrl-C, say: the shards wait for something that does not come.
                    self._lose("a step was broken off")

    def _round(self, link: Transport, checked: Checked) -> StepOutput:
        """One step through all stages, back to this one."""
        step = checked.step
        link.announce(Op.STEP, step.pack())
        self._runner.apply(checked)
        ours: Exception | None = None
        if len(step):
            out = self._runner.out(len(step))
            try:
                out = self._runner.compute(checked)
            except Exception as error:
                ours = error
            link.send(1, out, None if ours is None else 0)
        wanted = int(step.wanted_N.sum())
        try:
            logits_WV = torch.empty(0, self._capacity.vocab)
            if len(step):
                logits_WV = link.receive(link.world - 1, (wanted, self._capacity.vocab), torch.float32)
            self._under_way = False
            return StepOutput(logits_WV)
        except RankFailed as error:
            self._under_way = False
            self._runner.unstage()
            if ours is not None:
                raise ours from None
            reason = self._conditions().get(error.rank) or "its log says why"
            raise RunFailed(f"{self._name(error.rank)} failed to compute a step: {reason}") from None

    def close(self) -> None:
        """End every shard and give its place back. Does nothing the second time."""
        self._closing.set()
        with self._lock:
            if self._link is not None and not self._failure:
                with contextlib.suppress(Lost):
                    self._link.announce(Op.STOP)
            self._failure = self._failure or "the model was closed"
            if self._link is not None:
                self._link.leave()
            if ray.is_initialized():
                for shard in self._shards:
                    ray.kill(shard)
                if self._placement is not None:
                    remove_placement_group(self._placement)
            self._shards, self._placement = [], None
        if self._beating.is_alive():
            self._beating.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, settings: StageSettings, deadline: float) -> None:
        self._placement = reserve(self.plan, settings.threads, max(1.0, deadline - time.monotonic()))
        # A shard is of no use without the others' caches: it is neither restarted nor asked twice.
        actor = ray.remote(max_restarts=0, max_task_retries=0, num_cpus=settings.threads)(Shard)
        self._shards = [
            actor.options(
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._placement, bundle)
            ).remote()
            for bundle in range(len(self.plan) - 1)
        ]
        for rank, theirs in self._results([shard.versions.remote() for shard in self._shards], deadline):
            self._compare(rank, versions(), theirs)
        parts = [replace(settings, first=one.first, last=one.last) for one in self.plan.stages]
        loading = [shard.load.remote(part) for shard, part in zip(self._shards, parts[1:], strict=True)]
        self._runner = parts[0].runner()
        stages = [loaded(self._runner)]
        for rank, stage in self._results(loading, deadline):
            self._compare(rank, *({"model": str(one.facts["model"])} for one in (stages[0], stage)))
            stages.append(stage)
        self._runner.limit(min(stage.slots for stage in stages))
        self._capacity = replace(
            self._runner.capacity, bytes_per_slot=sum(stage.bytes_per_slot for stage in stages)
        )
        self._facts = _merged([stage.facts for stage in stages]) | {"plan": str(self.plan)}
        self._fingerprint = digest_of(self._facts)
        self._connect(deadline)

    def _connect(self, deadline: float) -> None:
        meeting, store = open_meeting(len(self.plan), ray.util.get_node_ip_address(), self._timeout_s)
        joining = [shard.join.remote(meeting, rank) for rank, shard in enumerate(self._shards, 1)]
        try:
            self._link = Transport(meeting, 0, store, self._ended)
        except Lost:
            self._results(joining, time.monotonic() + PING_S)  # a shard may know more
            raise
        self._beating.start()
        self._results(joining, deadline)

    def _results(self, answers: Sequence[Any], deadline: float) -> list[tuple[int, Any]]:
        """(rank, answer) of every shard. Raises what the shard raised, or RunFailed."""
        found = []
        for rank, answer in enumerate(answers, 1):
            try:
                found.append((rank, ray.get(answer, timeout=max(0.0, deadline - time.monotonic()))))
            except RayTaskError as error:
                cause = error.cause
                kind = type(cause) if isinstance(cause, AxiconError) else RunFailed
                raise kind(f"{self._name(rank)}: {cause}") from None
            except RayActorError:
                raise RunFailed(f"{self._name(rank)}: its process ended during the start") from None
            except GetTimeoutError:
                raise RunFailed(f"{self._name(rank)}: not ready in time, raise start_timeout_s") from None
        return found

    def _compare(self, rank: int, ours: Mapping[str, str], theirs: Mapping[str, str]) -> None:
        for what, value in ours.items():
            if theirs.get(what) != value:
                raise AxiconError(
                    f"{self._name(rank)} has {what} {theirs.get(what)}, this process {value}; install "
                    "the same versions and the same model on every machine"
                )

    def _beat(self) -> None:
        """Show the shards that rank 0 is there while no step comes, and notice when one of them is not."""
        while not self._closing.wait(self._timeout_s / 4):
            with self._lock:
                if self._failure:
                    return
                try:
                    self._linked.announce(Op.IDLE)
                except Lost as error:
                    self._lose(str(error))

    def _lose(self, reason: str) -> RunFailed:
        """The group is over: let go of everyone, and say who is at fault."""
        self._linked.leave()
        found = [f"{self._name(rank)}: {text}" for rank, text in self._conditions().items() if text]
        self._failure = f"{'; '.join(found) or reason}; the model is lost, start it again"
        log.error("%s (%s)", self._failure, reason)
        return RunFailed(self._failure)

    def _conditions(self) -> dict[int, str]:
        """What ails each shard; empty where nothing does."""
        if not ray.is_initialized():  # asking would start another Ray
            return {}
        answers = {shard.ping.remote(): rank for rank, shard in enumerate(self._shards, 1)}
        ready, silent = ray.wait(list(answers), num_returns=len(answers), timeout=PING_S)
        found = {answers[answer]: "it does not answer" for answer in silent}
        for answer in ready:
            try:
                found[answers[answer]] = ray.get(answer)
            except RayActorError:
                found[answers[answer]] = GONE
        return dict(sorted(found.items()))

    def _ended(self) -> str:
        """The shards whose processes have ended, in words; empty where none has."""
        ailing = self._conditions().items()
        return "; ".join(f"{self._name(rank)}: {text}" for rank, text in ailing if text == GONE)

    @property
    def _linked(self) -> Transport:
        assert self._link is not None, "the group is not connected"
        return self._link

    def _name(self, rank: int) -> str:
        return f"shard {rank} (blocks {self.plan.stages[rank]})"


def _merged(facts: Sequence[Mapping[str, object]]) -> dict[str, object]:
    """What all stages say, or the list of what each says."""
    merged: dict[str, object] = {}
    for name, value in facts[0].items():
        values = [one[name] for one in facts]
        merged[name] = value if all(other == value for other in values) else values
    return merged
