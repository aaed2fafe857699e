"""Steps of the engine while another process keeps a core busy: `python benchmarks/busy.py [key=value ...]`.

Streams without end in the engine's own thread, its watchdog on, as in a server: first alone, then beside a
process that does nothing but compute, then alone again. The bar is a 99th percentile of the steps beside it,
from the moment it starts, of less than 3 medians of the quiet ones.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from measure import RESULTS, complain, save, surroundings
from peer import make_prompts
from pydantic import Field
from rich.console import Console
from rich.table import Table

from axicon.errors import AxiconError
from axicon.model.machine import cores
from axicon.recipe import ModelRecipe
from axicon.settings import Words

BAR = 3.0


class BusyBench(ModelRecipe):
    streams: Words = Field(("1", "8"), description="streams at the same time, comma between")
    prompt_tokens: int = Field(64, ge=1, description="tokens of each prompt")
    new_tokens: int = Field(128, ge=16, description="tokens of a stream, after which another takes its place")
    seconds: float = Field(20, gt=0, description="how long each part lasts")
    out: Path = Field(RESULTS, description="folder for the JSON file")


class Load:
    """Streams that never end, and the times of the steps that only decode."""

    def __init__(self, bench: BusyBench) -> None:
        from axicon.compress.walk import Compress
        from axicon.generate.build import build_engine
        from axicon.generate.thread import EngineThread

        compressor = bench.build_compressor()
        self.bench, self.number, self.target = bench, 0, 0
        self.running: set[str] = set()
        self.steps: list[tuple[float, float]] = []
        self.thread = EngineThread(
            lambda: build_engine(
                bench.model, dtype=bench.dtype, threads=bench.threads or cores(),
                transform=None if compressor is None else Compress(compressor),
            )
        )  # fmt: skip
        self.thread.start()
        engine = self.thread.engine
        self.prompts = make_prompts(16, bench.prompt_tokens, engine.runner.capacity.vocab)
        step = engine.step

        def timed() -> Any:
            deltas = step()
            if engine.decode_only and engine.stats().running == self.target:
                self.steps.append((time.perf_counter(), engine.stats().step_seconds))
            return deltas

        engine.step = timed  # type: ignore[method-assign]

    def add(self) -> None:
        from axicon.generate.request import Request, SamplingParams

        self.number += 1
        # Ends are spread, so that prompts come one by one.
        tokens = self.bench.new_tokens * (8 + self.number % 8) // 8
        params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
        name = str(self.number)
        self.running.add(name)
        prompt = self.prompts[self.number % len(self.prompts)]
        self.thread.submit(Request(id=name, prompt=tuple(prompt), params=params), self._on_delta)

    def _on_delta(self, delta: Any) -> None:
        if delta.finish_reason is not None:
            self.running.discard(delta.request_id)
            if len(self.running) < self.target:
                threading.Thread(target=self.add).start()  # not from the engine's own thread

    def run(self, seconds: float) -> list[float]:
        """Times of the steps of the next seconds."""
        begin = time.perf_counter()
        time.sleep(seconds)
        return [spent for at, spent in self.steps if at - spent >= begin]


@contextmanager
def busy_process() -> Iterator[None]:
    spinner = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        spinner.kill()
        spinner.wait()


def summary(steps: Sequence[float]) -> dict[str, float]:
    if len(steps) < 100:
        raise AxiconError(f"only {len(steps)} steps were seen; raise seconds")
    ordered = sorted(steps)
    return {
        "p50": statistics.median(ordered), "p99": ordered[len(ordered) * 99 // 100], "max": ordered[-1],
        "steps": len(ordered),
    }  # fmt: skip


def measure(bench: BusyBench) -> dict[str, Any]:
    """Everything that goes into the JSON file."""
    before = surroundings()
    found = {}
    for streams in map(int, bench.streams):
        load = Load(bench)
        load.target = streams
        for _ in range(streams):
            load.add()
        load.run(3)
        parts = {"quiet": load.run(bench.seconds)}
        with busy_process():
            parts["busy"] = load.run(bench.seconds)
            threads = load.thread.engine.runner.describe()["threads"]  # type: ignore[attr-defined]
        parts["after"] = load.run(bench.seconds / 2)
        load.target = 0
        load.thread.close()
        one: dict[str, Any] = {name: summary(steps) for name, steps in parts.items()}
        found[streams] = one | {"ratio": one["busy"]["p99"] / one["quiet"]["p50"], "threads_busy": threads}
        complain(f"{streams} streams: {found[streams]['ratio']:.2f}")
    return {
        "benchmark": "busy", **before, "recipe": bench.model_dump(mode="json", exclude={"out"}),
        "bar": BAR, "streams": found,
    }  # fmt: skip


def table(result: dict[str, Any]) -> Table:
    shown = Table(title=f"steps beside a busy process, {result['cpu']}", title_justify="left")
    for column in ("streams", "part", "p50 ms", "p99 ms", "longest ms", "steps", "p99 / quiet p50"):
        shown.add_column(column, justify="left" if column == "part" else "right")
    for streams, one in result["streams"].items():
        for part in ("quiet", "busy", "after"):
            row = one[part]
            times = (f"{row[key] * 1e3:.1f}" for key in ("p50", "p99", "max"))
            ratio = f"{one['ratio']:.2f}" if part == "busy" else ""
            shown.add_row(str(streams), part, *times, f"{row['steps']}", ratio)
        shown.add_section()
    shown.caption = f"the bar is {result['bar']:g}; threads beside the busy process: " + ", ".join(
        f"{one['threads_busy']} at {streams}" for streams, one in result["streams"].items()
    )
    return shown


def main(words: Sequence[str]) -> None:
    bench = BusyBench.parse(words)
    result = measure(bench)
    Console(width=None if sys.stdout.isatty() else 110).print(table(result))
    print(f"written to {save('busy', result, bench.out)}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except AxiconError as error:
        sys.exit(f"busy: {error}")
