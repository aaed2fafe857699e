"""From `axicon serve` to the first 200 of /health, and the memory of all its processes.

`python benchmarks/startup.py [model=demo] [key=value ...]` starts the server several times, each time waits
until it answers, adds up the memory of everything it started (shared pages once), stops it with Ctrl-C and
looks for what is left behind.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measure import RESULTS, complain, pss_bytes, save, surroundings
from pydantic import Field
from rich.console import Console
from rich.table import Table

from axicon.errors import AxiconError
from axicon.recipe import Recipe, Words

MARK = "AXICON_BENCHMARK"
"""Environment variable that the server's processes inherit, which is how they are found."""


class StartupBench(Recipe):
    model: str = Field("demo", description="what to serve")
    serve: Words = Field((), description="further words for `axicon serve`, such as dtype=float32")
    rounds: int = Field(3, ge=1, description="starts")
    limit_s: float = Field(300, gt=0, description="give up on a start after this time")
    settle_s: float = Field(3, ge=0, description="time between the first 200 and the look at memory")
    out: Path = Field(RESULTS, description="folder for the JSON file")


def start(bench: StartupBench) -> dict[str, Any]:
    """One start and stop."""
    mark, port = secrets.token_hex(8), _free_port()
    command = [sys.executable, "-m", "jobs", "serve", bench.model, f"port={port}", *bench.serve]
    began = time.perf_counter()
    server = subprocess.Popen(
        command, env={**os.environ, MARK: mark}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        _wait(server, f"http://127.0.0.1:{port}/health", began + bench.limit_s)
        ready = time.perf_counter() - began
        time.sleep(bench.settle_s)
        memory = {pid: pss_bytes([pid]) for pid in marked(mark)}
        names = {pid: _name(pid) for pid in memory}
        stopping = time.perf_counter()
        server.send_signal(signal.SIGINT)
        server.communicate(timeout=60)
        stopped = time.perf_counter() - stopping
    finally:
        if server.poll() is None:
            server.send_signal(signal.SIGINT)
            server.communicate(timeout=60)
    return {
        "ready_s": ready,
        "stop_s": stopped,
        "pss_bytes": sum(memory.values()),
        "processes": sorted(([names[pid], memory[pid]] for pid in memory), key=lambda row: -row[1]),
        "left_behind": [_name(pid) for pid in marked(mark)],
    }


def marked(mark: str) -> list[int]:
    """Processes whose environment holds the mark."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:
            continue  # another user's, or just ended
    return found


def _name(pid: int) -> str:
    """What a process is, without its arguments."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return "ended"
    return Path(words[0].decode(errors="replace").split(" ")[0]).name or words[0].decode(errors="replace")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(server: subprocess.Popen[str], url: str, until: float) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while time.perf_counter() < until:
        if server.poll() is not None:
            raise AxiconError(f"the server ended: {server.communicate()[0].strip()[-500:]}")
        try:
            with opener.open(url, timeout=2) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.05)
    raise AxiconError("the server did not answer in time; raise limit_s")


def measure(bench: StartupBench) -> dict[str, Any]:
    """Everything that goes into the JSON file."""
    before = surroundings()
    rounds = []
    for turn in range(bench.rounds):
        rounds.append(start(bench))
        complain(f"start {turn + 1} of {bench.rounds}: ready after {rounds[-1]['ready_s']:.1f} s")
    return {
        "benchmark": "startup",
        **before,
        "load_average_after": surroundings()["load_average"],
        "recipe": bench.model_dump(mode="json", exclude={"out"}),
        "ready_s": statistics.median(one["ready_s"] for one in rounds),
        "pss_bytes": statistics.median(one["pss_bytes"] for one in rounds),
        "rounds": rounds,
    }


def table(result: dict[str, Any]) -> Table:
    shown = Table(title=f"axicon serve {result['recipe']['model']}, {result['cpu']}", title_justify="left")
    for column in ("start", "ready after s", "stopped after s", "memory MiB", "processes", "left behind"):
        shown.add_column(column, justify="right")
    for number, one in enumerate(result["rounds"], start=1):
        shown.add_row(
            str(number),
            f"{one['ready_s']:.1f}",
            f"{one['stop_s']:.1f}",
            f"{one['pss_bytes'] / 2**20:.0f}",
            str(len(one["processes"])),
            str(len(one["left_behind"])),
        )
    largest = result["rounds"][-1]["processes"][:4]
    shown.caption = "largest: " + ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in largest)
    return shown


def main(words: Sequence[str]) -> None:
    bench = StartupBench.parse(words)
    result = measure(bench)
    Console(width=None if sys.stdout.isatty() else 110).print(table(result))
    print(f"written to {save('startup', result, bench.out)}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except AxiconError as error:
        sys.exit(f"startup: {error}")
