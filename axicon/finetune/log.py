"""The log of a run: what it began from, and the numbers of every step. For a scalar rule it is the run.

A file of JSON lines. The first says what the numbers hold for; each other is one step, on disk before the
parameters change. So whatever kills a run, the log has every step that was taken; a last line that was
not finished is none.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from axicon.errors import AxiconError
from axicon.model.artefact import write_all
from axicon.protocols import Scalars

VERSION = 1
NAME = "log.jsonl"
MACHINE = "machine"
Stamp = tuple[int, int, int]
"""Time, size and number of a file: equal where nobody has written to it."""
EARLIER = "earlier"
"""Key of the first line: the parts of the log whose steps were taken by other settings, before this run."""


class Log:
    """`with Log(path, facts) as log: log.append(scalars)`: goes on behind the steps that are there.

    `facts` are what decides the bits of a run, `machine` among them. Raises AxiconError for a log of other
    facts, naming them. Another machine is none: `moved` says so.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any], *, writes: bool = True) -> None:
        self.path, self.writes = path, writes
        self._descriptor = -1
        header = {"axicon_log": VERSION, **json.loads(json.dumps(facts))}
        found, self.steps, end = read(path) if path.exists() else ({}, [], 0)
        self.moved = bool(found) and found.get(MACHINE) != header.get(MACHINE)
        """Whether the steps that are there were taken elsewhere, or by another number of threads. What they
        are is as good, but the next ones would have had other last bits there."""
        theirs, ours = ({k: v for k, v in one.items() if k != MACHINE} for one in (found, header))
        if found and theirs != ours:
            differ = difference(theirs, ours)
            raise AxiconError(f"{path} is the log of another run: {differ}; give that, or another out=")
        if not writes:
            return
        try:
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
            os.ftruncate(self._descriptor, end)
            os.lseek(self._descriptor, end, os.SEEK_SET)
        except OSError as e:
            raise AxiconError(f"cannot write {path}: {e.strerror}; choose another out=") from e
        if not found:
            self._write(header)

    def append(self, scalars: Scalars | None) -> None:
        """Keep one more step; None for one that was skipped. Raises AxiconError when the disk does not."""
        record = {"skipped": True} if scalars is None else dict(scalars)
        if self.writes:
            self._write({"step": len(self.steps), **record})
        self.steps.append(scalars)

    def cut(self, count: int) -> None:
        """Forget the steps behind the first `count`."""
        del self.steps[count:]
        if self.writes:
            end = _ends(self.path.read_bytes())[count]
            os.ftruncate(self._descriptor, end)
            os.lseek(self._descriptor, end, os.SEEK_SET)
            os.fsync(self._descriptor)

    def _write(self, record: Mapping[str, Any]) -> None:
        try:
            write_all(self._descriptor, _line(record))
            os.fsync(self._descriptor)
        except OSError as e:
            do = "free some space" if e.errno in (errno.ENOSPC, errno.EDQUOT) else "mend that"
            raise AxiconError(
                f"{self.path}: {e.strerror}; {len(self.steps)} steps are kept, {do} and run the same command"
            ) from e

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        self.close()


def head(path: Path, count: int) -> tuple[bytes, bytes]:
    """The first line of a log and those of its first `count` steps, as they lie there. Raises AxiconError."""
    content = path.read_bytes()
    ends = _ends(content)
    if len(ends) <= count:
        raise AxiconError(f"{path} has {max(0, len(ends) - 1)} steps and not {count}")
    return content[: ends[0]], content[ends[0] : ends[count]]


def first_line(facts: Mapping[str, Any]) -> bytes:
    """Of a log that holds for `facts`."""
    return _line({"axicon_log": VERSION, **facts})


def read(path: Path) -> tuple[dict[str, Any], list[Scalars | None], int]:
    """What a log holds for, its steps, and where the last of them ends. Empty for a log that was only begun.

    Raises AxiconError for a file that is none, and for one that is damaged before its last line.
    """
    tail = Tail(path)
    steps = [scalars for scalars, _ in tail.look()]
    return tail.header, steps, tail.end


class Tail:
    """What of a log has come since it was last looked at. What was read must still be there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header: dict[str, Any] = {}
        """What the log holds for; empty until it says so."""
        self.first = b""
        """Its first line, which is what tells one run from another."""
        self.steps = 0
        """Read so far."""
        self.end = 0
        """Where the last of them ends."""
        self._read = hashlib.sha256()
        self._seen: Stamp | None = None

    def look(self, most: int | None = None) -> list[tuple[Scalars | None, bytes]]:
        """The new steps, or the first `most` of them, each with its line; None is one that was skipped.

        Raises AxiconError, and then has read nothing, for a log that is not there, damaged, or another one.
        """
        try:
            with self.path.open("rb") as file:
                about = os.fstat(file.fileno())
                seen: Stamp | None = (about.st_mtime_ns, about.st_size, about.st_ino)
                if seen == self._seen:
                    return []
                content = file.read()
        except OSError as e:
            raise AxiconError(f"{self.path}: cannot be read ({e.strerror})") from None
        if hashlib.sha256(content[: self.end]).digest() != self._read.digest():
            raise AxiconError(
                f"{self.path} is the log of another run now, without the {self.steps} steps that were read; "
                "begin again from the base"
            )
        ends = _ends(content, self.end)
        if most is not None and len(ends) > (wanted := most + (not self.header)):
            ends, seen = ends[:wanted], None
        lines = [content[start:end] for start, end in zip([self.end, *ends], ends, strict=False)]
        known = self.steps + 1 if self.header else 0
        records = [_record(self.path, known + i, line) for i, line in enumerate(lines, 1)]
        header, first = self.header, self.first
        if records and not header:
            header, first = records.pop(0), lines.pop(0)
            if (version := header.get("axicon_log")) != VERSION:
                raise AxiconError(f"{self.path}: {_version(version)}")
        found = [_scalars(self.path, self.steps + i, record) for i, record in enumerate(records)]
        self.header, self.first, self._seen = header, first, seen
        if ends:
            self._read.update(content[self.end : ends[-1]])
            self.end = ends[-1]
        self.steps += len(found)
        return list(zip(found, lines, strict=True))


def _line(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, separators=(",", ":"), allow_nan=False) + "\n").encode()


def _ends(content: bytes, start: int = 0) -> list[int]:
    """Where the whole lines from `start` on end."""
    return [found.end() for found in re.compile(b"\n").finditer(content, start)]


def _record(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise AxiconError(f"{path}, line {number}: damaged, so the run cannot go on; begin it again")
    return record


def _version(version: Any) -> str:
    if isinstance(version, int) and version > VERSION:
        return f"a log of version {version}, this axicon reads {VERSION}; update axicon"
    return "no log of a finetuning run"


def _scalars(path: Path, step: int, record: dict[str, Any]) -> Scalars | None:
    if record.pop("step", None) != step:
        raise AxiconError(f"{path}, line {step + 2}: step {step} is not where it belongs; the log is damaged")
    if record.pop("skipped", False):
        return None
    for value in record.values():
        numbers: Sequence[Any] = value if isinstance(value, list) else [value]
        if not all(isinstance(x, float | int) and math.isfinite(x) for x in numbers):
            raise AxiconError(f"{path}, line {step + 2}: {value!r} is no number; the log is damaged")
    return record


def difference(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """Which facts differ, as words."""
    theirs, ours = dict(_flat(theirs)), dict(_flat(ours))
    differ = [
        f"{key} is {_short(theirs.get(key))} there and {_short(ours.get(key))} here"
        for key in [*theirs, *(key for key in ours if key not in theirs)]
        if theirs.get(key) != ours.get(key)
    ]
    return "; ".join(differ[:3])


def _flat(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`rule.lr` for what is within `rule`."""
    for key, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _short(value: Any) -> str:
    """A digest by its beginning."""
    text = json.dumps(value) if isinstance(value, list) else str(value)
    return text if len(text) <= 60 else text[:12] + "..."
