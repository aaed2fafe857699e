"""Where the running clusters of this user are: one small file for each, written by its holder.

A file whose process is gone is stale and is removed by whoever meets it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from axicon.errors import AxiconError
from jobs import reaper

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class Running:
    """A cluster that `axicon up` started."""

    name: str
    pid: int
    """Of its holder, which ends everything when it is told to."""
    dashboard: str
    """URL, for `ray job submit --address` and for a browser."""
    gcs: str
    folder: str
    """Private: token, sockets, Ray's logs."""
    token_path: str
    cluster_file: str
    started: str
    """ISO 8601, UTC."""
    storage: str
    """Where jobs put models and results."""

    def env(self) -> dict[str, str]:
        """What a process needs in its environment to submit jobs to this cluster."""
        return {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": self.token_path,
            "RAY_API_SERVER_ADDRESS": self.dashboard,
        }

    def alive(self) -> bool:
        """Whether its holder runs. Process ids are given again, so the command is looked at too."""
        try:
            process = psutil.Process(self.pid)
            return reaper.runs(process) and "jobs.holder" in process.cmdline()
        except psutil.Error:
            return False


def state_folder() -> Path:
    """$AXICON_STATE, or axicon's folder in XDG_STATE_HOME."""
    if own := os.environ.get("AXICON_STATE"):
        return Path(own)
    return Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "axicon"


def path_of(name: str) -> Path:
    """The file of the cluster `name`. Raises AxiconError for what cannot be a file's name."""
    if not NAME.fullmatch(name):
        raise AxiconError(
            f"{name!r} cannot be a cluster's name; letters, digits, dots, dashes and underscores can"
        )
    return state_folder() / "clusters" / f"{name}.json"


def write(cluster: Running) -> None:
    """Say where a cluster is. The file appears whole, for this user alone."""
    path = path_of(cluster.name)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fresh = path.with_suffix(f".{os.getpid()}")
    with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        json.dump(asdict(cluster), file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def remove(name: str) -> None:
    path_of(name).unlink(missing_ok=True)


def read(name: str) -> Running | None:
    """The cluster of this name, if it runs. What is left of one that does not is removed."""
    path = path_of(name)
    try:
        cluster = Running(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise AxiconError(f"{path}: cannot be read ({error}); remove it if no such cluster runs") from None
    if cluster.alive():
        return cluster
    with contextlib.suppress(OSError):
        path.unlink()
    return None


def clusters() -> Iterator[Running]:
    """All that run, by name."""
    for path in sorted((state_folder() / "clusters").glob("*.json")):
        if cluster := read(path.stem):
            yield cluster


def find(name: str | None = None) -> Running:
    """The cluster `name`, or the only one there is. Raises AxiconError."""
    if name is not None:
        if cluster := read(name):
            return cluster
        others = ", ".join(other.name for other in clusters())
        there = f"running here: {others}" if others else "start it with `axicon up`"
        raise AxiconError(f"no cluster {name} is running here; {there}")
    found = list(clusters())
    if not found:
        raise AxiconError(
            "no cluster is running here; start one with `axicon up`, or give the address of another"
        )
    if len(found) > 1:
        raise AxiconError(
            f"several clusters are running here; name one of {', '.join(c.name for c in found)}"
        )
    return found[0]
