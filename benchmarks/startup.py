"""From `axicon serve` to the first 200 of /health, and the memory of all its processes.

`python benchmarks/startup.py [model=demo] [key=value ...]` starts the server several times, each time waits
until it answers, adds up the memory of everything it started (shared pages once), stops it with Ctrl-C and
looks for what is left behind.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measure import RESULTS, complain, pss_bytes, save, surroundings
from pydantic import Field
from rich.console import Console
from rich.table import Table
from serving import serving

from axicon.errors import AxiconError
from axicon.settings import Recipe, Words


class StartupBench(Recipe):
    model: str = Field("demo", description="what to serve")
    serve: Words = Field((), description="further words for `axicon serve`, such as dtype=float32")
    rounds: int = Field(3, ge=1, description="starts")
    limit_s: float = Field(300, gt=0, description="give up on a start after this time")
    settle_s: float = Field(3, ge=0, description="time between the first 200 and the look at memory")
    out: Path = Field(RESULTS, description="folder for the JSON file")


def start(bench: StartupBench) -> dict[str, Any]:
    """One start and stop."""
    with serving(bench.model, bench.serve, limit_s=bench.limit_s) as server:
        time.sleep(bench.settle_s)
        memory = {pid: pss_bytes([pid]) for pid in server.processes()}
        names = {pid: _name(pid) for pid in memory}
        stopped = server.stop()
        return {
            "ready_s": server.ready_s,
            "stop_s": stopped,
            "pss_bytes": sum(memory.values()),
            "processes": sorted(([names[pid], memory[pid]] for pid in memory), key=lambda row: -row[1]),
            "left_behind": [_name(pid) for pid in server.processes()],
        }


def _name(pid: int) -> str:
    """What a process is, without its arguments."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return "ended"
    return Path(words[0].decode(errors="replace").split(" ")[0]).name or words[0].decode(errors="replace")


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
