"""The loop of a run: batches in, steps out. A step's numbers are kept before the parameters change."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeGuard

import torch
from torch import nn

from axicon.data.batch import Source
from axicon.errors import AxiconError, RunFailed
from axicon.finetune.checkpoint import Stateful
from axicon.finetune.log import Log
from axicon.protocols import Mean, Moment, Objective, ScalarRule, Scalars, UpdateRule

Schedule = Callable[[int], float]
"""From a step to a factor of the learning rate."""
After = Callable[[int, float | None], None]
"""Called behind a step with the number of steps taken, and its loss; None where it was skipped."""
PATIENCE = 20
"""Steps in a row that may be skipped."""


class Checkpoints(Protocol):
    """Where a rule that is not scalar keeps parameters and its own state."""

    def restore(self, model: nn.Module, rule: UpdateRule) -> int:
        """Put back the newest; how many steps had been taken. 0 where there is none."""
        ...

    def keep(self, model: nn.Module, rule: UpdateRule, steps: int, last: bool) -> None:
        """Called behind every step; keeps what it wants, and the last one."""
        ...


@dataclass(frozen=True)
class Earlier:
    """A first part of a log, whose steps were taken by other settings than those behind it."""

    until: int
    """Steps that had been taken at its end, those before it among them."""
    rule: UpdateRule
    """The same rule as that of the run, with the settings of this part."""
    schedule: Schedule


@dataclass(frozen=True, kw_only=True)
class Run:
    model: nn.Module
    rule: UpdateRule
    objective: Objective
    source: Source
    mean: Mean
    log: Log
    steps: int
    seed: int
    schedule: Schedule = lambda step: 1.0
    checkpoints: Checkpoints | None = None
    """Not looked at for scalar rules: their log is enough."""
    earlier: Sequence[Earlier] = ()
    """The first parts of the log, where another run has taken them."""


def train(
    run: Run, after: After = lambda steps, loss: None, before: Callable[[int], None] = lambda steps: None
) -> None:
    """Take the steps that the log does not have, after those it has. `before` is called with the number of
    these, when the model is where they led.

    Raises RunFailed when too many steps in a row have no finite loss.
    """
    model, rule, log = run.model, run.rule, run.log
    if is_scalar(rule):
        retrace(model, rule, log.steps[: run.steps], run.seed, run.schedule, run.earlier)
    else:
        rule.prepare(model)
    if log.steps and not is_scalar(rule):
        kept = 0 if run.checkpoints is None else run.checkpoints.restore(model, rule)
        if kept > run.steps:
            raise AxiconError(
                f"steps={run.steps}: {kept} were taken already, and a run with gradients has no way back; "
                f"give steps={kept} or more, or another out="
            )
        log.cut(kept)
    before(min(len(log.steps), run.steps))
    for step in range(len(log.steps), run.steps):
        at = Moment(step, run.seed, run.schedule(step))
        batch = run.source.batch(step)
        if is_scalar(rule):
            scalars = finite(rule.measure(model, run.objective, batch, run.mean, at))
            log.append(scalars)
            if scalars is not None:
                rule.apply(model, scalars, at)
        else:
            scalars = finite({"loss": rule.step(model, run.objective, batch, run.mean, at)})
            log.append(scalars)
            if run.checkpoints is not None:
                run.checkpoints.keep(model, rule, step + 1, last=step + 1 == run.steps)
        _check_patience(log.steps)
        after(step + 1, loss_of(scalars))
    rule.finish(model)


def retrace(
    model: nn.Module,
    rule: ScalarRule,
    steps: Sequence[Scalars | None],
    seed: int,
    schedule: Schedule,
    earlier: Sequence[Earlier] = (),
) -> None:
    """Prepare `rule`, and bring model and rule to where the steps of a log led: each part of them by its own
    settings, with what a rule keeps between steps handed on from part to part.
    """
    begun, state = 0, None
    for part in (*earlier, Earlier(len(steps), rule, schedule)):
        assert is_scalar(part.rule)
        part.rule.prepare(model)
        if state is not None and isinstance(part.rule, Stateful):
            part.rule.restore(state)
        replay(model, part.rule, steps[begun : part.until], seed, part.schedule, begun)
        if part.rule is rule:
            return
        begun, state = part.until, part.rule.state() if isinstance(part.rule, Stateful) else None
        part.rule.finish(model)


def replay(
    model: nn.Module,
    rule: ScalarRule,
    steps: Sequence[Scalars | None],
    seed: int,
    schedule: Schedule,
    begun: int = 0,
) -> None:
    """Apply steps of a log, the first of them being `begun`, to the parameters before it, `rule` prepared."""
    for step, scalars in enumerate(steps, begun):
        if scalars is not None:
            rule.apply(model, scalars, Moment(step, seed, schedule(step)))


def is_scalar(rule: UpdateRule) -> TypeGuard[ScalarRule]:
    return hasattr(rule, "measure") and hasattr(rule, "apply")


def finite(scalars: Scalars) -> Scalars | None:
    """None where some number is not finite: such a step is skipped."""
    for value in scalars.values():
        if not all(map(math.isfinite, [value] if isinstance(value, float | int) else value)):
            return None
    return scalars


def loss_of(scalars: Scalars | None) -> float | None:
    loss = None if scalars is None else scalars["loss"]
    return loss if isinstance(loss, float | int) else None


def _check_patience(steps: Sequence[Scalars | None]) -> None:
    if len(steps) >= PATIENCE and all(one is None for one in steps[-PATIENCE:]):
        raise RunFailed(
            f"no finite loss in {PATIENCE} steps: smaller steps may keep the model whole (rule.lr, and "
            "rule.eps of a zeroth-order rule), or dtype=float32 instead of bfloat16; that is another run, "
            "with another out="
        )


def schedule(kind: str, warmup: int, steps: int) -> Schedule:
    """Factors of the learning rate: `constant`, or `linear` and `cosine` down to 0 at `steps`, each after a
    linear rise over `warmup` steps.
    """

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        passed = (step - warmup) / max(1, steps - warmup)
        if kind == "linear":
            return 1 - passed
        return (1 + math.cos(math.pi * passed)) / 2 if kind == "cosine" else 1.0

    return factor


@torch.no_grad()
def digest(parameters: Mapping[str, torch.Tensor]) -> str:
    """sha256 over names, shapes and bytes, in hex."""
    total = hashlib.sha256()
    for name in sorted(parameters):
        value = parameters[name].detach().cpu().contiguous()
        total.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        total.update(value.view(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
