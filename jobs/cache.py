"""`axicon cache`: what lies in axicon's own cache folder, and removing what nobody needs.

All of it is made again when it is needed, except a conversion whose GGUF file is gone. Nothing is removed
that a living process has open, mapped or locked; who reads a converted model holds it (`cachedir.hold`).
The hub's downloads are in the hub's own cache, which `hf cache` lists.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from axicon.errors import AxiconError
from axicon.kernels import native
from axicon.model import interchange
from axicon.model.cachedir import cache_dir
from jobs.manifest import Manifest
from jobs.shown import console, duration, size

State = Literal["in use", "current", "lasting", "obsolete", "leftover", "foreign"]
"""in use: by a living process. current: made again when needed. lasting: cannot be made again. obsolete: of
another axicon, compiler or processor. leftover: of a process that was killed. foreign: nothing axicon knows.
"""
BY_DEFAULT: tuple[State, ...] = ("obsolete", "leftover")
"""What `clean` removes when nothing is named."""
BY_ALL: tuple[State, ...] = (*BY_DEFAULT, "current")

TEMPORARY = re.compile(r"\..+\.(\d+)\.[0-9a-f]{8}\.tmp")
"""Names of what `axicon.model.artefact` writes before it renames; the number is the writer's process."""
CONVERSION = re.compile(r"gguf-[0-9a-f]{16}-v(\d+)")
STATISTICS = "statistics"
"""A folder that may be named as `calibration.shared`; it is not made by itself."""
COMPILING_S = 600
"""A compiler's scratch folder has no owner in its name; after this time its compiler has been stopped."""


@dataclass(frozen=True, kw_only=True)
class Item:
    name: str
    """Path within the cache folder."""
    path: Path
    what: str
    state: State
    about: str
    """The state in words."""
    bytes: int
    used: float
    """When a file of it was last read or written, in seconds since the epoch."""

    @property
    def days(self) -> float:
        return max(0.0, time.time() - self.used) / 86400


def items(root: Path | None = None) -> list[Item]:
    """Everything in the cache folder, largest first."""
    root = (root or cache_dir()).resolve()
    users = _users(root)
    found = [_item(root, path, users) for path in _places(root)]
    return sorted(found, key=lambda item: (-item.bytes, item.name))


def _places(root: Path) -> Iterator[Path]:
    """Paths that are listed one by one: one level deeper in the folders with many things."""
    for path in _children(root):
        if path.name not in ("models", "kernels", "peers", "answers", STATISTICS):
            yield path
            continue
        for inner in _children(path):
            if path.name == "models" and inner.is_dir() and CONVERSION.fullmatch(inner.name):
                yield from _children(inner) or (inner,)
            else:
                yield inner


def _children(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _item(root: Path, path: Path, users: Mapping[Path, int]) -> Item:
    what, state, about = _kind(path.relative_to(root).parts, path)
    user = next((pid for used, pid in users.items() if used == path or path in used.parents), None)
    if user is not None:
        state, about = "in use", f"in use by process {user}"
    total, used = _size_and_time(path)
    name = str(path.relative_to(root))
    return Item(name=name, path=path, what=what, state=state, about=about, bytes=total, used=used)


def _kind(parts: Sequence[str], path: Path) -> tuple[str, State, str]:
    """What a path of the cache is, its state as far as the path tells, and that in words."""
    if temporary := TEMPORARY.fullmatch(path.name):
        if Path("/proc", temporary[1]).exists():
            return "being written", "in use", f"in use by process {temporary[1]}"
        return "half written", "leftover", "its writer was killed"
    if path.suffix == ".lock":
        return "lock file", "leftover", "nobody holds it"
    if parts == ("digests.json",):
        return "remembered digests", "current", "made again when needed"
    if parts[0] == "kernels" and len(parts) == 2:
        return _kernels(path)
    if parts[0] == "models" and len(parts) > 1 and (conversion := CONVERSION.fullmatch(parts[1])):
        return _conversion(path, int(conversion[1])) if len(parts) == 3 else ("empty", "leftover", "empty")
    if parts[0] == "answers":
        return "answers of a model, for quality cards", "current", "made again when needed"
    if parts[0] == STATISTICS and len(parts) > 1:
        return "statistics of a calibration sample", "current", "made again when needed"
    if parts[0] == "peers":
        return "model for a benchmark", "current", "made again when needed"
    return "unknown", "foreign", "not axicon's; removed only if named"


def _kernels(path: Path) -> tuple[str, State, str]:
    if path.is_dir():
        if time.time() - path.stat().st_mtime < COMPILING_S:
            return "being compiled", "in use", "in use by a compiler"
        return "half compiled", "leftover", "its compiler was killed"
    try:
        current = native.library_file()[1].resolve() == path
    except native.Unavailable:
        current = False
    if current:
        return "compiled kernels", "current", "made again when needed"
    return "compiled kernels", "obsolete", "of another version or processor"


def _conversion(path: Path, converter: int) -> tuple[str, State, str]:
    if converter != interchange.CONVERTER:
        return "converted model", "obsolete", "of another version of axicon"
    try:
        manifest = Manifest.read(path)
    except AxiconError:
        return "converted model", "obsolete", "its manifest cannot be read"
    sources = [] if manifest is None else [parent.source for parent in manifest.parents]
    if any(Path(source).exists() for source in sources):
        return "converted model", "current", "made again when needed"
    try:
        if path == interchange.converted_place(interchange.demo_file(), name=interchange.DEMO_NAME).resolve():
            return "converted model", "current", "made again when needed"
    except AxiconError:
        pass  # without the embedded model's package there is nothing to make it from
    gone = f"{sources[0]} is gone" if sources else "its source is not known"
    return "converted model", "lasting", f"cannot be made again: {gone}"


def _size_and_time(path: Path) -> tuple[int, float]:
    """Bytes beneath a path, and when one of its files was last read or written."""
    total, used = 0, 0.0
    for file in [path, *(path.rglob("*") if path.is_dir() and not path.is_symlink() else ())]:
        try:
            status = file.lstat()
        except OSError:
            continue  # it went meanwhile
        used = max(used, status.st_mtime)
        if not file.is_dir() or file.is_symlink():
            total += status.st_size
            # The manifest is read by this very listing.
            used = max(used, 0.0 if file.name == "manifest.json" else status.st_atime)
    return total, used


def _users(root: Path) -> dict[Path, int]:
    """Paths beneath `root` that a living process other than this one has open or mapped, and its number."""
    found: dict[Path, int] = {}
    prefix = f"{root}{os.sep}"
    for process in Path("/proc").glob("[0-9]*"):
        number = int(process.name)
        if number == os.getpid():
            continue
        for name in _open_files(process):
            if name.startswith(prefix):
                found[Path(name)] = number
    return found


def _open_files(process: Path) -> Iterator[str]:
    """Names of open and mapped files, as far as they may be looked at."""
    with contextlib.suppress(OSError):  # it ended, or belongs to somebody else
        yield from (os.readlink(link) for link in (process / "fd").iterdir())
    try:
        lines = (process / "maps").read_text(errors="replace").splitlines()
    except OSError:
        return
    yield from {line.split(maxsplit=5)[5] for line in lines if "/" in line}


def chosen(
    found: Sequence[Item],
    names: Sequence[str] = (),
    *,
    everything: bool = False,
    older_than: float | None = None,
) -> list[Item]:
    """What to remove: what is named, `everything` that can be made again, or else what is of no use.

    `older_than` days without use narrows that, and stands for everything where nothing is named. A name is a
    path in the cache, its last part, a folder of it, or a pattern. Raises AxiconError for one that fits none.
    """
    states = BY_ALL if everything or (older_than is not None and not names) else BY_DEFAULT
    for name in names:
        if not any(named(item, [name]) for item in found):
            raise AxiconError(
                f"{name}: nothing in the cache has this name; `axicon cache` lists what has one"
            )
    if names:
        picked = [item for item in found if named(item, names)]
    else:
        picked = [item for item in found if item.state in states]
    old_enough = [item for item in picked if older_than is None or item.days >= older_than]
    return [item for item in old_enough if item.state != "in use"]


def named(item: Item, names: Sequence[str]) -> bool:
    """Whether one of the names means it."""
    for name in (name.rstrip("/") for name in names):
        if fnmatch(item.name, name) or fnmatch(item.path.name, name) or item.name.startswith(f"{name}/"):
            return True
    return False


def clean(picked: Sequence[Item], say: Callable[[str], None]) -> int:
    """Remove them; the bytes freed. What somebody uses by now, and what cannot be removed, is said."""
    freed = 0
    for item in picked:
        try:
            gone = remove(item)
        except AxiconError as error:
            say(str(error))
            continue
        if gone is None:
            say(f"{item.name} stays: it is in use")
        freed += gone or 0
    return freed


def remove(item: Item) -> int | None:
    """Remove it unless somebody began to use it meanwhile; the bytes that gave, None if it stays.

    A folder is renamed first, so that a reader sees it whole or not at all. Raises AxiconError if it cannot
    be removed.
    """
    root = Path(str(item.path)[: -len(item.name) - 1])
    try:
        with _alone(item) as alone:
            if not alone or _item(root, item.path, _users(root)).state == "in use":
                return None
            if item.path.is_dir() and not item.path.is_symlink():
                doomed = item.path.with_name(f".{item.path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
                item.path.rename(doomed)
                shutil.rmtree(doomed)
            else:
                item.path.unlink(missing_ok=True)
            if CONVERSION.fullmatch(item.path.parent.name) and not _children(item.path.parent):
                item.path.parent.rmdir()
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise AxiconError(f"{error.filename}: cannot be removed ({error.strerror})") from None
    return item.bytes


@contextlib.contextmanager
def _alone(item: Item) -> Iterator[bool]:
    """Whether nobody holds the locks that belong to it; while the block runs they are ours."""
    locks = [item.path] if item.path.suffix == ".lock" else []
    if CONVERSION.fullmatch(item.path.parent.name):
        converting = item.path.parent.with_name(f".{item.path.parent.name}.lock")
        locks += [lock for lock in (converting, item.path / "manifest.json") if lock.exists()]
    if item.name.startswith(f"{STATISTICS}/"):  # who uses a set has its manifest locked
        locks += [lock for lock in (item.path / "manifest.json",) if lock.exists()]
    descriptors: list[int] = []
    try:
        for lock in locks:
            descriptors.append(os.open(lock, os.O_RDONLY))
            fcntl.flock(descriptors[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def show(found: Sequence[Item], title: str) -> None:
    """Print a table."""
    console().print(table(found, title))


def table(found: Sequence[Item], title: str) -> Table:
    result = Table(title=title, title_justify="left")
    result.add_column("name", overflow="fold", min_width=40)
    result.add_column("what")
    result.add_column("size", justify="right", no_wrap=True)
    result.add_column("unused for", justify="right", no_wrap=True)
    result.add_column("state")
    for item in found:
        result.add_row(item.name, item.what, size(item.bytes), duration(item.days), item.about)
    return result


def as_json(found: Sequence[Item]) -> list[dict[str, Any]]:
    return [
        {
            "name": item.name,
            "path": str(item.path),
            "what": item.what,
            "state": item.state,
            "about": item.about,
            "bytes": item.bytes,
            "unused_days": round(item.days, 3),
        }
        for item in found
    ]
