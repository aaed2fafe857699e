"""Prompt lookup: text that repeats itself is continued as it went on the last time.

Saxena 2023, "Prompt lookup decoding". The longest end of the text, up to `width` tokens, that was there
before is looked up, and what followed its most recent place is the guess. Differs from it: the longer the
match, the longer the guess, 1, 2, 4, 8 ... tokens up to `depth`, as one token that was there before is
followed by the same one in a case of four, and five in a row in nine of ten (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar


@dataclass(frozen=True, kw_only=True)
class Lookup:
    width: int = 5
    """Tokens of the longest match."""
    depth: int = 12
    needs_model: ClassVar[bool] = False
    rule: ClassVar[str] = "without_replacement"
    index: Index = field(default_factory=lambda: Index(), init=False, compare=False, repr=False)

    @property
    def nodes(self) -> int:
        return self.depth

    def guess(self, tokens: Sequence[int]) -> Sequence[int]:
        """Looks at the tokens that came since the last call: one object serves one text that only grows."""
        place, length = self.index.find(tokens, self.width)
        most = min(self.depth, 1 << max(0, length - 1))
        return tokens[place : place + most] if length else ()


class Index:
    """Where each run of tokens ended last."""

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}
        """A run of tokens -> the place behind it."""
        self._read = 1

    def find(self, tokens: Sequence[int], longest: int) -> tuple[int, int]:
        """(place, length): the longest run that ends the text and was there before, and what follows it."""
        after = self._after
        # The run that ends the text itself is not among them: nothing follows it yet.
        for stop in range(self._read, len(tokens)):
            for length in range(1, min(longest, stop) + 1):
                after[tuple(tokens[stop - length : stop])] = stop
        self._read = max(self._read, len(tokens))
        for length in range(min(longest, len(tokens)), 0, -1):
            place = after.get(tuple(tokens[len(tokens) - length :]))
            if place is not None:
                return place, length
        return 0, 0
