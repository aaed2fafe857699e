"""Processes of tests that need torch: forked by one that has loaded it and computed nothing.

A spawned process loads torch anew, two seconds of processor time; one forked from a test has its threads and
locks.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.context import ForkServerContext, ForkServerProcess

LOADED = ["tests.actors.peer", "tests.jobs.compressing"]


def context() -> ForkServerContext:
    """The same server for all tests of a session; it ends with the session."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(LOADED)
    return found


def started(target: Callable[..., object], *args: object) -> ForkServerProcess:
    process = context().Process(target=target, args=args)
    process.start()
    return process
