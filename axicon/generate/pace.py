"""How much of a prompt is computed beside running streams, where prompts may be cut anywhere.

A prompt in large pieces is computed faster, and everybody else waits longer for their next token. With 2,048
tokens arriving beside 8 streams of SmolLM2-135M on one core, pieces of 256 take 161 to 430 ms, growing with
the context, while a step that only decodes takes 20; pieces of 64 take 51 to 119 ms and the prompt 17 % more.
So the size follows what steps really take, and a shared step stays below three times a plain one.
"""

from __future__ import annotations

FIRST, LEAST = 64, 16
LOW, HIGH = 1.8, 2.5
SHRINK, GROW = 0.7, 1.2
MEMORY = 0.8
"""Weight of the past in the mean time of a step that only decodes."""


class Pace:
    """`tokens` of prompts may go into a step that also decodes."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._exact = float(min(FIRST, most))
        self._decode_s = 0.0

    @property
    def tokens(self) -> int:
        return int(self._exact)

    def note(self, seconds: float, prompt_tokens: int, decode_rows: int) -> None:
        """A step took this long."""
        if prompt_tokens == 0:
            self._decode_s = MEMORY * self._decode_s + (1 - MEMORY) * seconds if self._decode_s else seconds
        elif decode_rows and self._decode_s and prompt_tokens >= self.tokens:
            ratio = seconds / self._decode_s
            factor = SHRINK if ratio > HIGH else GROW if ratio < LOW else 1.0
            self._exact = max(min(LEAST, self._most), min(self._most, self._exact * factor))
