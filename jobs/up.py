"""`axicon up` and `axicon down`: the cluster of a cluster.yaml, simulated on this machine."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Literal

import psutil
from pydantic import Field

from axicon.errors import AxiconError, RunFailed
from axicon.settings import Recipe
from jobs import cluster, cluster_file, dashboard, holder, reaper, running
from jobs.address import check_free
from jobs.progress import Reporter

DASHBOARD_PORT = 8265


class UpRecipe(Recipe):
    """What to start on this machine, and under which name."""

    cluster: Path | None = Field(None, description="the cluster.yaml; none: the one that comes with axicon")
    name: str | None = Field(None, min_length=1, description="name of the cluster; none: its cluster_name")
    nodes: Literal["table", "local"] = Field(
        "table", description="table: a simulated node for each of the node table; local: one node"
    )
    dashboard_port: int | None = Field(
        None, ge=1, le=65535, description=f"of Ray's dashboard; none: {DASHBOARD_PORT}, or a free one"
    )
    ready_s: float = Field(180, gt=0, description="give up when it does not run within this time")


class DownRecipe(Recipe):
    """Which cluster to end."""

    name: str | None = Field(None, min_length=1, description="of the cluster; none: the only one")
    patience_s: float = Field(
        30, gt=0, description="kill what has not ended by itself within this time, jobs too"
    )


def run(recipe: UpRecipe, *, say: Callable[[str], None] = print) -> running.Running:
    """Start the cluster, or find it running. Raises AxiconError for everything that a user can mend."""
    begin, reporter = time.monotonic(), Reporter()
    file = cluster_file.read(recipe.cluster)
    path, name = file.path.resolve(), recipe.name or file.name
    with _only_one(name):
        if found := running.read(name):
            if Path(found.cluster_file) != path:
                raise AxiconError(
                    f"a cluster {name} is running from {found.cluster_file}; "
                    f"`axicon down {name}` ends it, --name OTHER starts one beside it"
                )
            say(f"{name} is running already\n{usage(found)}")
            return found
        port = dashboard_port(recipe.dashboard_port)
        reporter.say(f"starting {name} on this machine")
        _start_holder(name, path, recipe, port, reporter)
        found = running.find(name)
    say(f"{name} is ready after {time.monotonic() - begin:.1f} s\n{usage(found)}")
    return found


def dashboard_port(asked: int | None) -> int:
    """The port asked for, or Ray's usual one, or a free one. Raises AxiconError when the first is taken."""
    if asked is not None:
        check_free("dashboard_port", socket.AF_INET, ("127.0.0.1", asked))
        return asked
    with contextlib.suppress(AxiconError):
        check_free("dashboard_port", socket.AF_INET, ("127.0.0.1", DASHBOARD_PORT))
        return DASHBOARD_PORT
    return cluster.free_ports(1)[0]


def usage(found: running.Running) -> str:
    """How to use a cluster that runs: a block of lines to copy from."""
    exports = " ".join(f"{key}={shlex.quote(value)}" for key, value in found.env().items())
    return "\n".join(
        [
            f"  dashboard  {found.dashboard} (it asks for the token in {found.token_path})",
            f"  storage    {found.storage}",
            f"  jobs       axicon submit --cluster {found.name} evaluate demo text=FILE",
            f"  Ray's own  export {exports}",
            "             ray job submit --working-dir . -- python -m jobs evaluate demo text=FILE",
            f"  serve      axicon deploy name={found.name}",
            f"  look       axicon status {found.name}",
            f"  end        axicon down {found.name}",
        ]
    )


@contextlib.contextmanager
def _only_one(name: str) -> Iterator[None]:
    """Nobody else starts or ends the cluster of this name for the time of the block."""
    path = running.path_of(name).with_suffix(".lock")
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AxiconError(
                f"{name} is being started or ended by another `axicon`; wait for that"
            ) from None
        yield


def _start_holder(name: str, path: Path, recipe: UpRecipe, port: int, reporter: Reporter) -> None:
    """Start the process that holds the cluster, and return when that is usable."""
    log = running.path_of(name).with_suffix(".log")
    command = [sys.executable, "-m", "jobs.holder", name, str(path), recipe.nodes, str(port)]
    with open(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,  # no Ctrl-C of this terminal reaches it later
        )
    assert process.stdout is not None
    late = threading.Timer(recipe.ready_s, process.kill)
    late.start()
    try:
        with process.stdout:
            if _follow(process.stdout, reporter):
                return
        too_late = late.finished.is_set()
        raise RunFailed(
            f"ready_s={recipe.ready_s:g}: {name} did not run in this time; allow more, or see {log}"
            if too_late
            else f"{name} could not be started; its log is {log}"
        )
    except BaseException:
        process.terminate()
        process.wait()
        raise
    finally:
        late.cancel()


def _follow(lines: IO[str], reporter: Reporter) -> bool:
    """Pass on what the holder says. True once it is ready; raises AxiconError with its reason."""
    for line in lines:
        text = line.rstrip("\n")
        if text == holder.READY:
            return True
        if text.startswith(holder.FAILED):
            raise RunFailed(text.removeprefix(holder.FAILED))
        reporter.say(text)
    return False


def down(recipe: DownRecipe, *, say: Callable[[str], None] = print) -> None:
    """End a cluster of ours with everything that runs on it. Raises AxiconError."""
    found = running.find(recipe.name)
    with _only_one(found.name):
        reporter = Reporter()
        reporter.say(f"ending {found.name}")
        with contextlib.suppress(AxiconError):  # a cluster that no longer answers is ended all the same
            _stop_jobs(dashboard.find(found.name), recipe.patience_s, reporter)
        holding = psutil.Process(found.pid)
        ours = [holding, *holding.children(recursive=True)]
        holding.terminate()
        if left := reaper.still_running(ours, recipe.patience_s):
            holding.kill()  # its reaper sees to the others
            left = reaper.still_running(left, recipe.patience_s)
        if left:
            numbers = ", ".join(str(process.pid) for process in left)
            raise RunFailed(f"{found.name}: these processes could not be ended: {numbers}; end them yourself")
        running.remove(found.name)
    say(f"{found.name} has ended")


def _stop_jobs(target: dashboard.Dashboard, patience_s: float, reporter: Reporter) -> None:
    """Let running jobs end by themselves: each is sent SIGTERM and keeps what it has."""
    deadline = time.monotonic() + patience_s
    for job in _unfinished(target):
        reporter.say(f"stopping the job {job}")
        target.post(f"/api/jobs/{job}/stop")
    while _unfinished(target) and time.monotonic() < deadline:
        time.sleep(0.2)


def _unfinished(target: dashboard.Dashboard) -> list[str]:
    jobs = target.get("/api/jobs/")
    return [
        job["submission_id"]
        for job in jobs
        if job["submission_id"] and job["status"] in ("PENDING", "RUNNING")
    ]
