"""Token ids to text, one token at a time: never half a character, never a part of a stop string.

Decoding is not a concatenation: a character may be split over tokens, and some tokenizers drop the first
space of what they decode. So the text of a token is the difference between decoding a short window with and
without it, and a window that ends inside a character waits for more tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
LONGEST_CHARACTER = 4
"""Bytes of a UTF-8 character, so at most as many tokens."""
CONTEXT, WINDOW, LONGEST_WINDOW = 6, 24, 96
"""A window that has grown to WINDOW tokens is cut to its last CONTEXT ones, or a few more, so that it begins
with a whole character; broken bytes, which have no such place, are cut anywhere at LONGEST_WINDOW.
"""


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    @property
    def all_special_ids(self) -> Sequence[int]: ...

    def decode(
        self, token_ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool
    ) -> Any: ...


class Detokenizer:
    """Text of a growing list of tokens. The pieces, joined, are the decoding of the whole list."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids)
        self._window: list[int] = []
        self._seen = ""
        """What the window's tokens that were handed out decode to."""
        self._pending = 0
        """Tokens at the window's end that were not handed out."""
        self.length = 0
        """Characters handed out so far."""

    def add(self, token: int) -> str:
        """The text that became certain with this token: often a word, sometimes nothing."""
        if token in self._special:
            return ""
        self._window.append(token)
        self._pending += 1
        text = self._decode(self._window)
        if not text.endswith(UNFINISHED):
            return self._take(text, 0)
        if self._pending > LONGEST_CHARACTER:
            # Broken bytes, not an unfinished character: hand out what lies before a clean split.
            for tail in range(1, LONGEST_CHARACTER + 1):
                head = self._decode(self._window[:-tail])
                if head + self._decode(self._window[-tail:]) == text:
                    return self._take(head, tail)
        return ""

    def finish(self) -> str:
        """What is left, broken characters as U+FFFD."""
        return self._take(self._decode(self._window), 0) if self._pending else ""

    def _take(self, text: str, tail: int) -> str:
        """Hand out all but the last `tail` tokens, which make the window decode to `text`."""
        new = text[len(self._seen) :]
        self._seen, self._pending = text, tail
        self.length += len(new)
        if len(self._window) > WINDOW:
            self._shorten(tail)
        return new

    def _shorten(self, tail: int) -> None:
        seen = self._window[: len(self._window) - tail]
        for size in range(CONTEXT, CONTEXT + LONGEST_CHARACTER):
            text = self._decode(seen[-size:])
            if UNFINISHED not in text or len(self._window) > LONGEST_WINDOW:
                self._window = self._window[-size - tail :]
                self._seen = text
                return

    def _decode(self, tokens: list[int]) -> str:
        return str(
            self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )


class StopText:
    """Cuts text at the stop string that is complete first and holds back what could still become one.

    Of two that end together the longer one counts. So the result does not depend on how the text is split.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max((len(stop) for stop in self._stops), default=0)
        self._held = ""

    def add(self, text: str) -> tuple[str, str | None]:
        """(text that may be sent, the stop string that was met). After a stop nothing more comes."""
        if not self._stops:
            return text, None
        self._held += text
        places = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if places:
            at, stop = min(places, key=lambda place: (place[0] + len(place[1]), place[0]))
            text, self._held = self._held[:at], ""
            return text, stop
        keep = self._possible_stop()
        text = self._held[: len(self._held) - keep]
        self._held = self._held[len(text) :]
        return text, None

    def finish(self) -> str:
        """What was held back and did not become a stop string."""
        text, self._held = self._held, ""
        return text

    def _possible_stop(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        for length in range(min(self._longest - 1, len(self._held)), 0, -1):
            end = self._held[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
