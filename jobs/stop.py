"""How a verb ends when it is asked to: SIGINT, SIGTERM or SIGHUP become one exception, for every verb alike.

`ray job submit` stops a job with SIGTERM, and kills it when it takes longer than RAY_JOB_STOP_WAIT_TIME_S.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
NOTHING_KEPT = "nothing half written is left; rerun the same command to begin again"


Handler = Callable[[int, FrameType | None], None]
_handler: Handler | None = None
"""Of the innermost `stop_on_signal`."""


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
def stop_on_signal() -> Iterator[None]:
    """Raise Stopped on the first signal that asks for the end, and on a second one, which hurries it.

    The handlers are set even where SIGINT was ignored, as shells have it for a command in the background:
    whoever sends it means it.
    """
    asked = 0

    def handler(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked += 1
        if asked <= 2:
            raise Stopped(number)

    global _handler
    before, outer = {number: signal.getsignal(number) for number in SIGNALS}, _handler
    _handler = handler
    rearm()
    try:
        yield
    finally:
        _handler = outer
        for number, old in before.items():
            signal.signal(number, old)


@contextlib.contextmanager
def noted(note: Callable[[Stopped], None]) -> Iterator[None]:
    """For the time of the block the first signal is handed to `note` instead of raised, and only the next is.

    For loops within Ray: its waits make a SystemError of what a handler raises, and around some of them it
    takes that for the end of a task.
    """
    global _handler
    outer, seen = _handler, False

    def handler(number: int, frame: FrameType | None) -> None:
        nonlocal seen
        if seen:
            raise Stopped(number)
        seen = True
        note(Stopped(number))

    if outer is None:
        yield
        return
    _handler = handler
    rearm()
    try:
        yield
    finally:
        _handler = outer
        rearm()


@contextlib.contextmanager
def unwrapped() -> Iterator[None]:
    """For the time of the block, what a handler raised within a wait of Ray's is raised as it was."""
    try:
        yield
    except SystemError as error:
        if isinstance(error.__cause__, Stopped):
            raise error.__cause__ from None
        raise


def rearm() -> None:
    """Set the handlers again, to be called when Ray has started in this process: it sets one for SIGTERM."""
    if _handler is None or threading.current_thread() is not threading.main_thread():
        return
    for number in SIGNALS:
        signal.signal(number, _handler)
