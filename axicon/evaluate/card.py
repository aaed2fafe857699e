"""The quality card of a compressed model: figures beside those of the dense model it was made from.

A row is one figure of both, and what it rests on; a figure that rests on something else never stands beside
it. What was not measured is null and says why. The judgement is made of the rows, in plain words.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Kind = Literal["dense", "compressed"]
KINDS: tuple[Kind, Kind] = ("dense", "compressed")
Better = Literal["higher", "lower"]

NOT_MEASURED = "not measured"
ZERO_SHOT = ("lambada", "sst2", "rte", "boolq", "copa", "cb")
"""The tasks of a card; their files are those of `axicon/evaluate/tasks`."""
PARTS = ("embedding", "blocks", "head")
STREAMS = ("1", "8")

NOISE = 0.05
"""Speeds nearer than this are the same: two runs on one machine differ as much."""
WORSE, MUCH_WORSE = 1.001, 1.1
"""Of perplexity."""


class Row(BaseModel):
    """One figure of both models."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)
    dense: float | None = None
    compressed: float | None = None
    better: Better | None = None
    basis: dict[str, Any] = Field(default_factory=dict)
    """What the two share, and what another figure must share to be compared."""
    stderr: dict[Kind, float] = Field(default_factory=dict)
    reason: dict[Kind, str] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _reasons(cls, values: Any) -> Any:
        """A reason for every null and for nothing else."""
        if not isinstance(values, Mapping) or not isinstance(values.get("reason") or {}, Mapping):
            return values  # its type is refused next
        given = values.get("reason") or {}
        reasons = {kind: given.get(kind, NOT_MEASURED) for kind in KINDS if values.get(kind) is None}
        return {**values, "reason": reasons}

    def get(self, kind: Kind) -> float | None:
        return self.dense if kind == "dense" else self.compressed

    def with_value(
        self,
        kind: Kind,
        value: float | None,
        basis: Mapping[str, Any],
        *,
        reason: str = NOT_MEASURED,
        stderr: float | None = None,
        better: Better | None = None,
    ) -> Self:
        """With one figure, or why it is null. The other one stays if it rests on the same."""
        other: Kind = "compressed" if kind == "dense" else "dense"
        new: dict[str, Any] = {kind: value, "basis": dict(basis), "better": better or self.better}
        new["reason"] = {kind: reason}
        new["stderr"] = {} if stderr is None else {kind: stderr}
        if new["basis"] == self.basis or self.get(other) is None:
            new[other] = self.get(other)
            new["reason"] |= {k: why for k, why in self.reason.items() if k == other}
            new["stderr"] |= {k: error for k, error in self.stderr.items() if k == other}
        else:
            new["reason"][other] = "measured in another way before"
        return type(self).model_validate(new)

    def as_json(self, name: str) -> dict[str, Any]:
        """Without what is empty, but always the two values; with the command that measures a null."""
        content = self.model_dump(mode="json")
        shown = {key: value for key, value in content.items() if key in KINDS or value not in ({}, None)}
        return shown | ({"command": command_for(name)} if self.lacks(name) else {})

    def lacks(self, name: str) -> bool:
        """Whether something is null that can be measured. Dense agrees with itself: nothing to measure."""
        return self.compressed is None or (self.dense is None and not name.startswith("agreement/"))

    @property
    def ratio(self) -> float | None:
        """Compressed / dense, where there are both."""
        return self.compressed / self.dense if self.dense and self.compressed is not None else None


Rows = Mapping[str, Row]


def expected() -> dict[str, Row]:
    """The rows that every card has, with nothing measured, in the order of a card."""
    names = [
        "bytes", *(f"bytes/{part}" for part in PARTS), "perplexity", *(f"{task}/acc" for task in ZERO_SHOT),
        "agreement/prefix", "agreement/equal", *(f"tokens_per_s/{streams}" for streams in STREAMS),
        "first_token_ms", "peak_memory", "outliers/max_inf_norm", "outliers/kurtosis",
    ]  # fmt: skip
    higher = ("agreement/", "tokens_per_s/", *(f"{task}/" for task in ZERO_SHOT))
    return {name: Row(better="higher" if name.startswith(higher) else "lower") for name in names}


def command_for(name: str) -> str:
    """What measures a row; DIR is the directory of the card."""
    if name == "perplexity":
        return "axicon card DIR text=FILE"
    task = name.partition("/")[0]
    if task in ZERO_SHOT:
        return "axicon card DIR data=FOLDER"
    return "axicon card DIR" if name in expected() else f"axicon card DIR data=FOLDER tasks={task}"


def in_order(rows: Rows) -> dict[str, Row]:
    """As `expected` has them, further metrics of a task behind its first."""
    order = list(expected())
    last_task = max(place for place, name in enumerate(order) if name.endswith("/acc"))

    def place(name: str) -> tuple[int, int]:
        if name in order:
            return order.index(name), 0
        task = name.partition("/")[0]
        first = next((i for i, known in enumerate(order) if known.partition("/")[0] == task), last_task)
        return first, 1

    return {name: rows[name] for name in sorted(rows, key=place)}


def judgement(rows: Rows) -> str:
    """What the figures say, in one or two sentences; says so where too little was measured to judge."""
    said = list(_said(rows))
    if not said:
        return "Nothing was measured yet that the dense model could be compared by."
    *first, last = said
    facts = f"It {', '.join(first)} and {last}." if first else f"It {last}."
    return " ".join(filter(None, [facts, _verdict(rows)]))


def _said(rows: Rows) -> Iterator[str]:
    """Parts of one sentence about "it"."""
    if (share := _ratio(rows, "bytes")) is not None:
        yield f"takes {share:.0%} of the dense model's bytes".replace("%", " %")
    speeds = {streams: _ratio(rows, f"tokens_per_s/{streams}") for streams in STREAMS}
    known = {streams: ratio for streams, ratio in speeds.items() if ratio is not None}
    if known:
        first, *rest = [f"{ratio:.2f} times" for ratio in known.values()]
        words = [f"{first} the dense speed", *rest]
        with_streams = [f"{one} with {_streams(s)}" for one, s in zip(words, known, strict=True)]
        yield f"decodes at {' and '.join(with_streams)}"
    if (ratio := _ratio(rows, "perplexity")) is not None:
        change = 100 * (ratio - 1)
        yield f"has a perplexity {abs(change):.1f} % {'higher' if change > 0 else 'lower'}"
    if (mean := _accuracy(rows)) is not None:
        lost, error = mean
        points = f"{abs(100 * lost):.1f} points {'lower' if lost > 0 else 'higher'}"
        within = abs(lost) <= 2 * error  # as `is_worse` has it
        yield "has the same accuracy within its noise" if within else f"has an accuracy {points}"
    row = rows.get("agreement/prefix")
    if row is not None and row.compressed is not None:
        yield f"says the same for {row.compressed:.0%} of the tokens".replace("%", " %")


def _streams(number: str) -> str:
    return "1 stream" if number == "1" else f"{number} streams"


def _ratio(rows: Rows, name: str) -> float | None:
    return rows[name].ratio if name in rows else None


def _accuracy(rows: Rows) -> tuple[float, float] | None:
    """Mean loss of accuracy over the tasks that both did, and its standard error."""
    both = [
        row
        for name, row in rows.items()
        if name.endswith("/acc") and row.dense is not None and row.compressed is not None
    ]
    if not both:
        return None
    lost = sum((row.dense or 0.0) - (row.compressed or 0.0) for row in both) / len(both)
    return lost, sum(sum(e**2 for e in row.stderr.values()) for row in both) ** 0.5 / len(both)


def _verdict(rows: Rows) -> str:
    """Where dense is the better choice, or may be, that in plain words; else nothing."""
    size = _ratio(rows, "bytes")
    speeds = [r for s in STREAMS if (r := _ratio(rows, f"tokens_per_s/{s}")) is not None]
    larger, smaller = size is not None and size >= 1, size is not None and size < 1
    slower = any(r < 1 - NOISE for r in speeds) and not any(r > 1 + NOISE for r in speeds)
    faster = any(r > 1 + NOISE for r in speeds) and not any(r < 1 - NOISE for r in speeds)
    worse = is_worse(rows)
    faults = [word for word, true in (("larger", larger), ("slower", slower), ("worse", worse)) if true]
    gains = [word for word, true in (("its size", smaller), ("its speed", faster)) if true]
    if larger or (slower and worse):
        named = ", ".join(faults[:-1]) + " and " + faults[-1] if len(faults) > 1 else faults[0]
        rest = f"only {gains[0]} speaks for it" if gains else "nothing is gained, use the dense model"
        return f"It is {named} than the dense model: {rest}."
    said = ["It is slower than the dense model."] if slower else []
    ratio = _ratio(rows, "perplexity")
    if ratio is not None and ratio > MUCH_WORSE:
        said.append("Much of the dense model's quality is lost.")
    if worse is None:
        said.append("How much quality it loses was not measured.")
    return " ".join(said)


def is_worse(rows: Rows) -> bool | None:
    """Whether quality is lower: by perplexity, else by accuracy beyond two standard errors; None if neither
    is known.
    """
    if (ratio := _ratio(rows, "perplexity")) is not None:
        return ratio > WORSE
    if (mean := _accuracy(rows)) is not None:
        lost, error = mean
        return lost > 2 * error
    return None
