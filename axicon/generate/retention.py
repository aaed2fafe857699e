"""What a request says about its cache, and what that comes to for its prompt."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from axicon.generate.eviction import KV_POLICIES, METHODS
from axicon.generate.request import KVSettings, Limits, RequestError
from axicon.protocols import LastRows
from axicon.step import RowPolicy

FULL = "full"
MOST_EVERY = 256


@dataclass(frozen=True, slots=True)
class Retention:
    """A bounded cache of one request. Counts are slots per head."""

    policy: str
    budget: int
    recent: int
    sinks: int
    evict_every: int
    once: bool
    most: int
    """Slots it may ever hold."""
    variant: int = 0

    @property
    def spare(self) -> int:
        """Slots it may hold beyond its budget between two evictions."""
        return 0 if self.once else self.evict_every

    def of_row(self, row: int) -> RowPolicy:
        """The same as a step says it."""
        method = METHODS.index(self.policy)
        return RowPolicy(row, method, self.budget, self.recent, self.sinks, self.spare, self.variant)

    def due(self, prompt: int, committed: int) -> bool:
        """Whether it is cut when so many tokens are committed; at the end of the prompt that happens by
        itself."""
        return not self.once and committed > prompt and committed % self.evict_every == 0


def check_kv(kv: KVSettings, limits: Limits, blocks: int) -> None:
    """Raises RequestError for settings that no prompt could be served with."""
    if kv.policy == FULL:
        return
    if kv.policy not in KV_POLICIES:
        known = ", ".join((FULL, *KV_POLICIES))
        raise RequestError(f"kv policy {kv.policy!r} is not known, known are {known}", "kv.policy")
    variants = KV_POLICIES[kv.policy].variants
    if kv.score is not None and kv.score not in variants:
        known = f"known are {', '.join(variants)}" if variants else "it has but one"
        raise RequestError(f"kv policy {kv.policy!r} has no score {kv.score!r}, {known}", "kv.score")
    if blocks == 0:
        raise RequestError("this deployment runs the model in stages, where every cache is full", "kv.policy")
    for name, number in (("budget", kv.budget), ("recent", kv.recent)):
        if number is not None and not (math.isfinite(number) and number >= 0):
            raise RequestError(f"kv {name} is {number}, not a share up to 1 nor a count", f"kv.{name}")
        if number is not None and number > 1 and number != int(number):
            raise RequestError(
                f"kv {name} is {number}, above 1 it counts slots: a whole number", f"kv.{name}"
            )
    if kv.budget == 0:
        raise RequestError("kv budget is 0, and something must be kept", "kv.budget")
    if 1 < kv.budget < limits.kv_floor:
        raise RequestError(
            f"kv budget is {kv.budget:g} slots, this deployment keeps at least {limits.kv_floor}", "kv.budget"
        )
    if not 0 <= kv.sinks <= 64:
        raise RequestError(f"kv sinks is {kv.sinks}, it must be from 0 to 64", "kv.sinks")
    if not 1 <= kv.evict_every <= MOST_EVERY:
        raise RequestError(
            f"kv evict_every is {kv.evict_every}, it must be from 1 to {MOST_EVERY}", "kv.evict_every"
        )


def retention(kv: KVSettings | None, prompt: int, output: int, floor: int) -> Retention | None:
    """What `kv` comes to for a prompt and at most `output` tokens behind it; None if nothing can ever go.

    A share is of the prompt, and never less than `floor`. Raises RequestError where recent slots and sinks do
    not fit into the budget.
    """
    if kv is None or kv.policy == FULL:
        return None
    method = KV_POLICIES[kv.policy]
    budget = max(floor, int(kv.budget * prompt)) if kv.budget <= 1 else int(kv.budget)
    if kv.recent is not None:
        recent = int(kv.recent * prompt) if kv.recent <= 1 and kv.budget <= 1 else int(kv.recent)
    else:
        recent = int(budget * method.recent_share)
        if isinstance(method.needs, LastRows):
            recent = min(max(recent, 1), method.needs.count)
    if kv.policy == "window":
        recent = budget - kv.sinks
    if recent < 0 or recent + kv.sinks > budget:
        raise RequestError(
            f"kv budget comes to {budget} slots, too few for {recent} recent ones and {kv.sinks} sinks",
            "kv.budget",
        )
    total = prompt + output
    if total <= budget:
        return None
    most = min(total, budget + (output if method.once else kv.evict_every))
    variant = 0 if kv.score is None else method.variants.index(kv.score)
    return Retention(kv.policy, budget, recent, kv.sinks, kv.evict_every, method.once, most, variant)


def kv_settings(value: KVSettings | Mapping[str, Any] | str | None) -> KVSettings | None:
    """Settings from a name or a mapping. Raises RequestError for a key that is not known."""
    if value is None or isinstance(value, KVSettings):
        return value
    if isinstance(value, str):
        return KVSettings(policy=value)
    known = [field.name for field in fields(KVSettings)]
    for name in value:
        if name not in known:
            raise RequestError(f"kv has no setting {name!r}, known are {', '.join(known)}", f"kv.{name}")
    return KVSettings(**value)
