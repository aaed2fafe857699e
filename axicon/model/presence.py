"""Which servers and jobs of axicon run on this machine, for those who share its cores with them.

Each holds a lock on a file of its own in a folder of this machine and user. Locks end with their process in
whatever way it ends, so nothing has to be trusted or tidied up.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Literal

log = logging.getLogger("axicon")

Kind = Literal["server", "job"]

FOLDER = Path("/tmp") / f"axicon-{os.getuid()}"
"""Not TMPDIR, which differs between servers, nor under HOME, which machines may share."""


@contextlib.contextmanager
def present(kind: Kind) -> Iterator[None]:
    """This process is a server, or a job, for the time of the block."""
    path = FOLDER / f"{kind}-{os.getpid()}"
    try:
        _private(FOLDER)
        file = _lock(path)
    except OSError as error:
        # All works without a sign; the neighbours are only less polite.
        log.warning("%s: cannot be written (%s), so others take no account of this %s", path, error, kind)
        yield
        return
    with file:
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def living(kind: Kind) -> list[int]:
    """Process ids of the servers, or jobs, of this user on this machine."""
    found = []
    try:
        _private(FOLDER)
        paths = list(FOLDER.glob(f"{kind}-*"))
    except OSError:
        return []
    for path in paths:
        number = path.name.removeprefix(f"{kind}-")
        if number.isdigit() and _held(path):
            found.append(int(number))
    return sorted(found)


def _lock(path: Path) -> IO[str]:
    """A shared lock on `path`. Whoever looks at it before it is locked takes it for a dead server's and
    removes it: then once more."""
    while True:
        file = path.open("w")
        fcntl.flock(file, fcntl.LOCK_SH)
        if path.exists():
            return file
        file.close()


def _held(path: Path) -> bool:
    """Whether somebody holds this file. One that nobody holds is removed."""
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
    except BlockingIOError:
        return True
    except OSError:
        pass  # it has just gone
    return False


def _private(folder: Path) -> None:
    """Raises OSError unless `folder` is, or can be made, a directory of this user alone."""
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if folder.is_symlink() or status.st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to somebody else")
