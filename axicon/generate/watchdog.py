"""How many threads compute a step, by what steps and neighbours do.

Another busy process on a core makes a step with two threads several times slower now and then (measured on
two cores: 13 to 98 ms, 99th percentile 484 ms), while one thread does not notice. So when steps spread that
far, half the threads are better, for a while: nobody says when the other process ends.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

WINDOW = 64
"""Steps that are looked at together."""
FIRST_LOOK = 16
"""Steps that are enough to tell, so that not many are slow before something is done."""
SPREAD, HICCUPS = 3.0, 2
"""Steps are uneven when more than two of a window take over three times its median."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 30.0, 600.0
"""When more threads are tried again; twice as late whenever that was in vain."""


class StepWatchdog:
    """Fed with the wall times of steps that only decode.

    Only steps of about as much work are compared, which is up to twice as much: one of sixteen nodes takes
    over three times as long as one of a single node, and nobody is busy.
    """

    def __init__(self) -> None:
        self._seconds: dict[int, deque[float]] = {}
        """By the binary digits of their number of nodes."""

    def too_uneven(self, seconds: float, nodes: int = 1) -> bool:
        """Whether steps like this one spread too far; then it begins anew."""
        alike = self._seconds.setdefault(nodes.bit_length(), deque(maxlen=WINDOW))
        alike.append(seconds)
        if len(alike) < FIRST_LOOK:
            return False
        ordered = sorted(alike)
        if ordered[-1 - HICCUPS] <= SPREAD * ordered[len(ordered) // 2]:
            return False
        self._seconds.clear()
        return True

    def begin_anew(self) -> None:
        """What was seen says nothing about what comes: other threads, other streams."""
        self._seconds.clear()


class ThreadPolicy:
    """`wanted` threads out of `most`."""

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = most
        self._clock = clock
        self._watchdog = StepWatchdog()
        self._fewer = most
        """Threads that steps have shown to be even enough."""
        self._pause_s = FIRST_PAUSE_S
        self._again_at = 0.0
        self.sharing = False
        """Whether a job of ours computes on this machine: one thread is then as fast, and its longest steps
        are shorter (docs/results.md)."""

    @property
    def wanted(self) -> int:
        return 1 if self.sharing else self._fewer

    def note(self, seconds: float, nodes: int = 1) -> bool:
        """A step that only decodes so many nodes took so long. True when it is the one that shows that
        threads wait for each other."""
        now = self._clock()
        if self._fewer < self._most and not self.sharing and now >= self._again_at:
            self._fewer = min(self._most, self._fewer * 2)
            self._watchdog.begin_anew()
            # Counts from now as in vain, until steps have stayed even for as long.
            self._again_at = now + self._pause_s
            return False
        if not self._watchdog.too_uneven(seconds, nodes) or self.wanted == 1:
            return False
        in_vain = now < self._again_at
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S) if in_vain else FIRST_PAUSE_S
        self._fewer = self.wanted // 2
        self._again_at = now + self._pause_s
        return True
