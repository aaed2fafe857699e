"""Follows a job to its end: whole lines of its log, then its status with a reason.

Ray's own command needs 4 s to notice an end; asking is quicker.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any, Protocol

from axicon.errors import RunFailed

QUICK_S = 0.25
SLOW_S = 1.0
"""Between two questions: quick at first, then slow, for each takes some milliseconds from a server."""
FIRST_S = 5.0
"""How long is at first."""
WAITING_S = 10.0
"""How long a job may wait for its node without a word."""
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Jobs(Protocol):
    """What is asked of a `JobSubmissionClient` here."""

    def get_job_info(self, job_id: str) -> Any: ...

    def get_job_logs(self, job_id: str) -> str: ...


def follow(
    jobs: Jobs, name: str, say: Callable[[str], None], sleep: Callable[[float], None] = time.sleep
) -> str:
    """Pass on the log of job `name` as whole lines until the job ends; returns how it ended.

    Raises RunFailed, with the reason, for a job that failed or was stopped.
    """
    begun = told = time.monotonic()
    passed_on = 0
    log = ""
    while True:
        info = jobs.get_job_info(name)  # before the log, which is then complete if the job has ended
        status = status_of(info)
        log = jobs.get_job_logs(name)
        whole = len(log) if status in ENDED else log.rfind("\n") + 1
        if whole > passed_on:
            # A carriage return ends no line.
            for line in log[passed_on:whole].removesuffix("\n").split("\n"):
                say(readable(line))
            passed_on = whole
        if status in ENDED:
            break
        now = time.monotonic()
        if status == "PENDING" and now - told > WAITING_S:
            say(f"{name} waits: {' '.join((info.message or 'for a node').split())}")
            told = now
        sleep(QUICK_S if now - begun < FIRST_S else SLOW_S)
    return outcome(name, status, info, log)


def status_of(info: Any) -> str:
    """PENDING, RUNNING, or one of ENDED."""
    return str(getattr(info.status, "value", info.status))


def readable(line: str) -> str:
    """A line as it ends on a terminal: what a carriage return has overwritten and colours are gone."""
    return ESCAPES.sub("", line.rstrip("\r").rpartition("\r")[2]).rstrip()


def outcome(name: str, status: str, info: Any, log: str) -> str:
    """One line about a job that succeeded. Raises RunFailed for every other end."""
    seconds = ((info.end_time or 0) - (info.start_time or 0)) / 1000
    if status == "SUCCEEDED":
        return f"{name} succeeded after {max(0.0, seconds):.0f} s"
    if status == "STOPPED":
        raise RunFailed(
            f"{name} was stopped, and stopped is not a success; submit the same again to continue"
        )
    code = "" if info.driver_exit_code is None else f" with exit code {info.driver_exit_code}"
    raise RunFailed(f"{name} failed{code}: {reason(info.message or '', log)}")


def reason(message: str, log: str) -> str:
    """The last line that says why: of the job's own log, else of what Ray says of it."""
    for text in (log, message):
        lines = [readable(line).strip() for line in text.splitlines()]
        # Ray's own first line is about the start.
        said = [line for line in lines if line and not line.startswith("Running entrypoint for job")]
        errors = [
            line
            for line in said
            if line.startswith("axicon: ") or re.match(r"[\w.]*(Error|Exception)\b", line)
        ]
        if errors or said:
            return (errors or said)[-1].removeprefix("axicon: ")[:500]
    return "it says no reason; see the logs of the cluster"
