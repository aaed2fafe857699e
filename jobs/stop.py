"""How a verb ends when it is asked to: SIGINT, SIGTERM or SIGHUP become one exception, for every verb alike.

`ray job submit` stops a job with SIGTERM, and kills it when it takes longer than RAY_JOB_STOP_WAIT_TIME_S.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
NOTHING_KEPT = "nothing half written is left; rerun the same command to begin again"


class Stopped(BaseException):
    """Someone asked this process to end. Not an Exception, so that no library swallows it.

    A verb that can go on later catches it, puts what it keeps into `kept`, and raises it again.
    """

    def __init__(self, number: int = signal.SIGTERM) -> None:
        self.number = number
        self.did = "stopped"
        self.kept = NOTHING_KEPT
        super().__init__(number)

    @property
    def exit_code(self) -> int:
        """128 plus the signal, as shells have it: 143 for SIGTERM, 130 for Ctrl-C."""
        return 128 + self.number


@contextlib.contextmanager
def stop_on_signal() -> Iterator[Callable[[], None]]:
    """Raise Stopped on the first signal that asks for the end, and on a second one, which hurries it.

    Yields a function that sets the handlers again. They are set even where SIGINT was ignored, as shells have
    it for a command in the background: whoever sends it means it.
    """
    asked = 0

    def handler(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked += 1
        if asked <= 2:
            raise Stopped(number)

    def arm() -> None:
        for number in SIGNALS:
            signal.signal(number, handler)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    arm()
    try:
        yield arm
    finally:
        for number, old in before.items():
            signal.signal(number, old)
