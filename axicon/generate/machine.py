"""What this process may use of its machine."""

from __future__ import annotations

import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def cores() -> int:
    """Cores this process may keep busy: its affinity, cut to the CPU quota of its cgroup."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup("cpu.max").split()
    if len(quota) == 2 and quota[0] != "max":
        available = min(available, max(1, int(quota[0]) // int(quota[1])))
    return available


def _cgroup(name: str) -> str:
    """A control file of cgroup v2, or an empty string."""
    try:
        return (CGROUP / name).read_text()
    except OSError:
        return ""
