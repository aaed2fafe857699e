"""axicon's own cache folder, and digests of files remembered in it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from pathlib import Path

from axicon.errors import AxiconError
from axicon.model.artefact import sha256, write_atomically


def cache_dir() -> Path:
    """$AXICON_CACHE, else $XDG_CACHE_HOME/axicon, else ~/.cache/axicon. Not created here."""
    if own := os.environ.get("AXICON_CACHE"):
        return Path(own).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base).expanduser().absolute() / "axicon"


_held: dict[Path, int] = {}
"""Folder, and the descriptor whose shared lock says that this process reads it."""


def hold(folder: Path) -> Path:
    """Keep a model of the cache from `axicon cache clean` until this process ends; returns `folder`.

    A model is read into memory and its files closed, but a server that restarts reads it again. Elsewhere
    than in the cache this does nothing. Raises AxiconError when the model is being removed.
    """
    if folder in _held or not folder.resolve().is_relative_to((cache_dir() / "models").resolve()):
        return folder
    with contextlib.suppress(OSError):  # a file system without locks, or no such file
        descriptor = os.open(folder / "manifest.json", os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        _held[folder] = descriptor
    if not folder.exists():
        raise AxiconError(f"{folder}: was just removed by `axicon cache clean`; run the command again")
    return folder


def release() -> None:
    """Hold nothing any more."""
    while _held:
        os.close(_held.popitem()[1])


def file_digest(path: Path) -> str:
    """sha256 of a file, in hex, remembered until its size or modification time changes."""
    real = path.resolve()
    try:
        status = real.stat()
    except OSError as e:
        raise AxiconError(f"{path}: {e.strerror}") from e
    key, stamp = str(real), [status.st_size, status.st_mtime_ns]
    memory = cache_dir() / "digests.json"
    known = _read(memory)
    found = known.get(key)
    if isinstance(found, list) and found[:2] == stamp and len(found) == 3:
        return str(found[2])
    digest = sha256(real)
    try:
        # Read again: another process may have added its own meanwhile. One lost entry costs one more hash.
        known = _read(memory) | {key: [*stamp, digest]}
        write_atomically(memory, json.dumps(known, indent=0, sort_keys=True))
    except OSError as e:
        raise AxiconError(
            f"cannot write {memory}: {e.strerror}; set AXICON_CACHE to a writable folder") from e
    return digest


def _read(memory: Path) -> dict[str, object]:
    try:
        content = json.loads(memory.read_text())
    except (OSError, ValueError):
        return {}  # a memory that cannot be read is only slower
    return content if isinstance(content, dict) else {}
