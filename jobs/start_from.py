"""`start_from`: a run that begins where another one ended, with settings of its own.

Its folder is made as if it had taken the other's steps itself: their lines in its log and what a step left.
From there on it is a run like any other, and needs the other's folder no longer. The first line of its log
says of each earlier part how far it goes, by which settings, and the digest of the log that it is from.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from axicon.errors import AxiconError
from axicon.finetune.log import EARLIER, MACHINE, NAME, difference, head, read

Facts = Mapping[str, Any]


def parent_log(
    parent: Path, folder: Path, facts: Facts, alike: Callable[[Facts], Facts], verb: str, rule: str
) -> dict[str, Any] | None:
    """The first line of the log that lies in `parent`; None where the run in `folder` began already.

    facts: of the run that is to begin. alike: those of them that both must share; `rule` says so in words.
    Raises AxiconError for a parent without steps, one of other facts, and one that is another by now.
    """
    own = read(folder / NAME)[0] if (folder / NAME).exists() else {}
    if own:
        _check_same(own.get(EARLIER), parent, folder)
        return None
    if parent == folder:
        raise AxiconError(f"start_from={parent} is the run's own folder; give another out=")
    if not (parent / NAME).exists():
        raise AxiconError(f"start_from={parent}: no run of axicon {verb} lies there ({NAME} is missing)")
    header = read(parent / NAME)[0]
    if not header:
        raise AxiconError(f"start_from={parent}: no steps lie there")
    theirs, ours = (_kept(alike(one)) for one in (header, json.loads(json.dumps(facts))))
    if theirs != ours:
        raise AxiconError(f"start_from={parent}: {difference(theirs, ours)}; {rule}")
    return header


def parts_of(folder: Path, asked: Path | None) -> list[dict[str, Any]]:
    """What the log in `folder` says of its earlier parts. Raises AxiconError where `asked` does not fit."""
    header = read(folder / NAME)[0] if (folder / NAME).exists() else {}
    parts: list[dict[str, Any]] = header.get(EARLIER, [])
    if header and bool(parts) != (asked is not None):
        wants = "give its start_from" if parts else "leave out start_from"
        raise AxiconError(f"{folder / NAME} is the log of another run: {wants}, or another out=")
    return parts


def check_taken(parent: Path, taken: int, most: int, setting: str) -> None:
    """Raises AxiconError where the parent has no steps, or more than are asked for."""
    if not 0 < taken <= most:
        how = (
            f"{taken} steps were taken there; give {setting}={taken} or more"
            if taken
            else "no steps lie there"
        )
        raise AxiconError(f"start_from={parent}: {how}")


def earlier(parent: Path, header: Facts, taken: int, vary: tuple[str, ...]) -> tuple[list[Facts], bytes]:
    """What the first line of a log says of the parts it took over, and the lines of these steps."""
    first, steps = head(parent / NAME, taken)
    part = {"until": taken, "log": hashlib.sha256(first + steps).hexdigest()}
    return [*header.get(EARLIER, ()), part | {key: header[key] for key in vary}], steps


def copy_whole(source: Path, target: Path) -> None:
    """Whole or not at all; where the source has none, neither has the target."""
    if source.exists():
        temporary = target.with_name(f".{target.name}.tmp")
        shutil.copyfile(source, temporary)
        temporary.replace(target)
    else:
        target.unlink(missing_ok=True)


def _kept(facts: Facts) -> dict[str, Any]:
    return {key: value for key, value in facts.items() if key not in (MACHINE, EARLIER, "axicon_log")}


def _check_same(parts: Any, parent: Path, folder: Path) -> None:
    """A parent that has gone on since is the same; one that is gone cannot be asked."""
    if not parts or not (parent / NAME).exists():
        return
    last = parts[-1]
    first, steps = head(parent / NAME, last["until"])
    if hashlib.sha256(first + steps).hexdigest() != last["log"]:
        raise AxiconError(
            f"{folder / NAME} began from another run than lies in start_from={parent} now; give another out="
        )
