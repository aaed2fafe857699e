"""Peak memory and time of a compression, by block: `python benchmarks/walk.py model=DIR [key=value ...]`.

Each method runs in a process of its own: what `axicon compress` does between reading the model and measuring
the result, on a sample of random tokens, into a folder that is removed. What counts is resident memory beyond
what the process has after its imports, mapped files included. For the bar, which is about the OPT-1.3B shape:

    python benchmarks/random_model.py opt-1.3b DIR && python benchmarks/walk.py model=DIR blocks=3

The whole of it takes hours with `gptq`. Hidden states are on disk, and a block is gone before the next is
read; so the first blocks need as much with 32 windows as all of them, which windows=2 shows in less time.
"""

from __future__ import annotations

import multiprocessing
import re
import sys
import tempfile
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch
from measure import RESULTS, complain, save, surroundings
from pydantic import Field
from rich.console import Console
from rich.table import Table

from axicon.compress import COMPRESSORS
from axicon.compress.calibration import Calibration
from axicon.compress.directory import compress_blocks, write_calibrated, write_compressed
from axicon.compress.estimate import estimate, state_bytes
from axicon.compress.work import Work
from axicon.errors import AxiconError
from axicon.model import checkpoint
from axicon.settings import Method, Recipe, Words

BAR = 1_600_000_000
METHODS: dict[str, dict[str, Any]] = {
    "gptq": {"group": 64, "act_order": True, "static_groups": True, "head": "int8"},
    "group_int4": {"group": 64, "head": "int8"},
}
"""By name, with the settings of the recipes that ship."""
SAMPLE_SECONDS = 0.01


class WalkBench(Recipe):
    model: str = Field(min_length=1, description="dense model to compress")
    methods: Words = Field(tuple(METHODS), description="comma between")
    windows: int = Field(32, ge=1, description="windows of the sample")
    window: int = Field(2048, ge=2, description="tokens per window")
    activations: Literal["memory", "disk"] = Field("disk", description="where hidden states lie")
    blocks: int | None = Field(None, ge=1, description="end after so many blocks; none: all, and the result")
    threads: int = Field(1, ge=1, description="compute threads")
    folder: Path | None = Field(None, description="where the work folder lies; none: a temporary one")
    out: Path = Field(RESULTS, description="folder for the JSON file")


class Enough(Exception):
    """So many blocks as were asked for are done."""


class Memory(threading.Thread):
    """Watches this process: resident bytes above those at the start, and what they were at the most."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before = _resident()
        self.peak = dict.fromkeys(self.before, 0)
        self._end = threading.Event()

    def run(self) -> None:
        while not self._end.wait(SAMPLE_SECONDS):
            self.look()

    def look(self) -> None:
        now = _resident()
        above = {name: now[name] - self.before[name] for name in now}
        if above["total"] > self.peak["total"]:
            self.peak = above

    def stop(self) -> dict[str, int]:
        """The most, and how it was divided when a look found the most. The kernel's own mark sees what falls
        between two looks."""
        self._end.set()
        self.join()
        return self.peak | {"total": max(self.peak["total"], _status("VmHWM") - self.before["total"])}


def _resident() -> dict[str, int]:
    return {"total": _status("VmRSS"), "anonymous": _status("RssAnon"), "files": _status("RssFile")}


def _status(name: str) -> int:
    """A line of /proc/self/status in bytes."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise AxiconError(f"/proc/self/status has no {name}: this benchmark needs Linux")
    return int(found.group(1)) * 1024


def child(bench: WalkBench, method: str, answer: Connection) -> None:
    """Sends the figures of one method, or the text of an AxiconError."""
    try:
        answer.send(measure(bench, method))
    except AxiconError as error:
        answer.send(str(error))


def measure(bench: WalkBench, method: str) -> dict[str, Any]:
    """Compress in this process, which has done nothing yet."""
    torch.set_num_threads(bench.threads)
    settings = METHODS.get(method, {})
    compressor = Method.model_validate({"method": method, **settings}).build(COMPRESSORS, "methods")
    source = checkpoint.resolve(bench.model)
    shape = checkpoint.shape_of(source)
    calibration = None
    if compressor.needs_inputs:
        made = torch.Generator().manual_seed(0)
        calibration = Calibration(torch.randint(shape.vocab, (bench.windows, bench.window), generator=made))
    memory = Memory()
    memory.start()
    on_disk, dtype = bench.activations == "disk", torch.bfloat16
    need, states = estimate(compressor, source, dtype, calibration), 0
    if calibration is not None:
        states = state_bytes(source, dtype, calibration)
        need = need.with_states(states, on_disk)
    blocks: list[dict[str, float]] = []
    start = time.perf_counter()

    def done(number: int, total: int, note: str) -> None:
        memory.look()
        peak, seconds = memory.peak["total"], time.perf_counter() - start
        blocks.append({"seconds": seconds - sum(one["seconds"] for one in blocks), "peak_bytes": peak})
        complain(f"{method}: block {number} of {total}, {blocks[-1]['seconds']:.0f} s, {note}, "
                 f"peak {peak / 1e9:.2f} GB")  # fmt: skip
        if number == bench.blocks and number < total:
            raise Enough

    with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
        target = Path(folder) / "result"
        target.mkdir()
        try:
            if calibration is None:
                write_compressed(compressor, source, target, dtype=dtype, progress=done)
            else:
                work = Work(Path(folder) / "work", {})
                compress_blocks(
                    compressor, source, work, calibration, dtype=dtype, on_disk=on_disk, progress=done)
                write_calibrated(source, target, work, dtype=dtype)
        except Enough:
            pass
    return {
        "method": method, "settings": settings, "peak_bytes": memory.stop(), "blocks_of_model": shape.layers,
        "imports_bytes": memory.before["total"], "estimated_bytes": need.memory, "state_bytes": states,
        "blocks": blocks,
    }  # fmt: skip


def run(bench: WalkBench) -> dict[str, Any]:
    """Everything that goes into the JSON file."""
    result = {"benchmark": "walk", **surroundings(), "bar_bytes": BAR}
    context, runs = multiprocessing.get_context("spawn"), []
    for method in bench.methods:
        ours, theirs = context.Pipe()
        process = context.Process(target=child, args=(bench, method, theirs))
        process.start()
        theirs.close()
        try:
            found = ours.recv()
        except EOFError:
            raise AxiconError(f"{method}: its process ended without an answer") from None
        process.join()
        if isinstance(found, str):
            raise AxiconError(found)
        runs.append(found)
    recipe = bench.model_dump(mode="json", exclude={"out", "folder"})
    return {**result, "load_average_after": surroundings()["load_average"], "recipe": recipe, "runs": runs}


def table(result: dict[str, Any]) -> Table:
    asked = result["recipe"]
    title = (f"{Path(asked['model']).name}, {asked['windows']} windows of {asked['window']}, hidden states: "
             f"{asked['activations']}; {result['cpu']}")  # fmt: skip
    shown = Table(title=title, title_justify="left")
    shown.add_column("GB above imports")
    for column in ("peak", "anonymous", "files", "after 1 block", "estimated", "bar", "blocks", "s/block"):
        shown.add_column(column, justify="right")
    for one in result["runs"]:
        peak, blocks = one["peak_bytes"], one["blocks"]
        figures = (*peak.values(), blocks[0]["peak_bytes"], one["estimated_bytes"], result["bar_bytes"])
        shown.add_row(
            one["method"], *(f"{figure / 1e9:.2f}" for figure in figures),
            f"{len(blocks)} of {one['blocks_of_model']}",
            f"{sum(block['seconds'] for block in blocks) / len(blocks):.0f}")  # fmt: skip
    return shown


def main(words: list[str]) -> None:
    bench = WalkBench.parse(words)
    result = run(bench)
    Console(width=None if sys.stdout.isatty() else 120).print(table(result))
    print(f"written to {save('walk', result, bench.out)}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except AxiconError as error:
        sys.exit(f"walk: {error}")
