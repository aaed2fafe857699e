"""The first parts of a finetuning run's log, where other settings have taken their steps (`start_from`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from axicon.errors import AxiconError
from axicon.finetune.loop import Earlier, schedule
from axicon.finetune.updates import UPDATE_RULES
from axicon.settings import Method


@dataclass(frozen=True)
class Part:
    """A first part of a log, as its first line has it."""

    facts: Mapping[str, Any]
    """`until`, a number of steps; `log`, the sha256 of the log it is from up to there; and what may vary."""
    part: Earlier

    @classmethod
    def of(cls, facts: Mapping[str, Any], rule: Method) -> Self:
        """`rule` is the run's own. Raises AxiconError for settings that it does not take."""
        try:
            settings = {key: value for key, value in facts["rule"].items() if key != "name"}
            until, kind = int(facts["until"]), facts["schedule"]
            factors = schedule(kind["kind"], kind["warmup"], kind.get("steps", 0))
        except (AttributeError, KeyError, TypeError, ValueError):
            raise AxiconError("the first line of the log is damaged: it has parts that say nothing") from None
        own = {key: value for key, value in (rule.model_extra or {}).items() if key not in settings}
        made = Method(method=rule.method, **own, **settings).build(UPDATE_RULES, "rule")
        return cls(facts, Earlier(until, made, factors))
