"""What this process may use of its machine: cores and memory, within the container's limits."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
from collections.abc import Iterator
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def cores() -> int:
    """Cores this process may keep busy: its affinity, cut to the CPU quota of its cgroup."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup("cpu.max").split()
    if len(quota) == 2 and quota[0] != "max":
        available = min(available, max(1, int(quota[0]) // int(quota[1])))
    return available


def available_memory() -> int | None:
    """Bytes to be had without swapping, within the container's limit; None where it cannot be known."""
    limits = [n for n in (_free(), _free_in_cgroup()) if n is not None]
    return min(limits, default=None)


def return_freed_memory() -> None:
    """Give back to the system what was freed, which glibc keeps for a process that may want it again.

    Packing the weights of the OPT-1.3B shape leaves 1.2 GiB of it, and serving never wants it.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has it
    if trim is not None:
        trim(0)


_left_alone = False
"""Whether `leave_alone` was called. gc, when asked, counts objects one by one: a twentieth of a second."""


def leave_alone() -> None:
    """What is in memory now is never looked through for garbage again."""
    global _left_alone
    gc.collect()
    gc.freeze()
    _left_alone = True


@contextlib.contextmanager
def only_new_garbage() -> Iterator[None]:
    """Until this ends, what is in memory now is not looked through for garbage.

    A process that has imported torch holds half a million objects, which `return_freed_memory` would look at
    again after each block: a fifth of a second. Behind `leave_alone` nothing changes.
    """
    if _left_alone:
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _free() -> int | None:
    try:
        lines = _MEMINFO.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _free_in_cgroup() -> int | None:
    limit, used = _cgroup("memory.max").strip(), _cgroup("memory.current").strip()
    if not (limit.isdigit() and used.isdigit()):
        return None
    # Page cache of files is given back under pressure.
    stat = dict(line.split() for line in _cgroup("memory.stat").splitlines())
    return int(limit) - int(used) + int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))


def _cgroup(name: str) -> str:
    """A control file of cgroup v2, or an empty string."""
    try:
        return (_CGROUP / name).read_text()
    except OSError:
        return ""
