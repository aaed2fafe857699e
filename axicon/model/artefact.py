"""Writes model directories so that a reader sees a whole one or none.

`atomic_directory` is the only writer of artefacts: a temporary directory beside the target, every file and
the directory synced to disk, one rename. A process killed at any point leaves at most a hidden temporary
directory, which the next writer of the same target removes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from axicon.errors import AxiconError

FORMAT_VERSION = 1
"""Version of `manifest.json` and of the directory around it."""

SHARD_BYTES = 2 << 30


def reached(point: str) -> None:
    """Called at each point where a crash must be harmless; tests replace it with something that raises."""


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Yield an empty temporary directory that becomes `target` when the block ends without an exception.

    Raises AxiconError when `target` exists already or cannot be written. After any exception nothing is left.
    """
    if target.exists():
        raise AxiconError(f"{target} exists already; choose another directory or remove it")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        temporary = target.parent / f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
        temporary.mkdir()
    except OSError as e:
        raise AxiconError(f"cannot write in {target.parent}: {e.strerror}; choose a writable place") from e
    try:
        yield temporary
        reached("written")
        for path in sorted(temporary.rglob("*")):
            _sync(path)
        _sync(temporary)
        reached("synced")
        temporary.rename(target)
        _sync(target.parent)
        reached("renamed")
    except OSError as e:
        raise AxiconError(f"cannot write {target}: {e}; nothing was left of it") from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_leftovers(target: Path) -> None:
    """Remove temporary directories whose writer no longer lives."""
    for path in target.parent.glob(f".{target.name}.*.tmp"):
        writer = path.name.removeprefix(f".{target.name}.").split(".")[0]
        if writer.isdigit() and not Path(f"/proc/{writer}").exists() and Path("/proc/self").exists():
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the lock file `path`; other processes of this machine wait. The lock ends with its process."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.open("w")
    except OSError as e:
        raise AxiconError(f"cannot write {path}: {e.strerror}; set AXICON_CACHE to a writable folder") from e
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def write_atomically(path: Path, text: str) -> None:
    """Replace one small file; a reader sees the old text or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_text(text)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Canonical JSON: sorted keys, so equal content is equal bytes."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def write_weights(
    folder: Path, sizes: Mapping[str, int], tensor: Callable[[str], Tensor], shard_bytes: int = SHARD_BYTES
) -> None:
    """Write safetensors shards, and an index if there are several, with one shard in memory at a time.

    `sizes` gives the bytes of each tensor by name; `tensor(name)` makes it, contiguous and of that size.
    """
    from safetensors.torch import save_file

    shards: list[list[str]] = [[]]
    filled = 0
    for name in sorted(sizes):
        if shards[-1] and filled + sizes[name] > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += sizes[name]
    index: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        one = len(shards) == 1
        file = "model.safetensors" if one else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: tensor(name) for name in names}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names, file)
    if len(shards) > 1:
        metadata = {"total_size": sum(sizes.values())}
        write_json(folder / "model.safetensors.index.json", {"metadata": metadata, "weight_map": index})


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, **content: Any) -> None:
    """Write `manifest.json` over the files already in `folder`, with size and sha256 of each."""
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.rglob("*")) if path.is_file()
    }
    write_json(folder / "manifest.json", {"format_version": FORMAT_VERSION, **content, "files": files})
