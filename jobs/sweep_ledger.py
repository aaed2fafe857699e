"""The ledger of a sweep: a file of JSON lines, only ever appended to, from which the sweep goes on.

The first line says what the sweep is. A trial has a line when it starts and one when it ends, each on disk
before the next thing happens. So whatever ends a sweep, no trial that has ended is lost or run again; a last
line that was not finished is none.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from axicon.errors import AxiconError, RunFailed
from axicon.model.artefact import write_all
from jobs.report import plain

VERSION = 1
NAME = "ledger.jsonl"

Status = Literal["running", "finished", "stopped", "failed"]
FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass
class Trial:
    """One run of the verb, with settings of its own."""

    trial: str
    """Its number, as its folder has it: 0001."""
    settings: dict[str, Any]
    """By the key of the parameter; a parameter whose condition does not hold has none."""
    recipe_sha256: str
    """Of its resolved recipe without where it lies."""
    status: Status = "running"
    metrics: dict[str, float] = field(default_factory=dict)
    steps: list[dict[str, Any]] = field(default_factory=list)
    """`{"step": int, "metrics": {name: value}}` on the way, for a verb that has steps."""
    reason: str | None = None
    """Why it failed or was stopped."""
    started: str = ""
    seconds: float | None = None
    files: list[str] = field(default_factory=list)
    """Written by it, most important first, within the folder of the sweep."""
    serve: str | None = None
    """The command that serves its model, where it made one."""
    parent: str | None = None
    """The trial from whose end it began, if it is a segment of a member of a population."""
    again: bool = False
    """It failed for a reason that is not its own, such as a full disk: going on tries it once more."""

    @property
    def ended(self) -> bool:
        return self.status != "running" and not self.again


class Ledger:
    """`with Ledger(folder, facts) as ledger: ledger.started(trial); ledger.ended(trial)`.

    `facts` are the first line: all that decides what the trials are. Raises AxiconError for a file that is no
    ledger, or damaged before its last line, and RunFailed when the disk does not take a line.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any]) -> None:
        self.path = path
        found, self.trials, end = read(path) if path.exists() else ({}, {}, 0)
        self.facts: dict[str, Any] = found
        """What the ledger was begun with; empty for a new one."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
            os.ftruncate(self._descriptor, end)
            os.lseek(self._descriptor, end, os.SEEK_SET)
            os.fsync(self._descriptor)
        except OSError as e:
            raise AxiconError(f"cannot write {path}: {e.strerror}; choose another out=") from e
        self._end = end
        if not found:
            self._append({"axicon_ledger": VERSION, **facts})

    def started(self, trial: Trial) -> None:
        self.trials[trial.trial] = trial
        kept = ["trial", "status", "settings", "recipe_sha256", "started"]
        kept += [] if trial.parent is None else ["parent"]
        self._append({key: getattr(trial, key) for key in kept})

    def ended(self, trial: Trial) -> None:
        self.trials[trial.trial] = trial
        self._append(vars(trial))

    def _append(self, record: Mapping[str, Any]) -> None:
        line = json.dumps(plain(record), separators=(",", ":"), ensure_ascii=False, allow_nan=False) + "\n"
        try:
            write_all(self._descriptor, line.encode())
            os.fsync(self._descriptor)
        except OSError as e:
            self._forget_half()
            ended = sum(one.ended for one in self.trials.values())
            do = "free some space" if e.errno in FULL else "mend that"
            raise RunFailed(
                f"{self.path}: {e.strerror}; {do} and run the same command, the trials that had ended "
                f"before are kept ({ended} with the one at hand)"
            ) from e
        self._end += len(line.encode())

    def _forget_half(self) -> None:
        """Cut what of a line was written; if that fails too, the next reader does not mind."""
        try:
            os.ftruncate(self._descriptor, self._end)
            os.lseek(self._descriptor, self._end, os.SEEK_SET)
        except OSError:
            pass

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        self.close()


def read(path: Path) -> tuple[dict[str, Any], dict[str, Trial], int]:
    """What a ledger was begun with, its trials by number, and where its last whole line ends.

    Raises AxiconError.
    """
    try:
        content = path.read_bytes()
    except OSError as e:
        raise AxiconError(f"{path}: cannot be read ({e.strerror})") from None
    end = content.rfind(b"\n") + 1
    records = list(_records(path, content[:end]))
    if not records:
        return {}, {}, 0
    header, *events = records
    if header.get("axicon_ledger") != VERSION:
        version = header.get("axicon_ledger")
        newer = isinstance(version, int) and version > VERSION
        why = f"a ledger of version {version}; update axicon" if newer else "no ledger of a sweep"
        raise AxiconError(f"{path}: {why}")
    trials: dict[str, Trial] = {}
    for number, event in enumerate(events, 2):
        try:
            one = Trial(**event)
        except TypeError:
            raise AxiconError(f"{path}, line {number}: no event of a trial; the ledger is damaged") from None
        trials[one.trial] = one
    return header, trials, end


def _records(path: Path, content: bytes) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(content.splitlines(), 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise AxiconError(f"{path}, line {number}: damaged, so the sweep cannot go on; take another out=")
        yield record
