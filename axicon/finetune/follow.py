"""A model that keeps up with a run in another process, from the run's log alone; and the adapters of a run
without the model that they stand beside.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from axicon.errors import AxiconError
from axicon.finetune.checkpoint import Stateful
from axicon.finetune.log import EARLIER, NAME, Tail
from axicon.finetune.loop import Earlier, Schedule, is_scalar, schedule
from axicon.finetune.updates import UPDATE_RULES
from axicon.model.adapterfile import Adapter, taken_from
from axicon.model.adapters import SCHEMES, Lora
from axicon.model.decoder import Decoder
from axicon.model.shape import ModelShape
from axicon.protocols import Moment, ScalarRule, Scalars


class Follower:
    """`Follower(Tail(path), model, rule, seed=...).catch_up()`: as often as one likes; each step is applied
    once.

    `model` is what the run began from, with what trains installed, and `rule` has the run's settings.
    """

    def __init__(
        self,
        log: Tail,
        model: nn.Module,
        rule: ScalarRule,
        *,
        seed: int,
        schedule: Schedule = lambda step: 1.0,
        earlier: Sequence[Earlier] = (),
    ) -> None:
        self.log, self.model, self.seed = log, model, seed
        self.earlier = earlier
        """The first parts of the log, where another run has taken them."""
        self.steps = 0
        """Applied so far."""
        self.broken: AxiconError | None = None
        """Why no step is applied any more."""
        self._waiting: deque[tuple[Scalars | None, bytes]] = deque()
        self._applied = hashlib.sha256()
        self._parts = deque([*earlier, Earlier(sys.maxsize, rule, schedule)])
        self._parts[0].rule.prepare(model)

    @property
    def behind(self) -> int:
        """Steps that were read and not applied."""
        return len(self._waiting)

    @property
    def digest(self) -> str:
        """sha256, in hex, over the log's first line and those of the steps applied: what decides the
        parameters."""
        return hashlib.sha256(self.log.first + self._applied.digest()).hexdigest()

    def look(self) -> int:
        """Read what the log has got since the last look; steps behind. Touches no tensor.

        Raises AxiconError as `Tail.look`, with all as it was, and for a log with other parts than `earlier`.
        """
        found = self.log.look()
        if [one["until"] for one in self.log.header.get(EARLIER, ())] != [one.until for one in self.earlier]:
            raise AxiconError(
                f"{self.log.path} begins with steps of another run, by other settings; axicon replay has them"
            )
        self._waiting += found
        return self.behind

    def advance(self, seconds: float = math.inf) -> int:
        """Apply steps that were read, until there are none or so much time has passed; how many those were.

        Raises AxiconError, now and ever after, for a step that is none of this rule.
        """
        before, until = self.steps, time.perf_counter() + seconds
        while self._waiting and (self.steps == before or time.perf_counter() < until):
            if self.broken is not None:
                raise self.broken
            scalars, line = self._waiting[0]
            rule, schedule = self._settings()
            try:
                if scalars is not None:
                    rule.apply(self.model, scalars, Moment(self.steps, self.seed, schedule(self.steps)))
            except (KeyError, ValueError, TypeError, AssertionError):
                self.broken = AxiconError(
                    f"{self.log.path}: step {self.steps} is none of {type(rule).__name__}; the log is damaged"
                )
                raise self.broken from None
            self._waiting.popleft()
            self._applied.update(line)
            self.steps += 1
        return self.steps - before

    def _settings(self) -> tuple[ScalarRule, Schedule]:
        """What the next step is taken by. What a rule keeps is handed on from part to part."""
        while self.steps >= self._parts[0].until:
            left, part = self._parts.popleft(), self._parts[0]
            state = left.rule.state() if isinstance(left.rule, Stateful) else None
            left.rule.finish(self.model)
            part.rule.prepare(self.model)
            if state is not None and isinstance(part.rule, Stateful):
                part.rule.restore(state)
        part = self._parts[0]
        assert is_scalar(part.rule)
        return part.rule, part.schedule

    def catch_up(self) -> int:
        """Apply what the log has and this model has not; how many steps that were. Raises as both."""
        self.look()
        return self.advance()


@dataclass(frozen=True)
class LoraRun:
    """A zeroth-order run of low-rank adapters: all that they depend on is in its log."""

    log: Tail
    """Of which the first line was read."""
    base: str
    """Digest of the model that it began from."""
    scheme: Lora
    rule: ScalarRule
    seed: int
    schedule: Schedule
    earlier: tuple[Earlier, ...]
    """Its first parts, which another run has taken."""

    @classmethod
    def of(cls, folder: Path) -> Self:
        """Raises AxiconError for the folder of another run, or of none, and says what to do instead."""
        path = folder / NAME
        if not path.is_file():
            raise AxiconError(f"{folder}: no run of axicon finetune lies there ({NAME} is missing)")
        if not path.resolve().is_relative_to(folder.resolve()):
            raise AxiconError(f"{path}: a link that leads out of the folder; copy the file into it")
        log = Tail(path)
        log.look(0)
        facts = log.header
        if not facts:
            raise AxiconError(f"{path}: only begun; ask again when the run has taken a step")
        scheme = _built(path, "scheme", facts.get("scheme"), SCHEMES)
        if type(scheme) is not Lora:
            raise AxiconError(
                f"{path}: trains by the scheme {type(scheme).__name__}, and only low-rank adapters "
                "(scheme=lora) can stand beside a model that is served; serve its result instead"
            )
        rule, factors = _taken_by(path, facts)
        base, seed, parts = facts.get("base"), facts.get("seed"), facts.get(EARLIER, [])
        if not isinstance(base, str) or type(seed) is not int or not isinstance(parts, list):
            raise _foreign(path)
        earlier = []
        for one in parts:
            if not isinstance(one, dict) or type(one.get("until")) is not int:
                raise _foreign(path)
            earlier.append(Earlier(one["until"], *_taken_by(path, one)))
        return cls(log, base, scheme, rule, seed, factors, tuple(earlier))

    @property
    def digest(self) -> str:
        """sha256 of what the run is, in hex; the same however far it got."""
        return hashlib.sha256(self.log.first).hexdigest()

    def follower(self, shape: ModelShape) -> Follower:
        """One that holds the adapters alone, as they are before the first step, beside products without
        values. Raises AxiconError for a model that has no such products.
        """
        with torch.device("meta"):
            skeleton = Decoder(shape)
        self.scheme.install(skeleton, Moment(0, self.seed).key)
        return Follower(
            self.log, skeleton, self.rule, seed=self.seed, schedule=self.schedule, earlier=self.earlier
        )


def adapters_of(follower: Follower, base: str) -> Adapter:
    """What a follower of a `LoraRun` has come to, as a copy. Raises AxiconError where that is not finite."""
    assert isinstance(follower.model, Decoder)
    return taken_from(follower.model, follower.digest, base)


def _foreign(path: Path) -> AxiconError:
    return AxiconError(f"{path}: its first line is not one of axicon finetune")


def _taken_by(path: Path, facts: Mapping[str, Any]) -> tuple[ScalarRule, Schedule]:
    """Rule and schedule of a run, or of a part of one."""
    rule = _built(path, "rule", facts.get("rule"), UPDATE_RULES)
    if not is_scalar(rule):
        raise AxiconError(
            f"{path}: {type(rule).__name__} moves by gradients, which a log does not have; serve its result "
            "when it has ended, or train by a zeroth-order rule"
        )
    try:
        return rule, schedule(**{"steps": 0, **facts["schedule"]})
    except (KeyError, TypeError):
        raise _foreign(path) from None


def _built(path: Path, what: str, said: Any, table: Mapping[str, type[Any]]) -> Any:
    """A method of `table` from what a log says of it, where it has the name of its class."""
    if not isinstance(said, dict) or not isinstance(said.get("name"), str):
        raise _foreign(path)
    cls = next((one for one in table.values() if one.__name__ == said["name"]), None)
    settings = {key: value for key, value in said.items() if key != "name"}
    if cls is None or settings.keys() - {field.name for field in dataclasses.fields(cls)}:
        raise AxiconError(f"{path}: the {what} {said['name']} is not as it is known here; update axicon")
    try:
        return TypeAdapter(cls).validate_python(settings)
    except ValidationError as error:
        wrong = error.errors(include_url=False)[0]
        raise AxiconError(f"{path}: {what}.{'.'.join(map(str, wrong['loc']))}: {wrong['msg']}") from None
