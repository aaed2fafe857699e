"""`axicon submit`: a verb as a job of a cluster, once, with its log and its end here.

The submission id says what runs: the same verb, recipe, inputs and code are the same job. It is followed
while it runs, not run again when it has succeeded, and tried again under `-2`, `-3` when it failed or was
stopped.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import click
import psutil

from axicon.errors import AxiconError, RunFailed
from axicon.model.presence import present
from jobs import dashboard, follow, parcel, plan, running
from jobs.address import is_loopback
from jobs.shown import size
from jobs.stop import Stopped
from jobs.submitted import SUBMITTED_FROM

STOP_WAIT_S = 60
"""Between SIGTERM and SIGKILL: a pass over a long window, and writing what was measured."""
TIMEOUT_S = 60.0
YOUNG_S = 30.0
"""A cluster that has just started answers before it can take jobs."""
LIKE_HERE = ("AXICON_CACHE", "AXICON_DATA", "HF_HOME", "HF_HUB_OFFLINE")
"""On a cluster of this machine a job finds models and data where the verb would."""
ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,100}")


@dataclass(frozen=True, kw_only=True)
class Submission:
    """How to submit, beside what."""

    cluster: str | None = None
    address: str | None = None
    working_dir: Path | None = None
    id: str | None = None
    cpus: float = 1
    gpus: float = 0
    env_keys: tuple[str, ...] = ()
    detach: bool = False
    again: bool = False

    def words(self) -> str:
        """The options that name the cluster, for a command to type next."""
        named = (("--cluster", self.cluster), ("--address", self.address))
        return "".join(f" {option} {value}" for option, value in named if value)


def run(
    how: Submission, group: click.Group, verb: str, words: Sequence[str], say: Callable[[str], None]
) -> None:
    """Submit a verb of `group` and follow it to its end.

    Raises AxiconError before anything is sent for what can be mended, RunFailed for a job that did not
    succeed.
    """
    if how.id is not None and not ID.fullmatch(how.id):
        raise AxiconError(f"--id {how.id}: letters, digits, dots, dashes and underscores, 100 at most")
    secrets = passed_on(how.env_keys)
    with parcel.working_folder(how.working_dir) as folder:
        # Before a cluster is looked for: what is wrong with the words is wrong on every cluster.
        plan.make(group, verb, words, here=False, sent=folder)
        found = dashboard.find(how.cluster, how.address)
        here = on_this_machine(found)
        # A server here makes room before the job's processes start, which is when they take most.
        with (
            present("job") if here else nullcontext(),
            client(found) as jobs,
            parcel.standing_still(parcel.look(folder)) as package,
        ):
            todo = plan.make(group, verb, words, here=here, sent=folder)
            name, known = attempt(jobs, how.id or todo.name(package.digest), again=how.again)
            if known == "SUCCEEDED":
                say(f"{name} has succeeded already; --again runs it once more")
                return
            if known is None:
                for warning in todo.warnings:
                    say(f"note: {warning}")
                say(f"submitting {name}: {todo.entrypoint.removeprefix('exec ')}")
                whose = how.working_dir or "axicon itself"
                say(f"  to {found.url}, with {len(package.files)} files of {whose} ({size(package.bytes)})")
                send(jobs, how, todo, package.folder, name, environment(todo) | secrets)
            else:
                say(f"{name} runs already; this is its log")
            if how.detach:
                say(f"it goes on by itself; axicon submit{how.words()} --follow {name} shows its log")
                return
            watch(jobs, how, name, say)


def passed_on(names: Sequence[str]) -> dict[str, str]:
    """Variables of this environment for the job. Raises AxiconError for one that is not set."""
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise AxiconError(f"--env-keys {','.join(missing)}: not set in this environment; export it first")
    return {name: os.environ[name] for name in names}


def environment(todo: plan.Plan) -> dict[str, str]:
    """What the job finds in its environment beside what the cluster gives it."""
    env = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S), "TOKENIZERS_PARALLELISM": "false"}
    if threads := todo.recipe.get("threads"):
        env |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    if todo.place is not None:
        env |= {name: os.environ[name] for name in LIKE_HERE if name in os.environ}
        env[SUBMITTED_FROM] = str(todo.place)
    return env


def attempt(jobs: Any, base: str, *, again: bool = False) -> tuple[str, str | None]:
    """(id, status) of the job to follow, or (id, None) for one to submit."""
    tries: dict[int, str] = {}
    for job in jobs.list_jobs():
        found = re.fullmatch(rf"{re.escape(base)}(?:-(\d+))?", job.submission_id or "")
        if found:
            tries[int(found[1] or 1)] = follow.status_of(job)
    if not tries:
        return base, None
    last = max(tries)
    name = base if last == 1 else f"{base}-{last}"
    if tries[last] not in follow.ENDED or (tries[last] == "SUCCEEDED" and not again):
        return name, tries[last]
    return f"{base}-{last + 1}", None


def send(jobs: Any, how: Submission, todo: plan.Plan, folder: Path, name: str, env: dict[str, str]) -> None:
    """Upload and submit. Should another have submitted the same meanwhile, that one is it."""
    until = time.monotonic() + YOUNG_S
    while True:
        try:
            jobs.submit_job(
                entrypoint=todo.entrypoint,
                submission_id=name,
                runtime_env={"working_dir": str(folder), "env_vars": env},
                metadata={"axicon": importlib.metadata.version("axicon"), "verb": todo.verb},
                entrypoint_num_cpus=how.cpus or None,
                entrypoint_num_gpus=how.gpus or None,
            )
            return
        except RuntimeError as error:
            text = " ".join(str(error).split())
            if "already exists" in text:
                return
            if "413" in text:
                raise AxiconError(f"the cluster refuses the upload as too large: {text[:200]}") from None
            if "No available agent" not in text or time.monotonic() > until:
                raise RunFailed(f"the cluster did not take the job: {text[:500]}") from None
        time.sleep(follow.QUICK_S)


def watch(jobs: Any, how: Submission, name: str, say: Callable[[str], None]) -> None:
    """Follow to the end. Whoever stops this process only stops looking."""
    try:
        say(follow.follow(jobs, name, say))
    except Stopped as stopped:
        command = f"axicon submit{how.words()}"
        stopped.did = "detached"
        stopped.kept = f"{name} goes on: {command} --follow {name} shows it, {command} --stop {name} ends it"
        raise


def follow_again(how: Submission, name: str, say: Callable[[str], None]) -> None:
    """The log of a job from its beginning, to its end."""
    with client(dashboard.find(how.cluster, how.address)) as jobs:
        known(jobs, name)
        watch(jobs, how, name, say)


def stop(how: Submission, name: str, say: Callable[[str], None]) -> None:
    """Ask a job to end and wait for that."""
    with client(dashboard.find(how.cluster, how.address)) as jobs:
        status = known(jobs, name)
        if status in follow.ENDED:
            say(f"{name} has ended already: {status}")
            return
        begun = time.monotonic()
        jobs.stop_job(name)
        while (status := follow.status_of(jobs.get_job_info(name))) not in follow.ENDED:
            time.sleep(follow.QUICK_S)
        if status == "STOPPED":
            say(f"{name} was stopped within {time.monotonic() - begun:.0f} s")
        else:
            say(f"{name} came to its end before it could be stopped: {status}")


def listing(how: Submission) -> list[tuple[str, str, str, str, str]]:
    """(id, status, start, seconds, what it runs) of all jobs, the newest last."""
    with client(dashboard.find(how.cluster, how.address)) as jobs:
        found = [job for job in jobs.list_jobs() if job.submission_id]
    rows = []
    for job in sorted(found, key=lambda job: job.start_time or 0):
        start = (job.start_time or 0) / 1000
        end = (job.end_time or 0) / 1000 or time.time()
        when = datetime.fromtimestamp(start).strftime("%Y-%m-%d %H:%M:%S") if start else ""
        took = f"{end - start:.0f} s" if start else ""
        rows.append(
            (job.submission_id, follow.status_of(job), when, took, job.entrypoint.removeprefix("exec "))
        )
    return rows


def known(jobs: Any, name: str) -> str:
    """The status of a job. Raises AxiconError when there is no such job."""
    names = {job.submission_id: follow.status_of(job) for job in jobs.list_jobs() if job.submission_id}
    if name not in names:
        there = f"there are {', '.join(list(names)[-5:])}" if names else "none was submitted to it"
        raise AxiconError(f"the cluster knows no job {name}; {there}")
    return names[name]


@contextmanager
def client(found: dashboard.Dashboard) -> Iterator[Any]:
    """Ray's own client for this cluster. Raises AxiconError when it cannot be reached or has another Ray."""
    theirs, ours = found.get("/api/version")["ray_version"], importlib.metadata.version("ray")
    if theirs.split(".")[:2] != ours.split(".")[:2]:
        raise AxiconError(
            f"the cluster at {found.url} runs Ray {theirs} and this is Ray {ours}; install the same on both"
        )
    with found.in_environment():
        jobs = found.jobs()
        # Ray's client waits for ever.
        jobs._do_request = functools.partial(jobs._do_request, timeout=TIMEOUT_S)  # type: ignore[method-assign]
        import requests

        try:
            yield jobs
        except requests.RequestException as error:
            reason = " ".join(str(error).split())[:200]
            raise RunFailed(
                f"the cluster at {found.url} does not answer any more ({reason}); see `axicon status`, "
                f"and `axicon submit --list` once it does"
            ) from None


def on_this_machine(found: dashboard.Dashboard) -> bool:
    """Whether the cluster runs here. A loopback address may also be a tunnel to another machine."""
    if found.cluster is not None or any(one.dashboard == found.url for one in running.clusters()):
        return True
    host, _, port = found.url.rpartition("//")[2].partition(":")
    if host != "localhost" and not (re.fullmatch(r"[\d.]+", host) and is_loopback(host)):
        return False
    listening = [
        c for c in psutil.net_connections("tcp") if c.status == "LISTEN" and str(c.laddr.port) == port
    ]
    return any(c.pid and "dashboard" in " ".join(psutil.Process(c.pid).cmdline()) for c in listening)
