"""What a job costs the server beside it: `python benchmarks/loaded.py [key=value ...]`.

Starts `axicon serve` with a dashboard, streams from it while nothing else runs, and then while a job measures
a model on the same cluster. With one stream every token is sent at once, so the gap between two is the time
of a step as a client sees it. The bar is a 99th percentile beside the job of less than 3 medians of the quiet
server, and that the job comes to its end.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from measure import RESULTS, ROOT, complain, save, surroundings
from peer import make_prompts
from pydantic import Field
from rich.console import Console
from rich.table import Table
from server import ServerBench, stream
from serving import serving

from axicon.errors import AxiconError
from axicon.recipe import Recipe, Words

WARM = 8
"""First tokens of a stream, in which the others still read their prompts."""
BAR = 3.0
VOCAB = 10_000
"""Token ids of prompts are below this; every model has them."""


class LoadedBench(Recipe):
    model: str = Field("demo", description="what is served, and what the job measures")
    serve: Words = Field((), description="further words for `axicon serve`, such as threads=2")
    job: Words = Field(("window=512", "windows=12"), description="further words for the job's `evaluate`")
    streams: int = Field(1, ge=1, description="streams at the same time; with more, tokens travel together")
    prompt_tokens: int = Field(64, ge=1, description="tokens of each prompt")
    new_tokens: int = Field(200, ge=32, description="tokens each stream generates")
    rounds: int = Field(6, ge=1, description="turns of the quiet server")
    limit_s: float = Field(300, gt=0, description="give up on the start, and on the job, after this time")
    out: Path = Field(RESULTS, description="folder for the JSON file")


async def turn(asked: ServerBench, prompts: Sequence[Sequence[int]]) -> list[float]:
    """Seconds between tokens of one round of all streams, in the order in which they came."""
    start = time.perf_counter()
    done = await asyncio.gather(*(stream(asked, prompt, asked.new_tokens, start) for prompt in prompts))
    gaps = []
    for one in done:
        late = one.events[WARM:]
        gaps += [(after, after - before) for before, after in itertools.pairwise(late)]
    return [gap for _, gap in sorted(gaps)]


def percentiles(gaps: Sequence[float]) -> dict[str, float]:
    ordered = sorted(gaps)
    at = {
        name: ordered[min(len(ordered) - 1, int(len(ordered) * q))]
        for name, q in (("p50", 0.5), ("p99", 0.99))
    }
    return {**at, "max": ordered[-1], "mean": statistics.mean(ordered), "gaps": len(ordered)}


@contextmanager
def job(bench: LoadedBench, dashboard: str, token: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A measurement submitted to the cluster of the server."""
    text = folder / "text.txt"
    text.write_text((ROOT / "LICENSE").read_text() * 20)
    command = [
        sys.executable, "-m", "jobs", "submit", "--address", dashboard,
        "evaluate", bench.model, f"text={text}", f"out={folder}", *bench.job,
    ]  # fmt: skip
    env = {**os.environ, "RAY_AUTH_TOKEN_PATH": token}
    env.pop("RAY_AUTH_TOKEN", None)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env
    ) as one:
        try:
            yield one
        finally:
            one.terminate()


def measure(bench: LoadedBench) -> dict[str, Any]:
    """Everything that goes into the JSON file."""
    before = surroundings()
    prompts = make_prompts(bench.streams, bench.prompt_tokens, VOCAB)
    starting = serving(bench.model, bench.serve, dashboard=True, limit_s=bench.limit_s)
    with starting as server, tempfile.TemporaryDirectory() as folder:
        asked = ServerBench(url=server.url, streams=bench.streams, new_tokens=bench.new_tokens)
        asyncio.run(turn(asked, prompts))  # warm
        quiet = [gap for _ in range(bench.rounds) for gap in asyncio.run(turn(asked, prompts))]
        complain(f"quiet: {_told(percentiles(quiet))}")
        begun, loaded = time.monotonic(), []
        with job(bench, server.dashboard, server.token(), Path(folder)) as running:
            while running.poll() is None:
                gaps = asyncio.run(turn(asked, prompts))
                if running.poll() is None:  # a turn that saw the end saw a quiet server too
                    loaded += gaps
                if time.monotonic() - begun > bench.limit_s:
                    raise AxiconError(f"the job did not end in {bench.limit_s:g} s; raise limit_s")
            seconds = time.monotonic() - begun
            assert running.stdout is not None
            log = running.stdout.read().splitlines()
        if running.returncode != 0 or not loaded:
            raise AxiconError(f"the job did not succeed, or ended too soon: {' | '.join(log[-3:])}")
        complain(f"beside a job: {_told(percentiles(loaded))}")
        after = [gap for _ in range(2) for gap in asyncio.run(turn(asked, prompts))]
    first = next((line for line in log if line.startswith("axicon evaluate, job")), "")
    result = {"quiet": percentiles(quiet), "loaded": percentiles(loaded), "after": percentiles(after)}
    return {
        "benchmark": "loaded",
        **before,
        "recipe": bench.model_dump(mode="json", exclude={"out"}),
        **result,
        "ratio": result["loaded"]["p99"] / result["quiet"]["p50"],
        "bar": BAR,
        "job_s": seconds,
        "job_threads": re.sub(r".*on \S+( \(\w+\))?, ", "", first),
        "job_last_line": log[-1].partition(" succeeded")[1].strip(),
    }


def _told(found: dict[str, float]) -> str:
    return f"p50 {found['p50'] * 1e3:.1f} ms, p99 {found['p99'] * 1e3:.1f} ms, {found['gaps']:.0f} gaps"


def table(result: dict[str, Any]) -> Table:
    shown = Table(title=f"{result['recipe']['streams']} streams, {result['cpu']}", title_justify="left")
    for column in ("server", "p50 ms", "p99 ms", "longest ms", "gaps"):
        shown.add_column(column, justify="left" if column == "server" else "right")
    for name, key in (("quiet", "quiet"), ("beside a job", "loaded"), ("after it", "after")):
        row = result[key]
        times = (f"{row[one] * 1e3:.1f}" for one in ("p50", "p99", "max"))
        shown.add_row(name, *times, f"{row['gaps']:.0f}")
    verdict = "under" if result["ratio"] < BAR else "over"
    shown.caption = (
        f"p99 beside the job is {result['ratio']:.2f} of the quiet p50, {verdict} the bar of {BAR:g}; "
        f"the job took {result['job_s']:.0f} s with {result['job_threads'] or 'threads unknown'}"
    )
    return shown


def main(words: Sequence[str]) -> None:
    bench = LoadedBench.parse(words)
    result = measure(bench)
    Console(width=None if sys.stdout.isatty() else 110).print(table(result))
    print(f"written to {save('loaded', result, bench.out)}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except AxiconError as error:
        sys.exit(f"loaded: {error}")
