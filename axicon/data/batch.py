"""What one step of finetuning computes on: token rows, which of their tokens are scored, and the answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

UNSCORED = -100
"""Label of a token that is not scored, as elsewhere in the field."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Batch:
    """B examples in R = B * `options` token rows, those of one example next to each other.

    `labels[r, t]` is `input_ids[r, t]` where that token is scored, by the logits of position t - 1, and -100
    elsewhere. Two kinds of choice: an answer that is one of a few tokens has `choices` and one row; an answer
    that is one of a few texts has a row for each, in the order in which `answer` counts them.
    """

    input_ids: Tensor
    """int64 (R, T), padded on the right."""
    mask: Tensor
    """bool (R, T), False where padded."""
    labels: Tensor
    """int64 (R, T)."""
    choices: Tensor | None = None
    """int64 (C,): the tokens that an answer may begin with; None where it is no such choice."""
    answer: Tensor | None = None
    """int64 (B,): index into `choices`, or into the rows of the example; None where nothing is chosen."""
    options: int = 1
    """Rows of one example."""

    def __post_init__(self) -> None:
        rows, length = self.input_ids.shape
        if self.mask.shape != (rows, length) or self.labels.shape != (rows, length):
            raise ValueError(
                f"tokens {rows} x {length}, mask {list(self.mask.shape)}, labels {list(self.labels.shape)}"
            )
        if self.options < 1 or rows % self.options:
            raise ValueError(f"{rows} rows are no whole number of examples of {self.options}")
        if self.answer is not None and self.answer.shape != (len(self),):
            raise ValueError(f"{len(self)} examples, {list(self.answer.shape)} answers")

    def __len__(self) -> int:
        """B, the number of examples."""
        return int(self.input_ids.shape[0]) // self.options

    @property
    def scored(self) -> int:
        """Number of scored tokens."""
        return int((self.labels != UNSCORED).sum())

    def examples(self, start: int, stop: int) -> Batch:
        """Examples start .. stop - 1, in rows of the same length."""
        rows = slice(start * self.options, stop * self.options)
        return replace(
            self,
            input_ids=self.input_ids[rows],
            mask=self.mask[rows],
            labels=self.labels[rows],
            answer=None if self.answer is None else self.answer[start:stop],
        )

    def shards(self, count: int) -> Iterator[Batch]:
        """`count` parts of equal size, the same whoever computes them.

        Raises ValueError where they would not be equal.
        """
        if count < 1 or len(self) % count:
            raise ValueError(f"{len(self)} examples do not divide among {count} shards")
        size = len(self) // count
        return (self.examples(i * size, (i + 1) * size) for i in range(count))

    def to(self, device: torch.device) -> Batch:
        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        return replace(
            self,
            input_ids=self.input_ids.to(device),
            mask=self.mask.to(device),
            labels=self.labels.to(device),
            choices=moved(self.choices),
            answer=moved(self.answer),
        )


class Source(Protocol):
    """Batches to train on. Every step can be asked for at any time, and again."""

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0. A pure function of the source's settings and the step."""
        ...


class Examples(Protocol):
    """Batches to evaluate on: every example once, in the order of the file."""

    def __len__(self) -> int:
        """Number of examples."""
        ...

    def batches(self) -> Iterator[Batch]: ...
