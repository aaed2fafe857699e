"""Notices that compute threads wait for each other.

Another busy process on a core makes a step with two threads several times slower now and then (measured: 13
to 98 ms, 99th percentile 484 ms), while one thread does not notice. So when steps spread that far, half the
threads are better.
"""

from __future__ import annotations

WINDOW = 256
"""Steps that are looked at together: enough for the 99th percentile to be more than one hiccup."""
SPREAD = 4.0


class StepWatchdog:
    """Fed with the wall times of steps that only decode."""

    def __init__(self) -> None:
        self._seconds: list[float] = []

    def too_uneven(self, seconds: float) -> bool:
        """Whether the 99th percentile of a window that just filled is over four times its median."""
        self._seconds.append(seconds)
        if len(self._seconds) < WINDOW:
            return False
        ordered = sorted(self._seconds)
        self._seconds.clear()
        return ordered[WINDOW * 99 // 100] > SPREAD * ordered[WINDOW // 2]
