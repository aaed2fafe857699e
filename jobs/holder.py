"""Holds a simulated cluster in the background: `python -m jobs.holder NAME FILE NODES DASHBOARD_PORT`.

Started by `axicon up`. It says on standard output how far it is, a line at a time; the last is `ready`, or
`failed: REASON`. Then it holds the cluster until SIGTERM, and its reaper ends everything should it be killed.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import psutil

from axicon.errors import AxiconError
from jobs import cluster, cluster_file, reaper, running

READY = "ready"
FAILED = "failed: "


def main() -> None:
    name, path, nodes, port = sys.argv[1:]
    told_to_end = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: told_to_end.set())
    # Ray prints; what `axicon up` reads is a channel of its own, which no child inherits.
    speaker = os.fdopen(os.dup(1), "w", buffering=1)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)

    def say(line: str) -> None:
        with contextlib.suppress(OSError):  # nobody listens any more
            speaker.write(f"{line}\n")

    try:
        hold(name, Path(path), "local" if nodes == "local" else "table", int(port), say, told_to_end)
    except AxiconError as error:
        say(f"{FAILED}{error}")
        sys.exit(1)


def hold(
    name: str,
    path: Path,
    nodes: cluster.Nodes,
    port: int,
    say: Callable[[str], None],
    told_to_end: threading.Event,
) -> None:
    """Start the cluster, write where it is, and return when it is to end or its head has ended."""
    file = cluster_file.read(path)
    storage = storage_path(file, name)
    os.environ["AXICON_STORAGE"] = storage
    with cluster.simulated(file, nodes, port, say) as started:
        try:
            running.write(
                running.Running(
                    name=name,
                    pid=os.getpid(),
                    dashboard=started.dashboard,
                    gcs=started.gcs,
                    folder=str(started.folder),
                    token_path=str(started.folder / "token"),
                    cluster_file=str(path),
                    started=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                    storage=storage,
                )
            )
            say(READY)
            head = [p for p in psutil.Process().children() if p.name() in ("raylet", "gcs_server")][:2]
            while not told_to_end.wait(1) and all(map(reaper.runs, head)):
                pass
        finally:
            running.remove(name)


def storage_path(file: cluster_file.ClusterFile, name: str) -> str:
    """Where jobs put models and results: `metadata.local.storage_path`, or a folder of this user."""
    if given := file.metadata.local.storage_path:
        return given
    base = Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share").expanduser()
    return str(base / "axicon" / name)


if __name__ == "__main__":
    main()
