"""Tokenised examples, as batches to train on and as all of them in turn to evaluate on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from axicon.data.batch import UNSCORED, Batch
from axicon.errors import AxiconError


class Tokenizer(Protocol):
    """A fast tokenizer of transformers."""

    def __call__(self, text: Any, **options: Any) -> Any: ...


class Row(NamedTuple):
    """Tokens that go through the model as one sequence."""

    tokens: tuple[int, ...]
    scored: tuple[bool, ...]
    """Of each token, whether it is scored. The first is not: nothing predicts it."""


class Example(NamedTuple):
    rows: tuple[Row, ...]
    answer: int | None = None


@dataclass(frozen=True, eq=False)
class Tokenised:
    """A `Source` and an `Examples`: `batch` examples per step, shuffled anew for every pass over them.

    Batches go on over the end of a pass, so every example comes up once before any comes up again.
    """

    examples: Sequence[Example]
    batch_size: int = 16
    seed: int = 0
    choices: tuple[int, ...] | None = None
    """Tokens that an answer may be."""
    shortened: int = 0
    """Examples whose text was cut to fit."""
    _orders: dict[int, list[int]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.examples:
            raise AxiconError("there are no examples")
        if self.batch_size < 1:
            raise AxiconError(f"batch={self.batch_size}: a step needs at least one example")

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def tokens(self) -> int:
        """Of all rows together."""
        return sum(len(row.tokens) for example in self.examples for row in example.rows)

    def batch(self, step: int) -> Batch:
        if step < 0:
            raise ValueError(f"step {step}")
        places = range(step * self.batch_size, (step + 1) * self.batch_size)
        passes = ((place // len(self), place % len(self)) for place in places)
        return collate([self.examples[self._order(turn)[i]] for turn, i in passes], self.choices)

    def batches(self) -> Iterator[Batch]:
        for start in range(0, len(self), self.batch_size):
            yield collate(self.examples[start : start + self.batch_size], self.choices)

    def _order(self, turn: int) -> list[int]:
        """The order of one pass, from a seed of its own so that any can be asked for alone."""
        if turn not in self._orders:
            digest = hashlib.sha256(f"{self.seed} {turn}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
            if len(self._orders) > 1:
                self._orders.clear()
            self._orders[turn] = torch.randperm(len(self), generator=generator).tolist()
        return self._orders[turn]


def collate(examples: Sequence[Example], choices: Sequence[int] | None = None) -> Batch:
    """Examples of equally many rows as one batch, padded to the longest row."""
    rows = [row for example in examples for row in example.rows]
    length = max(len(row.tokens) for row in rows)
    input_ids = torch.zeros(len(rows), length, dtype=torch.int64)
    scored = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, row in enumerate(rows):
        input_ids[i, : len(row.tokens)] = torch.tensor(row.tokens)
        scored[i, : len(row.tokens)] = torch.tensor(row.scored)
    lengths = torch.tensor([len(row.tokens) for row in rows])
    answers = [example.answer for example in examples]
    return Batch(
        input_ids=input_ids,
        mask=torch.arange(length) < lengths[:, None],
        labels=torch.where(scored, input_ids, UNSCORED),
        choices=None if choices is None else _long(choices),
        answer=None if answers[0] is None else _long(answers),
        options=len(examples[0].rows),
    )


def _long(numbers: Sequence[Any]) -> Tensor:
    return torch.tensor(list(numbers), dtype=torch.int64)
