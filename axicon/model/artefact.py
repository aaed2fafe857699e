"""Writes model directories so that a reader sees a whole one or none.

`atomic_directory` is the only writer of artefacts: a temporary directory beside the target, every file and
the directory synced to disk, one rename. A process killed at any point leaves at most a hidden temporary
directory, which the next writer of the same target removes. All bytes of an artefact pass through
`write_all`.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from axicon.errors import AxiconError
from axicon.model import safety

FORMAT_VERSION = 1
"""Version of `manifest.json` and of the directory around it."""

MANIFEST, REPORT, CARD, README = "manifest.json", "report.json", "card.json", "README.md"
MEASURED = (REPORT, CARD, README)
"""What a model is worth: written again when more is measured, so without digests in the manifest."""
DATASET = "synthetic.safetensors"
"""The examples of a distilled data set."""
OTHER_KINDS = {
    "dataset": "a distilled data set", "trajectory": "a trajectory of an expert",
    "adapter": "an adapter beside its base",
}  # fmt: skip
"""What a directory may be instead of a model, by the `kind` of its manifest."""


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
    renamed = False
    try:
        yield temporary
        reached("written")
        for path in sorted(temporary.rglob("*")):
            _sync(path)
        _sync(temporary)
        reached("synced")
        temporary.rename(target)
        renamed = True
        _sync(target.parent)
        reached("renamed")
    except OSError as e:
        why = e.strerror or str(e)
        if renamed:
            raise AxiconError(
                f"{target} is whole, but the disk did not confirm its name ({why}); look at the disk, then "
                f"run `axicon verify {target}`") from e
        do = "free some space" if e.errno in (errno.ENOSPC, errno.EDQUOT) else "mend that"
        raise AxiconError(
            f"cannot write {target}: {why}; nothing was left of it, {do} or choose another place") from e
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


@contextmanager
def claim(target: Path) -> Iterator[None]:
    """Be the only process of this machine that makes `target`.

    Raises AxiconError at once while another one does. The lock ends with its process; its file is removed.
    """
    path = target.with_name(f".{target.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = _lock_at_once(path)
    except OSError as e:
        raise AxiconError(f"cannot write in {path.parent}: {e.strerror}; choose a writable place") from e
    if lock is None:
        raise AxiconError(
            f"{target}: another axicon{_writer(path)} is making it; wait for it or choose another directory")
    try:
        with suppress(OSError):  # only for the other one's message
            os.ftruncate(lock, 0)
            write_all(lock, f"{os.getpid()}\n".encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(lock)


def _writer(lock: Path) -> str:
    """Who holds the lock, as a part of a sentence; nothing if it has not said so."""
    try:
        number = lock.read_text().strip()
    except OSError:
        return ""
    return f" (process {number})" if number.isdigit() else ""


def _lock_at_once(path: Path) -> int | None:
    """A descriptor that holds the lock of the file now at `path`; None while another process has it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held it before removed the file: a lock on that one keeps nobody out.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def write_all(descriptor: int, content: bytes | memoryview) -> None:
    """Write every byte. One call of the system takes at most 2 GiB, and less on a disk that gets full."""
    rest = memoryview(content)
    while len(rest) > 0:
        rest = rest[os.write(descriptor, rest):]


def write_bytes(path: Path, content: bytes) -> None:
    """Create or overwrite one file; not synced."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        write_all(descriptor, content)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace one small file; a reader sees the old text or the new, also after a crash of the machine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        write_bytes(temporary, content.encode() if isinstance(content, str) else content)
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Canonical JSON: sorted keys, so equal content is equal bytes."""
    write_bytes(path, (json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode())


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a directory, None without one. Raises AxiconError for one of another version."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    content = safety.read_json(path)
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise AxiconError(
            f"{path}: format version {version!r}, this axicon reads {FORMAT_VERSION}; update axicon")
    return content


def write_manifest(folder: Path, **content: Any) -> None:
    """Write `manifest.json` over the files already in `folder`, with size and sha256 of each.

    The files of MEASURED are not among them: they may be written again.
    """
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (MANIFEST, *MEASURED)
    }
    write_json(folder / MANIFEST, {"format_version": FORMAT_VERSION, **content, "files": files})
