"""What every benchmark writes beside its figures: the machine, the versions, the commit. And how they are
taken."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from axicon.model.artefact import write_atomically

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "bf16", "i8mm")


def surroundings() -> dict[str, Any]:
    """Hardware, system, versions and commit; no names of machines or users."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "flags": [flag for flag in FLAGS if flag in _cpuinfo("flags", "Features").split()],
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("axicon", "torch", "transformers", "ray")},
        "commit": commit(),
        "load_average": os.getloadavg()[0],
    }


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit measured, with `+` if files of the code differ from it."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":!benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed else "")


def _git(*words: str) -> str:
    return subprocess.run(
        ["git", *words], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()


def _cpu() -> str:
    return _cpuinfo("model name", "CPU part") or platform.processor() or platform.machine()


def _cpuinfo(*keys: str) -> str:
    """The first line of /proc/cpuinfo with one of these keys; empty on other systems."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
    found = re.search(rf"^(?:{'|'.join(keys)})\s*: (.*)$", text, re.MULTILINE)
    return found.group(1).strip() if found else ""


def pss_bytes(pids: Iterable[int]) -> int:
    """Memory of processes together, each shared page counted once (proportional set size)."""
    total = 0
    for pid in pids:
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            continue  # it has just ended
        found = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
        total += int(found.group(1)) * 1024 if found else 0
    return total


def read_bandwidth(threads: int, seconds: float = 1.0) -> float:
    """Bytes per second that all threads together read from memory: the best of several sums over 512 MiB."""
    import torch

    torch.set_num_threads(threads)
    data = torch.ones(2**27)
    best = 0.0
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        data.sum()
        best = max(best, data.numel() * data.itemsize / (time.perf_counter() - start))
    return best


def save(name: str, content: Mapping[str, Any], folder: Path | None = None) -> Path:
    """Write a result as `NAME_DATE.json`; a reader sees all of it or nothing."""
    folder = folder or RESULTS
    recipe = dict(content.get("recipe", {}))
    if "model" in recipe and Path(str(recipe["model"])).is_dir():
        recipe["model"] = Path(recipe["model"]).name  # where it lies is nobody's business
        content = {**content, "recipe": recipe}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}_{datetime.now().strftime('%Y-%m-%d_%H-%M-%S')}.json"
    write_atomically(path, json.dumps(content, indent=2, allow_nan=False) + "\n")
    return path


def complain(text: str) -> None:
    """One line to standard error, at once."""
    print(text, file=sys.stderr, flush=True)
