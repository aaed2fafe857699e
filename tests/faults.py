"""Makes the operations of the disk fail, one after the other."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

OPERATIONS = ("write", "fsync", "rename", "replace", "mkdir", "open")


def failures(
    action: Callable[[], object], only: Sequence[str] = OPERATIONS, most: int = 1000
) -> Iterator[BaseException]:
    """Run `action` again and again, where the first, the second, ... operation fails; yields what it raised.

    Ends with the first run in which nothing failed. An `open` counts when it may create a file,
    a `mkdir` when there is no such directory.
    """
    for number in range(1, most):
        with failing(number, only) as count:
            try:
                action()
            except Exception as raised:
                caught = raised
            else:
                assert count() < number, f"operation {number} failed and nobody noticed"
                return
        yield caught
    pytest.fail(f"still failing after {most} operations")


class failing:
    """`with failing(3) as count:` the third operation raises OSError; `count()` is how many there were.

    With `kill`, this process dies there instead.
    """

    def __init__(self, number: int, only: Sequence[str] = OPERATIONS, *, kill: bool = False) -> None:
        self.number, self.only, self.kill, self.done = number, only, kill, 0
        self.patch = pytest.MonkeyPatch()

    def __enter__(self) -> Callable[[], int]:
        for name in self.only:
            self.patch.setattr(os, name, self._counted(name, getattr(os, name)))
        return lambda: self.done

    def __exit__(self, *_: object) -> None:
        self.patch.undo()

    def _counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if (name == "open" and not args[1] & os.O_CREAT) or (name == "mkdir" and os.path.isdir(args[0])):
                return real(*args, **options)
            self.done += 1
            if self.done == self.number:
                if self.kill:
                    os.kill(os.getpid(), signal.SIGKILL)
                code = errno.ENOSPC if name == "write" else errno.EIO
                raise OSError(code, os.strerror(code), name)
            return real(*args, **options)

        return call
